"""Two runs step by step: do they compute the same, and if not, from which step and which layer on?

    python tools/compare_runs.py out/cpu out/npu --plot difference.png

A and B are output folders of training runs with the same flags and seed, on different devices, versions or numbers of
processes. Losses and gradient norms are compared as they were logged (--logging_steps 1 is best); with --layer_statistics 1 in
both runs, so is what every layer computes. Exit status: 0 equal within tolerance, 1 different, 2 a mistake.
"""

import argparse
import csv
import io
import json
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library import errors
from library.parser import NOT_NEGATIVE


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    group = parser.add_argument_group("runs")
    group.add_argument("a", metavar="A", type=Path, help="output folder of a run")
    group.add_argument("b", metavar="B", type=Path, help="output folder of another")
    group = parser.add_argument_group("comparison")
    group.add_argument("--rtol", type=NOT_NEGATIVE, metavar="R",
                       help="relative difference allowed, of layers and of the loss (default: 1e-4 and 1e-4 in float32, "
                            "3e-2 and 1e-2 in fp16, 2e-1 and 2e-2 in bf16; gradients: 4 times as much)")
    group.add_argument("--atol", type=NOT_NEGATIVE, default=0.0, metavar="R",
                       help="and beside it this much, as a root mean square over a tensor (default: 0)")
    group = parser.add_argument_group("output")
    group.add_argument("--plot", type=Path, metavar="FILE", help="differences over the steps and layers, a .png")
    group.add_argument("--csv", type=Path, metavar="FILE", help="every difference, a line each")
    group.add_argument("--json", type=Path, metavar="FILE", help="the outcome and every difference")
    group.add_argument("--rows", type=int, default=8, metavar="N", help="rows of the table (default: 8)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    ARGS = parse_args()    # before NumPy: --help and mistakes are answered at once

import numpy as np

from library.validation import compare_runs
from library.validation.run_differences import GRADIENTS, relative

STAGES = {"samples": "sample", "loaded": "loaded", "given": "network input", "weight": "weight", "forward": "forward",
          "loss": "loss", "backward": "backward", "weight_gradient": "weight gradient"}
NOT_A_NUMBER, LOWEST = "-", 1e-8    # LOWEST: what the plot shows of no difference


def number(value: float, form: str = ".1e") -> str:
    return format(value, form) if not math.isnan(value) else NOT_A_NUMBER


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    """Lines of columns, the first one to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    return ["  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))])
            for row in (head, *rows)]


def report(a, b, done, rows: int) -> list[str]:
    """Lines for the terminal."""
    lines = [compare_runs.headline(done), ""]
    lines += [f"{name}  {run.folder}  ({run.description})" for name, run in (("A", a), ("B", b))]
    for name, (ours, theirs) in list(done.flags.items())[:rows]:
        lines.append(f"   --{name}: {ours} in A, {theirs} in B")
    if len(done.flags) > rows:
        lines.append(f"   and {len(done.flags) - rows} flags more (--json has them)")
    lines += [f"   {note}" for note in done.notes]
    if done.findings:
        found = done.findings[:rows]
        lines += ["", f"Step {found[0].step}, in the order in which one follows from the other:", *table(
            ("where", "what", "before", "difference", "allowed", "norm in A", "norm in B"),
            [(each.place, STAGES[each.stage], number(each.before), number(each.difference), number(each.tolerance, ".0e"),
              *(number(norm, ".7g") for norm in each.norms)) for each in found])]
        if len(done.findings) > rows:
            lines.append(f"and {len(done.findings) - rows} more (--rows, --csv)")
    if len(done.steps):
        apart = relative(*done.loss), relative(*done.grad_norm)
        shown = sorted({0, len(done.steps) - 1, *(np.searchsorted(done.steps, done.first) + np.arange(-1, 2)
                                                  if done.first else [])} & set(range(len(done.steps))))
        lines += ["", *table(("step", "loss A", "loss B", "apart", "norm A", "norm B", "apart"), [
            (str(done.steps[n]), *(number(value, ".7g") for value in done.loss[:, n]), number(apart[0][n]),
             *(number(value, ".6g") for value in done.grad_norm[:, n]), number(apart[1][n])) for n in shown])]
    return lines


def numbers(done) -> list[tuple]:
    """(step, kind, name, difference) of everything that was compared."""
    rows = [(int(step), kind, "", float(value)) for kind in ("loss", "grad_norm")
            for step, value in zip(done.steps, relative(*getattr(done, kind)), strict=True)]
    for kind, apart in done.apart.items():
        rows += [(step, kind, name, float(value)) for name, values in zip(done.names[kind], apart, strict=True)
                 for step, value in zip(done.recorded, values, strict=True) if not np.isnan(value)]
    return rows


def write_csv(path: Path, done) -> None:
    text = io.StringIO(newline="")
    csv.writer(text).writerows([("step", "kind", "name", "difference"), *numbers(done)])
    path.write_text(text.getvalue())


def write_json(path: Path, a, b, done) -> None:
    """Numbers that are not finite are null, or "inf"."""
    def plain(value):
        if isinstance(value, float) and not math.isfinite(value):
            return "inf" if value > 0 else None
        return value

    outcome = {
        "equal": done.first is None, "headline": compare_runs.headline(done), "first_step": done.first,
        "runs": [{"folder": str(run.folder), "description": run.description} for run in (a, b)],
        "tolerance": vars(done.tolerance), "flags": done.flags,
        "notes": done.notes, "findings": [{name: [plain(each) for each in value] if isinstance(value, tuple) else plain(value)
                                           for name, value in vars(found).items()} for found in done.findings],
        "steps": done.steps.tolist(), "loss": [list(map(plain, row)) for row in done.loss.tolist()],
        "grad_norm": [list(map(plain, row)) for row in done.grad_norm.tolist()],
        "differences": [list(map(plain, row)) for row in numbers(done)]}
    path.write_text(json.dumps(outcome, indent=1, default=str))


def write_plot(path: Path, done) -> None:
    """Loss and gradient norm over the steps, and below layers x steps."""
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    layers = done.names.get("output", [])
    figure = Figure(figsize=(11, 9 if layers else 3.4), dpi=110, layout="constrained", facecolor="white")
    figure.suptitle(compare_runs.headline(done), fontsize=9, x=0.01, ha="left", wrap=True)
    parts = figure.subfigures(2 if layers else 1, 1, height_ratios=(1, 2.2) if layers else None, squeeze=False)[:, 0]
    for column, (name, values, limit) in enumerate((("loss", done.loss, done.tolerance.loss),
                                                    ("gradient norm", done.grad_norm, GRADIENTS * done.tolerance.loss))):
        axes = parts[0].add_subplot(1, 2, column + 1)
        apart = np.clip(np.nan_to_num(relative(*values), posinf=1), LOWEST, 1)
        axes.plot(done.steps, apart, marker="o", markersize=3, color="#2f5fd0")
        axes.axhline(limit, color="#c2410c", linestyle="--", linewidth=1, label=f"allowed: {limit:.0e}")
        axes.set(yscale="log", title=f"relative difference of the {name}", xlabel="step", ylim=(LOWEST / 2, 2))
        axes.legend(frameon=False, fontsize=8, loc="upper left")
        axes.xaxis.get_major_locator().set_params(integer=True)
    if layers:
        _draw_layers(parts[1].add_subplot(), done, LogNorm(LOWEST, 1))
    content = io.BytesIO()
    figure.savefig(content, format="png")
    path.write_bytes(content.getvalue())


def _draw_layers(axes, done, scale) -> None:
    """The heat map: what each layer returns, in order of execution from the top, at each recorded step."""
    values, layers = np.clip(done.apart["output"], LOWEST, 1), done.names["output"]
    image = axes.imshow(values, norm=scale, aspect="auto", interpolation="nearest", cmap="magma_r")
    axes.figure.colorbar(image, ax=axes, label="relative difference of the output", pad=0.01)
    blamed = next((found for found in done.findings if found.place in layers), None)
    ticks = np.linspace(0, len(layers) - 1, min(len(layers), 24)).round().astype(int).tolist()
    if blamed:
        row, column = layers.index(blamed.place), done.recorded.index(blamed.step)
        ticks = sorted({row, *(tick for tick in ticks if abs(tick - row) > len(layers) / 40)})
        axes.annotate(f"{blamed.place}, step {blamed.step}", (column, row), (0.5, 1.02), textcoords="axes fraction", ha="center",
                      fontsize=8, color="#c2410c", arrowprops={"arrowstyle": "->", "color": "#c2410c"})
    axes.set_yticks(ticks, [layers[tick] for tick in ticks], fontsize=6)
    columns = np.unique(np.linspace(0, len(done.recorded) - 1, min(len(done.recorded), 20)).round().astype(int))
    axes.set_xticks(columns, [done.recorded[column] for column in columns])
    axes.set_xlabel("step")


def main(args) -> int:
    if args.rows < 1:
        raise errors.UserError(f"--rows {args.rows}: expected 1 or more")
    for name in ("plot", "csv", "json"):
        path = getattr(args, name)
        if path and not path.absolute().parent.is_dir():
            raise errors.UserError(f"--{name} {path}: there is no folder {path.absolute().parent}; make it first")
    if args.plot and args.plot.suffix != ".png":
        raise errors.UserError(f"--plot {args.plot}: the plot is a .png; name it so")
    a, b = compare_runs.open_run(args.a), compare_runs.open_run(args.b)
    done = compare_runs.compare(a, b, compare_runs.tolerance_of(a, b, args.rtol, args.atol))
    print("\n".join(report(a, b, done, args.rows)))
    for path, write in ((args.plot, lambda path: write_plot(path, done)), (args.csv, lambda path: write_csv(path, done)),
                        (args.json, lambda path: write_json(path, a, b, done))):
        if path:
            write(path)
            print(f"wrote {path}")
    return int(done.first is not None)


if __name__ == "__main__":
    with errors.exit_on_user_error("compare_runs.py"):
        sys.exit(main(ARGS))
