"""The demo, run as its user runs it, learns to draw what it is asked for; real people's digits judge it.

The judge is k-nearest neighbours on scans that took no part in training; it reads 97 to 98% of real ones.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest
import read_digits
import scans
from PIL import Image

import generate

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def demo(tmp_path_factory):
    """The folder that config/demo/run.sh leaves, and what it printed."""
    folder = tmp_path_factory.mktemp("demo")
    # one thread, as all tests: two, beside another test, would wait for each other most of the time
    environment = os.environ | {"DEMO_DIR": str(folder), "DEMO_ACCELERATE_FLAGS": "--num_cpu_threads_per_process 1"}
    run = subprocess.run(["bash", "config/demo/run.sh"], cwd=ROOT, env=environment, text=True,
                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert run.returncode == 0, run.stdout[-3000:]
    return folder, run.stdout


def drawn(model: Path, prompts: list[str], size: str, output: Path) -> list[Image.Image]:
    output.mkdir()
    (output / "prompts.txt").write_text("\n".join(prompts))
    generate.main(generate.parse_args([
        "--model", str(model), "--prompt_file", str(output / "prompts.txt"), "--size", size, "--scheduler", "ddim",
        "--steps", "20", "--guidance", "5", "--batch_size", "50", "--seed", "1000", "--output_dir", str(output)]))
    return [Image.open(path) for path in sorted(output.glob("0*.png"))]


@pytest.mark.timeout(900)
def test_it_draws_the_digits_of_the_prompt(demo, tmp_path):
    model, reader = demo[0] / "run", read_digits.fit_reader()
    prompts = [word for word in scans.WORDS for _ in range(10)]    # each picture has a seed of its own
    pictures = drawn(model, prompts, "64", tmp_path / "single")
    single = sum(read_digits.read(reader, picture) == read_digits.digits_of(prompt)
                 for picture, prompt in zip(pictures, prompts, strict=True))

    pairs = [(first, second) for first in range(10) for second in range(10)]
    unseen = [pair for pair in pairs if scans.is_held_out(*pair)]
    seen = [pair for pair in pairs if not scans.is_held_out(*pair)]
    chosen = [*unseen[:20], *seen[::2][:30]]
    right = right_unseen = 0
    for size, tall in (("128,64", False), ("64,128", True)):
        captions = [scans.caption(list(pair), tall) for pair in chosen]
        pictures = drawn(model, captions, size, tmp_path / size)
        hits = [read_digits.read(reader, picture) == list(pair) for picture, pair in zip(pictures, chosen, strict=True)]
        right, right_unseen = right + sum(hits), right_unseen + sum(hits[:20])
    print(f"{single} of 100 digits, {right} of 100 pairs right; of 40 unseen in training {right_unseen}")
    assert single >= 97
    assert right >= 90


def test_it_names_what_it_wrote(demo):
    folder, output = demo
    for name in ("images_drawn/grid.png", "run/report.html", "run/loss_curve.png"):
        assert f"{folder}/{name}" in output
        assert (folder / name).stat().st_size > 1000
    assert "generate.py --model" in output
    index = json.loads((folder / "run" / "model_index.json").read_text())
    assert index["force_zeros_for_empty_prompt"] is False
