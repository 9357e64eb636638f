"""SimpleTuner's multidatabackend.json -> specs.

config/multidatabackend.schema.json is the list of keys; what they mean is here. Every key does what SimpleTuner's
documentation promises, or is refused. docs/coming_from_simpletuner.md tells which, and where its code does otherwise.
"""

import json
import math
from pathlib import Path

from library.data.captions import Rules
from library.data.formats import simpletuner_links as links
from library.data.formats.simpletuner_links import SHOWN, image_folder, needed
from library.data.formats.simpletuner_schema import check_data_backends
from library.data.specs import Aspect, Described, Origin, Spec
from library.errors import UserError

# "type" -> the ways to captions that it has, the usual one first
STRATEGIES = {"local": ("filename", "textfile", "instanceprompt", "parquet"), "csv": ("csv", "instanceprompt"),
              "huggingface": ("huggingface", "instanceprompt")}
_SIZES = ("minimum_image_size", "maximum_image_size", "target_downsample_size")


def read(args) -> Described:
    """The data sets of `args.data_backend_config`; what a set does not say is taken from the flags.

    Raises `UserError`, a sentence for each mistake, naming the set and the key.
    """
    path = Path(args.data_backend_config)
    specs, notes, faults, sets, store = [], [], [], [], {}
    for each in check_data_backends(path):
        try:
            sets.append(_opened(each))
        except UserError as fault:
            faults.append(f'data set "{each["id"]}": {fault}')
    kinds = {kind: [each for each in sets if each.get("dataset_type", "image") == kind]
             for kind in ("image", "eval", "conditioning", "text_embeds", "image_embeds")}
    kinds[SHOWN] = kinds["image"] + kinds["eval"]
    ids = [each["id"] for each in sets]
    faults += [f'"id": {ids.count(name)} data sets are called "{name}": give each its own' for name in dict.fromkeys(ids)
               if ids.count(name) > 1]
    if not kinds["image"] and not faults:
        faults.append('there is no data set to train on: every one is disabled, or has another "dataset_type" than image')
    for one in kinds[SHOWN] + kinds["conditioning"]:
        place = f'data set "{one["id"]}"'
        try:
            if one.get("dataset_type") == "conditioning":
                links.check_masks(one, kinds)
            else:
                specs.append(_spec(one, kinds, args, f"{path}, {place}"))
                notes += [f"{place}: {note}" for note in _idle(one, args)]
        except UserError as fault:
            faults.append(f"{place}: {fault}")
    if not faults:
        try:
            links.check_folders(kinds)
            store = links.prompt_store(kinds)
        except UserError as fault:
            faults.append(str(fault))
    if faults:
        raise UserError(f"{path}: " + "; ".join(faults))
    return Described(specs, notes=notes, **store)


def _spec(one: dict, kinds: dict, args, place: str) -> Spec:
    regularisation = links.one_of(one, "is_regularisation_data", "is_regularization_data", False)
    anew = one.get("vae_cache_clear_each_epoch", False) and _cut_at_random(one)    # other cuts are the same for ever
    off = anew or one.get("vae_cache_disable", False) or args.vae_cache_disable
    ondemand = one.get("vae_cache_ondemand", False) or args.vae_cache_ondemand
    skipped = one.get("skip_file_discovery", "")
    return Spec(
        id=one["id"], origin=_origin(one, args, place), size=_size(one, args), text=_rules(one, args), flip=args.random_flip,
        rate=(one.get("repeats", 0) + 1) * one.get("probability", 1.0), regularisation=regularisation, keeps_prior=regularisation,
        weight=args.prior_loss_weight if regularisation else 1.0, mask=links.mask_folder(one, kinds),
        batch_size=one.get("train_batch_size"), max_samples=one.get("max_num_samples"),
        latents="off" if off else "ondemand" if ondemand else "disk", latent_dir=links.latent_dir(one, kinds),
        evaluation=one.get("dataset_type") == "eval", only_known="metadata" in skipped or "aspect" in skipped, every_cut_new=anew)


def _opened(one: dict) -> dict:
    """The set without what is null, and with the keys of its "huggingface" block among its own."""
    one = {key: value for key, value in one.items() if value is not None}
    block = {key: value for key, value in one.get("huggingface", {}).items() if value is not None}
    for key in block.keys() & one.keys():
        if block[key] != one[key]:
            raise UserError(f'"{key}" is {json.dumps(one[key])}, and {json.dumps(block[key])} in "huggingface": say it once')
    return {**block, **one}


# where images and captions come from

def _strategy(one: dict, args) -> str:
    kind = one.get("type", "local")
    given = one.get("caption_strategy")
    if given not in (None, *STRATEGIES[kind]):
        raise UserError(f'"caption_strategy" is "{given}", and "type": "{kind}" has {", ".join(STRATEGIES[kind])}')
    return given or (args.caption_strategy if args.caption_strategy in STRATEGIES[kind] else STRATEGIES[kind][0])


def _phrases(one: dict) -> tuple[str, ...]:
    phrases = one.get("instance_prompt", [])
    return tuple(phrases if isinstance(phrases, list) else [phrases] if phrases else [])


def _origin(one: dict, args, place: str) -> Origin:
    kind, strategy = one.get("type", "local"), _strategy(one, args)
    if strategy == "instanceprompt" or one.get("only_instance_prompt"):
        if not _phrases(one):
            raise UserError('"instance_prompt" is missing, and nothing else is to be the caption')
        captions = {"captions": "phrase", "phrases": _phrases(one)}
    elif strategy == "textfile":
        lines = "whole" if one.get("disable_multiline_split") else "each"
        captions = {"captions": "textfile", "extensions": (".txt",), "lines": lines}
    elif strategy == "parquet":
        captions = _table(one)
    elif strategy == "filename":
        captions = {"captions": "filename"}
    else:
        column = one.get("csv_caption_column" if kind == "csv" else "caption_column", "caption")
        captions = {"captions": "column", "caption_column": column[0] if isinstance(column, list) else column,
                    "fallback_column": one.get("fallback_caption_column")}
    if kind == "csv":
        path, downloads = needed(one, "csv_file", "csv_cache_dir", *["csv_caption_column"] * (strategy == "csv"))[:2]
        return Origin("urls", path, name_column=one.get("csv_url_column", "url"), downloads=downloads,
                      flag=f"{place}, csv_file", **captions)
    if kind == "huggingface":
        return Origin("dataset", needed(one, "dataset_name")[0], config=one.get("dataset_config"), revision=one.get("revision"),
                      split=one.get("split", "train"), image_column=one.get("image_column", "image"),
                      downloads=one.get("cache_dir") or None, streaming=one.get("streaming", False),
                      flag=f"{place}, dataset_name", **captions)
    return Origin("folder", image_folder(one), flag=f"{place}, instance_data_dir", **captions)


def _table(one: dict) -> dict:
    if "parquet" not in one:
        raise UserError('"parquet" is missing, which names the table of "caption_strategy": "parquet"')
    block = one["parquet"]
    inside = Path(image_folder(one), block["path"])
    return {"captions": "table", "table": str(inside) if not Path(block["path"]).exists() and inside.exists() else block["path"],
            "name_column": block["filename_column"], "caption_column": block["caption_column"],
            "fallback_column": block.get("fallback_caption_column"),
            "names_have_extension": block.get("identifier_includes_extension", False)}


def _rules(one: dict, args) -> Rules:
    prefix = ""
    if one.get("prepend_instance_prompt") and not one.get("only_instance_prompt") and _strategy(one, args) != "instanceprompt":
        if len(_phrases(one)) != 1:
            raise UserError('"prepend_instance_prompt" needs one phrase as "instance_prompt"')
        prefix = _phrases(one)[0]
    shuffle = one.get("caption_shuffle", {})
    if not shuffle.get("enable", False):
        return Rules(prefix=prefix, bare=True, empty=args.proportion_empty_prompts)
    seed = shuffle.get("seed")
    return Rules(shuffle=True, keep=shuffle.get("position_start", 0), orders=shuffle.get("count", 1), prefix=prefix,
                 separator={"comma": ",", "space": " ", "period": "."}[shuffle.get("split_on", "comma")],
                 original=shuffle.get("include_original", True), seed=(args.seed or 0) if seed is None else seed,
                 bare=True, empty=args.proportion_empty_prompts)


# sizes

def _size(one: dict, args) -> Aspect:
    unit = one.get("resolution_type", args.resolution_type)
    sizes = {"resolution": None, "minimum_image_size": args.minimum_image_size, "maximum_image_size": args.maximum_image_size,
             "target_downsample_size": args.target_downsample_size}
    sizes |= {key: one[key] for key in sizes if key in one}
    if sizes["resolution"] is None:
        if args.resolution[0] != args.resolution[1]:
            raise UserError(f'"resolution" is missing, and --resolution {args.resolution[0]},{args.resolution[1]} is two numbers')
        sizes["resolution"] = args.resolution[0] ** 2 / 1e6 if unit == "area" else args.resolution[0]
    for key, value in sizes.items():
        name = f'"{key}"' if key in one else f"--{key}"
        if value and unit == "area" and value > 20:
            raise UserError(f'{name} is {value:g}, and "resolution_type": "area" counts in megapixels: '
                            f'write {value ** 2 / 1e6:.4g}, or "resolution_type": "pixel_area"')
        if value and unit != "area" and value < 20:
            raise UserError(f'{name} is {value:g}, and "resolution_type": "{unit}" counts in pixels: '
                            f'write {math.sqrt(value * 1e6):.0f}, or "resolution_type": "area"')
    edge = math.sqrt(sizes["resolution"] * 1e6) if unit == "area" else sizes["resolution"]
    if edge < args.aspect_bucket_alignment / 2:
        raise UserError(f'"resolution" is {edge:.0f} pixels, and sides are multiples of --aspect_bucket_alignment '
                        f'{args.aspect_bucket_alignment}: raise one or lower the other')
    minimum, maximum, downsample = (sizes[key] or None for key in _SIZES)
    if (maximum is None) != (downsample is None):
        given, missing = _SIZES[1:] if downsample is None else _SIZES[:0:-1]
        raise UserError(f'"{given}" needs "{missing}" beside it')
    if maximum is not None and downsample > maximum:
        raise UserError(f'"target_downsample_size" {downsample:g} is more than "maximum_image_size" {maximum:g}: '
                        "large images would be made larger")
    low, high = one.get("minimum_aspect_ratio"), one.get("maximum_aspect_ratio")
    if low and high and low > high:
        raise UserError(f'"minimum_aspect_ratio" {low:g} is more than "maximum_aspect_ratio" {high:g}: no image fits')
    crop, aspect = one.get("crop", False), one.get("crop_aspect", "square")
    choices = ()
    if crop and aspect in ("closest", "random"):
        if "crop_aspect_buckets" not in one:
            raise UserError(f'"crop_aspect_buckets" is missing, out of which "crop_aspect": "{aspect}" takes the shape')
        choices = tuple((float(each["aspect"]), float(each.get("weight", 1))) if isinstance(each, dict) else (float(each), 1.0)
                        for each in one["crop_aspect_buckets"])
    return Aspect(sizes["resolution"], unit, crop, aspect, one.get("crop_style", "random").replace("centre", "center"), choices,
                  minimum=minimum or 0, maximum=maximum, downsample=downsample, max_upscale=one.get("max_upscale_threshold"),
                  min_ratio=low, max_ratio=high, alignment=args.aspect_bucket_alignment, rounding=args.aspect_bucket_rounding)


def _cut_at_random(one: dict) -> bool:
    return one.get("crop", False) and one.get("crop_style", "random") == "random"


def _idle(one: dict, args) -> list[str]:
    """What is said in a set and changes nothing."""
    strategy, crop = _strategy(one, args), one.get("crop", False)
    shapes = crop and one.get("crop_aspect") in ("closest", "random")
    phrase = strategy == "instanceprompt" or one.get("prepend_instance_prompt") or one.get("only_instance_prompt")
    rules = [(("crop_aspect", "crop_style", *_SIZES[1:]), crop, '"crop": true'),
             (("crop_aspect_buckets", "max_upscale_threshold"), shapes, '"crop_aspect" closest or random'),
             (("vae_cache_clear_each_epoch",), _cut_at_random(one), '"crop_style": "random"'),
             (("instance_prompt",), phrase, '"prepend_instance_prompt" or "only_instance_prompt"'),
             (("disable_multiline_split",), strategy == "textfile", '"caption_strategy": "textfile"'),
             (("parquet",), strategy == "parquet", '"caption_strategy": "parquet"')]
    idle = [([f'"{key}"' for key in keys if one.get(key)], why) for keys, used, why in rules if not used]
    return [f"{', '.join(keys)} {'has' if len(keys) == 1 else 'have'} no effect without {why}" for keys, why in idle if keys]
