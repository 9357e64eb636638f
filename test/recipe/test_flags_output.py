"""Each flag of the groups `checkpoints and output`, `validation` and `run` changes what it says it changes, in a run."""

import importlib.util
import json
from types import SimpleNamespace

import forks
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from pieces import note_calls
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train_sdxl
from library.data.sampler import Sampler
from library.errors import UserError
from library.training import accelerator, plan

UNET = "unet/diffusion_pytorch_model.safetensors"


def lines(out) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").open()]


def checkpoints(out) -> list[str]:
    return sorted(path.name for path in out.glob("checkpoint-*"))


def test_output_dir(train, tmp_path):
    assert train("--output_dir", tmp_path / "here" / "there") == tmp_path / "here" / "there"
    assert (tmp_path / "here" / "there" / "model_index.json").exists()
    with pytest.raises(UserError, match="--output_dir: cannot make .*file"):
        (tmp_path / "file").write_text("")
        train("--output_dir", tmp_path / "file")


@pytest.mark.parametrize(("flags", "kept"), [((), ["checkpoint-2", "checkpoint-4", "checkpoint-5"]), (
    ("--checkpoints_total_limit", 2), ["checkpoint-4", "checkpoint-5"]), (("--checkpoints_total_limit", 1), ["checkpoint-5"])],
    ids=str)
def test_checkpointing_steps_and_limit(train, flags, kept):
    assert checkpoints(train("--checkpointing_steps", 2, "--max_train_steps", 5, *flags)) == kept


def test_resume_from_checkpoint(train, tmp_path, capsys):
    out = train("--checkpointing_steps", 1, "--max_train_steps", 3)
    for wanted, start in (("latest", 3), ("checkpoint-1", 1), (out / "checkpoint-2", 2)):
        capsys.readouterr()
        train("--resume_from_checkpoint", wanted, "--max_train_steps", 4)
        assert f"going on from {out}/checkpoint-{start}\n" in capsys.readouterr().out
        for name in ("checkpoint-4", UNET):
            assert (out / name).exists()
        assert [line["step"] for line in lines(out)] == [1, 2, 3, 4]
        (out / "checkpoint-4").rename(tmp_path / f"done{start}")
    with pytest.raises(UserError, match="--resume_from_checkpoint: there is no checkpoint-9"):
        train("--resume_from_checkpoint", "checkpoint-9")
    whole = load_file(tmp_path / "done3" / UNET)
    for start in (1, 2):
        assert all(torch.equal(value, whole[name]) for name, value in load_file(tmp_path / f"done{start}" / UNET).items())


def test_flags_changed_at_a_restart_take_effect(train, capsys):
    """Not the checkpoint's rate, decay, seed and batch, which its optimizer state brings along; and all are named."""
    out = train("--learning_rate", 1e-3, "--lr_scheduler", "linear", "--lr_warmup_steps", 0, "--max_train_steps", 2)
    flags = ("--learning_rate", 1e-5, "--adam_weight_decay", 0.5, "--adam_beta1", 0.5, "--seed", 2, "--train_batch_size=1")
    train("--resume_from_checkpoint", "latest", "--lr_scheduler", "linear", "--lr_warmup_steps", 0, "--max_train_steps=4", *flags)
    assert [line["lr"] for line in lines(out)] == pytest.approx([1e-3, 5e-4, 5e-6, 2.5e-6])
    group = torch.load(out / "checkpoint-4" / "training_state.pt")["optimizer"]["param_groups"][0]
    assert (group["weight_decay"], group["betas"], group["initial_lr"]) == (0.5, (0.5, 0.999), 1e-5)
    said = capsys.readouterr().out
    for note in ("--learning_rate is now 1e-05, the checkpoint was made with 0.001",
                 "--adam_weight_decay is now 0.5, the checkpoint was made with None",
                 "the seed is now 2, the checkpoint was made with 1",
                 "the global batch is now 1, the checkpoint was made with 2"):
        assert note in said
    with pytest.raises(UserError, match="was made with --lr_scheduler linear, not cosine"):
        train("--resume_from_checkpoint", "latest", "--lr_scheduler", "cosine")


def test_models_saved_on_the_way(train, tmp_path):
    out = train("--save_every_n_steps", 2, "--save_every_n_epochs", 1, "--max_train_steps", 6, "--output_name", "cats",
                "--save_model_as", "safetensors")    # 6 images, 2 at a time: an epoch has 3 steps
    assert sorted(path.name for path in out.glob("*.safetensors")) == [
        "cats-000001.safetensors", "cats-step00000002.safetensors", "cats-step00000004.safetensors", "cats.safetensors"]
    out = train("--save_every_n_steps", 1, "--output_dir", tmp_path / "folders")
    assert (out / "last-step00000001" / "model_index.json").exists()    # the default name


def test_when_models_fall_due():
    order = Sampler(np.zeros(6, np.int64), 0, 2)    # three steps an epoch
    args = SimpleNamespace(save_every_n_steps=4, save_every_n_epochs=2, output_name="m")
    names = {step: names for step in range(1, 13) if (names := plan.model_names(args, order, step))}
    assert names == {4: ["m-step00000004"], 6: ["m-000002"], 8: ["m-step00000008"], 12: ["m-step00000012", "m-000004"]}
    assert [step for step in range(1, 10) if plan.due(order, step, None, 1)] == [3, 6, 9]
    assert [step for step in range(1, 10) if plan.due(order, step, 4, 1)] == [4, 8]
    assert not any(plan.due(order, step, None, None) for step in range(1, 10))


@pytest.mark.parametrize(("kind", "precision", "dtype"), [
    ("diffusers", None, "F32"), ("diffusers", "fp16", "F16"), ("safetensors", "bf16", "BF16"), ("safetensors", "float", "F32"),
    ("ckpt", "fp16", torch.float16)])
def test_save_model_as_and_save_precision(train, kind, precision, dtype):
    flags = ("--save_precision", precision) if precision else ()
    out = train("--save_model_as", kind, "--max_train_steps", 1, *flags)
    if kind == "ckpt":
        kinds = {value.dtype for value in torch.load(out / "last.ckpt", weights_only=True)["state_dict"].values()}
        assert dtype in kinds and torch.float32 not in kinds
        return
    assert (out / "model_index.json").exists() == (kind == "diffusers") != (out / "last.safetensors").exists()
    names = [out / "last.safetensors"] if kind != "diffusers" else [out / UNET, out / "text_encoder" / "model.safetensors"]
    for name in names:
        with safe_open(name, framework="pt") as file:
            kinds = {file.get_slice(key).get_dtype() for key in file.keys()} - {"I64"}
            assert kinds == {dtype}


@pytest.fixture
def drawn(train, monkeypatch, tmp_path):
    """`drawn(*flags)` -> what the pipeline was asked for at each prompt and size, and the output folder."""
    calls = note_calls(monkeypatch, StableDiffusionXLPipeline, "__call__")

    def drawn(*flags):
        calls.clear()
        out = train("--validation_num_inference_steps", 1, "--num_validation_images", 1, *flags,
                    "--output_dir", tmp_path / str(len(list(tmp_path.iterdir()))))
        return [named for _, named in calls], out

    return drawn


def test_validation_prompts_images_sizes_and_steps(drawn):
    assert drawn()[0] == []
    asked, out = drawn("--validation_prompt", "red cat", "blue dog", "--num_validation_images", 2, "--validation_resolution",
                       "64", "96x64", "--validation_num_inference_steps", 3, "--validation_steps", 2)
    assert [(call["width"], call["height"]) for call in asked] == [(64, 64), (96, 64)] * 2
    assert {len(call["prompt_embeds"]) for call in asked} == {2} and {call["num_inference_steps"] for call in asked} == {3}
    files = sorted(path.name for path in (out / "validation" / "step-000002").glob("*.png"))
    assert files == [f"0{number}-{slug}-{size}-{image}.png" for number, slug in enumerate(("red-cat", "blue-dog"))
                     for size in ("64x64", "96x64") for image in (0, 1)]
    with Image.open(out / "validation" / "step-000002" / files[-1]) as image:
        assert image.size == (96, 64)
    asked, out = drawn("--validation_prompt", "cat", "--resolution", "72,64")
    assert {(call["width"], call["height"]) for call in asked} == {(72, 64)}    # the default: --resolution


def test_validation_guidance_negative_prompt_and_seed(drawn):
    def first(*flags):
        (call, *_), out = drawn("--validation_prompt", "red cat", "--validation_steps", 2, "--max_train_steps", 2, *flags)
        with Image.open(next((out / "validation" / "step-000002").glob("*.png"))) as image:
            return call, np.asarray(image).astype(int)

    usual, plain = first()
    assert usual["guidance_scale"] == 5 and not usual["negative_prompt_embeds"].any()    # zeros, as SDXL's own pipeline
    strong, image = first("--validation_guidance", 9)
    assert strong["guidance_scale"] == 9
    negative, _ = first("--validation_negative_prompt", "blue dog")
    assert negative["negative_prompt_embeds"].any()
    empty, _ = first("--proportion_empty_prompts", 0.5)    # the empty prompt is trained: guidance starts from it
    assert empty["negative_prompt_embeds"].any()
    assert not torch.equal(empty["negative_prompt_embeds"], negative["negative_prompt_embeds"])
    other, image = first("--validation_seed", 5)
    assert (image != plain).any()
    seeds = [call["generator"][0].initial_seed() for call in (usual, other, first("--seed", 8)[0])]
    assert seeds == [1, 5, 8]


@pytest.mark.parametrize(("flags", "steps"), [
    (("--validation_steps", 2), [2, 4, 5]), (("--validation_epochs", 1), [3, 5]), (("--validation_epochs", 2), [5]),
    (("--validation_epochs", 1, "--validation_steps", 4), [4, 5])], ids=str)
def test_when_validation_falls_due(drawn, flags, steps):
    """6 images, 2 at a time: an epoch has 3 steps. The last step always draws."""
    _, out = drawn("--validation_prompt", "cat", "--max_train_steps", 5, *flags)
    assert sorted(int(path.name[5:]) for path in (out / "validation").iterdir()) == steps


def test_config_file(parse, tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"learning_rate": 3e-5, "use_ema": True, "resolution": "96,64"}))
    (tmp_path / "b.toml").write_text('[any]\nlearning_rate = 2e-5\nvalidation_prompt = ["a", "b"]\n')
    args = parse("--config_file", tmp_path / "a.json", without=["resolution"])
    assert (args.learning_rate, args.use_ema, args.resolution) == (3e-5, True, (96, 64))
    args = parse("--config_file", tmp_path / "b.toml", "--learning_rate", 1)
    assert (args.learning_rate, args.validation_prompt) == (1, ["a", "b"])    # the command line goes before it


def test_seed(train, tmp_path):
    one, same, other = (lines(train("--seed", seed, "--output_dir", tmp_path / name))
                        for name, seed in (("one", 1), ("same", 1), ("other", 2)))
    assert [line["loss"] for line in one] == [line["loss"] for line in same] != [line["loss"] for line in other]
    drawn = train("--output_dir", tmp_path / "drawn", without=["seed"])
    kept = json.loads((drawn / "checkpoint-2" / "manifest.json").read_text())["seed"]
    again = train("--output_dir", tmp_path / "again", "--seed", kept)    # a drawn seed is written down
    assert [line["loss"] for line in lines(drawn)] == [line["loss"] for line in lines(again)]


@pytest.mark.parametrize(("flags", "dtype"), [((), torch.float32), (("--mixed_precision", "bf16"), torch.bfloat16)], ids=str)
def test_mixed_precision(train, flags, dtype, monkeypatch):
    seen = []
    original = train_sdxl.ddpm.mse_per_sample
    monkeypatch.setattr(train_sdxl.ddpm, "mse_per_sample", lambda *given: seen.append(original(*given)) or seen[-1])
    inner = []

    def note(module, inputs, output):
        if isinstance(module, torch.nn.Conv2d) and module.training:
            inner.append(output.dtype)

    hook = torch.nn.modules.module.register_module_forward_hook(note)
    try:
        out = train(*flags, "--max_train_steps", 1)
    finally:
        hook.remove()
    assert set(inner) == {dtype} and seen[0].dtype == torch.float32
    assert {value.dtype for value in load_file(out / UNET).values()} == {torch.float32}    # D8: trained weights


@pytest.mark.parametrize(("flags", "environment", "index"), [((), {}, 0), (("--local_rank", 3), {}, 3), (
    ("--local_rank", 3), {"LOCAL_RANK": "2"}, 2)], ids=str)
def test_local_rank(parse, one_process, monkeypatch, flags, environment, index):
    """As an old launcher gives it, and as one that sets LOCAL_RANK, which goes before it."""
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(forks.free_port()), "WORLD_SIZE": "1", "RANK": "0"}
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    for name, value in (place | environment).items():
        monkeypatch.setenv(name, value)
    try:
        assert accelerator.start(parse(*flags)).local_process_index == index
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def board(folder) -> EventAccumulator:
    return EventAccumulator(str(folder), size_guidance={"images": 0}).Reload()


def test_report_to_and_logging_dir(train, tmp_path):
    assert not (train("--output_dir", tmp_path / "none") / "logs").exists()
    out = train("--report_to", "tensorboard", "--logging_dir", "events", "--output_dir", tmp_path / "board",
                "--validation_prompt", "red cat", "--num_validation_images", 1, "--validation_num_inference_steps", 1)
    read, written = board(out / "events"), lines(out)
    for name in ("loss", "lr", "grad_norm", "images_per_s", "wait"):
        assert [(event.step, event.value) for event in read.Scalars(name)] == [
            (line["step"], pytest.approx(line[name], rel=1e-6)) for line in written]
    (image,) = read.Images("validation/00-red-cat-64x64-0.png")
    assert (image.step, image.width, image.height) == (2, 64, 64) and not (out / "logs").exists()


@pytest.mark.parametrize("report_to", ["wandb", "all"])
def test_wandb_and_the_name_of_the_project(train, tmp_path, monkeypatch, report_to):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    flags = ("--report_to", report_to, "--tracker_project_name", "my-own-cats", "--hub_token", "hf_secret_of_mine")
    if importlib.util.find_spec("wandb") is None:
        with pytest.raises(UserError, match="--report_to wandb needs `pip install wandb`"):
            train(*flags)
        return
    monkeypatch.setattr("sys.argv", ["train_sdxl.py", "--hub_token", "hf_secret_of_mine"])
    out = train(*flags)
    (file,) = (out / "wandb").glob("offline-run-*/*.wandb")
    content = file.read_bytes()
    assert b"my-own-cats" in content and b"grad_norm" in content and b"train_batch_size" in content
    assert (out / "logs").exists() == (report_to == "all")
    assert not [path for path in out.rglob("*") if path.is_file() and b"hf_secret_of_mine" in path.read_bytes()]


@pytest.mark.parametrize(("every", "steps"), [(1, [1, 2, 3, 4, 5]), (2, [2, 4, 5]), (10, [5])])
def test_logging_steps(train, every, steps):
    assert [line["step"] for line in lines(train("--logging_steps", every, "--max_train_steps", 5))] == steps
