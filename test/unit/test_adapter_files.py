"""Adapter files: others read what we write, we read what others write, and nothing changes on the way."""

import hashlib
import json
import logging

import pytest
import safetensors.torch
import torch
from diffusers import StableDiffusionXLPipeline
from test_adapters import DISTINCT, FULL, KINDS, make_text_encoders, make_unet, predict, with_noise
from tiny import make_model

from library.errors import UserError
from library.models import adapter_files, adapter_merge, adapters
from library.models.adapter_names import sgm_names, split, to_kohya, to_lycoris
from library.models.adapter_settings import SDXL_UNET, Settings

IN_DIFFUSERS = [kind for kind, settings in KINDS.items() if settings.kind in ("lora", "dora")]


def trained_unet(settings):
    unet = make_unet()
    adapters.add(unet, [], settings)
    return with_noise(unet)


def read_raw(path):
    with safetensors.safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()


@pytest.mark.parametrize("kind", [*DISTINCT, "rslora", "lycoris-half"])
def test_a_file_does_what_was_trained(kind, tmp_path):
    unet = trained_unet(KINDS[kind])
    want = predict(unet)
    for fmt in ["kohya", "lycoris"] + (["diffusers"] if kind in IN_DIFFUSERS else []):
        path = adapter_files.save(tmp_path / f"{fmt}.safetensors", {"unet": unet}, KINDS[kind], fmt)
        adapter = adapter_files.read(path, unet.config)
        assert adapter.format == fmt and adapter.modules.keys() == {f"unet.{name}" for name in adapters.weights(unet)}
        if fmt != "kohya":    # kohya's names are another test; the tensors are the same
            continue
        applied, further = make_unet(), make_unet()
        adapter_merge.apply(adapter, {"unet": applied})    # but for LoRA, it is merged
        used = adapter_merge.start_from(adapter, further, [], Settings(rank=99, alpha=3.0), seed=5)
        for other in (applied, further):
            torch.testing.assert_close(predict(other), want, rtol=1e-4, atol=2e-5)
        assert adapters.trained(further) and not any(tensor.requires_grad for tensor in applied.parameters())
        again = adapter_files.save(tmp_path / "again.safetensors", {"unet": further}, used, "kohya")
        once, twice = read_raw(path)[0], read_raw(again)[0]
        assert once.keys() == twice.keys() and all(torch.equal(once[name], twice[name]) for name in once)


@pytest.mark.parametrize("kind", IN_DIFFUSERS)
def test_diffusers_to_kohya_to_diffusers_is_the_same_file(kind, tmp_path):
    unet, encoders = make_unet(), make_text_encoders()
    adapters.add(unet, encoders, KINDS[kind])
    networks = dict(zip(("unet", "text_encoder", "text_encoder_2"), map(with_noise, (unet, *encoders)), strict=True))
    first = adapter_files.save(tmp_path / "name.safetensors", networks, KINDS[kind], "diffusers", {"modelspec.date": "now"})
    read = adapter_files.read(first, unet.config)
    kohya = adapter_files.write(tmp_path / "kohya" / "name.safetensors", read, "kohya", unet.config)
    read = adapter_files.read(kohya, unet.config)
    second = adapter_files.write(tmp_path / "two" / "name.safetensors", read, "diffusers", unet.config)
    (one, header), (two, other), (middle, _) = (read_raw(path) for path in (first, second, kohya))
    assert header == other and one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    assert all(one[name].dtype == two[name].dtype == torch.float32 for name in one)
    assert all(name.startswith(("lora_unet_", "lora_te1_text_", "lora_te2_text_")) for name in middle)


@pytest.fixture(scope="module")
def pipeline_folder(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"))


def draw(pipeline):
    with torch.no_grad():
        return pipeline("a red cat", num_inference_steps=2, height=64, width=64, output_type="pt",
                        generator=torch.Generator().manual_seed(0)).images


@pytest.mark.parametrize("kind", ["lora", "dora", "rslora", "pissa", "kohya"])
def test_diffusers_loads_our_file_whole_and_draws_the_same_image(kind, tmp_path, pipeline_folder, caplog):
    def load():
        return StableDiffusionXLPipeline.from_pretrained(pipeline_folder)

    pipeline = load()
    pipeline.set_progress_bar_config(disable=True)
    bare = draw(pipeline)
    settings, text = KINDS[kind], Settings("dora" if kind == "dora" else "lora", 2, 0.7, rank_pattern={r"layers\.0": 3})
    adapters.add(pipeline.unet, [pipeline.text_encoder, pipeline.text_encoder_2], settings, text)
    networks = {part: with_noise(getattr(pipeline, part), 0.2) for part in ("unet", "text_encoder", "text_encoder_2")}
    want = draw(pipeline)
    assert (want - bare).abs().max() > 0.01
    for fmt in ("diffusers", "kohya"):
        if (kind, fmt) == ("dora", "kohya"):
            continue    # diffusers drops dora_scale of kohya's files, and says so
        path = adapter_files.save(tmp_path / fmt / adapter_files.DIFFUSERS_NAME, networks, settings, fmt)
        other = load()
        other.set_progress_bar_config(disable=True)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            other.load_lora_weights(path.parent)
        assert not [text for text in caplog.messages if "key" in text.lower()], caplog.messages
        for part, network in networks.items():
            ours, theirs = adapters.layers_of(network), adapters.layers_of(getattr(other, part), "default_0")
            assert ours.keys() == theirs.keys()
            for name in ours:
                assert theirs[name].scaling["default_0"] == pytest.approx(ours[name].scaling["default"], rel=1e-6)
        torch.testing.assert_close(draw(other), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rslora", [False, True])
def test_the_file_is_the_one_diffusers_writes(rslora, tmp_path):
    from peft.utils import get_peft_model_state_dict
    unet = trained_unet(Settings("dora", 4, 3.0, rslora=rslora, alpha_pattern={"attn2": 5.0}))
    StableDiffusionXLPipeline.save_lora_weights(tmp_path / "theirs", unet_lora_layers=get_peft_model_state_dict(unet),
                                                unet_lora_adapter_metadata=unet.peft_config["default"].to_dict())
    adapter_files.save(tmp_path / "ours" / adapter_files.DIFFUSERS_NAME, {"unet": unet}, KINDS["dora"], "diffusers")
    paths = [tmp_path / each / adapter_files.DIFFUSERS_NAME for each in ("theirs", "ours")]
    (theirs, their_header), (ours, header) = map(read_raw, paths)
    assert theirs.keys() == ours.keys() and all(torch.equal(theirs[name], ours[name]) for name in ours)
    ours, theirs = (json.loads(each["lora_adapter_metadata"]) for each in (header, their_header))
    if not rslora:
        assert all(ours[f"unet.{name}"] == theirs[f"unet.{name}"] for name in ("r", "lora_alpha", "use_dora", "use_rslora"))
    for each in ("ours", "theirs"):    # alphas from the header
        read = adapter_files.read(tmp_path / each)
        assert read.kind == "dora" and {name: own["alpha"].item() for name, own in read.modules.items()} == {
            name: (5.0 if "attn2" in name else 3.0) * (2 if rslora else 1) for name in read.modules}


def full_size(conv: bool) -> dict[str, tuple[int, int, int, int]]:
    """kohya's LoRA of SDXL, from the tables of Stability's model: name -> in, out, kernel of down, and kernel of the layer."""
    modules = {}
    attention = {"input_blocks_4_1": (640, 2), "input_blocks_5_1": (640, 2), "input_blocks_7_1": (1280, 10),
                 "input_blocks_8_1": (1280, 10), "middle_block_1": (1280, 10)}
    attention |= {f"output_blocks_{n}_1": (1280, 10) if n < 3 else (640, 2) for n in range(6)}
    for place, (width, depth) in attention.items():
        modules |= {f"{place}_proj_in": (width, width, 0), f"{place}_proj_out": (width, width, 0)}
        for layer in range(depth):
            block = f"{place}_transformer_blocks_{layer}"
            for n, text in ((1, width), (2, 2048)):
                modules |= {f"{block}_attn{n}_to_q": (width, width, 0), f"{block}_attn{n}_to_out_0": (width, width, 0),
                            f"{block}_attn{n}_to_k": (text, width, 0), f"{block}_attn{n}_to_v": (text, width, 0)}
            modules |= {f"{block}_ff_net_0_proj": (width, 8 * width, 0), f"{block}_ff_net_2": (4 * width, width, 0)}
    if conv:
        into = {"input_blocks_1_0": (320, 320), "input_blocks_2_0": (320, 320), "input_blocks_4_0": (320, 640),
                "input_blocks_5_0": (640, 640), "input_blocks_7_0": (640, 1280), "input_blocks_8_0": (1280, 1280),
                "middle_block_0": (1280, 1280), "middle_block_2": (1280, 1280)}
        joined = (2560, 2560, 1920, 1920, 1280, 960, 960, 640, 640)    # with what comes from the encoder
        into |= {f"output_blocks_{n}_0": (width, (1280, 640, 320)[n // 3]) for n, width in enumerate(joined)}
        for place, (a, b) in into.items():
            modules |= {f"{place}_in_layers_2": (a, b, 3), f"{place}_out_layers_3": (b, b, 3),
                        f"{place}_emb_layers_1": (1280, b, 0)}
            if a != b:
                modules[f"{place}_skip_connection"] = (a, b, 1)
        modules |= {"input_blocks_3_0_op": (320, 320, 3), "input_blocks_6_0_op": (640, 640, 3),
                    "output_blocks_2_2_conv": (1280, 1280, 3), "output_blocks_5_2_conv": (640, 640, 3)}
    return {f"lora_unet_{name}": value for name, value in modules.items()}


@pytest.mark.parametrize("conv", [False, True])
def test_kohyas_file_of_the_whole_sdxl(conv, tmp_path):
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection
    with torch.device("meta"):
        unet = make_unet(sizes=FULL)
        sizes = {"te1": (768, 12), "te2": (1280, 32)}
        encoders = [kind(CLIPTextConfig(hidden_size=width, intermediate_size=4 * width, num_hidden_layers=depth)) for kind, (
            width, depth) in zip((CLIPTextModel, CLIPTextModelWithProjection), sizes.values(), strict=True)]
    rank, conv_rank = 2, 1
    adapters.add(unet, encoders, Settings("lora", rank, 0.5, "kohya", conv_rank=conv_rank if conv else None,
                                          conv_alpha=0.25 if conv else None))
    modules = {adapter_files.text_name(f"{part}.{name}"): {kind: torch.zeros(tensor.shape) if tensor.ndim else tensor
                                                           for kind, tensor in own.items()}
               for part, network in zip(("unet", "text_encoder", "text_encoder_2"), (unet, *encoders), strict=True)
               for name, own in adapters.weights(network).items()}
    path = adapter_files.write(tmp_path / "a.safetensors", adapter_files.Adapter("lora", modules), "kohya")

    want = full_size(conv)
    assert len(want) == (788 if conv else 722)
    for te, (width, depth) in sizes.items():
        for layer in range(depth):
            head = f"lora_{te}_text_model_encoder_layers_{layer}_"
            want |= {f"{head}self_attn_{name}_proj": (width, width, 0) for name in ("q", "k", "v", "out")}
            want |= {f"{head}mlp_fc1": (width, 4 * width, 0), f"{head}mlp_fc2": (4 * width, width, 0)}
    shapes = {}
    for name, (a, b, kernel) in want.items():
        r = conv_rank if kernel == 3 else rank
        shapes |= {f"{name}.lora_down.weight": (r, a, kernel, kernel) if kernel else (r, a), f"{name}.alpha": (),
                   f"{name}.lora_up.weight": (b, r, 1, 1) if kernel else (b, r)}
    raw, header = read_raw(path)
    assert {name: tuple(tensor.shape) for name, tensor in raw.items()} == shapes
    assert {tensor.item() for name, tensor in raw.items() if name.endswith("alpha")} == ({0.5, 0.25} if conv else {0.5})
    assert header["ss_network_dim"] == "2" and header["ss_network_alpha"] == "0.5"
    assert adapter_files.read(path).modules.keys() == modules.keys()


def test_names_go_there_and_back():
    with torch.device("meta"):
        unet = make_unet(sizes=FULL)
    known = sgm_names()
    for name, module in unet.named_modules():
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)):
            for flat in (to_kohya(f"unet.{name}"), to_lycoris(f"unet.{name}"), f"lora_unet_{name.replace('.', '_')}"):
                assert split(f"{flat}.alpha", known) == (f"unet.{name}", "alpha")
            assert split(f"unet.{name}.lora_A.weight", known) == (f"unet.{name}", "lora_down.weight")
    block = "down_blocks.1.attentions.0.transformer_blocks.0.attn1"
    layer = "text_model.encoder.layers.0.mlp.fc1"
    for theirs, module, kind in (
            (f"unet.{block}.processor.to_out_lora.up.weight", f"unet.{block}.to_out.0", "lora_up.weight"),
            (f"unet.{block}.to_k.lora.down.weight", f"unet.{block}.to_k", "lora_down.weight"),
            (f"unet.{block}.to_k.lora_A.default.weight", f"unet.{block}.to_k", "lora_down.weight"),
            ("text_encoder.encoder.layers.0.mlp.fc1.lora_magnitude_vector", f"text_encoder.{layer}", "dora_scale"),
            (f"text_encoder_2.{layer}.lora_linear_layer.down.weight", f"text_encoder_2.{layer}", "lora_down.weight")):
        assert split(theirs, known) == (module, kind)
    for name in ("lora_unet_Down.alpha", "unet.to_q.weight", "bundle_emb.x", "text_encoder_3.to_q.lora_A.weight"):
        assert split(name, known) is None


def test_header(tmp_path):
    unet = trained_unet(Settings("lora", 4, 0.7))
    path = adapter_files.save(tmp_path / "cat.safetensors", {"unet": unet}, Settings("lora", 4, 0.7), "kohya",
                              {"ss_output_name": "cat", "flags": {"rank": 4}, "ss_network_dim": "99"}, torch.bfloat16)
    raw, header = read_raw(path)
    assert all(isinstance(value, str) for value in header.values())
    assert {name: header[name] for name in ("ss_network_module", "ss_network_dim", "ss_network_alpha", "ss_base_model_version",
                                            "ss_output_name", "modelspec.architecture", "modelspec.title")} == {
        "ss_network_module": "networks.lora", "ss_network_dim": "4", "ss_network_alpha": "0.7", "ss_output_name": "cat",
        "ss_base_model_version": "sdxl_base_v1-0", "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
        "modelspec.title": "cat"}
    assert json.loads(header["flags"]) == {"rank": 4} and json.loads(header["adapter_settings"])["alpha"] == 0.7
    data = path.read_bytes()    # the hash leaves the header out
    assert header["sshs_model_hash"] == hashlib.sha256(data[8 + int.from_bytes(data[:8], "little"):]).hexdigest()
    assert {tensor.dtype for name, tensor in raw.items()} == {torch.bfloat16, torch.float32}
    assert adapter_files.read(path, unet.config).alpha == 0.7    # not bf16's 0.699
    path = adapter_files.save(path, {"unet": trained_unet(KINDS["lokr-factor"])}, KINDS["lokr-factor"], "kohya")
    header = read_raw(path)[1]
    assert header["ss_network_module"] == "lycoris.kohya" and json.loads(header["ss_network_args"]) == {"algo": "lokr"}


def test_lycoris_reads_its_file(tmp_path):
    from lycoris import create_lycoris_from_weights
    for kind in ("lycoris-locon", "lycoris-lokr-dora", "lycoris-full", "lycoris-half", "loha", "oft"):
        unet = trained_unet(KINDS[kind])
        path = adapter_files.save(tmp_path / "a.safetensors", {"unet": unet}, KINDS[kind], "lycoris")
        other = make_unet()
        network, _ = create_lycoris_from_weights(0.5 if kind == "lycoris-half" else 1.0, str(path), other)
        network.apply_to()
        torch.testing.assert_close(predict(other), predict(unet), rtol=1e-4, atol=2e-5)


def test_weights_of_adapters(tmp_path):
    unet = trained_unet(KINDS["lora"])
    read = {}
    for kind in ("lora", "dora"):
        path = adapter_files.save(tmp_path / "a.safetensors", {"unet": trained_unet(KINDS[kind])}, KINDS[kind], "kohya")
        read[kind] = adapter_files.read(path, unet.config)
    name, base = "mid_block.attentions.0.proj_in", make_unet()
    for kind, adapter in read.items():
        half, whole = make_unet(), make_unet()
        adapter_merge.merge(adapter, {"unet": whole})
        adapter_merge.merge(adapter, {"unet": half}, 0.5)
        a, b, c = (network.get_submodule(name).weight for network in (base, half, whole))
        torch.testing.assert_close(b - a, (c - a) / 2), kind
    twice, merged = make_unet(), make_unet()
    for weight in (0.3, -0.8):
        adapter_merge.apply(read["lora"], {"unet": twice}, weight)
    adapter_merge.merge(read["lora"], {"unet": merged}, -0.5)
    torch.testing.assert_close(predict(twice), predict(merged), rtol=1e-4, atol=2e-5)
    adapter_merge.apply(read["dora"], {"unet": twice}, 0.5)    # into the weights below the two
    assert not torch.equal(predict(twice), predict(merged))
    half = make_unet(torch.bfloat16)
    adapter_merge.merge(read["dora"], {"unet": half})
    assert half.dtype == torch.bfloat16 and half.get_submodule(name).weight.dtype == torch.bfloat16


def test_start_from_what_text_encoders_there_are(tmp_path):
    unet, encoders = make_unet(), make_text_encoders()
    adapters.add(unet, encoders, Settings("lora", 4, 2.0))
    networks = dict(zip(("unet", "text_encoder", "text_encoder_2"), map(with_noise, (unet, *encoders)), strict=True))
    both = adapter_files.read(adapter_files.save(tmp_path / "a.safetensors", networks, Settings(), "diffusers"))
    alone = adapter_files.read(adapter_files.save(tmp_path / "b.safetensors", {"unet": unet}, Settings(), "diffusers"))
    with pytest.raises(UserError, match="text_encoder.*not loaded"):
        adapter_merge.start_from(both, make_unet(), [], Settings())
    others = make_text_encoders()
    used = adapter_merge.start_from(both, make_unet(), others, Settings("dora", 9, module_dropout=0.0))
    assert (used.kind, used.rank, used.alpha) == ("lora", 4, 2.0)
    for one, two in zip(encoders, others, strict=True):
        assert all(torch.equal(tensor, adapters.state_dict(two)[name]) for name, tensor in adapters.state_dict(one).items())
    fresh = make_text_encoders()
    adapter_merge.start_from(alone, make_unet(), fresh, Settings(), Settings("lora", 3))
    assert {len(own["lora_down.weight"]) for own in adapters.weights(fresh[0]).values()} == {3}


def put(path, tensors, **header):
    safetensors.torch.save_file(tensors, path, header or None)
    return path


def test_what_is_not_an_adapter_of_sdxl_is_refused(tmp_path):
    path, some = tmp_path / "a.safetensors", torch.zeros(4, 4)
    block = "down_blocks.1.attentions.0.transformer_blocks.0.attn2"
    for names, word in ((("transformer.transformer_blocks.0.attn.to_q.lora_A.weight",), "SD 3"),
                        (("lora_unet_joint_blocks_0_x_block_attn_qkv.lora_down.weight",), "SD 3"),
                        (("lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight",), "Flux"),
                        (("lora_te_text_model_encoder_layers_0_mlp_fc1.alpha",), "SD 1.x"),
                        (("unet.down_blocks.0.attentions.0.proj_in.lora_A.weight",), "SD 1.x"),
                        (("unet.conv_in.weight", "unet.conv_in.lora_A.weight"), r"1 of 2 tensors.*first unet\.conv_in\.weight"),
                        (("lora_unet_conv_in.lora_side.weight",), "lora_side"), ((), "0 of 0")):
        with pytest.raises(UserError, match=word):
            adapter_files.read(put(path, {name: some.clone() for name in names}), SDXL_UNET)
    with pytest.raises(UserError, match="of Flux, not of SDXL or SD 3 "):    # where either would do
        adapter_files.read(put(path, {"transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight": some}))
    for width, word in ((768, "SD 1.x"), (1024, "SD 2.x")):
        with pytest.raises(UserError, match=word):
            adapter_files.read(put(path, {f"unet.{block}.to_k.lora_A.weight": torch.zeros(4, width)}))
    path.write_bytes(b"no")
    for bad, word in ((path, "cannot read"), (tmp_path / "b.safetensors", "cannot read"), (tmp_path / "b.ckpt", "safetensors")):
        with pytest.raises(UserError, match=word):
            adapter_files.read(bad)


def test_an_adapter_of_another_size_is_refused_before_anything_changes(tmp_path):
    unet = trained_unet(KINDS["lora"])
    wide = make_unet(sizes={**{key: value for key, value in FULL.items() if "block_out" not in key and "layers" not in key},
                            "block_out_channels": (32, 64, 64), "layers_per_block": 1, "norm_num_groups": 16,
                            "transformer_layers_per_block": 1, "attention_head_dim": (1, 2, 2), "cross_attention_dim": 96})
    for kind in ("lora", "loha", "lokr", "oft", "lycoris-full"):
        path = adapter_files.save(tmp_path / "a.safetensors", {"unet": trained_unet(KINDS[kind])}, KINDS[kind], "kohya")
        adapter = adapter_files.read(path, unet.config)
        if kind != "oft":    # that turns outputs, whatever their inputs
            before = {name: tensor.clone() for name, tensor in wide.state_dict().items()}
            for use in (adapter_merge.merge, adapter_merge.apply):
                with pytest.raises(UserError, match="another model.*attn2"):
                    use(adapter, {"unet": wide})
            assert all(torch.equal(before[name], tensor) for name, tensor in wide.state_dict().items())
        with pytest.raises(UserError, match="another model"):
            adapter_merge.start_from(adapter, make_unet(sizes=SHALLOW), [], Settings())
    quantised = make_unet()
    quantised.mid_block.attentions[0].proj_in.weight = torch.nn.Parameter(
        torch.zeros(64, 64, dtype=torch.int8), requires_grad=False)
    with pytest.raises(UserError, match="quantised"):
        adapter_merge.merge(adapter_files.read(adapter_files.save(
            tmp_path / "a.safetensors", {"unet": trained_unet(KINDS["all-linear"])}, KINDS["all-linear"], "kohya"), unet.config),
            {"unet": quantised})


SHALLOW = {"block_out_channels": (16, 16, 16), "layers_per_block": 1, "transformer_layers_per_block": 1, "attention_head_dim": 1,
           "cross_attention_dim": 48, "addition_time_embed_dim": 16, "projection_class_embeddings_input_dim": 128,
           "norm_num_groups": 16}


def test_formats_are_refused_before_training(tmp_path):
    for kind in ("loha", "lokr", "oft", "lycoris"):
        for fmt in ("diffusers", "both"):
            with pytest.raises(UserError, match=f"{kind}.*kohya"):
                adapter_files.check_format(kind, fmt)
        adapter_files.check_format(kind, "kohya")
    adapter_files.check_format("dora", "both")
    encoder = make_text_encoders()[0]
    adapters.add(None, [encoder], Settings())
    with pytest.raises(UserError, match="text encoder"):
        adapter_files.save(tmp_path / "a.safetensors", {"text_encoder": encoder}, Settings(), "lycoris")
    assert not any(tmp_path.iterdir())


PLACE = "lora_unet_mid_block_attentions_0_proj_in"
FACTORS = {"lora_down.weight": torch.ones(4, 8), "lora_up.weight": torch.ones(8, 4), "alpha": torch.tensor(4.0)}
LOKR = {"lokr_w1": torch.ones(2, 2), "lokr_w2_a": torch.ones(4, 2), "lokr_w2_b": torch.ones(2, 4), "alpha": torch.tensor(2.0)}


@pytest.mark.parametrize("own, header, said", [
    ({name: FACTORS[name] for name in ("lora_down.weight", "alpha")}, {}, "is not whole: .* and no lora_up.weight"),
    ({name: FACTORS[name] for name in ("lora_up.weight", "alpha")}, {}, "is not whole: .* and no lora_down.weight"),
    ({"alpha": FACTORS["alpha"]}, {}, "is not whole: .* has alpha and no weights"),
    ({name: LOKR[name] for name in ("lokr_w1", "alpha")}, {}, "and no lokr_w2"),
    ({name: LOKR[name] for name in ("lokr_w1", "lokr_w2_a", "alpha")}, {}, "and no lokr_w2_b"),
    (FACTORS | {"lora_up.weight": torch.ones(8, 2)}, {}, "lora_down is of rank 4 and lora_up of rank 2"),
    (FACTORS, {"lora_adapter_metadata": "{x"}, "lora_adapter_metadata in its header is not a JSON object"),
    (FACTORS, {"adapter_settings": "[1]"}, "adapter_settings in its header is not a JSON object")])
def test_what_is_not_whole_is_refused_when_it_is_read(tmp_path, own, header, said):
    path = tmp_path / "a.safetensors"
    safetensors.torch.save_file({f"{PLACE}.{name}": tensor for name, tensor in own.items()}, path, header)
    with pytest.raises(UserError, match=said):
        adapter_files.read(path)


def test_whole_ones_are_read(tmp_path):
    for own in (FACTORS, LOKR):
        path = tmp_path / "a.safetensors"
        safetensors.torch.save_file({f"{PLACE}.{name}": tensor for name, tensor in own.items()}, path)
        assert adapter_files.read(path).modules["unet.mid_block.attentions.0.proj_in"].keys() == own.keys()
