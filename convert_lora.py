"""Show adapter files (LoRA and the like), and convert, merge, extract or resize them.

    python convert_lora.py show my_lora.safetensors
    python convert_lora.py convert my_lora.safetensors --lora_format kohya --output my_lora_kohya.safetensors
    python convert_lora.py merge style.safetensors=0.7 cat.safetensors --into stabilityai/stable-diffusion-xl-base-1.0 \\
        --output out/merged.safetensors
    python convert_lora.py merge style.safetensors=0.7 cat.safetensors --rank 32 --output both.safetensors
    python convert_lora.py extract --base base_model --tuned my_model --rank 64 --output my_lora.safetensors
    python convert_lora.py resize my_lora.safetensors --energy 0.95 --rank 32 --output smaller.safetensors

Files of diffusers, kohya and LyCORIS are read, of SDXL, SD 3 and 3.5. No input is ever changed. docs/convert_lora.md says what
each does.
"""

from library import errors, flags

WITH = {"show": ("json",), "convert": ("lora_format", "precision"),
        "merge": ("into", "base", "rank", "energy", "lora_format", "precision"),
        "extract": ("base", "tuned", "rank", "energy", "conv_rank", "lora_targets", "text_encoders", "lora_format", "precision"),
        "resize": ("rank", "energy", "lora_format", "precision")}


def parse_args(argv=None):
    parser = flags.Parser(__doc__)
    parser.usage = "%(prog)s show|convert|merge|extract|resize [FILE ...] [flags]"
    group = parser.add_argument_group("command")
    add = group.add_argument
    add("command", choices=WITH, metavar="COMMAND",
        help="show what a file holds; convert it to another format; merge files into a model or into one file; extract a LoRA "
             "from two models; resize files to a lower rank")
    add("files", nargs="*", metavar="FILE",
        help="an adapter, or the folder of a script that trains them; to merge, also FILE=WEIGHT")
    add("--config", metavar="MODEL", help="where no model is a folder: folder or hub id of its configs and tokenizers")
    flags.switch(group, "json", "show as JSON")
    group = parser.add_argument_group("output")
    add = group.add_argument
    add("--output", metavar="FILE", help="the .safetensors to write; of merge --into, also a folder for diffusers, or .ckpt")
    add("--lora_format", choices=("diffusers", "kohya", "lycoris"), help="of the file (default: the first input's, or diffusers)")
    add("--precision", choices=("fp32", "fp16", "bf16"),
        help="of what is written (default: convert and merge --into keep it, else fp32)")
    flags.switch(group, "overwrite", "replace an output file that exists")
    group = parser.add_argument_group("models")
    add = group.add_argument
    add("--into", metavar="MODEL", help="merge into this model: a diffusers folder, a hub id, or one .safetensors/.ckpt file")
    add("--base", metavar="MODEL", help="the model before training; to merge DoRA, OFT and GLoRA with others into one file, too")
    add("--tuned", metavar="MODEL", help="the model after training")
    group = parser.add_argument_group("rank")
    add = group.add_argument
    add("--rank", "--network_dim", type=flags.COUNT, metavar="N", help="rank of the result; with --energy, the highest")
    add("--energy", type=flags.number(float, high=1, above=0), metavar="SHARE",
        help="the least rank, module by module, that keeps this share of the sum of squares, such as 0.95")
    add("--conv_rank", type=flags.COUNT, metavar="N", help="extract from 3x3 convolutions, too, with this rank")
    add("--lora_targets", nargs="+", metavar="NAME",
        help="extract from these: attention, attention-ff, kohya, convolutions, all-linear, or names (default: attention)")
    flags.switch(group, "text_encoders", "extract from both CLIP text encoders, too")
    args = parser.parse_args(argv)
    check(parser, args)
    return args


def check(parser, args) -> None:
    """Refuse what has no meaning for the command, and what it lacks."""
    own = (*WITH[args.command], "command", "files", "config", *(("output", "overwrite") if args.command != "show" else ()))
    for name, value in vars(args).items():
        if value not in (None, False) and name not in own:
            parser.error(f"--{name} is not for {args.command}, but for {' and '.join(key for key in WITH if name in WITH[key])}")
    files = {"show": "a FILE or more", "merge": "a FILE or more", "extract": "no FILE"}.get(args.command, "one FILE")
    fits = {"a FILE or more": len(args.files) > 0, "no FILE": not args.files, "one FILE": len(args.files) == 1}[files]
    for fine, what in ((fits, files), (args.command == "show" or args.output, "--output FILE"),
                       (args.command != "convert" or args.lora_format or args.precision, "--lora_format or --precision"),
                       (args.command != "extract" or (args.base and args.tuned), "--base and --tuned"),
                       (args.command not in ("extract", "resize") or args.rank or args.energy, "--rank or --energy")):
        if not fine:
            parser.error(f"{args.command} takes {what}")
    if args.into and (idle := [name for name in ("base", "rank", "energy", "lora_format") if getattr(args, name)]):
        parser.error(f"--{idle[0]} is for merging files into one file; --into merges them into a model")
    if args.base and args.command == "merge" and not (args.rank or args.energy):
        parser.error("--base needs --rank or --energy: what depends on a base becomes a LoRA")


if __name__ == "__main__":
    ARGS = parse_args()    # before torch: --help and mistakes are answered at once

import argparse
import contextlib
import dataclasses
import json
import sys
from pathlib import Path

import torch

from library.training import accelerator as running
running.calm()    # before PEFT, which imports every quantiser that is installed
from library.models import adapter_files, adapter_find, adapter_svd, families, sd3, sdxl, single_file, stored
from library.models.adapter_files import SD3, SDXL, Adapter
from library.models.adapter_settings import SDXL_UNET, Settings
from library.models.locate import find_model
from library.training import devices


def read_config(args, family: str = "", *models: Path) -> dict | None:
    """Config of the UNet or transformer of these models or of --config; None: each adapter tells of its own."""
    if not models and not args.config:
        return None
    family = family or families.of_model(args.config, "--config")
    return families.config_of(family, families.find_configs(family, args.config, *models))


def read(files: list[tuple[Path, float]], config: dict | None) -> list[tuple[Adapter, float]]:
    """Adapters of one family, each with its weight. Raises `UserError`."""
    weighted = [(adapter_files.read(file, config), weight) for file, weight in files]
    of = {adapter.family: file for (adapter, _), (file, _) in zip(weighted, files, strict=True)}
    if len(of) > 1:
        raise errors.UserError(f"{of[SDXL]} is an adapter of SDXL, and {of[SD3]} one of SD 3: they cannot be merged")
    return weighted


def check_output(args, inputs: list[Path], family: str = "") -> Path:
    """Where to write. Raises `UserError` if it is an input, or there is something already."""
    output, model = Path(args.output), bool(args.into)
    folder = output.is_dir() or (model and not output.suffix.lstrip(".0123456789"))    # sdxl_v1.5 is one, too
    if not folder and output.suffix not in (".safetensors", ".ckpt")[:1 + model]:
        raise errors.UserError(f"--output {output}: the file ends in .safetensors" + (" or .ckpt, a folder in neither" * model))
    if family == SD3 and output.suffix == ".ckpt":
        raise errors.UserError(f"--output {output}: SD 3 is written as .safetensors, or as a folder")
    if any(output.exists() and each.exists() and output.samefile(each) for each in inputs):
        raise errors.UserError(f"--output {output} is one of the inputs, which are never changed: name another file")
    if output.is_dir() and (not model or any(output.iterdir())):
        raise errors.UserError(f"--output {output} is a folder that holds something: name a new one" if model else
                               f"--output {output} is a folder: name a file in it that ends in .safetensors")
    if output.is_file() and not args.overwrite:
        raise errors.UserError(f"--output {output} exists: name another file, or replace it with --overwrite")
    return output


def write(args, output: Path, adapter: Adapter, config: dict | None) -> None:
    fmt = args.lora_format or adapter.format
    if not args.lora_format and fmt == "diffusers" and (adapter.kind not in ("lora", "dora") or adapter.part("text_encoder_3")):
        fmt = "kohya"    # the other kind, or T5, came with another input
    dtype = sdxl.DTYPES[args.precision] if args.precision else None if args.command == "convert" else torch.float32
    for key, own in adapter.modules.items():
        if any(tensor.isfinite().all() and not tensor.to(dtype).isfinite().all() for tensor in own.values() if dtype):
            raise errors.UserError(f"{key} holds values too large for {args.precision}: use bf16 or fp32")
    adapter_files.write(output, adapter, fmt, config or SDXL_UNET, dtype)
    print(f"wrote {output}: {adapter.kind}, {fmt}, {len(adapter.modules)} modules, {output.stat().st_size / 1e6:.1f} MB")


def say_kept(kept: dict[str, adapter_svd.Kept], what: str, rank: int | None) -> None:
    for part, each in kept.items():
        ranks = f"{min(each.ranks)} to {max(each.ranks)}" if len(set(each.ranks)) > 1 else f"{each.ranks[0]}"
        print(f"{part}: {len(each.ranks)} modules of rank {ranks}, {100 * each.share:.4g}% of {what} (sum of squares)")
        if each.clamped:
            print(f"{part}: {each.clamped} modules have less than rank {rank} in all: they are whole")
        if each.turned:
            print(f"{part}: {each.turned} modules of other kinds have become LoRA")


def show(args) -> None:
    shown, config = [], read_config(args)
    for text in args.files:
        path, _ = adapter_find.find(text)
        adapter = adapter_files.read(path, config)
        shown.append({"file": str(path), "bytes": path.stat().st_size, **adapter_svd.describe(adapter)})
    if args.json:
        return print(json.dumps(shown, indent=2, ensure_ascii=False))
    for each in shown:
        print(f"{each['file']}: {each['kind']}, {each['format']}, {each['family']}, {'/'.join(each['dtype'])}, "
              f"{each['bytes'] / 1e6:.2f} MB")
        for part, own in each["networks"].items():
            ranks, alphas = (", ".join(f"{value:g} ({many})" if len(own[what]) > 1 else f"{value:g}" for value, many in
                                       sorted(own[what].items())) or "none" for what in ("ranks", "alphas"))
            size = "not known without the base" if own["norm"] is None else f"{own['norm']:.4g}"
            print(f"  {part}: {own['modules']} modules, rank {ranks}, alpha {alphas}, norm of the update {size}")
        for name, value in sorted(each["metadata"].items()):
            print(f"  {name}: {value if len(value) <= 200 else f'{value[:200]}... ({len(value)} characters: --json shows all)'}")


def merge_into(args) -> None:
    """Adapters into a model, which keeps its precision; what it draws is what generate.py draws with them."""
    from library.models import adapter_merge, sd3_output, sdxl_output    # PEFT before diffusers, which looks for it once
    family, files = families.of_model(args.into, "--into"), [adapter_find.find(text) for text in args.files]
    model = families.MODULES[family]
    path = find_model(args.into, "--into", model.PARTS if family == SDXL else ())
    output = check_output(args, [path, *(file for file, _ in files)], family)
    in_one = output.suffix in (".safetensors", ".ckpt")
    if family == SD3:
        base, parts = sd3.find_whole(args.into, "--into", args.config, held_alone=in_one)
        config, configs = families.config_of(family, base.configs), base.configs
    else:
        configs = families.find_configs(family, args.config, path, wanted=sdxl.PARTS[4:])
        base, parts = sdxl.Base(path, configs, None, (configs / "tokenizer", configs / "tokenizer_2"), None), sdxl.PARTS[:4]
        schedule = sdxl.load_schedule(base, None, path.is_file() and single_file.contents_of(path)[2])
        config = families.config_of(family, configs)
    weighted = read(files, config)
    changed = {key.partition(".")[0] for adapter, _ in weighted for key in adapter.modules}
    networks, dtypes = {}, {}
    for part in [part for part in parts if part in changed or in_one or path.is_file()]:
        dtype = stored.dtype_of(configs if part in base.apart else base.path, part)
        dtypes[part] = torch.promote_types(dtype, sdxl.DTYPES[args.precision]) if args.precision else dtype
        networks[part] = model.load_part(base, part, dtypes[part])
    for adapter, weight in sorted(weighted, key=lambda each: adapter_merge.runs_beside(each[0])):
        adapter_merge.merge(adapter, networks, weight * adapter.multiplier)
    side = config["sample_size"] * 8
    saving = argparse.Namespace(save_precision=args.precision, save_model_as=output.suffix[1:] if in_one else "diffusers",
                                resolution=(side, side), proportion_empty_prompts=0)
    if family == SDXL:
        sdxl_output.save_model(output.with_suffix("") if in_one else output, saving, base, networks, None, schedule)
    elif in_one:    # what there was in the one, or the folder, each part in its precision
        states = {part: {name: single_file.for_file(name, tensor, dtypes[part]) for name, tensor in network.state_dict().items()}
                  for part, network in networks.items()}
        sd3_output.save_file(output, states, sdxl.DTYPES.get(args.precision), (side, side))
    else:
        sd3_output.save_model(output, saving, base, networks, None)
    print(f"wrote {output}: {', '.join(sorted(changed))} with {len(weighted)} adapters in the weights")


def device() -> str:
    return "cuda" if devices.best() == "cuda" else "cpu"    # elsewhere there is no SVD


def merge(args) -> None:
    if args.into:
        return merge_into(args)
    files = [adapter_find.find(text) for text in args.files]
    family = families.of_model(args.base, "--base") if args.base else ""
    models = [find_model(args.base, "--base", families.MODULES[family].PARTS[:1])] if args.base else []
    output, config = check_output(args, [*models, *(file for file, _ in files)]), read_config(args, family, *models)
    weighted = read(files, config)
    parts = {key.partition(".")[0] for adapter, _ in weighted for key in adapter.modules}
    with contextlib.ExitStack() as stack:
        networks = {part: families.on_meta(family, part, families.find_configs(family, args.config, *models))
                    for part in parts if models}
        reads = {part: stack.enter_context(stored.open_part(models[0], part, network, config))
                 for part, network in networks.items()}

        def weight_of(key):
            part, _, module = key.partition(".")
            return reads[part](f"{module}.weight")

        made, kept = adapter_svd.combine(weighted, args.rank, args.energy, weight_of if models else None, device())
    said = {"modelspec.merged_from": ", ".join(f"{file.name}={weight:g}" for file, weight in files)}
    say_kept(kept, "the sum", args.rank)
    write(args, output, dataclasses.replace(made, metadata=made.metadata | said, format=weighted[0][0].format), config)


def extract(args) -> None:
    from library.models import adapters    # before diffusers, which looks for PEFT once
    from library.models.adapter_settings import PRESETS
    family = families.of_model(args.base, "--base")
    if (other := families.of_model(args.tuned, "--tuned")) != family:
        raise errors.UserError(f"--base {args.base} is a model of {family}, and --tuned {args.tuned} one of {other}")
    denoiser = families.MODULES[family].PARTS[0]
    parts = (denoiser, *(sdxl.TEXT_ENCODERS if args.text_encoders else ()))
    models = [find_model(name, flag, parts) for name, flag in ((args.base, "--base"), (args.tuned, "--tuned"))]
    output, config = check_output(args, models), read_config(args, family, *models)
    configs, names = families.find_configs(family, args.config, *models), tuple(args.lora_targets or ["attention"])
    if family == SD3 and (args.conv_rank or "convolutions" in names):
        raise errors.UserError("--conv_rank and --lora_targets convolutions are for SDXL: SD 3 has no such convolutions")
    preset = names[0] if len(names) == 1 and names[0] in PRESETS else None
    unet = Settings(rank=args.rank or sys.maxsize, targets=preset or names, conv_rank=args.conv_rank)
    text = dataclasses.replace(unet, targets=preset or "attention", conv_rank=None)    # as in training
    modules, kept, found = {}, {}, []
    with contextlib.ExitStack() as stack:
        for part in parts:    # all of both models is looked at before the first minute of SVD
            network = families.on_meta(family, part, configs)
            reads = [stack.enter_context(stored.open_part(path, part, network, config)) for path in models]
            targets = adapters.targets(network, unet if part == denoiser else text)
            found.append((part, network, *reads, {name: rank for name, (rank, _) in targets.items()}))
        for part, *rest in found:
            own, each, whole = adapter_svd.extract(part, *rest, args.energy, device())
            modules |= own
            share = each.total / whole if whole else 0.0
            print(f"{part}: {100 * share:.4g}% of its difference (sum of squares) lies in these layers")
            kept |= {part: each} if own else {}
    if not modules:
        raise errors.UserError(f"{args.base} and {args.tuned} do not differ in these layers: name other models, or other layers "
                               "with --lora_targets")
    say_kept(kept, "the difference there", args.rank)
    write(args, output, Adapter("lora", modules, {}, "diffusers", family), config)


def convert_or_resize(args) -> None:
    path, _ = adapter_find.find(args.files[0])
    output, config = check_output(args, [path]), read_config(args)
    adapter = adapter_files.read(path, config)
    if args.command == "resize":
        adapter, kept = adapter_svd.resize(adapter, args.rank, args.energy, device())
        say_kept(kept, "the update", args.rank)
    write(args, output, adapter, config)


def main(args):
    {"show": show, "merge": merge, "extract": extract}.get(args.command, convert_or_resize)(args)


if __name__ == "__main__":
    with errors.exit_on_user_error("convert_lora.py"):
        main(ARGS)
