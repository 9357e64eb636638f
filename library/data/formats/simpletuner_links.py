"""Sets of a multidatabackend.json that name each other: masks, caches of captions, folders of latents.

`kinds` is the sets by "dataset_type", and under SHOWN those of images.
"""

import difflib
import os
from pathlib import Path

from library.errors import UserError

SHOWN = "image or eval"    # a "dataset_type" in messages


def one_of(one: dict, name: str, alias: str, default):
    """The value of a key that has two names. Raises `UserError` if they say different things."""
    if name in one and alias in one and one[name] != one[alias]:
        raise UserError(f'"{name}" and "{alias}" mean the same and say different things: keep one')
    return one.get(name, one.get(alias, default))


def needed(one: dict, *keys: str) -> list:
    """The values of keys that a set of its "type" cannot do without. Raises `UserError`, naming those that are missing."""
    missing = [f'"{key}"' for key in keys if not one.get(key)]
    if missing:
        raise UserError(f'{" and ".join(missing)} {"are" if len(missing) > 1 else "is"} missing, and needed for '
                        f'"type": "{one.get("type", "local")}"')
    return [one[key] for key in keys]


def image_folder(one: dict) -> str:
    """Where the images (or masks) of a local set lie. Raises `UserError` if it does not say."""
    return one_of(one, "instance_data_dir", "instance_data_root", None) or needed(one, "instance_data_dir")[0]


def _named(key: str, name: str, kind: str, kinds: dict) -> dict:
    """The set called `name`, which must be of `kind`."""
    for found in kinds[kind]:
        if found["id"] == name:
            return found
    ids = [each["id"] for each in kinds[kind]]
    near = difflib.get_close_matches(name, ids, n=1, cutoff=0.5)
    raise UserError(f'"{key}" names "{name}", and no set in use of "dataset_type": "{kind}" is called so'
                    + (f'; did you mean "{near[0]}"?' if near else ""))


def mask_folder(one: dict, kinds: dict) -> str | None:
    """Folder of the masks of an image set, whichever of the two sets names the other. Raises `UserError` for several."""
    linked = one.get("conditioning_data", [])
    names = [*([linked] if isinstance(linked, str) else linked),
             *(each["id"] for each in kinds["conditioning"] if each.get("source_dataset_id") == one["id"])]
    names = list(dict.fromkeys(names))
    if len(names) > 1:
        raise UserError(f'"conditioning_data": an image has one mask, and these have those of {" and ".join(names)}')
    return image_folder(_named("conditioning_data", names[0], "conditioning", kinds)) if names else None


def check_masks(one: dict, kinds: dict) -> None:
    """Raise `UserError` for a conditioning set that is no folder of masks, or belongs to no images."""
    if one.get("conditioning_type") != "mask":
        raise UserError('"conditioning_type" is missing: write "mask", the one kind there is here')
    if one.get("type", "local") != "local":
        raise UserError(f'"type" is "{one["type"]}": masks lie in a folder ("local")')
    image_folder(one)
    owners = [each.get("conditioning_data", []) for each in kinds[SHOWN]]
    if "source_dataset_id" in one:
        _named("source_dataset_id", one["source_dataset_id"], SHOWN, kinds)
    elif not any(one["id"] in ([linked] if isinstance(linked, str) else linked) for linked in owners):
        raise UserError('these masks belong to no images: name the set as "conditioning_data" of the images\' set')


def latent_dir(one: dict, kinds: dict) -> Path | None:
    """Where an image set's latents are kept: its own "cache_dir_vae", or that of the image_embeds set it names."""
    store = _named("image_embeds", one["image_embeds"], "image_embeds", kinds) if one.get("image_embeds") else {}
    folder = one.get("cache_dir_vae") or store.get("cache_dir")
    return Path(folder) if folder else None


def check_folders(kinds: dict) -> None:
    """Raise `UserError` unless every folder of latents is one set's alone."""
    taken = [(each["id"], "cache_dir", each.get("cache_dir")) for each in kinds["text_embeds"]]
    taken += [(each["id"], key, each.get(key)) for each in kinds[SHOWN] for key in ("cache_dir", "csv_cache_dir")]
    latents = [(each["id"], "cache_dir_vae" if each.get("cache_dir_vae") else "image_embeds", latent_dir(each, kinds))
               for each in kinds[SHOWN]]
    for name, key, folder in latents:
        for other, its_key, its_folder in taken:
            if folder and its_folder and os.path.realpath(folder) == os.path.realpath(its_folder):
                raise UserError(f'"{key}" of data set "{name}" and "{its_key}" of data set "{other}" are one folder, {folder}: '
                                "give each its own")
        taken.append((name, key, folder))


def prompt_store(kinds: dict) -> dict:
    """Where and how encoded captions are kept: those fields of `Described`. Raises `UserError` if sets differ in them."""
    stores = kinds["text_embeds"]
    if not stores:
        return {}
    defaults = [each for each in stores if each.get("default")] if len(stores) > 1 else stores
    if len(defaults) != 1:
        raise UserError(f'"default" is true for {len(defaults) or "none"} of the text_embeds sets '
                        f'{", ".join(each["id"] for each in stores)}: it must be for one')
    used = [_named("text_embeds", each["text_embeds"], "text_embeds", kinds) if each.get("text_embeds") else defaults[0]
            for each in kinds[SHOWN]]
    ways = [{"prompt_dir": Path(each["cache_dir"]) if each.get("cache_dir") else None,
             "prompts": "off" if each.get("text_cache_disable") else "ondemand" if each.get("text_cache_ondemand") else "disk",
             "prompt_batch_size": each.get("text_encoder_batch_size")} for each in used or defaults]
    if any(way != ways[0] for way in ways):
        raise UserError(f'"text_embeds": encoded captions are kept in one place and one way here, and the sets name '
                        f'{" and ".join(dict.fromkeys(each["id"] for each in used))}, which differ: name one')
    return ways[0]
