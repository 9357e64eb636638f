"""The guard against loss spikes: what it refuses, what it says, and that a restart goes on as if nothing had been."""

import json
import math
import statistics
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from library.training import spikes


def judge(norms, folder, mode="skip", factor=5.0, kept=None, scaler=None, first=1) -> tuple[list[int], spikes.SpikeGuard]:
    """The steps whose gradient is refused, and the guard."""
    guard = spikes.SpikeGuard(mode, factor, SimpleNamespace(step=first - 1, unlogged=kept or {}), scaler, folder, {})
    return [step for step, norm in enumerate(norms, first) if guard.refuses(torch.tensor(norm), step)], guard


NORM = st.one_of(st.integers(1, 1280).map(lambda n: n / 128), st.sampled_from([math.inf, math.nan, 1000.0]))    # exact in float32
NORMS = st.lists(NORM, min_size=1, max_size=150)


@given(NORMS, st.floats(1.5, 20))
def test_it_refuses_what_outlies_the_median(tmp_path_factory, norms, factor):
    """The rule, said again: not finite; or more than `factor` times the median of the last 100 finite ones, of at least 20."""
    refused, guard = judge(norms, tmp_path_factory.mktemp("run"), factor=factor)
    wanted = []
    for number, norm in enumerate(norms):
        before = [other for other in norms[:number] if math.isfinite(other)][-100:]
        outlies = len(before) >= 20 and norm > factor * statistics.median(before)
        wanted += [number + 1] if not math.isfinite(norm) or outlies else []
    assert refused == wanted and guard.counts == {"spikes": len(wanted)}


@given(NORMS, st.integers(0, 150))
def test_a_restart_judges_the_same(tmp_path_factory, norms, stop):
    folder, other = tmp_path_factory.mktemp("run"), tmp_path_factory.mktemp("again")
    whole, guard = judge(norms, folder)
    stop = min(stop, len(norms))
    before, first = judge(norms[:stop], other)
    judge([math.nan] * 3, other, kept=first.state(), first=stop + 1)    # killed after the checkpoint
    kept = json.loads(json.dumps(first.state()))    # as in the manifest
    after, second = judge(norms[stop:], other, kept=kept, first=stop + 1)
    assert before + after == whole and second.state() == guard.state()
    if whole:
        assert (other / spikes.NAME).read_text() == (folder / spikes.NAME).read_text()


def test_what_it_says_and_keeps(tmp_path, capsys):
    refused, guard = judge([2.0] * 25 + [30.0, math.nan, 2.0], tmp_path)
    assert refused == [26, 27] and guard.state()["spikes"] == [2.0] and len(guard.state()["guarded_norms"]) == 27
    assert [json.loads(line) for line in (tmp_path / spikes.NAME).read_text().splitlines()] == [
        {"step": 26, "grad_norm": 30.0, "median": 2.0}, {"step": 27, "grad_norm": "nan", "median": 2.0}]
    said = capsys.readouterr().out.splitlines()
    end = "; it is not applied, nor is its loss in the mean (spike"
    assert said == [f"step 26: the gradient's norm is 30, 15.0 times the median of the last 25{end} 1)",
                    f"step 27: the gradient's norm is nan{end} 2)"]
    assert guard.notes() == [f"--spike_guard skip: 2 gradients were not applied, see {spikes.NAME}"] and not guard.stops


def test_a_level_that_lasts_becomes_the_usual_one(tmp_path):
    refused, _ = judge([1.0] * 100 + [20.0] * 200, tmp_path)
    assert refused == list(range(101, 151))    # until half of the window is of it


def test_off_and_stop(tmp_path):
    refused, guard = judge([math.nan] * 3, tmp_path, mode="off")
    assert not refused and not guard.on and guard.state() == {} and guard.counts == {} and not guard.notes() and not guard.stops
    assert not list(tmp_path.iterdir())
    _, guard = judge([1.0] * 30, tmp_path, mode="stop")
    assert not guard.stops and guard.refuses(math.inf, 31) and guard.stops


@pytest.mark.parametrize("norm, refused, updates", [(math.inf, False, 0), (100.0, True, 1), (1.0, False, 0)])
def test_overflow_in_fp16_is_left_to_the_scaler(tmp_path, norm, refused, updates):
    """It leaves that step out and lowers its scale; where the guard leaves one out, it must forget that it unscaled."""
    done = []
    _, guard = judge([1.0] * 30, tmp_path, scaler=SimpleNamespace(update=lambda: done.append(1)))
    assert guard.refuses(torch.tensor(norm), 31) is refused and len(done) == updates


def test_a_true_scaler_goes_on_after_a_refused_step(tmp_path):
    weight, scaler = torch.nn.Parameter(torch.ones(2)), torch.amp.GradScaler("cpu", init_scale=4.0)
    optimizer = torch.optim.SGD([weight], lr=1.0)
    guard = spikes.SpikeGuard("skip", 5.0, SimpleNamespace(step=30, unlogged={"guarded_norms": [1.0] * 30}), scaler, tmp_path, {})
    for step, size in enumerate((1.0, 100.0, 1.0), 1):
        scaler.scale((weight * size).sum() / 2 ** 0.5).backward()
        scaler.unscale_(optimizer)
        if not guard.refuses(torch.nn.utils.clip_grad_norm_([weight], math.inf), step):
            scaler.step(optimizer)
            scaler.update()
        optimizer.zero_grad()
    torch.testing.assert_close(weight.detach(), torch.full((2,), 1 - 2 / 2 ** 0.5))
