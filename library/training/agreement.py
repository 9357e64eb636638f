"""What all processes of a run must have in common, compared before the first step. Where they differ, the run ends there.

The main process says what differs, the others leave with its exit status in silence.
"""

import hashlib
import os
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np

from library.errors import UserError
from library.training import processes, sharding

# Flags whose value may differ between machines: where something lies there, and what it is called there. What lies there
# is compared itself.
LOCAL = {"pretrained_model_name_or_path", "pretrained_vae_model_name_or_path", "single_file_config", "tokenizer1_path",
         "tokenizer2_path", "train_data_dir", "reg_data_dir", "conditioning_data_dir", "data_backend_config", "dataset_config",
         "in_json", "dataset_name", "cache_dir", "embedding_cache_dir", "class_data_dir", "instance_data_dir", "init_lora",
         "lycoris_config", "output_dir", "config_file", "local_rank", "hub_token", "dataloader_num_workers"}
_PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "numpy", "safetensors", "peft", "tokenizers", "torch-npu")
_SHOWN = 3
_SPOTS, _SPOT = 16, 4096    # what is read of a file of weights: bytes at each of so many places
_WHOLE = 4 * 2**20          # smaller files are read whole


def check(what: str, facts: dict[str, object], advice: str) -> None:
    """Compare `facts`, plain values by name, between all processes, each of which calls this.

    Raises `UserError` on the main process, naming the first differences with both values, and leaves with status 2 on the
    others. what: of what they are, advice: what to do about a difference, both for that message.
    """
    if processes.world() == 1:
        return
    everyone = processes.gather([(processes.host(), {name: str(value) for name, value in facts.items()})])
    names = dict.fromkeys(name for _, each in everyone for name in each)
    differ = [name for name in names if len({each.get(name) for _, each in everyone}) > 1]
    if differ:
        told = "; ".join(f"{name} is {_by_rank([(at, each.get(name, 'absent')) for at, each in everyone])}"
                         for name in differ[:_SHOWN])
        _refuse(f"the processes of this run differ in {what}: {told}{_more(len(differ))}. {advice}")


def check_start(args, device_type: str) -> None:
    """Flags, versions, code and kind of device of all processes. Raises `UserError`."""
    check("their flags", {f"--{name}": value for name, value in vars(args).items() if name not in LOCAL},
          "Start all of them by the same command")
    check("what is installed", {"the device": device_type, **_versions()}, "Install the same on all machines")
    check("their code", _code(), "Copy the same code to all machines")


def check_engine(accelerator) -> None:
    """What accelerate's config, which each machine has for itself, makes of the run. Raises `UserError`."""
    check("their config of accelerate", {
        "mixed_precision": accelerator.mixed_precision,
        "distributed_type": sharding.engine(accelerator),
        **{name: value for name, value in sorted(os.environ.items()) if name.startswith(("FSDP_", "ACCELERATE_DEEPSPEED_"))}},
        "Use one on all machines")


def check_model(files: dict[str, Path]) -> None:
    """The files of the base model, by what messages call them: their sizes, headers, and what they hold in a few places."""
    if processes.world() > 1:
        check("their base model", {name: _sample(path) for name, path in files.items()},
              "Copy the same model to all machines")


def check_names(names: np.ndarray, place: str) -> None:
    """What the images of a data set are called, in their order."""
    if processes.world() > 1:
        digest = _digest("\0".join(names.tolist()).encode(errors="surrogateescape"))
        _check_rows(f"the images in {place}", digest, lambda: names.tolist(), lambda: names.tolist())


def check_table(table) -> None:
    """The columns of a `library.data.table.Table`: content, size, bucket and captions of every image. Raises `UserError`."""
    if processes.world() == 1:
        return
    sets = {f"data set {number + 1}": _short([each.text, each.rate, each.weight, each.flip, each.colour, each.latents])
            for number, each in enumerate(table.sets)}
    check("their data sets", {"the list of buckets": _short(table.buckets), "the batch sizes": _short(table.batch_sizes), **sets},
          "Describe them the same on all machines")
    columns = [table.content, table.size, table.resized, table.bucket_of, table.set_of, table.caption_start, table.mask_content]
    texts = "\0".join([*table.name.tolist(), *table.captions.tolist()]).encode(errors="surrogateescape")
    digest = _digest(texts, *(np.ascontiguousarray(column).tobytes() for column in columns))

    def rows():
        masks = table.mask_content.tolist() or [b""] * len(table)
        return [repr((name, content, size, resized, table.buckets[bucket], kind, mask, table.texts(row)))
                for row, (name, content, size, resized, bucket, kind, mask) in enumerate(zip(
                    table.name.tolist(), table.content.tolist(), table.size.tolist(), table.resized.tolist(),
                    table.bucket_of.tolist(), table.set_of.tolist(), masks, strict=True))]

    _check_rows("the images to train on", digest, rows, lambda: table.name.tolist())


def check_fault(fault: UserError) -> None:
    """Let all processes go on, to look for more faults, where each has met one here. Raises `fault` where some have not."""
    if isinstance(fault, processes.Apart):    # it has been compared, and is of another process
        raise fault
    try:
        processes.gather([], faulty=True)
    except processes.Apart:
        raise fault from None


def check_output(folder: Path) -> None:
    """Refuse an output folder that is not one and the same for all processes. Raises `UserError`."""
    if processes.world() == 1:
        return
    apart = [(number, where) for number, (first, where) in
             enumerate(processes.gather([(processes.team(folder)[0], processes.host())])) if first]
    if apart:
        hosts = ", ".join(dict.fromkeys(where for _, where in apart))
        _refuse(f"--output_dir {folder} is not one folder for all processes: rank {apart[0][0]} (host {hosts}) does not see what "
                f"rank 0 (host {processes.host()}) writes there. Name a folder on storage that all machines share")


def _check_rows(what: str, digest: str, rows: Callable[[], list[str]], names: Callable[[], list[str]]) -> None:
    """Compare a digest; where it differs, name the first rows that do. rows, names: called then, one text a row each."""
    if len(set(processes.gather([digest]))) == 1:
        return
    own = [hashlib.blake2b(text.encode(errors="surrogateescape"), digest_size=8).digest() for text in rows()]
    main = processes.gather([own] if processes.is_main() else [])[0]
    called = names()
    at = [row for row in range(max(len(own), len(main))) if own[row:row + 1] != main[row:row + 1]][:_SHOWN]
    found = processes.gather([(processes.host(), len(own), [(row, called[row] if row < len(own) else "nothing") for row in at])])
    number, (where, count, told) = next((number, each) for number, each in enumerate(found) if each[2])
    ours = [called[row] if row < len(called) else "nothing" for row, _ in told]    # of the main process, which speaks
    rows_told = "; ".join(f"{name} is not the same" if name == mine else f"row {row + 1} is {mine} on rank 0 and {name} on rank "
                          f"{number}" for (row, name), mine in zip(told, ours, strict=True))
    _refuse(f"{what} differ between rank 0 (host {found[0][0]}, {len(main)} images) and rank {number} (host {where}, {count} "
            f"images): {rows_told}. Copy the same data to all machines, with their captions")


def _refuse(message: str) -> None:
    if processes.is_main():
        raise UserError(message)
    sys.exit(2)


def _by_rank(values: list[tuple[str, str]]) -> str:
    """"1 on rank 0 (host a) and 2 more, and 3 on rank 1 (host b)"."""
    ranks: dict[str, list[int]] = {}
    for number, (_, value) in enumerate(values):
        ranks.setdefault(value, []).append(number)
    return " and ".join(f"{value} on rank {where[0]} (host {values[where[0]][0]}{_more(len(where), 1)})"
                        for value, where in ranks.items())


def _more(count: int, shown: int = _SHOWN) -> str:
    return f", and {count - shown} more" if count > shown else ""


def _versions() -> dict[str, str]:
    found = {"Python": ".".join(map(str, sys.version_info[:2]))}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "absent"
    return found


def _code() -> dict[str, str]:
    """A digest of every file of the library, and of the script."""
    root = Path(__file__).resolve().parents[2]
    paths = [path for folder in ("library", "third_patch") for path in sorted(root.glob(f"{folder}/**/*.py"))]
    files = {str(path.relative_to(root)): path for path in paths}
    script = getattr(sys.modules["__main__"], "__file__", None)
    if script and os.path.isfile(script):
        files[os.path.basename(script)] = Path(script)
    return {name: _digest(path.read_bytes())[:8] for name, path in files.items()}


def _sample(path: Path) -> str:
    """A digest of a file's size and of what it holds in a few places; of a small file, of all."""
    size = path.stat().st_size
    with path.open("rb") as file:
        parts = [file.read(min(size, _WHOLE))]
        for spot in range(_SPOTS if size > _WHOLE else 0):
            file.seek(_WHOLE + (size - _WHOLE - _SPOT) * spot // (_SPOTS - 1))
            parts.append(file.read(_SPOT))
    return f"{_digest(*parts)[:8]} ({size} bytes)"


def _short(value) -> str:
    return _digest(repr(value).encode())[:8]


def _digest(*parts: bytes) -> str:
    total = hashlib.blake2b(digest_size=16)
    for part in parts:
        total.update(part)
    return total.hexdigest()
