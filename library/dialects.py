"""Other trainers' flag names and config files -> our flags. Standard library only.

kohya's sd-scripts, Ascend's port of it and diffusers' sibling scripts call the same knobs by other names.
`translate` turns a command line written for them into ours before argparse sees it, so that one flag has
one declaration, one help text and one default.
"""

import json
from pathlib import Path

RENAMED = {
    # kohya sd-scripts, and Ascend's sd-scripts-xl
    "vae": "pretrained_vae_model_name_or_path",
    "max_train_epoch": "num_train_epochs",
    "max_train_epochs": "num_train_epochs",
    "min_snr_gamma": "snr_gamma",
    "lr_scheduler_num_cycles": "lr_num_cycles",
    "lr_scheduler_power": "lr_power",
    "optimizer_type": "optimizer",
    "max_data_loader_n_workers": "dataloader_num_workers",
    "caption_extention": "caption_extension",    # kohya keeps this old misspelling too
    "caption_dropout_rate": "proportion_empty_prompts",
    "flip_aug": "random_flip",
    "resize_interpolation": "image_interpolation_mode",
    "cache_latents_to_disk": "cache_latents",
    "cache_text_encoder_outputs_to_disk": "cache_text_encoder_outputs",
    "xformers": "enable_xformers_memory_efficient_attention",
    "resume": "resume_from_checkpoint",
    "log_with": "report_to",
    "log_tracker_name": "tracker_project_name",
    "huggingface_repo_id": "hub_model_id",
    "huggingface_token": "hub_token",
    # diffusers' sibling scripts, and torch.distributed.launch
    "local-rank": "local_rank",
    "validation_prompts": "validation_prompt",
}

# A switch of theirs -> a flag of ours with a value.
REPLACED = {
    "v_parameterization": ("prediction_type", "v_prediction"),
    "no_half_vae": ("vae_dtype", "fp32"),
    "use_safetensors": ("save_model_as", "safetensors"),
}

# Spellings of values, by our flag.
VALUES = {
    "optimizer": {"adamw8bit": "adamw_8bit", "adamwfused": "adamw_fused"},
    "save_precision": {"fp32": "float", "float32": "float", "float16": "fp16", "bfloat16": "bf16"},
    "vae_dtype": {"float": "fp32", "float32": "fp32", "float16": "fp16", "bfloat16": "bf16"},
    "image_interpolation_mode": {"linear": "bilinear", "cubic": "bicubic", "area": "box"},
    "mixed_precision": {"none": "no"},
}


class DialectError(ValueError):
    """A config file that cannot be read, or a value that has no meaning here."""


def names() -> list[str]:
    """Every foreign flag, with its dashes."""
    return [f"--{name}" for name in (*RENAMED, *REPLACED)]


def translate(argv: list[str]) -> list[str]:
    """A command line in any of the dialects -> the same in our flags.

    A `--config_file` is read and put before the command line, which therefore overrides it.
    Raises `DialectError`.
    """
    for index, token in enumerate(argv):
        name, equals, value = token.partition("=")
        if name == "--config_file":
            if not equals and index + 1 == len(argv):
                raise DialectError("--config_file: the name of a .json or .toml file is missing")
            argv = read_config(Path(value if equals else argv[index + 1])) + list(argv)
            break

    translated = []
    flag = ""
    for token in argv:
        if not token.startswith("--"):
            translated.append(_value(flag, token))
            continue
        name, equals, value = token[2:].partition("=")
        flag = RENAMED.get(name, name)
        if name in REPLACED:
            flag, implied = REPLACED[name]
            if equals:
                raise DialectError(f"--{name} takes no value; write --{flag} instead")
            translated.append(f"--{flag}={implied}")
        else:
            translated.append(f"--{flag}={_value(flag, value)}" if equals else f"--{flag}")
    return translated


def _value(flag: str, value: str) -> str:
    if flag == "optimizer":    # kohya writes AdamW, AdaFactor
        value = value.lower()
    return VALUES.get(flag, {}).get(value.lower(), value)


def read_config(path: Path) -> list[str]:
    """A flat or sectioned .json or .toml file -> a command line. Keys are flags, with or without dashes.

    kohya's files put flags in sections of any name; sections are opened up. true and false set switches,
    null leaves the default, a list gives several values.
    """
    if path.suffix.lower() not in (".json", ".toml"):
        raise DialectError(f"--config_file: {path} is neither .json nor .toml")
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if path.suffix.lower() == ".json" else _toml(text)
    except OSError as error:
        raise DialectError(f"--config_file: cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise DialectError(f"--config_file: {path} is not valid {path.suffix[1:].upper()}: {error}") from None
    if not isinstance(content, dict):
        raise DialectError(f"--config_file: {path} must hold one object of flags and values")
    return [token for key, value in _flatten(content) for token in _tokens(key, value)]


def _toml(text: str) -> dict:
    try:
        import tomllib
    except ModuleNotFoundError:    # Python 3.10
        import tomli as tomllib
    return tomllib.loads(text)


def _flatten(content: dict):
    for key, value in content.items():
        if isinstance(value, dict):
            yield from _flatten(value)
        else:
            yield key.lstrip("-"), value


def _tokens(key: str, value) -> list[str]:
    if value is None:
        return []
    if value is True and key in REPLACED:
        return [f"--{key}"]
    if value is False and key in REPLACED:
        return []
    if isinstance(value, bool):
        return [f"--{key}={str(value).lower()}"]
    if isinstance(value, list):
        return [f"--{key}", *map(str, value)]
    return [f"--{key}={value}"]
