"""The report of a run: what it reads, what it shows, and that it stands alone."""

import base64
import io
import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from library.errors import UserError
from library.validation.report import METRICS, choose_steps, read_metrics, write_loss_curve, write_report

REPOSITORY = Path(__file__).resolve().parents[2]
NASTY = "a <script>alert('x')</script> & \"quoted\" {cat} <img src=https://example.com/a.png> שלום"
SUMMARY = '<section><h2>Data</h2><p id="data">24 images</p></section>'
VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """What a test wants to know of the page; fails on a tag that is not closed in order."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.tags, self.ids, self.images, self.texts, self.links = [], [], [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append((tag, attributes))
        if "id" in attributes:
            self.ids.append(attributes["id"])
        if tag == "img":
            self.images.append(attributes)
        self.links += [attributes[key] for key in ("src", "href", "xlink:href", "srcset", "data") if key in attributes]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self) -> str:
        return "".join(self.texts)

    def card(self, name: str) -> str:
        """The figure that the headline gives under this name."""
        texts = [text for text in self.texts if text.strip()]
        return texts[texts.index(name) + 1]


def row(step: int, **changes) -> dict:
    known = dict(loss=1 / step, lr=1e-4, images_per_s=4.0, wait=0.25, memory_gb=10.5, grad_norm=0.5)
    return {"step": step, **known, "seconds": 2.0 * step, "epoch": step / 100, **changes}


def write_metrics(folder: Path, rows: list[dict], tail: str = "") -> Path:
    path = folder / "metrics.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)
    return path


def write_images(folder: Path, steps: list[int], prompt: str = NASTY, size: tuple[int, int] = (512, 384)) -> None:
    for step in steps:
        target = folder / "validation" / f"step-{step:06d}"
        target.mkdir(parents=True)
        name = f"00-a-cat-{size[0]}x{size[1]}-0.png"
        Image.new("RGB", size, (step % 256, 80, 160)).save(target / name)
        (target / "prompts.json").write_text(json.dumps({name: prompt}))


def report(folder: Path, **changes) -> tuple[str, Page]:
    words = dict(title="A run", command="accelerate launch x.py", versions={"torch": "2.9"}, notes=[], summary=SUMMARY)
    path = write_report(folder, **{**words, **changes})
    assert path == folder / "report.html"
    text = path.read_text("utf-8")
    return text, Page(text)


def test_columns_are_arrays_and_null_is_nan(tmp_path):
    metrics = read_metrics(write_metrics(tmp_path, [row(1), row(2, grad_norm=None), {"step": 3}]))
    assert set(metrics) == {*METRICS, "no_loss"} and metrics["no_loss"].tolist() == [False, False, True]
    assert metrics["step"].tolist() == [1, 2, 3] and metrics["step"].dtype == np.int64
    np.testing.assert_array_equal(metrics["grad_norm"], [0.5, np.nan, np.nan])
    np.testing.assert_array_equal(metrics["loss"], [1, 0.5, np.nan])


def test_a_repeated_step_counts_as_run_last(tmp_path):
    rows = [row(10, loss=1.0), row(20, loss=2.0), row(30, loss=3.0), row(20, loss=2.5), row(30, loss=3.5)]
    metrics = read_metrics(write_metrics(tmp_path, rows))
    assert metrics["step"].tolist() == [10, 20, 30]
    assert metrics["loss"].tolist() == [1.0, 2.5, 3.5]


def test_every_cut_of_the_last_line_is_tolerated(tmp_path):
    last = json.dumps(row(3))
    for length in range(len(last)):
        assert read_metrics(write_metrics(tmp_path, [row(1), row(2)], last[:length]))["step"].tolist() == [1, 2]
    assert read_metrics(write_metrics(tmp_path, [row(1), row(2)], last))["step"].tolist() == [1, 2, 3]


def test_a_last_line_cut_inside_a_character_is_tolerated(tmp_path):
    path = write_metrics(tmp_path, [row(1)])
    path.write_bytes(path.read_bytes() + b'{"note": "\xc3')
    assert read_metrics(path)["step"].tolist() == [1]


@pytest.mark.parametrize(
    "bad", ['{"step": 2, "lo', "", "[]", '{"loss": 1.0}', '{"step": 1.5}', '{"step": 2, "loss": "low"}', "\x00\x00"]
)
def test_an_unreadable_earlier_line_is_an_error_with_its_number(tmp_path, bad):
    path = write_metrics(tmp_path, [row(1)], bad + "\n" + json.dumps(row(3)) + "\n")
    with pytest.raises(UserError, match=rf"{re.escape(str(path))}, line 2: "):
        read_metrics(path)


def test_a_whole_but_wrong_last_line_is_an_error(tmp_path):
    with pytest.raises(UserError, match="line 2: "):
        read_metrics(write_metrics(tmp_path, [row(1)], '{"step": 2, "lo\n'))
    with pytest.raises(UserError, match="line 2: "):
        read_metrics(write_metrics(tmp_path, [row(1)], '{"loss": 2}'))


def test_missing_metrics_are_an_error_that_names_the_file(tmp_path):
    for write in (report, write_loss_curve):
        with pytest.raises(UserError, match=r"metrics\.jsonl"):
            write(tmp_path)


@pytest.mark.parametrize("count", [0, 1, 2, 11, 12, 13, 48, 1000])
def test_chosen_steps_are_even_with_first_and_last(count):
    steps = [100 * i for i in range(1, count + 1)]
    chosen = choose_steps(steps)
    assert len(chosen) == min(count, 12) and chosen == sorted(set(chosen)) and set(chosen) <= set(steps)
    if count:
        assert (chosen[0], chosen[-1]) == (steps[0], steps[-1])
    if count > 12:
        gaps = np.diff(chosen) / 100
        assert gaps.max() - gaps.min() <= 1


def test_the_page_stands_alone_and_shows_everything(tmp_path):
    write_metrics(tmp_path, [row(step) for step in range(1, 101)], '{"step": 101, "lo')
    write_images(tmp_path, [50, 100])
    command = "accelerate launch train.py --caption 'a <b> & c' \\\n  --x=https://example.com/{y}"
    versions = {"torch": "2.9.1", "<i>": "&1"}
    text, page = report(tmp_path, title="<b>Run</b> & {co}", command=command, versions=versions, notes=["note <1>"])
    # Nothing is fetched: every reference is inside the page.
    assert page.links and all(link.startswith(("data:image/", "#")) for link in page.links)
    assert not re.search(r"@import|url\((?!#)", text)
    assert not {"script", "link", "iframe", "object", "metadata"} & {tag for tag, _ in page.tags}
    # Every figure is there once, with a name of its own and a description.
    assert len(page.ids) == len(set(page.ids))
    for name in ("loss", "lr", "images_per_s", "wait", "grad_norm"):
        assert f"chart-{name}" in page.ids
    assert "validation" in page.ids and page.text.index("24 images") < page.text.index("At a glance")
    assert all(link[1:] in page.ids for link in page.links if link.startswith("#"))
    assert all(name in page.ids for name in re.findall(r"url\(#([^)]*)\)", text))
    charts = [attributes for tag, attributes in page.tags if tag == "svg"]
    assert len(charts) == 6 and all(chart["role"] == "img" and chart["aria-label"] for chart in charts)
    assert ("html", {"lang": "en"}) in page.tags and [tag for tag, _ in page.tags].count("h1") == 1
    for words in (
        "<b>Run</b> & {co}",
        command,
        "2.9.1",
        "<i>",
        "&1",
        "note <1>",
    ):
        assert words in page.text, words
    # The stand-ins for the colours of the page have all been replaced.
    assert "#0a0b0" not in text and "var(--accent)" in text
    assert not list(tmp_path.glob(".*"))


def test_headline_figures(tmp_path):
    rows = [row(10 * i, loss=float(i), memory_gb=20.0 if i == 7 else 10.0) for i in range(1, 41)]
    # The second half ran at a third of the speed: 40 images/s for 1/4 of the time, 40/3 for 3/4 of it.
    for half in rows[:20]:
        half.update(images_per_s=40.0, wait=0.0)
    for half in rows[20:]:
        half.update(images_per_s=40 / 3, wait=0.5)
    # Restarted after step 200: the seconds begin again.
    for half in rows[20:]:
        half["seconds"] -= 400
    write_metrics(tmp_path, rows)
    _, page = report(tmp_path)
    assert page.card("Steps") == "400"
    assert page.card("Final loss") == "39.5"  # the mean of 39 and 40, 2 of 40 logged steps
    assert page.card("Images per second") == "20"
    assert page.card("Waiting for data") == "37.5%"
    assert page.card("Peak memory") == "20.0 GB"
    assert page.card("Wall time") == "0:13:20"


def test_images_are_small_and_show_first_and_last_step(tmp_path):
    write_metrics(tmp_path, [row(1)])
    write_images(tmp_path, list(range(1, 31)))
    (tmp_path / "validation" / "step-000031.tmp").mkdir()
    (tmp_path / "validation" / "step-000032").mkdir()  # made, but nothing in it yet
    text, page = report(tmp_path)
    assert len(page.images) == 12
    assert page.images[0]["alt"] == f"Step 1: {NASTY} (512 × 384, image 0)"
    assert page.images[-1]["alt"].startswith("Step 30: ")
    assert "12 of 30 validation steps" in page.text
    assert NASTY in page.text and "<script" not in text
    with Image.open(io.BytesIO(base64.b64decode(page.images[0]["src"].split(",")[1]))) as image:
        assert image.size == (256, 192)


def test_unreadable_images_and_prompts_are_named_not_hidden(tmp_path):
    write_metrics(tmp_path, [row(1)])
    write_images(tmp_path, [1, 2, 3])
    broken = next((tmp_path / "validation" / "step-000002").glob("*.png"))
    broken.write_bytes(broken.read_bytes()[:200])
    (tmp_path / "validation" / "step-000003" / "prompts.json").write_text('{"a')
    _, page = report(tmp_path)
    assert len(page.images) == 2
    assert f"{broken}: not readable" in page.text
    assert "step-000003/prompts.json: not readable" in page.text
    assert "Step 3: 00-a-cat-512x384-0 (512 × 384, image 0)" in [image["alt"] for image in page.images]


@pytest.mark.parametrize("count", [0, 1])
def test_short_runs_without_images(tmp_path, count):
    write_metrics(tmp_path, [row(step, grad_norm=None) for step in range(1, count + 1)])
    # A command line that is not UTF-8 reaches Python like this.
    _, page = report(tmp_path, versions={}, command="x.py --name " + os.fsdecode(b"caf\xe9"))
    assert r"x.py --name caf\udce9" in page.text
    assert "No validation images." in page.text and "chart-grad_norm" not in page.ids
    with Image.open(write_loss_curve(tmp_path)) as image:
        assert image.format == "PNG" and image.width > 1000


def test_losses_that_are_not_finite_are_reported(tmp_path):
    unknown = {"images_per_s": 0.0, "wait": None, "memory_gb": None, "seconds": None, "epoch": None}
    losses = [0.1] * 30 + [float("inf")] * 5 + [float("nan")] * 5
    write_metrics(tmp_path, [row(step, loss=loss, **unknown) for step, loss in enumerate(losses, 1)])
    _, page = report(tmp_path)
    assert page.card("Final loss") == "nan"
    assert "10 logged losses are not finite, the first at step 31." in page.text
    for name in ("Images per second", "Waiting for data", "Peak memory", "Wall time"):
        assert page.card(name) == "–"


def test_a_loss_that_was_not_logged_is_no_bad_one(tmp_path):
    """Of a line all of whose steps the spike guard refused."""
    write_metrics(tmp_path, [row(step, loss=None if step == 40 else 0.25) for step in range(1, 41)])
    _, page = report(tmp_path)
    assert page.card("Final loss") == "0.25" and "not finite" not in page.text
    write_metrics(tmp_path, [row(1, loss=None)])
    assert report(tmp_path)[1].card("Final loss") == "–"


def test_a_long_run_makes_a_small_file(tmp_path):
    noise = np.random.default_rng(0).random((8_000, 2))
    rows = [row(i + 1, loss=float(a), grad_norm=float(b)) for i, (a, b) in enumerate(noise)]
    rows[1_234]["loss"] = 1e6  # one peak: it must be in the picture, on a scale that leaves the rest legible
    write_metrics(tmp_path, rows)
    text, _ = report(tmp_path)
    assert len(text) < 500_000


def test_the_same_run_gives_the_same_bytes(tmp_path):
    write_metrics(tmp_path, [row(1, grad_norm=None)])
    write_images(tmp_path, [1])
    assert report(tmp_path)[0] == report(tmp_path)[0]


def test_import_leaves_plotting_alone_and_drawing_leaves_pyplot_alone(tmp_path):
    write_metrics(tmp_path, [row(1)])
    code = f"""
import sys, library.validation.report as report
assert not {{"matplotlib", "PIL", "torch"}} & set(sys.modules)
report.write_loss_curve({str(tmp_path)!r})
assert "matplotlib" in sys.modules and "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True, timeout=60)
