"""multidatabackend.json: what each key makes of a data set, and what is said of keys and values that make nothing."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import jsonschema
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from seeds import SD3, SDXL

from library.data.captions import Rules
from library.data.formats import simpletuner
from library.data.formats.simpletuner_schema import SCHEMA
from library.data.specs import Aspect, Described, Origin, Spec
from library.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[2]
DEFINED = json.loads(SCHEMA.read_text())["$defs"]
FLAGS = dict(resolution=(1024, 1024), resolution_type="pixel_area", caption_strategy=None, train_batch_size=4,
             vae_cache_ondemand=False, vae_cache_disable=False, random_flip=False, proportion_empty_prompts=0.0,
             prior_loss_weight=1.0, aspect_bucket_alignment=64, aspect_bucket_rounding=2, minimum_image_size=None,
             maximum_image_size=None, target_downsample_size=None, seed=None)
PHOTOS = {"id": "photos", "type": "local", "instance_data_dir": "images"}
WORDS = {"id": "words", "dataset_type": "text_embeds", "type": "local", "default": True, "cache_dir": "cache/text"}
MORE = {**WORDS, "id": "more", "default": False, "cache_dir": "b"}
MASKS = {"id": "masks", "dataset_type": "conditioning", "type": "local", "conditioning_type": "mask",
         "instance_data_dir": "masks"}
CSV = {"id": "photos", "type": "csv", "csv_file": "list.csv", "csv_caption_column": "caption", "csv_cache_dir": "fetched"}
HOSTED = {"id": "photos", "type": "huggingface", "dataset_name": "someone/photos"}
TABLE = {**PHOTOS, "caption_strategy": "parquet",
         "parquet": {"path": "t.parquet", "filename_column": "id", "caption_column": "text"}}


@pytest.fixture
def at(tmp_path):
    """A function from the text of a file and flags to what is read from it."""
    def read_text(text: str, **flags) -> Described:
        path = tmp_path / "multidatabackend.json"
        path.write_text(text, encoding="utf-8")
        return simpletuner.read(SimpleNamespace(data_backend_config=str(path), **(FLAGS | flags)))
    return read_text


@pytest.fixture
def read(at):
    return lambda *sets, **flags: at(json.dumps(sets), **flags)


@pytest.fixture
def refused(at):
    """The file is refused, in one message with all the words; returned without the path."""
    def check(what, *words: str, **flags) -> str:
        with pytest.raises(UserError) as error:
            at(what if isinstance(what, str) else json.dumps(what), **flags)
        said = str(error.value)
        assert "\n" not in said and "multidatabackend.json" in said
        for word in words:
            assert word in said, f"{word!r} is not in {said!r}"
        return said.split("multidatabackend.json", 1)[1]
    return check


# the samples of the documents that users follow

@pytest.mark.parametrize("text, name, size, latents, words", [
    (SDXL, "pseudo-camera-10k-sdxl", Aspect(1.0, "area", True, "square", "random", minimum=0.25, maximum=1.0, downsample=1.0),
     "cache/vae/sdxl/pseudo-camera-10k", "cache/text/sdxl/pseudo-camera-10k"),
    (SD3, "pseudo-camera-10k-sd3", Aspect(1024, "pixel_area", True, "square", "center", maximum=1024, downsample=1024),
     "/home/user/simpletuner/output/cache/vae/sd3/pseudo-camera-10k", "cache/text/sd3/pseudo-camera-10k")], ids=["SDXL", "SD3"])
def test_samples_of_the_quickstarts(at, tmp_path, text, name, size, latents, words):
    flag = f'{tmp_path / "multidatabackend.json"}, data set "{name}", instance_data_dir'
    origin = Origin("folder", "/home/user/simpletuner/datasets/pseudo-camera-10k", captions="filename", flag=flag)
    assert at(text) == Described([Spec(name, origin, size, Rules(bare=True), latent_dir=Path(latents))], prompt_dir=Path(words))


def test_the_example_file_is_read():
    path = str(REPOSITORY / "config/multidatabackend.json.example")
    found = simpletuner.read(SimpleNamespace(data_backend_config=path, **FLAGS))
    assert [spec.id for spec in found.specs] == ["my-images"] and found.notes == []


def test_a_set_may_say_nothing_but_where_it_is(read):
    [spec] = read({"id": "a", "instance_data_dir": "images"}).specs
    assert replace(spec, origin=replace(spec.origin, flag="")) == Spec(
        "a", Origin("folder", "images", captions="filename", flag=""), Aspect(1024), Rules(bare=True))


# every key

NEW = object()    # any other value than without the key
CHANGES = [    # (the other sets and the set itself, key, value, field of the Spec or of Described, value of the field)
    ([PHOTOS], "id", "others", "id", "others"),
    ([PHOTOS], "type", "csv", "refused", None),
    ([PHOTOS], "dataset_type", "eval", "refused", None),
    ([PHOTOS], "disabled", True, "refused", None), ([PHOTOS], "disable", True, "refused", None),
    ([PHOTOS], "instance_data_dir", "others", "origin.path", "others"),
    ([{"id": "photos"}], "instance_data_root", "others", "origin.path", "others"),
    ([CSV], "csv_file", "b.csv", "origin.path", "b.csv"), ([CSV], "csv_caption_column", "b", "origin.caption_column", "b"),
    ([CSV], "csv_url_column", "b", "origin.name_column", "b"), ([CSV], "csv_cache_dir", "b", "origin.downloads", "b"),
    ([HOSTED], "dataset_name", "b", "origin.path", "b"), ([HOSTED], "dataset_config", "b", "origin.config", "b"),
    ([HOSTED], "split", "b", "origin.split", "b"), ([HOSTED], "revision", "b", "origin.revision", "b"),
    ([HOSTED], "streaming", True, "origin.streaming", True), ([HOSTED], "image_column", "b", "origin.image_column", "b"),
    ([HOSTED], "caption_column", "b", "origin.caption_column", "b"),
    ([HOSTED], "caption_column", ["b"], "origin.caption_column", "b"),
    ([HOSTED], "fallback_caption_column", "b", "origin.fallback_column", "b"),
    ([HOSTED], "cache_dir", "b", "origin.downloads", "b"),
    ([HOSTED], "huggingface", {"caption_column": "b"}, "origin.caption_column", "b"),
    ([TABLE], "parquet", {**TABLE["parquet"], "path": "b.jsonl"}, "origin.table", "b.jsonl"),
    ([PHOTOS], "resolution", 512, "size.resolution", 512), ([PHOTOS], "resolution_type", "pixel", "size.unit", "pixel"),
    ([PHOTOS], "resolution_type", "area", "size.resolution", 1.048576),
    ([PHOTOS], "minimum_image_size", 512, "size.minimum", 512),
    ([{**PHOTOS, "target_downsample_size": 1024}], "maximum_image_size", 1536, "size.maximum", 1536),
    ([{**PHOTOS, "maximum_image_size": 1536}], "target_downsample_size", 1280, "size.downsample", 1280),
    ([PHOTOS], "minimum_aspect_ratio", 0.5, "size.min_ratio", 0.5), ([PHOTOS], "maximum_aspect_ratio", 2, "size.max_ratio", 2),
    ([PHOTOS], "crop", True, "size.crop", True),
    ([{**PHOTOS, "crop": True}], "crop_aspect", "preserve", "size.aspect", "preserve"),
    ([{**PHOTOS, "crop": True}], "crop_style", "corner", "size.style", "corner"),
    ([{**PHOTOS, "crop": True}], "crop_style", "centre", "size.style", "center"),
    ([{**PHOTOS, "crop": True, "crop_aspect": "random"}], "crop_aspect_buckets", [1, {"aspect": 0.5, "weight": 3}],
     "size.choices", ((1.0, 1.0), (0.5, 3.0))),
    ([{**PHOTOS, "crop": True, "crop_aspect": "closest"}], "crop_aspect_buckets", [1.5, {"aspect": 0.5}],
     "size.choices", ((1.5, 1.0), (0.5, 1.0))),
    ([{**PHOTOS, "crop": True}], "max_upscale_threshold", 0.2, "size.max_upscale", 0.2),
    ([PHOTOS], "caption_strategy", "textfile", "origin.lines", "each"),
    ([PHOTOS], "caption_strategy", "textfile", "origin.extensions", (".txt",)),
    ([{**CSV, "instance_prompt": "a"}], "caption_strategy", "instanceprompt", "origin.captions", "phrase"),
    ([{**PHOTOS, "caption_strategy": "textfile"}], "disable_multiline_split", True, "origin.lines", "whole"),
    ([{**PHOTOS, "caption_strategy": "instanceprompt"}], "instance_prompt", ["a", "b"], "origin.phrases", ("a", "b")),
    ([{**PHOTOS, "instance_prompt": "a dog"}], "prepend_instance_prompt", True, "text.prefix", "a dog"),
    ([{**PHOTOS, "instance_prompt": "a dog"}], "only_instance_prompt", True, "origin.phrases", ("a dog",)),
    ([{**HOSTED, "instance_prompt": "a dog"}], "only_instance_prompt", True, "origin.captions", "phrase"),
    ([PHOTOS], "caption_shuffle", {"enable": True}, "text", Rules(shuffle=True, orders=1, original=True, bare=True)),
    ([PHOTOS], "repeats", 3, "rate", 4.0), ([{**PHOTOS, "repeats": 1}], "probability", 0.25, "rate", 0.5),
    ([PHOTOS], "max_num_samples", 7, "max_samples", 7), ([PHOTOS], "train_batch_size", 2, "batch_size", 2),
    ([PHOTOS], "is_regularisation_data", True, "weight", 0.3),
    ([PHOTOS], "is_regularization_data", True, "regularisation", True),
    ([MASKS, PHOTOS], "conditioning_data", "masks", "mask", "masks"),
    ([MASKS, PHOTOS], "conditioning_data", ["masks"], "mask", "masks"),
    ([{**PHOTOS, "conditioning_data": "masks"}, {key: MASKS[key] for key in MASKS if key != "conditioning_type"}],
     "conditioning_type", "mask", "mask", "masks"),
    ([PHOTOS, MASKS], "source_dataset_id", "photos", "mask", "masks"),
    ([WORDS, MORE, PHOTOS], "text_embeds", "more", "prompt_dir", Path("b")),
    ([{"id": "kept", "dataset_type": "image_embeds", "cache_dir": "b"}, PHOTOS], "image_embeds", "kept", "latent_dir", Path("b")),
    ([PHOTOS], "cache_dir_vae", "b", "latent_dir", Path("b")), ([PHOTOS], "vae_cache_ondemand", True, "latents", "ondemand"),
    ([{**PHOTOS, "vae_cache_ondemand": True}], "vae_cache_disable", True, "latents", "off"),
    ([{**PHOTOS, "crop": True}], "vae_cache_clear_each_epoch", True, "every_cut_new", True),
    ([{**PHOTOS, "crop": True}], "vae_cache_clear_each_epoch", True, "latents", "off"),
    ([PHOTOS], "skip_file_discovery", "vae, metadata", "only_known", True),
    ([PHOTOS], "skip_file_discovery", "aspect text", "only_known", True),
]
OF_WORDS = [
    ([WORDS], "id", "photos", "refused", None), ([WORDS], "dataset_type", "image", "refused", None),
    ([WORDS], "disabled", True, "prompt_dir", None), ([WORDS], "disable", True, "prompt_dir", None),
    ([{**WORDS, "id": "more"}, {**WORDS, "default": False, "cache_dir": "b"}], "default", True, "refused", None),
    ([WORDS], "cache_dir", "b", "prompt_dir", Path("b")), ([WORDS], "text_encoder_batch_size", 3, "prompt_batch_size", 3),
    ([WORDS], "text_cache_ondemand", True, "prompts", "ondemand"),
    ([{**WORDS, "text_cache_ondemand": True}], "text_cache_disable", True, "prompts", "off"),
]
KEPT = {"id": "kept", "dataset_type": "image_embeds", "cache_dir": "a"}
OF_LATENTS = [
    ([KEPT], "id", "other", "refused", None), ([KEPT], "dataset_type", "text_embeds", "refused", None),
    ([KEPT], "disabled", True, "refused", None), ([KEPT], "disable", True, "refused", None),
    ([KEPT], "cache_dir", "b", "latent_dir", Path("b")),
]


def field(described: Described, path: str):
    names = path.split(".")
    found = described if names[0] in asdict(Described([])) else described.specs[0]
    for name in names:
        found = getattr(found, name)
    return found


def changes(read, before, after, name, value):
    if name == "refused":
        read(*before)
        with pytest.raises(UserError):
            read(*after)
        return
    found = read(*after, prior_loss_weight=0.3)
    assert field(found, name) == value
    try:
        assert field(read(*before, prior_loss_weight=0.3), name) != value
    except UserError:    # the key is needed
        pass


@pytest.mark.parametrize("sets, key, value, name, expected", CHANGES, ids=[f"{key} {name}" for _, key, _, name, _ in CHANGES])
def test_each_key_of_an_image_set_changes_the_result(read, sets, key, value, name, expected):
    changes(read, sets, [*sets[:-1], {**sets[-1], key: value}], name, expected)


@pytest.mark.parametrize("sets, key, value, name, expected", OF_WORDS, ids=[key for _, key, *_ in OF_WORDS])
def test_each_key_of_a_text_embeds_set_changes_the_result(read, sets, key, value, name, expected):
    changes(read, [PHOTOS, *sets], [PHOTOS, *sets[:-1], {**sets[-1], key: value}], name, expected)


@pytest.mark.parametrize("sets, key, value, name, expected", OF_LATENTS, ids=[key for _, key, *_ in OF_LATENTS])
def test_each_key_of_an_image_embeds_set_changes_the_result(read, sets, key, value, name, expected):
    owner = {**PHOTOS, "image_embeds": "kept"}
    changes(read, [owner, *sets], [owner, *sets[:-1], {**sets[-1], key: value}], name, expected)


NESTED = [
    ("caption_shuffle", {"enable": True}, "count", 3, "text.orders", 3),
    ("caption_shuffle", {"enable": True}, "seed", 3, "text.seed", 3),
    ("caption_shuffle", {"enable": True}, "split_on", "space", "text.separator", " "),
    ("caption_shuffle", {"enable": True}, "split_on", "period", "text.separator", "."),
    ("caption_shuffle", {"enable": True}, "position_start", 2, "text.keep", 2),
    ("caption_shuffle", {"enable": True}, "include_original", False, "text.original", False),
    ("caption_shuffle", {}, "enable", True, "text.shuffle", True),
    ("parquet", TABLE["parquet"], "path", "b.jsonl", "origin.table", "b.jsonl"),
    ("parquet", TABLE["parquet"], "filename_column", "b", "origin.name_column", "b"),
    ("parquet", TABLE["parquet"], "caption_column", "b", "origin.caption_column", "b"),
    ("parquet", TABLE["parquet"], "fallback_caption_column", "b", "origin.fallback_column", "b"),
    ("parquet", TABLE["parquet"], "identifier_includes_extension", True, "origin.names_have_extension", True),
    *(("huggingface", {}, key, value, name, value) for key, value, name in (
        ("dataset_config", "b", "origin.config"), ("split", "b", "origin.split"), ("revision", "b", "origin.revision"),
        ("streaming", True, "origin.streaming"), ("image_column", "b", "origin.image_column"),
        ("caption_column", "b", "origin.caption_column"), ("fallback_caption_column", "b", "origin.fallback_column"),
        ("cache_dir", "b", "origin.downloads"), ("dataset_name", "someone/photos", "origin.path"))),
]


def around(block: str) -> dict:
    return {"caption_shuffle": PHOTOS, "parquet": TABLE, "huggingface": {"id": "photos", "type": "huggingface"}}[block]


@pytest.mark.parametrize("block, inside, key, value, name, expected", NESTED, ids=[f"{each[0]} {each[2:4]}" for each in NESTED])
def test_each_key_of_a_block_changes_the_result(read, block, inside, key, value, name, expected):
    one = {**around(block), block: inside}
    if block == "huggingface" and key != "dataset_name":
        one["dataset_name"] = "someone/photos"
    changes(read, [one], [{**one, block: {**inside, key: value}}], name, expected)


# (where, key, its rule) of every key there is
KEYS = [((kind,), key, rule) for kind in ("image", "text_embeds", "image_embeds")
        for key, rule in DEFINED[kind]["properties"].items()]
KEYS += [(("image", block), key, rule) for block in ("caption_shuffle", "parquet", "huggingface")
         for key, rule in DEFINED["image"]["properties"][block]["properties"].items()]


def resolved(rule: dict) -> dict:
    """A rule with what it refers to."""
    while "$ref" in rule:
        found = json.loads(SCHEMA.read_text())
        for part in rule["$ref"].removeprefix("#/").split("/"):
            found = found[part]
        rule = {**found, **{key: value for key, value in rule.items() if key != "$ref"}}
    return rule


def place(where: tuple, key: str, value) -> list[dict]:
    """Data sets that are right but for this key."""
    if where[0] == "image":
        kind = resolved(DEFINED["image"]["properties"][where[-1] if len(where) > 1 else key]).get("x-type", "local")
        one = {"local": PHOTOS, "csv": CSV, "huggingface": HOSTED}[kind]
        if len(where) == 1:
            return [{**one, key: value}]
        inside = {**(TABLE["parquet"] if where[1] == "parquet" else {}), key: value}
        return [{**one, where[1]: inside}]
    return [PHOTOS, {**(WORDS if where[0] == "text_embeds" else KEPT), key: value}]


def test_every_key_is_tried():
    tried = {("image", key) for _, key, *_ in CHANGES} | {("text_embeds", key) for _, key, *_ in OF_WORDS}
    tried |= {("image_embeds", key) for _, key, *_ in OF_LATENTS} | {("image", block, key) for block, _, key, *_ in NESTED}
    left = {(*where, key) for where, key, rule in KEYS if not {"x-here", "x-refused", "const"} & resolved(rule).keys()}
    left |= {("image", key) for key in ("type", "dataset_type", "crop_style", "conditioning_type", "caption_strategy")}
    untold = {("text_embeds", "skip_file_discovery"), ("image_embeds", "skip_file_discovery")}    # nothing is scanned there
    assert left - tried == untold


ALWAYS = [each for each in KEYS if resolved(each[2]).get("x-here") == "always"]


@pytest.mark.parametrize("where, key, rule", ALWAYS, ids=[" ".join((*where, key)) for where, key, _ in ALWAYS])
def test_what_is_always_done_is_accepted_and_of_the_right_type(read, refused, where, key, rule):
    kind = resolved(rule).get("type")
    right = {"boolean": [True, False], "integer": [1, 300], "string": ["width"]}.get(kind) or resolved(rule)["enum"]
    without = read(*place(where, key, right[0]))
    for value in right:
        assert read(*place(where, key, value)) == without
    for value in ("False", 1.5, []):
        if not (kind == "string" and isinstance(value, str)):
            refused(place(where, key, value), f'"{key}"')


REFUSED = [each for each in KEYS if isinstance(resolved(each[2]).get("x-refused"), str)]


@pytest.mark.parametrize("where, key, rule", REFUSED, ids=[" ".join((*where, key)) for where, key, _ in REFUSED])
def test_what_is_not_done_here_is_refused_with_the_reason(refused, where, key, rule):
    rule = resolved(rule)
    value = {"boolean": True, "integer": 5, "number": 0.5}.get(rule.get("type"), 3)
    refused(place(where, key, value), 'data set "', f'"{key}"', rule["x-refused"])


VALUES = [(where[0], key, value, reason) for where, key, rule in KEYS if len(where) == 1
          if isinstance(resolved(rule).get("x-refused"), dict) for value, reason in resolved(rule)["x-refused"].items()]


@pytest.mark.parametrize("kind, key, value, reason", VALUES, ids=[" ".join(each[:3]) for each in VALUES])
def test_values_that_mean_nothing_here_are_refused_with_the_reason(refused, kind, key, value, reason):
    one = {"image": PHOTOS, "text_embeds": WORDS, "image_embeds": KEPT}[kind]
    refused([PHOTOS, {**one, "id": "x", key: value}], 'data set "x"', f'"{key}" is "{value}": {reason}')


@pytest.mark.parametrize("key", ["aws_bucket_name", "aws_region_name", "memory_filesystem_size"])
def test_whole_families_of_keys_are_refused(refused, key):
    for one in (PHOTOS, WORDS):
        refused([PHOTOS, {**one, "id": "x", key: None}], 'data set "x"', f'"{key}"', "refused")


@pytest.mark.parametrize("where, key, rule", KEYS, ids=[" ".join((*where, key)) for where, key, _ in KEYS])
def test_wrong_types_are_named(refused, where, key, rule):
    kinds = resolved(rule).get("type", [])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    for name, value in (("boolean", True), ("integer", 7), ("string", "False"), ("array", [[]]), ("object", {"x": 1})):
        if kinds and name not in kinds and not (name == "integer" and "number" in kinds):
            said = refused(place(where, key, value), f'"{key}"', f"is {json.dumps(value)}", "it must be")
            assert "without quotes" in said or kinds != ["boolean"] or name != "string"


def test_values_out_of_range_are_named(refused):
    for key, value, words in (("repeats", -1, "at least 0"), ("probability", 0, "more than 0"), ("resolution", 0, "more than 0"),
                              ("max_upscale_threshold", 1.5, "at most 1"), ("crop_aspect", "sqare", 'did you mean "square"'),
                              ("id", "", "empty"), ("skip_file_discovery", "vae, texts", "vae, aspect, metadata and text"),
                              ("conditioning_data", ["a", "b"], "one set of masks"), ("repeats", 1.5, "a whole number"),
                              ("crop_aspect_buckets", [1.0, 0], '"crop_aspect_buckets"[1]'), ("crop_aspect_buckets", [], "empty"),
                              ("crop_aspect_buckets", [{"weight": 1}], 'in "crop_aspect_buckets"[0] the key "aspect" is missing'),
                              ("caption_shuffle", {"count": 0}, '"caption_shuffle"."count" is 0: it must be at least 1')):
        refused([{**PHOTOS, key: value}], words, f'"{key}"' if key != "id" else "data set number 1")


# typing mistakes

# a letter between the two may be as near to the other one
ALIKE = {"is_regularisation_data": {"is_regularization_data"}, "is_regularization_data": {"is_regularisation_data"},
         "disable": {"disabled"}, "disabled": {"disable"}, "maximum_image_size": {"minimum_image_size"},
         "maximum_aspect_ratio": {"minimum_aspect_ratio"}}


@st.composite
def mistyped(draw):
    """(where, key, the key with one letter too few, too many, changed, or two of them swapped)."""
    where, key, _ = draw(st.sampled_from(KEYS))
    at = draw(st.integers(0, len(key) - 1))
    letter = draw(st.sampled_from("abcdefghijklmnopqrstuvwxyz_"))
    typed = draw(st.sampled_from([key[:at] + key[at + 1:], key[:at] + letter + key[at:], key[:at] + letter + key[at + 1:],
                                  key[:at] + key[at + 1:at + 2] + key[at] + key[at + 2:]]))
    return where, key, typed


@given(mistyped())
def test_misspelt_keys_are_refused_with_the_right_one(tmp_path_factory, typo):
    where, key, typed = typo
    rules = DEFINED["image"]["properties"][where[1]] if len(where) > 1 else DEFINED[where[0]]
    assume(typed and typed not in rules["properties"] and not typed.startswith(("aws_", "memory_filesystem_")))
    sets = place(where, typed, 1) if len(where) > 1 or typed in DEFINED["image"]["properties"] else [PHOTOS, {
        **{"image": PHOTOS, "text_embeds": WORDS, "image_embeds": KEPT}[where[0]], typed: 1}]
    path = tmp_path_factory.mktemp("typo") / "m.json"
    path.write_text(json.dumps(sets))
    with pytest.raises(UserError) as error:
        simpletuner.read(SimpleNamespace(data_backend_config=str(path), **FLAGS))
    said = str(error.value)
    assert f'there is no key "{typed}"' in said
    assert any(f'did you mean "{each}"?' in said for each in {key} | ALIKE.get(key, set())) or (key == "id" and '"id" is' in said)


def test_keys_of_another_type_are_named(refused):
    refused([{**PHOTOS, "cache_dir": "x"}], '"cache_dir" is for "type": "huggingface"', 'this set is "local"', '"cache_dir_vae"')
    refused([{**PHOTOS, "csv_file": "x"}], '"csv_file" is for "type": "csv"')
    refused([{**HOSTED, "instance_data_dir": "x"}], '"instance_data_dir" is for "type": "local"')
    refused([{**PHOTOS, "source_dataset_id": "x"}], '"source_dataset_id" is for "dataset_type": "conditioning"')
    refused([{**PHOTOS, "default": True}], 'there is no key "default"')
    refused([PHOTOS, {**WORDS, "cache_dir_vae": "x"}], 'there is no key "cache_dir_vae"', 'did you mean "cache_dir"')


def test_all_mistakes_are_told_at_once(refused):
    said = refused([{**PHOTOS, "crop": "False", "resolutoin": 1}, {**PHOTOS, "id": "b", "repeats": "2"}])
    assert all(word in said for word in ('data set "photos"', '"crop"', 'did you mean "resolution"', 'data set "b"', '"repeats"'))
    said = refused([{**PHOTOS, "resolution": 1.0}, {"id": "b"}])
    assert '"resolution"' in said and 'data set "b": "instance_data_dir" is missing' in said
    assert "no file of yours" not in refused([{**PHOTOS, "delete_unwanted_images": "False"}], "it must be true or false")
    assert "and 2 more" in refused([{**PHOTOS, **{f"{letter}{letter}{letter}": 1 for letter in "klmnopqrsz"}}])


# sets that do not go together

CLASHES = [
    ([PHOTOS, PHOTOS], ['"id"', "2 data sets", '"photos"']),
    ([PHOTOS, {**WORDS, "id": "photos"}], ['"id"', '"photos"']),
    ([WORDS], ["no data set to train on"]), ([], ["no data set in it"]),
    ([{**PHOTOS, "disabled": True}], ["every data set is disabled"]),
    ([{**PHOTOS, "cache_dir_vae": "x"}, {**PHOTOS, "id": "b", "cache_dir_vae": "./x/"}],
     ['"cache_dir_vae"', '"photos"', '"b"', "one folder"]),
    ([{**PHOTOS, "cache_dir_vae": "cache/text"}, WORDS],
     ['"cache_dir_vae" of data set "photos"', '"cache_dir" of data set "words"']),
    ([{**CSV, "cache_dir_vae": "fetched"}], ['"csv_cache_dir"', "one folder"]),
    ([{**HOSTED, "cache_dir_vae": "x", "huggingface": {"cache_dir": "x"}}], ['"cache_dir_vae"', "one folder"]),
    ([KEPT, {**PHOTOS, "image_embeds": "kept"}, {**PHOTOS, "id": "b", "image_embeds": "kept"}], ['"image_embeds"', "one folder"]),
    ([PHOTOS, {**WORDS, "default": False}, {**WORDS, "id": "more", "default": False}], ['"default"', "none", "words, more"]),
    ([PHOTOS, WORDS, {**WORDS, "id": "more"}], ['"default"', "2 of the text_embeds sets"]),
    ([{**PHOTOS, "text_embeds": "word"}, WORDS], ['"text_embeds" names "word"', 'did you mean "words"']),
    ([{**PHOTOS, "text_embeds": "more"}, {**PHOTOS, "id": "b"}, WORDS, MORE], ['"text_embeds"', "more and words", "one place"]),
    ([{**PHOTOS, "image_embeds": "b"}], ['data set "photos": "image_embeds" names "b"']),
    ([{**PHOTOS, "conditioning_data": "mask"}, {**MASKS, "source_dataset_id": "photos"}],
     ['"conditioning_data"', "one mask", "mask and masks"]),
    ([{**PHOTOS, "conditioning_data": "mask"}], ['"conditioning_data" names "mask"']),
    ([{**PHOTOS, "conditioning_data": "masks"}, {**MASKS, "disabled": True}], ['"conditioning_data" names "masks"', "in use"]),
    ([PHOTOS, MASKS], ['data set "masks"', "belong to no images"]),
    ([PHOTOS, {**MASKS, "source_dataset_id": "photo"}], ['names "photo"', 'did you mean "photos"']),
    ([PHOTOS, {**CSV, "id": "masks", "dataset_type": "conditioning", "conditioning_type": "mask"}],
     ['data set "masks"', '"type" is "csv"']),
    ([{"id": "a"}], ['data set "a"', '"instance_data_dir" is missing']),
    ([{"id": "a", "type": "csv"}], ['"csv_file" and "csv_cache_dir" and "csv_caption_column" are missing']),
    ([{"id": "a", "type": "huggingface"}], ['"dataset_name" is missing']),
    ([{"type": "local"}], ["data set number 1", '"id" is missing']),
    ([{**PHOTOS, "instance_data_root": "x"}], ['"instance_data_dir" and "instance_data_root"']),
    ([{**PHOTOS, "is_regularisation_data": True, "is_regularization_data": False}], ['"is_regularisation_data" and']),
    ([{**HOSTED, "split": "a", "huggingface": {"split": "b"}}], ['"split" is "a"', '"b" in "huggingface"']),
    ([{**PHOTOS, "caption_strategy": "csv"}], ['"caption_strategy" is "csv"', '"type": "local"']),
    ([{**PHOTOS, "caption_strategy": "parquet"}], ['"parquet" is missing']),
    ([{**PHOTOS, "caption_strategy": "parquet", "parquet": {"path": "x"}}], ['in "parquet" the key "filename_column" is']),
    ([{**PHOTOS, "caption_strategy": "instanceprompt"}], ['"instance_prompt" is missing']),
    ([{**PHOTOS, "only_instance_prompt": True}], ['"instance_prompt" is missing']),
    ([{**PHOTOS, "prepend_instance_prompt": True}], ['"prepend_instance_prompt" needs']),
    ([{**PHOTOS, "prepend_instance_prompt": True, "instance_prompt": ["a", "b"]}], ['"prepend_instance_prompt" needs one']),
    ([{**PHOTOS, "crop": True, "crop_aspect": "closest"}], ['"crop_aspect_buckets" is missing', '"closest"']),
    ([{**PHOTOS, "crop": True, "crop_aspect": "random"}], ['"crop_aspect_buckets" is missing', '"random"']),
    ([{**PHOTOS, "maximum_image_size": 1024}], ['"maximum_image_size" needs "target_downsample_size"']),
    ([{**PHOTOS, "target_downsample_size": 1024}], ['"target_downsample_size" needs "maximum_image_size"']),
    ([{**PHOTOS, "maximum_image_size": 1024, "target_downsample_size": 1025}], ['"target_downsample_size" 1025 is more than']),
    ([{**PHOTOS, "minimum_aspect_ratio": 2, "maximum_aspect_ratio": 1}], ['"minimum_aspect_ratio" 2 is more than']),
    ([{**PHOTOS, "resolution": 1024, "resolution_type": "area"}], ['"resolution" is 1024', "megapixels", "1.049", "pixel_area"]),
    ([{**PHOTOS, "minimum_image_size": 512, "resolution_type": "area"}], ['"minimum_image_size" is 512', "megapixels"]),
    ([{**PHOTOS, "resolution": 1.0}], ['"resolution" is 1', "pixels", "1000", '"area"']),
    ([{**PHOTOS, "minimum_image_size": 0.25}], ['"minimum_image_size" is 0.25', "pixels", "500"]),
    ([{**PHOTOS, "resolution": 24}], ['"resolution" is 24 pixels', "--aspect_bucket_alignment 64"]),
]


@pytest.mark.parametrize("sets, words", CLASHES, ids=[words[0][:40] for _, words in CLASHES])
def test_sets_that_make_no_run(refused, sets, words):
    refused(sets, *words)


def test_sets_that_go_together(read):
    """What looks like a clash, and is none."""
    both = read({**PHOTOS, "text_embeds": "more"}, {**PHOTOS, "id": "b", "text_embeds": "more"}, WORDS, MORE)
    assert both.prompt_dir == Path("b")    # the default is nobody's
    assert read(PHOTOS).prompt_dir is None    # SimpleTuner wants a text_embeds set; the run's own cache will do
    assert read(PHOTOS, {**PHOTOS, "disabled": True}).specs == read(PHOTOS).specs
    assert read(PHOTOS, {"id": "b", "type": "aws", "nonsense": 1, "disable": True}).specs == read(PHOTOS).specs
    assert read(PHOTOS, {**WORDS, "default": False}).prompt_dir == Path("cache/text")    # the only one is the default
    uncaptioned = {key: CSV[key] for key in CSV if key != "csv_caption_column"}
    assert read({**uncaptioned, "caption_strategy": "instanceprompt", "instance_prompt": "a"}).specs[0].origin.phrases == ("a",)
    assert len(read({**HOSTED, "cache_dir": "x"}, {**HOSTED, "id": "b", "cache_dir": "x"}).specs) == 2
    assert read({**PHOTOS, "cache_dir_vae": ""}, {**PHOTOS, "id": "b", "cache_dir_vae": ""}).specs[1].latent_dir is None
    unsaid = read({**CSV, "image_embeds": "kept", "cache_dir_vae": "y"}, {"id": "kept", "type": "local"})    # untold
    assert [spec.latent_dir for spec in unsaid.specs] == [Path("y")]
    held_out = read(PHOTOS, {**PHOTOS, "id": "b", "dataset_type": "eval", "conditioning_data": "masks"},
                    {**MASKS, "source_dataset_id": "b"})
    assert [(spec.id, spec.evaluation, spec.mask) for spec in held_out.specs] == [("photos", False, None), ("b", True, "masks")]


# what the flags say

def test_flags_count_where_the_set_says_nothing(read):
    flags = dict(resolution=(512, 512), resolution_type="pixel", caption_strategy="textfile", random_flip=True,
                 proportion_empty_prompts=0.1, aspect_bucket_alignment=8, aspect_bucket_rounding=1, minimum_image_size=256.0,
                 maximum_image_size=900.0, target_downsample_size=700.0, vae_cache_ondemand=True, prior_loss_weight=0.5, seed=9)
    [spec] = read({**PHOTOS, "caption_shuffle": {"enable": True}}, **flags).specs
    assert spec.size == Aspect(512, "pixel", minimum=256, maximum=900, downsample=700, alignment=8, rounding=1)
    assert (spec.flip, spec.origin.captions, spec.latents, spec.weight) == (True, "textfile", "ondemand", 1.0)
    assert spec.text.empty == 0.1 and spec.text.seed == 9
    assert read(PHOTOS, vae_cache_disable=True).specs[0].latents == "off"
    said = {**PHOTOS, "resolution": 768, "resolution_type": "pixel_area", "caption_strategy": "filename", "minimum_image_size": 0,
            "maximum_image_size": 1000, "target_downsample_size": 800, "caption_shuffle": {"enable": True, "seed": 3}}
    [spec] = read(said, **flags).specs
    assert (spec.size.resolution, spec.size.unit, spec.size.minimum, spec.size.maximum) == (768, "pixel_area", 0, 1000)
    assert spec.origin.captions == "filename" and spec.text.seed == 3
    assert read(CSV, caption_strategy="textfile").specs[0].origin.captions == "column"    # a list of addresses has no text files


def test_a_size_of_two_numbers_is_no_resolution(refused):
    refused([PHOTOS], '"resolution" is missing', "--resolution 1024,768", resolution=(1024, 768))
    refused([{**PHOTOS, "resolution": 1.0, "resolution_type": "area"}], "--minimum_image_size is 512", minimum_image_size=512.0)


def test_what_changes_nothing_is_told(read):
    one = {**PHOTOS, "crop_style": "center", "crop_aspect_buckets": [1], "instance_prompt": "a", "disable_multiline_split": True,
           "parquet": TABLE["parquet"], "vae_cache_clear_each_epoch": True}
    notes = read(one).notes
    assert all(note.startswith('data set "photos": "') and "no effect without" in note for note in notes)
    named = " ".join(notes)
    assert all(f'"{key}" ' in named for key in one.keys() - PHOTOS.keys()) and len(notes) == 6
    assert not read(one).specs[0].every_cut_new and read(one).specs[0].latents == "disk"


def test_a_table_is_looked_for_here_and_in_the_images_folder(read, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    (tmp_path / "images/t.parquet").write_bytes(b"")
    assert read(TABLE).specs[0].origin.table == "images/t.parquet"
    (tmp_path / "t.parquet").write_bytes(b"")
    assert read(TABLE).specs[0].origin.table == "t.parquet"


# files that are no files of data sets

@pytest.mark.parametrize("text, words", [
    ('[\n  {"id": a}\n]', ["line 2, column 10", "not valid JSON"]), ("", ["line 1, column 1"]), ("{}", ["a list in brackets"]),
    ("[1]", ["data sets in braces"]), ('[{"id": "a", "id": "b"}]', ['"id" stands twice']),
    ('[{"id": "a", "resolution": NaN}]', ["NaN"]),
    ('[{"id": "a", "crop": "False"}]',
     ['data set "a"', '"crop" is "False", which is text: it must be true or false (without quotes)']),
    ('[{"id": "a", "disabled": 1}]', ['"disabled" is 1, which is a number: it must be true or false']),
])
def test_files_that_cannot_be_read(refused, text, words):
    refused(text, *words)


def test_a_file_that_is_not_there_or_not_utf8(tmp_path):
    path = tmp_path / "m.json"
    with pytest.raises(UserError, match=r"--data_backend_config: cannot read .*m\.json"):
        simpletuner.read(SimpleNamespace(data_backend_config=str(path), **FLAGS))
    path.write_bytes('[{"id": "ä"}]'.encode("latin-1"))
    with pytest.raises(UserError, match=r"m\.json is not UTF-8"):
        simpletuner.read(SimpleNamespace(data_backend_config=str(path), **FLAGS))
    path.write_bytes(json.dumps([PHOTOS]).encode("utf-8-sig"))
    assert simpletuner.read(SimpleNamespace(data_backend_config=str(path), **FLAGS)).specs[0].id == "photos"


# the schema and the page about it

def test_the_schema_is_one_and_describes_every_key():
    jsonschema.Draft202012Validator.check_schema(json.loads(SCHEMA.read_text()))
    for where, key, rule in KEYS:
        rule = resolved(rule)
        assert rule.get("description") or rule.get("x-refused"), (where, key)


def test_the_page_names_every_key():
    page = (REPOSITORY / "docs/coming_from_simpletuner.md").read_text()
    same, always, refused = (page.split(f"## {title}", 1)[1].split("\n## ", 1)[0] for title in (
        "Keys that do the same", "Keys that need nothing here", "Keys and values that are refused"))
    for where, key, rule in KEYS:
        rule = resolved(rule)
        wanted = always if rule.get("x-here") else refused if isinstance(rule.get("x-refused"), str) else same
        assert f"`{key}`" in wanted or f".{key}`" in wanted, (where, key)
        for value in rule["x-refused"] if isinstance(rule.get("x-refused"), dict) else ():
            assert f"`{value}`" in refused, (key, value)
