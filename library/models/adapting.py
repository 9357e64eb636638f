"""A base as adapters are trained on it, and what such a run writes for use: a small file in the keys of diffusers or kohya."""

import contextlib
import json
from pathlib import Path
from types import ModuleType

from library.models import adapter_files, adapter_merge, adapters, attention, quantize
from library.models.adapter_settings import Settings
from library.models.parts import DTYPES, Base
from library.training import processes, sharding
from library.training.accelerator import public

# kohya's names in the header, which A1111, Forge and model sites show, and the flags that say the same
_KOHYA = """learning_rate unet_lr lr_scheduler lr_warmup_steps max_train_steps gradient_accumulation_steps gradient_checkpointing
    mixed_precision seed optimizer max_grad_norm noise_offset zero_terminal_snr enable_bucket min_bucket_reso max_bucket_reso
    bucket_no_upscale random_crop color_aug shuffle_caption keep_tokens prior_loss_weight max_token_length output_name
    cache_latents""".split()
_KOHYA_OTHERS = {"text_encoder_lr": "learning_rate_te1", "batch_size_per_device": "train_batch_size", "num_epochs":
                 "num_train_epochs", "min_snr_gamma": "snr_gamma", "caption_dropout_rate": "proportion_empty_prompts", "flip_aug":
                 "random_flip", "network_dropout": "lora_dropout", "sd_model_name": "pretrained_model_name_or_path", "vae_name":
                 "pretrained_vae_model_name_or_path"}


def header(args) -> dict[str, str]:
    """What an adapter's file tells of its training: all flags that were given a value (as JSON), kohya's ss_*, modelspec's."""
    flags = {flag: value for flag, value in public(args).items() if value not in (None, "", [], False)}
    ours = {name: flag for name, flag in ({name: name for name in _KOHYA} | _KOHYA_OTHERS).items() if hasattr(args, flag)}
    told = {"flags": json.dumps(flags, ensure_ascii=False)} | {f"ss_{name}": str(getattr(args, ours[name])) for name in ours}
    told |= {f"ss_{name}": Path(value).name for name in ("sd_model_name", "vae_name") if (value := getattr(args, ours[name]))}
    width, height = args.resolution
    told |= {"ss_resolution": f"({width}, {height})", "modelspec.resolution": f"{width}x{height}"}
    if args.instance_prompt:
        told["modelspec.trigger_phrase"] = args.instance_prompt
    return told


def frozen(model: ModuleType, part: str, args, base: Base, precision: str, accelerator):
    """The base's "unet" or "transformer" on the device, as adapters are trained on it. Raises `UserError`.

    model: the module `sdxl` or `sd3`. It is in the run's precision, or quantised but for --quantize_exclude.
    """
    network = model.load_part(base, part, DTYPES[accelerator.mixed_precision])
    quantize.apply(network, precision, accelerator.device, (*quantize.SKIP, *getattr(args, "quantize_exclude", [])))
    attention.set_attention(network, args.attention_mechanism, args.sageattention_usage)
    return network.to(accelerator.device)


def put_on(networks: dict, settings: Settings, start: adapter_files.Adapter | None, seed: int, mixed: bool) -> Settings:
    """Put a new adapter, or the one to start from, on the networks -> its settings. Raises `UserError`.

    networks: the UNet or transformer by its name, then the text encoders that are to have one. mixed: whether they are called
    under autocast alone.
    """
    denoiser = next(iter(networks.values()))
    text_encoders = [networks.get(part) for part in ("text_encoder", "text_encoder_2", "text_encoder_3")]
    if start:
        settings = adapter_merge.start_from(start, denoiser, text_encoders, settings, seed=seed)
    else:
        adapters.add(denoiser, text_encoders, settings, seed=seed)
    for network in networks.values() if mixed else ():
        adapters.leave_casts_to_autocast(network)
    return settings


def save(output: Path, name: str, args, networks: dict, settings, average, formats: tuple[str, ...]) -> list[Path]:
    """Write OUTPUT/pytorch_lora_weights.safetensors, OUTPUT/NAME.safetensors in kohya's keys, or both.

    Every process calls, the main one writes. On the way, diffusers' file is OUTPUT/NAME/pytorch_lora_weights.safetensors. With
    an `average` (EMA) of the first network, that is written. formats: "diffusers", "kohya" or both. Returns what was written.
    """
    with contextlib.ExitStack() as meanwhile:
        if average:
            meanwhile.enter_context(average.applied(next(iter(networks.values()))))
        for network in networks.values():
            meanwhile.enter_context(sharding.whole_weights(network, {*adapters.state_dict(network), *adapters.trained(network)}))
        return _write(output, name, args, networks, settings, formats) if processes.is_main() else []


def _write(output: Path, name: str, args, networks: dict, settings, formats: tuple[str, ...]) -> list[Path]:
    folder, written = output if name == args.output_name else output / name, []
    dtype = DTYPES[args.save_precision] if args.save_precision else None
    metadata = {} if args.no_metadata else header(args)
    if "diffusers" in formats:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "pytorch_lora_weights.safetensors"
        written.append(adapter_files.save(path, networks, settings, "diffusers", metadata, dtype))
    if "kohya" in formats:
        written.append(adapter_files.save(output / f"{name}.safetensors", networks, settings, "kohya", metadata, dtype))
    return written
