"""The report of a run: one HTML file that stands alone, and the loss curve as a picture.

Both read the output folder. matplotlib and Pillow are imported late, so that a training run starts without them.
"""

import base64
import html
import io
import json
import re
from datetime import timedelta
from pathlib import Path

import numpy as np

from library.errors import UserError

METRICS = ("step", "loss", "lr", "images_per_s", "wait", "memory_gb", "grad_norm", "seconds", "epoch")
CHARTS = {"loss": "Loss", "lr": "Learning rate", "images_per_s": "Images per second",
          "wait": "Share of time waiting for data", "grad_norm": "Gradient norm"}  # fmt: skip
# In the HTML, colours are CSS variables, so that one SVG serves light and dark. matplotlib knows no variables:
# it draws in these stand-ins, which nothing else uses, and _svg() swaps them.
PAGE_COLOURS = {"muted": "#0a0b0c", "line": "#0a0b0d", "accent": "#0a0b0e"}
PRINT_COLOURS = {"muted": "#3c3f47", "line": "#e3e4e8", "accent": "#2f5fd0"}
CSS = """
:root { --page:#f6f6f4; --card:#fff; --text:#1b1d22; --muted:#5d616b; --line:#e2e3e7; --accent:#2f5fd0; --warn:#9a3412 }
@media screen and (prefers-color-scheme:dark) { :root { --page:#131418; --card:#1c1e24; --text:#e8e9ee; --muted:#a2a6b2;
  --line:#32353f; --accent:#86a8ff; --warn:#fdba74 } }
* { box-sizing:border-box } figure, dd, pre { margin:0; min-width:0 } h3 { font-size:1rem; margin:0 0 6px }
body { margin:0; background:var(--page); color:var(--text); font:16px/1.5 system-ui, sans-serif }
main { max-width:1400px; margin:0 auto; padding:32px 20px 64px; overflow-wrap:anywhere }
h1 { font-size:clamp(1.5rem, 4vw, 2.1rem); line-height:1.2; margin:0 } h2 { font-size:1.2rem; margin:36px 0 12px }
.card { background:var(--card); border:1px solid var(--line); border-radius:10px; padding:14px 16px }
dl, .charts { display:grid; gap:12px; margin:0; grid-template-columns:repeat(2, minmax(0, 1fr)) }
dl { grid-template-columns:repeat(auto-fit, minmax(140px, 1fr)) } .value { font-size:1.4rem; font-weight:600 }
dt, .small, figcaption, thead { color:var(--muted); font-size:.875rem } .warning { color:var(--warn); margin:6px 0 0 }
svg { display:block; width:100%; height:auto } svg text { font-family:inherit !important } .narrow { display:none }
table { border-collapse:collapse; font-variant-numeric:tabular-nums } #chart-loss { grid-column:1 / -1 }
th, td { text-align:left; padding:5px 24px 5px 0; font-weight:500; vertical-align:top }
.scroll { overflow-x:auto }
.bar div { height:12px; margin-top:6px; min-width:1px; background:var(--accent); print-color-adjust:exact }
#validation td, #validation thead th { padding:0 8px 0 0; min-width:92px } img { width:100%; border-radius:6px }
#validation tbody th { padding:14px 0 6px; max-width:0 } figcaption { margin-top:10px; position:sticky; left:0 }
#validation tbody div { position:sticky; left:0; width:min(1320px, 100vw - 76px) } .bar { width:55% }
pre { white-space:pre-wrap; font-size:.875rem; user-select:all } ul { margin:0; padding-left:20px }
@media screen and (max-width:760px) { .wide { display:none } .narrow { display:block } main { padding:20px 14px }
  th, td { padding-right:12px } .bar { width:30% } .charts { grid-template-columns:minmax(0, 1fr) } }
@media print { :root { --page:#fff } body { font-size:11pt } main { max-width:none; padding:0 } h2 { break-after:avoid }
  .charts figure, dl div, #validation tbody, tr { break-inside:avoid } .scroll { overflow:visible }
  #validation td, #validation thead th { min-width:0 } #validation tbody div { width:auto } }
"""
# The policy makes the promise hold: a browser loads nothing from outside and runs no script from this page.
PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" content="light dark">
<style>{css}</style></head>
<body><main><div class="small">Training report</div><h1 dir="auto">{title}</h1>{body}</main></body></html>
"""


def read_metrics(path: str | Path) -> dict[str, np.ndarray]:
    """The columns of metrics.jsonl in the order of their steps; a value that was not logged is NaN, and "no_loss" says where.

    A step run again after a restart counts as run last. A last line cut off (kill -9) is ignored, no other line is.
    """
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"{path}: the metrics of the run cannot be read: {error.strerror}") from error
    rows = {}
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line.decode("utf-8"))
        except ValueError as error:
            if number == len(lines):
                break  # no newline follows: empty, or cut off (the start of a JSON object is never a whole one)
            raise UserError(f"{path}, line {number}: not a line of JSON: {error}") from error
        if not isinstance(row, dict) or type(row.get("step")) is not int:
            raise UserError(f'{path}, line {number}: expected an object with a whole number as "step"')
        for name in METRICS:
            if not isinstance(row.get(name), int | float | None):
                raise UserError(f'{path}, line {number}: "{name}" is {row[name]!r}, expected a number or null')
        rows[row["step"]] = row
    types = {"step": np.int64}  # the others are floats, for which NumPy reads None as NaN
    columns = {n: np.array([rows[step].get(n) for step in sorted(rows)], types.get(n, np.float64)) for n in METRICS}
    return columns | {"no_loss": np.array([rows[step].get("loss") is None for step in sorted(rows)], bool)}


def choose_steps(steps: list[int], limit: int = 12) -> list[int]:
    """At most `limit` of the steps, evenly spread, with the first and the last."""
    return [steps[i] for i in np.linspace(0, len(steps) - 1, min(limit, len(steps))).round().astype(int)]


def write_loss_curve(output_dir: str | Path) -> Path:
    """Writes loss_curve.png into the output folder."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 5), dpi=150, layout="constrained", facecolor="white")
    _draw(figure.subplots(), read_metrics(Path(output_dir) / "metrics.jsonl"), "loss", PRINT_COLOURS)
    figure.axes[0].set_ylabel("loss", color=PRINT_COLOURS["muted"])
    png = io.BytesIO()
    figure.savefig(png, format="png")
    return _replace(Path(output_dir) / "loss_curve.png", png.getvalue())


def write_report(output_dir: str | Path, *, title: str, command: str, versions: dict[str, str], notes: list[str],
                 summary: str = "", style: str = "") -> Path:  # fmt: skip
    """Writes report.html.

    summary: HTML that opens the page (what the run is trained on), and `style`, the CSS it needs beside the page's own.
    """
    metrics = read_metrics(Path(output_dir) / "metrics.jsonl")
    samples, problems = _samples(Path(output_dir) / "validation")
    rows = [f'<tr><th scope="row">{_text(key)}</th><td>{_text(value)}</td></tr>' for key, value in versions.items()]
    items = [f'<li dir="auto">{_text(note)}</li>' for note in [*notes, *problems]]
    sections = {
        "At a glance": _headline(metrics),
        "Curves": _charts(metrics),
        "Validation images": samples,
        "Command": f'<pre class="card"><code>{_text(command)}</code></pre>',
        "Versions": f'<div class="card"><table id="versions"><tbody>{"".join(rows)}</tbody></table></div>',
        "Notes": f'<div class="card"><ul>{"".join(items)}</ul></div>' if items else "<p>None.</p>",
    }
    body = summary + "\n".join(f"<section><h2>{heading}</h2>\n{content}\n</section>" for heading, content in sections.items())
    # backslashreplace: a command line that is not UTF-8 reaches Python with lone surrogates
    page = PAGE.format(title=_text(title), css=CSS + style, body=body).encode("utf-8", "backslashreplace")
    return _replace(Path(output_dir) / "report.html", page)


def _replace(path: Path, content: bytes) -> Path:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(content)
    return temporary.replace(path)  # os.replace: the old report or the new one, never half of one


def _text(value: object) -> str:
    return html.escape(f"{value:,}" if isinstance(value, int) else str(value), quote=True)


def _number(value: float, form: str, unit: str = "") -> str:
    return format(value, form) + unit if np.isfinite(value) else "–"


def _headline(metrics: dict[str, np.ndarray]) -> str:
    count = len(metrics["step"])
    if not count:
        return "<p>No step was logged.</p>"
    logged = metrics["loss"][~metrics["no_loss"]]  # of steps that were all refused, none is
    last = logged[-((count + 19) // 20) :]
    # A logging step took (its optimizer steps) / (images/s), up to a constant. Weighted so, the means are those of
    # the whole run: a stretch that spent long waiting counts as long as it took.
    steps = np.maximum(np.diff(metrics["step"], prepend=0), 1)
    time = steps / np.where(metrics["images_per_s"] > 0, metrics["images_per_s"], np.nan)
    known, waited = np.isfinite(time), np.isfinite(time * metrics["wait"])
    rate = steps[known].sum() / time[known].sum() if known.any() else np.nan
    wait = np.average(metrics["wait"][waited], weights=time[waited]) if waited.any() else np.nan
    # A restarted process counts its seconds from zero: where they fall, a new stretch begins.
    seconds = metrics["seconds"][np.isfinite(metrics["seconds"])]
    wall = timedelta(seconds=round(np.append(seconds[:-1][np.diff(seconds) < 0], seconds[-1:]).sum()))
    cards = (
        ("Steps", f"{metrics['step'][-1]:,}", _number(metrics["epoch"][-1], ",.2f", " epochs")),
        ("Final loss", f"{last.mean():.4g}" if len(last) else "–", f"mean of the last 5% ({len(last):,} logged)"),
        ("Images per second", _number(rate, ",.0f" if rate >= 100 else ".3g"), "mean of the run"),
        ("Waiting for data", _number(wait, ".1%"), "share of the time"),
        ("Peak memory", _number(np.fmax.reduce(metrics["memory_gb"]), ".1f", " GB"), "highest of all logged steps"),
        ("Wall time", wall if len(seconds) else "–", "h:mm:ss to the last logged step"),
    )
    card = '<div class="card"><dt>{}</dt><dd class="value">{}</dd><dd class="small">{}</dd></div>'
    return f"<dl>{''.join(card.format(*values) for values in cards)}</dl>"


def _draw(axes, metrics: dict[str, np.ndarray], name: str, colours: dict[str, str]) -> None:
    """Draws one column over the steps: as logged (thin) and its running mean (thick)."""
    finite = np.isfinite(metrics[name])
    step, values = metrics["step"][finite], metrics[name][finite]
    count, color = len(values), colours["accent"]
    keep = np.arange(count)
    if count > 2000:  # a long run would make a file of megabytes; the extremes of each bin draw the same band
        bins = np.array_split(keep, 600)
        keep = np.unique([bin[pick(values[bin])] for bin in bins for pick in (np.argmin, np.argmax)])
    smooth = count >= 20 and name != "lr"  # the learning rate is exact: nothing to smooth
    axes.plot(step[keep], values[keep], color=color, linewidth=0.8 if smooth else 2, alpha=0.45 if smooth else 1,
              marker="o" if count < 20 else None, markersize=4, label="as logged")  # fmt: skip
    if smooth:
        window = min(max(5, count // 20) | 1, 501)  # bounded, or convolving a long run would take minutes
        # convolve, not a cumulative sum: one huge loss would drown all that follow it in rounding
        mean = np.convolve(values, np.ones(window), "same") / np.convolve(np.ones(count), np.ones(window), "same")
        axes.plot(step[keep], mean[keep], color=color, linewidth=2.2, label=f"mean of {window} logged steps")
    if smooth and name == "loss":
        axes.legend(frameon=False, labelcolor=colours["muted"], ncols=2, loc="lower right", bbox_to_anchor=(1, 1))
    if count and values.min() > 0 and values.max() > 20 * np.median(values):
        axes.set_yscale("log")
    elif count and values.min() >= 0:
        axes.set_ylim(0, values.max() * 1.1 or 1)
    if name == "wait":
        axes.yaxis.set_major_formatter("{x:.1%}")
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    axes.set_xlabel("step" if count else "step (nothing logged)", color=colours["muted"])
    axes.grid(axis="y", color=colours["line"], linewidth=0.8)
    axes.tick_params(which="both", colors=colours["muted"], length=0)
    axes.spines[:].set_visible(False)


def _svg(metrics: dict[str, np.ndarray], name: str, kind: str, size: tuple[float, float], label: str) -> str:
    """One chart as inline SVG in the colours of the page."""
    import matplotlib.figure

    # fonttype none: text stays text, in the font of the page. hashsalt: the same run gives the same bytes.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "report", "font.size": 11}):
        figure = matplotlib.figure.Figure(figsize=size, layout="constrained")
        _draw(figure.subplots(), metrics, name, PAGE_COLOURS)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True)
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", buffer.getvalue(), flags=re.S)
    view, inner = re.search(r'<svg [^>]*(viewBox="[^"]*")[^>]*>(.*)', svg, flags=re.S).groups()
    # Names inside one SVG are names of the whole page once it is inline.
    inner = re.sub(r'(\bid="|url\(#|xlink:href="#)', rf"\g<1>{name}-{kind}-", inner)
    for colour, stand_in in PAGE_COLOURS.items():
        inner = inner.replace(stand_in, f"var(--{colour})")
    return f'<svg class="{kind}" {view} role="img" aria-label="{_text(label)}">{inner}'


def _charts(metrics: dict[str, np.ndarray]) -> str:
    parts = []
    for name, title in CHARTS.items():
        finite = np.isfinite(metrics[name])
        seen = metrics[name][finite]
        if name == "grad_norm" and not len(seen):
            continue  # null where gradients are not clipped
        label = f"{title} at {len(seen):,} steps" + (f": {seen[0]:.3g} to {seen[-1]:.3g}" if len(seen) else "")
        # The loss is drawn twice, for wide and for narrow pages: shrunk to a phone, a wide chart is illegible.
        sizes = {"wide": (11, 3.4), "narrow": (5, 3)} if name == "loss" else {"any": (5.5, 2.6)}
        drawn = "".join(_svg(metrics, name, kind, size, label) for kind, size in sizes.items())
        bad = metrics["step"][~finite & ~metrics["no_loss"]]
        if name == "loss" and len(bad):
            drawn += f'<p class="warning">{len(bad):,} logged losses are not finite, the first at step {bad[0]:,}.</p>'
        parts.append(f'<figure class="card" id="chart-{name}"><h3>{title}</h3>{drawn}</figure>')
    return f'<div class="charts">{"".join(parts)}</div>'


def _table_figure(name: str, head: list[str], body: str, caption: str) -> str:
    head = "".join(f'<th scope="col">{title}</th>' if title else "<td></td>" for title in head)
    table = f"<table><thead><tr>{head}</tr></thead>{body}</table><figcaption>{caption}</figcaption>"
    return f'<figure class="card scroll" id="{name}" tabindex="0">{table}</figure>'


def _samples(folder: Path) -> tuple[str, list[str]]:
    """The validation images as a table (a row each image, a column each step), and what could not be read."""
    folders = {int(p.name[5:]): p for p in folder.glob("step-*") if p.name[5:].isdecimal() and any(p.glob("*.png"))}
    shown = choose_steps(sorted(folders))
    if not shown:
        return "<p>No validation images.</p>", []
    table, problems = {}, []
    for step in shown:
        try:
            prompts = dict(json.loads((folders[step] / "prompts.json").read_text("utf-8")))
        except (OSError, ValueError, TypeError) as error:
            prompts = {}
            problems.append(f"{folders[step] / 'prompts.json'}: not readable, file names are shown instead: {error}")
        for path in folders[step].glob("*.png"):
            # The prompt is part of the key: if it was changed on the way, that is another row.
            row = table.setdefault((path.name, str(prompts.get(path.name, path.stem))), {})
            try:
                row[step] = _thumbnail(path)
            except (OSError, ValueError, SyntaxError) as error:  # Pillow's three ways to say: not a whole PNG
                problems.append(f"{path}: not readable: {error}")
    body = []
    for (name, prompt), row in sorted(table.items()):
        size = re.search(r"-(\d+)x(\d+)-(\d+)\.png$", name)
        detail = _text(f"{size[1]} × {size[2]}, image {size[3]}" if size else name)
        alt = f"{_text(prompt)} ({detail})"
        images = [f'<td><img src="{row[s]}" alt="Step {s}: {alt}"></td>' if s in row else "<td>–</td>" for s in shown]
        body.append(
            f'<tbody><tr><th scope="rowgroup" colspan="{len(shown)}"><div dir="auto">{_text(prompt)} '
            f'<span class="small">{detail}</span></div></th></tr><tr>{"".join(images)}</tr></tbody>'
        )
    caption = f"{len(shown)} of {len(folders)} validation steps, reduced in size."
    return _table_figure("validation", [f"step {step:,}" for step in shown], "".join(body), caption), problems


def _thumbnail(path: Path) -> str:
    from PIL import Image

    webp = io.BytesIO()
    with Image.open(path) as image:
        image.thumbnail((256, 256))
        image.convert("RGB").save(webp, "WEBP", quality=80)
    return "data:image/webp;base64," + base64.b64encode(webp.getvalue()).decode("ascii")
