"""Which text an image is shown with: choice among captions, wildcards, order of tags, dropout. Plain strings; no files, no torch.

Steps, in this order: is the caption dropped, which caption, {a|b} (in prefix and suffix, too), tag warm-up, order, tag
dropout, prefix and suffix, secondary separator. The first two are drawn from (seed, row, visit), the rest from the
caption's text and the variant's number alone, so that a few variants of each caption can be encoded before the run.
"""

import hashlib
import math
import re
from dataclasses import dataclass

import numpy as np

from library.data.draws import CAPTION, generator

_BRACES = re.compile(r"\{\{|\}\}|\{((?:\{\{[^{}]*\}\}|[^{}])+)\}")


@dataclass(frozen=True)
class Rules:
    """How a caption becomes a prompt, in kohya's terms.

    empty: probability of dropping the caption, drawn anew at each visit. empty_every: also drop it in every n-th epoch.
    tag_dropout: probability of dropping each tag that may move. warmup_steps: tags shown grow from `warmup_min` to all in
    so many optimizer steps (a share of the run below 1).
    """

    shuffle: bool = False
    keep: int = 0                             # first tags that stay in place
    separator: str = ","
    secondary: str | None = None              # becomes `separator` in the end: joins tags that move together
    keep_separator: str = ""                  # tags before it (and behind a second one) stay in place
    wildcard: bool = False                    # {a|b} chooses
    prefix: str = ""
    suffix: str = ""
    bare: bool = False                        # a dropped caption is shown without them (SimpleTuner)
    empty: float = 0.0
    empty_every: int = 0
    tag_dropout: float = 0.0
    warmup_min: int = 1
    warmup_steps: float = 0
    orders: int | None = None                 # tag orders of a caption there are (SimpleTuner's count); None: no end
    original: bool = False                    # the caption as written is one of them
    seed: int = 0                             # of the orders


def faults(rules: Rules) -> list[str]:
    """What makes no sense in these rules: one sentence each, in kohya's names of the settings."""
    shares = {"caption_dropout_rate": rules.empty, "caption_tag_dropout_rate": rules.tag_dropout}
    counts = {"caption_dropout_every_n_epochs": rules.empty_every, "keep_tokens": rules.keep,
              "token_warmup_min": rules.warmup_min, "token_warmup_step": rules.warmup_steps}
    found = [f"{name} is {value}: a share is between 0 and 1" for name, value in shares.items() if not 0 <= value <= 1]
    found += [f"{name} is {value} and cannot be less than 0" for name, value in counts.items() if value < 0]
    if not rules.separator:
        found.append("caption_separator is empty: name what stands between tags")
    elif rules.secondary and rules.separator in rules.secondary:
        found.append(f"secondary_separator {rules.secondary!r} holds the caption_separator {rules.separator!r}, where tags are "
                     "parted: choose another one")
    if rules.orders is not None and rules.orders < 1:
        found.append(f"the count of tag orders is {rules.orders} and must be 1 or more")
    return found


def choose(text: str, draw: np.random.Generator) -> str:
    """`text` with one of the ways of each {a|b}; {{ and }} are braces to be shown, a lone brace stays as it is."""
    def one(match: re.Match) -> str:
        if match[1] is None:
            return match[0][0]
        ways = match[1].split("|")
        return ways[draw.integers(len(ways))].replace("{{", "{").replace("}}", "}")
    return _BRACES.sub(one, text)


def arrange(caption: str, rules: Rules, draw: np.random.Generator, shuffle: bool, shown: float = 1.0) -> str:
    """The tags of `caption`, those that may move truncated, shuffled and dropped as the rules say, and joined again."""
    end = ""
    if rules.keep_separator and rules.keep_separator in caption:
        first, moving, *last = ([tag for each in part.split(rules.separator) if (tag := each.strip())]
                                for part in caption.split(rules.keep_separator, 2))
        last = last[0] if last else []
    else:
        if rules.orders is not None and (mark := rules.separator.strip()) and caption.rstrip().endswith(mark):
            caption, end = caption.rstrip()[:-len(mark)], mark    # sentences end in a full stop in any order
        tags = [tag.strip() for tag in caption.split(rules.separator)]
        tags = tags if rules.orders is None else [tag for tag in tags if tag]
        first, moving, last = tags[:rules.keep], tags[rules.keep:], []
    if rules.warmup_steps:
        moving = moving[:math.floor(shown * (len(moving) - rules.warmup_min)) + rules.warmup_min]
    if shuffle:
        moving = [moving[i] for i in draw.permutation(len(moving))]
    if rules.tag_dropout:
        moving = [tag for tag, drop in zip(moving, draw.random(len(moving)), strict=True) if drop >= rules.tag_dropout]
    joint = rules.separator if rules.separator.endswith(" ") else rules.separator + " "
    return joint.join(first + moving + last) + end


def variant(caption: str, number: int, rules: Rules, shown: float = 1.0) -> str:
    """The prompt that the `number`-th variant of a caption is ("" if it is dropped: prefix and suffix stay).

    It depends on the caption's text, the number and the rules alone, so that its embedding can be cached. Number 0 keeps
    the order as written where `rules.original`. shown: progress of the tag warm-up, 0 to 1.
    """
    parts = [rules.prefix, caption, rules.suffix]
    shuffle = rules.shuffle and not (rules.original and number == 0)
    braces = rules.wildcard and any("{" in part or "}" in part for part in parts)
    marked = bool(rules.keep_separator) and rules.keep_separator in caption
    draw = None
    if braces or marked or rules.tag_dropout or (rules.shuffle and rules.separator in caption):
        text = int.from_bytes(hashlib.blake2b(caption.encode(), digest_size=8).digest(), "little")
        draw = generator(text, rules.seed, number, CAPTION)
    if braces:
        parts = [choose(part, draw) for part in parts]
    if marked or rules.tag_dropout or ((shuffle or rules.warmup_steps) and rules.separator in parts[1]):
        parts[1] = arrange(parts[1], rules, draw, shuffle, shown)
    prompt = " ".join(part for part in parts if part)
    return prompt.replace(rules.secondary, rules.separator) if rules.secondary else prompt


def count(rules: Rules, variants: int | None) -> int | None:
    """How many variants of each caption visits take in turn: at most `variants` and at most orders + original.

    variants: how many are kept, or None if they need not be; the answer None is a new one at each visit.
    """
    if not varies(rules):
        return 1
    if not rules.shuffle or rules.orders is None:
        return variants
    orders = rules.orders + rules.original
    return orders if variants is None else min(variants, orders)


def pick(captions: list[str], rules: Rules, seed: int, row: int, visit: int, variants: int | None, epoch: int = 0,
         shown: float = 1.0) -> str:
    """The prompt of one visit of one image.

    captions: the image's captions, of which one is drawn; of none, and of a dropped one, prefix and suffix are shown.
    variants: how many of each caption are kept, or None; the visit shows the one of number visit % `count`.
    epoch: how often the image's set was seen before. shown: progress of the tag warm-up, 0 to 1.
    """
    drop, which = generator(seed, row, visit, CAPTION).random(2)
    number = visit if (several := count(rules, variants)) is None else visit % several
    dropped = drop < rules.empty or (rules.empty_every > 0 and (epoch + 1) % rules.empty_every == 0)
    if dropped and rules.bare:
        return ""
    chosen = captions[int(which * len(captions))] if captions and not dropped else ""
    return variant(chosen, number, rules, shown)


def possible(captions: list[str], rules: Rules, variants: int) -> set[str]:
    """Every prompt that `pick` can give for these captions at shown = 1, and no other."""
    texts = set(captions) if rules.empty < 1 and rules.empty_every != 1 else set()
    dropped = {""} if rules.empty > 0 or rules.empty_every > 0 else set()
    texts |= set() if rules.bare else dropped
    texts |= set() if captions else {""}
    prompts = {variant(text, number, rules) for text in texts for number in range(count(rules, variants))}
    return prompts | dropped if rules.bare else prompts


def varies(rules: Rules) -> bool:
    """Whether a caption can have variants at all."""
    return rules.shuffle or rules.wildcard or rules.tag_dropout > 0


def endless(rules: Rules) -> bool:
    """Whether the prompts are too many to be listed before the run: while the warm-up lasts, any number of tags is shown."""
    return bool(rules.warmup_steps)
