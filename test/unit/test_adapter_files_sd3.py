"""Adapters of SD3: put on both streams, written for diffusers and in kohya's names, read back, and refused where it must be."""

import itertools
import logging
import re

import pytest
import safetensors.torch
import tiny
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers
from hypothesis import given
from hypothesis import strategies as st
from test_adapter_files import read_raw
from test_adapters import CONFIG, make_unet, with_noise
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from library.errors import UserError
from library.models import adapter_files, adapter_merge, adapters, quantize, sd3_adapter
from library.models.adapter_settings import SDXL_UNET, Rates, Settings

PATTERNS = {"rank_pattern": {r"to_k": 2, r"to_v": 3, "ff": 0}, "alpha_pattern": {"to_k": 0.7, r"transformer_blocks\.1": 5.0}}
KINDS = {"lora": Settings("lora", 4, 3.0, "attention-ff"), "dora": Settings("dora", 4, 0.7, "kohya"),
         "patterns": Settings("lora", 4, 1.4, **PATTERNS), "all-linear": Settings("lora", 4, 2.0, "all-linear"),
         "rslora": Settings("lora", 4, 3.0, rslora=True), "pissa": Settings("lora", 4, 8.0, init="pissa"),
         "loha": Settings("loha", 4, 3.0), "lokr": Settings("lokr", 4, 3.0, "kohya"), "oft": Settings("oft", 4),
         "lycoris": Settings("lycoris", lycoris_config=CONFIG | {"algo": "lokr"}),
         "lycoris-full": Settings("lycoris", lycoris_config={"algo": "loha", "linear_dim": 4, "preset": "full"})}
PLAIN = ["lora", "dora", "patterns", "all-linear", "rslora", "pissa"]


def make_transformer(flavour="3.5-medium", **sizes):
    torch.manual_seed(0)
    own = dict(sample_size=8, patch_size=2, in_channels=16, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=64,
               caption_projection_dim=32, pooled_projection_dim=48, out_channels=16, **tiny.SD3[flavour])
    return SD3Transformer2DModel(**own | sizes).eval().requires_grad_(False)


def make_text_encoders():
    torch.manual_seed(0)
    sizes = {"intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 99, "projection_dim": 16}
    t5 = T5Config(vocab_size=99, d_model=16, d_kv=8, d_ff=16, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu")
    clips = [CLIPTextModelWithProjection(CLIPTextConfig(hidden_size=16, **sizes)) for _ in range(2)]
    return [each.eval().requires_grad_(False) for each in (*clips, T5EncoderModel(t5))]


def predict(transformer):
    draw = torch.Generator().manual_seed(1)
    noisy, prompt, pooled = (torch.randn(*shape, generator=draw) for shape in ((2, 16, 8, 8), (2, 7, 64), (2, 48)))
    with torch.no_grad():
        return transformer(noisy, prompt, pooled, torch.tensor([10.0, 500.0])).sample


def trained(settings, flavour="3.5-medium"):
    transformer = make_transformer(flavour)
    adapters.add(transformer, [], settings)
    return with_noise(transformer)


def everything(settings):
    """{part: network} of SD3, each with an adapter as if it had been trained. Of LyCORIS, presets do not know T5."""
    transformer, encoders = make_transformer(), make_text_encoders()
    config = {"algo": "lokr", "linear_dim": 4, "apply_preset": {"target_module": ["CLIPAttention", "T5Stack"]}}
    adapters.add(transformer, encoders, settings, Settings("lycoris", lycoris_config=config) if settings.lycoris_config else None)
    parts = ("transformer", "text_encoder", "text_encoder_2", "text_encoder_3")
    return dict(zip(parts, map(with_noise, (transformer, *encoders)), strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_does_what_was_trained(kind, tmp_path):
    bare = predict(make_transformer())
    transformer = make_transformer()
    adapters.add(transformer, [], KINDS[kind])
    assert torch.equal(predict(transformer), bare)    # it starts as nothing
    want = predict(with_noise(transformer))
    assert (want - bare).abs().max() > 1e-3
    for fmt in ["kohya", "lycoris"] + (["diffusers"] if kind in PLAIN else []):
        path = adapter_files.save(tmp_path / f"{fmt}.safetensors", {"transformer": transformer}, KINDS[kind], fmt)
        adapter = adapter_files.read(path, transformer.config)
        assert adapter.modules.keys() == {f"transformer.{name}" for name in adapters.weights(transformer)}
        assert (adapter.format, adapter.family) == (fmt if fmt != "kohya" or kind in PLAIN else "lycoris", "SD 3")
        applied = make_transformer()
        adapter_merge.apply(adapter, {"transformer": applied})    # but for LoRA, it is merged
        torch.testing.assert_close(predict(applied), want, rtol=1e-4, atol=2e-5)
    further = make_transformer()
    used = adapter_merge.start_from(adapter, further, [], Settings(rank=99, alpha=3.0), seed=5)
    torch.testing.assert_close(predict(further), want, rtol=1e-4, atol=2e-5)
    again = adapter_files.save(tmp_path / "again.safetensors", {"transformer": further}, used, adapter.format)
    once, twice = read_raw(path)[0], read_raw(again)[0]
    assert once.keys() == twice.keys() and all(torch.equal(once[name], twice[name]) for name in once)


@pytest.mark.parametrize("kind", PLAIN)
def test_diffusers_to_kohya_to_diffusers_is_the_same_file(kind, tmp_path):
    networks = everything(KINDS[kind])
    del networks["text_encoder_3"]
    config = networks["transformer"].config
    first = adapter_files.save(tmp_path / "name.safetensors", networks, KINDS[kind], "diffusers", {"modelspec.date": "now"})
    kohya = adapter_files.write(tmp_path / "kohya" / "name.safetensors", adapter_files.read(first, config), "kohya")
    second = adapter_files.write(tmp_path / "two" / "name.safetensors", adapter_files.read(kohya, config), "diffusers")
    (one, header), (two, other), (middle, _) = (read_raw(path) for path in (first, second, kohya))
    assert one.keys() == two.keys() and {name.split(".")[0] for name in one} == {"transformer", "text_encoder", "text_encoder_2"}
    if kind != "patterns":    # of q, k and v that count differently, the scale goes into the up matrices
        assert header == other and all(torch.equal(one[name], two[name]) for name in one)
    merged = [make_transformer(), make_transformer()]
    for path, network in zip((first, second), merged, strict=True):
        adapter_merge.merge(adapter_files.read(path, config), {"transformer": network} | dict(
            zip(("text_encoder", "text_encoder_2"), make_text_encoders()[:2], strict=True)))
    ours, theirs = (network.state_dict() for network in merged)
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-6, atol=1e-7)
    stability = r"joint_blocks_\d+_(x|context)_block_|[xyt]_embedder_|context_embedder|final_layer_"
    names = re.compile(rf"lora_(unet_({stability})|te[12]_text_)")
    assert all(names.match(name) for name in middle)


@pytest.mark.parametrize("kind", PLAIN)
def test_diffusers_loads_it_whole_and_computes_the_same(kind, tmp_path, caplog):
    """Of the transformer and both CLIPs: no key is missing or unexpected, and each network says what it said."""
    networks = everything(KINDS[kind])
    del networks["text_encoder_3"]
    adapter_files.save(tmp_path / adapter_files.DIFFUSERS_NAME, networks, KINDS[kind], "diffusers")
    absent = dict.fromkeys(("scheduler", "vae", "tokenizer", "tokenizer_2", "tokenizer_3", "text_encoder_3"))
    bare = dict(zip(networks, (make_transformer(), *make_text_encoders()), strict=False))
    before = {part: said(network) for part, network in bare.items()}
    theirs = StableDiffusion3Pipeline(**bare, **absent)
    with caplog.at_level(logging.WARNING):
        theirs.load_lora_weights(tmp_path)
    assert not [text for text in caplog.messages if "key" in text.lower()], caplog.messages
    for part, network in networks.items():
        ours, other = adapters.layers_of(network), adapters.layers_of(getattr(theirs, part), "default_0")
        assert ours.keys() == other.keys()
        assert not (said(network) - before[part]).abs().max() < 1e-3
        torch.testing.assert_close(said(getattr(theirs, part)), said(network), rtol=1e-4, atol=2e-5)


def said(network):
    """What a transformer or text encoder makes of one input."""
    if isinstance(network, SD3Transformer2DModel):
        return predict(network)
    with torch.no_grad():
        output = network(torch.arange(1, 9)[None], output_hidden_states=True)
    return torch.cat([output.hidden_states[-2].flatten(), output[0].flatten()])


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in PLAIN])
def test_lycoris_and_comfyui_know_every_key_of_other_kinds(kind, tmp_path):
    """Of the transformer and all text encoders. diffusers has no loader for them; LyCORIS computes the same."""
    from lycoris import create_lycoris_from_weights
    networks = everything(KINDS[kind])
    raw, _ = read_raw(adapter_files.save(tmp_path / "all.safetensors", networks, KINDS[kind], "kohya"))
    known = {"lycoris_": make_transformer()} | {f"lora_te{n}_": each for n, each in enumerate(make_text_encoders(), 1)}
    flat = {prefix + name.replace(".", "_") for prefix, network in known.items() for name, _ in network.named_modules()}
    assert {name.partition(".")[0] for name in raw} <= flat
    assert all(any(name.startswith(prefix) for name in raw) for prefix in known)
    path = adapter_files.save(tmp_path / "one.safetensors", {"transformer": networks["transformer"]}, KINDS[kind], "lycoris")
    other = make_transformer()
    network, _ = create_lycoris_from_weights(1.0, str(path), other)
    network.apply_to()
    assert len(network.loras) == len(adapters.weights(networks["transformer"]))
    torch.testing.assert_close(predict(other), predict(networks["transformer"]), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("flavour", list(tiny.SD3))
@pytest.mark.parametrize("kind", ["lora", "dora", "patterns", "all-linear"])
def test_comfyui_reads_kohyas_names_to_the_same_weights(kind, flavour, tmp_path):
    """It takes `lora_unet_` and the name in Stability's model with _ for dots, and adds up @ down x alpha / rank."""
    transformer = trained(KINDS[kind], flavour)
    raw, _ = read_raw(adapter_files.save(tmp_path / "a.safetensors", {"transformer": transformer}, KINDS[kind], "kohya"))
    original = tiny.original_layout(make_transformer(flavour))
    flat = {"lora_unet_" + name.removeprefix("model.diffusion_model.").removesuffix(".weight").replace(".", "_"): name
            for name in original if name.endswith(".weight")}
    for module in {name.partition(".")[0] for name in raw}:
        own = {name.partition(".")[2]: tensor for name, tensor in raw.items() if name.partition(".")[0] == module}
        weight = original[flat[module]]
        new = weight + own["lora_up.weight"] @ own["lora_down.weight"] * own["alpha"] / len(own["lora_down.weight"])
        if "dora_scale" in own:
            new = own["dora_scale"] * new / new.norm(dim=1, keepdim=True)
        original[flat[module]] = new
    theirs = convert_sd3_transformer_checkpoint_to_diffusers(original)
    ours = make_transformer(flavour)
    modules = {f"transformer.{name}": own for name, own in adapters.weights(transformer).items()}
    adapter_merge.merge(adapter_files.Adapter(adapter_files.kind_of(modules), modules), {"transformer": ours})
    for name, tensor in ours.named_parameters():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-5, atol=1e-6)


def test_other_kinds_have_the_names_of_simpletuner(tmp_path):
    """ComfyUI knows them as `lycoris_` and diffusers' names, with _ for dots."""
    networks = everything(KINDS["lokr"])
    raw, header = read_raw(adapter_files.save(tmp_path / "a.safetensors", networks, KINDS["lokr"], "kohya"))
    assert {name.split("_")[0] + "_" + name.split("_")[1] for name in raw} == {
        "lycoris_transformer", "lora_te1", "lora_te2", "lora_te3"}
    assert any(name.startswith("lycoris_transformer_blocks_0_attn_add_q_proj.lokr_") for name in raw)
    assert any(name.startswith("lora_te3_encoder_block_1_layer_0_SelfAttention_q.") for name in raw)
    assert (header["ss_network_module"], header["ss_base_model_version"]) == ("lycoris.kohya", "sd3")
    read = adapter_files.read(tmp_path / "a.safetensors", networks["transformer"].config)
    assert read.modules.keys() == {adapter_files.text_name(f"{part}.{name}") for part, network in networks.items()
                                   for name in adapters.weights(network)}


@given(st.integers(1, 4), st.lists(st.sampled_from([0, 1, 2, 3, 5]), min_size=3, max_size=3).filter(any),
       st.lists(st.sampled_from([0.5, 0.7, 1.0, 4.0]), min_size=3, max_size=3))
def test_fused_and_divided_is_the_same(width, ranks, alphas):
    """Whatever ranks and alphas q, k and v have, and whether they have any."""
    torch.manual_seed(0)
    names = [f"transformer.transformer_blocks.7.attn.add_{kind}_proj" for kind in "qkv"]
    modules = {name: {"lora_down.weight": torch.randn(rank, 6), "lora_up.weight": torch.randn(width, rank),
                      "alpha": torch.tensor(alpha)} for name, rank, alpha in zip(names, ranks, alphas, strict=True) if rank}
    (name, own), = sd3_adapter.to_kohya(modules, fused=True).items()
    assert name == "lora_unet_joint_blocks_7_context_block_attn_qkv" and own["lora_up.weight"].shape == (3 * width, sum(ranks))

    def update(own):
        return own["lora_up.weight"] @ own["lora_down.weight"] * own["alpha"] / len(own["lora_down.weight"])

    whole = update(own).chunk(3)
    again = sd3_adapter.to_diffusers({"transformer.joint_blocks.7.context_block.attn.qkv": own})
    assert again.keys() == modules.keys()
    for place, name in enumerate(names):
        wanted = update(modules[name]) if name in modules else torch.zeros(width, 6)
        torch.testing.assert_close(whole[place], wanted)
        if name in modules:
            torch.testing.assert_close(update(again[name]), wanted)
            assert len(again[name]["lora_down.weight"]) == len(modules[name]["lora_down.weight"])


def test_kohyas_own_files_are_divided():
    """It has one LoRA for q, k and v, whose ranks all three use."""
    torch.manual_seed(0)
    own = {"lora_down.weight": torch.randn(3, 8), "lora_up.weight": torch.randn(24, 3), "alpha": torch.tensor(1.0)}
    key = "transformer.joint_blocks.0.x_block.attn2.qkv"
    divided = sd3_adapter.to_diffusers({key: own})
    assert [*divided] == [f"transformer.transformer_blocks.0.attn2.to_{kind}" for kind in "qkv"]
    whole = torch.cat([each["lora_up.weight"] @ each["lora_down.weight"] * each["alpha"] / 3 for each in divided.values()])
    torch.testing.assert_close(whole, own["lora_up.weight"] @ own["lora_down.weight"] / 3)
    loha = {name: torch.randn(*shape) for name, shape in (("hada_w1_a", (24, 3)), ("hada_w1_b", (3, 8)), ("hada_w2_a", (24, 3)),
                                                        ("hada_w2_b", (3, 8)))} | {"alpha": torch.tensor(2.0)}
    products = [(each["hada_w1_a"] @ each["hada_w1_b"]) * (each["hada_w2_a"] @ each["hada_w2_b"])
                for each in sd3_adapter.to_diffusers({key: loha}).values()]
    product = (loha["hada_w1_a"] @ loha["hada_w1_b"]) * (loha["hada_w2_a"] @ loha["hada_w2_b"])
    torch.testing.assert_close(torch.cat(products), product)
    for wrong in ({"lokr_w1": torch.ones(2, 2), "lokr_w2": torch.ones(12, 4)}, own | {"dora_scale": torch.ones(1, 8)}):
        with pytest.raises(UserError, match="cannot be divided exactly"):
            sd3_adapter.to_diffusers({key: wrong})
    with pytest.raises(UserError, match="does not have: joint_blocks.0.x_block.attn.qvk; did you mean x_block.attn.qkv"):
        sd3_adapter.to_diffusers({"transformer.joint_blocks.0.x_block.attn.qvk": own})


def put(path, *names):
    safetensors.torch.save_file({name: torch.zeros(4, 4) for name in names}, path)
    return path


def test_adapters_of_other_families_are_refused_by_name(tmp_path):
    path, sd3 = tmp_path / "a.safetensors", make_transformer().config
    of_sd3 = [adapter_files.save(tmp_path / f"{fmt}.safetensors", {"transformer": trained(KINDS["lora"])}, KINDS["lora"], fmt)
              for fmt in ("diffusers", "kohya", "lycoris")]
    unet = make_unet()
    adapters.add(unet, [], Settings())
    of_sdxl = [adapter_files.save(tmp_path / f"xl-{fmt}.safetensors", {"unet": unet}, Settings(), fmt)
               for fmt in ("diffusers", "kohya", "lycoris")]
    for files, config, family, wanted in ((of_sd3, SDXL_UNET, "SD 3", "SDXL"), (of_sdxl, sd3, "SDXL", "SD 3")):
        for file in files:
            with pytest.raises(UserError, match=f"an adapter of {family}, not of {wanted} .*made for {wanted}$"):
                adapter_files.read(file, config)
    for name, word in (("lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight", "Flux"),
                       ("transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight", "Flux"),
                       ("lora_te_text_model_encoder_layers_0_mlp_fc1.alpha", "SD 1.x"),
                       ("transformer.transformer_blocks.0.attn.to_q.lora_C.weight", "1 of 1 tensors have no known place")):
        with pytest.raises(UserError, match=word):
            adapter_files.read(put(path, name), sd3)
    with pytest.raises(UserError, match="made for another model.*attn2"):    # of SD 3.5 Medium
        adapter_merge.check_fits(adapter_files.read(of_sd3[0], sd3), {"transformer": make_transformer("medium")})


def test_what_a_format_cannot_hold_is_refused(tmp_path):
    only_q = trained(Settings("dora", 4, targets=("attn.to_q",)))
    with pytest.raises(UserError, match="one DoRA for q, k and v.*--lora_format diffusers"):
        adapter_files.save(tmp_path / "a.safetensors", {"transformer": only_q}, Settings("dora"), "kohya")
    networks = everything(KINDS["lora"])
    with pytest.raises(UserError, match="no loader for adapters of SD3's T5.*kohya"):
        adapter_files.save(tmp_path / "a.safetensors", networks, KINDS["lora"], "diffusers")
    with pytest.raises(UserError, match="the transformer alone"):
        adapter_files.save(tmp_path / "a.safetensors", networks, KINDS["lora"], "lycoris")
    with pytest.raises(UserError, match="loha adapters of SD 3.*which ComfyUI and generate.py read"):
        adapter_files.check_format("loha", "both", "SD 3")
    assert not list(tmp_path.iterdir())


# where

STREAMS = {f"attn.{name}" for name in "to_q to_k to_v to_out.0 add_q_proj add_k_proj add_v_proj to_add_out".split()}


def test_targets_lie_in_both_streams():
    large = make_transformer("3.5-large")
    found = {preset: adapters.targets(large, Settings(targets=preset)) for preset in ("attention", "attention-ff", "kohya",
                                                                                      "all-linear")}
    inside = {preset: {name.split(".", 2)[2] for name in names if "blocks" in name} for preset, names in found.items()}
    assert inside["attention"] == STREAMS    # diffusers' own list
    assert inside["attention-ff"] == STREAMS | {f"{ff}.net.{layer}" for ff in ("ff", "ff_context") for layer in ("0.proj", "2")}
    assert inside["kohya"] == inside["attention-ff"] | {"norm1.linear", "norm1_context.linear"} == inside["all-linear"]
    assert found["kohya"].keys() < found["all-linear"].keys()
    dual = adapters.targets(make_transformer(), Settings())
    assert {name.split(".", 1)[1] for name in dual if ".attn2." in name} == {
        f"{block}.attn2.{layer}" for block in (0, 1) for layer in ("to_q", "to_k", "to_v", "to_out.0")}
    encoders = make_text_encoders()
    for preset, clip, t5 in (("attention", 4, "SelfAttention"), ("attention-ff", 6, "DenseReluDense")):
        names = [adapters.targets(encoder, Settings(targets=preset)) for encoder in encoders]
        assert [len(each) for each in names[:2]] == [2 * clip] * 2 and any(t5 in name for name in names[2])


def test_blocks_by_number():
    transformer = make_transformer()
    for text, numbers in (("1", {1}), ("0,2", {0, 2}), ("0-1", {0, 1}), ("1-2, 0", {0, 1, 2})):
        blocks = sd3_adapter.blocks_of(text, "--lora_blocks")
        found = adapters.targets(transformer, Settings(targets="all-linear", blocks=blocks))
        assert {int(name.split(".")[1]) for name in found} == numbers == set(blocks)
        assert all(name.startswith("transformer_blocks.") for name in found)
    with pytest.raises(UserError, match="no block 3, only 0 to 2"):
        adapters.targets(transformer, Settings(blocks=(3,)))
    for wrong in ("", "a", "3-1", "1,,2"):
        with pytest.raises(UserError, match="--lora_blocks.*12,13"):
            sd3_adapter.blocks_of(wrong, "--lora_blocks")
    both = adapters.add(make_transformer(), make_text_encoders(), Settings(blocks=(1,)))    # text encoders have them all
    assert both is None


def test_kohyas_arguments():
    assert sd3_adapter.from_kohya(None, None, {}) == (Settings("lora", 4, 1.0, "kohya"), Rates())
    settings, rates = sd3_adapter.from_kohya(8, 4.0, {
        "context_attn_dim": "2", "x_mlp_dim": "0", "x_mod_dim": "3", "train_block_indices": "0-1", "split_qkv": "True",
        "rank_dropout": "0.1", "loraplus_lr_ratio": "4", "loraplus_text_encoder_lr_ratio": "2"}, 0.2)
    assert (settings.blocks, settings.dropout, settings.rank_dropout, rates) == ((0, 1), 0.2, 0.1, Rates(4.0, 2.0))
    chosen = adapters.targets(make_transformer(), settings)
    assert all(alpha == 4.0 for _, alpha in chosen.values())
    ranks = {name.split(".", 2)[2]: rank for name, (rank, _) in chosen.items()}
    of_text = dict.fromkeys(("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"), 2)
    of_images = [f"{attn}.{layer}" for attn, layer in itertools.product(("attn", "attn2"), ("to_q", "to_k", "to_v", "to_out.0"))]
    others = ["ff_context.net.0.proj", "ff_context.net.2", "norm1_context.linear"]
    assert ranks == of_text | dict.fromkeys(of_images + others, 8) | {"norm1.linear": 3}
    for wrong, word in (({"x_atn_dim": "1"}, "x_atn_dim is not known.*did you mean x_attn_dim"),
                        ({"x_mlp_dim": "a"}, "whole number"), ({"split_qkv": "False"}, "trained apart"),
                        ({"rank_dropout": "a"}, "is not a number"),
                        ({"train_block_indices": "x"}, "train_block_indices x"),
                        ({"emb_dims": "1"}, "--lora_targets"), ({"train_t5xxl": "True"}, "--learning_rate_te3")):
        with pytest.raises(UserError, match=word):
            sd3_adapter.from_kohya(4, 1.0, wrong)


# the frozen base

def test_what_is_never_quantised_and_what_is_not_on_request():
    def plain(*more):
        transformer = make_transformer()
        quantize.apply(transformer, "int8-torchao", skip=(*quantize.SKIP, *more))
        return {name for name, layer in transformer.named_modules() if type(layer) is torch.nn.Linear}

    always = plain()
    assert {name.split(".")[0] for name in always} == {"context_embedder", "time_text_embed", "proj_out", "norm_out"}
    assert {name.split(".", 2)[2] for name in plain("*.norm1*") - always} == {"norm1.linear", "norm1_context.linear"}
    assert plain("*.attn2.*") - always == {name for name, _ in make_transformer().named_modules()
                                           if re.search(r"attn2\.(to_[qkv]|to_out\.0)$", name)}
    assert {name.split(".")[1] for name in plain("transformer_blocks.2") - always} == {"2"}    # a block by its name
    quantize.check_names(make_transformer(), ["pos_embed*", "*.norm1.*", "transformer_blocks.0"], "--quantize_exclude")
    with pytest.raises(UserError, match=r"--quantize_exclude proj_outt fits no layer.*did you mean proj_out"):
        quantize.check_names(make_transformer(), ["proj_out", "proj_outt"], "--quantize_exclude")
