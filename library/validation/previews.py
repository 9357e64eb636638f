"""Previews of validation images while they are drawn: a tiny autoencoder decodes what the latents are after every few steps."""

import contextlib
import datetime
import io
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from library import config_files
from library.validation import webhook

FOLDER = "previews"


@dataclass
class Previews:
    """Of one validation. every: denoising steps between two. post: sends an event, PNG and name, or None."""

    decoder: torch.nn.Module
    every: int
    folder: Path
    step: int
    post: object = None

    def keep(self, image: Image.Image | None, name: str, prompt: str, done: int, total: int, timestep: float) -> None:
        """Write NAME-DONEofTOTAL.png, and post it with what SimpleTuner tells of it. image: None where it is NaN."""
        if image is None:
            return webhook.say_once(f"validation at step {self.step}: previews of {name} are NaN, as its latents are or the tiny "
                                    "autoencoder has overflowed: they are left out")
        png, label, file = io.BytesIO(), f"{done}/{total}", f"{name}-{done:0{len(str(total))}d}of{total}.png"
        image.save(png, "PNG")
        (self.folder / file).write_bytes(png.getvalue())
        if self.post:
            message = f"Validation (step {label}): {name}"
            self.post({"type": "validation.image", "title": message, "message": message, "body": prompt,
                       "data": {"step": done, "timestep": timestep, "resolution": [image.width, image.height],
                                "validation_type": "intermediary", "prompt": prompt, "step_label": label,
                                "training_step": self.step},
                       "job_id": os.environ.get("SIMPLETUNER_JOB_ID"), "severity": "info",
                       "timestamp": datetime.datetime.now(datetime.timezone.utc).isoformat()}, png.getvalue(), file)


@contextlib.contextmanager
def opened(args, step: int, folder: Path, device):
    """Within: the `Previews` of a validation, in `folder`/previews, or None without --validation_preview.

    The tiny autoencoder is in memory only here, in float32: `parts.find_preview_model` has seen that it loads. At the end,
    what is still to be posted is waited for.
    """
    if not args.validation_preview:
        yield None
        return
    from diffusers import AutoencoderTiny
    hooks = []
    try:
        hooks = config_files.read_webhooks(Path(args.webhook_config)) if args.webhook_config else []
    except config_files.DialectError as error:    # changed on the way
        webhook.say_once(f"{error}. Previews are not posted, but stay files")
    decoder = AutoencoderTiny.from_pretrained(args.validation_preview_model, local_files_only=True).eval().to(device)
    (folder / FOLDER).mkdir(parents=True, exist_ok=True)
    with webhook.posting(hooks, args.tracker_project_name, args.webhook_config) as post:
        yield Previews(decoder, args.validation_preview_steps, folder / FOLDER, step, post if hooks else None)
