"""Look at the data of a training run before it runs: the same command, with this script's name.

    python prepare_dataset.py --train_data_dir my_images --resolution 1024 --enable_bucket --output_dir out/my_model

Writes OUTPUT_DIR/dataset_report.html: every image with its cut, its bucket and its caption, what is left out and why,
duplicates, captions that are too long, steps an epoch, and the disk that the caches take. No model is loaded; of
--pretrained_model_name_or_path, where it is given, the tokenizers alone. Ends with status 2 if training would not start.
"""

from library import errors, flags, flags_adapter


def parse_args(argv=None):
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
    flags_adapter.add_adapter_flags(parser)    # so that the command of any script is understood
    flags.add_data_flags(parser)
    flags_adapter.add_dreambooth_flags(parser)
    flags.add_cache_flags(parser)
    flags.add_training_flags(parser)
    flags.add_optimizer_flags(parser)
    flags.add_ddpm_objective_flags(parser)
    flags.add_checkpoint_flags(parser)
    flags.add_validation_flags(parser)
    flags.add_runtime_flags(parser)
    args = parser.parse_args(argv)
    flags.check(parser, args)
    return args


if __name__ == "__main__":
    ARGS = parse_args()    # before torch: --help and mistakes are answered at once

import argparse
import json
import os
import shutil
from collections import Counter
from itertools import count
from pathlib import Path

import numpy as np

from library.data import aspect, captions, dataset, duplicates, findings, prepare
from library.data.cache import write_whole
from library.data.sources.rows import NO_CAPTION
from library.data.sampler import Sampler
from library.models import sdxl
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


def load_tokenizers(args) -> list | None:
    """Both tokenizers of the base model; None if no model is named. Raises `UserError`."""
    name, found = args.pretrained_model_name_or_path, []
    if not name:
        return None
    for part, flag, given in (("tokenizer", "--tokenizer1_path", args.tokenizer1_path),
                              ("tokenizer_2", "--tokenizer2_path", args.tokenizer2_path)):
        if given:
            path = find_model(given, flag, (), loose=(f"{part}/*", "*.json", "merges.txt"))
        else:
            path = find_model(name, "--pretrained_model_name_or_path", sdxl.PARTS[4:6], args.revision)
            path = find_model(args.single_file_config, "--single_file_config", sdxl.PARTS[4:6]) if path.is_file() else path
        found.append(path / part if (path / part).is_dir() else path)
    if faults := [fault for folder in found if (fault := fault_of_tokenizer(folder))]:
        raise errors.UserError("; ".join(faults))
    return sdxl.load_tokenizers(sdxl.Base(Path(name), Path(name), None, tuple(found), None))


def size_of_caches(args, data: dataset.Data, visits: list[int]) -> list[tuple[str, int, int]]:
    """(what, how many, bytes) of what the run keeps on disk. visits: how often it shows an image of each set."""
    table, kept = data.table, [min(args.cache_variants, seen) for seen in visits]
    spare = (table.resized != np.array(table.buckets)[table.bucket_of]).any(axis=1)
    kinds = (table.set_of.astype(np.int64) << 33) | (table.bucket_of.astype(np.int64) << 1) | spare
    _, first, times = np.unique(kinds, return_index=True, return_counts=True)    # images of one kind take the same
    lines = {"latents": [0, 0], "masks": [0, 0]}
    for row, images in zip(first.tolist(), times.tolist(), strict=True):
        spec, (width, height) = table.spec(row), table.buckets[table.bucket_of[row]]
        if spec.latents != "off":
            most = visits[table.set_of[row]] if spec.every_cut_new else kept[table.set_of[row]]
            cuts, pixels = images * table.variants(row, most), width // 8 * (height // 8)
            for name, size in (("latents", 8 * 4), ("masks", 4 if spec.mask and spec.latents == "disk" else 0)):    # float32
                lines[name][0] += cuts * bool(size)
                lines[name][1] += cuts * pixels * size
    sizes = [(name, many, total) for name, (many, total) in lines.items() if many]
    if args.cache_text_encoder_outputs and not args.train_text_encoder and not any(captions.endless(s.text) for s in table.sets):
        prompts = {*prepare.all_prompts(table, kept), *args.validation_prompt, args.validation_negative_prompt or ""}
        precision = args.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        length = max(1, args.max_token_length // sdxl.PIECE) * sdxl.PIECE + 2
        each = (length * (768 + 1280) + 1280) * (4 if precision == "no" else 2)
        sizes.append(("prompts", len(prompts), len(prompts) * each))
    return sizes


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
    long, near = None, None
    try:
        if tokenizers := load_tokenizers(args):
            long = findings.measure_captions(table, tokenizers, max(1, args.max_token_length // sdxl.PIECE) * sdxl.PIECE)
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
        sizes = size_of_caches(args, data, order.visits(total, len(table.sets)))
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
