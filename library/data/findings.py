"""What is worth a look in a data set before it is trained on: found from its table, in columns."""

from dataclasses import dataclass, replace

import numpy as np

from library.data import captions, duplicates
from library.data.dataset import Data
from library.data.table import Table

KINDS = {    # what an image can be found to be: (label, what it means)
    "dropped": ("Left out", "found, and not trained on"),
    "uncaptioned": ("No caption", "shown with the empty prompt"),
    "empty": ("Empty caption", "the caption is there and holds no word"),
    "long": ("Long caption", "the text encoders do not read its end"),
    "duplicate": ("Same file twice", "seen more often than the others"),
    "near": ("Near-duplicate", "looks like another image of the data"),
    "enlarged": ("Enlarged", "smaller than its bucket: what is learned is blurred"),
    "cropped": ("Much cut off", "more than a third of the image lies outside of the cut"),
}
MUCH = 1 / 3    # of the resized image's area


@dataclass
class Findings:
    """What is worth a look, of a table of N rows.

    rows: for each of `KINDS` but "dropped", the rows it is true of. twin, near: [N] first row with the same file, or that
    looks the same, or -1; near is None where pictures were not compared. long: row -> (tokens, what of the prompt is read,
    what is cut off); None where no tokenizer was there.
    """

    rows: dict[str, np.ndarray]
    twin: np.ndarray
    near: np.ndarray | None = None
    long: dict[int, tuple[int, str, str]] | None = None


def find(data: Data, near: np.ndarray | None = None, long: dict[int, tuple[int, str, str]] | None = None) -> Findings:
    """Everything about the images that is known without decoding; `near` and `long` as in `Findings` are passed on."""
    table = data.table
    texts = table.caption_start[1:] - table.caption_start[:-1]
    first = table.caption_start[0]
    filled = np.strings.str_len(np.strings.strip(table.captions[first:table.caption_start[-1]])) > 0
    words = np.concatenate([[0], np.cumsum(filled)])[table.caption_start - first]    # captions with words before each row
    twin = duplicates.same_file(table.content)
    rows = {"uncaptioned": texts == 0, "empty": (texts > 0) & (words[1:] - words[:-1] < texts), "duplicate": twin >= 0,
            "enlarged": (table.resized > table.size).any(axis=1), "cropped": 1 - shown_share(table) > MUCH}
    if near is not None:
        rows["near"] = (near >= 0) & ~((twin >= 0) & (twin == near))    # the same file looks the same: said once
    found = {kind: np.flatnonzero(mask) for kind, mask in rows.items()} | {"long": np.array(sorted(long or {}), np.int64)}
    return Findings({kind: found[kind] for kind in KINDS if kind in found}, twin, near, long)


def measure_captions(table: Table, tokenizers: list, limit: int) -> dict[int, tuple[int, str, str]]:
    """Rows with a caption of more than `limit` tokens -> (tokens, what is read, what is cut off) of the longest.

    tokenizers: of the base model, fast ones of `transformers`. Prefix, suffix and the first choice of wildcards count; no
    tag is dropped.
    """
    counts = table.caption_start[1:] - table.caption_start[:-1]
    row_of = np.repeat(np.arange(len(table)), counts)
    used = table.captions[table.caption_start[0]:table.caption_start[-1]]
    found: dict[int, tuple[int, str, str]] = {}
    for number, spec in enumerate(table.sets):
        rules = replace(spec.text, empty=0.0, empty_every=0, tag_dropout=0.0, warmup_steps=0)
        rows = row_of[table.set_of[row_of] == number]
        texts, text_of = np.unique(used[table.set_of[row_of] == number], return_inverse=True)
        prompts = [captions.variant(text, 0, rules) for text in texts.tolist()]
        cut = dict(_overlong(prompts, tokenizers, limit))
        for at in np.flatnonzero(np.isin(text_of.reshape(-1), list(cut))).tolist():
            tokens, end = cut[int(text_of.reshape(-1)[at])]
            prompt, row = prompts[int(text_of.reshape(-1)[at])], int(rows[at])
            if row not in found or found[row][0] < tokens:
                found[row] = tokens, prompt[:end], prompt[end:]
    return found


def _overlong(prompts: list[str], tokenizers: list, limit: int):
    """(index, (tokens, characters that are read)) of every prompt of more than `limit` tokens."""
    for start in range(0, len(prompts), 1024):
        part = prompts[start:start + 1024]
        both = [tokenizer(part, add_special_tokens=False, truncation=False, verbose=False, return_offsets_mapping=True)
                for tokenizer in tokenizers]
        for place in range(len(part)):
            long = [(len(ids), offsets[limit][0]) for one in both
                    for ids, offsets in [(one["input_ids"][place], one["offset_mapping"][place])] if len(ids) > limit]
            if long:
                yield start + place, (max(tokens for tokens, _ in long), min(end for _, end in long))


def shown_share(table: Table) -> np.ndarray:
    """[N] share of each resized image that lies inside of its cut."""
    return np.array(table.buckets)[table.bucket_of].prod(axis=1) / table.resized.prod(axis=1)
