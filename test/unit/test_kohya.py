"""kohya's data set files, folders and metadata: every key does what it says, goes down the sections, or is refused by name."""

import json
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from files import png
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from library import flags_data
from library.data.captions import Rules
from library.data.formats import kohya, kohya_keys
from library.data.specs import Buckets, Fixed, Spec
from library.errors import UserError
from library.parser import Parser

EXAMPLE = Path(__file__).resolve().parents[2] / "config/dataset.toml.example"
SAME_FOLDER = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


def flags(*given: str):
    """The arguments of a command line."""
    parser = Parser("test")
    flags_data.add_data_flags(parser)
    flags_data.add_cache_flags(parser)
    return parser.parse_args(list(given))


def toml(general: dict, datasets: list[dict]) -> str:
    """datasets: each {..., "subsets": [{...}]}. JSON's values are TOML's, too, but for objects."""
    def written(value):
        pairs = ", ".join(f"{key} = {written(each)}" for key, each in value.items()) if isinstance(value, dict) else ""
        return f"{{{pairs}}}" if isinstance(value, dict) else json.dumps(value)

    def lines(table):
        return [f"{key} = {written(value)}" for key, value in table.items() if key != "subsets"]

    text = ["[general]", *lines(general)]
    for dataset in datasets:
        text += ["[[datasets]]", *lines(dataset)]
        for subset in dataset.get("subsets", []):
            text += ["[[datasets.subsets]]", *lines(subset)]
    return "\n".join(text)


def read(folder: Path, general: dict, datasets: list[dict], *given: str, form: str = "toml"):
    path = folder / f"config.{form}"
    content = json.dumps({"general": general, "datasets": datasets}) if form == "json" else toml(general, datasets)
    path.write_text(content, encoding="utf-8")
    return kohya.read_config(flags(f"--dataset_config={path}", *given))


def read_one(folder: Path, subset: dict, dataset: dict | None = None, general: dict | None = None, *given: str) -> Spec:
    described = read(folder, general or {}, [{**(dataset or {}), "subsets": [{"image_dir": "images", **subset}]}], *given)
    assert len(described.specs) == 1
    return described.specs[0]


def refused(call, *words: str) -> None:
    """The call is refused, in one message with all the words."""
    with pytest.raises(UserError) as error:
        call()
    for word in words:
        assert word in str(error.value), f"{word!r} is not in {error.value}"


# every key: a value, and what it changes in the set ("size.step" is a field of the size)
BUCKETS = {"enable_bucket": True}
CHANGES = [
    ("batch_size", 3, {}, {"batch_size": 3}),
    ("resolution", 512, {}, {"size.size": (512, 512)}),
    ("resolution", [512, 768], {}, {"size.size": (512, 768)}),
    ("resolution", [512, 768], BUCKETS, {"size.resolution": (512, 768)}),
    ("min_bucket_reso", 128, BUCKETS, {"size.shortest": 128}),
    ("max_bucket_reso", 2048, BUCKETS, {"size.longest": 2048}),
    ("bucket_reso_steps", 32, BUCKETS, {"size.step": 32}),
    ("bucket_no_upscale", True, BUCKETS, {"size.no_upscale": True}),
    ("random_crop", True, BUCKETS, {"size.style": "random"}),
    ("random_crop", False, {}, {"size.style": "center"}),
    *(("resize_interpolation", theirs, {}, {"interpolation": ours}) for theirs, ours in (
        ("lanczos", "lanczos"), ("nearest", "nearest"), ("bilinear", "bilinear"), ("linear", "bilinear"), ("bicubic", "bicubic"),
        ("cubic", "bicubic"), ("area", "box"))),
    ("num_repeats", 7, {}, {"rate": 7.0}),
    ("shuffle_caption", True, {}, {"text.shuffle": True}),
    ("caption_separator", ";", {}, {"text.separator": ";"}),
    ("keep_tokens", 2, {}, {"text.keep": 2}),
    ("keep_tokens_separator", "|||", {}, {"text.keep_separator": "|||"}),
    ("secondary_separator", ";;", {}, {"text.secondary": ";;"}),
    ("enable_wildcard", True, {}, {"text.wildcard": True, "origin.lines": "each"}),
    ("color_aug", True, {}, {"colour": True}),
    ("flip_aug", True, {}, {"flip": True}),
    ("caption_prefix", "photo of", {}, {"text.prefix": "photo of"}),
    ("caption_suffix", "in snow", {}, {"text.suffix": "in snow"}),
    ("caption_dropout_rate", 0.1, {}, {"text.empty": 0.1}),
    ("caption_dropout_every_n_epochs", 3, {}, {"text.empty_every": 3}),
    ("caption_tag_dropout_rate", 1, {}, {"text.tag_dropout": 1}),
    ("token_warmup_min", 3, {}, {"text.warmup_min": 3}),
    ("token_warmup_step", 0.5, {}, {"text.warmup_steps": 0.5}),
    ("token_warmup_step", 100, {}, {"text.warmup_steps": 100}),
    ("alpha_mask", True, {}, {"mask": "alpha"}),
    ("class_tokens", "sks dog", {}, {"origin.phrases": ("sks dog",)}),
    ("class_tokens", "", {}, {"origin.phrases": ("",)}),
    ("caption_extension", ".tags", {}, {"origin.extensions": (".tags",)}),
    ("caption_extension", "tags", {}, {"origin.extensions": (".tags",)}),
    ("cache_info", True, {}, {}),
    ("custom_attributes", {}, {}, {}),
    ("network_multiplier", 1.0, {}, {}),
    ("validation_split", 0.0, {}, {}),
    ("validation_seed", 4, {}, {}),
    ("is_reg", True, {}, {"regularisation": True, "match": True}),
    ("metadata_file", "meta.json", {}, {"origin.captions": "metadata", "origin.table": "meta.json"}),
    ("conditioning_data_dir", "masks", {}, {"mask": "masks"}),
    ("image_dir", "others", {}, {"origin.path": "others", "id": "others"}),
]
REFUSED = [("face_crop_aug_range", [2.0, 4.0], "random_crop"), ("network_multiplier", 0.5, "1"),
           ("validation_split", 1, "less than 1"), ("custom_attributes", {"a": 1}, "empty"),
           ("resize_interpolation", "lanzcos", "lanczos")]


def flat(spec: Spec) -> dict:
    """The fields of a set and of its parts, but for the line of the file that messages name."""
    return {f"{name}.{inner}" if inner else name: each for name, value in asdict(spec).items()
            for inner, each in (value.items() if isinstance(value, dict) else [("", value)]) if inner != "flag"}


def sections_of(key: str) -> list[str]:
    if key in kohya_keys.OF_SUBSETS:
        return ["subset"]
    return ["general", "dataset"] + ["subset"] * (key not in kohya_keys.OF_DATASETS)


def placed(key: str, value, section: str) -> tuple[dict, dict, dict]:
    """(subset, dataset, general), the key in one of them."""
    return tuple({key: value} if section == each else {} for each in ("subset", "dataset", "general"))


@pytest.mark.parametrize("key, value, general, changed", CHANGES)
def test_every_key_changes_what_it_says_and_nothing_else_in_every_section_it_may_stand_in(tmp_path, key, value, general, changed):
    before = flat(read_one(tmp_path, {}, {}, general))
    for section in sections_of(key):
        subset, dataset, top = placed(key, value, section)
        after = flat(read_one(tmp_path, subset, dataset, general | top))
        assert {name: after[name] for name in after if after[name] != before[name]} == {
            name: wanted for name, wanted in changed.items() if before[name] != wanted}
        assert {name: after[name] for name in changed} == changed


@pytest.mark.parametrize("key, value, word", REFUSED)
def test_what_is_not_supported_is_refused_by_name(tmp_path, key, value, word):
    for section in sections_of(key):
        names = {"general": "[general]", "dataset": "[[datasets]] 1", "subset": "[[datasets.subsets]] 1"}
        refused(lambda section=section: read_one(tmp_path, *placed(key, value, section)), names[section], key, word)


def test_no_key_is_forgotten():
    tried = {key for key, *_ in CHANGES} | {key for key, *_ in REFUSED} | {"enable_bucket"}
    assert tried == kohya_keys.IN_DATASETS.keys() | kohya_keys.IN_SUBSETS.keys()


def test_enable_bucket(tmp_path):
    assert read_one(tmp_path, {}, {"enable_bucket": True}).size == Buckets((1024, 1024), 256, 1024, 64, False, "center")
    assert read_one(tmp_path, {}, {"enable_bucket": False}, {}, "--enable_bucket").size == Fixed((1024, 1024), "random")


WRONG = {"true or false": ["True", 1, []], "a whole number": [1.5, "1", True, -1, []], "text": [1, True, ["a"]],
         "a number": ["0.5", True, -0.1], "a multiple of 8": [500.0, "512", 513, 0, [512], [512, 512, 512], [512, 300], True],
         "one of": ["best", 1]}


@pytest.mark.parametrize("key", sorted(kohya_keys.IN_DATASETS | kohya_keys.IN_SUBSETS))
def test_a_value_of_the_wrong_kind_is_refused_by_name(tmp_path, key):
    words = (kohya_keys.IN_DATASETS | kohya_keys.IN_SUBSETS)[key][0]
    values = next((values for start, values in WRONG.items() if words.startswith(start)), ["x", 7])
    for value in values:
        for section in sections_of(key):
            refused(lambda value=value, section=section: read_one(tmp_path, *placed(key, value, section)),
                    f"{key} is {json.dumps(value)}", "must be", words)


LEVELS = {"num_repeats": st.integers(1, 99), "caption_prefix": st.text("abc\"'\\\n é", max_size=4),
          "shuffle_caption": st.booleans(), "caption_dropout_rate": st.floats(0, 1), "keep_tokens": st.integers(0, 5),
          "resolution": st.integers(32, 256).map(lambda n: 8 * n),
          "batch_size": st.integers(1, 9), "alpha_mask": st.booleans()}
SECTION = st.fixed_dictionaries({}, optional=LEVELS)
FLAG = {"num_repeats": "dataset_repeats", "caption_dropout_rate": "proportion_empty_prompts"}


@SAME_FOLDER
@given(SECTION, SECTION, st.lists(SECTION, min_size=1, max_size=3), st.fixed_dictionaries({}, optional={
    key: values for key, values in LEVELS.items() if key != "batch_size"}), st.sampled_from(["toml", "json"]))
def test_values_go_down_from_flags_to_general_to_data_set_to_subset(tmp_path, general, dataset, subsets, given, form):
    subsets = [{key: value for key, value in subset.items() if key in kohya_keys.IN_SUBSETS} for subset in subsets]
    command = [f"--{FLAG.get(key, key)}={value}" for key, value in given.items()]
    described = read(tmp_path, general, [{**dataset, "subsets": [{"image_dir": "a", **subset} for subset in subsets]}],
                     *command, form=form)
    assert len(described.specs) == len(subsets)
    for spec, subset in zip(described.specs, subsets, strict=True):
        def wanted(key, default, subset=subset):
            return next((level[key] for level in (subset, dataset, general, given) if key in level), default)
        assert spec.rate == wanted("num_repeats", 1)
        assert spec.text == Rules(prefix=wanted("caption_prefix", ""), shuffle=wanted("shuffle_caption", False),
                                  empty=wanted("caption_dropout_rate", 0.0), keep=wanted("keep_tokens", 0))
        assert spec.size == Fixed((wanted("resolution", 1024),) * 2, "random")
        assert spec.batch_size == wanted("batch_size", None)
        assert spec.mask == ("alpha" if wanted("alpha_mask", False) else None)


def test_without_a_key_the_flag_counts(tmp_path):
    given = ["--enable_bucket", "--random_crop", "--max_bucket_reso=2048", "--random_flip", "--color_aug", "--shuffle_caption",
             "--caption_extension=.tags", "--dataset_repeats=4", "--conditioning_data_dir=masks", "--prior_loss_weight=0.3",
             "--vae_cache_ondemand"]
    spec = read_one(tmp_path, {}, {}, {}, *given)
    assert spec.size == Buckets((1024, 1024), 256, 2048, 64, False, "random") and spec.flip and spec.colour and spec.text.shuffle
    assert (spec.origin.extensions, spec.rate, spec.mask, spec.latents, spec.weight) == ((".tags",), 4, "masks", "ondemand", 1.0)
    regular = read_one(tmp_path, {"is_reg": True}, {}, {}, *given)
    assert (regular.weight, regular.mask) == (0.3, None)    # masks are made for the images to be learned
    assert read_one(tmp_path, {"alpha_mask": True, "is_reg": True}).mask == "alpha"


# what is said

def typos(key: str):
    at = st.integers(0, len(key) - 1)
    return st.one_of(at.map(lambda i: key[:i] + key[i + 1:]), at.map(lambda i: key[:i] + key[i] + key[i:]),
                     at.map(lambda i: key[:i] + key[i:i + 2][::-1] + key[i + 2:]))


@SAME_FOLDER
@given(st.data())
def test_a_misspelt_key_names_section_and_right_key(tmp_path, data):
    section = data.draw(st.sampled_from(["general", "dataset", "subset"]))
    known = sorted(kohya_keys.IN_SUBSETS if section == "subset" else kohya_keys.IN_DATASETS)
    key = data.draw(st.sampled_from(known))
    typo = data.draw(typos(key))
    assume(typo and typo not in kohya_keys.IN_DATASETS | kohya_keys.IN_SUBSETS)
    names = {"general": "[general]", "dataset": "[[datasets]] 1", "subset": "[[datasets]] 1, [[datasets.subsets]] 1"}
    refused(lambda: read_one(tmp_path, *placed(typo, 1, section)), "config.toml, " + names[section] + ":",
            f"there is no key {typo}; did you mean {key}?")


@pytest.mark.parametrize("key, section, words", [
    ("image_dir", "general", ["[general]", "image_dir belongs into [[datasets.subsets]]"]),
    ("is_reg", "dataset", ["[[datasets]] 1", "is_reg belongs into [[datasets.subsets]]"]),
    ("resolution", "subset", ["[[datasets.subsets]] 1", "resolution belongs into [[datasets]] or [general]"]),
    ("resolutoin", "subset", ["did you mean resolution?", "belongs into [[datasets]] or [general]"]),
    ("prior_loss_weight", "subset", ["a flag: --prior_loss_weight"]),
    ("qqqq", "subset", ["no key qqqq", "image_dir", "num_repeats"])])
def test_a_key_in_the_wrong_place_is_told_its_place(tmp_path, key, section, words):
    refused(lambda: read_one(tmp_path, *placed(key, 1, section)), *words)


@pytest.mark.parametrize("text, words", [
    ("[genral]", ["genral", "did you mean general?"]), ("", ["no [[datasets]] section"]), ("datasets = 3", ["datasets = 3"]),
    ("datasets = []", ["no [[datasets]] section"]), ("[[datasets]]\nsubsets = []", ["no [[datasets.subsets]] section"]),
    ("[[datasets]]", ["[[datasets]] 1", "no [[datasets.subsets]] section"]), ("[[general]]\n[[datasets]]", ["[general]"]),
    ("[[datasets]]\n[[datasets.subsets]]\nnum_repeats = 2", ["image_dir is missing"]), ("[general", ["not valid TOML"]),
    ("[general]\nresolution = 512\nresolution = 768", ["not valid TOML"])])
def test_a_file_that_is_not_as_it_should_be(tmp_path, text, words):
    (tmp_path / "config.toml").write_text(text)
    refused(lambda: kohya.read_config(flags(f"--dataset_config={tmp_path / 'config.toml'}")), "config.toml", *words)


def test_files_that_cannot_be_read(tmp_path):
    for name, content, word in (("a.yaml", b"", "neither .toml nor .json"), ("b.toml", None, "No such file"),
                                ("c.json", b"{", "JSON"),
                                ("d.toml", "é".encode("latin-1"), "UTF-8"), ("e.json", b"[]", "no keys"),
                                ("f.json", b'{"general": {"keep_tokens": 1, "keep_tokens": 2}}', "'keep_tokens' is given twice")):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        refused(lambda name=name: kohya.read_config(flags(f"--dataset_config={tmp_path / name}")), name, word)


def test_a_byte_order_mark_is_no_part_of_the_file(tmp_path):
    (tmp_path / "config.toml").write_text(toml({}, [{"subsets": [{"image_dir": "a"}]}]), encoding="utf-8-sig")
    assert len(kohya.read_config(flags(f"--dataset_config={tmp_path / 'config.toml'}")).specs) == 1


def test_null_is_as_if_the_key_were_not_there(tmp_path):
    subset = {"image_dir": "a", "face_crop_aug_range": None, "num_repeats": None}
    assert read(tmp_path, {"num_repeats": 3}, [{"subsets": [subset]}], form="json").specs[0].rate == 3


@pytest.mark.parametrize("subset, words", [
    ({"metadata_file": "m.json", "class_tokens": "dog"}, ["class_tokens", "metadata_file"]),
    ({"metadata_file": "m.json", "caption_extension": ".txt"}, ["caption_extension", "metadata_file"]),
    ({"alpha_mask": True, "conditioning_data_dir": "masks"}, ["alpha_mask", "conditioning_data_dir"]),
    ({"secondary_separator": ", ;"}, ["secondary_separator", "caption_separator"])])
def test_keys_that_contradict_each_other(tmp_path, subset, words):
    refused(lambda: read_one(tmp_path, subset), "[[datasets.subsets]] 1", *words)


def test_buckets_that_cannot_be_are_refused_with_their_section(tmp_path):
    refused(lambda: read_one(tmp_path, {}, {"enable_bucket": True, "resolution": 2048}), "[[datasets]] 1", "max_bucket_reso 1024")


def test_inherited_keys_of_text_files_do_not_hinder_metadata(tmp_path):
    spec = read_one(tmp_path, {"metadata_file": "m.json"}, {}, {"caption_extension": ".txt", "class_tokens": "dog"})
    assert spec.origin.captions == "metadata" and spec.origin.phrases == ()


@pytest.mark.parametrize("one, other", [({}, {"metadata_file": "m.json"}), ({"conditioning_data_dir": "m"}, {}),
                                        ({"conditioning_data_dir": "m"}, {"metadata_file": "m.json"})])
def test_all_subsets_of_a_data_set_are_of_one_kind(tmp_path, one, other):
    subsets = [{"image_dir": "a", **one}, {"image_dir": "b", **other}]
    refused(lambda: read(tmp_path, {}, [{"subsets": subsets}]), "[[datasets.subsets]] 2", "of one kind")
    assert len(read(tmp_path, {}, [{"subsets": [subset]} for subset in subsets]).specs) == 2


def test_sets_are_told_apart_and_overlaps_are_named(tmp_path):
    described = read(tmp_path, {}, [{"resolution": size, "subsets": [{"image_dir": "a"}]} for size in (512, 768, 1024)])
    assert [spec.id for spec in described.specs] == ["a", "a (2)", "a (3)"] and described.notes == []
    described = read(tmp_path, {}, [{"subsets": [{"image_dir": "a"}, {"image_dir": "a/b"}]}])
    assert len(described.notes) == 1 and "a/b lies in" in described.notes[0]
    described = read(tmp_path, {"validation_seed": 1}, [{"subsets": [{"image_dir": "a"}]}, {"subsets": [{"image_dir": "b"}]}])
    assert len(described.notes) == 1 and "validation_seed" in described.notes[0]


def test_validation_split_makes_an_evaluation_set_of_each_subset(tmp_path):
    subsets = [{"image_dir": "a"}, {"image_dir": "b", "is_reg": True}]
    trained, aside, prior = read(tmp_path, {"validation_split": 0.25, "validation_seed": 7}, [{"subsets": subsets}]).specs
    assert trained.held_out == aside.held_out == (0.25, 7) and prior.held_out is None and prior.regularisation
    assert (trained.evaluation, aside.evaluation, prior.evaluation) == (False, True, False)
    assert aside == replace(trained, id="a (validation)", evaluation=True)


def test_messages_name_the_subset_that_a_folder_was_named_in(tmp_path):
    described = read(tmp_path, {}, [{"subsets": [{"image_dir": "a"}]}, {"subsets": [{"image_dir": "b"}, {"image_dir": "c"}]}])
    assert described.specs[2].origin.flag == f"{tmp_path / 'config.toml'}, [[datasets]] 2, [[datasets.subsets]] 2, image_dir"


def test_the_example_shows_every_key_and_is_read():
    text = EXAMPLE.read_text()
    assert all(key in text for key in kohya_keys.IN_DATASETS | kohya_keys.IN_SUBSETS)


def test_the_example_is_read(tmp_path):
    (tmp_path / "dataset.toml").write_text(EXAMPLE.read_text())
    dog, dogs, drawings, faces = kohya.read_config(flags(f"--dataset_config={tmp_path / 'dataset.toml'}")).specs
    assert (dog.rate, dog.text.keep, dog.text.shuffle, dog.batch_size) == (10, 1, True, 4)
    assert dogs.regularisation and drawings.origin.table == "data/drawings.json" and faces.mask == "data/face_masks"
    assert [spec.size.resolution if isinstance(spec.size, Buckets) else spec.size.size for spec in (dog, drawings, faces)] == [
        (1024, 1024), (768, 768), (512, 512)]


# DreamBooth folders

@pytest.fixture
def dreambooth(tmp_path) -> Path:
    root = tmp_path / "train"
    for name in ("10_sks dog", "2_a_b, c", "007_x", "plain", "0_never", "3", ".hidden", "-1_less"):
        (root / name).mkdir(parents=True)
        (root / name / "a.png").write_bytes(png(1))
    (root / "notes.txt").write_text("no image")
    return root


def test_folders_say_how_often_and_what(dreambooth):
    described = kohya.read_folders(flags(f"--train_data_dir={dreambooth}", "--caption_extension=.cap", "--random_flip"))
    found = {Path(spec.origin.path).name: (spec.rate, spec.origin.phrases) for spec in described.specs}
    assert found == {"10_sks dog": (10, ("sks dog",)), "2_a_b, c": (2, ("a_b, c",)), "007_x": (7, ("x",)), "3": (3, ())}
    assert all(spec.origin.captions == "textfile" and spec.origin.extensions == (".cap",) and spec.origin.lines == "first" and
               spec.flip and not spec.match and spec.weight == 1 for spec in described.specs)
    left_out = [note for note in described.notes if "is left out" in note]
    assert [note.split(" is left out")[0].rpartition("/")[2] for note in left_out] == ["-1_less", "0_never", "plain"]
    assert any("10x 10_sks dog" in note and "7x 007_x" in note for note in described.notes)


def test_wildcards_make_every_line_a_caption(dreambooth):
    described = kohya.read_folders(flags(f"--train_data_dir={dreambooth}", "--enable_wildcard"))
    assert all(spec.origin.lines == "each" and spec.text.wildcard for spec in described.specs)


def test_regularisation_folders(dreambooth, tmp_path):
    (tmp_path / "reg/2_dog").mkdir(parents=True)
    command = [f"--train_data_dir={dreambooth}", f"--reg_data_dir={tmp_path / 'reg'}", "--prior_loss_weight=0.5", "--alpha_mask"]
    *train, reg = kohya.read_folders(flags(*command)).specs
    assert not any(spec.regularisation or spec.match or spec.weight != 1 for spec in train)
    assert reg.regularisation and reg.match and reg.weight == 0.5 and reg.rate == 2 and reg.origin.phrases == ("dog",)
    assert reg.mask == "alpha" and reg.origin.flag == "--reg_data_dir"


def test_a_folder_that_is_not_divided_is_one_set(tmp_path):
    for name in ("train", "reg"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.png").write_bytes(png(1))
    described = kohya.read_folders(flags(f"--train_data_dir={tmp_path / 'train'}", f"--reg_data_dir={tmp_path / 'reg'}",
                                         "--dataset_repeats=3"))
    assert [(spec.rate, spec.match, spec.origin.captions, spec.origin.phrases) for spec in described.specs] == [
        (3, False, "auto", ()), (3, True, "auto", ())]
    assert described.notes == []


def test_repeats_by_flag_are_named_where_they_mean_nothing(dreambooth):
    notes = kohya.read_folders(flags(f"--train_data_dir={dreambooth}", "--dataset_repeats=3")).notes
    assert any("--dataset_repeats has no effect" in note for note in notes)


def test_masks_may_be_divided_as_the_images_are(dreambooth, tmp_path):
    (tmp_path / "masks/10_sks dog").mkdir(parents=True)
    (tmp_path / "reg/1_dog").mkdir(parents=True)
    described = kohya.read_folders(flags(f"--train_data_dir={dreambooth}", f"--conditioning_data_dir={tmp_path / 'masks'}",
                                         f"--reg_data_dir={tmp_path / 'reg'}"))
    masks = {Path(spec.id).name: spec.mask for spec in described.specs}
    assert masks["10_sks dog"] == str(tmp_path / "masks/10_sks dog") and masks["3"] == str(tmp_path / "masks")
    assert masks["1_dog"] is None


@pytest.mark.parametrize("folders, files, expected", [
    (["10_dog"], [], True), (["10_dog", "other"], ["readme.txt"], True), (["dogs"], [], False), (["10"], [], False),
    ([], [], False),
    (["10_dog"], ["a.png"], False), (["10_dog"], ["A.JPG"], False), (["0_dog"], [], False), (["-1_dog"], [], False),
    (["1.5_dog"], [], False), (["10_dog"], [".hidden.png"], True), ([], ["10_dog"], False)])
def test_which_folders_are_dreambooth(tmp_path, folders, files, expected):
    for name in folders:
        (tmp_path / name).mkdir()
    for name in files:
        (tmp_path / name).write_bytes(png(1))
    assert kohya.is_dreambooth(tmp_path) == kohya.is_dreambooth(str(tmp_path)) == expected
    assert not kohya.is_dreambooth(tmp_path / "absent")


# metadata

ENTRY = st.fixed_dictionaries({}, optional={"caption": st.text("ab ,\n", max_size=6), "tags": st.text("cd ,", max_size=4),
                                            "image_size": st.just([64, 64])})


@SAME_FOLDER
@given(st.dictionaries(st.text("xyz/é.", min_size=1, max_size=5), ENTRY, max_size=4), st.sampled_from([",", ";", ", "]))
def test_tags_follow_every_line_of_the_caption(tmp_path, entries, separator):
    wanted = {}
    for key, entry in entries.items():
        lines = [line.strip() for line in entry.get("caption", "").split("\n")]
        tags = entry.get("tags", "").strip()
        shown = [separator.strip() .join([line, " " + tags]) if tags else line for line in lines if line] or [tags]
        wanted |= {key: "\n".join(shown)} if any(shown) else {}
    (tmp_path / "m.json").write_text(json.dumps(entries))
    (tmp_path / "m.jsonl").write_text("\n\n".join(json.dumps({"image_path": key, **entry}) for key, entry in entries.items()))
    assert kohya.read_captions(tmp_path / "m.json", separator) == wanted
    assert kohya.read_captions(str(tmp_path / "m.jsonl"), separator) == wanted


def test_tags_alone_and_lists_of_tags(tmp_path):
    (tmp_path / "m.json").write_text('{"a": {"tags": "x, y"}, "b": {"caption": "o", "tags": ["x", "y"]}, "c": {"caption": null}}')
    assert kohya.read_captions(tmp_path / "m.json") == {"a": "x, y", "b": "o, x, y"}


@pytest.mark.parametrize("name, text, words", [
    ("m.json", "[]", ["no keys"]), ("m.json", '{"a": "x"}', ["'a'", "caption"]),
    ("m.json", '{"a": {"caption": 3}}', ["caption of 'a'", "3"]),
    ("m.json", '{"a": {"tags": {"x": 1}}}', ["tags of 'a'"]), ("m.json", '{"a": {}, "a": {}}', ["'a' is given twice"]),
    ("m.jsonl", '{"image_path": "a"}\n{"caption": "x"}', ["line 2", "image_path"]), ("m.jsonl", "{", ["line 1", "JSON"]),
    ("m.jsonl", '{"image_path": "a", "caption": "x"}\n{"image_path": "a", "caption": "y"}', ["'a' twice"]),
    ("m.jsonl", "[1]", ["line 1"]), ("m.csv", "", ["neither"])])
def test_metadata_that_is_not_as_it_should_be(tmp_path, name, text, words):
    (tmp_path / name).write_text(text)
    refused(lambda: kohya.read_captions(tmp_path / name), name, *words)


def test_metadata_by_flag(tmp_path):
    (tmp_path / "reg/1_dog").mkdir(parents=True)
    spec, reg = kohya.read_metadata(flags("--train_data_dir=images", "--in_json=m.json", "--dataset_repeats=4", "--flip_aug",
                                          f"--reg_data_dir={tmp_path / 'reg'}")).specs
    assert (spec.origin.path, spec.origin.captions, spec.origin.table) == ("images", "metadata", "m.json")
    assert (spec.rate, spec.flip, spec.match, reg.match) == (4, True, False, True)
    refused(lambda: kohya.read_metadata(flags("--in_json=m.json")), "--train_data_dir")


# flags

def test_flags_give_the_same_rules_and_sizes_as_keys(tmp_path):
    """What a file says in its keys, the command line says in flags."""
    switches = {"shuffle_caption", "enable_wildcard", "color_aug", "flip_aug", "alpha_mask", "random_crop", "bucket_no_upscale"}
    skipped = {"batch_size", "resize_interpolation", "class_tokens", "cache_info", "custom_attributes", "network_multiplier",
               "validation_split", "validation_seed", "is_reg", "metadata_file", "image_dir"}    # of files alone
    tried = Counter()
    for key, value, general, changed in CHANGES:
        if key in skipped or (key, value) == ("random_crop", False):
            continue
        text = ",".join(map(str, value)) if isinstance(value, list) else value
        flag = FLAG.get(key, key)
        args = flags(f"--{flag}" if key in switches else f"--{flag}={text}", *(f"--{each}" for each in general))
        spec = flat(kohya.plain(args, "set", kohya.folder_origin(args, "images", "--train_data_dir")))
        assert {name: spec[name] for name in changed} == changed, key
        tried[key] += 1
    assert len(tried) == 25


@pytest.mark.parametrize("given, expected", [
    ([], Fixed((1024, 1024), "random")), (["--center_crop"], Fixed((1024, 1024), "center")),
    (["--enable_bucket"], Buckets((1024, 1024), 256, 1024, 64, False, "center")),
    (["--enable_bucket", "--random_crop", "--resolution=512,768", "--bucket_no_upscale"],
     Buckets((512, 768), 256, 1024, 64, True, "random"))])
def test_sizes_by_flag(given, expected):
    assert kohya.size_of(flags(*given)) == expected


@pytest.mark.parametrize("given, expected", [
    ([], "disk"), (["--vae_cache_ondemand"], "ondemand"), (["--vae_cache_disable"], "off"), (["--cache_latents=false"], "off"),
    (["--vae_cache_disable", "--vae_cache_ondemand"], "off")])
def test_cache_modes_by_flag(given, expected):
    assert kohya.latents_of(flags(*given)) == expected


def test_flags_without_anything_are_rules_without_anything():
    assert kohya.rules_of(flags()) == Rules()


def test_flags_that_contradict_each_other():
    refused(lambda: kohya.rules_of(flags("--caption_separator=")), "--caption_separator is empty")


def test_folders_by_flag(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards/00000.tar").write_bytes(b"")
    ways = {("images", ""): ("folder", "auto"), ("images", "--caption_extension=txt"): ("folder", "textfile"),
            ("shards", ""): ("shards", "column")}
    for (name, flag), expected in ways.items():
        origin = kohya.folder_origin(flags(*[flag] * bool(flag)), tmp_path / name, "--reg_data_dir")
        assert (origin.kind, origin.captions) == expected and origin.flag == "--reg_data_dir" and origin.lines == "whole"
