"""generate.py on a tiny model: every flag changes what it says, and mistakes end in one sentence."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
from PIL import Image

import generate
from library import errors

ROOT = Path(__file__).parents[2]


@pytest.fixture
def draw(tiny_model, tmp_path):
    """`draw(*flags)` -> {file name: picture} of a run with two steps."""
    def draw(*flags, model=tiny_model):
        output = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
        generate.main(generate.parse_args(["--model", str(model), "--steps", "2", "--size", "64", "--output_dir", str(output),
                                           *map(str, flags)]))
        return {path.name: Image.open(path) for path in sorted(output.glob("*.png"))}
    return draw


@pytest.fixture(scope="module")
def plain(tiny_model, tmp_path_factory):
    """The picture that every other flag is compared with."""
    output = tmp_path_factory.mktemp("plain")
    generate.main(generate.parse_args(["--model", str(tiny_model), "--steps", "2", "--size", "64", "--prompt", "a red cat",
                                       "--output_dir", str(output)]))
    return Image.open(output / "000-0.png")


def pixels(image) -> np.ndarray:
    return np.asarray(image).astype(int)


def test_a_png_each_and_a_grid(draw):
    drawn = draw("--prompt", "a red cat", "a blue dog", "--num_images", 2, "--batch_size", 3)
    assert list(drawn) == ["000-0.png", "000-1.png", "001-2.png", "001-3.png", "grid.png"]
    assert drawn["grid.png"].size == (2 * 68, 2 * 68)
    said = json.loads(drawn["001-3.png"].text["generate"])
    assert (said["prompt"], said["seed"], said["steps"], said["size"]) == ("a blue dog", 3, 2, "64x64")
    assert drawn["000-0.png"].text["parameters"].startswith("a red cat\n")


def test_the_same_flags_draw_the_same_whatever_the_batch(draw):
    one, other = (draw("--prompt", "a red cat", "--num_images", 3, "--seed", 7, "--batch_size", size) for size in (1, 3))
    assert list(one) == list(other)
    for name in one:
        assert np.abs(pixels(one[name]) - pixels(other[name])).max() <= 1


@pytest.mark.parametrize("flags", [
    ("--prompt", "a blue dog"), ("--negative_prompt", "a blue dog"), ("--steps", "3"), ("--guidance", "9"), ("--seed", "5"),
    ("--scheduler", "ddim"), ("--scheduler", "dpm++"), ("--precision", "bf16")])
def test_each_flag_changes_the_picture(draw, plain, flags):
    changed = draw("--prompt", "a red cat", *flags)["000-" + (flags[1] if flags[0] == "--seed" else "0") + ".png"]
    assert (pixels(plain) != pixels(changed)).any()


def test_prompts_from_a_file_and_other_sizes(draw, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red cat\n\na blue dog\n")
    drawn = draw("--prompt_file", tmp_path / "prompts.txt", "--size", "64,96")
    assert list(drawn) == ["000-0.png", "001-1.png", "grid.png"]
    assert drawn["000-0.png"].size == (64, 96)


def test_from_a_picture(draw, tmp_path):
    start = tiny.picture(64, 64, 3)
    start.save(tmp_path / "start.png")
    near, far = (draw("--prompt", "a red cat", "--image", tmp_path / "start.png", "--steps", 10, "--strength", strength,
                      "--guidance", 1)["000-0.png"] for strength in (0.1, 1.0))
    nothing = draw("--prompt", "a red cat", "--steps", 10, "--guidance", 1)["000-0.png"]
    assert (pixels(near) != pixels(far)).any()
    assert (pixels(far) != pixels(nothing)).any()


def test_raw_weights_beside_the_average(train, draw):
    output = train("--use_ema", "--learning_rate", "0.01", "--max_train_steps", "4", "--lr_warmup_steps", "0")
    average, raw = (draw("--prompt", "a red cat", *flags, model=output)["000-0.png"] for flags in ((), ("--raw",)))
    assert (pixels(average) != pixels(raw)).any()


def test_one_file(train, draw, tiny_model):
    folder = draw("--prompt", "a red cat", model=train("--save_precision", "float"))
    file = train("--save_model_as", "safetensors", "--output_name", "mine") / "mine.safetensors"
    single = draw("--prompt", "a red cat", "--config", tiny_model, model=file)
    assert np.abs(pixels(folder["grid.png"]) - pixels(single["grid.png"])).max() <= 1


@pytest.mark.parametrize("flags, message", [
    (("--prompt", "x", "--model", "/nowhere/model"), "--model: there is no file or folder"),
    (("--prompt", "x", "--image", "/nowhere.png"), "--image: cannot read /nowhere.png"),
    (("--prompt_file", "/nowhere.txt"), "--prompt_file: cannot read /nowhere.txt")])
def test_mistakes_end_in_one_sentence(tiny_model, capsys, flags, message, tmp_path):
    args = generate.parse_args(["--model", str(tiny_model), "--output_dir", str(tmp_path), *flags])
    with pytest.raises(SystemExit) as left, errors.exit_on_user_error("generate.py"):
        generate.main(args)
    assert left.value.code == 2
    assert message in capsys.readouterr().err


def test_mistakes_in_flags_are_answered_without_torch():
    run = subprocess.run([sys.executable, "-X", "importtime", "generate.py", "--model", "x"], cwd=ROOT, text=True,
                         capture_output=True)
    assert run.returncode == 2
    assert "give --prompt or --prompt_file" in run.stderr
    assert " torch" not in run.stderr
