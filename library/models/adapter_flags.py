"""The flags of an adapter, in whichever trainer's terms -> its settings and rates."""

import json
import re
from dataclasses import replace

from library.errors import UserError
from library.models import adapter_files, adapter_find, adapter_merge, adapters, quantize, sd3_adapter
from library.models.adapter_files import SD3, Adapter
from library.models.adapter_settings import PRESETS, RATE_ARGS, Rates, Settings, block_rates, check, from_kohya, nearest


def adapter_of(args, network) -> tuple[Adapter | None, Settings, Rates, tuple[str, ...]]:
    """The adapter to start from, or None; settings, rates, and the formats of the files. Raises `UserError` for any of them.

    network: a UNet or transformer that is not used further, on the meta device: what does not fit it is told before anything is
    loaded.
    """
    start, (settings, rates) = start_of(args, network.config), settings_of(args, network.config)
    family = adapter_files.family_of(network.config)
    formats = formats_of(args, start.kind if start else settings.kind, family)
    quantize.check_names(network, getattr(args, "quantize_exclude", []), "--quantize_exclude")
    if start:
        adapter_merge.check_fits(start, {"transformer" if family == SD3 else "unet": network})
    elif settings.kind == "lycoris":
        adapters.add(network, [], settings)
    else:
        _check_patterns(args, network, settings)
        adapters.targets(network, settings)
    return start, settings, rates, formats


def _check_patterns(args, network, settings: Settings) -> None:
    """Refuse a --rank_pattern or --alpha_pattern that fits no layer: it would change nothing."""
    if args.network_module or not (args.rank_pattern or args.alpha_pattern):
        return
    layers = list(adapters.targets(network, replace(settings, rank_pattern={}, alpha_pattern={})))
    for flag in ("rank_pattern", "alpha_pattern"):
        for pattern, _ in getattr(args, flag):
            try:
                fits = any(re.search(rf"(^|\.)({pattern})(\.|$)", name) for name in layers)
            except re.error as error:
                raise UserError(f"--{flag} {pattern} is not a regular expression: {error}") from None
            if not fits:
                words = {word for name in layers for word in (name, *name.split("."))}
                raise UserError(f"--{flag} {pattern} fits no layer that gets an adapter{nearest(pattern, words)}")


def precisions_of(args, device: str) -> list[str]:
    """Precisions of the UNet or transformer and of the text encoders. Raises `UserError` for what cannot run on this device."""
    flags = ["base_model_precision", "text_encoder_1_precision", "text_encoder_2_precision"]
    flags += ["text_encoder_3_precision"] if hasattr(args, "text_encoder_3_precision") else []
    for flag in flags:
        quantize.check(getattr(args, flag), device, f"--{flag}")
    return [getattr(args, flag) for flag in flags]


def settings_of(args, config) -> tuple[Settings, Rates]:
    """What --network_module and its arguments say, or else --lora_type, --rank and the like. Raises `UserError`."""
    sd3 = adapter_files.family_of(config) == SD3
    if args.network_module:
        given = args.rank, args.lora_alpha, _pairs(args.network_args), args.lora_dropout or None
        if getattr(args, "learning_rate_te3", None) and given[2].get("train_t5xxl", "").lower() in ("true", "1"):
            del given[2]["train_t5xxl"]    # that is what the rate says
        if sd3 and (args.network_module not in ("networks.lora_sd3", "lycoris.kohya") or given[2].keys() & set(RATE_ARGS[:4])):
            raise UserError(f"--network_module {args.network_module} is not for SD3 with these --network_args: there are "
                            "networks.lora_sd3 and lycoris.kohya, without rates of SDXL's blocks (down_lr_weight and so on)")
        own = sd3 and args.network_module == "networks.lora_sd3"
        settings, rates = sd3_adapter.from_kohya(*given) if own else from_kohya(args.network_module, *given, config)
        for name in ("rank_dropout", "module_dropout"):
            if getattr(args, name) and getattr(settings, name):
                raise UserError(f"--{name} and --network_args {name}={getattr(settings, name)} are the same: give one of them")
        settings = replace(settings, **{name: getattr(settings, name) or getattr(args, name)
                                        for name in ("rank_dropout", "module_dropout")})
    else:
        settings, ratio = _settings_of(args), args.loraplus_lr_ratio or 1.0
        if sd3 and settings.targets == "convolutions":
            raise UserError("--lora_targets convolutions: SD3 has none; there are attention, attention-ff, kohya, all-linear and "
                            "names of modules")
        rates = Rates(ratio, ratio, None if sd3 else block_rates(
            args.down_lr_weight, args.mid_lr_weight, args.up_lr_weight, unet_config=config))
    check(settings)
    return settings, rates


def _settings_of(args) -> Settings:
    if args.init_lora:    # what it holds stands in for these
        return Settings(dropout=args.lora_dropout, rank_dropout=args.rank_dropout, module_dropout=args.module_dropout)
    if args.lora_type == "lycoris":
        return Settings("lycoris", rank=args.rank or 16, lycoris_config=_read(args.lycoris_config))
    named = [name for text in args.lora_targets for name in text.replace(" ", "").split(",") if name]    # diffusers has commas
    targets = named[0] if len(named) == 1 and named[0] in PRESETS else tuple(named)
    blocks = getattr(args, "lora_blocks", None)
    return Settings("dora" if args.use_dora else args.lora_type, args.rank or 16, args.lora_alpha, targets, args.lora_dropout,
                    args.rank_dropout, args.module_dropout, args.use_rslora, args.lora_init_type,
                    getattr(args, "conv_rank", None), getattr(args, "conv_alpha", None), dict(args.rank_pattern),
                    dict(args.alpha_pattern), args.lokr_factor or -1,
                    None if blocks is None else sd3_adapter.blocks_of(blocks, "--lora_blocks"))


def formats_of(args, kind: str, family: str) -> tuple[str, ...]:
    """What --lora_format, or what else is given, means for this kind of adapter: diffusers, kohya or both. Raises `UserError`."""
    wanted, t5 = args.lora_format, bool(getattr(args, "learning_rate_te3", None))
    if t5 and wanted in ("diffusers", "both"):
        raise UserError(f"--lora_format {wanted}: diffusers has no loader for adapters of T5, which --learning_rate_te3 trains: "
                        "give --lora_format kohya, which ComfyUI and generate.py read")
    if wanted is None:
        for_kohya = args.network_module or args.save_model_as == "safetensors" or kind not in ("lora", "dora") or t5
        wanted = "kohya" if for_kohya else "diffusers"
    formats = ("diffusers", "kohya") if wanted == "both" else (wanted,)
    for each in formats:
        adapter_files.check_format(kind, each, family)
    return formats


def start_of(args, config) -> Adapter | None:
    """The adapter of --init_lora. Raises `UserError`, also where the flags say that its text encoders are not trained."""
    if not args.init_lora:
        return None
    path, weight = adapter_find.find(args.init_lora)
    if weight != 1:
        raise UserError(f"--init_lora {args.init_lora}: there is no weight to start from; convert_lora.py merge FILE=WEIGHT "
                        "--output OTHER makes a file of it")
    adapter = adapter_files.read(path, config)
    for key, own in adapter.modules.items():
        if not all(tensor.isfinite().all() for tensor in own.values()):
            raise UserError(f"--init_lora {args.init_lora}: {key} holds NaN or infinite values: the file is of a run that went "
                            "wrong, or damaged")
    rates = args.learning_rate_te1, args.learning_rate_te2, getattr(args, "learning_rate_te3", None) or 0
    for number, (part, rate) in enumerate(zip(("text_encoder", "text_encoder_2", "text_encoder_3"), rates, strict=True), 1):
        if adapter.part(part) and not (args.train_text_encoder and rate != 0):
            flag = "--train_text_encoder" + " and --learning_rate_te3" * (number == 3)
            raise UserError(f"--init_lora {args.init_lora} also changes text encoder {number}, which this run leaves as it is: "
                            f"give {flag}, or a file of the {'transformer' if adapter.family == SD3 else 'UNet'} alone")
    return adapter


def _pairs(texts: list[str]) -> dict[str, str]:
    wrong = [text for text in texts if "=" not in text]
    if wrong:
        raise UserError(f"--network_args {wrong[0]!r} is not like conv_dim=8")
    return dict(text.split("=", 1) for text in texts)


def _read(path: str) -> dict:
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except OSError as error:
        raise UserError(f"--lycoris_config: cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"--lycoris_config: {path} is not valid JSON: {error}") from None
