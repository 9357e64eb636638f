"""What each layer says and hears in an optimizer step, for tools/compare_runs.py: --layer_statistics.

Of every call of every module: input, output, and gradient of the output; of its weights: value and gradient; of every
batch: samples, checksums. Each tensor becomes 20 numbers in float32: norm, mean, standard deviation, largest absolute value,
and a sketch of 16 sums with fixed random signs (Charikar, Chen, Farach-Colton, "Finding frequent items in data streams",
2002). The difference of two runs' sketches has, on average, the norm of the difference of their tensors: so they are
compared value by value, and no value is kept.

Nothing is hooked without the flag. In a step that is not recorded no number is made; in one that is, they stay on the device
until the step is done.
"""

import functools
import hashlib
import inspect
import json
import math
import os
import weakref
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch

from library.data.cache import write_whole
from library.training import processes, run_records
from library.training.accelerator import public, versions
from library.training.run_records import ABSENT, FOLDER, FORMAT, SKETCH, WIDTH, Record

_COLUMNS, _ROWS, _SUMS = 1024, 1 << 16, SKETCH.stop - SKETCH.start
_CALLS = ("input", "output", "output_gradient")


def record(args, networks: dict[str, torch.nn.Module], loader) -> "Recorder | None":
    """What a `Meter` is given: None without --layer_statistics.

    networks: by the name of their part, not wrapped. loader: a data.loader.Loader, which knows the samples of each step.
    """
    return Recorder(args, networks, loader) if args.layer_statistics else None


@functools.cache
def _signs(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(+-1 [rows, 1], +-1 [columns]), the same on every device."""
    drawn = np.random.Generator(np.random.Philox(key=[1, 2])).integers(0, 2, _ROWS + _COLUMNS, dtype=np.int8)
    signs = torch.from_numpy(2.0 * drawn - 1).float().to(device)
    return signs[:_ROWS, None], signs[_ROWS:]


@torch.no_grad()
def statistics(tensor: torch.Tensor) -> torch.Tensor | None:
    """A tensor -> [20] float32 on its device, see run_records; None where it has no value."""
    if not tensor.numel():
        return None
    with torch.autocast(tensor.device.type, enabled=False):
        flat = tensor.detach().float().flatten()
        rows, columns = _signs(flat.device)
        wide = torch.nn.functional.pad(flat, (0, -len(flat) % _COLUMNS)).view(-1, _COLUMNS)
        # products and sums, no matrix product: that is of fewer bits on some devices
        sums = sum((part * rows[:len(part)]).sum(0) for part in wide.split(_ROWS))
        std, mean = torch.std_mean(flat, correction=0)
        first = torch.stack([torch.linalg.vector_norm(flat), mean, std, torch.linalg.vector_norm(flat, torch.inf)])
        return torch.cat([first, (sums * columns).view(-1, _SUMS).sum(0)])


def together(rows: np.ndarray, counts: list[int]) -> np.ndarray:
    """Statistics [n, 20] of n tensors with so many values -> [20], as if they were one."""
    share = np.array(counts, np.float64) / sum(counts)
    norm, mean, std, most = rows[:, :4].astype(np.float64).T
    middle = (share * mean).sum()
    spread = np.sqrt((share * (std ** 2 + (mean - middle) ** 2)).sum())
    # a shifted sketch has other signs at each place, so that two tensors do not add up in it
    sketch = sum(np.roll(row[SKETCH], number) for number, row in enumerate(rows))
    return np.concatenate([[np.sqrt((norm ** 2).sum()), middle, spread, most.max()], sketch]).astype(np.float32)


def _tensors(value) -> list[torch.Tensor]:
    """Every tensor in what a module takes or returns."""
    if isinstance(value, torch.Tensor):
        return [value]
    values = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [tensor for each in values for tensor in _tensors(each)]


def _named(values: dict, prefix: str) -> list[tuple[str, torch.Tensor]]:
    """Tensors among named values, and in dictionaries among them, by their whole name."""
    found = [(f"{prefix}.{name}", value) for name, value in values.items()]
    return [pair for name, value in found for pair in (
        _named(value, name) if isinstance(value, dict) else [(name, value)] if isinstance(value, torch.Tensor) else [])]


def _values(parameter: torch.Tensor) -> torch.Tensor:
    """A parameter's values: of a sharded one all of them (every process takes part), of a quantised one what it stands for."""
    parameter = parameter.detach()
    if hasattr(parameter, "full_tensor"):
        return parameter.full_tensor()
    plain = type(parameter) in (torch.Tensor, torch.nn.Parameter) or not hasattr(parameter, "__tensor_flatten__")
    return parameter if plain else parameter.dequantize()


def checksum(tensor: torch.Tensor) -> int:
    """64 bits of a hash of the values as they lie in memory."""
    raw = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "little", signed=True)


class Recorder:
    """Records step 1 and every N-th; a `Meter` says when a micro step begins and a step is done."""

    def __init__(self, args, networks: dict[str, torch.nn.Module], loader):
        self.args, self.every, self.networks, self.loader = args, args.layer_statistics, networks, loader
        self.names = {module: f"{part}.{name}".rstrip(".") for part, network in networks.items()
                      for name, module in network.named_modules()}
        self._own = {name: own for module, name in self.names.items() if (own := list(module.parameters(recurse=False)))}
        self._on = self._inside = False
        self._micro, self._called, self._seen = 0, defaultdict(int), {}
        self._forget()

    def start(self, output_dir: Path, state, device: str) -> None:
        """Hook the networks, and write down what the run is. Records of steps after `state.step` are of before a restart."""
        self.state, self.folder = state, output_dir / FOLDER
        for module in self.names:
            module.register_forward_hook(self._after_call, with_kwargs=True)
        for network in self.networks.values():    # the hook that ends a network's own call comes behind those
            network.register_forward_pre_hook(self._enter, with_kwargs=True)
            network.register_forward_hook(self._leave, always_call=True)
        optimizer = getattr(state.optimizer, "optimizer", state.optimizer)    # without accelerate's wrapper
        optimizer.register_step_pre_hook(self._before_update)
        if not processes.is_main():
            return
        self.folder.mkdir(exist_ok=True)
        for step in run_records.steps_in(output_dir):
            if step > state.step:
                (self.folder / run_records.name_of(step)).unlink()
        run = {"format": FORMAT, "flags": public(self.args), "versions": versions(torch.device(device)),
               "processes": self.loader.world, "accumulation": self.loader.accumulation, "threads": torch.get_num_threads(),
               "mixed_precision": self.args.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")}
        write_whole(self.folder / "run.json", json.dumps(run, indent=1, default=str).encode())

    def _forget(self) -> None:
        self._calls: list[dict[str, dict[str, torch.Tensor]]] = []    # of each micro step: {call: {kind: statistics}}
        self._loaded, self._given, self._samples, self._losses, self._weights, self._norm = [], [], [], [], {}, None

    def begin(self, batch: dict[str, torch.Tensor]) -> None:
        """A micro step begins. batch: as the loader made it."""
        step = self.state.step + 1
        self._on = step == 1 or step % self.every == 0
        if not self._on:
            return
        self._calls.append(defaultdict(dict))
        self._given.append(defaultdict(dict))
        self._called.clear()
        self._seen.clear()
        self._loaded.append({name: (checksum(values), {"loaded": self._of([values])}) for name, values in batch.items()})
        table, (rows, visits, _) = self.loader.table, self.loader.samples(step - 1, self._micro)
        self._samples.append([[str(table.name[row]), table.content[row].decode(), int(visit)]
                              for row, visit in zip(rows, visits, strict=True)])
        if not self._micro:
            self._scale = self.state.scaler.get_scale() if self.state.scaler else 1.0    # of fp16's loss
            self._weights = {name: {"weight": self._of(map(_values, own))} for name, own in self._own.items()}
        self._micro += 1

    def add(self, loss: torch.Tensor) -> None:
        """A micro step is done, backward pass included."""
        if self._on:
            self._losses.append(loss.detach())
        self._on = False

    def add_norm(self, norm) -> None:
        """The gradient's norm, before it was clipped."""
        self._norm = norm

    def _enter(self, network, args, kwargs) -> None:
        # Calls are recorded inside a network's own call alone, so that gradient checkpointing, which calls blocks once
        # more in the backward pass, counts once; and one without gradients is not the one that is trained.
        self._inside = self._on and torch.is_grad_enabled()
        if self._inside:
            names = list(inspect.signature(type(network).forward).parameters)[1:]    # without self
            for name, tensor in _named(dict(zip(names, args, strict=False)) | kwargs, self.names[network]):
                self._given[-1][name]["given"] = self._of([tensor])

    def _leave(self, network, args, output) -> None:
        self._inside = False

    def _after_call(self, module, args, kwargs, output) -> None:
        if not self._inside:
            return
        self._called[module] += 1
        name = self.names[module] + (f"#{self._called[module]}" if self._called[module] > 1 else "")
        call, given = self._calls[-1][name], _tensors(output)
        call["input"], call["output"] = self._of(_tensors(args) + _tensors(kwargs)), self._of(given)
        gradients = call["output_gradient"] = {}    # of each tensor that it returns, as the backward pass comes by
        for number, tensor in enumerate(given):
            if tensor.requires_grad:
                tensor.register_hook(functools.partial(_keep, gradients, number))

    def _of(self, tensors) -> dict[int, tuple[torch.Tensor, int]]:
        """{number: (statistics, how many values)}; of a tensor that one layer returns and the next takes, made once."""
        found = {}
        for number, tensor in enumerate(tensors):
            known, version, row = self._seen.get(id(tensor), (lambda: None, None, None))
            if known() is not tensor or version != tensor._version:
                row = statistics(tensor)
                self._seen[id(tensor)] = weakref.ref(tensor), tensor._version, row
            if row is not None:
                found[number] = row, tensor.numel()
        return found

    def _before_update(self, optimizer, args, kwargs) -> None:
        for name, own in self._own.items() if self._weights else ():
            self._weights[name]["weight_gradient"] = self._of(_values(p.grad) for p in own if p.grad is not None)

    def end_step(self, step: int) -> None:
        """Optimizer step number `step` (from 1) is done: every process sends what it has, and the main one writes."""
        self._micro = 0
        if not self._calls:
            return
        scale = self.loader.accumulation / self._scale
        mine = [{"samples": self._samples[micro], "loss": self._losses[micro].item(),
                 "checksum": {name: value for name, (value, _) in loaded.items()},
                 "loaded": _to_host({name: value for name, (_, value) in loaded.items()}, 1.0, ("loaded",)),
                 "given": _to_host(given, 1.0, ("given",)), "calls": _to_host(calls, scale, _CALLS)}
                for micro, (loaded, given, calls) in enumerate(zip(self._loaded, self._given, self._calls, strict=True))]
        everyone = processes.gather([mine])
        norm = math.nan if self._norm is None else float(self._norm)
        if processes.is_main():
            limit = self.args.max_grad_norm
            clipped = (norm + 1e-6) / limit if limit and norm > limit else 1.0    # torch's own rule, undone
            weights = _to_host(self._weights, clipped, ("weight", "weight_gradient"))
            done = _assemble(step, [turn for micro in zip(*everyone, strict=True) for turn in micro], weights, norm)
            write_whole(self.folder / run_records.name_of(step), run_records.encode(done))
        self._forget()


def _keep(gradients: dict, number: int, gradient: torch.Tensor) -> None:
    gradients[number] = statistics(gradient), gradient.numel()


def _to_host(found: dict[str, dict[str, dict]], gradients: float, kinds: tuple) -> dict[str, dict[str, np.ndarray]]:
    """{name: {kind: [20]}}, by one transfer from the device. gradients: what those that are gradients are multiplied by."""
    parts = [row for of in found.values() for kind in kinds for _, (row, _) in sorted(of.get(kind, {}).items())]
    rows = iter(torch.stack(parts).cpu().numpy() if parts else ())
    kept = {name: {} for name in found}
    for name, of in found.items():
        for kind in kinds:
            if each := sorted(of.get(kind, {}).items()):
                value = together(np.stack([next(rows) for _ in each]), [count for _, (_, count) in each])
                kept[name][kind] = value * np.float32(gradients) if kind.endswith("gradient") else value
    return kept


def _assemble(step: int, positions: list[dict], weights: dict[str, dict[str, np.ndarray]], norm: float) -> Record:
    names = {what: [*dict.fromkeys(name for each in positions for name in each[what])] for what in ("calls", "loaded", "given")}
    absent = np.full(WIDTH, ABSENT, np.float32)

    def table(rows: list[dict], names: list[str], kind: str) -> np.ndarray:
        values = [each.get(name, {}).get(kind, absent) for each in rows for name in names]
        return np.array(values, np.float32).reshape(len(rows), len(names), WIDTH)

    arrays = {kind: table([each[what] for each in positions], names[what], kind)
              for what, kinds in (("calls", _CALLS), ("loaded", ("loaded",)), ("given", ("given",))) for kind in kinds}
    arrays |= {kind: table([weights], list(weights), kind)[0] for kind in ("weight", "weight_gradient")}
    sums = [[each["checksum"].get(name, 0) for name in names["loaded"]] for each in positions]
    arrays |= {"checksum": np.array(sums, np.int64), "loss": np.array([each["loss"] for each in positions], np.float64),
               "grad_norm": np.array([norm])}
    return Record(step, names["calls"], list(weights), names["loaded"], names["given"],
                  [each["samples"] for each in positions], arrays)
