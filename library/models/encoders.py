"""A model's frozen side, VAE and text encoders: loaded when something is to be encoded, freed when all is cached."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch

from library.data import images
from library.data.cache import make_key
from library.data.loader import PromptSource
from library.models import quantize
from library.models.locate import fingerprint
from library.models.parts import DTYPES, TOKENIZERS, Base
from library.training import devices

FORMAT = 1    # of what is stored: a change here makes every cached tensor stale
IDS = ("input_ids", "input_ids_2", "input_ids_3")    # token ids of the text encoders, in a batch


@dataclass(frozen=True)
class Prompt:
    """A prompt, encoded: hidden [1, L, D] and pooled [1, P], on the CPU."""

    text: str
    hidden: torch.Tensor
    pooled: torch.Tensor


class Encoders:
    """VAE, tokenizers and text encoders of a base model, each loaded when first asked for.

    model: the module `sdxl` or `sd3`, which have the same names. checkpoint: where text encoders that are trained come
    from, if a run goes on. precisions: of the text encoders, as `quantize` has them. adapted: what is trained of them is an
    adapter, so that they stay in the run's precision; else a text encoder that is trained is float32.
    """

    def __init__(self, model: ModuleType, args, base: Base, accelerator, checkpoint: Path | None = None,
                 precisions: Iterable[str] | None = None, adapted: bool = False):
        self.model, self.base, self.device = model, base, accelerator.device
        self.options = model.text_options(args, base)    # what, beside the encoders, decides a prompt's embeddings
        self.parts = model.TEXT_ENCODERS[:len(base.tokenizers)]
        self.dropout = model.text_dropout(args)[:len(self.parts)]
        self.trained = tuple(part for part in model.trained_parts(args) if part in self.parts)
        self.frozen = tuple(part for part in self.parts if part not in self.trained)
        self.kept = tuple(name for name, made_by in model.FIELDS.items() if set(made_by) <= set(self.frozen))
        self.vae_dtype, self.text_dtype = DTYPES[args.vae_dtype], DTYPES[accelerator.mixed_precision]
        self.precisions = tuple(precisions or ("no_change",) * len(self.parts))[:len(self.parts)]
        self.truncated: dict[str, set[str]] = {}    # flag that is the limit -> prompts that are longer
        self._vae, self._tokenizers, self._checkpoint, self._adapted = None, None, checkpoint, adapted
        self._text_encoders: dict[str, torch.nn.Module] = {}
        self._called: dict[str, torch.nn.Module] = {}    # the text encoders as the training step calls them

    @property
    def vae(self):
        if self._vae is None:
            layout = devices.memory_format(self.device.type)
            self._vae = self.model.load_part(self.base, "vae", self.vae_dtype).to(self.device, memory_format=layout)
        return self._vae

    @property
    def tokenizers(self) -> list:
        if self._tokenizers is None:
            self._tokenizers = self.model.load_tokenizers(self.base)
        return self._tokenizers

    @property
    def text_encoders(self) -> list:
        return [self.text_encoder(part) for part in self.parts]

    def text_encoder(self, part: str):
        """One text encoder on the device."""
        if part not in self._text_encoders:
            trained = part in self.trained
            dtype = torch.float32 if trained and not self._adapted else self.text_dtype
            encoder = self.model.load_part(self.base, part, dtype, self._checkpoint if trained else None)
            quantize.apply(encoder, self.precisions[self.parts.index(part)], self.device)
            self._text_encoders[part] = encoder.to(self.device)
        return self._text_encoders[part]

    def call_wrapped(self, wrapped: dict) -> None:
        """Train through these wrappers of the networks from here on: DDP adds up no gradient of what bypasses it."""
        self._called = {part: wrapper for part, wrapper in wrapped.items() if part in self.parts}

    def free(self, vae: bool, text: bool) -> None:
        """Give back the memory of what is done; text: that of the text encoders which are not trained."""
        self._vae = None if vae else self._vae
        if text:
            self._text_encoders = {part: own for part, own in self._text_encoders.items() if part in self.trained}
            self._tokenizers = self._tokenizers if self.trained else None
        devices.free_memory(self.device.type)

    def latent_recipe(self, memo: Path, mode: str) -> str:
        """What, beside image and cut, decides the latents."""
        files = fingerprint(self.base.files("vae"), memo)
        return make_key(FORMAT, images.VERSION, files, self.base.variant, self.vae_dtype, mode).decode()

    def prompt_recipe(self, memo: Path) -> str:
        """What, beside the prompt, decides what is kept of it: of text encoders that are trained, nothing is."""
        used = self.frozen or self.parts
        tokenizers = [name for name, part in zip(TOKENIZERS, self.parts, strict=False) if part in used]
        files = fingerprint(self.base.files(*used, *tokenizers), memo)
        quantised = [self.precisions] if set(self.precisions) != {"no_change"} else []
        return make_key(FORMAT, files, self.base.variant, self.text_dtype, *self.options.values(), *quantised).decode()

    @torch.no_grad()
    def encode_images(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        """[B, H, W, 3] uint8 -> moments [B, 2 C, H/8, W/8] float32 on the CPU: mean and standard deviation."""
        pixels = pixels.to(self.device).permute(0, 3, 1, 2).float() / 127.5 - 1
        pixels = pixels.contiguous(memory_format=devices.memory_format(self.device.type))
        posterior = self.vae.encode(pixels.to(self.vae.dtype)).latent_dist
        return {"moments": torch.cat([posterior.mean, posterior.std], dim=1).float().cpu()}

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str], parts: tuple[str, ...] | None = None) -> dict[str, torch.Tensor | list]:
        """Prompts -> what is kept of them, {name: [B, ...]} on the CPU in the encoders' precision, by all or some text encoders.

        What differs in length from prompt to prompt is a list of B.
        """
        self.note_long(prompts)
        used = self.parts if parts is None else parts
        encoders = [self.text_encoder(part) if part in used else None for part in self.parts]
        fields = self.model.encode_prompts(self.tokenize(prompts, parts=used), encoders, **self.options)
        return self.model.kept({name: values.cpu() for name, values in fields.items()}, **self.options)

    def encode_kept(self, prompts: list[str]) -> dict[str, torch.Tensor | list]:
        """`encode_prompts` by the text encoders that stay as they are: what is cached."""
        return self.encode_prompts(prompts) if self.frozen == self.parts else self.encode_prompts(prompts, self.frozen)

    def tokenize(self, prompts: list[str], silent: list[tuple[bool, ...]] | None = None,
                 parts: tuple[str, ...] | None = None) -> dict[str, torch.Tensor]:
        """Prompts -> token ids for all or some text encoders. silent: which text encoders are to hear nothing, for each prompt.

        With text encoders that say zeros then: also "zeros" [B, text encoders].
        """
        used = self.parts if parts is None else parts
        silent = [each or (False,) * len(self.parts) for each in silent or [()] * len(prompts)]
        texts = [["" if each[number] else prompt for prompt, each in zip(prompts, silent, strict=True)]
                 for number in range(len(self.parts))]
        tokenizers = [own if part in used else None for own, part in zip(self.tokenizers, self.parts, strict=True)]
        zeros = torch.tensor(silent) & torch.tensor([zero for _, zero in self.dropout]) if self.dropout else None
        return self.model.tokenize(texts, tokenizers, **self.options) | ({} if zeros is None else {"zeros": zeros})

    def note_long(self, prompts: list[str]) -> None:
        """Remember the prompts that will be cut off."""
        for limit, cut in self.model.cut_off(prompts, self.tokenizers, **self.options).items():
            self.truncated.setdefault(limit, set()).update(cut)

    def assemble(self, fields: dict, empty: dict, silent: tuple[bool, ...]) -> dict[str, torch.Tensor]:
        """What is kept of a prompt, and of the empty one -> the names of training; silent: text encoders that heard nothing."""
        for part, quiet, (_, zero) in zip(self.parts, silent, self.dropout, strict=False):
            if quiet:
                fields = fields | {name: torch.zeros_like(fields[name]) if zero else empty[name]
                                   for name in self._made_by(part) if name in fields}
        return self.model.assemble(fields, **self.options)

    def _made_by(self, part: str) -> list[str]:
        return [name for name, made_by in self.model.FIELDS.items() if part in made_by]

    def complete(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Encode the prompts of a batch on the device that were not cached -> the batch with its prompt embeddings."""
        if not any(ids in batch for ids in IDS):
            return batch
        with torch.set_grad_enabled(bool(self.trained) and torch.is_grad_enabled()):
            called = [(self._called.get(part) or self.text_encoder(part)) if ids in batch else None
                      for ids, part in zip(IDS, self.parts, strict=False)]
            fields = self.model.encode_prompts(batch, called, **self.options)
            for number, part in enumerate(self.parts if "zeros" in batch else ()):
                for name in self._made_by(part):
                    if name in fields:
                        quiet = batch["zeros"][:, number].view(-1, *(1,) * (fields[name].ndim - 1))
                        fields[name] = fields[name].masked_fill(quiet, 0)
            fields |= {name: batch[name] for name in self.kept if name in batch}
            return batch | self.model.assemble(fields, **self.options)

    def shown(self, args, prompts: PromptSource, encoded_null: bool = True) -> tuple[list[Prompt], Prompt]:
        """Validation's prompts, and what guidance starts from."""
        return self.guided(args.validation_prompt, args.validation_negative_prompt, encoded_null, prompts)

    def guided(self, texts: list[str], negative: str | None, encoded_null: bool = True,
               source: PromptSource | None = None) -> tuple[list[Prompt], Prompt]:
        """Prompts to draw, and what guidance starts from: the negative prompt, the encoded empty one, or zeros."""
        *positive, start = self.prompts([*texts, negative or ""], source)
        if not (encoded_null or negative):
            start = Prompt("", torch.zeros_like(start.hidden), torch.zeros_like(start.pooled))
        return positive, start

    def prompts(self, texts: list[str], source: PromptSource | None = None) -> list[Prompt]:
        """Prompts ready to be drawn; from the store if they are cached. The empty one is what the run makes of it."""
        made = []
        for text in texts:
            fields = source.read(text) if source and source.store else {}
            if asked := self.trained if fields else self.parts:
                fields = fields | {name: values[0] for name, values in self.encode_prompts([text], asked).items()}
            embeds = self.assemble(fields, fields, (not text,) * len(self.dropout))
            made.append(Prompt(text, embeds["prompt_embeds"][None], embeds["pooled_prompt_embeds"][None]))
        return made
