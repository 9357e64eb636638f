"""The flags of an adapter, in whichever trainer's terms -> its settings and rates."""

import json

from library.errors import UserError
from library.models.adapter_files import check_format
from library.models.adapter_settings import Rates, Settings, check, from_kohya

PRESETS = ("attention", "attention-ff", "kohya", "convolutions", "all-linear")


def settings_of(args, unet_config) -> tuple[Settings, Rates]:
    """--network_module and its arguments, or else --lora_type, --rank and the like.

    Raises `UserError`, also for a kind of adapter that the format of the file cannot hold.
    """
    settings, rates = _settings_of(args, unet_config)
    check(settings)
    check_format(settings.kind, args.lora_format)
    return settings, rates


def _settings_of(args, unet_config) -> tuple[Settings, Rates]:
    if args.network_module:
        settings, rates = from_kohya(args.network_module, args.rank, args.lora_alpha, _pairs(args.network_args),
                                     args.lora_dropout or None, unet_config)
        return settings, rates
    if args.network_args:
        raise UserError("--network_args needs --network_module (networks.lora or lycoris.kohya)")
    ratio = args.loraplus_lr_ratio or 1.0
    rates = Rates(ratio, ratio)
    if args.lora_type == "lycoris":
        return Settings("lycoris", rank=args.rank or 16, lycoris_config=_read(args.lycoris_config)), rates
    if args.use_dora and args.lora_type != "lora":
        raise UserError(f"--use_dora goes with --lora_type lora, not {args.lora_type}")
    named = args.lora_targets
    targets = named[0] if len(named) == 1 and named[0] in PRESETS else tuple(named)
    return Settings("dora" if args.use_dora else args.lora_type, args.rank or 16, args.lora_alpha, targets, args.lora_dropout,
                    args.rank_dropout, args.module_dropout, args.use_rslora, args.lora_init_type, args.conv_rank,
                    args.conv_alpha), rates


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
