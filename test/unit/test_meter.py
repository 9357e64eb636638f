"""The log of a run: its lines, its restarts, and the time spent waiting for data."""

import json
import math
import time
from types import SimpleNamespace

import pytest
import torch

from library.training.meter import Meter
from library.validation.report import METRICS, read_metrics


class Board:
    """What a tracker is told."""

    def __init__(self):
        self.told = []

    def numbers(self, step, values):
        self.told.append((step, values))


def make(folder, *, step=0, unlogged=None, steps=10, every=1):
    board = Board()
    state = SimpleNamespace(step=step, unlogged=unlogged or {})
    return Meter(folder, board, state, steps, every, "cpu"), board


def lines(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def run(meter, losses, first=1):
    """One optimizer step a list of micro losses; its norm is ten times their mean, its rate a hundredth of its number."""
    for step, several in enumerate(losses, first):
        for loss in several:
            meter.add(torch.tensor(loss, requires_grad=True), 2)
        meter.add_norm(torch.tensor(10 * sum(several) / len(several)))
        meter.step(step, step / 5, step / 100)


def test_a_line_is_the_mean_since_the_last(tmp_path):
    meter, board = make(tmp_path, every=2, steps=5)
    run(meter, [[1.0, 2.0], [3.0, 6.0], [4.0, 4.0], [5.0, 5.0], [7.0, 9.0]])
    meter.close()
    written = lines(tmp_path)
    assert [(line["step"], line["loss"], line["grad_norm"], line["lr"], line["epoch"]) for line in written] == [
        (2, 3.0, 30.0, 0.02, 0.4), (4, 4.5, 45.0, 0.04, 0.8), (5, 8.0, 80.0, 0.05, 1.0)]    # the last step always has one
    assert all(set(line) == set(METRICS) and line["memory_gb"] > 0.05 for line in written)
    assert [line["seconds"] for line in written] == sorted(line["seconds"] for line in written)
    assert [step for step, _ in board.told] == [2, 4, 5]
    assert board.told[0][1] == {name: value for name, value in written[0].items() if name != "step"}
    assert read_metrics(tmp_path / "metrics.jsonl")["loss"].tolist() == [3.0, 4.5, 8.0]    # the report reads it


def test_without_clipping_there_is_no_norm(tmp_path):
    meter, board = make(tmp_path)
    meter.add(torch.tensor(1.0), 2)
    values = meter.step(1, 0, 1e-4)
    assert values["grad_norm"] is None and lines(tmp_path)[0]["grad_norm"] is None
    assert "grad_norm" not in board.told[0][1]


def test_a_loss_that_is_not_finite_is_logged_as_it_is(tmp_path):
    meter, _ = make(tmp_path)
    run(meter, [[1.0], [float("nan")], [2.0]])
    values = read_metrics(tmp_path / "metrics.jsonl")["loss"]
    assert values[0] == 1 and values[1] != values[1] and values[2] == 2


@pytest.mark.parametrize("stop", [None, 1, 2, 3])
def test_the_loss_of_a_refused_gradient_is_in_no_mean(tmp_path, stop):
    """Of all its micro steps, and across a restart; its images were shown all the same. No loss is left: null."""
    steps = [([1.0, 3.0], False), ([40.0, math.nan], True), ([7.0, 9.0], False), ([50.0], True), ([60.0], True), ([70.0], True)]
    meter, board = make(tmp_path, every=3, steps=6)
    for step, (losses, refused) in enumerate(steps, 1):
        for number, loss in enumerate(losses, 1):
            meter.add(torch.tensor(loss), 2, refused and number == len(losses))
        meter.step(step, 0, 0)
        if step == stop:
            meter, board = make(tmp_path, every=3, steps=6, step=step, unlogged=json.loads(json.dumps(meter.unlogged())))
    assert [line["loss"] for line in lines(tmp_path)] == [5.0, None]
    assert "loss" not in board.told[-1][1]
    assert read_metrics(tmp_path / "metrics.jsonl")["loss"][0] == 5


def test_losses_wait_on_the_device_until_the_line(tmp_path, monkeypatch):
    """D9: between two lines no value is asked for."""
    asked = []
    item = torch.Tensor.item
    monkeypatch.setattr(torch.Tensor, "item", lambda tensor: asked.append(1) or item(tensor))
    meter, _ = make(tmp_path, every=4)
    run(meter, [[1.0], [2.0], [3.0]])
    assert not asked
    run(meter, [[4.0]], first=4)
    assert asked


def test_a_restart_drops_the_lines_it_runs_again(tmp_path):
    meter, _ = make(tmp_path)
    run(meter, [[1.0], [2.0], [3.0], [4.0]])
    before = lines(tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')    # kill -9
    again, _ = make(tmp_path, step=2)
    assert lines(tmp_path) == before[:2]
    run(again, [[30.0], [40.0]], first=3)
    after = lines(tmp_path)
    assert [line["step"] for line in after] == [1, 2, 3, 4] and [line["loss"] for line in after] == [1, 2, 30, 40]
    assert after[2]["seconds"] > before[1]["seconds"]    # the clock goes on from there
    make(tmp_path, step=0)
    assert lines(tmp_path) == []
    assert not list(tmp_path.glob("*.tmp"))


def test_a_line_begun_before_a_restart_is_the_uninterrupted_one(tmp_path):
    losses = [[1.0, 2.0], [3.0, 5.0], [7.0, 11.0], [13.0, 17.0]]
    whole, first, second = (tmp_path / name for name in ("whole", "first", "second"))
    for folder in (whole, first, second):
        folder.mkdir()
    run(make(whole, every=4)[0], losses)
    stopped, _ = make(first, every=4)
    run(stopped, losses[:3])
    kept = stopped.unlogged()
    assert kept == {"losses": [1.0, 2.0, 3.0, 5.0, 7.0, 11.0], "norms": [15.0, 40.0, 90.0]} == json.loads(json.dumps(kept))
    run(make(second, every=4, step=3, unlogged=kept)[0], losses[3:], first=4)
    (one,), (other,) = lines(whole), lines(second)
    assert all(one[name] == other[name] for name in ("step", "loss", "grad_norm", "lr", "epoch"))


@pytest.mark.parametrize(("load", "compute", "share"), [(0.06, 0.02, 0.75), (0.0, 0.05, 0.0), (0.04, 0.04, 0.5)])
def test_the_share_of_waiting(tmp_path, load, compute, share):
    def batches():
        for number in range(6):
            time.sleep(load)
            yield number

    meter, _ = make(tmp_path, every=6)
    for number in meter.waiting(batches()):
        time.sleep(compute)
        meter.add(torch.tensor(1.0), 8)
        meter.step(number + 1, 0, 0)
    (line,) = lines(tmp_path)
    assert line["wait"] == pytest.approx(share, abs=0.12)
    assert 0.5 < line["images_per_s"] / (8 / (load + compute)) <= 1.01    # waiting is not taken off


def test_validation_and_saving_are_not_training(tmp_path):
    meter, _ = make(tmp_path, every=2)
    for number in meter.waiting(iter(range(2))):
        time.sleep(0.05)
        meter.add(torch.tensor(1.0), 1)
        meter.step(number + 1, 0, 0) if number else None
        with meter.paused():
            time.sleep(0.3)
    (line,) = lines(tmp_path)
    assert 8 < line["images_per_s"] <= 20.5    # 2 in 0.1 s; with the pause it would be 5
    assert line["seconds"] > 0.35    # the clock on the wall goes on
