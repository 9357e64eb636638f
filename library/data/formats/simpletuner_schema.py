"""Reading a multidatabackend.json and holding it against config/multidatabackend.schema.json: a sentence for each mistake."""

import difflib
import json
import re
from pathlib import Path

from library.errors import UserError

SCHEMA = Path(__file__).resolve().parents[3] / "config" / "multidatabackend.schema.json"
_KINDS = {bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object",
          type(None): "nothing"}
_TYPES = {"boolean": "true or false", "integer": "a whole number", "number": "a number", "string": "text", "array": "a list",
          "object": "an object in braces", "null": "null"}
_LIMITS = {"minimum": "at least", "exclusiveMinimum": "more than", "maximum": "at most"}
_MOST = 8    # mistakes named at once


def check_data_backends(path: Path) -> list[dict]:
    """The data sets of a multidatabackend.json that are not disabled, each as the schema wants it.

    Raises `UserError`: what cannot be read, with its line; a key that does not exist, with the nearest that does; a value
    of the wrong type or out of range; a key or value that has no meaning here, and why.
    """
    sets = _load(path)
    if not isinstance(sets, list) or not all(isinstance(each, dict) for each in sets):
        raise UserError(f"{path} must hold a list in brackets of data sets in braces")
    names = [f'data set "{each["id"]}"' if isinstance(each.get("id"), str) and each["id"] else f"data set number {number}"
             for number, each in enumerate(sets, 1)]
    used = [number for number, each in enumerate(sets) if each.get("disabled") is not True and each.get("disable") is not True]
    if not used:
        raise UserError(f"{path}: {'every data set is disabled' if sets else 'there is no data set in it'}")
    stores = [each["image_embeds"] for each in sets if "image_embeds" in each]
    listed = [sets[number] for number in used]    # their documentation names image_embeds sets that do not say what they are
    listed = [{**each, "dataset_type": "image_embeds"} if "dataset_type" not in each and each.get("id") in stores else each
              for each in listed]
    faults = [f"{names[used[place]]}: {sentence}" for place, sentence in _faults(listed)]
    if faults:
        more = f"; and {len(faults) - _MOST} more" if len(faults) > _MOST else ""
        raise UserError(f"{path}: " + "; ".join(faults[:_MOST]) + more)
    return listed


def _load(path: Path):
    def once(pairs):
        keys = [key for key, _ in pairs]
        for key in keys:
            if keys.count(key) > 1:
                raise UserError(f'{path}: "{key}" stands twice in one object: keep one of them')
        return dict(pairs)

    def no_number(text):
        raise UserError(f"{path}: {text} is no number that JSON has")

    try:
        return json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=once, parse_constant=no_number)
    except OSError as error:
        raise UserError(f"--data_backend_config: cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start}): save it as UTF-8") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}, column {error.colno}: not valid JSON: {error.msg}") from None


def _faults(sets: list[dict]) -> list[tuple[int, str]]:
    """(number of the set, sentence), in the order of the sets."""
    import jsonschema  # a tenth of a second: only for runs that need it
    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    errors = list(jsonschema.Draft202012Validator(schema).iter_errors(sets))
    mistyped = {tuple(error.absolute_path) for error in errors if error.validator == "type"}
    found = [(error.absolute_path[0], sentence) for error in errors for sentence in _sentences(error)
             if error.validator == "type" or tuple(error.absolute_path) not in mistyped]
    found += [(number, sentence) for number, each in enumerate(sets)
              for sentence in _strangers(each, schema["$defs"]["image"]["properties"])]
    return list(dict.fromkeys(sorted(found, key=lambda fault: fault[0])))


def _sentences(error) -> list[str]:
    """What is wrong, beginning with the key: `"caption_shuffle"."count" is 0: it must be at least 1`."""
    parts = [f"[{part}]" if isinstance(part, int) else f'."{part}"' for part in list(error.absolute_path)[1:]]
    name = "".join(parts).lstrip(".")
    if error.validator in ("additionalProperties", "required"):
        return [f"in {name} {sentence}" if name else sentence for sentence in _absent(error)]
    return [f"{name} {_predicate(error)}"]


def _absent(error) -> list[str]:
    """Keys that are not in the schema, or not in the file."""
    known, value = error.schema["properties"], error.instance
    if error.validator == "required":
        return [f'the key "{key}" is missing' for key in error.validator_value if key not in value]
    patterns = error.schema.get("patternProperties", ())
    unknown = [key for key in value if key not in known and not any(re.search(pattern, key) for pattern in patterns)]
    return [f'there is no key "{key}"{_near(key, known)}' for key in unknown]


def _predicate(error) -> str:
    rule, value, schema, limit = error.validator, error.instance, error.schema, error.validator_value
    shown = json.dumps(value, ensure_ascii=False)
    shown = shown if len(shown) <= 60 else shown[:60] + "..."
    reason = schema.get("x-refused", "")
    reason = reason.get(value, "") if isinstance(reason, dict) and isinstance(value, str) else reason
    if rule == "type":
        wanted = " or ".join(_TYPES[each] for each in ([limit] if isinstance(limit, str) else limit) if each != "null")
        quotes = " (without quotes)" if wanted == "true or false" and isinstance(value, str) else ""
        return f"is {shown}, which is {_KINDS[type(value)]}: it must be {wanted}{quotes}"
    if isinstance(reason, str) and reason:
        return f"is refused: {reason}" if rule == "not" else f"is {shown}: {reason}"
    if rule == "enum":
        return f"is {shown}: it must be {', '.join(map(str, limit))}{_near(str(value), map(str, limit))}"
    if rule in _LIMITS:
        return f"is {shown}: it must be {_LIMITS[rule]} {limit}"
    if rule in ("minLength", "minItems"):
        return "is empty"
    return f"is {shown}: it must be {schema.get('x-form', limit)}"


def _strangers(one: dict, known: dict) -> list[str]:
    """Keys that belong to another "type" or "dataset_type" than the set's."""
    own = {"type": one.get("type", "local"), "dataset_type": one.get("dataset_type", "image")}
    if own["dataset_type"] in ("text_embeds", "image_embeds") or own["type"] not in known["type"]["enum"]:
        return []
    near = [key for key, rule in known.items() if rule.get("x-type", own["type"]) == own["type"] and "x-refused" not in rule]
    return [f'the key "{key}" is for "{name}": "{wanted}", and this set is "{own[name]}"{_near(key, near)}'
            for key, rule in known.items() if key in one for name in own
            if (wanted := rule.get(f"x-{name.replace('_', '-')}", own[name])) != own[name]]


def _near(word: str, words) -> str:
    near = difflib.get_close_matches(word, list(words), n=1, cutoff=0.5)
    return f'; did you mean "{near[0]}"?' if near and near[0] != word else ""
