"""Draw images with a model that train_sdxl.py wrote, or with any SDXL.

    python generate.py --model out/my_model --prompt "a photo of a cat" --output_dir out/images

Each image is a PNG that names its prompt, seed and settings in its metadata; all of them come together in grid.png.
With --image, the drawing starts from a picture instead of from noise. --lora adds adapters, each with a weight:

    python generate.py --model out/my_model --lora style.safetensors=0.7 out/my_lora --prompt "a photo of a cat"
"""

from library import errors, flags


def parse_args(argv=None):
    parser = flags.Parser(__doc__)
    group = parser.add_argument_group("model")
    add = group.add_argument
    add("--model", required=True, help="a diffusers folder, a hub id, or one .safetensors/.ckpt file")
    add("--config", help="one-file model: folder or hub id of its configs and tokenizers")
    add("--precision", choices=("fp32", "fp16", "bf16"), default="fp32", help="precision of UNet and text encoders")
    add("--lora", nargs="+", default=[], metavar="FILE[=WEIGHT]",
        help="adapters of any kind (.safetensors of diffusers, PEFT, kohya, LyCORIS), or folders of train_lora_sdxl.py; each may "
             "have a weight: cat.safetensors=0.7 (1 where none is given)")
    flags.switch(group, "raw", "the weights without averaging (EMA), where the folder has both")
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
    add("--scheduler", choices=sorted(SCHEDULERS), help="sampler (default: the model's own)")
    add("--seed", type=flags.number(int, low=0), default=0, metavar="N", help="seed of the first image; the next ones count up")
    add("--image", metavar="FILE", help="start from this picture")
    add("--strength", type=flags.FRACTION, default=0.6, metavar="S",
        help="how far to leave that picture: 0 keeps it, 1 forgets it")
    add("--output_dir", default="images", metavar="DIR", help="where the images go")
    args = parser.parse_args(argv)
    if not args.prompt and not args.prompt_file:
        parser.error("give --prompt or --prompt_file")
    return args


SCHEDULERS = {"ddim": "DDIMScheduler", "ddpm": "DDPMScheduler", "euler": "EulerDiscreteScheduler",
              "euler_a": "EulerAncestralDiscreteScheduler", "dpm++": "DPMSolverMultistepScheduler",
              "unipc": "UniPCMultistepScheduler", "heun": "HeunDiscreteScheduler"}

if __name__ == "__main__":
    ARGS = parse_args()    # before torch: --help and mistakes are answered at once

import json
from pathlib import Path

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

from library.data import images
from library.models import adapter_find, sdxl
from library.models.locate import find_model
from library.training import accelerator as running
from library.training import devices
from library.validation.images import decode, grid

running.calm()    # before diffusers is imported, which reads it then
import diffusers


def load_pipeline(args, device: str):
    """The model as a text-to-image or image-to-image pipeline on the device; the VAE stays float32."""
    kind = diffusers.StableDiffusionXLImg2ImgPipeline if args.image else diffusers.StableDiffusionXLPipeline
    path, dtype = find_model(args.model, "--model", sdxl.PARTS), sdxl.DTYPES[args.precision]
    options = {"dtype": dtype, "add_watermarker": False}
    try:
        if path.is_file():
            pipeline = kind.from_single_file(path, **options, **({"config": args.config} if args.config else {}))
        else:
            if args.raw:
                options["unet"] = diffusers.UNet2DConditionModel.from_pretrained(path / "unet_raw", dtype=dtype)
            pipeline = kind.from_pretrained(path, **options)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise errors.UserError(f"--model: cannot load {args.model}: {error}") from error
    pipeline.vae.to(torch.float32)
    if args.scheduler:
        pipeline.scheduler = getattr(diffusers, SCHEDULERS[args.scheduler]).from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def add_adapters(pipeline, found: list[tuple[Path, float]]) -> None:
    """Have the pipeline draw with these adapters, each with its weight: LoRAs beside the weights, other kinds in them."""
    from library.models import adapter_files, adapter_merge    # with PEFT, which nothing else here needs
    networks = {part: getattr(pipeline, part) for part in adapter_files.PARTS}
    for adapter, weight in [(adapter_files.read(path, pipeline.unet.config), weight) for path, weight in found]:
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


def read_start(args) -> Image.Image | None:
    """The picture to start from, in the size of the drawing."""
    if not args.image:
        return None
    try:
        data = Path(args.image).read_bytes()
        width, height = args.size or (side // 8 * 8 for side in images.read_size(data))
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
    prompts, start, device = read_prompts(args), read_start(args), devices.best()
    loras = [adapter_find.find(text) for text in args.lora]
    pipeline, output = load_pipeline(args, device), Path(args.output_dir)
    if loras:
        add_adapters(pipeline, loras)
    output.mkdir(parents=True, exist_ok=True)
    if start:
        options = {"strength": args.strength}
        width, height = start.size
    else:
        own = pipeline.unet.config.sample_size * pipeline.vae_scale_factor
        width, height = args.size or (own, own)
        options = {"width": width, "height": height}

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
            generator=[torch.Generator().manual_seed(seed) for _, _, seed in batch], **options).images
        for (number, prompt, seed), image in zip(batch, decode(pipeline.vae, latents), strict=True):
            path = output / f"{number:03d}-{seed}.png"
            if image is None:
                running.say(f"{path.name} is NaN: use --precision fp32 or bf16")
                continue
            save(image, path, {
                "prompt": prompt, "negative_prompt": args.negative_prompt, "seed": seed, "steps": args.steps,
                "guidance": args.guidance, "size": f"{width}x{height}", "model": args.model,
                **({"lora": ", ".join(args.lora)} if args.lora else {}),
                "scheduler": type(pipeline.scheduler).__name__, **({"strength": args.strength} if start else {})})
            drawn.append(image)
        bar.update(len(batch))
    bar.close()
    if drawn:
        grid(drawn, args.num_images if args.num_images > 1 else min(len(drawn), 5)).save(output / "grid.png")
        running.say(f"wrote {len(drawn)} images and grid.png to {output}")


if __name__ == "__main__":
    with errors.exit_on_user_error("generate.py"):
        main(ARGS)
