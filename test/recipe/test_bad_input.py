"""Every bad input ends on one message that names the thing and what to do, with status 2 and no traceback; nothing is lost."""

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from forks import REPOSITORY, flags, run
from safetensors.torch import load_file, save_file

OFFLINE = {"HF_HUB_OFFLINE": "1"}


def snapshot(folder: Path) -> dict[str, str]:
    """Hash of every file in a folder, but for the caches."""
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*")
            if path.is_file() and folder / "cache" not in path.parents}


def only_message(text: str) -> str:
    """The one message that a run ended on."""
    assert "Traceback" not in text, text
    assert text.count("error: ") - text.count("I/O error: ") == 1, text
    before, _, message = text.rpartition("train_sdxl.py: error: ")
    assert before.endswith("\n") or not before, f"the message stands in a line of its own:\n{text}"
    return message


@pytest.fixture(scope="module")
def finished(tiny_model, tiny_images, shared_cache, tmp_path_factory):
    """A run of six steps with checkpoints 3 and 6, and the flags that made it."""
    output = tmp_path_factory.mktemp("finished") / "out"
    made = flags(tiny_model, tiny_images, output, "--max_train_steps", 6, "--checkpointing_steps", 3, "--use_ema",
                 "--embedding_cache_dir", shared_cache)
    run(made, output.with_name("log"))
    return output, made


@pytest.fixture
def refused(finished, tmp_path):
    """`refused(*flags)`: run into the folder of the finished run, be refused, leave all there as it was -> the message."""
    output, made = finished

    def refused(*more, **setting):
        before = snapshot(output)
        message = only_message(run([*made, *map(str, more)], tmp_path / "log", status=2, **setting))
        assert snapshot(output) == before
        return message

    return refused


@pytest.fixture
def images(tiny_images, tmp_path):
    return shutil.copytree(tiny_images, tmp_path / "pictures")


@pytest.fixture
def model(tiny_model, tmp_path):
    return shutil.copytree(tiny_model, tmp_path / "base")


def spoil(folder: Path) -> None:
    """Three files that are no images, and two JPEGs whose end is missing."""
    for name, content in (("bad1.png", b"x"), ("bad2.jpg", b""), ("bad3.webp", b"RIFF")):
        (folder / name).write_bytes(content)
    for number, share in ((1, 0.5), (2, 0.9)):
        data = io.BytesIO()
        tiny.picture(200, 160, number).save(data, "JPEG", quality=95)
        (folder / f"cut{number}.jpg").write_bytes(data.getvalue()[:int(len(data.getvalue()) * share)])
    for path in [*folder.glob("bad*"), *folder.glob("cut*")]:
        path.with_suffix(".txt").write_text("a photo")


def test_images_that_are_not_there(refused, tmp_path):
    (tmp_path / "empty").mkdir()
    assert f"--train_data_dir: there is no folder {tmp_path / 'none'}" in refused("--train_data_dir", tmp_path / "none")
    assert f"{tmp_path / 'empty'} holds no image" in refused("--train_data_dir", tmp_path / "empty")


def test_unreadable_images_are_all_named_at_once(refused, images):
    spoil(images)
    message = refused("--train_data_dir", images)
    assert "3 of 11 images" in message and all(name in message for name in ("bad1.png", "bad2.jpg", "bad3.webp"))
    assert "not an image in a known format" in message and "the file is empty" in message and "--skip_bad_images" in message


@pytest.mark.parametrize("cache", ["--cache_latents", "--cache_latents=false"])
def test_truncated_images_are_named_before_the_first_step(refused, images, cache):
    spoil(images)
    for path in images.glob("bad*"):
        path.unlink()
    message = refused("--train_data_dir", images, cache)    # the losses of the finished run are still there
    assert "2 of 8 images" in message and all(f"cut{n}.jpg: image file is truncated" in message for n in (1, 2))


@pytest.mark.parametrize("more", [[], ["--cache_latents=false"], ["--enable_bucket", "--bucket_no_upscale"]])
def test_bad_images_are_skipped_on_request(tiny_model, images, shared_cache, tmp_path, more):
    spoil(images)
    (images / "image001.txt").unlink()
    text = run(flags(tiny_model, images, tmp_path / "out", "--max_train_steps", 1, "--embedding_cache_dir", shared_cache,
                     "--skip_bad_images", *more), tmp_path / "log")
    assert text.count("bad1.png") == text.count("bad3.webp") == text.count("cut1.jpg") == text.count("cut2.jpg") == 1
    assert "1 images without a caption are left out: image001.png" in text
    assert ("5 of 10 images" if more == ["--cache_latents=false"] else "3 of 10 images") in text
    assert "\n5 images in" in text and "Warning" not in text
    for path in images.glob("image*"):
        path.unlink()
    text = run(flags(tiny_model, images, tmp_path / "none", "--skip_bad_images", *more), tmp_path / "log", status=2)
    assert "there is no image to train on" in only_message(text)


def test_captions(refused, images, tmp_path):
    for number in (1, 3):
        (images / f"image00{number}.txt").unlink()
    message = refused("--train_data_dir", images)
    assert "2 of 6 images" in message and "image001.png, image003.png" in message and "--skip_bad_images" in message
    (images / "image002.txt").write_bytes("grün".encode("latin-1"))
    message = refused("--train_data_dir", images)
    assert str(images / "image002.txt") in message and "not UTF-8" in message and "byte 2" in message
    rows = [{"file_name": f"image00{number}.png", "words": "a photo"} for number in range(6)]
    (images / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    message = refused("--train_data_dir", images)
    assert "no column 'text'" in message and "--caption_column" in message and "file_name, words" in message
    (images / "metadata.jsonl").write_text(json.dumps({"file_name": "away.png", "text": "a photo"}))
    assert "away.png" in refused("--train_data_dir", images)


def test_columns_of_a_data_set(refused, finished, tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"picture": "a.png", "text": "a"}))
    at = finished[1].index("--train_data_dir")
    made = [*finished[1][:at], *finished[1][at + 2:], "--dataset_name", str(tmp_path / "rows.jsonl"),
            "--cache_dir", str(tmp_path / "datasets")]
    for more, absent in (([], "image"), (["--image_column", "picture", "--caption_column", "tags"], "tags")):
        message = only_message(run([*made, *more], tmp_path / "log", status=2, env=OFFLINE))
        assert f"{tmp_path / 'rows.jsonl'} has no column {absent!r}; it has picture, text" in message


def test_too_few_images(tiny_model, tiny_images, shared_cache, tmp_path):
    more = flags(tiny_model, tiny_images, tmp_path / "out", "--train_batch_size", 7, "--embedding_cache_dir", shared_cache)
    message = only_message(run([*more, "--num_train_epochs", "1"], tmp_path / "log", status=2))
    assert "do not fill one batch of 7 in 1 epochs" in message and "lower --train_batch_size" in message


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder_2", "tokenizer", "scheduler"])
def test_a_model_without_a_part(refused, model, part):
    shutil.rmtree(model / part)
    message = refused("--pretrained_model_name_or_path", model)
    assert f"{model} lacks {part};" in message and "--pretrained_model_name_or_path" in message


def test_a_damaged_model_is_refused_at_the_start(refused, model):
    for path in (model / "unet/diffusion_pytorch_model.safetensors", model / "text_encoder/model.safetensors"):
        path.write_bytes(path.read_bytes()[:-100])
    (model / "vae/config.json").write_text("{")
    (model / "text_encoder_2/model.safetensors").unlink()
    for path in (model / "tokenizer").iterdir():
        path.unlink()
    message = refused("--pretrained_model_name_or_path", model)
    for name, words in (("unet/diffusion_pytorch_model.safetensors", "damaged or cut short"), ("vae/config.json", "not JSON"),
                        ("text_encoder/model.safetensors", "damaged or cut short"), ("text_encoder_2", "has no weights"),
                        ("tokenizer", "holds no tokenizer")):
        assert f"{model / name} {words}" in message or f"{model / name} is {words}" in message


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_a_model_without_a_tensor(refused, model, part):
    """Neither diffusers nor transformers refuses it: they would fill in random numbers."""
    (path,) = (model / part).glob("*.safetensors")
    whole = load_file(path)
    name = sorted(whole)[5]
    save_file({key: value for key, value in whole.items() if key != name}, path, metadata={"format": "pt"})
    message = refused("--pretrained_model_name_or_path", model)
    assert f"cannot load the {part} in {path.parent}" in message and name in message


def test_models_that_are_not_there(refused, model, tmp_path):
    message = refused("--pretrained_model_name_or_path", "nobody/no-such-model", env=OFFLINE)
    assert "nobody/no-such-model is neither a folder here nor to be had from the hub" in message
    assert f"no file or folder {tmp_path / 'none'}" in refused("--pretrained_model_name_or_path", tmp_path / "none")
    assert "no file or folder /none" in refused("--pretrained_vae_model_name_or_path", "/none")
    (tmp_path / "whole.safetensors").write_bytes(b"not a model")
    message = refused("--pretrained_model_name_or_path", tmp_path / "whole.safetensors", "--single_file_config", model)
    assert f"{tmp_path / 'whole.safetensors'} is damaged" in message
    (model / "model_index.json").write_text("{")    # of use only at the end of the run
    assert "model_index.json" in refused("--pretrained_model_name_or_path", model)


def test_places_that_cannot_be_written(refused, tiny_model, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "locked").mkdir(mode=0o555)
    assert f"{tiny_model} is the base model" in refused("--output_dir", tiny_model)
    for place in (tmp_path / "file", tmp_path / "file" / "out", tmp_path / "locked", tmp_path / "locked" / "out"):
        message = refused("--output_dir", place, humble=True)
        assert "--output_dir" in message and str(place) in message
    for place in (tmp_path / "file", tmp_path / "locked" / "cache"):
        assert str(place) in refused("--embedding_cache_dir", place, humble=True)


def test_a_checkpoint_of_something_else(refused, finished, tmp_path):
    other = tiny.make_model(tmp_path / "other", widths=(32, 32, 64))
    message = refused("--pretrained_model_name_or_path", other, "--resume_from_checkpoint", "latest")
    assert "checkpoint-6 holds another UNet" in message and "block_out_channels is [32, 64, 64]" in message
    message = refused("--resume_from_checkpoint", "latest", "--optimizer", "adafactor")
    assert "checkpoint-6 was made with --optimizer adamw, not adafactor" in message
    assert "there is no checkpoint-5" in refused("--resume_from_checkpoint", "checkpoint-5")


def test_a_checkpoint_that_is_not_whole(finished, tmp_path):
    """Named, it is refused; `latest` takes the next older one, says why, and comes to the same end."""
    finished, made = finished
    output = shutil.copytree(finished, tmp_path / "out")
    more = [*made, "--output_dir", str(output), "--resume_from_checkpoint"]
    state = output / "checkpoint-6" / "training_state.pt"
    size = state.stat().st_size
    os.truncate(state, size - 1000)
    message = only_message(run([*more, "checkpoint-6"], tmp_path / "log", status=2))
    assert f"checkpoint-6 is not whole: training_state.pt has {size - 1000} bytes instead of {size}" in message
    text = run([*more, "latest"], tmp_path / "log")
    assert f"checkpoint-6 is passed over: training_state.pt has {size - 1000} bytes instead of {size}" in text
    assert f"going on from {output / 'checkpoint-3'}" in text
    weights = [name for name in snapshot(finished) if name.endswith(".safetensors")]
    assert len(weights) > 8 and {name: snapshot(output)[name] for name in weights} == {
        name: snapshot(finished)[name] for name in weights}
    (output / "checkpoint-6" / "manifest.json").write_text('{"step": 6}')
    (output / "checkpoint-3" / "manifest.json").unlink()
    text = run([*more, "latest"], tmp_path / "log")
    assert "checkpoint-3 is passed over" in text and "checkpoint-6 is passed over" in text and "starting anew" in text


def test_a_run_begun_anew_in_the_folder_of_an_older_one(finished, tmp_path):
    """Its checkpoints have lower steps and are the newest all the same: to be kept, and to be gone on from."""
    finished, made = finished
    output = shutil.copytree(finished, tmp_path / "out")
    more = [*made, "--output_dir", str(output), "--learning_rate", "1e-3"]
    run([*more, "--max_train_steps", "2", "--checkpointing_steps", "1", "--checkpoints_total_limit", "2"], tmp_path / "log")
    assert sorted(path.name for path in output.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]
    shutil.copytree(finished / "checkpoint-6", output / "checkpoint-6")
    text = run([*more, "--resume_from_checkpoint", "latest"], tmp_path / "log")
    assert f"going on from {output / 'checkpoint-2'}\n" in text and "passed over" not in text


@pytest.mark.parametrize("limit", [4_000_000, 12_000_000])
def test_a_full_disk_at_a_checkpoint(finished, tmp_path, limit):
    """The UNet's 8 MB, or the optimizer's 16, do not fit: checkpoint-3 stays whole, and is gone on from."""
    finished, made = finished
    output = tmp_path / "out"
    shutil.copytree(finished / "checkpoint-3", output / "checkpoint-3")
    more = [*made, "--output_dir", str(output), "--resume_from_checkpoint", "latest"]
    before = snapshot(output)
    message = only_message(run(more, tmp_path / "log", status=2, file_limit=limit))
    assert f"no space left on the disk while writing {output / 'checkpoint-6'}" in message
    after = snapshot(output)
    assert after.pop("metrics.jsonl") and after == before and not list(output.glob(".*"))
    run(more, tmp_path / "log")
    assert snapshot(output)["unet/diffusion_pytorch_model.safetensors"] == snapshot(finished)[
        "unet/diffusion_pytorch_model.safetensors"]


def test_a_full_disk_while_caching(finished, tmp_path):
    """What was cached before stays; when there is room again the run takes it up."""
    finished, made = finished
    output, cache = tmp_path / "out", tmp_path / "cache"
    more = [*made, "--output_dir", str(output), "--embedding_cache_dir", str(cache)]
    for limit, name in ((600, "scan"), (6000, "latents"), (60_000, "prompts")):
        message = only_message(run(more, tmp_path / "log", status=2, file_limit=limit))
        assert f"no space left on the disk while writing {cache / name}" in message
        assert not [path for path in cache.rglob("*") if path.name.endswith(".tmp") or path.name.startswith(".")]
    kept = {path.name for path in cache.rglob("latents/*.safetensors")}
    run(more, tmp_path / "log")
    assert kept and kept == {path.name for path in cache.rglob("latents/*.safetensors")}
    assert snapshot(output)["unet/diffusion_pytorch_model.safetensors"] == snapshot(finished)[
        "unet/diffusion_pytorch_model.safetensors"]


def test_the_command_line_itself(tiny_model, tmp_path):
    """As a user types it: a mistake in a flag, and one that is found later."""
    made = flags(tiny_model, tmp_path / "none", tmp_path / "out")
    for more, words in ((["--lerning_rate", "1"], "did you mean --learning_rate?"), (["--adam_beta1", "2"], "out of range"),
                        ([], f"there is no folder {tmp_path / 'none'}")):
        ended = subprocess.run([sys.executable, "train_sdxl.py", *made, *more], cwd=REPOSITORY, capture_output=True, text=True)
        assert ended.returncode == 2 and ended.stdout == ""
        assert words in only_message(ended.stderr) and ended.stderr.count("\n") == 1
    assert not (tmp_path / "out" / "metrics.jsonl").exists()
