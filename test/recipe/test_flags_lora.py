"""Each flag that train_lora_sdxl.py has beside train_sdxl.py's changes what it says it changes, in a run or in its settings."""

import contextlib
import dataclasses
import json
import math
import re
import shutil

import pytest
import tiny
import torch
from diffusers import UNet2DConditionModel
from pieces import note_calls
from PIL import Image, ImageChops
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_data_sets import losses

from library.data import dataset
from library.data.sampler import Sampler
from library.errors import UserError
from library.models import adapter_files, adapter_flags, adapter_merge, adapters, quantize, sdxl
from library.models.adapter_settings import block_of
from library.models.encoders import Encoders
from library.training import offload, plan

WEIGHTS = "pytorch_lora_weights.safetensors"
PRESETS = ("attention", "attention-ff", "convolutions", "kohya", "all-linear")
FAST = ("--lr_warmup_steps", 0, "--adam_weight_decay", 0, "--learning_rate", 0.02)
ONE = (*FAST, "--max_train_steps", 1)    # Adam's first step is as long as the rate, and moves the up matrices alone


@pytest.fixture
def placed(parse_lora):
    """`placed(*flags)`: what such flags put on the UNet, {module: (rank, alpha)}; nothing is trained."""
    def placed(*flags, without=()):
        args = parse_lora(*flags, without=without)
        unet = sdxl.empty_unet(sdxl.find_base(args))
        return adapters.targets(unet, adapter_flags.settings_of(args, unet.config)[0])

    return placed


@pytest.fixture
def made(train_lora, tiny_model, tmp_path):
    """`made(*flags)`: the adapter that a run of one step writes, and its file; each run has a folder of its own."""
    config = json.loads((tiny_model / "unet" / "config.json").read_text())

    def made(*flags, without=()):
        out = train_lora(*ONE, "--output_dir", tmp_path / f"run{len(list(tmp_path.glob('run*')))}", *flags, without=without)
        (file,) = [path for path in (out / WEIGHTS, out / "last.safetensors") if path.exists()]
        return adapter_files.read(file, config), file

    return made


def largest(adapter, kind: str, part: str = "unet") -> dict[str, float]:
    return {name: own[kind].abs().max().item() for name, own in adapter.part(part).items()}


# what an adapter is

@pytest.mark.parametrize("kind", ["lora", "loha", "lokr", "oft"])
def test_lora_type(made, kind):
    assert made("--lora_type", kind)[0].kind == kind


def test_rank_and_alpha_by_all_their_names(made, parse_lora, placed):
    for rank, alpha in (("--rank", "--lora_alpha"), ("--network_dim", "--network_alpha"), ("--lora_rank", "--lora_alpha")):
        args = parse_lora(rank, 3, alpha, 1.5)
        assert (args.rank, args.lora_alpha) == (3, 1.5)
    assert set(placed(without=["rank"]).values()) == {(16, 16)} and set(placed("--rank", 3).values()) == {(3, 3)}
    adapter, _ = made("--network_dim", 3, "--network_alpha", 1.5)
    assert (adapter.rank, adapter.alpha) == (3, 1.5)


def test_lora_targets(made, placed):
    found = {name: placed("--lora_targets", name) for name in PRESETS}
    assert len(found["attention"]) < len(found["attention-ff"]) < len(found["convolutions"])
    assert len({frozenset(names) for names in found.values()}) == 5 and placed() == found["attention"]
    named = placed("--lora_targets", "attn2.to_k", "mid_block.attentions.0.proj_in")
    assert all(name.endswith("attn2.to_k") or name == "mid_block.attentions.0.proj_in" for name in named) and len(named) > 2
    assert placed("--lora_layers", "attn2.to_k, mid_block.attentions.0.proj_in") == named    # diffusers'
    assert placed("--peft_lora_target_modules", '["attn2.to_k", "mid_block.attentions.0.proj_in"]') == named    # SimpleTuner's
    assert made("--lora_targets", "attn2.to_k", "mid_block.attentions.0.proj_in")[0].part("unet").keys() == named.keys()


def test_ranks_and_alphas_of_parts(made, placed):
    assert not any(".conv" in name for name in placed())
    assert {both for name, both in placed("--conv_rank", 2).items() if ".conv" in name} == {(2, 2)}
    flags = ("--conv_rank", 2, "--conv_alpha", 0.5, "--rank_pattern", "mid_block=3", "attn2=0", "--alpha_pattern", "mid_block=9")
    wanted = placed(*flags)
    assert not any("attn2" in name for name in wanted if "mid_block" not in name)
    assert {both for name, both in wanted.items() if "mid_block" in name} == {(3, 9)}
    assert {both for name, both in wanted.items() if "mid_block" not in name and ".conv" in name} == {(2, 0.5)}
    assert {both for name, both in wanted.items() if "mid_block" not in name and ".conv" not in name} == {(4, 4)}
    written = made(*flags)[0].part("unet")
    assert {name: (adapter_files.rank_of(own), adapter_files.float_of(own["alpha"])) for name, own in written.items()} == wanted


def test_lokr_factor(made):
    sizes = [{own["lokr_w1"].shape[0] for own in made("--lora_type", "lokr", *more)[0].modules.values()}
             for more in ((), ("--lokr_factor", 2))]
    assert sizes[0] != sizes[1] == {2}


def test_dropouts(train_lora, tmp_path):
    """The first loss is the same, for an adapter begins as nothing; the second is not."""
    seen = [losses(train_lora(*FAST, *more, "--output_dir", tmp_path / str(number))) for number, more in enumerate((
        (), ("--lora_dropout", 0.5), ("--network_dropout", 0.5), ("--rank_dropout", 0.5), ("--module_dropout", 0.5)))]
    assert len({first for first, _ in seen}) == 1 and len({second for _, second in seen}) == 4 and seen[1] == seen[2]


def test_use_dora_and_use_rslora(made):
    dora, _ = made("--use_dora")
    assert dora.kind == "dora" and all("dora_scale" in own for own in dora.modules.values())
    assert made("--use_rslora", "--lora_alpha", 3)[0].alpha == 6    # 3 / sqrt(4) is 6 / 4: the alpha that any program reads


def test_lora_init_type(made):
    first = {}
    for way in ("kaiming", "gaussian", "pissa", "olora"):
        adapter, _ = made("--lora_init_type", way, "--learning_rate", 1e-9)
        assert adapter.rank == (8 if way in ("pissa", "olora") else 4)    # beside the factors, what they began as
        first[way] = next(iter(adapter.modules.values()))
    down = {way: own["lora_down.weight"][:4] for way, own in first.items()}
    assert down["kaiming"].abs().max() <= 1 / math.sqrt(down["kaiming"].shape[1])
    assert down["gaussian"].std().item() == pytest.approx(1 / 4, rel=0.3)    # 1 / rank
    up = first["olora"]["lora_up.weight"][:, :4]
    for product in (down["pissa"] @ down["pissa"].T, up.T @ up):    # singular vectors, and an orthogonal matrix
        torch.testing.assert_close(product, torch.diag(product.diag()), rtol=0, atol=1e-4 * product.abs().max().item())


@pytest.mark.parametrize(("more", "trained"), [
    (("--lora_alpha", 2), ()), (("--lora_format", "kohya", "--conv_rank", 2), ()), (("--use_dora",), ()),
    (("--lora_type", "oft"), ()), (("--train_text_encoder",), ("--train_text_encoder",)),
    (("--network_module", "lycoris.kohya", "--network_args", "algo=loha", "--network_train_unet_only"), ())], ids=str)
def test_init_lora(made, train_lora, tiny_model, tmp_path, more, trained):
    """The first loss is that of the model with the adapter merged into it, and kind, rank and alpha are the file's."""
    old, file = made(*more, "--max_train_steps", 2)
    merged = shutil.copytree(tiny_model, tmp_path / "merged")
    networks = {"unet": UNet2DConditionModel.from_pretrained(tiny_model / "unet")}
    for part in ("text_encoder", "text_encoder_2"):
        if old.part(part):
            networks[part] = sdxl.class_of(part).from_pretrained(tiny_model / part)
    adapter_merge.merge(old, networks)
    for part, network in networks.items():
        network.save_pretrained(merged / part)
    new, _ = made("--init_lora", file, *trained, "--learning_rate", 1e-9, without=["rank"])
    assert (new.kind, new.rank, new.alpha) == (old.kind, old.rank, old.alpha) and new.modules.keys() == old.modules.keys()
    assert all(torch.allclose(own[kind], old.modules[name][kind], atol=1e-6) for name, own in new.modules.items() for kind in own)
    started, bare = losses(tmp_path / "run1")[0], losses(tmp_path / "run0")[0]
    base = ("--pretrained_model_name_or_path", merged, "--embedding_cache_dir", tmp_path / "own")
    whole = losses(train_lora(*ONE, *trained, *base))
    assert started == pytest.approx(whole[0], rel=1e-4) and abs(started - bare) > 1e-3


def test_network_weights_is_init_lora(parse_lora):
    assert parse_lora("--network_weights", "a.safetensors", without=["rank"]).init_lora == "a.safetensors"


def test_lycoris_config(made, tmp_path):
    config = {"algo": "loha", "linear_dim": 3, "linear_alpha": 1.5, "apply_preset": {"target_module": ["Attention"]}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    adapter, _ = made("--lora_type", "lycoris", "--lycoris_config", tmp_path / "config.json", without=["rank"])
    assert (adapter.kind, adapter.rank, adapter.alpha) == ("loha", 3, 1.5)
    assert all(".attn" in name for name in adapter.modules)


def test_network_module_and_args(made, placed):
    flags = ("--network_module", "networks.lora", "--network_train_unet_only")
    assert placed(*flags, without=["rank"]).keys() == placed("--lora_targets", "kohya").keys()
    assert set(placed(*flags, without=["rank"]).values()) == {(4, 1)}    # kohya's defaults
    adapter, file = made(*flags, "--network_args", "conv_dim=2", "conv_alpha=0.5")
    assert file.name == "last.safetensors" and {2, 4} == {adapter_files.rank_of(own) for own in adapter.modules.values()}
    adapter, _ = made("--network_module", "lycoris.kohya", "--network_args", "algo=lokr", "factor=2", "--network_train_unet_only")
    assert adapter.kind == "lokr"


# how fast it learns

def test_unet_lr_and_the_rates_of_text_encoders(made):
    adapter, _ = made("--unet_lr", 0.03, "--train_text_encoder", "--text_encoder_lr", 0.01, 0.005)
    for part, rate in (("unet", 0.03), ("text_encoder", 0.01), ("text_encoder_2", 0.005)):
        assert max(largest(adapter, "lora_up.weight", part).values()) == pytest.approx(rate, rel=1e-3)
    adapter, _ = made("--unet_lr", 0, "--train_text_encoder")
    assert not any(largest(adapter, "lora_up.weight").values())
    assert any(largest(adapter, "lora_up.weight", "text_encoder").values())


def test_loraplus_lr_ratio(made):
    plain, plus = made("--max_train_steps", 2)[0], made("--max_train_steps", 2, "--loraplus_lr_ratio", 4)[0]
    ups = [max(largest(adapter, "lora_up.weight").values()) for adapter in (plain, plus)]
    assert ups[1] == pytest.approx(4 * ups[0], rel=0.3) and ups[0] == pytest.approx(2 * 0.02, rel=0.3)


def test_rates_of_blocks(made, tiny_model):
    """The tiny UNet has 6, 3 and 6 blocks where SDXL has 9, 3 and 9."""
    adapter, _ = made("--down_lr_weight", "zeros", "--mid_lr_weight", "0.5,0.5,0.5", "--up_lr_weight", "linear", "--use_ema")
    factors = [1, *[0] * 6, *[0.5] * 3, *[number / 5 for number in range(6)], 1]
    config = json.loads((tiny_model / "unet" / "config.json").read_text())
    for name, size in largest(adapter, "lora_up.weight").items():
        assert size == pytest.approx(0.02 * factors[block_of(name, config)], rel=2e-3), name


# memory

def test_precisions_of_what_is_frozen(train_lora, tmp_path, monkeypatch):
    bare, cache = train_lora(*ONE, "--output_dir", tmp_path / "bare"), ("--embedding_cache_dir", tmp_path / "cache")
    calls = note_calls(monkeypatch, quantize, "apply")
    for flag, precision, network in (("--base_model_precision", "int8-torchao", "UNet2DConditionModel"),
                                     ("--text_encoder_1_precision", "int8-quanto", "CLIPTextModel"),
                                     ("--text_encoder_2_precision", "fp8-quanto", "CLIPTextModelWithProjection")):
        calls.clear()
        out = train_lora(*ONE, flag, precision, *cache, "--output_dir", tmp_path / flag)
        assert [type(given[0]).__name__ for given, _ in calls if given[1] != "no_change"] == [network]
        assert 0 < abs(losses(out)[0] - losses(bare)[0]) < 0.02


def test_offload_activations(train_lora, tmp_path, monkeypatch):
    """On a CPU it is refused; here the CPU plays a device."""
    flags = (*FAST, "--gradient_checkpointing", "--train_text_encoder")
    whole = train_lora(*flags, "--output_dir", tmp_path / "whole")
    monkeypatch.setattr(offload, "check", lambda *_: None)
    monkeypatch.setattr(offload, "activations", lambda wanted, networks, _: offload.to_main_memory(networks, pin=False) if wanted
                        else contextlib.nullcontext())
    calls = note_calls(monkeypatch, offload, "to_main_memory")
    assert losses(train_lora(*flags, "--offload_activations")) == losses(whole) and len(calls) == 2


# files

@pytest.mark.parametrize(("flags", "names"), [
    ((), {WEIGHTS}), (("--lora_format", "diffusers"), {WEIGHTS}), (("--lora_format", "kohya"), {"last.safetensors"}),
    (("--lora_format", "both", "--output_name", "cat"), {WEIGHTS, "cat.safetensors"}),
    (("--lora_type", "loha"), {"last.safetensors"}),
    (("--save_model_as", "safetensors", "--output_name", "cat"), {"cat.safetensors"}),
    (("--network_module", "networks.lora", "--cache_text_encoder_outputs"), {"last.safetensors"})],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "")    # a set's order differs from process to process
def test_lora_format_and_output_name(train_lora, flags, names):
    """Also of what is saved on the way."""
    out, name = train_lora(*flags, "--save_every_n_steps", 1), "cat" if "cat" in flags else "last"
    wanted = names | {each.replace(name, f"{name}-step00000001") for each in names - {WEIGHTS}}
    assert {path.name for path in out.glob("*.safetensors")} == wanted
    assert (out / f"{name}-step00000001" / WEIGHTS).exists() == (WEIGHTS in names)


@pytest.mark.parametrize(("precision", "kind"), [(None, "F32"), ("fp16", "F16"), ("bf16", "BF16"), ("float", "F32")])
def test_save_precision(made, precision, kind):
    _, file = made("--lora_format", "diffusers", *(("--save_precision", precision) if precision else ()))
    with safe_open(file, "pt") as opened:
        assert {opened.get_slice(name).get_dtype() for name in opened.keys()} == {kind}


def test_no_metadata(made):
    headers = []
    for more in ((), ("--no_metadata",)):
        with safe_open(made(*more)[1], "pt") as opened:
            headers.append(opened.metadata())
    assert json.loads(headers[0]["flags"])["rank"] == 4 and headers[0]["ss_learning_rate"] == "0.02"
    assert "flags" not in headers[1] and "ss_learning_rate" not in headers[1] and headers[1]["ss_network_dim"] == "4"


def test_train_text_encoder(made):
    assert {name.split(".")[0] for name in made()[0].modules} == {"unet"}
    adapter, _ = made("--train_text_encoder")
    assert {name.split(".")[0] for name in adapter.modules} == {"unet", "text_encoder", "text_encoder_2"}
    assert all(max(largest(adapter, "lora_up.weight", part).values()) > 0 for part in ("text_encoder", "text_encoder_2"))


def test_use_ema_writes_the_average(train_lora):
    out = train_lora("--use_ema", *FAST, "--max_train_steps", 3)
    average, raw = (load_file(out / "checkpoint-3" / f"{name}.safetensors") for name in ("ema", "adapter"))
    written = load_file(out / WEIGHTS)
    own = {name: (average[name], raw[f"unet.{name}"]) for name in average}
    for name, (mean, last) in own.items():
        saved = written["unet." + name.replace(".default.weight", ".weight")]
        assert torch.equal(saved, mean) and ("lora_A" in name or not torch.equal(saved, last))


def test_a_schedule_free_optimizer_writes_its_average(train_lora):
    out = train_lora(*FAST, "--optimizer", "adamw-schedulefree", "--max_train_steps", 3)
    raw, written = load_file(out / "checkpoint-3" / "adapter.safetensors"), load_file(out / WEIGHTS)
    ups = [name for name in raw if "lora_B" in name]
    assert ups and all(not torch.equal(written[name.replace(".default.weight", ".weight")], raw[name]) for name in ups)


def test_validation_is_drawn_with_the_adapter(train_lora, tmp_path):
    shown = ("--validation_prompt", "a red cat", "--validation_num_inference_steps", 2, "--validation_resolution", 64)
    drawn = []
    for rate in (1e-9, 0.05):
        out = train_lora(*FAST, "--learning_rate", rate, *shown, "--output_dir", tmp_path / str(rate))
        *_, last = sorted(out.rglob("*.png"))
        drawn.append(Image.open(last).convert("RGB"))
    assert max(high for _, high in ImageChops.difference(*drawn).getextrema()) > 3


# DreamBooth

def test_prompts_and_images_of_dreambooth(train_lora, tmp_path, monkeypatch):
    things = tiny.make_images(tmp_path / "things", [(64, 64)] * 2)    # with captions beside them, which do not count
    flags = ("--instance_data_dir", things, "--instance_prompt", "a photo of sks cat")
    calls = note_calls(monkeypatch, Encoders, "encode_prompts")

    def prompts(*more):
        calls.clear()
        folder = tmp_path / str(len(more))
        train_lora(*flags, *more, "--embedding_cache_dir", folder / "cache", "--output_dir", folder, without=["train_data_dir"])
        return {prompt for given, _ in calls for prompt in given[1]}

    assert prompts() - {""} == {"a photo of sks cat"}
    preserving = ("--with_prior_preservation", "--class_data_dir", tmp_path / "kind", "--class_prompt", "a photo of a cat")
    assert prompts(*preserving, "--num_class_images", 2) - {""} == {"a photo of sks cat", "a photo of a cat"}
    assert len(list((tmp_path / "kind").glob("*.png"))) == 2
    prompts(*preserving, "--num_class_images", 3, "--max_train_steps", 1)
    assert len(list((tmp_path / "kind").glob("*.png"))) == 3


def test_repeats_make_an_epoch_longer(parse_lora, tmp_path):
    things = tiny.make_images(tmp_path / "things", [(64, 64)] * 3)
    flags = ("--instance_data_dir", things, "--instance_prompt", "a photo of sks cat", "--num_train_epochs", 2)
    samplers = []
    for repeats in (1, 4):
        args = parse_lora(*flags, "--repeats", repeats, without=["train_data_dir", "max_train_steps"])
        data = dataset.load(args, 1, tmp_path / "scan", decode=False)
        samplers.append(Sampler(data.table.bucket_of, 1, [1], data.table.set_of, [spec.rate for spec in data.table.sets]))
    assert [plan.total_steps(each, 2, None) for each in samplers] == [6, 24]


# what cannot be

FOREIGN = {"flux": ("transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight", 64),
           "sd1": ("lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight", 768)}


@pytest.mark.parametrize(("flags", "words"), [
    (("--rank", 0), "--rank.*0.*at least 1"), (("--lora_alpha", 0), "--lora_alpha.*more than 0"),
    (("--conv_rank", 0), "--conv_rank"), (("--lora_dropout", 1), "--lora_dropout"),
    (("--rank_pattern", "mid_block"), "mid_block=4"), (("--alpha_pattern", "mid_block=0"), "--alpha_pattern.*more than 0"),
    (("--lora_targets", "to_qq"), "named to_qq; did you mean to_q"), (("--lora_type", "lorra"), "--lora_type.*lorra"),
    (("--lora_type", "loha", "--lora_format", "both"), "--lora_format kohya"),
    (("--save_model_as", "ckpt"), "--save_model_as ckpt"),
    (("--lora_type", "oft", "--lora_alpha", 2), "oft.*leave it out"), (("--use_dora", "--lora_type", "lokr"), "--use_dora"),
    (("--lora_type", "lycoris", "--lycoris_config", "nowhere.json"), "--lycoris_config: cannot read nowhere.json"),
    (("--network_args", "conv_dim=2"), "--network_args needs --network_module"),
    (("--network_module", "networks.lora", "--network_args", "conv_dimm=2"), "conv_dimm.*did you mean conv_dim"),
    (("--network_module", "networks.lora", "--loraplus_lr_ratio", 4), "--network_args"),
    (("--down_lr_weight", "1,1"), "down_lr_weight=1,1: 6 numbers"), (("--up_lr_weight", "cosin"), "did you mean cosine"),
    (("--init_lora", "flux"), "adapter of Flux, not of SDXL"), (("--init_lora", "sd1"), "adapter of SD 1.x"),
    (("--init_lora", "nowhere.safetensors"), "nowhere.safetensors"), (("--offload_activations",), "--offload_activations.*CPU"),
    (("--base_model_precision", "int9"), "--base_model_precision.*int9"), (("--instance_prompt", "a"), "--instance_data_dir"),
    (("--class_prompt", "a"), "--with_prior_preservation"), (("--unet_lr", 0), "--unet_lr 0")],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "")
def test_refusals(train_lora, tmp_path, capsys, flags, words):
    """In one sentence, with status 2, before anything is loaded or made."""
    for name, (tensor, width) in FOREIGN.items():
        save_file({tensor: torch.zeros(4, width)}, tmp_path / f"{name}.safetensors")
    flags = [tmp_path / f"{flag}.safetensors" if flag in FOREIGN else flag for flag in flags]
    assert_refused(lambda: train_lora(*flags, without=["rank"]), words, capsys)
    assert not (tmp_path / "lora").exists()


def assert_refused(call, words: str, capsys) -> None:
    with pytest.raises((UserError, SystemExit)) as raised:
        call()
    said = capsys.readouterr().err if raised.type is SystemExit else str(raised.value)
    assert raised.type is UserError or raised.value.code == 2
    assert re.search(words, said) and said.count("\n") == (raised.type is SystemExit), said


@pytest.mark.parametrize("precision", sorted(quantize.SCHEMES))
def test_quantisers_that_are_absent_or_cannot_run(train_lora, tmp_path, monkeypatch, capsys, precision):
    monkeypatch.setattr(quantize, "_installed", lambda module: False)
    scheme = quantize.SCHEMES[precision]
    assert_refused(lambda: train_lora("--base_model_precision", precision),
                   f"--base_model_precision {precision} needs .*: pip install {scheme.package}$", capsys)
    monkeypatch.setitem(quantize.SCHEMES, precision, dataclasses.replace(scheme, devices=("npu",)))
    assert_refused(lambda: train_lora("--text_encoder_1_precision", precision),
                   f"--text_encoder_1_precision {precision} does not run on cpu; there, use .*no_change", capsys)
    assert not (tmp_path / "lora").exists()
