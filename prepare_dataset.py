"""Look at the data of a training run before it runs: the same command, with this script's name.

    python prepare_dataset.py --train_data_dir my_images --resolution 1024 --enable_bucket --output_dir out/my_model

Writes OUTPUT_DIR/dataset_report.html: every image with its cut, its bucket and its caption, what is left out and why,
duplicates, captions that are too long, steps an epoch, and the disk that the caches take. No model is loaded; of
--pretrained_model_name_or_path, where it is given, the tokenizers alone. Ends with status 2 if training would not start.
The command may be that of any training script. It is SD3's where the model is, or a flag is given that SD3 alone has; the flags
listed here are SDXL's.
"""

import argparse
import json
import sys
from pathlib import Path

from library import dialects, errors, flags, flags_adapter, flags_sd3


def parse_args(argv=None):
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = make_parser(sd3=is_of_sd3(argv))
    args = parser.parse_args(argv)
    flags.check(parser, args)
    return args


def is_of_sd3(argv: list[str]) -> bool:
    """Whether a command is one of SD3's: by --model_family, by a flag that its scripts alone have, or by the model."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("config_file", "model_family", "pretrained_model_name_or_path"):
        parser.add_argument(f"--{name}")
    try:
        typed = parser.parse_known_args(argv)[0]
        config = dialects.read_config(Path(typed.config_file)) if typed.config_file else []
        if family := parser.parse_known_args(config + argv)[0].model_family:
            return family == "sd3"
        ours = dialects.translate(argv)
    except (dialects.DialectError, argparse.ArgumentError, OSError):    # told when it is parsed
        return False
    names = [vars(make_parser(sd3).parse_args([])) for sd3 in (True, False)]
    if {token[2:].partition("=")[0] for token in ours if token.startswith("--")} & (names[0].keys() - names[1].keys()):
        return True
    model = Path(parser.parse_known_args(ours)[0].pretrained_model_name_or_path or "")
    if model.suffix == ".safetensors" and model.is_file():
        try:
            with model.open("rb") as file:    # its header is JSON behind eight bytes that tell its length
                return any(".joint_blocks." in name for name in json.loads(file.read(int.from_bytes(file.read(8), "little"))))
        except (OSError, ValueError, OverflowError, MemoryError):
            return False
    return (model / "transformer").is_dir() or not model.exists() and "stable-diffusion-3" in str(model)


def make_parser(sd3: bool) -> flags.Parser:
    parser = flags.Parser(__doc__)
    group = parser.add_argument_group("report")
    add = group.add_argument
    add("--report_images", type=flags.number(int, low=0), default=2000, metavar="N",
        help="images shown with their picture, evenly chosen; and as many again of those with a finding")
    add("--near_duplicates", type=flags.number(int, low=0, high=7), default=4, metavar="BITS",
        help="images whose perceptual hashes differ in so few of 64 bits look the same; 0 compares files alone, and decodes less")
    add("--num_processes", type=flags.COUNT, metavar="N", help="of the training run, for its steps (default: those launched)")
    flags.switch(group, "fix", "also write OUTPUT_DIR/dataset_fix: good images and their captions as metadata.jsonl, and lists "
                 "of the others; the data themselves are never touched")
    flags.add_model_flags(parser, required=False)    # only its tokenizers are read
    if sd3:
        flags_sd3.add_sd3_text_flags(parser)
        flags_sd3.add_quantize_exclude_flag(parser)
        parser.override_defaults(single_file_config="stabilityai/stable-diffusion-3.5-medium")
    flags_adapter.add_adapter_flags(parser, sd3)    # so that the command of any script is understood
    flags.add_data_flags(parser)
    flags_adapter.add_dreambooth_flags(parser)
    flags.add_cache_flags(parser)
    flags.add_training_flags(parser)
    flags.add_optimizer_flags(parser)
    (flags.add_flow_objective_flags if sd3 else flags.add_ddpm_objective_flags)(parser)
    flags.add_checkpoint_flags(parser)
    flags.add_validation_flags(parser)
    if sd3:
        flags_sd3.add_spike_flags(parser)
        flags_sd3.add_skip_layer_flags(parser)
    flags.add_runtime_flags(parser)
    return parser


if __name__ == "__main__":
    ARGS = parse_args()    # before torch: --help and mistakes are answered at once

import os
import shutil
from collections import Counter
from itertools import count

import numpy as np

from library.data import aspect, dataset, duplicates, findings
from library.data.cache import write_whole
from library.data.sources.rows import NO_CAPTION
from library.data.sampler import Sampler
from library.models import cache_sizes, parts, sd3, sd3_output, sdxl
from library.models.locate import fault_of_tokenizer, find_model
from library.training import accelerator as running
from library.training.plan import total_steps
from library.validation import class_images, dataset_report


def load(args, seed: int, index_dir: Path) -> tuple[dataset.Data, list[str]]:
    """The data with every bad image left out, and the sentence that training would end on instead."""
    try:
        return dataset.load(args, seed, index_dir, decode=True), []
    except errors.UserError as fault:
        if args.skip_bad_images:
            raise
        said = str(fault).splitlines()[0]
    lenient = argparse.Namespace(**vars(args) | {"skip_bad_images": True})
    data = dataset.load(lenient, seed, index_dir, decode=True)    # training would name the first kind of fault alone
    bad = Counter(each.reason for each in data.dropped if each.reason not in aspect.REASONS)
    reasons = "; ".join(f"{reason}: {many}" for reason, many in bad.most_common(5)) + "; ..." * (len(bad) > 5)
    return data, [f"{sum(bad.values())} images cannot be used ({reasons}): mend or remove them, or leave them out with "
                  "--skip_bad_images" if bad else said]


def without_absent_class(args) -> tuple[argparse.Namespace, list[str]]:
    """DreamBooth's flags as they are before training has drawn images of the class, and a note on what it will draw."""
    there = class_images.count(args.class_data_dir) if args.with_prior_preservation else 0
    if not args.with_prior_preservation or there >= args.num_class_images:
        return args, []
    note = f"training begins with drawing {args.num_class_images - there} images of the class into {args.class_data_dir}; " \
           f"{f'the {there} that are there' if there else 'none'} of them are seen here"
    return (args if there else argparse.Namespace(**vars(args) | {"with_prior_preservation": False})), [note]


def model_of(args):
    """The module of the model's family: `sdxl` or `sd3`."""
    return sd3 if hasattr(args, "weighting_scheme") else sdxl


def load_tokenizers(args) -> list | None:
    """The tokenizers of the base model, SD3's with T5's if it is used; None if no model is named. Raises `UserError`."""
    name, model, found = args.pretrained_model_name_or_path, model_of(args), []
    if not name:
        return None
    wanted = tuple(part for part in model.PARTS if part in parts.TOKENIZERS and not (part == "tokenizer_3" and args.no_t5))
    for part in wanted:
        flag = f"--tokenizer{parts.TOKENIZERS.index(part) + 1}_path"
        if given := {"tokenizer": args.tokenizer1_path, "tokenizer_2": args.tokenizer2_path}.get(part):
            path = find_model(given, flag, (), loose=(f"{part}/*", "*.json", "merges.txt"))
        else:
            path = find_model(name, "--pretrained_model_name_or_path", wanted, args.revision)
            path = find_model(args.single_file_config, "--single_file_config", wanted) if path.is_file() else path
        found.append(path / part if (path / part).is_dir() else path)
    if faults := [fault for part, folder in zip(wanted, found, strict=True)
                  if part != "tokenizer_3" and (fault := fault_of_tokenizer(folder))]:
        raise errors.UserError("; ".join(faults))
    return model.load_tokenizers(parts.Base(Path(name), Path(name), None, tuple(found), None))


def long_captions(args, table, tokenizers: list) -> tuple[dict, list[str]]:
    """Rows whose end is not read, as `findings.measure_captions` has them, and a note on those whose end T5 alone reads."""
    limit = parts.clip_limit(args.max_token_length)
    clip = findings.measure_captions(table, tokenizers[:2], limit)
    if len(tokenizers) < 3:
        return clip, []
    t5 = findings.measure_captions(table, tokenizers[2:], args.tokenizer_max_length - 1)
    many = len(clip.keys() - t5.keys())
    return t5, [f"{many} captions are longer than the {limit} tokens of CLIP: T5 alone reads their ends"] if many else []


def write_fix(data: dataset.Data, found: findings.Findings, output: Path) -> Path:
    """What a person would write by hand, in a new folder: good images with their captions, and lists of the others."""
    folder = next(path for number in count(1) if not (path := output / f"dataset_fix{f'-{number}' * (number > 1)}").exists())
    folder.mkdir(parents=True)
    table, several = data.table, len(data.table.sets) > 1
    again = np.flatnonzero((found.twin >= 0) & (found.twin < np.arange(len(table))))
    reasons = [(each.set_id, each.name, each.reason) for each in data.dropped]
    reasons += [(table.spec(row).id, str(table.name[row]), f"the same file as {table.name[found.twin[row]]}") for row in again]
    without = [(set_id, name) for set_id, name, reason in reasons if reason == NO_CAPTION]
    without += [(table.spec(row).id, str(table.name[row])) for kind in ("uncaptioned", "empty") for row in found.rows[kind]]
    bare = set(np.concatenate([again, found.rows["uncaptioned"], found.rows["empty"]]).tolist())
    texts = {"dropped.txt": ["\t".join(each if several else each[1:]) for each in reasons],
             "captions_missing.txt": ["\t".join(each if several else each[1:]) for each in without]}
    for number, spec in enumerate(table.sets):
        name = f"metadata-{number + 1}-{Path(spec.id).name}.jsonl" if several else "metadata.jsonl"
        texts[name] = []
        for row in np.flatnonzero(table.set_of == number).tolist():
            if row not in bare:
                own, file = table.texts(row), str(table.name[row])    # in the words of datasets, and of kohya's --in_json
                texts[name].append(json.dumps({"file_name": file, "text": own if len(own) > 1 else own[0], "image_path": file,
                                               "caption": "\n".join(own)}, ensure_ascii=False))
    for name, lines in texts.items():
        write_whole(folder / name, "".join(line + "\n" for line in lines).encode())
    return folder


def refuse_inside(output: Path, specs: list) -> None:
    """What --fix writes would be read as captions of the images that it lies among. Raises `UserError`."""
    for spec in specs:
        root = Path(spec.origin.path).resolve()
        if spec.origin.kind in ("folder", "shards") and root in (output.resolve(), *output.resolve().parents):
            raise errors.UserError(f"--output_dir {output} lies in the data's own folder {root}, where --fix writes nothing: "
                                   "name another place")


def spell(size: int) -> str:
    return f"{size / 1e9:,.2f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"


def main(args):
    if os.environ.get("RANK", "0") != "0":    # launched several times: one look is enough
        return
    running.calm()
    output, seed = Path(args.output_dir), args.seed or 0
    args, unseen = without_absent_class(args)
    if args.fix:
        refuse_inside(output, dataset.describe(args).specs)
    cached = Path(args.embedding_cache_dir or output / "cache")
    data, faults = load(args, seed, cached / "scan")
    table = data.table
    notes = unseen + [note.splitlines()[0].rstrip(":") for note in data.notes]    # the names stand in a table of their own
    if args.seed is None:
        notes.append("no --seed is given, so training draws its own: prompts, and the choice by --max_train_samples, are those "
                     "of seed 0 here")

    # captions, and pictures that look the same
    long, near, tokenizers = None, None, None
    try:
        if model_of(args) is sd3:
            sd3_output.check_sizes(None, table.buckets)
        if tokenizers := load_tokenizers(args):
            long, more = long_captions(args, table, tokenizers)
            notes += more
    except errors.UserError as fault:
        faults.append(str(fault))
    if args.near_duplicates:
        hashes, unread = duplicates.hash_images(data.read, table.content, cached / "scan" / "perceptual.npy")
        notes += [f"{table.name[row]} cannot be compared: {fault}" for row, fault in unread.items()]
        near = duplicates.near(hashes, args.near_duplicates)
    found = findings.find(data, near, long)

    # steps and disk
    processes = args.num_processes or int(os.environ.get("WORLD_SIZE", "1"))
    order = Sampler(table.bucket_of, seed, np.array(table.batch_sizes) * args.gradient_accumulation_steps * processes,
                    table.set_of, [spec.rate for spec in table.sets])
    steps = order.steps_before(1)
    cards, lines = [("Steps an epoch", f"{steps:,}", f"of {args.train_batch_size} images × {args.gradient_accumulation_steps} "
                     f"accumulated × {processes} process{'es' * (processes > 1)}")], []
    try:
        total = total_steps(order, args.num_train_epochs, args.max_train_steps)
        cards.append(("Steps of the run", f"{total:,}", f"{order.epoch_of(total - 1) + 1:,} epochs are begun"))
        channels = 16 if model_of(args) is sd3 else 4
        sizes = cache_sizes.on_disk(model_of(args), args, data, channels, order.visits(total, len(table.sets)), tokenizers)
        place = next(path for path in (cached, *cached.absolute().parents) if path.exists())
        needed, free = sum(size for *_, size in sizes), shutil.disk_usage(place).free
        cards.append(("Caches", spell(needed), f"on disk in the end; {spell(free)} are free there now"))
        lines = [(name, f"{many:,}", spell(size)) for name, many, size in sizes]
        if needed > free:
            notes.append(f"the caches take {spell(needed)} in all, and where {cached} lies {spell(free)} are free")
    except errors.UserError as fault:
        faults.append(str(fault))

    output.mkdir(parents=True, exist_ok=True)
    title = ", ".join(Path(spec.id).name for spec in table.sets[:3]) + (" and more" if len(table.sets) > 3 else "")
    facts = dataset_report.Facts(cards, faults, {"Caches": lines} if lines else {}, notes, running.command())
    page = dataset_report.write_report(output / "dataset_report.html", data, found, facts, title=title, seed=seed,
                                       pictures=args.report_images, variants=args.cache_variants)
    running.say(dataset.describe_table(table, args.gradient_accumulation_steps * processes))
    counts = {"dropped": len(data.dropped)} | {kind: len(rows) for kind, rows in found.rows.items()}
    for kind, many in counts.items():
        running.say(f"{findings.KINDS[kind][0]}: {many}" if many else "")
    if args.fix:
        running.say(f"wrote {write_fix(data, found, output)}")
    running.say(f"wrote {page}")
    if faults:
        raise errors.UserError(f"training would not start: {'; '.join(faults)}. {page} shows every image that is concerned")


if __name__ == "__main__":
    with errors.exit_on_user_error("prepare_dataset.py"):
        main(ARGS)
