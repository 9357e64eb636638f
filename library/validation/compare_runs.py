"""Two runs side by side: from which step on they differ, and where in the step that begins.

Order, noise and timesteps are functions of the seed, so that the same run on two devices may be compared step by step.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from library.errors import UserError
from library.training import run_records
from library.validation.report import read_metrics
from library.validation.run_differences import GRADIENTS, LOSS, RTOL, Finding, Step, Tolerance, inspect, relative

# Of flags that say where things lie and what is told, not what is computed
PLACES = {"output_dir", "output_name", "logging_dir", "logging_steps", "report_to", "tracker_project_name", "embedding_cache_dir",
          "cache_dir", "config_file", "local_rank", "layer_statistics", "resume_from_checkpoint", "hub_model_id",
          "checkpointing_steps", "checkpoints_total_limit"}


@dataclass(frozen=True)
class Run:
    """What a run left: columns of its log, numbers of the recorded steps, flags, and what run.json says of it."""

    folder: Path
    metrics: dict[str, np.ndarray]
    recorded: list[int]
    flags: dict
    about: dict

    @property
    def precision(self) -> str:
        return self.about.get("mixed_precision") or self.flags.get("mixed_precision") or "no"

    @property
    def description(self) -> str:
        versions = self.about.get("versions", {})
        parts = [versions.get("device"), f"torch {versions['torch']}" if "torch" in versions else None,
                 f"{self.about['processes']} x {self.about['accumulation']} micro steps" if "processes" in self.about else None,
                 {"no": "float32"}.get(self.precision, self.precision)]
        return ", ".join(part for part in parts if part)


@dataclass
class Comparison:
    """steps [n]; loss, grad_norm [2, n]: means since the common step before. apart: relative differences of each kind, [names of
    that kind, recorded steps], NaN where there is nothing to compare. findings: of the first step that has any, as one follows
    from the other. first: the first step that is out of tolerance, or None."""

    tolerance: Tolerance
    steps: np.ndarray
    loss: np.ndarray
    grad_norm: np.ndarray
    flags: dict[str, tuple]
    notes: list[str] = field(default_factory=list)
    recorded: list[int] = field(default_factory=list)
    names: dict[str, list[str]] = field(default_factory=dict)
    apart: dict[str, np.ndarray] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    first: int | None = None


def open_run(folder: Path) -> Run:
    """Raises `UserError` for a folder that no training script wrote."""
    if not (folder / "metrics.jsonl").is_file():
        why = "has no metrics.jsonl: give the --output_dir of a run" if folder.is_dir() else "is no folder"
        raise UserError(f"{folder} {why}")
    about = {}
    manifests = sorted(folder.glob("checkpoint-*/manifest.json"), key=lambda path: path.stat().st_mtime)
    for path in (*manifests[-1:], folder / run_records.FOLDER / "run.json"):
        try:
            about |= json.loads(path.read_text()) if path.exists() else {}
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"{path} cannot be read: {error}") from None
    return Run(folder, read_metrics(folder / "metrics.jsonl"), run_records.steps_in(folder), about.get("flags", {}), about)


def tolerance_of(a: Run, b: Run, rtol: float | None, atol: float) -> Tolerance:
    """rtol: of layers and loss; where it is None, that of the coarser precision of the two."""
    precision = max(a.precision, b.precision, key=lambda name: RTOL.get(name, 0))
    if precision not in RTOL:
        raise UserError(f"{a.folder}, {b.folder}: the precision {precision} is not known; known are {', '.join(RTOL)}")
    layers, loss = (RTOL[precision], LOSS[precision]) if rtol is None else (rtol, rtol)
    # embeddings are of the run's precision: alike in both runs, unless their precisions differ
    exact = layers if precision == "no" or a.precision != b.precision else RTOL["no"]
    return Tolerance(precision, layers, loss, exact, atol)


def flags_apart(a: dict, b: dict) -> dict[str, tuple]:
    """Flags of both runs that change what is computed and differ, with both values."""
    return {name: (a[name], b[name]) for name in a if name in b and a[name] != b[name] and name not in PLACES}


def curves(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Steps [n] at which both logs have a line, and the loss and gradient norm [2, n] of each: means since the one before."""
    common = np.intersect1d(a["step"], b["step"])
    found = {"loss": np.empty((2, len(common))), "grad_norm": np.empty((2, len(common)))}
    for row, metrics in enumerate((a, b) if len(common) else ()):
        inside = metrics["step"] <= common[-1]
        starts = np.searchsorted(metrics["step"], np.append(0, common[:-1]), side="right")
        length = np.diff(metrics["step"], prepend=0)[inside].astype(np.float64)
        for name, values in found.items():
            values[row] = np.add.reduceat(metrics[name][inside] * length, starts) / np.add.reduceat(length, starts)
    return common, found


def compare(a: Run, b: Run, tolerance: Tolerance) -> Comparison:
    """Raises `UserError` where the runs have no step in common, or a record cannot be read."""
    steps, seen = curves(a.metrics, b.metrics)
    recorded = sorted(set(a.recorded) & set(b.recorded))
    if not len(steps) and not recorded:
        raise UserError(f"{a.folder} and {b.folder} have no logged step in common: train both with the same --logging_steps")
    done = Comparison(tolerance, steps, seen["loss"], seen["grad_norm"], flags_apart(a.flags, b.flags), recorded=recorded)
    done.notes = _notes(a, b, recorded)
    start, columns = None, []
    for number in recorded:
        step = Step(run_records.read(a.folder, number), run_records.read(b.folder, number))
        start = start or step
        findings, apart = inspect(step, start, tolerance)
        columns.append({kind: dict(zip(step.names(kind), values, strict=True)) for kind, values in apart.items()})
        if findings and not done.findings:
            done.findings = findings
        if step is start:
            done.notes += _notes_on_records(step)
    for kind in columns[0] if columns else ():
        done.names[kind] = names = list(dict.fromkeys(name for column in columns for name in column[kind]))
        done.apart[kind] = np.array([[column[kind].get(name, np.nan) for column in columns] for name in names],
                                    np.float64).reshape(len(names), len(columns))
    out = ~(relative(*done.loss) <= tolerance.loss) | ~(relative(*done.grad_norm) <= GRADIENTS * tolerance.loss)
    firsts = [*steps[out][:1].tolist(), *(finding.step for finding in done.findings[:1])]
    done.first = min(firsts, default=None)
    return done


def _notes(a: Run, b: Run, recorded: list[int]) -> list[str]:
    notes, ends = [], [int(run.metrics["step"][-1]) if len(run.metrics["step"]) else 0 for run in (a, b)]
    if ends[0] != ends[1]:
        notes.append(f"A has {ends[0]} steps and B {ends[1]}: the first {min(ends)} are compared")
    for name, run in (("A", a), ("B", b)):
        if not run.flags:
            notes.append(f"{name} has no checkpoint: its flags are not known")
        if not run.recorded:
            notes.append(f"{name} has no layer statistics")
    if a.recorded and b.recorded and not recorded:
        notes.append("no step has layer statistics of both: train both with the same --layer_statistics")
    if a.precision != b.precision:
        notes.append(f"A is in {a.precision}, B in {b.precision}")
    return notes


def _notes_on_records(step: Step) -> list[str]:
    notes = []
    for what in ("layers", "modules"):
        names = [getattr(record, what) for record in (step.a, step.b)]
        for name, ours, theirs in (("A", *names), ("B", *names[::-1])):
            if alone := [each for each in ours if each not in set(theirs)]:
                notes.append(f"{len(alone)} {what} are in {name} alone and not compared, the first is {alone[0]}")
    if not step.alike:
        notes.append("the runs deal a step in other portions: layers are compared by their norms over the whole step alone; "
                     "the same --train_batch_size makes the comparison sharper")
    elif step.a.loaded == step.b.loaded:
        other = np.flatnonzero((step.a.arrays["checksum"] != step.b.arrays["checksum"]).any(0))
        if len(other):
            notes.append(f"not bit for bit the same was loaded: {', '.join(step.a.loaded[n] for n in other)}. Another device "
                         "encoded it, or other files; one --embedding_cache_dir for both runs makes it the same")
    return notes


def headline(done: Comparison) -> str:
    """The outcome in a sentence or two."""
    if done.first is None:
        steps = len(done.steps) or len(done.recorded)
        most = "no loss is logged"
        if len(done.steps):
            most = f"losses differ by at most {relative(*done.loss).max():.1e} (allowed {done.tolerance.loss:.0e})"
        layers = done.apart.get("output", np.empty(0))
        if layers.size:
            most += f", outputs of {len(layers)} layers by at most {np.nanmax(layers):.1e} (allowed {done.tolerance.rtol:.0e})"
        return f"EQUAL within tolerance: {steps} steps; {most}"
    if not done.findings or done.findings[0].step > done.first:
        row = np.searchsorted(done.steps, done.first)
        loss, norm = done.loss[:, row], done.grad_norm[:, row]
        seen = f"loss {loss[0]:.7g} | {loss[1]:.7g}, gradient norm {norm[0]:.6g} | {norm[1]:.6g}"
        before = [step for step in done.recorded if step <= done.first]
        more = (f"the layers of step {before[-1]} agree" if before else "which layer begins it is not recorded")
        return f"DIFFER from step {done.first}: {seen}; {more}. --layer_statistics 1 in both runs shows what begins it"
    return f"DIFFER from step {done.first}: {explain(done)}{_before(done)}"


def _before(done: Comparison) -> str:
    """What the first finding's difference was in the recorded step before."""
    found = done.findings[0]
    kind = {"forward": "output", "backward": "output_gradient"}.get(found.stage, found.stage)
    column = done.recorded.index(found.step) - 1
    if column < 0 or found.place not in done.names.get(kind, ()):
        return ""
    value = done.apart[kind][done.names[kind].index(found.place), column]
    grown = ", so that it grows as rounding does" if 0 < value and found.difference < 3 * value else ""
    earlier = done.recorded[column]
    return f". In step {earlier} it was {value:.0e}{grown}" if value else f". In step {earlier} there was none"


def _agrees(difference: float) -> str:
    return f"agrees to {difference:.0e}" if difference else "is the same"


def explain(done: Comparison) -> str:
    """What begins it at the first step that has findings, in words."""
    found, alike = done.findings[0], [each for each in done.findings if each.stage == done.findings[0].stage]
    apart = f"{found.difference:.1e} (allowed {found.tolerance:.0e})"
    if found.stage in ("samples", "loaded"):
        what = f"{found.place}: {found.text}" if found.text else ", ".join(f"{each.place} by {each.difference:.1e}"
                                                                           for each in alike)
        which = "other samples are trained on" if found.stage == "samples" else "the same samples, but other values of them"
        return f"data, not arithmetic: {which}: {what}"
    if found.stage == "given":
        return (f"{found.place} differs by {apart} before any layer, though the same was loaded: look at the loss function, the "
                "noise schedule, or what encodes prompts")
    if found.stage == "weight":
        many = f"{found.place}" + (f" and {len(alike) - 1} more" if len(alike) > 1 else "")
        earlier = [step for step in done.recorded if step < found.step]
        return f"the weights of {many} differ by {apart} before the step: " + (
            f"the update made since step {earlier[-1]}, whose layers and gradients agree: look at the optimizer" if earlier
            else "another base model, or a fault in loading it")
    if found.stage == "forward":
        heard = f"its input {_agrees(found.before)}, its output differs by {apart}"
        if found.before > found.tolerance:
            heard = f"its output differs by {apart}, and its input is out of tolerance, too ({found.before:.1e})"
        elif found.difference < 3 * found.before:
            heard += ". No layer stands out, so this is rounding that adds up rather than a fault"
        return f"forward pass, {found.place}: {heard}"
    if found.stage == "loss":
        return f"the loss, {found.norms[0]:.7g} | {found.norms[1]:.7g}, though every layer agrees: look at the loss function"
    if found.stage == "backward":
        later = f"; that of the layer behind it {_agrees(found.before)}" if found.before == found.before else ""
        return f"backward pass, the gradient that reaches {found.place} differs by {apart}{later}; the forward pass agrees"
    return (f"the gradient of the weights of {found.place} differs by {apart}, though all layers' gradients agree: its own "
            "backward pass, or what is done to gradients between processes")
