"""Images of fixed prompts with fixed seeds while training, with the models already in memory."""

import contextlib
import json
import re
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from library.diffusion.latents import latent_scale
from library.training import sharding
from library.validation import previews


def draw(pipeline, prompts: list, negative, sizes: list[tuple[int, int]], *, count: int, steps: int,
         guidance: float, seed: int, autocast, device, preview: previews.Previews | None = None,
         **options) -> dict[str, tuple[str, Image.Image]]:
    """Draw `count` images of each prompt in each (width, height) -> {file name: (prompt, image)}.

    prompts, negative: with text, hidden [1, L, D] and pooled [1, P]. preview: is shown the first image of each on the way.
    options: more of the pipeline's.
    The denoising runs in `autocast`, the VAE outside of it: SDXL's own overflows in half precision and draws black.
    """
    pipeline.set_progress_bar_config(disable=True)
    drawn = {}
    for number, prompt in enumerate(prompts):
        slug = re.sub(r"[^a-z0-9]+", "-", prompt.text.lower()).strip("-")[:40] or "empty"
        for width, height in sizes:
            name = f"{number:02d}-{slug}-{width}x{height}"
            watched = {"callback_on_step_end": _watcher(preview, f"{name}-0", prompt.text)} if preview else {}
            generators = [torch.Generator().manual_seed(seed + index) for index in range(count)]
            # each image brings its own embeddings: num_images_per_prompt repeats none of those that SD3's pipeline is given
            embeds = {"prompt_embeds": prompt.hidden, "pooled_prompt_embeds": prompt.pooled,
                      "negative_prompt_embeds": negative.hidden, "negative_pooled_prompt_embeds": negative.pooled}
            embeds = {part: values.to(device).repeat_interleave(count, dim=0) for part, values in embeds.items()}
            with torch.no_grad(), autocast():
                latents = pipeline(**embeds, width=width, height=height, num_inference_steps=steps, guidance_scale=guidance,
                                   generator=generators, output_type="latent", **watched, **options).images
            for index, pixels in enumerate(decode(pipeline.vae, latents)):
                drawn[f"{name}-{index}.png"] = (prompt.text, pixels)
    return drawn


def _watcher(preview: previews.Previews, name: str, prompt: str):
    """What the pipeline is to call after each denoising step; it changes nothing of what is drawn."""
    def after_step(pipeline, index, timestep, tensors) -> dict:
        done, latents = index + 1, tensors["latents"][:1]
        if done % preview.every == 0:
            with torch.autocast(latents.device.type, enabled=False):
                image, = decode(preview.decoder, latents)
            preview.keep(image, name, prompt, done, pipeline.num_timesteps, float(timestep))
        return {}
    return after_step


@torch.no_grad()
def decode(vae, latents: torch.Tensor) -> list:
    """Latents [B, C, h, w] -> images; NaN is kept as None, for `faults` to name."""
    shift, scale = (values.to(latents.device) for values in latent_scale(vae.config))
    images = []
    for one in latents:    # one at a time: the decoder is what needs most memory at large sizes
        pixels = vae.decode((one.float() / scale + shift)[None].to(vae.dtype)).sample[0].float()
        if not torch.isfinite(pixels).all():
            images.append(None)
            continue
        array = (pixels.clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
        images.append(Image.fromarray(array))
    return images


def faults(drawn: dict) -> list[str]:
    """Sentences on images that are NaN, or of one colour throughout."""
    said = []
    for name, (_, image) in drawn.items():
        if image is None:
            said.append(f"{name} is NaN or infinite: the model or the VAE has overflowed")
        elif (np.asarray(image) == np.asarray(image)[0, 0]).all():
            said.append(f"{name} is {'of one colour' if np.asarray(image).any() else 'black'} throughout")
    return said


def save(drawn: dict, folder: Path) -> None:
    """Write the images as PNG, and prompts.json with the prompt of each."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, (_, image) in drawn.items():
        if image is not None:
            image.save(folder / name)
    (folder / "prompts.json").write_text(json.dumps({name: text for name, (text, image) in drawn.items() if image}, indent=1))


def grid(images: list, columns: int) -> Image.Image:
    """Images of any sizes as one sheet, `columns` in a row, on white."""
    width, height = max(i.width for i in images), max(i.height for i in images)
    sheet = Image.new("RGB", (columns * (width + 4), -(-len(images) // columns) * (height + 4)), "white")
    for number, image in enumerate(images):
        sheet.paste(image, (number % columns * (width + 4) + 2, number // columns * (height + 4) + 2))
    return sheet


def run(args, seed: int, pipeline, shown: tuple, network, average, step: int, output_dir: Path, trackers, accelerator,
        **options) -> None:
    """Draw, save and report the validation images of a step, with averaged weights if there are any. options: as of `draw`."""
    main = accelerator.is_main_process
    if not main and not sharding.is_spread(network):
        return
    network.eval()
    folder = output_dir / "validation" / f"step-{step:06d}"
    with (average.applied(network) if average else contextlib.nullcontext(), sharding.callable_alone(network),
          previews.opened(args, step, folder, accelerator.device) if main else contextlib.nullcontext() as preview):
        drawn = draw(pipeline, *shown, args.validation_resolution or [args.resolution], count=args.num_validation_images,
                     steps=args.validation_num_inference_steps, guidance=args.validation_guidance,
                     seed=seed if args.validation_seed is None else args.validation_seed,
                     autocast=accelerator.autocast, device=accelerator.device, preview=preview, **options) if main else {}
    network.train()
    if not main:
        return
    save(drawn, folder)
    trackers.images(step, {name: image for name, (_, image) in drawn.items() if image})
    for fault in faults(drawn):
        tqdm.write(f"validation at step {step}: {fault}")
