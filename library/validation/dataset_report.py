"""What a data set is before it is trained on: findings, and one HTML file that shows every image with its cut.

`summary_html` is the part without pictures, which the report of a training run opens with as well.
"""

import base64
import hashlib
import html
import io
import json
import os
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from library.data import captions, images
from library.data.cache import write_whole
from library.data.dataset import Data
from library.data.findings import KINDS, Findings, shown_share
from library.data.table import Table
from library.validation.report import CSS

LISTED = 20_000             # images the page lists; of more, only those with a picture
LONGEST = 256               # pixels of a thumbnail's longer side
NAMED = 10_000              # names of images left out that one report holds
STYLE = """
.stop { border-left:4px solid var(--warn); margin-bottom:12px } .stop ul { margin-top:6px }
a { color:var(--accent); text-underline-offset:2px }
[data-table] table { width:100% } [data-table] tbody tr { border-top:1px solid var(--line) }
[data-table] .n { text-align:right; white-space:nowrap } [data-table] summary { cursor:pointer } .both > div { min-width:0 }
[data-table] .small { margin-top:8px } [data-table] pre { max-height:320px; overflow:auto }
#data-buckets { max-height:640px; overflow:auto }
:is(#data-buckets, #data-findings) th { white-space:nowrap }
@media screen and (min-width:1000px) { .both { display:grid; grid-template-columns:minmax(0, 1fr) minmax(0, 1fr); gap:0 20px } }
@media screen and (max-width:760px) { .meaning { display:none } }
@media print { #data-buckets, [data-table] pre { max-height:none } }
"""    # of `summary_html`, beside the style of the run's report
_FOLDER = Path(__file__).parent
_NUMBER, _CLASS = ' class="n"', {"Meaning": ' class="meaning"', "": ' class="bar"'}


@dataclass(frozen=True)
class Facts:
    """What the summary shows beside the table itself.

    cards: (name, value, detail) of the head. faults: why training would not start. tables: heading -> rows (what, how much,
    ...) of the foot. command: as typed.
    """

    cards: list[tuple[str, str, str]] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    tables: dict[str, list[tuple[str, ...]]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    command: str = ""


def summary_html(data: Data, findings: Findings, facts: Facts | None = None, links: bool = False) -> str:
    """The head of the report: counts, findings, what is left out and why, buckets; in the classes of the run's report.

    links: point to filters of the page's list of images, where there is one.
    """
    facts, table = facts or Facts(), data.table
    filled = [(each["width"], each["height"], each["images"]) for each in table.bucket_counts()]
    lost = 1 - float(shown_share(table).mean())
    cards = [("Images", f"{len(table):,}", f"of {len(table) + len(data.dropped):,} found; {len(data.dropped):,} are left out"),
             ("Buckets", f"{len(filled):,}", "shapes that batches are made of"),
             ("Cut off", f"{lost:.1%}", "of the area of the resized images"), *facts.cards]
    card = '<div class="card"><dt>{}</dt><dd class="value">{}</dd><dd class="small">{}</dd></div>'
    parts = [f'<dl id="data-cards">{"".join(card.format(*map(_text, each)) for each in cards)}</dl>']
    if facts.faults:
        items = "".join(f'<li dir="auto">{_text(fault)}</li>' for fault in facts.faults)
        parts.insert(0, f'<div class="card stop" id="data-faults"><strong class="warning">Training would not start</strong>'
                        f'<ul>{items}</ul></div>')
    parts += [_sets_table(data), '<div class="both"><div>', _findings_table(data, findings, links), _dropped_html(data),
              "</div><div>", _buckets_table(filled, links), "</div></div>"]
    return "\n".join(part for part in parts if part)


def write_report(path: Path, data: Data, findings: Findings, facts: Facts, *, title: str, seed: int, pictures: int = 2000,
                 variants: int = 4) -> Path:
    """Write dataset_report.html: it stands alone, and loads nothing.

    seed: of the prompts shown. pictures: images that are shown as such, evenly chosen, and as many again of those with a
    finding. variants: cuts drawn of an image. Returns `path`.
    """
    rows, dropped, shown, listed = _choose(data, findings, pictures)
    columns, problems = _columns(data, findings, rows, dropped, shown, pictures, seed, variants)
    script = (_FOLDER / "dataset_report.js").read_text("utf-8").strip()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    notes = [*facts.notes, *problems]
    tables = [f"<section><h2>{_text(heading)}</h2>{_plain_table(lines)}</section>" for heading, lines in facts.tables.items()]
    if notes:
        items = "".join(f'<li dir="auto">{_text(note)}</li>' for note in notes)
        tables.append(f'<section><h2>Notes</h2><div class="card"><ul>{items}</ul></div></section>')
    if facts.command:
        tables.append(f'<section><h2>Command</h2><pre class="card"><code>{_text(facts.command)}</code></pre></section>')
    parts = {"title": _text(title), "css": CSS + STYLE, "hash": f"sha256-{digest}", "script": script, "listed": _text(listed),
             "summary": summary_html(data, findings, facts, links=True), "facts": "\n".join(tables),
             # "<" would end the script element
             "data": json.dumps(columns, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")}
    page = re.sub(r"%(title|css|hash|script|listed|summary|facts|data)%", lambda match: parts[match[1]],
                  (_FOLDER / "dataset_report.html").read_text("utf-8"))
    write_whole(path, page.encode("utf-8", "backslashreplace"))    # names that are not UTF-8 hold lone surrogates
    return path


def _choose(data: Data, findings: Findings, pictures: int) -> tuple[list[int], list[int], set[int], str]:
    """(rows listed, dropped listed, rows with a picture, the sentence that says so)."""
    count, gone = len(data.table), len(data.dropped)
    found = np.unique(np.concatenate([*findings.rows.values(), np.zeros(0, np.int64)])).astype(np.int64)
    shown = np.union1d(_evenly(np.arange(count), pictures), _evenly(found, pictures)).astype(np.int64)
    rows = np.arange(count) if count <= LISTED else shown
    dropped = _evenly(np.arange(gone), LISTED)
    sentence = f"All {count:,} images and {gone:,} that are left out are listed" if count <= LISTED and gone <= LISTED else \
        f"{len(rows):,} of {count:,} images and {len(dropped):,} of {gone:,} that are left out are listed"
    if len(shown) < count:
        sentence += (f", {len(shown):,} with their picture: {min(pictures, count):,} spread evenly and "
                     f"{min(pictures, len(found)):,} of {len(found):,} with a finding (--report_images)")
    return rows.tolist(), dropped.tolist(), set(shown.tolist()), sentence + "."


def _evenly(values: np.ndarray, count: int) -> np.ndarray:
    return values if len(values) <= count else values[np.linspace(0, len(values) - 1, count).round().astype(np.int64)]


def _columns(data: Data, findings: Findings, rows: list[int], dropped: list[int], shown: set[int], pictures: int,
             seed: int, variants: int) -> tuple[dict, list[str]]:
    """What the page's script reads, a list for each column, and what went wrong with pictures."""
    table, names = data.table, [spec.id for spec in data.table.sets]
    found = np.zeros(len(table), np.int64)
    for bit, kind in enumerate(KINDS):
        found[findings.rows.get(kind, np.zeros(0, np.int64))] |= 1 << bit
    thumbs, problems = _thumbnails([(str(table.name[row]), lambda row=row: data.read(row)) for row in rows if row in shown])
    gone = [data.dropped[number] for number in dropped]
    with_picture = {row: image for (image, _), row in zip(thumbs, [row for row in rows if row in shown], strict=True)}
    tried = _evenly(np.arange(len(gone)), pictures).tolist()
    readers = _readers(data, [gone[at] for at in tried])
    lost = dict(zip(tried, _thumbnails([("", read) for read in readers], "draw what is left out")[0], strict=True))
    items = [{
        "name": str(table.name[row]), "set": int(table.set_of[row]), "bucket": int(table.bucket_of[row]),
        "size": table.size[row].tolist(), "resized": table.resized[row].tolist(),
        "cuts": [[cut.left, cut.top, int(cut.flip)] for cut in _cuts(table, row, variants)],
        "prompt": captions.pick(table.texts(row), table.spec(row).text, seed, row, 0, variants),
        "captions": table.texts(row), "found": int(found[row]), "twin": int(findings.twin[row]),
        "near": -1 if findings.near is None else int(findings.near[row]),
        "long": (findings.long or {}).get(row), "reason": "", "thumb": with_picture.get(row)} for row in rows]
    for item in items:
        if item["captions"] == [item["prompt"]]:
            item["captions"] = None    # shown as written: said once
    items += [{
        "name": each.name, "set": names.index(each.set_id) if each.set_id in names else 0, "bucket": -1, "size": size,
        "resized": None, "cuts": [], "prompt": "", "captions": None, "found": 1, "twin": -1, "near": -1, "long": None,
        "reason": each.reason, "thumb": image} for at, each in enumerate(gone) for image, size in [lost.get(at, (None, None))]]
    keys = "name set bucket size resized cuts prompt captions found twin near long reason thumb".split()
    columns = {key: [item[key] for item in items] for key in keys}
    return {"kinds": KINDS, "buckets": table.buckets, "sets": names, **columns}, problems


def _cuts(table: Table, row: int, variants: int) -> list:
    return [table.cut(row, number) for number in range(table.variants(row, variants) or 1)]


def _readers(data: Data, gone: list) -> list[Callable[[], bytes]]:
    """For each image that is left out, how to read it: it may be whole and only lack a caption."""
    wanted, readers = {(each.set_id, each.name) for each in gone}, {}
    for spec, source in zip(data.table.sets, data.sources, strict=True):
        if not any(set_id == spec.id for set_id, _ in wanted):
            continue
        for row, name in enumerate(source.names.tolist()):
            if (spec.id, name) in wanted:
                readers[spec.id, name] = lambda source=source, row=row: source.read(row)
        for set_id, name in wanted - readers.keys() if spec.origin.kind == "folder" else ():
            if set_id == spec.id:
                readers[set_id, name] = (Path(spec.origin.path) / name).read_bytes
    return [readers.get((each.set_id, each.name), lambda: b"") for each in gone]


def _thumbnails(jobs: list[tuple[str, Callable[[], bytes]]], label: str = "draw thumbnails") -> tuple[list, list[str]]:
    """[(WebP in base64 or None, [width, height] or None)] of (name, read), and a sentence for each that cannot be drawn."""
    def draw(job):
        name, read = job
        try:
            data = read()
            width, height = images.read_size(data)
            scale = min(1.0, LONGEST / max(width, height))
            picture = images.read_pixels(data, (max(1, round(width * scale)), max(1, round(height * scale))), "lanczos")
            webp = io.BytesIO()
            picture.save(webp, "WEBP", quality=72, method=2)
            return (base64.b64encode(webp.getvalue()).decode("ascii"), [width, height]), None
        except (OSError, images.BadImage) as fault:
            return (None, None), f"{name} cannot be drawn: {fault}"

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        drawn = list(tqdm(pool.map(draw, jobs), total=len(jobs), desc=label, unit="image", disable=not jobs))
    return [result for result, _ in drawn], [problem for _, problem in drawn if problem]


def _findings_table(data: Data, findings: Findings, links: bool) -> str:
    counts = {"dropped": len(data.dropped), **{kind: len(rows) for kind, rows in findings.rows.items()}}
    lines = [(_link(label, f"reason={kind}", links and counts[kind]), f"{counts[kind]:,}", _text(meaning))
             for kind, (label, meaning) in KINDS.items() if kind in counts and (kind != "long" or findings.long is not None)]
    unknown = ["Pictures were not compared, only files." * (findings.near is None),
               "No tokenizer was named, so captions were not measured." * (findings.long is None)]
    return _table("data-findings", "Findings", ("Finding", "Images", "Meaning"), lines, " ".join(filter(None, unknown)))


def _dropped_html(data: Data) -> str:
    if not data.dropped:
        return ""
    counts: dict[str, int] = {}
    for each in data.dropped:
        counts[each.reason] = counts.get(each.reason, 0) + 1
    ranked = sorted(counts.items(), key=lambda item: -item[1])
    lines = [(_text(reason), f"{count:,}") for reason, count in ranked[:20]]
    more = f"{len(ranked) - 20:,} more reasons stand beside the names." if len(ranked) > 20 else ""
    several = len(data.table.sets) > 1
    names = "\n".join(f"{f'{each.set_id}: ' if several else ''}{each.name}: {each.reason}" for each in data.dropped[:NAMED])
    rest = f"\n... and {len(data.dropped) - NAMED:,} more" if len(data.dropped) > NAMED else ""
    return _table("data-dropped", "Left out, and why", ("Reason", "Images"), lines, more,
                  f'<details class="small"><summary>All names</summary><pre>{_text(names + rest)}</pre></details>')


def _sets_table(data: Data) -> str:
    if len(data.table.sets) < 2:
        return ""
    images_of = np.bincount(data.table.set_of, minlength=len(data.table.sets)).tolist()
    lines = [(_text(spec.id), f"{count:,}", f"{sum(each.set_id == spec.id for each in data.dropped):,}", f"{spec.rate:g}",
              _text(spec.origin.path)) for spec, count in zip(data.table.sets, images_of, strict=True)]
    return _table("data-sets", "Data sets", ("Data set", "Images", "Left out", "Times an epoch", "From"), lines)


def _buckets_table(filled: list[tuple[int, int, int]], links: bool) -> str:
    most = max(count for _, _, count in filled)
    lines = [(_link(f"{width} × {height}", f"bucket={width}x{height}", links), f"{count:,}",
              f'<div style="width:{100 * count / most:.1f}%"></div>')
             for width, height, count in sorted(filled, key=lambda each: (each[0] / each[1], each[0]))]
    return _table("data-buckets", "Buckets", ("Width × height", "Images", ""), lines)


def _table(name: str, heading: str, head: tuple[str, ...], lines: list[tuple[str, ...]], caption: str = "",
           more: str = "") -> str:
    """A table of cells that are HTML already; a cell that begins with a digit stands to the right."""
    def row(tag, cells):
        first, *rest = cells
        return f'<tr><th scope="{"col" if tag == "th" else "row"}">{first}</th>' + "".join(
            f'<{tag}{_CLASS.get(title, "") if not numeric else _NUMBER}>{cell}</{tag}>'
            for cell, numeric, title in zip(rest, right, head[1:], strict=True)) + "</tr>"

    right = [bool(lines) and lines[0][at][:1].isdigit() for at in range(1, len(head))]
    body = "".join(row("td", line) for line in lines)
    caption = f"<figcaption>{_text(caption)}</figcaption>" if caption else ""
    return (f'<section><h2>{heading}</h2><figure class="card scroll" id="{name}" data-table tabindex="0"><table><thead>'
            f'{row("th", head)}</thead><tbody>{body}</tbody></table>{caption}{more}</figure></section>')


def _plain_table(lines: list[tuple[str, ...]]) -> str:
    rows = "".join(f'<tr><th scope="row">{_text(first)}</th>{"".join(f"<td>{_text(cell)}</td>" for cell in rest)}</tr>'
                   for first, *rest in lines)
    return f'<div class="card scroll"><table><tbody>{rows}</tbody></table></div>'


def _link(label: str, fragment: str, link) -> str:
    return f'<a href="#{fragment}">{_text(label)}</a>' if link else _text(label)


def _text(value: str) -> str:
    return html.escape(value, quote=True)
