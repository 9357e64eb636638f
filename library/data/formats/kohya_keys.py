"""The keys of kohya's --dataset_config: what each may be, where it may stand, and what is said when it is not so."""

import difflib
import json
from pathlib import Path

from library.errors import UserError

INTERPOLATIONS = {"linear": "bilinear", "cubic": "bicubic", "area": "box",
                  **{name: name for name in ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")}}


def _number(value, low: float = 0, high: float = float("inf")) -> bool:
    return type(value) in (int, float) and low <= value <= high and value != float("inf")


def _whole(low: int, step: int = 1):
    return (f"a whole number from {low}" if step == 1 else f"a multiple of {step}",
            lambda value: type(value) is int and value >= low and value % step == 0)


def _is_size(value) -> bool:
    sides = value if isinstance(value, list) and len(value) == 2 else [value]
    return all(type(side) is int and side >= 8 and side % 8 == 0 for side in sides)


# What the value of a key must be: in words, and as a test. What is not supported may only ask for nothing.
SWITCH = "true or false", lambda value: isinstance(value, bool)
TEXT = "text in quotes", lambda value: isinstance(value, str)
NAME = "text in quotes that is not empty", lambda value: isinstance(value, str) and value != ""
SHARE = "a number from 0 to 1", lambda value: _number(value, 0, 1)
OF_DATASETS = {
    "batch_size": _whole(1), "resolution": ("a multiple of 8, or two of them as [width, height]", _is_size),
    "enable_bucket": SWITCH, "min_bucket_reso": _whole(1), "max_bucket_reso": _whole(1), "bucket_reso_steps": _whole(8, 8),
    "bucket_no_upscale": SWITCH, "resize_interpolation": (f"one of {', '.join(INTERPOLATIONS)}",
                                                          lambda value: isinstance(value, str) and value in INTERPOLATIONS),
    "network_multiplier": ("1: other strengths are not supported", lambda value: _number(value, 1, 1)),
    "validation_seed": _whole(0),
    "validation_split": ("a number from 0 to less than 1", lambda value: _number(value, 0, 1) and value != 1)}
PASSED_ON = {
    "num_repeats": _whole(1), "shuffle_caption": SWITCH, "caption_separator": NAME, "keep_tokens": _whole(0),
    "keep_tokens_separator": TEXT, "secondary_separator": TEXT, "enable_wildcard": SWITCH, "color_aug": SWITCH,
    "flip_aug": SWITCH,
    "face_crop_aug_range": ("left out: cuts around faces are not supported, see random_crop", lambda value: False),
    "random_crop": SWITCH, "caption_prefix": TEXT, "caption_suffix": TEXT, "caption_dropout_rate": SHARE,
    "caption_dropout_every_n_epochs": _whole(0), "caption_tag_dropout_rate": SHARE, "token_warmup_min": _whole(1),
    "token_warmup_step": ("a number from 0", _number), "alpha_mask": SWITCH,
    "custom_attributes": ("empty: no script here reads attributes", lambda value: value == {}),
    "class_tokens": TEXT, "caption_extension": NAME, "cache_info": SWITCH}
OF_SUBSETS = {"image_dir": NAME, "is_reg": SWITCH, "metadata_file": NAME, "conditioning_data_dir": NAME}
IN_DATASETS, IN_SUBSETS = OF_DATASETS | PASSED_ON, PASSED_ON | OF_SUBSETS
OF_TEXT_FILES = ("class_tokens", "caption_extension", "cache_info")    # meaningless where a metadata_file has the captions


def check(table, allowed: dict, place: str, args) -> dict:
    """`table`, if it is one and all its keys are allowed there and of the right kind; else `UserError`.

    allowed: key -> (what its value must be in words, test of it), or None for one that is looked at later.
    """
    if not isinstance(table, dict):
        raise UserError(f"{place}: there are no keys but {shown(table)}")
    for key, value in table.items():
        if key not in allowed:
            raise UserError(f"{place}: {_unknown(key, allowed, args)}")
        if allowed[key] and not allowed[key][1](value):
            raise UserError(f"{place}: {key} is {shown(value)} and must be {allowed[key][0]}")
    return table


def _unknown(key: str, allowed: dict, args) -> str:
    known = [*allowed, *OF_SUBSETS, *PASSED_ON, *OF_DATASETS]
    near = key if key in known else next(iter(difflib.get_close_matches(key, allowed, n=1)
                                              or difflib.get_close_matches(key, known, n=1)), None)
    if near is None and key in vars(args):
        return f"{key} is no key here but a flag: --{key}"
    if near is None:
        return f"there is no key {key}; keys are {', '.join(allowed)}"
    sentences = [] if near == key else [f"there is no key {key}; did you mean {near}?"]
    if near not in allowed:
        place = "[[datasets.subsets]]" if near in IN_SUBSETS else "[[datasets]] or [general]"
        sentences.append(f"{near} belongs into {place}")
    return " ".join(sentences)


def sections(table: dict, name: str, place: str) -> list:
    """The list of sections `name`. Raises `UserError` if there is none."""
    found = table.get(name)
    if not isinstance(found, list) or not found or not all(isinstance(each, dict) for each in found):
        raise UserError(f"{place}: there is no [[{'datasets.' * (name == 'subsets')}{name}]] section" + (
            f" but {name} = {shown(found)}" if found else ""))
    return found


def load(path: Path) -> dict:
    """What a .toml or .json file holds; null is as if the key were not there. Raises `UserError`."""
    if path.suffix.lower() not in (".toml", ".json"):
        raise UserError(f"{path} is neither .toml nor .json")
    content = parse(read(path), str(path), toml=path.suffix.lower() == ".toml")
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no keys but {shown(content)}")
    return content


def read(path: Path) -> str:
    """The text of a file. Raises `UserError`."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start}): save it as UTF-8") from None


def parse(text: str, place: str, toml: bool = False):
    """Text as TOML or JSON. Raises `UserError`, also for a key that is given twice."""
    try:
        return _toml(text) if toml else json.loads(text, object_pairs_hook=_object)
    except ValueError as error:
        raise UserError(f"{place} is not valid {'TOML' if toml else 'JSON'}: {error}") from None


def shown(value) -> str:
    """A value as the file has it, shortened."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) < 60 else text[:57] + "..."


def _object(pairs: list) -> dict:
    found = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"{key!r} is given twice")
        found[key] = value
    return {key: value for key, value in found.items() if value is not None}


def _toml(text: str) -> dict:
    try:
        import tomllib
    except ModuleNotFoundError:    # Python 3.10
        import tomli as tomllib
    return tomllib.loads(text)
