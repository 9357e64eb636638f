"""train_lora_sd3.py on a tiny SD 3.5: it starts as the base, stops and goes on, and writes what others load."""

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from forks import flags as of_a_fork
from forks import together
from pieces import note_calls
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_data_sets import losses
from test_flags_lora import assert_refused, largest
from test_sd3_run import SHOWN, drawn, metrics

import train_lora_sd3
import train_sd3
from library.errors import UserError
from library.models import adapter_files, adapter_flags, adapter_merge, adapters, quantize, sd3

WEIGHTS = "pytorch_lora_weights.safetensors"
TEXT = ("--train_text_encoder", "--learning_rate_te3", 1e-3)
FAST = ("--adam_weight_decay", 0, "--learning_rate", 0.02)
ONE = (*FAST, "--max_train_steps", 1)    # Adam's first step is as long as the rate, and moves the up matrices alone
KINDS = [(), ("--use_dora",), ("--lora_type", "loha"), ("--lora_type", "lokr"), ("--lora_type", "oft"),
         ("--lora_targets", "attention-ff", "--lora_blocks", "0,2"), ("--lora_init_type", "pissa"),
         ("--lora_dropout", 0.5, "--rank_dropout", 0.5, "--module_dropout", 0.5), TEXT,
         ("--network_module", "lycoris.kohya", "--network_args", "algo=lokr", "--network_train_unet_only")]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.make_sd3(tmp_path_factory.mktemp("sd3"), "3.5-medium")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def parse(model, tiny_images, cache, tmp_path):
    usual = {"pretrained_model_name_or_path": model, "train_data_dir": tiny_images, "output_dir": tmp_path / "out",
             "embedding_cache_dir": cache, "resolution": 64, "train_batch_size": 2, "max_train_steps": 2, "seed": 1,
             "report_to": "none", "logging_steps": 1, "lr_warmup_steps": 0}

    def parse(*flags, without=(), script=train_lora_sd3):
        own = usual | ({"rank": 4} if script is train_lora_sd3 else {})
        return script.parse_args([*(f"--{name}={value}" for name, value in own.items() if name not in without), *map(str, flags)])

    return parse


@pytest.fixture
def train(parse, one_process, monkeypatch):
    """`train(*flags)`: a whole run in this process -> its output folder; later flags go before earlier ones."""
    def train(*flags, without=(), script=train_lora_sd3):
        one_process()
        args = parse(*flags, without=without, script=script)
        with monkeypatch.context() as patch:
            patch.setattr(script.report, "write_loss_curve", lambda folder: folder)
            patch.setattr(script.report, "write_report", lambda folder, **_: folder)
            script.main(args)
        return Path(args.output_dir)

    return train


@pytest.fixture
def made(train, model, tmp_path):
    """`made(*flags)`: the adapter that a run of one step writes, and its file; each run has a folder of its own."""
    config = json.loads((model / "transformer" / "config.json").read_text())

    def made(*flags, without=()):
        out = train(*ONE, "--output_dir", tmp_path / f"run{len(list(tmp_path.glob('run*')))}", *flags, without=without)
        (file,) = [path for path in (out / WEIGHTS, out / "last.safetensors") if path.exists()]
        return adapter_files.read(file, config), file

    return made


@pytest.fixture
def placed(parse):
    """`placed(*flags)`: what such flags put on the transformer, {module: (rank, alpha)}; nothing is trained."""
    def placed(*flags, without=()):
        args = parse(*flags, without=without)
        transformer = sd3.empty_transformer(sd3.find_base(args))
        return adapters.targets(transformer, adapter_flags.settings_of(args, transformer.config)[0])

    return placed


# one run

def test_the_first_loss_is_that_of_the_full_script(train, tmp_path):
    """The adapter adds nothing at first: then the same images, noise and levels give the same loss."""
    for objective in ((), ("--precondition_outputs", "--weighting_scheme", "cosmap", "--flow_schedule_auto_shift")):
        folder = tmp_path / str(len(objective))
        full = losses(train("--max_train_steps", 1, *objective, "--output_dir", folder / "full", script=train_sd3))
        for number, kind in enumerate(KINDS if not objective else KINDS[:1]):
            first = losses(train("--max_train_steps", 1, *objective, *kind, "--output_dir", folder / str(number)))
            assert first[0] == pytest.approx(full[0], rel=1e-6), kind


def test_the_loss_falls(train, tmp_path):
    same = ("--learning_rate", 0.01, "--max_train_steps", 25, "--train_batch_size", 6)
    fell = losses(train(*same, "--output_dir", tmp_path / "long"))
    still = losses(train(*same, "--learning_rate", 1e-12, "--output_dir", tmp_path / "still"))
    assert np.mean(fell[-10:]) < np.mean(still[-10:]) - 0.1


@pytest.mark.parametrize("more", [("--lora_format", "both", "--train_text_encoder"),
                                  (*TEXT, "--use_dora", "--lora_dropout", 0.3)], ids=["both", "T5"])
def test_stopped_and_continued_it_is_the_same_bits(train, tmp_path, more):
    more = (*more, "--max_train_steps", 6, "--checkpointing_steps", 3, "--use_ema", "--random_flip", "--spike_guard", "skip",
            "--clip_l_dropout_rate", 0.3, "--learning_rate", 0.01)
    whole = train(*more)
    again = tmp_path / "again"
    shutil.copytree(whole / "checkpoint-3", again / "checkpoint-3")
    train(*more, "--output_dir", again, "--resume_from_checkpoint", "latest")
    names = ({WEIGHTS} if "both" in more else set()) | {"last.safetensors"}
    assert {path.name for path in whole.glob("*.safetensors")} == names
    for name in (*names, "checkpoint-6/adapter.safetensors", "checkpoint-6/ema.safetensors"):
        one, other = load_file(whole / name), load_file(again / name)
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one), name
    assert losses(again) == losses(whole)[3:] and len(set(losses(whole))) == 6


def test_one_process_is_accumulation_and_two_processes(train, model, tiny_images, cache, tmp_path):
    more = ("--max_train_steps", 3, *TEXT, "--adam_epsilon", 1e-6, "--rank", 4, "--max_grad_norm", 0.5, "--use_ema")
    one = train("--train_batch_size", 4, *more)
    two = train("--train_batch_size", 2, "--gradient_accumulation_steps", 2, *more, "--output_dir", tmp_path / "two")
    spread = of_a_fork(model, tiny_images, tmp_path / "spread", "--embedding_cache_dir", cache, "--train_batch_size", 2,
                       "--lr_warmup_steps", 0, *more)
    for process in together(spread, tmp_path / "log", 2, script="train_lora_sd3"):
        assert process.wait() == 0, process.text()
    for other in (two, tmp_path / "spread"):
        np.testing.assert_allclose(losses(other), losses(one), rtol=1e-6)
        for name in ("last.safetensors", "checkpoint-3/adapter.safetensors"):    # averaged, and not
            ours, theirs = load_file(one / name), load_file(other / name)
            assert max((ours[key] - theirs[key]).abs().max() for key in ours) < 1e-5


# what it writes

def test_diffusers_loads_it_and_draws_what_validation_drew(train, model, caplog):
    """Without a missing or unexpected key; and from kohya's file comes the same image."""
    out = train(*SHOWN, *FAST, "--max_train_steps", 3, "--lora_format", "both", "--train_text_encoder", "--lora_targets", "kohya",
                "--validation_guidance", 3.0)
    ((_, shown),) = drawn(out, 3).items()
    images = []
    for file in (None, WEIGHTS, "last.safetensors"):
        pipeline = StableDiffusion3Pipeline.from_pretrained(model)
        pipeline.set_progress_bar_config(disable=True)
        networks = {part: getattr(pipeline, part) for part in ("transformer", "text_encoder", "text_encoder_2")}
        if file == WEIGHTS:
            with caplog.at_level(logging.WARNING):
                pipeline.load_lora_weights(out)
            assert not [text for text in caplog.messages if "key" in text.lower()], caplog.messages
            loaded = {f"{part}.{name}" for part, network in networks.items() for name in adapters.layers_of(network, "default_0")}
            read = adapter_files.read(out, pipeline.transformer.config)
            assert loaded == {*read.modules} and {key.split(".")[0] for key in loaded} == networks.keys()
        elif file:
            adapter_merge.apply(adapter_files.read(out / file, pipeline.transformer.config), networks)
        images.append(pipeline("a red cat", negative_prompt="", width=64, height=64, num_inference_steps=6, guidance_scale=3.0,
                               max_sequence_length=154, generator=torch.Generator().manual_seed(1), output_type="np").images[0])
    assert np.abs(images[1] * 255 - shown).max() < 1.5    # rounding
    assert np.abs(images[2] - images[1]).max() < 1e-3 < 0.01 < np.abs(images[1] - images[0]).max()


def test_formats_and_what_the_header_tells(made):
    _, file = made()
    with safe_open(file, "pt") as opened:
        header = opened.metadata()
    assert file.name == WEIGHTS and json.loads(header["flags"])["rank"] == 4 and header["ss_learning_rate"] == "0.02"
    assert header["ss_base_model_version"] == "sd3" and "ss_min_snr_gamma" not in header
    for more in (TEXT, ("--lora_type", "loha"), ("--network_module", "networks.lora_sd3", "--network_train_unet_only")):
        assert made(*more)[1].name == "last.safetensors", more
    adapter, _ = made("--save_precision", "bf16")
    assert {own["lora_up.weight"].dtype for own in adapter.modules.values()} == {torch.bfloat16}


@pytest.mark.parametrize(("more", "trained"), [(("--lora_alpha", 2, *TEXT), TEXT), (("--use_dora", "--lora_format", "kohya"), ()),
                                               (("--lora_type", "lokr"), ())], ids=["T5", "dora", "lokr"])
def test_init_lora(made, train, model, tmp_path, more, trained):
    """The first loss is that of the model with the adapter merged into it."""
    old, file = made(*more, "--max_train_steps", 2)
    merged = shutil.copytree(model, tmp_path / "merged")
    networks = {"transformer": SD3Transformer2DModel.from_pretrained(model / "transformer")}
    networks |= {part: sd3.class_of(part).from_pretrained(model / part) for part in sd3.TEXT_ENCODERS if old.part(part)}
    adapter_merge.merge(old, networks)
    for part, network in networks.items():
        network.save_pretrained(merged / part)
    new, _ = made("--init_lora", file, *trained, "--learning_rate", 1e-9, without=["rank"])
    assert (new.kind, new.rank, new.alpha) == (old.kind, old.rank, old.alpha) and new.modules.keys() == old.modules.keys()
    whole = losses(train(*ONE, *trained, "--pretrained_model_name_or_path", merged, "--embedding_cache_dir", tmp_path / "own"))
    started, bare = losses(tmp_path / "run1")[0], losses(tmp_path / "run0")[0]
    assert started == pytest.approx(whole[0], rel=1e-4) and abs(started - bare) > 1e-3


# flags

def test_lora_blocks_and_lora_layers(made, placed):
    names = placed("--lora_blocks", "1").keys()
    assert {name.split(".")[1] for name in names} == {"1"} and names < placed().keys()
    theirs = "attn.add_k_proj,attn.add_q_proj, attn.to_out.0"    # as diffusers' script has them
    wanted = {name for name in placed() if name.split(".", 2)[2] in theirs.replace(" ", "").split(",")}
    assert placed("--lora_layers", theirs).keys() == placed("--lora_targets", *theirs.split(", ")).keys() == wanted
    adapter, _ = made("--lora_blocks", "0,2", "--lora_layers", "attn.add_v_proj", *TEXT)
    assert adapter.part("transformer").keys() == {f"transformer_blocks.{block}.attn.add_v_proj" for block in (0, 2)}
    assert all(adapter.part(part) for part in sd3.TEXT_ENCODERS)    # whose blocks are others


def test_network_module_and_args(made, placed):
    kohya = ("--network_module", "networks.lora_sd3", "--network_train_unet_only")
    assert placed(*kohya, without=["rank"]).keys() == placed("--lora_targets", "kohya").keys()
    assert set(placed(*kohya, without=["rank"]).values()) == {(4, 1)}    # kohya's defaults
    adapter, _ = made(*kohya, "--network_args", "x_mlp_dim=2", "context_mod_dim=0", "train_block_indices=0-1")
    ranks = {name: adapter_files.rank_of(own) for name, own in adapter.part("transformer").items()}
    assert {rank for name, rank in ranks.items() if ".ff.net" in name} == {2}
    assert not any("norm1_context" in name for name in ranks) and {name.split(".")[1] for name in ranks} == {"0", "1"}


def test_rates_of_all_that_is_trained(made):
    adapter, _ = made("--unet_lr", 0.03, "--train_text_encoder", "--learning_rate_te1", 0.01, "--learning_rate_te2", 0.005,
                      "--learning_rate_te3", 0.002)
    for part, rate in (("transformer", 0.03), ("text_encoder", 0.01), ("text_encoder_2", 0.005), ("text_encoder_3", 0.002)):
        assert max(largest(adapter, "lora_up.weight", part).values()) == pytest.approx(rate, rel=1e-3)
    adapter, _ = made("--unet_lr", 0, "--train_text_encoder", "--learning_rate_te1", 0, "--learning_rate_te2", 0,
                      "--learning_rate_te3", 0.002)
    assert {key.split(".")[0] for key in adapter.modules} == {"transformer", "text_encoder_3"}
    assert not any(largest(adapter, "lora_up.weight", "transformer").values())
    assert {key.split(".")[0] for key in made("--train_text_encoder")[0].modules} == {
        "transformer", "text_encoder", "text_encoder_2"}    # T5 only where it has a rate


def test_precisions_and_quantize_exclude(train, tmp_path, monkeypatch):
    """Embeddings, the last norm and projection are never quantised; what --quantize_exclude names is not, either."""
    bare, calls = losses(train(*ONE, "--output_dir", tmp_path / "bare"))[0], note_calls(monkeypatch, quantize, "_quantised")
    found = {"": bare}
    for flag, count in (("--text_encoder_1_precision", 3 * 6), ("--text_encoder_2_precision", 3 * 6),
                        ("--text_encoder_3_precision", 2 * 7), ("--base_model_precision", 18 + 18 + 11)):    # layers of blocks
        calls.clear()
        out = train(*ONE, flag, "int8-torchao", "--embedding_cache_dir", tmp_path / "cache", "--output_dir", tmp_path / flag)
        assert len(calls) == count, flag
        found[flag] = losses(out)[0]
    calls.clear()
    out = train(*ONE, "--base_model_precision", "int8-torchao", "--quantize_exclude", "*.attn.to_q", "transformer_blocks.2",
                "--output_dir", tmp_path / "less")
    assert len(calls) == 17 + 17
    found["--quantize_exclude"] = losses(out)[0]
    assert len(set(found.values())) == len(found) and all(abs(loss - bare) < 0.05 for loss in found.values())
    with pytest.raises(UserError, match=r"--quantize_exclude attn\.to_q fits no layer"):
        train("--base_model_precision", "int8-torchao", "--quantize_exclude", "attn.to_q", "--output_dir", tmp_path / "no")


def test_the_spike_guard_skips(train, monkeypatch):
    whole, count = train_lora_sd3.training_loss, iter(range(1, 100))
    monkeypatch.setattr(train_lora_sd3, "training_loss", lambda *given: whole(*given) * (np.nan if next(count) == 2 else 1))
    out = train("--spike_guard", "skip", "--max_train_steps", 3)
    assert [line["spikes"] for line in metrics(out)] == [0, 1, 1]
    assert all(tensor.isfinite().all() for tensor in load_file(out / WEIGHTS).values())


def test_skip_layer_guidance_draws_otherwise(train, tmp_path):
    more = (*SHOWN, "--max_train_steps", 1, "--learning_rate", 1e-9)
    (plain,), (skipped,) = (drawn(train(*more, *flags, "--output_dir", tmp_path / str(len(flags))), 1).values() for flags in (
        (), ("--validation_guidance_skip_layers", 0, 1, "--validation_guidance_skip_layers_stop", 0.6)))
    assert (plain != skipped).any()


# DreamBooth, and what should stay as it was

def test_dreambooth_draws_the_class_images_that_are_missing(train, tmp_path):
    things = tiny.make_images(tmp_path / "things", [(64, 64)] * 3, captions=False)
    kind = tiny.make_images(tmp_path / "kind", [(64, 64)], captions=False)
    out = train("--instance_data_dir", things, "--instance_prompt", "a photo of sks cat", "--with_prior_preservation",
                "--class_data_dir", kind, "--class_prompt", "a photo of a cat", "--num_class_images", 2,
                "--embedding_cache_dir", tmp_path / "cache", without=["train_data_dir"])
    assert len(losses(out)) == 2 and len(list(kind.glob("*.png"))) == 2


@pytest.mark.parametrize("more", [(), ("--precondition_outputs",)], ids=str)
def test_simpletuners_regularisation_sets_keep_what_the_base_says(train, tmp_path, tiny_images, more):
    config = tmp_path / "multidatabackend.json"
    sets = [{"id": "all", "type": "local", "instance_data_dir": str(tiny_images), "caption_strategy": "textfile", "crop": True,
             "resolution": 64, "resolution_type": "pixel", "is_regularisation_data": True}]
    config.write_text(json.dumps(sets))
    found = losses(train("--data_backend_config", config, "--max_train_steps", 1, *more, without=["train_data_dir"]))
    assert found == [0.0]    # at first the adapter changes nothing, so that there is nothing to mend


# mistakes

@pytest.mark.parametrize(("flags", "words"), [
    (("--lora_blocks", "3"), "no block 3, only 0 to 2"), (("--lora_blocks", "a"), "--lora_blocks a is not like 12,13"),
    (("--lora_layers", "attn.to_qq"), "named attn.to_qq; did you mean attn.to_q"),
    (("--lora_targets", "convolutions"), "--lora_targets convolutions: SD3 has none"),
    (("--conv_rank", 2), "there is no flag --conv_rank"),
    (("--learning_rate_te3", 1), "--learning_rate_te3 needs --train_text_encoder"),
    ((*TEXT, "--no_t5"), "--learning_rate_te3 and --no_t5 exclude"),
    ((*TEXT, "--lora_format", "both"), "--lora_format both: diffusers has no loader for adapters of T5"),
    (("--lora_type", "lokr", "--lora_format", "diffusers"), "no loader for lokr adapters of SD 3.*--lora_format kohya"),
    (("--network_module", "networks.lora"), "networks.lora_sd3 and lycoris.kohya"),
    (("--network_module", "networks.lora_sd3", "--network_args", "conv_dim=2"), "conv_dim is not known to networks.lora_sd3"),
    (("--network_module", "lycoris.kohya", "--network_args", "down_lr_weight=zeros"), "without rates of SDXL's blocks"),
    (("--base_model_precision", "int8-torchao", "--quantize_exclude", "nothing*"), "--quantize_exclude nothing.* fits no layer"),
    (("--init_lora", "sdxl"), "adapter of SDXL, not of SD 3"), (("--init_lora", "t5"), "text encoder 3.*learning_rate_te3"),
    (("--validation_guidance_skip_layers", 9), "no layer 9"), (("--resolution", 72), "multiple of 16")],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "")
def test_refusals(train, tmp_path, capsys, flags, words):
    """In one sentence, with status 2, before anything is loaded or made."""
    for name, tensor in (("sdxl", "unet.mid_block.attentions.0.proj_in.lora_A.weight"),
                         ("t5", "lora_te3_encoder_block_0_layer_0_SelfAttention_q.lora_down.weight")):
        both = {tensor: torch.zeros(4, 64), tensor.replace("down", "up"): torch.zeros(32, 4)}
        save_file(both, tmp_path / f"{name}.safetensors")
    flags = [tmp_path / f"{flag}.safetensors" if flag in ("sdxl", "t5") else flag for flag in flags]
    assert_refused(lambda: train(*flags, without=["rank"]), words, capsys)
    assert not (tmp_path / "out").exists()


def test_what_another_flag_makes_idle_is_told(parse, capsys):
    parse("--quantize_exclude", "proj_out", "--lora_blocks", "1", "--network_module", "networks.lora_sd3")
    said = capsys.readouterr().err
    assert "--quantize_exclude has no effect without --base_model_precision" in said
    assert "--lora_blocks has no effect with --network_module" in said
