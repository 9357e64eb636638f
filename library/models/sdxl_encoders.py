"""SDXL's frozen side, VAE and text encoders: loaded when something is to be encoded, freed when all is cached."""

from dataclasses import dataclass
from pathlib import Path

import torch

from library.data import images
from library.data.cache import make_key
from library.data.loader import PromptSource
from library.models import quantize, sdxl
from library.models.locate import fingerprint
from library.training import devices

FORMAT = 1    # of what is stored: a change here makes every cached tensor stale


@dataclass(frozen=True)
class Prompt:
    """A prompt, encoded: hidden [1, L, D] and pooled [1, P], on the CPU."""

    text: str
    hidden: torch.Tensor
    pooled: torch.Tensor


class Encoders:
    """VAE, tokenizers and text encoders of a base model, each loaded when first asked for.

    checkpoint: where text encoders that are trained come from, if a run goes on. precisions: of frozen text encoders, as
    `quantize` has them; what is trained there is an adapter then. None: they may be trained as a whole.
    """

    def __init__(self, args, base: sdxl.Base, accelerator, checkpoint: Path | None = None,
                 precisions: tuple[str, str] | list[str] | None = None):
        self.base, self.device, self.length = base, accelerator.device, args.max_token_length
        self.trained = args.train_text_encoder
        self.vae_dtype = sdxl.DTYPES[args.vae_dtype]
        whole = self.trained and precisions is None    # what is trained stays float32
        self.text_dtype = torch.float32 if whole else sdxl.DTYPES[accelerator.mixed_precision]
        self.precisions = tuple(precisions or ("no_change", "no_change"))
        self.truncated: set[str] = set()    # prompts longer than `length`
        self._vae, self._tokenizers, self._text_encoders, self._checkpoint = None, None, None, checkpoint
        self._called = None    # the text encoders as the training step calls them

    @property
    def vae(self):
        if self._vae is None:
            layout = devices.memory_format(self.device.type)
            self._vae = sdxl.load_part(self.base, "vae", self.vae_dtype).to(self.device, memory_format=layout)
        return self._vae

    @property
    def tokenizers(self) -> list:
        if self._tokenizers is None:
            self._tokenizers = sdxl.load_tokenizers(self.base)
        return self._tokenizers

    @property
    def text_encoders(self) -> list:
        if self._text_encoders is None:
            loaded = sdxl.load_text_encoders(self.base, self.text_dtype, self._checkpoint if self.trained else None)
            for encoder, precision in zip(loaded, self.precisions, strict=True):
                quantize.apply(encoder, precision, self.device)
            self._text_encoders = [encoder.to(self.device) for encoder in loaded]
        return self._text_encoders

    def call_wrapped(self, wrapped: dict) -> None:
        """Train through these wrappers of the networks from here on: DDP adds up no gradient of what bypasses it."""
        self._called = [wrapped.get(name, encoder) for name, encoder in
                        zip(("text_encoder", "text_encoder_2"), self.text_encoders, strict=True)]

    def free(self, vae: bool, text: bool) -> None:
        """Give back the memory of what is done."""
        self._vae = None if vae else self._vae
        if text:
            self._tokenizers = self._text_encoders = None
        devices.free_memory(self.device.type)

    def latent_recipe(self, memo: Path, mode: str) -> str:
        """What, beside image and cut, decides the latents."""
        files = fingerprint(self.base.files("vae"), memo)
        return make_key(FORMAT, images.VERSION, files, self.base.variant, self.vae_dtype, mode).decode()

    def prompt_recipe(self, memo: Path) -> str:
        """What, beside the prompt, decides its embeddings."""
        files = fingerprint(self.base.files("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"), memo)
        quantised = [self.precisions] if set(self.precisions) != {"no_change"} else []
        return make_key(FORMAT, files, self.base.variant, self.text_dtype, self.length, *quantised).decode()

    @torch.no_grad()
    def encode_images(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        """[B, H, W, 3] uint8 -> moments [B, 2 C, H/8, W/8] float32 on the CPU: mean and standard deviation."""
        pixels = pixels.to(self.device).permute(0, 3, 1, 2).float() / 127.5 - 1
        pixels = pixels.contiguous(memory_format=devices.memory_format(self.device.type))
        return {"moments": sdxl.encode_images(self.vae, pixels).cpu()}

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        """Prompts -> hidden [B, L, D] and pooled [B, P] on the CPU, in the encoders' precision."""
        self.note_long(prompts)
        hidden, pooled = sdxl.encode_prompts(self.tokenize(prompts), self.text_encoders)
        return {"hidden": hidden.cpu(), "pooled": pooled.cpu()}

    def tokenize(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        return sdxl.tokenize(prompts, self.tokenizers, self.length)

    def note_long(self, prompts: list[str]) -> None:
        """Remember the prompts that will be cut off."""
        limit = max(1, self.length // sdxl.PIECE) * sdxl.PIECE
        for prompt, ids in zip(prompts, sdxl.token_ids(prompts, self.tokenizers[0]), strict=True):
            if len(ids) > limit:
                self.truncated.add(prompt)

    def complete(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Encode the prompts of a batch on the device that were not cached -> the batch with its prompt embeddings."""
        if "input_ids" in batch:
            with torch.set_grad_enabled(self.trained):
                called = self._called or self.text_encoders
                batch["prompt_embeds"], batch["pooled_prompt_embeds"] = sdxl.encode_prompts(batch, called)
        return batch

    def shown(self, args, prompts: PromptSource, encoded_null: bool) -> tuple[list[Prompt], Prompt]:
        """Validation's prompts, and what guidance starts from."""
        return self.guided(args.validation_prompt, args.validation_negative_prompt, encoded_null, prompts)

    def guided(self, texts: list[str], negative: str | None, encoded_null: bool,
               source: PromptSource | None = None) -> tuple[list[Prompt], Prompt]:
        """Prompts to draw, and what guidance starts from: the negative prompt, the encoded empty one, or zeros."""
        *positive, start = self.prompts([*texts, negative or ""], source)
        if not (encoded_null or negative):
            start = Prompt("", torch.zeros_like(start.hidden), torch.zeros_like(start.pooled))
        return positive, start

    def prompts(self, texts: list[str], source: PromptSource | None = None) -> list[Prompt]:
        """Prompts ready to be drawn; from the store if they are cached."""
        if source and source.store:
            fields = [{name: values[None] for name, values in source.read(text).items()} for text in texts]
        else:
            fields = [self.encode_prompts([text]) for text in texts]
        return [Prompt(text, **field) for text, field in zip(texts, fields, strict=True)]
