"""How far apart two runs' statistics of an optimizer step are, and where it begins.

The places of a step are looked at in the order in which one follows from the other: samples, what was loaded of them, what the
networks are given, weights, each layer as it ends in the forward pass, loss, gradients from the last layer back, weights'
gradients. The first that is out of tolerance is where a fault lies; what comes behind it follows from it.
"""

from dataclasses import dataclass

import numpy as np

from library.training.run_records import ABSENT, MEAN, NORM, SKETCH, STD, Record

# Largest relative difference of what layers return, by the coarser precision of the two runs, and of the loss
RTOL, LOSS = {"no": 1e-4, "fp16": 3e-2, "bf16": 2e-1}, {"no": 1e-4, "fp16": 1e-2, "bf16": 2e-2}
GRADIENTS = 4    # times as much for gradients
# Weights: so much at the start, where they are read from files; later this share of the way that they have come, too: Adam
# moves a weight whose gradient is all rounding as far as any other
START, SHARE = 1e-5, {"no": 0.05, "fp16": 1.0, "bf16": 1.0}


@dataclass(frozen=True)
class Tolerance:
    """Two tensors agree where |a - b| <= atol + rtol |a|, in root mean squares over the tensor.

    rtol is of layers' outputs, loss of the loss, exact of what the loader makes. precision: no, fp16 or bf16.
    """

    precision: str
    rtol: float
    loss: float
    exact: float
    atol: float = 0.0


@dataclass(frozen=True)
class Finding:
    """A place out of tolerance. before: the difference of what it was made from, NaN where there is none; norms: in A and B."""

    step: int
    stage: str    # samples, loaded, given, weight, forward, loss, backward, weight_gradient
    place: str
    difference: float
    tolerance: float
    before: float = np.nan
    norms: tuple[float, float] = (np.nan, np.nan)
    text: str = ""


def relative(a, b) -> np.ndarray:
    """|a - b| over the larger of both; 0 for two that are alike not finite, infinite where only one is."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    with np.errstate(all="ignore"):
        larger = np.maximum(abs(a), abs(b))
        apart = np.where(larger > 0, abs(a - b) / larger, 0.0)
    alike = (a == b) | np.isnan(a) & np.isnan(b)
    return np.where(np.isfinite(a) & np.isfinite(b), apart, np.where(alike, 0.0, np.inf))


def difference(a: np.ndarray, b: np.ndarray, sketch: bool = True) -> np.ndarray:
    """Statistics [..., 20] of two runs -> the norm of the tensors' difference over the larger norm, as the sketches estimate it.

    NaN where one has no such tensor. sketch: False compares norms alone, which never says too much.
    """
    a, b = a.astype(np.float64), b.astype(np.float64)
    apart = relative(a[..., NORM], b[..., NORM])
    if sketch:
        with np.errstate(all="ignore"):
            estimate = np.linalg.norm(a[..., SKETCH] - b[..., SKETCH], axis=-1) / np.maximum(a[..., NORM], b[..., NORM])
        apart = np.fmax(apart, np.where(np.isfinite(apart), estimate, 0.0))    # fmax: of two zeros, 0 / 0 is no number
    return np.where((a[..., NORM] == ABSENT) | (b[..., NORM] == ABSENT), np.nan, apart)


def allowed(a: np.ndarray, b: np.ndarray, rtol: float, atol: float) -> np.ndarray:
    """The largest `difference` that is within tolerance."""
    with np.errstate(all="ignore"):
        size = np.maximum(*(np.hypot(each[..., MEAN].astype(np.float64), each[..., STD]) for each in (a, b)))
        return rtol + np.where(size > 0, atol / size, 0.0)


def merged(record: Record, kind: str) -> np.ndarray:
    """Statistics of each name over all positions [1, L, 20], without sketches: of runs that deal a step in other portions."""
    values = record.arrays[kind].astype(np.float64)
    share = np.array([len(position) for position in record.samples], np.float64)[:, None]
    there = values[..., NORM] != ABSENT
    if kind == "output_gradient":    # of the mean over a position's samples, and now of their sum
        values = np.where(there[..., None], values * share[..., None], values)
    found = np.zeros((1, *values.shape[1:]))
    with np.errstate(all="ignore"):
        share = np.where(there, share, 0) / np.where(there, share, 0).sum(0)
        found[0, :, MEAN] = mean = (share * values[..., MEAN]).sum(0)
        found[0, :, STD] = np.sqrt((share * (values[..., STD] ** 2 + (values[..., MEAN] - mean) ** 2)).sum(0))
    norm = np.sqrt(np.where(there, values[..., NORM] ** 2, 0).sum(0))
    found[0, :, NORM] = np.where(there.any(0), norm, ABSENT)
    return found


class Step:
    """One step of both runs: the names that both have, in A's order."""

    KINDS = {"loaded": "loaded", "given": "given", "weight": "modules", "weight_gradient": "modules"}    # the others: layers

    def __init__(self, a: Record, b: Record):
        self.a, self.b, self.number = a, b, a.step
        self.alike = [len(position) for position in a.samples] == [len(position) for position in b.samples]

    def names(self, kind: str) -> list[str]:
        of = self.KINDS.get(kind, "layers")
        theirs = set(getattr(self.b, of))
        return [name for name in getattr(self.a, of) if name in theirs]

    def pair(self, kind: str) -> list[np.ndarray]:
        """Statistics of both [P, L, 20], or [M, 20] of weights."""
        of, names = self.KINDS.get(kind, "layers"), self.names(kind)
        whole = self.alike or of == "modules"
        return [_pick(each.arrays[kind] if whole else merged(each, kind), getattr(each, of), names) for each in (self.a, self.b)]

    def apart(self, kind: str, rtol: float, atol: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(difference [L], what is allowed [L], norms [2, L]) at the position that is furthest out."""
        a, b = self.pair(kind)
        found, limit = difference(a, b, self.alike or a.ndim == 2), allowed(a, b, rtol, atol)
        values = np.stack([found, limit, a[..., NORM], b[..., NORM]])
        if a.ndim == 3:
            worst = np.argmax(np.where(np.isnan(found), -np.inf, found - limit), axis=0)
            values = np.take_along_axis(values, worst[None, None], axis=1)[:, 0]
        return values[0], values[1], values[2:]


def _pick(values: np.ndarray, names: list[str], wanted: list[str]) -> np.ndarray:
    place = {name: number for number, name in enumerate(names)}
    return values[..., [place[name] for name in wanted], :]


def weights_apart(step: Step, start: Step, tolerance: Tolerance) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(difference of modules' weights [M], what is allowed [M], norms [2, M]). start: the first step that both recorded."""
    a, b = step.pair("weight")
    names = step.names("weight")
    then = [_pick(each.arrays["weight"], each.modules, names) for each in (start.a, start.b)]
    with np.errstate(all="ignore"):
        way = np.maximum(*(np.linalg.norm((now - old.astype(np.float64))[..., SKETCH], axis=-1)
                           for now, old in zip((a, b), then, strict=True)))
        share = np.where(a[..., NORM] > 0, way / np.maximum(a[..., NORM], b[..., NORM]), 0.0)
        share = np.maximum(share, np.median(share)) if len(share) else share
    limit = allowed(a, b, START, tolerance.atol) + SHARE[tolerance.precision] * share
    return difference(a, b), limit, np.stack([a[..., NORM], b[..., NORM]])


def _samples(record: Record) -> list[tuple[str, str, int]]:
    """(content or name, name, visit) of each sample of a step, in order."""
    return [(content or name, name, visit) for position in record.samples for name, content, visit in position]


def other_samples(step: Step) -> list[Finding]:
    """The first sample that is another one."""
    ours, theirs = _samples(step.a), _samples(step.b)
    for number in range(max(len(ours), len(theirs))):
        one, other = (each[number] if number < len(each) else ("", "none", 0) for each in (ours, theirs))
        if (one[0], one[2]) != (other[0], other[2]):
            text = " in A, ".join(f"{name} (visit {visit})" for _, name, visit in (one, other)) + " in B"
            return [Finding(step.number, "samples", f"sample {number + 1} of {len(ours)}", np.inf, 0.0, text=text)]
    return []


def inspect(step: Step, start: Step, tolerance: Tolerance) -> tuple[list[Finding], dict[str, np.ndarray]]:
    """What is out of tolerance in a step, one following from the other; and all differences, by kind."""
    found, apart, (rtol, atol) = other_samples(step), {}, (tolerance.rtol, tolerance.atol)

    def add(stage: str, kind: str, values: tuple, before=None, order=slice(None)) -> None:
        apart[kind], limit, norms = values
        names = step.names(kind)
        found.extend(Finding(step.number, stage, names[n], float(apart[kind][n]), float(limit[n]),
                             np.nan if before is None else float(before[n]), tuple(map(float, norms[:, n])))
                     for n in np.arange(len(names))[order] if apart[kind][n] > limit[n])

    add("loaded", "loaded", step.apart("loaded", tolerance.exact, atol))
    # prompts that are encoded as they come are made in the run's precision
    add("given", "given", step.apart("given", tolerance.exact if "prompt_embeds" in step.names("loaded") else rtol, atol))
    add("weight", "weight", weights_apart(step, start, tolerance))
    heard, said = (step.apart(kind, rtol, atol) for kind in ("input", "output"))
    sound = ~(heard[0] > heard[1])
    blamed = sound & (said[0] > said[1])
    # of a layer whose input is out of tolerance nothing can be said, nor of one that contains a layer that is named
    names = [name for name, named in zip(step.names("output"), blamed, strict=True) if named]
    holds = [any(each.startswith(f"{name}.") for each in names) for name in step.names("output")]
    add("forward", "output", (np.where(blamed & ~np.array(holds, bool) if names else True, said[0], np.nan), *said[1:]), heard[0])
    apart["input"], apart["output"] = heard[0], said[0]
    losses = [float(each.arrays["loss"].mean()) for each in (step.a, step.b)]
    if not relative(*losses) <= tolerance.loss:
        found.append(Finding(step.number, "loss", "loss", float(relative(*losses)), tolerance.loss, norms=tuple(losses)))
    back = step.apart("output_gradient", GRADIENTS * rtol, atol)
    after = np.append(back[0][1:], np.nan)    # of the layer that comes after, where the gradient comes from
    add("backward", "output_gradient", back, after, slice(None, None, -1))
    add("weight_gradient", "weight_gradient", step.apart("weight_gradient", GRADIENTS * rtol, atol))
    return found, apart
