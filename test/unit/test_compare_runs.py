"""tools/compare_runs.py and what it reads: statistics stand for their tensors, and the first fault is the one that is named."""

import copy
import functools
import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from library.errors import UserError
from library.training import layer_statistics, run_records
from library.training.meter import Meter
from library.training.run_records import ABSENT, MAX, MEAN, NORM, SKETCH, STD, WIDTH, Record
from library.validation import compare_runs, run_differences
from library.validation.run_differences import Step, Tolerance, difference, inspect, relative

TOOL = Path(__file__).resolve().parents[2] / "tools/compare_runs.py"
LAYERS = [f"net.{number}" for number in range(6)] + ["net"]    # in order of execution; the last is the whole
FLOAT32 = Tolerance("no", 1e-4, 1e-4, 1e-4)


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("compare_runs_tool", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows(*tensors) -> np.ndarray:
    return np.stack([layer_statistics.statistics(torch.as_tensor(tensor)).numpy() for tensor in tensors])


# statistics of a tensor

@given(st.integers(0, 2**32 - 1), st.sampled_from([(7,), (3, 40), (2, 5, 33, 17), (70_001,)]), st.floats(-6, 0))
@settings(max_examples=60)
def test_the_difference_of_sketches_has_the_norm_of_the_difference(seed, shape, magnitude):
    draw = torch.Generator().manual_seed(seed)
    a = torch.randn(shape, generator=draw)
    b = a + 10**magnitude * torch.randn(shape, generator=draw)
    true = float((a.double() - b.double()).norm() / max(a.norm(), b.norm()))
    found = difference(*rows(a, b)[:, None])[0]
    assert 0.3 * true - 1e-7 < found < 2.2 * true + 1e-6


def test_a_permutation_and_a_sign_are_seen_though_every_moment_is_the_same():
    a = torch.randn(4, 1000)
    for other in (a.flip(0), a.roll(1, 1), a.reshape(1000, 4).T, torch.where(torch.arange(1000) % 2 == 0, a, -a)):
        assert difference(*rows(a, other)[:, None])[0] > 0.5
    assert difference(*rows(a, a.clone())[:, None])[0] == 0


@pytest.mark.parametrize("tensor", [torch.arange(24.0).view(2, 3, 2, 2).to(memory_format=torch.channels_last), torch.tensor(-3),
                                    torch.randn(5, 8).bfloat16(), torch.tensor([True, False]), torch.randn(9, 4).T],
                         ids=["channels_last", "integer", "bf16", "bool", "transposed"])
def test_statistics_are_those_of_the_values_whatever_their_type_and_layout(tensor):
    values, found = tensor.double().numpy(), rows(tensor)[0]
    expected = [np.linalg.norm(values), values.mean(), values.std(), abs(values).max()]
    assert found[:SKETCH.start] == pytest.approx(expected, rel=1e-5, abs=1e-6) and len(found) == WIDTH
    assert (found == rows(tensor.float().contiguous())[0]).all()


def test_several_tensors_count_as_one():
    several = [torch.randn(3, 100), 2 + torch.randn(7), torch.full((2, 2), -9.0)]
    values = torch.cat([tensor.flatten() for tensor in several]).numpy()
    counts = [tensor.numel() for tensor in several]
    found = layer_statistics.together(rows(*several), counts)
    assert found[:4] == pytest.approx([np.linalg.norm(values), values.mean(), values.std(), 9.0], rel=1e-5)
    # changes in two tensors that are the same do not hide each other: exchange equal tensors' parts with opposite signs
    x, y = torch.randn(2, 500)
    one, other = (layer_statistics.together(rows(*pair), [500, 500]) for pair in ((x, y), (y, x)))
    assert difference(one[None], other[None])[0] > 0.5


def test_infinity_is_not_hidden_by_a_sketch():
    bad = torch.ones(50)
    bad[3] = torch.nan
    assert difference(*rows(torch.ones(50), bad)[:, None])[0] == np.inf
    assert difference(*rows(bad, bad)[:, None])[0] == 0
    absent = np.full((1, WIDTH), ABSENT)
    assert np.isnan(difference(absent, rows(bad)))[0] and np.isnan(difference(absent, absent))[0]


@given(st.lists(st.tuples(*2 * [st.floats(allow_nan=True, allow_infinity=True, width=32)]), min_size=1))
def test_relative_is_symmetric_and_infinite_only_for_what_is_not_finite(pairs):
    a, b = np.array(pairs).T
    found = relative(a, b)
    assert (found == relative(b, a)).all() and not np.isnan(found).any() and (relative(a, a) == 0).all()
    assert (np.isinf(found) <= ~(np.isfinite(a) & np.isfinite(b))).all()


# synthetic records

def record(step: int = 1, seed: int = 0, portions=(2, 2)) -> Record:
    """A chain of layers, each with a weight of its own, at some positions."""
    return copy.deepcopy(_record(step, seed, portions))


@functools.cache
def _record(step: int, seed: int, portions: tuple) -> Record:
    draw = torch.Generator().manual_seed(seed)

    def tensors(count):
        return rows(*torch.randn(count, 300, generator=draw))

    count, positions = len(LAYERS), len(portions)
    outputs = np.stack([tensors(count) for _ in portions])
    inputs = np.concatenate([np.stack([tensors(1) for _ in portions]), outputs[:, :-1]], axis=1)
    inputs[:, -1] = inputs[:, 0]    # the whole is given what the first is
    arrays = {"input": inputs, "output": outputs, "output_gradient": np.stack([tensors(count) for _ in portions]),
              "weight": tensors(6), "weight_gradient": tensors(6), "loaded": np.stack([tensors(2) for _ in portions]),
              "given": inputs[:, :1].copy(), "checksum": np.arange(2 * positions).reshape(positions, 2),
              "loss": np.linspace(0.1, 0.2, positions), "grad_norm": np.array([1.5])}
    samples = [[[f"{position}{n}.png", f"hash{position}{n}", step] for n in range(size)]
               for position, size in enumerate(portions)]
    return Record(step, list(LAYERS), LAYERS[:6], ["latents", "prompt_embeds"], ["net.sample"], samples, arrays)


def scaled(values: np.ndarray, factor: float) -> np.ndarray:
    """Statistics of a tensor times a factor."""
    return (values.astype(np.float64) * factor).astype(np.float32)


def damage(record: Record, stage: str, n: int, factor: float, position: int = 0) -> None:
    """A fault at layer n, and all that follows from it."""
    arrays, order = record.arrays, ("loaded", "given", "weight", "forward", "loss", "backward", "weight_gradient")
    reach = order.index(stage)
    if stage == "loaded":
        arrays["loaded"][position, n % 2] = scaled(arrays["loaded"][position, n % 2], factor)
    if reach <= 1:
        arrays["given"][position], arrays["input"][position, [0, -1]] = (
            scaled(arrays[name][position, [0] if name == "given" else [0, -1]], factor) for name in ("given", "input"))
    if stage == "weight":
        arrays["weight"][n] = scaled(arrays["weight"][n], factor)
    if reach <= 3:
        first = n if stage in ("weight", "forward") else 0
        arrays["output"][position, first:] = scaled(arrays["output"][position, first:], factor)
        arrays["input"][position, first + 1:-1] = scaled(arrays["input"][position, first + 1:-1], factor)
    if reach <= 4:
        arrays["loss"] = arrays["loss"] * factor
    if reach <= 5:
        last = n if stage == "backward" else len(LAYERS) - 1
        arrays["output_gradient"][position, :last + 1] = scaled(arrays["output_gradient"][position, :last + 1], factor)
    if reach <= 6:
        arrays["weight_gradient"][:n + 1] = scaled(arrays["weight_gradient"][:n + 1], factor)


def noisy(record: Record, size: float, seed: int) -> None:
    """Rounding of this size everywhere."""
    draw = np.random.default_rng(seed)
    for name, values in record.arrays.items():
        if name not in ("checksum", "weight"):
            record.arrays[name] = (values * (1 + size * draw.standard_normal(values.shape))).astype(values.dtype)


@given(st.sampled_from(["loaded", "given", "weight", "forward", "loss", "backward", "weight_gradient"]), st.integers(0, 5),
       st.sampled_from([1.01, 0.99, 3.0, -1.0, 1.001]), st.integers(0, 1), st.integers(0, 9))
@settings(max_examples=100)
def test_the_place_where_a_fault_begins_is_named_first(stage, n, factor, position, seed):
    start, a, b = (Step(record(1), record(1)), *(record(2, seed=seed) for _ in range(2)))
    damage(b, stage, n, factor, position)
    for number, one in enumerate((a, b)):
        noisy(one, 1e-6, seed + number)
    if stage == "weight":    # of the first step, which is exact
        start = Step(a, b)
    found, apart = inspect(Step(a, b), start, FLOAT32)
    place = {"loaded": a.loaded[n % 2], "given": "net.sample", "loss": "loss", "weight_gradient": LAYERS[0]}.get(stage, LAYERS[n])
    assert (found[0].stage, found[0].place) == (stage, place)
    assert found[0].difference > found[0].tolerance and found[0].step == 2
    if stage in ("weight", "forward"):    # those behind it hear what it says, and the whole contains it
        assert [each.place for each in found if each.stage == "forward"] == [place]
    assert not np.isnan(apart["output"]).any() and not any("." in each.place for each in found if each.stage == "samples")


@given(st.integers(0, 99), st.sampled_from([("no", 1e-6), ("bf16", 8e-3), ("fp16", 1e-3)]))
@settings(max_examples=30)
def test_rounding_alone_is_no_fault(seed, precision):
    name, size = precision
    a, b = record(1, seed=seed), record(1, seed=seed)
    for number, one in enumerate((a, b)):
        noisy(one, size, 2 * seed + number)
        if name != "no":    # what the loader makes is exact in every precision
            one.arrays["loaded"], one.arrays["given"] = (record(1, seed=seed).arrays[each] for each in ("loaded", "given"))
    tolerance = Tolerance(name, run_differences.RTOL[name], run_differences.LOSS[name], 1e-4)
    assert inspect(Step(a, b), Step(a, b), tolerance)[0] == []


def test_other_samples_are_told_before_anything_else_and_the_same_under_another_name_are_not():
    a, b = record(1), record(1)
    b.samples[1][0][0] = "elsewhere/10.png"
    assert inspect(Step(a, b), Step(a, b), FLOAT32)[0] == []
    b.samples[1][0][1] = "another hash"
    damage(b, "loaded", 0, 2.0)
    first = inspect(Step(a, b), Step(a, b), FLOAT32)[0][0]
    assert (first.stage, first.place) == ("samples", "sample 3 of 4")
    assert "10.png (visit 1) in A, elsewhere/10.png (visit 1) in B" in first.text
    a, b = record(1), record(1)
    b.samples[0][1][2] = 7    # the same image at another visit: another crop, another noise
    assert inspect(Step(a, b), Step(a, b), FLOAT32)[0][0].place == "sample 2 of 4"


def test_weights_may_drift_by_a_share_of_their_way_but_not_leave_it():
    start = Step(record(1), record(1))
    for share, out in ((0.01, False), (0.5, True)):
        a, b = record(2), record(2)
        way = rows(*0.01 * torch.randn(6, 300))[:, SKETCH]
        for each, factor in ((a, 1.0), (b, 1.0 + share)):
            each.arrays["weight"][:, SKETCH] += factor * way
        found = inspect(Step(a, b), start, FLOAT32)[0]
        assert [each.stage for each in found] == ["weight"] * (6 * out)


def test_absolute_tolerance_is_a_root_mean_square():
    a, b = rows(torch.full((10, 10), 1e-3), torch.full((10, 10), 2e-3))[:, None]
    limit = run_differences.allowed(a, b, 0.0, 1e-3)
    assert difference(a, b)[0] == pytest.approx(0.5, rel=1e-5) and limit[0] == pytest.approx(0.5, rel=1e-5)


def test_portions_of_another_size_are_compared_over_the_whole_step():
    draw = torch.Generator().manual_seed(3)
    whole = torch.randn(4, 50, generator=draw)
    gradient = torch.randn(4, 50, generator=draw)    # of each sample's loss

    def dealt(sizes):
        made = record(1, portions=tuple(sizes))
        made.layers = ["net"]
        for kind in ("input", "output"):
            made.arrays[kind] = np.stack([rows(part) for part in whole.split(sizes)])
        made.arrays["output_gradient"] = np.stack([rows(part / len(part)) for part in gradient.split(sizes)])
        return made

    found = [run_differences.merged(dealt(sizes), kind)[0, 0] for kind in ("output", "output_gradient")
             for sizes in ([4], [2, 2], [3, 1], [1, 1, 1, 1])]
    assert np.allclose(found[:4], found[0], rtol=1e-5) and np.allclose(found[4:], found[4], rtol=1e-5)
    assert found[0][[NORM, MEAN, STD]] == pytest.approx(rows(whole)[0, [NORM, MEAN, STD]], rel=1e-5)
    step = Step(dealt([4]), dealt([1, 3]))
    assert not step.alike and inspect(step, step, FLOAT32)[1]["output"].max() < 1e-6
    other = dealt([1, 3])
    other.arrays["output"] = scaled(other.arrays["output"], 1.1)
    found = [each for each in inspect(Step(dealt([4]), other), Step(dealt([4]), other), FLOAT32)[0] if each.stage == "forward"]
    assert [each.place for each in found] == ["net"]


# logs

@given(st.integers(1, 40), st.integers(1, 7), st.integers(1, 7), st.integers(0, 99))
def test_logs_of_other_steps_are_compared_as_means_between_common_ones(steps, every_a, every_b, seed):
    losses = np.random.default_rng(seed).random(steps)

    def log(every):
        ends = [step for step in range(1, steps + 1) if step % every == 0 or step == steps]
        begins = [0, *ends[:-1]]
        means = np.array([losses[begin:end].mean() for begin, end in zip(begins, ends, strict=True)])
        return {"step": np.array(ends), "loss": means, "grad_norm": 2 * means}

    common, found = compare_runs.curves(log(every_a), log(every_b))
    expected = [losses[begin:end].mean() for begin, end in zip([0, *common[:-1]], common, strict=True)]
    assert common[-1] == steps and np.allclose(found["loss"], [expected, expected], rtol=1e-12)
    assert np.allclose(found["grad_norm"], 2 * found["loss"])


def folder(path: Path, losses: list[float], records=(), flags=None, every: int = 1, **about) -> Path:
    """An output folder as the scripts leave it."""
    (path / run_records.FOLDER).mkdir(parents=True)
    lines = [{"step": step, "loss": loss, "grad_norm": 10 * loss} for step, loss in enumerate(losses, 1) if step % every == 0]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for each in records:
        (path / run_records.FOLDER / run_records.name_of(each.step)).write_bytes(run_records.encode(each))
    if records:
        (path / run_records.FOLDER / "run.json").write_text(json.dumps(about))
    if flags is not None:
        (path / "checkpoint-1").mkdir()
        (path / "checkpoint-1/manifest.json").write_text(json.dumps({"flags": flags}))
    return path


def outcome(tool, capsys, *argv) -> tuple[int, str]:
    status = tool.main(tool.parse_args(list(map(str, argv))))
    return status, capsys.readouterr().out


def test_statuses_notes_and_files(tool, capsys, tmp_path):
    flags = {"learning_rate": 1e-4, "seed": 1, "output_dir": "a"}
    a = folder(tmp_path / "a", [0.5, 0.4, 0.3], [record(1), record(2), record(3)], flags, mixed_precision="no")
    bad = [record(1), record(2), record(3)]
    for each in bad[1:]:
        damage(each, "forward", 2, 1.001)
    b = folder(tmp_path / "b", [0.5, 0.4002, 0.31, 0.2], bad, flags | {"learning_rate": 2e-4, "output_dir": "b"},
               mixed_precision="no")
    assert outcome(tool, capsys, a, a)[0] == 0
    status, said = outcome(tool, capsys, a, b, "--plot", tmp_path / "p.png", "--csv", tmp_path / "c.csv", "--json",
                           tmp_path / "j.json")
    first = said.splitlines()[0]
    assert status == 1 and first.startswith("DIFFER from step 2: forward pass, net.2: its input is the same, its output")
    assert first.endswith("(allowed 1e-04). In step 1 there was none")
    assert 5e-4 < json.loads((tmp_path / "j.json").read_text())["findings"][0]["difference"] < 2e-3
    assert "--learning_rate: 0.0001 in A, 0.0002 in B" in said and "output_dir" not in said
    assert "A has 3 steps and B 4: the first 3 are compared" in said
    assert (tmp_path / "p.png").read_bytes()[:4] == b"\x89PNG"
    told = json.loads((tmp_path / "j.json").read_text())
    assert not told["equal"] and told["first_step"] == 2 and told["findings"][0]["place"] == "net.2"
    table = (tmp_path / "c.csv").read_text().splitlines()
    assert table[0] == "step,kind,name,difference" and len(table) == len(told["differences"]) + 1
    assert {"3,loss,,0.032258064516129059"[:12], "1,output,net.2,0.0"} <= {line[:12] for line in table} | set(table)
    assert outcome(tool, capsys, a, b, "--rtol", 0.5)[0] == 0


def test_runs_without_statistics(tool, capsys, tmp_path):
    a, b = folder(tmp_path / "a", [1, 1, 1, 1]), folder(tmp_path / "b", [1, 1, 1, 1.1], every=2)
    status, said = outcome(tool, capsys, a, b)
    assert status == 1 and said.startswith("DIFFER from step 4: loss 1 | 1.05") or "1.1" in said
    assert "A has no layer statistics" in said and "--layer_statistics 1 in both runs" in said
    late = folder(tmp_path / "late", [1, 1, 1, 1], [record(1)])
    other = folder(tmp_path / "other", [1, 1, 2, 1], [record(1)])
    status, said = outcome(tool, capsys, late, other)
    assert status == 1 and said.startswith("DIFFER from step 3") and "the layers of step 1 agree" in said
    nan = folder(tmp_path / "nan", [1, float("nan"), 1, 1])
    assert outcome(tool, capsys, a, nan)[0] == 1 and outcome(tool, capsys, nan, nan)[0] == 0


def test_mistakes(tool, tmp_path):
    a = folder(tmp_path / "a", [1, 1], [record(1)])
    for argv, words in (
            ((a, tmp_path / "none"), "is no folder"), ((tmp_path, a), "has no metrics.jsonl: give the --output_dir"),
            ((a, a, "--plot", "x.pdf"), "the plot is a .png"), ((a, a, "--csv", tmp_path / "no/x.csv"), "make it first"),
            ((a, a, "--rows", "0"), "--rows 0"), ((a, folder(tmp_path / "b", [1, 1, 1], every=3)), "no logged step in common")):
        with pytest.raises(UserError, match=words):
            tool.main(tool.parse_args(list(map(str, argv))))
    path = a / run_records.FOLDER / run_records.name_of(1)
    whole = path.read_bytes()
    for content in (whole[:100], b"", whole.replace(b'\\"format\\": 1', b'\\"format\\": 2')):
        path.write_bytes(content)
        with pytest.raises(UserError, match="step-00000001.safetensors"):
            tool.main(tool.parse_args([str(a), str(a)]))


def test_help_and_mistakes_take_no_time_and_end_with_status_2(tmp_path):
    begin = time.process_time()
    spent = []
    for argv, status in ((["--help"], 0), (["--hepl"], 2), ([], 2), ([str(tmp_path), str(tmp_path)], 2)):
        done = subprocess.run([sys.executable, TOOL, *argv], text=True, capture_output=True)
        assert done.returncode == status and "Traceback" not in done.stderr
        spent.append(done)
    assert "Exit status" in spent[0].stdout and spent[3].stderr.startswith("compare_runs.py: error: ")
    assert time.process_time() - begin < 5


# the recorder

class Net(torch.nn.Module):
    """A chain with a layer that is called twice, two outputs, an argument by name, and blocks that may be checkpointed."""

    def __init__(self):
        super().__init__()
        self.first, self.act, self.last = torch.nn.Linear(4, 8), torch.nn.SiLU(), torch.nn.Linear(8, 4)
        self.checkpointed = False

    def block(self, x):
        return self.act(self.last(self.act(self.first(x))))

    def forward(self, x, scale=None):
        if self.checkpointed:
            x = torch.utils.checkpoint.checkpoint(self.block, x, use_reentrant=False)
        else:
            x = self.block(x)
        return {"sample": x * scale["by"], "other": (x.detach(),)}


def make(tmp_path, net, every=1, accumulation=1, clip=0.0, steps=4):
    """(meter, recorder, the state of its run)."""
    args = SimpleNamespace(layer_statistics=every, max_grad_norm=clip, mixed_precision=None)
    table = SimpleNamespace(name=np.array(["a.png", "b.png"]), content=np.array([b"ha", b"hb"]))
    loader = SimpleNamespace(table=table, world=1, accumulation=accumulation,
                             samples=lambda step, micro: (np.array([micro % 2]), np.array([step]), 0))
    state = SimpleNamespace(step=0, unlogged={}, scaler=None, optimizer=torch.optim.SGD(net.parameters(), lr=0.1))
    recorder = layer_statistics.record(args, {"net": net}, loader)
    tmp_path.mkdir(exist_ok=True)
    return Meter(tmp_path, SimpleNamespace(numbers=lambda *_: None), state, steps, 1, "cpu", recorder), recorder, state


def train(tmp_path, net, steps=4, accumulation=1, clip=0.0, scale=1.0, **setting):
    meter, recorder, state = make(tmp_path, net, accumulation=accumulation, clip=clip, steps=steps, **setting)
    state.scaler = SimpleNamespace(get_scale=lambda: scale)
    draw = torch.Generator().manual_seed(5)
    batches = [{"x": torch.randn(3, 4, generator=draw)} for _ in range(steps * accumulation)]
    for number, batch in enumerate(meter.waiting(iter(batches)), 1):
        with torch.no_grad():    # what an adapter's base says: not the call that is trained
            net(batch["x"] + 1, scale={"by": torch.tensor(2.0)})
        loss = net(batch["x"], scale={"by": torch.tensor(2.0)})["sample"].square().mean()
        (scale * loss / accumulation).backward()
        if number % accumulation == 0:
            for p in net.parameters():    # as fp16's scaler does
                p.grad /= scale
            if clip:
                meter.add_norm(torch.nn.utils.clip_grad_norm_(net.parameters(), clip))
            state.optimizer.step()
            state.optimizer.zero_grad()
        meter.add(loss, 3)
        if number % accumulation == 0:
            state.step += 1
            meter.step(state.step, 0.0, 0.1)
            net(torch.ones(1, 4), scale={"by": 1.0})    # a validation, which is not recorded
    meter.close()
    return run_records.steps_in(tmp_path)


def net_of(seed=0):
    torch.manual_seed(seed)
    return Net()


def test_what_is_recorded_is_what_was_computed(tmp_path):
    net = net_of()
    assert train(tmp_path, net, steps=1) == [1]
    found, again = run_records.read(tmp_path, 1), net_of()
    assert found.layers == ["net.first", "net.act", "net.last", "net.act#2", "net"] and found.modules == ["net.first", "net.last"]
    assert found.given == ["net.x", "net.scale.by"] and found.samples == [[["a.png", "ha", 0]]]
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(5))
    hidden = again.first(x)
    hidden.retain_grad()
    out = again.act(again.last(again.act(hidden)))
    loss = (2 * out).square().mean()
    loss.backward()

    def same(kind, name, tensor):
        position = found.arrays[kind][0] if found.arrays[kind].ndim == 3 else found.arrays[kind]
        names = found.modules if kind.startswith("weight") else found.layers
        return difference(position[[names.index(name)]], rows(tensor))[0] < 1e-6

    assert found.arrays["loss"][0] == pytest.approx(loss.item(), rel=1e-6)
    assert found.arrays["loaded"][0, 0] == pytest.approx(rows(x)[0])
    assert same("input", "net.first", x) and same("output", "net.first", hidden) and same("output", "net.act#2", out)
    assert same("output_gradient", "net.first", hidden.grad)
    gradients = [again.first.weight.grad, again.first.bias.grad]
    expected = layer_statistics.together(rows(*gradients), [p.numel() for p in gradients])
    assert difference(found.arrays["weight_gradient"][:1], expected[None])[0] < 1e-6
    assert found.arrays["weight"][0, MAX] == pytest.approx(max(p.abs().max().item() for p in again.first.parameters()))


@pytest.mark.parametrize("other", ["checkpointed", "clipped", "accumulated", "scaled"])
def test_checkpointing_clipping_accumulation_and_a_loss_scale_change_no_record(tmp_path, other):
    plain, changed = net_of(), net_of()
    changed.checkpointed = other == "checkpointed"
    train(tmp_path / "a", plain, steps=1)
    setting = {"clipped": {"clip": 0.01}, "accumulated": {"accumulation": 2}, "scaled": {"scale": 1024.0}}.get(other, {})
    train(tmp_path / "b", changed, steps=1, **setting)
    a, b = run_records.read(tmp_path / "a", 1), run_records.read(tmp_path / "b", 1)
    assert a.layers == b.layers and len(b.arrays["output"]) == (2 if other == "accumulated" else 1)
    for kind in ("input", "output", "output_gradient", *([] if other == "accumulated" else ["weight_gradient"])):
        ours, theirs = (each.arrays[kind][0] if each.arrays[kind].ndim == 3 else each.arrays[kind] for each in (a, b))
        assert np.nanmax(difference(ours, theirs)) < 1e-5, kind


def test_what_is_changed_in_place_between_two_layers_is_seen(tmp_path):
    class InPlace(Net):
        def block(self, x):
            return self.last(self.first(x).mul_(3))

    torch.manual_seed(0)
    train(tmp_path, InPlace(), steps=1)
    found = run_records.read(tmp_path, 1)
    said, heard = found.arrays["output"][0, 0], found.arrays["input"][0, found.layers.index("net.last")]
    assert heard == pytest.approx(3 * said, rel=1e-5)


def test_steps_that_are_recorded_and_those_of_before_a_restart(tmp_path):
    assert train(tmp_path, net_of(), steps=7, every=3) == [1, 3, 6]
    meter, _, state = make(tmp_path, net_of())
    meter.close()
    assert run_records.steps_in(tmp_path) == []    # a run begun anew
    assert train(tmp_path, net_of(), steps=2) == [1, 2]


def test_without_the_flag_nothing_is_hooked_and_with_it_nothing_changes(tmp_path):
    net = net_of()
    assert layer_statistics.record(SimpleNamespace(layer_statistics=None), {"net": net}, None) is None
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())
    train(tmp_path, net, steps=3)
    bare = net_of()
    optimizer = torch.optim.SGD(bare.parameters(), lr=0.1)
    draw = torch.Generator().manual_seed(5)
    for _ in range(3):
        bare(torch.randn(3, 4, generator=draw), scale={"by": torch.tensor(2.0)})["sample"].square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(torch.equal(*pair) for pair in zip(net.parameters(), bare.parameters(), strict=True))


def test_reading_takes_no_torch():
    code = ("import sys; sys.path.insert(0, '.'); import library.validation.compare_runs; "
            "sys.exit('torch' in sys.modules)")
    assert subprocess.run([sys.executable, "-c", code], cwd=TOOL.parents[1]).returncode == 0


@pytest.mark.parametrize("script", sorted(path.name for path in TOOL.parents[1].glob("train_*.py")))
def test_every_training_script_can_record(script):
    text = (TOOL.parents[1] / script).read_text()
    assert "layers.record(args, networks, batches)" in text.partition("meter.Meter(")[2].partition("\n\n")[0]
