"""Draw images with a model that train_sdxl.py or train_sd3.py wrote, or with any SDXL, SD 3 or SD 3.5.

    python generate.py --model out/my_model --prompt "a photo of a cat" --output_dir out/images

Each image is a PNG that names its prompt, seed and settings in its metadata; all of them come together in grid.png.
With --image, the drawing starts from a picture instead of from noise. --lora adds adapters, each with a weight:

    python generate.py --model out/my_model --lora style.safetensors=0.7 out/my_lora --prompt "a photo of a cat"
"""

import argparse

from library import errors, flags


def parse_args(argv=None):
    parser = flags.Parser(__doc__)
    group = parser.add_argument_group("model")
    add = group.add_argument
    add("--model", required=True, help="a diffusers folder, a hub id, or one .safetensors/.ckpt file")
    add("--config", help="one-file model: folder or hub id of its configs and tokenizers")
    add("--precision", choices=("fp32", "fp16", "bf16"), default="fp32",
        help="precision of the UNet or transformer, and of text encoders")
    add("--lora", nargs="+", default=[], metavar="FILE[=WEIGHT]",
        help="adapters of any kind (.safetensors of diffusers, PEFT, kohya, LyCORIS), or folders of a script that trains "
             "them; each may have a weight: cat.safetensors=0.7 (1 where none is given)")
    flags.switch(group, "raw", "the weights without averaging (EMA), where the folder has both")
    flags.switch(group, "no_t5", "SD3: do without T5, as a model does that was trained so")
    add("--tokenizer_max_length", type=int, choices=(77, 154, 256), default=154, metavar="N",
        help="SD3: T5's tokens of a prompt, as in training: 77, 154 or 256; longer prompts are cut")
    group = parser.add_argument_group("image")
    add = group.add_argument
    add("--prompt", nargs="+", default=[], help="what to draw")
    add("--prompt_file", metavar="FILE", help="a text file with a prompt a line")
    add("--negative_prompt", help="what not to draw")
    add("--size", type=flags.size, metavar="SIZE", help="1024 or 1024,768 (default: the model's own, or that of --image)")
    add("--num_images", type=flags.COUNT, default=1, metavar="N", help="images a prompt")
    add("--batch_size", type=flags.COUNT, default=4, metavar="N", help="images drawn at once")
    add("--steps", type=flags.COUNT, default=30, metavar="N", help="denoising steps")
    add("--guidance", type=flags.NOT_NEGATIVE, default=5.0, metavar="G", help="classifier-free guidance; 1 has none")
    add("--scheduler", choices=sorted(SCHEDULERS["SDXL"]),
        help=f"sampler; of SD3 {', '.join(sorted(SCHEDULERS['SD 3']))} (default: the model's own)")
    add("--seed", type=flags.number(int, low=0), default=0, metavar="N", help="seed of the first image; the next ones count up")
    add("--image", metavar="FILE", help="start from this picture")
    add("--strength", type=flags.FRACTION, default=0.6, metavar="S",
        help="how far to leave that picture: 0 keeps it, 1 forgets it")
    add("--output_dir", default="images", metavar="DIR", help="where the images go")
    group = parser.add_argument_group("skip-layer guidance", "for SD 3.5 Medium; not with --image")
    add = group.add_argument
    add("--skip_layers", nargs="+", type=layers, default=[], metavar="N",
        help="blocks of the transformer that are left out: 7 8 9, or [7, 8, 9]")
    add("--skip_layer_scale", type=flags.NOT_NEGATIVE, default=2.8, metavar="G",
        help="how far away from what the transformer draws without them")
    add("--skip_layer_start", type=flags.FRACTION, default=0.01, metavar="P", help="from this share of the steps")
    add("--skip_layer_stop", type=flags.FRACTION, default=0.2, metavar="P", help="to this share of them")
    args = parser.parse_args(argv)
    if not args.prompt and not args.prompt_file:
        parser.error("give --prompt or --prompt_file")
    if fault := fault_of_skipping(args, parser.get_default):
        parser.error(fault)
    return args


def layers(text: str) -> list[int]:
    """A type for argparse: `7`, `7,8,9` or `[7, 8, 9]`."""
    words = text.strip("[] ").replace(",", " ").split()
    if not words or not all(word.isdecimal() for word in words):
        raise argparse.ArgumentTypeError(f"{text!r} is neither the number of a layer nor a list of them, such as 7 8 9")
    return [int(word) for word in words]


def fault_of_skipping(args, default) -> str | None:
    """Why skip-layer guidance cannot be had, or would change nothing."""
    more = [name for name in ("skip_layer_scale", "skip_layer_start", "skip_layer_stop") if getattr(args, name) != default(name)]
    if not args.skip_layers:
        return f"--{more[0]} needs --skip_layers" if more else None
    if args.image:
        return "--skip_layers and --image exclude each other: diffusers has no skip-layer guidance from a picture"
    if args.guidance <= 1:
        return "--skip_layers changes nothing without --guidance above 1"
    if not any(args.skip_layer_start * args.steps < step < args.skip_layer_stop * args.steps for step in range(args.steps)):
        return (f"--skip_layers changes nothing: none of {args.steps} steps lies between --skip_layer_start "
                f"{args.skip_layer_start:g} and --skip_layer_stop {args.skip_layer_stop:g} of them")
    return None


SCHEDULERS = {    # of each family: sampler = diffusers' class
    "SDXL": {"ddim": "DDIMScheduler", "ddpm": "DDPMScheduler", "euler": "EulerDiscreteScheduler",
             "euler_a": "EulerAncestralDiscreteScheduler", "dpm++": "DPMSolverMultistepScheduler",
             "unipc": "UniPCMultistepScheduler", "heun": "HeunDiscreteScheduler"},
    "SD 3": {"euler": "FlowMatchEulerDiscreteScheduler", "heun": "FlowMatchHeunDiscreteScheduler",
            "dpm++": "DPMSolverMultistepScheduler", "unipc": "UniPCMultistepScheduler"}}

if __name__ == "__main__":
    ARGS = parse_args()    # before torch: --help and mistakes are answered at once

import json
from pathlib import Path

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

from library.data import images
from library.models import adapter_find, families, parts, sd3, sd3_output, sdxl
from library.models.locate import find_model
from library.training import accelerator as running
from library.training import devices
from library.validation.images import decode, grid

running.calm()    # before diffusers is imported, which reads it then
import diffusers

SIDE = {"SDXL": 8, "SD 3": 16}    # sides of images are multiples of it


def check_family(args, family: str) -> None:
    """Refuse what the other family alone has. Raises `UserError`."""
    given = {"skip_layers": args.skip_layers, "no_t5": args.no_t5, "tokenizer_max_length": args.tokenizer_max_length != 154}
    if family == "SDXL" and any(given.values()):
        raise errors.UserError(f"--{next(name for name in given if given[name])} is of SD3, and --model {args.model} is an SDXL")
    if args.scheduler and args.scheduler not in SCHEDULERS[family]:
        raise errors.UserError(f"--scheduler {args.scheduler}: SD3 is drawn with {', '.join(sorted(SCHEDULERS[family]))}")
    if family == "SD 3" and args.image and args.scheduler in ("dpm++", "unipc"):
        raise errors.UserError(f"--scheduler {args.scheduler} draws SD3 from noise alone: with --image, use euler or heun")


def load_pipeline(args, family: str, size: tuple[int, int] | None, device: str):
    """The model as a text-to-image or image-to-image pipeline on the device. size: of the images, where it is known.

    The VAE stays float32, but where SD3's pipeline hands it a picture in --precision.
    """
    kind = getattr(diffusers, f"{families.PIPELINES[family]}{'Img2Img' if args.image else ''}Pipeline")
    dtype = parts.DTYPES[args.precision]
    try:
        pipeline = load_sd3(args, size, kind, dtype) if family == "SD 3" else load_sdxl(args, kind, dtype)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise errors.UserError(f"--model: cannot load {args.model}: {error}") from error
    if family == "SDXL" or not args.image:
        pipeline.vae.float()
    if args.scheduler:
        config, kind = pipeline.scheduler.config, getattr(diffusers, SCHEDULERS[family][args.scheduler])
        of_flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": config.get("shift", 1.0)}
        more = of_flow if family == "SD 3" and "FlowMatch" not in kind.__name__ else {}
        pipeline.scheduler = kind.from_config(config, **more)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def load_sdxl(args, kind: type, dtype: torch.dtype):
    path, options = find_model(args.model, "--model", sdxl.PARTS), {"dtype": dtype, "add_watermarker": False}
    if path.is_file():
        return kind.from_single_file(path, **options, **({"config": args.config} if args.config else {}))
    if args.raw:
        options["unet"] = diffusers.UNet2DConditionModel.from_pretrained(path / "unet_raw", dtype=dtype)
    return kind.from_pretrained(path, **options)


def load_sd3(args, size: tuple[int, int] | None, kind: type, dtype: torch.dtype):
    """What one file does not hold, tokenizers and often text encoders, comes from --config."""
    base, held = sd3.find_whole(args.model, "--model", args.config, args.no_t5, ("transformer_raw",) * args.raw)
    sd3_output.check_base(base, sum(args.skip_layers, []), "--skip_layers")
    if size:
        sd3_output.check_sizes(base, [size], "--size")
    tokenizers = dict(zip(parts.TOKENIZERS, sd3.load_tokenizers(base), strict=False))
    networks = {part: sd3.load_part(base, part, dtype) for part in held}
    if args.raw:
        place = base.path / "transformer_raw"
        networks["transformer"] = parts.load_network(sd3.class_of("transformer"), "transformer_raw", place, dtype, None)
    return kind(**dict.fromkeys(sd3.PARTS) | networks | tokenizers | {"scheduler": sd3_output.sampler(base)})


def add_adapters(pipeline, found: list[tuple[Path, float]]) -> None:
    """Have the pipeline draw with these adapters, each with its weight: LoRAs beside the weights, other kinds in them."""
    from library.models import adapter_files, adapter_merge    # with PEFT, which nothing else here needs
    names = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")
    networks = {part: network for part in names if (network := getattr(pipeline, part, None)) is not None}
    config = next(iter(networks.values())).config
    for adapter, weight in [(adapter_files.read(path, config), weight) for path, weight in found]:
        adapter_merge.apply(adapter, networks, weight)


def read_prompts(args) -> list[str]:
    if not args.prompt_file:
        return args.prompt
    try:
        lines = Path(args.prompt_file).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise errors.UserError(f"--prompt_file: cannot read {args.prompt_file}: {error}") from error
    prompts = args.prompt + [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise errors.UserError(f"--prompt_file: {args.prompt_file} holds no prompt")
    return prompts


def read_start(args, side: int) -> Image.Image | None:
    """The picture to start from, in the size of the drawing: multiples of `side`."""
    if not args.image:
        return None
    try:
        data = Path(args.image).read_bytes()
        width, height = args.size or (length // side * side for length in images.read_size(data))
        return images.read_pixels(data, (width, height), "lanczos")
    except (OSError, images.BadImage) as error:
        raise errors.UserError(f"--image: cannot read {args.image}: {error}") from error


def save(image: Image.Image, path: Path, parameters: dict) -> None:
    """A PNG with its parameters: as JSON, and in the words that other programs show."""
    info = PngInfo()
    info.add_itxt("generate", json.dumps(parameters, ensure_ascii=False))
    settings = ", ".join(f"{name}: {value}" for name, value in parameters.items() if name not in ("prompt", "negative_prompt"))
    negative = f"\nNegative prompt: {parameters['negative_prompt']}" if parameters["negative_prompt"] else ""
    info.add_itxt("parameters", f"{parameters['prompt']}{negative}\n{settings}")
    image.save(path, pnginfo=info)


@torch.no_grad()
def main(args):
    prompts, family = read_prompts(args), families.of_model(args.model, "--model")
    check_family(args, family)
    start, device, output = read_start(args, SIDE[family]), devices.best(), Path(args.output_dir)
    devices.prepare(device)
    loras = [adapter_find.find(text) for text in args.lora]
    pipeline = load_pipeline(args, family, start.size if start else args.size, device)
    if loras:
        add_adapters(pipeline, loras)
    output.mkdir(parents=True, exist_ok=True)
    own = (pipeline.unet if family == "SDXL" else pipeline.transformer).config.sample_size * pipeline.vae_scale_factor
    width, height = start.size if start else args.size or (own, own)
    options = {"strength": args.strength} if start else {}
    if family == "SD 3" or not start:
        options |= {"width": width, "height": height}
    if family == "SD 3":
        options["max_sequence_length"] = args.tokenizer_max_length
    skipped = sd3_output.skip_layer_guidance(sum(args.skip_layers, []) or None, args.skip_layer_scale, args.skip_layer_start,
                                             args.skip_layer_stop)

    wanted = [(number, prompt) for number, prompt in enumerate(prompts) for _ in range(args.num_images)]
    jobs = [(number, prompt, args.seed + place) for place, (number, prompt) in enumerate(wanted)]
    drawn = []
    bar = tqdm(total=len(jobs), desc="draw", unit="image")
    for first in range(0, len(jobs), args.batch_size):
        batch = jobs[first:first + args.batch_size]
        texts = [prompt for _, prompt, _ in batch]
        if start:
            options["image"] = [start] * len(batch)
        latents = pipeline(
            texts, negative_prompt=[args.negative_prompt] * len(batch) if args.negative_prompt else None,
            num_inference_steps=args.steps, guidance_scale=args.guidance, output_type="latent",
            generator=[torch.Generator().manual_seed(seed) for _, _, seed in batch], **options, **skipped).images
        for (number, prompt, seed), image in zip(batch, decode(pipeline.vae, latents), strict=True):
            path = output / f"{number:03d}-{seed}.png"
            if image is None:
                running.say(f"{path.name} is NaN: use --precision fp32 or bf16")
                continue
            save(image, path, {
                "prompt": prompt, "negative_prompt": args.negative_prompt, "seed": seed, "steps": args.steps,
                "guidance": args.guidance, "size": f"{width}x{height}", "model": args.model,
                **({"lora": ", ".join(args.lora)} if args.lora else {}),
                "scheduler": type(pipeline.scheduler).__name__, **({"strength": args.strength} if start else {}), **skipped})
            drawn.append(image)
        bar.update(len(batch))
    bar.close()
    if drawn:
        grid(drawn, args.num_images if args.num_images > 1 else min(len(drawn), 5)).save(output / "grid.png")
        running.say(f"wrote {len(drawn)} images and grid.png to {output}")


if __name__ == "__main__":
    with errors.exit_on_user_error("generate.py"):
        main(ARGS)
