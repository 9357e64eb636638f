"""Other trainers' flag names and config files -> our flags. Standard library only.

kohya's sd-scripts, Ascend's port of it, SimpleTuner and diffusers' sibling scripts call the same knobs by other names.
`translate` turns a command line written for them into ours before argparse sees it, so that one flag has
one declaration, one help text and one default.
"""

import re
import sys
from pathlib import Path

from library import config_files
from library.config_files import DialectError

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
    "training_shift": "flow_schedule_shift",
    "t5xxl_max_token_length": "tokenizer_max_length",
    "flip_aug": "random_flip",
    "resize_interpolation": "image_interpolation_mode",
    "cache_latents_to_disk": "cache_latents",
    "cache_text_encoder_outputs_to_disk": "cache_text_encoder_outputs",
    "resume": "resume_from_checkpoint",
    "log_with": "report_to",
    "log_tracker_name": "tracker_project_name",
    "huggingface_repo_id": "hub_model_id",
    "huggingface_token": "hub_token",
    # diffusers' sibling scripts, and torch.distributed.launch
    "local-rank": "local_rank",
    "validation_prompts": "validation_prompt",
    "max_sequence_length": "tokenizer_max_length",    # of SD3's T5
    # SimpleTuner
    "use_gradient_checkpointing": "gradient_checkpointing",
    "checkpoint_step_interval": "checkpointing_steps",
    "save_total_limit": "checkpoints_total_limit",
    "validation_step_interval": "validation_steps",
    "validation_epoch_interval": "validation_epochs",
    "caption_dropout_probability": "proportion_empty_prompts",
    "rescale_betas_zero_snr": "zero_terminal_snr",
    "optimizer_config": "optimizer_args",
    "optimizer_beta1": "adam_beta1",
    "optimizer_beta2": "adam_beta2",
    "peft_lora_target_modules": "lora_targets",
}

# A switch of theirs -> a flag of ours with a value.
REPLACED = {
    "v_parameterization": ("prediction_type", "v_prediction"),
    "no_half_vae": ("vae_dtype", "fp32"),
    "use_safetensors": ("save_model_as", "safetensors"),
    "output_kohya_format": ("lora_format", "both"),    # diffusers' DreamBooth
}

# Spellings of values, by our flag.
VALUES = {
    "optimizer": {
        # kohya; PagedAdamW32bit is PagedAdamW, and DAdaptation an earlier form of DAdaptAdam
        "adamw8bit": "adamw_8bit", "adamwfused": "adamw_fused", "pagedadamw": "bnb-adamw-paged",
        "pagedadamw32bit": "bnb-adamw-paged", "pagedadamw8bit": "bnb-adamw8bit-paged", "lion8bit": "bnb-lion8bit",
        "pagedlion8bit": "bnb-lion8bit-paged", "ademamix8bit": "bnb-ademamix8bit", "pagedademamix8bit": "bnb-ademamix8bit-paged",
        "sgdnesterov": "sgd", "sgdnesterov8bit": "bnb-sgd8bit", "dadaptation": "dadapt-adam", "dadaptadampreprint": "dadapt-adam",
        "dadaptadam": "dadapt-adam", "dadaptlion": "dadapt-lion", "dadaptsgd": "dadapt-sgd", "dadaptadagrad": "dadapt-adagrad",
        "dadaptadan": "dadapt-adan", "adamwschedulefree": "adamw-schedulefree", "radamschedulefree": "radam-schedulefree",
        "sgdschedulefree": "sgd-schedulefree", "torch.optim.adamw": "adamw",
        # SimpleTuner
        "torch-adamw": "adamw", "bnb-adamw8bit": "adamw_8bit", "adamw_schedulefree": "adamw-schedulefree",
        "adamw_schedulefree+no_kahan": "adamw-schedulefree"},
    "save_precision": {"fp32": "float", "float32": "float", "float16": "fp16", "bfloat16": "bf16"},
    "vae_dtype": {"float": "fp32", "float32": "fp32", "float16": "fp16", "bfloat16": "bf16"},
    "image_interpolation_mode": {"linear": "bilinear", "cubic": "bicubic", "area": "box"},
    "mixed_precision": {"none": "no"},
    "attention_mechanism": {"diffusers": "default", "flash-attn": "flash", "flash-attn-2": "flash"},    # SimpleTuner
    "sageattention_usage": {"both": "training+inference"},
    "lora_type": {"standard": "lora"},
    "lora_init_type": {"default": "kaiming"},
    "lora_format": {"comfyui": "kohya"},
    "weighting_scheme": {"uniform": "none"},              # kohya
    "flow_schedule_shift": {"0": "1", "0.0": "1"},    # SimpleTuner: off
}

# What has no counterpart, and why.
ABSENT = {
    "base_model_default_dtype": "layers that are not quantised are in --mixed_precision, and adapters in float32",
    "webhook_reporting_interval": "webhooks are told of previews alone",
    # diffusers' DreamBooth
    "upcast_before_saving": "what is trained is float32, and --save_precision is that of the file",
    "sample_batch_size": "class images are drawn one at a time, each by a seed of its own",
    "prior_generation_precision": "class images are drawn in --mixed_precision",
    "adam_weight_decay_text_encoder": "--adam_weight_decay is of all that is trained",
    **{f"prodigy_{name}": f"--optimizer_args {name}=... says it"
       for name in ("beta3", "decouple", "use_bias_correction", "safeguard_warmup")},
    # kohya's SD3
    **dict.fromkeys(("clip_l", "clip_g", "t5xxl"), "text encoders lie in the one file, or come from --single_file_config"),
    "blocks_to_swap": "--gradient_checkpointing and, for adapters, --base_model_precision save memory",
    "fp8_base": "--base_model_precision fp8-torchao says it, for adapters",
}

# SimpleTuner has one program for all models: what it calls a family and a type is a script here.
SCRIPTS = {("sdxl", "full"): "train_sdxl.py", ("sdxl", "lora"): "train_lora_sdxl.py",
           ("sd3", "full"): "train_sd3.py", ("sd3", "lora"): "train_lora_sd3.py"}
FLAVOURS = {"sdxl": {"base-1.0": "stabilityai/stable-diffusion-xl-base-1.0",
                     "base-0.9": "stabilityai/stable-diffusion-xl-base-0.9"},
            "sd3": {"medium": "stabilityai/stable-diffusion-3.5-medium", "large": "stabilityai/stable-diffusion-3.5-large"}}
# Switches of diffusers, kohya and Ascend that choose one attention.
ATTENTION = {"enable_xformers_memory_efficient_attention": "xformers", "xformers": "xformers", "sdpa": "sdpa",
             "enable_npu_flash_attention": "npu"}
_OF_SIMPLETUNER = ("model_family", "model_type", "model_flavour")
_PROMPTS = "user_prompt_library"    # SimpleTuner's file of validation prompts
_OF_KOHYAS_NETWORKS = ("network_train_unet_only", "network_train_text_encoder_only", "dim_from_weights", "text_encoder_lr")


def names(known: list[str] | None = None) -> list[str]:
    """Every foreign flag, with its dashes; only what says one of the flags `known`, if that is given."""
    says = RENAMED | {name: flag for name, (flag, _) in REPLACED.items()} | {_PROMPTS: "validation_prompt"}
    says |= dict.fromkeys(ATTENTION, "attention_mechanism") | dict.fromkeys(_OF_KOHYAS_NETWORKS, "network_module")
    ours = [name for name, flag in says.items() if known is None or f"--{flag}" in known]
    return [f"--{name}" for name in (*ours, *_OF_SIMPLETUNER)]


def translate(argv: list[str], script: str | None = None, adapters: int = 0) -> list[str]:
    """A command line in any of the dialects -> the same in our flags.

    A `--config_file` is read and put before the command line, which therefore overrides it.
    script: the name of the script that is to understand it; None: of the one that runs. adapters: how many text encoders may have
    one there (SD3: three, with T5); 0 where none is trained. Raises `DialectError`.
    """
    for index, token in enumerate(argv):
        name, equals, value = token.partition("=")
        if name == "--config_file":
            if not equals and index + 1 == len(argv):
                raise DialectError("--config_file: the name of a .json, .toml or .env file is missing")
            argv = read_config(Path(value if equals else argv[index + 1])) + list(argv)
            break

    groups = _with_attention(_with_library(_without_zeros(_groups(argv))))
    translated, model = _of_networks(groups, adapters) if adapters else [], {}
    for name, equals, values in groups:
        flag = RENAMED.get(name, name)
        if name in _OF_KOHYAS_NETWORKS and adapters:
            continue
        if name in ABSENT:
            raise DialectError(f"--{name} is not here: {ABSENT[name]}. Leave it out")
        if name in _OF_SIMPLETUNER:
            if len(values) != 1:
                raise DialectError(f"--{name} takes one value, not {len(values)}")
            model[name] = values[0]
        elif name in REPLACED:
            flag, implied = REPLACED[name]
            if equals:
                raise DialectError(f"--{name} takes no value; write --{flag} instead")
            translated += [f"--{flag}={implied}", *(_value(flag, value) for value in values)]
        else:
            values = [each for value in values for each in _split(flag, _value(flag, value))]
            joined = equals and len(values) == 1
            translated += ([f"--{flag}={values[0]}"] if joined else [f"--{flag}"] * bool(name) + values)
    return _model(model, script or Path(sys.argv[0]).name) + translated


def _groups(argv: list[str]) -> list[tuple[str, bool, list[str]]]:
    """(flag without its dashes, whether its value came behind =, values); the flag is "" for what stands before the first."""
    groups = []
    for token in argv:
        if token.startswith("--"):
            name, equals, value = token[2:].partition("=")
            groups.append((name, bool(equals), [value] if equals else []))
        else:
            groups = groups or [("", False, [])]
            groups[-1][2].append(token)
    return groups


def _without_zeros(groups: list[tuple[str, bool, list[str]]]) -> list[tuple[str, bool, list[str]]]:
    """SimpleTuner's way to let epochs or steps alone decide: the other one is 0, and is taken out here."""
    for name, other in (("num_train_epochs", "max_train_steps"), ("max_train_steps", "num_train_epochs")):
        given = {each: values for each, _, values in groups}    # the last one counts
        if given.get(name) == ["0"]:
            if given.get(other, ["0"]) == ["0"]:
                raise DialectError(f"--{name} 0 leaves the length of the run to --{other}: give that")
            groups = [group for group in groups if group[0] != name]
    return groups


def _with_library(groups: list[tuple[str, bool, list[str]]]) -> list[tuple[str, bool, list[str]]]:
    """The prompts of --user_prompt_library are drawn beside --validation_prompt."""
    named = [values for name, _, values in groups if name == _PROMPTS]
    if not named:
        return groups
    if len(named[-1]) != 1:
        raise DialectError(f"--{_PROMPTS} takes one value, not {len(named[-1])}")
    typed = [values for name, _, values in groups if RENAMED.get(name, name) == "validation_prompt"]
    prompts = [*(typed[-1] if typed else []), *config_files.read_prompts(Path(named[-1][0])).values()]
    others = [group for group in groups if RENAMED.get(group[0], group[0]) not in (_PROMPTS, "validation_prompt")]
    return others + ([("validation_prompt", False, prompts)] if prompts else [])


def _with_attention(groups: list[tuple[str, bool, list[str]]]) -> list[tuple[str, bool, list[str]]]:
    """Switches that choose an attention -> --attention_mechanism, in the place of the last; those that are off are left out."""
    switches = {name: ((values or ["true"])[-1].lower(), place) for place, (name, _, values) in enumerate(groups)
                if name in ATTENTION}    # the last of each counts
    on = {name: place for name, (value, place) in switches.items() if value not in ("false", "0", "no", "off")}
    for name, (value, _) in switches.items():
        if name in on and value not in ("true", "1", "yes", "on"):
            raise DialectError(f"--{name}: {value!r} is neither true nor false")
    if len({ATTENTION[name] for name in on}) > 1:
        raise DialectError(f"{' and '.join(f'--{name}' for name in on)} exclude each other: each chooses an attention")
    chosen = {place: ("attention_mechanism", True, [ATTENTION[name]]) for name, place in on.items()}
    return [chosen.get(place, group) for place, group in enumerate(groups) if group[0] not in ATTENTION or place in chosen]


def _of_networks(groups: list[tuple[str, bool, list[str]]], encoders: int) -> list[str]:
    """kohya trains adapters of the text encoders, too, unless told not to, or unless their outputs are cached.

    --text_encoder_lr (kohya's and diffusers') is one rate for both CLIPs, or two; of SD3 the third is T5's, which one or two
    leave alone unless --network_args have train_t5xxl, as kohya's do. --dim_from_weights is what is done anyway.
    """
    given = {name: values for name, _, values in groups}    # the last one counts
    on = {name for name, values in given.items() if (values or ["true"])[-1].lower() not in ("false", "0", "no", "off")}
    rates = given.get("text_encoder_lr", [])
    if "text_encoder_lr" in given and not 1 <= len(rates) <= encoders:
        most = f"one rate for both {'text encoders, or two' if encoders == 2 else 'CLIPs, or two, and a third for T5'}"
        raise DialectError(f"--text_encoder_lr takes {most}, not {len(rates)}" + (
            ": SDXL has no T5, whose rate is the third" if encoders < len(rates) == 3 else ""))
    if rates:
        t5 = len(rates) == 3 or encoders == 3 and "train_t5xxl=true" in map(str.lower, given.get("network_args", []))
        rates = [rates[min(place, len(rates) - 1)] for place in range(3 if t5 else 2)]
    flags = [f"--learning_rate_te{place}={rate}" for place, rate in enumerate(rates, 1)]
    if "network_train_text_encoder_only" in on:
        flags.append("--unet_lr=0")
    cached = on & {"cache_text_encoder_outputs", "cache_text_encoder_outputs_to_disk"}
    by_default = "network_module" in on and not cached and not on & {"network_train_unet_only", "cache_only"}
    if "train_text_encoder" not in given and ("network_train_text_encoder_only" in on or by_default):
        flags.append("--train_text_encoder")
    return flags


def _split(flag: str, value: str) -> list[str]:
    """SimpleTuner's lists in one word: sizes, 1024x1024,1280x768 (1024,768 is one: width and height), and keywords, a=1,b=2."""
    if flag == "optimizer_args":
        return re.split(r",\s*(?=\w+\s*=)", value)
    if flag == "lora_targets" and value.startswith("["):
        return re.findall(r"[\w.]+", value)
    if flag == "validation_guidance_skip_layers":
        return re.findall(r"[^\s,\[\]]+", value)
    return value.split(",") if flag == "validation_resolution" and "x" in value.lower() else [value]


def _model(given: dict[str, str], script: str) -> list[str]:
    """Flags for SimpleTuner's choice of a model. Raises `DialectError` if it is another script's, or none's."""
    families = {script: which for which, script in SCRIPTS.items()}
    own_family, own_type = families.get(script, ("sdxl", None))
    family, kind = given.get("model_family", own_family), given.get("model_type", own_type)
    for name, value, known in (("model_family", family, FLAVOURS), ("model_type", kind, ("full", "lora", None)),
                               ("model_flavour", given.get("model_flavour"), (None, *FLAVOURS.get(family, ())))):
        if value not in known:
            more = f" for {family}; leave it out where --pretrained_model_name_or_path names the model"
            more *= name == "model_flavour"
            raise DialectError(f"--{name} is {value!r}, and there is {' and '.join(filter(None, known))} here{more}")
    if script in families and SCRIPTS[family, kind] != script:
        other = SCRIPTS[family, kind]
        absent = "" if (Path(__file__).parent.parent / other).exists() else ", which this version does not have"
        raise DialectError(f"--model_family {family} with --model_type {kind} is not what {script} trains, but {other}{absent}")
    flavour = given.get("model_flavour")
    return [f"--pretrained_model_name_or_path={FLAVOURS[family][flavour]}"] if flavour else []


def script_of(config: str | Path) -> str:
    """The script that a config file is for, by its model_family and model_type; else train_sdxl.py. Leaves where it is none's."""
    try:
        given = dict(token[2:].split("=", 1) for token in read_config(Path(config)) if token.startswith("--model_"))
        wanted = given.get("model_family", "sdxl"), given.get("model_type", "full")
        if wanted not in SCRIPTS:
            raise DialectError(f"{config}: model_family {wanted[0]} with model_type {wanted[1]} is not trained here; there are "
                               + ", ".join(f"{family} {kind}" for family, kind in SCRIPTS))
    except DialectError as error:
        sys.exit(f"train.sh: error: {error}")
    return SCRIPTS[wanted]


def _value(flag: str, value: str) -> str:
    if flag == "optimizer":    # kohya writes AdamW, AdaFactor
        value = value.lower()
    return VALUES.get(flag, {}).get(value.lower(), value)


def read_config(path: Path) -> list[str]:
    """A config file -> a command line in the dialect that it was written in: `config_files.read`."""
    return config_files.read(path, REPLACED)
