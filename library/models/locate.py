"""A base model by name -> files on this machine: a diffusers folder, one file, or a hub id that is fetched."""

import contextlib
import hashlib
import json
from pathlib import Path

from safetensors import SafetensorError, safe_open

from library.data.cache import sweep, write_whole
from library.errors import UserError

SINGLE_FILE = (".safetensors", ".ckpt")
_OTHER_FORMATS = ("*.bin", "*.onnx*", "*.msgpack", "*openvino*", "*.h5")
_KINDS = {"unet": ("StableDiffusionXL", "SDXL"), "transformer": ("StableDiffusion3", "SD 3 or 3.5")}    # by a part that tells
_VARIANTS = ("fp16", "bf16", "non_ema")    # usual ones, which nobody gets who has not named them


def find_model(name: str, flag: str, parts: tuple[str, ...], revision: str | None = None, variant: str | None = None,
               loose: tuple[str, ...] = ()) -> Path:
    """The folder or single file of a model. A hub id is fetched first: only `parts`, only one kind of weights.

    loose: patterns of files that are wanted, too, for what may also lie in no folder of its own (a VAE, a tokenizer).
    Raises `UserError` when nothing of that name exists, or a folder lacks one of the parts.
    """
    path = Path(name)
    if path.is_file():
        if path.suffix not in SINGLE_FILE:
            raise UserError(f"{flag}: {name} is a file, but neither .safetensors nor .ckpt")
        return path
    if not path.is_dir():
        if name.startswith((".", "/", "~")) or name.count("/") != 1 or path.suffix in SINGLE_FILE:
            raise UserError(f"{flag}: there is no file or folder {name}")
        if parts:    # before gigabytes of another model are fetched
            check_kind(_fetch(name, flag, (), revision, None, ()), name, flag, parts)
        path = _fetch(name, flag, parts, revision, variant, loose)
    check_kind(path, name, flag, parts)
    missing = [part for part in parts if not (path / part).is_dir()]
    if missing:
        raise UserError(f"{flag}: {name} lacks {', '.join(missing)}; a diffusers folder of this model has {', '.join(parts)}")
    return path


def check_kind(folder: Path, name: str, flag: str, parts: tuple[str, ...]) -> None:
    """Refuse a diffusers folder whose model_index.json says that it is another model than the one with these parts."""
    try:
        kind = str(json.loads((folder / "model_index.json").read_text())["_class_name"])
    except (OSError, ValueError, LookupError, TypeError):    # no pipeline: its parts will tell
        return
    ours, model = next((known for part, known in _KINDS.items() if part in parts), ("", ""))
    if not kind.startswith(ours) and kind.startswith(("StableDiffusion", "Flux")):    # others: who knows
        raise UserError(f"{flag}: {name} is a {kind}, and {model} is asked for here")


def _fetch(name: str, flag: str, parts: tuple[str, ...], revision: str | None, variant: str | None, loose) -> Path:
    from huggingface_hub import list_repo_files, snapshot_download
    # model.fp16.safetensors, model.fp16-00001-of-00002.safetensors, model.safetensors.index.fp16.json
    ignore = [*_OTHER_FORMATS, *(f"*.{other}{end}" for other in _VARIANTS if other != variant for end in (".*", "-*"))]
    wanted = [f"{part}/*" for part in parts] + ["model_index.json", *loose]
    with contextlib.suppress(Exception):    # no network: what was fetched before will do, or the next call says why not
        files = [Path(file) for file in list_repo_files(name, revision=revision)] if variant else []
        of_it = {file.parent for file in files if variant_in(file) == variant and file.suffix == ".safetensors"}
        ignore += [str(file) for file in files if file.parent in of_it and variant_in(file) == ""]    # gigabytes of no use
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=wanted, ignore_patterns=ignore))
    except Exception as error:    # no network, no such repository, no right to read it: the hub says which
        raise UserError(f"{flag}: {name} is neither a folder here nor to be had from the hub: {error}") from error


def variant_in(file: Path) -> str | None:
    """The variant that a file of weights says it is of, "" for none; None: it holds no weights."""
    words = file.name.split(".")
    if words[-1] not in ("safetensors", "bin"):
        return None
    return words[1].split("-")[0] if len(words) > 2 else ""


def has_variant(folder: Path, variant: str) -> bool:
    """Whether a network's folder has weights of this variant."""
    return any(variant_in(file) == variant for file in folder.iterdir())


def fault_of_network(folder: Path, variant: str | None = None) -> str | None:
    """Why the network in `folder` cannot be loaded, as far as its config and the headers of its weights tell."""
    try:
        json.loads((folder / "config.json").read_text())
        weights = sorted(file for file in folder.iterdir() if variant_in(file) == (variant or ""))
        for file in weights:
            if file.suffix == ".safetensors":
                with safe_open(file, framework="pt"):
                    pass
    except FileNotFoundError:
        return f"{folder} has no config.json"
    except ValueError as error:
        return f"{folder / 'config.json'} is not JSON: {error}"
    except SafetensorError as error:
        return f"{file} is damaged or cut short ({error})"
    return None if weights else f"{folder} has no weights" + (f" of the variant {variant}" if variant else "")


def fault_of_tokenizer(folder: Path) -> str | None:
    """Why there is no tokenizer in `folder`: transformers would make an empty one, and say nothing."""
    whole = (folder / "tokenizer.json").is_file() or all((folder / name).is_file() for name in ("vocab.json", "merges.txt"))
    return None if whole else f"{folder} holds no tokenizer (vocab.json and merges.txt, or tokenizer.json)"


def fingerprint(paths: list[Path], memo: Path) -> str:
    """Hash of all files in `paths` (files, or folders with theirs): what makes a cached tensor stale.

    `memo` remembers the hash of files whose size, mtime and ctime are unchanged: weights are read once.
    """
    sweep(memo.parent)
    try:
        known = json.loads(memo.read_text())
    except (OSError, ValueError):
        known = {}
    total = hashlib.blake2b(digest_size=16)
    fresh = {}
    for path in paths:
        for file in [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file()):
            status = file.stat()
            stamp = f"{file.absolute()} {status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"
            fresh[stamp] = known.get(stamp) or _hash(file)
            name = file.name if path.is_dir() else ""    # one file may be renamed
            total.update(f"{name} {fresh[stamp]}".encode())
    if not fresh.keys() <= known.keys():
        memo.parent.mkdir(parents=True, exist_ok=True)
        write_whole(memo, json.dumps(known | fresh).encode())
    return total.hexdigest()


def _hash(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "blake2b").hexdigest() if hasattr(hashlib, "file_digest") else _hash_blocks(opened)


def _hash_blocks(opened) -> str:
    digest = hashlib.blake2b()    # Python 3.10 has no file_digest
    while block := opened.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()
