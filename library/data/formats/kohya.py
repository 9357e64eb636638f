"""kohya's ways to describe data sets, read into `Spec`s: --dataset_config, folders named 10_name, metadata JSON, and flags.

Sections of a --dataset_config pass their values on: subset before dataset before general before flag.
"""

import os
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

from library.data import captions, geometry
from library.data.captions import Rules
from library.data.formats import kohya_keys
from library.data.images import EXTENSIONS
from library.data.specs import Buckets, Described, Fixed, Origin, Spec
from library.errors import UserError

_NUMBERED = re.compile(r"0*([1-9][0-9]*)(?:_(.*))?", re.DOTALL)    # 10_name: repeats, class tokens


def read_config(args) -> Described:
    """--dataset_config, a .toml or .json file of [general], [[datasets]] and [[datasets.subsets]] -> a set a subset, in order.

    Raises `UserError` naming section, key and nearest right key for what is unknown, of the wrong kind or not supported.
    """
    path = Path(args.dataset_config)
    content = kohya_keys.load(path)
    kohya_keys.check(content, {"general": None, "datasets": None}, str(path), args)
    general = kohya_keys.check(content.get("general", {}), kohya_keys.IN_DATASETS, f"{path}, [general]", args)
    inherited, specs, notes = _flags(args) | general, [], []
    for number, dataset in enumerate(kohya_keys.sections(content, "datasets", str(path)), 1):
        section, first = f"{path}, [[datasets]] {number}", None
        values = inherited | kohya_keys.check(dataset, kohya_keys.IN_DATASETS | {"subsets": None}, section, args)
        for index, subset in enumerate(kohya_keys.sections(dataset, "subsets", section), 1):
            place = f"{section}, [[datasets.subsets]] {index}"
            kohya_keys.check(subset, kohya_keys.IN_SUBSETS, place, args)
            kind = next((key for key in ("metadata_file", "conditioning_data_dir") if key in subset), "neither")
            first = first or kind
            if kind != first:
                raise UserError(f"{place}: all subsets of a data set are of one kind, but this one has {kind} and the "
                                f"first one has {first} (metadata_file, conditioning_data_dir): give it [[datasets]] of its own")
            specs += _split(_spec_of_subset(values | subset, subset, args, place), values, args)
        if "validation_seed" in values and not values.get("validation_split"):
            notes.append(f"{path}: validation_seed has no effect without validation_split")
    folders = {Path(spec.origin.path).resolve() for spec in specs}
    notes += [f"{path}: {spec.origin.path} lies in {parent}, whose subfolders are read, too: its images are in both sets"
              for spec in specs for parent in Path(spec.origin.path).resolve().parents if parent in folders]
    return Described(_distinct(specs), notes=list(dict.fromkeys(notes)))


def _spec_of_subset(values: dict, own: dict, args, place: str) -> Spec:
    """values: of all sections, by kohya's names. own: what the subset itself says."""
    table, regularisation, class_tokens = own.get("metadata_file"), own.get("is_reg", False), values.get("class_tokens")
    if "image_dir" not in own:
        raise UserError(f"{place}: image_dir is missing: name the folder of the images")
    if idle := [key for key in kohya_keys.OF_TEXT_FILES if table and key in own]:
        raise UserError(f"{place}: {idle[0]} means nothing beside metadata_file, which has the captions: leave one of them out")
    if own.get("alpha_mask") and own.get("conditioning_data_dir"):
        raise UserError(f"{place}: alpha_mask and conditioning_data_dir are both masks: leave one of them out")
    if values["enable_bucket"] and not values["bucket_no_upscale"]:
        try:
            geometry.make_buckets(_pair(values["resolution"]), *(values[key] for key in (
                "min_bucket_reso", "max_bucket_reso", "bucket_reso_steps")))
        except ValueError as error:
            raise UserError(f"{place}: {str(error).replace('--', '')}") from None
    mask = own.get("conditioning_data_dir") or ("alpha" if values["alpha_mask"] else None)
    origin = Origin("folder", own["image_dir"], captions="metadata" if table else "textfile", table=table,
                    phrases=() if table or class_tokens is None else (class_tokens,), lines=_lines(values["enable_wildcard"]),
                    extensions=_extensions(values["caption_extension"]), flag=f"{place}, image_dir")
    spec = Spec(own["image_dir"], origin, _size(values, args), _rules(values, f"{place}: "), flip=values["flip_aug"],
                colour=values["color_aug"], rate=float(values["num_repeats"]), batch_size=values.get("batch_size"),
                mask=mask or (None if regularisation else args.conditioning_data_dir), latents=latents_of(args),
                interpolation=kohya_keys.INTERPOLATIONS.get(values.get("resize_interpolation")))
    return _regularisation(spec, args) if regularisation else spec


def _split(spec: Spec, values: dict, args) -> list[Spec]:
    """The set, and beside it the one that validation_split keeps for evaluation. Regularisation images are not split."""
    share = values.get("validation_split", 0)
    if not share or spec.regularisation:
        return [spec]
    seed = values["validation_seed"] if "validation_seed" in values else args.seed or 0
    trained = replace(spec, held_out=(float(share), seed))
    return [trained, replace(trained, id=f"{spec.id} (validation)", evaluation=True)]


def is_dreambooth(path: Path | str) -> bool:
    """Whether a folder is kohya's for DreamBooth: has a subfolder <whole number>_<name>, and no image directly in it."""
    divided = False
    try:
        with os.scandir(path) as entries:
            for entry in entries:
                if entry.is_dir():
                    divided |= bool((found := _NUMBERED.fullmatch(entry.name)) and found[2] is not None)
                elif entry.name.lower().endswith(EXTENSIONS) and not entry.name.startswith("."):
                    return False
    except (FileNotFoundError, NotADirectoryError):    # opening the set will say so
        return False
    return divided


def read_folders(args) -> Described:
    """--train_data_dir and --reg_data_dir of subfolders 10_name: shown 10 times an epoch, `name` where a text file is missing.

    A folder that is not so divided (see `is_dreambooth`) is one set, shown --dataset_repeats times. Notes name what is left out.
    """
    notes: list[str] = []
    specs = _folders(args, "--train_data_dir", notes) + _folders(args, "--reg_data_dir", notes)
    if args.dataset_repeats != 1 and all(is_dreambooth(root) for root in (args.train_data_dir, args.reg_data_dir) if root):
        notes.append("--dataset_repeats has no effect: the names of the folders say how often their images are shown")
    return Described(_distinct(specs), notes=notes)


def read_metadata(args) -> Described:
    """--in_json, kohya's metadata of the images in --train_data_dir -> one set, and those of --reg_data_dir."""
    if not args.train_data_dir:
        raise UserError("--in_json has the captions of the images in --train_data_dir: name that folder, too")
    notes: list[str] = []
    origin = Origin("folder", str(args.train_data_dir), captions="metadata", table=str(args.in_json),
                    lines=_lines(args.enable_wildcard))
    specs = [plain(args, str(args.train_data_dir), origin), *_folders(args, "--reg_data_dir", notes)]
    return Described(_distinct(specs), notes=notes)


def _folders(args, flag: str, notes: list[str]) -> list[Spec]:
    """The sets of --train_data_dir or --reg_data_dir; adds to `notes`."""
    root = getattr(args, flag.lstrip("-"))
    if not root:
        return []
    found = []
    if not is_dreambooth(root):
        found = [plain(args, str(root), folder_origin(args, root, flag))]
    else:
        for name in sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith(".")):
            folder = Path(root) / name
            if not (numbered := _NUMBERED.fullmatch(name)):
                notes.append(f"{flag}: {folder} is left out: its name does not begin with how often an epoch shows each image, "
                             "as 10_name does")
                continue
            origin = Origin("folder", str(folder), captions="textfile", phrases=(numbered[2],) if numbered[2] else (),
                            lines=_lines(args.enable_wildcard), extensions=_extensions(args.caption_extension), flag=flag)
            spec = replace(plain(args, str(folder), origin), rate=float(numbered[1]))
            masks = Path(args.conditioning_data_dir or "") / name    # they may be divided as the images are
            found.append(replace(spec, mask=str(masks)) if args.conditioning_data_dir and masks.is_dir() else spec)
        notes.append(f"{flag}: images are shown as often an epoch as the names of their folders say: "
                     + ", ".join(f"{spec.rate:g}x {Path(spec.id).name}" for spec in found))
    if flag == "--reg_data_dir":    # masks are made for the images to be learned
        found = [_regularisation(replace(spec, mask="alpha" if spec.mask == "alpha" else None), args) for spec in found]
    return found


def read_captions(table: Path | str, separator: str = ",") -> dict[str, str]:
    """Captions of kohya's metadata by image key: a .json object {key: {"caption", "tags"}}, or .jsonl with "image_path".

    Tags follow each line of the caption after `separator`; a key with neither is left out. Lines are several captions: the
    reader takes the first or each, as `Origin.lines` says. A key is the path of an image, absolute or from the images' folder,
    or its file name alone; each of them with or without the extension. Raises `UserError`.
    """
    path = Path(table)
    joint = separator if separator.endswith(" ") else separator + " "
    if path.suffix.lower() == ".jsonl":
        entries = []
        for number, line in enumerate(kohya_keys.read(path).split("\n"), 1):
            if line.strip():
                row = kohya_keys.parse(line, f"{path}, line {number}")
                if not isinstance(row, dict) or not isinstance(row.get("image_path"), str):
                    raise UserError(f"{path}, line {number}: not an object with an \"image_path\"")
                entries.append((row["image_path"], row))
    else:
        entries = list(kohya_keys.load(path).items())
    found: dict[str, str] = {}
    for key, entry in entries:
        if not isinstance(entry, dict):
            raise UserError(f"{path}: {key!r} has no {{\"caption\": ..., \"tags\": ...}} but {kohya_keys.shown(entry)}")
        caption, tags = entry.get("caption") or "", entry.get("tags") or ""
        tags = joint.join(map(str, tags)) if isinstance(tags, list) else tags
        for name, value in (("caption", caption), ("tags", tags)):
            if not isinstance(value, str):
                raise UserError(f"{path}: {name} of {key!r} is no text but {kohya_keys.shown(value)}")
        if key in found:
            raise UserError(f"{path} has {key!r} twice: remove one of them")
        tags = joint.join(line.strip() for line in tags.splitlines() if line.strip())
        lines = [line.strip() for line in caption.splitlines() if line.strip()] or [""]
        if text := "\n".join(joint.join(part for part in (line, tags) if part) for line in lines):
            found[key] = text
    return found


def plain(args, id: str, origin: Origin) -> Spec:
    """The set that the flags alone describe: their size, rules, augmentation, repeats, masks and cache mode."""
    return Spec(id, origin, size_of(args), rules_of(args), flip=args.random_flip, colour=args.color_aug,
                rate=float(args.dataset_repeats), mask="alpha" if args.alpha_mask else args.conditioning_data_dir,
                latents=latents_of(args))


def folder_origin(args, root: Path | str, flag: str) -> Origin:
    """A folder of images or of .tar shards as the flags alone describe it."""
    root = Path(root)
    shards = root.suffix == ".tar" or (root.is_dir() and any(any(root.glob(pattern)) for pattern in ("*.tar", "*/*.tar")))
    way = "column" if shards else "textfile" if args.caption_extension else "auto"
    return Origin("shards" if shards else "folder", str(root), captions=way, caption_column=args.caption_column, flag=flag,
                  extensions=_extensions(args.caption_extension), lines="each" if args.enable_wildcard else "whole")


def rules_of(args) -> Rules:
    """The rules for captions that the flags give. Raises `UserError` where they contradict each other."""
    return _rules(_flags(args), "--")


def size_of(args) -> Fixed | Buckets:
    """The size that the flags give."""
    return _size(_flags(args), args)


def latents_of(args) -> str:
    """When latents are cached: "disk", "ondemand" or "off"."""
    return "off" if args.vae_cache_disable or not args.cache_latents else "ondemand" if args.vae_cache_ondemand else "disk"


def _flags(args) -> dict:
    """The flags by kohya's names. What a data set file alone can say is not there; random_crop has two defaults."""
    ours = {"num_repeats": "dataset_repeats", "flip_aug": "random_flip", "caption_prefix": "caption_prefix",
            "caption_suffix": "caption_suffix", "caption_dropout_rate": "proportion_empty_prompts"}
    same = ("resolution", "enable_bucket", "min_bucket_reso", "max_bucket_reso", "bucket_reso_steps", "bucket_no_upscale",
            "shuffle_caption", "caption_separator", "keep_tokens", "keep_tokens_separator", "secondary_separator",
            "enable_wildcard", "color_aug", "caption_dropout_every_n_epochs", "caption_tag_dropout_rate", "token_warmup_min",
            "token_warmup_step", "alpha_mask", "caption_extension")
    return {**{name: getattr(args, flag) for name, flag in ours.items()}, **{name: getattr(args, name) for name in same}}


def _rules(values: dict, place: str) -> Rules:
    rules = Rules(shuffle=values["shuffle_caption"], keep=values["keep_tokens"], separator=values["caption_separator"],
                  secondary=values["secondary_separator"] or None, keep_separator=values["keep_tokens_separator"] or "",
                  wildcard=values["enable_wildcard"], prefix=values["caption_prefix"], suffix=values["caption_suffix"],
                  empty=values["caption_dropout_rate"], empty_every=values["caption_dropout_every_n_epochs"],
                  tag_dropout=values["caption_tag_dropout_rate"], warmup_min=values["token_warmup_min"],
                  warmup_steps=values["token_warmup_step"])
    if found := captions.faults(rules):
        raise UserError(place + f"; {place}".join(found))
    return rules


def _size(values: dict, args) -> Fixed | Buckets:
    resolution, random = _pair(values["resolution"]), values.get("random_crop")
    if values["enable_bucket"]:
        random = args.random_crop if random is None else random
        return Buckets(resolution, values["min_bucket_reso"], values["max_bucket_reso"], values["bucket_reso_steps"],
                       values["bucket_no_upscale"], "random" if random else "center")
    random = not args.center_crop if random is None else random
    return Fixed(resolution, "random" if random else "center")


def _regularisation(spec: Spec, args) -> Spec:
    return replace(spec, regularisation=True, match=True, weight=args.prior_loss_weight)


def _distinct(specs: list[Spec]) -> list[Spec]:
    """Ids tell sets apart: a folder that is used again is numbered."""
    times: Counter[str] = Counter()
    found = []
    for spec in specs:
        times[spec.id] += 1
        found.append(replace(spec, id=f"{spec.id} ({times[spec.id]})") if times[spec.id] > 1 else spec)
    return found


def _lines(wildcard: bool) -> str:
    return "each" if wildcard else "first"


def _extensions(extension: str | None) -> tuple[str, ...]:
    return ("." + extension.lstrip("."),) if extension else Origin.extensions


def _pair(resolution) -> tuple[int, int]:
    return (resolution, resolution) if isinstance(resolution, int) else tuple(resolution)
