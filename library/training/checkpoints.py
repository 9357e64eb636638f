"""Checkpoints to resume from: whole or absent.

Layout of OUTPUT_DIR/checkpoint-N: one diffusers folder a trained network, `ema.safetensors`, `training_state.pt` with
optimizer, LR schedule and gradient scaler, and `manifest.json`, written last: step, flags, the size of every file.
Everything is written to a hidden folder beside, synced, and renamed; only then are old checkpoints rotated out.
"""

import errno
import json
import os
import pickle
import re
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from library.data.cache import os_error, sync
from library.errors import UserError
from library.training import deepspeed_engine, optimizer_state, processes, sharding

NAME = re.compile(r"checkpoint-(\d+)")
ADAPTER = "adapter.safetensors"
_ENTRIES = {"step", "ema_updates", "unlogged", "flags", "files"}    # of every manifest
# Flags that may differ between a run and its continuation without changing what is computed.
_HARMLESS = {"output_dir", "output_name", "resume_from_checkpoint", "checkpointing_steps", "checkpoints_total_limit",
             "save_every_n_epochs", "save_every_n_steps", "save_model_as", "save_precision", "push_to_hub", "hub_model_id",
             "hub_token", "optimizer_sharding",
             "report_to", "logging_dir", "logging_steps", "tracker_project_name", "local_rank", "config_file",
             "dataloader_num_workers", "num_train_epochs", "max_train_steps", "embedding_cache_dir", "cache_dir",
             "cache_text_encoder_outputs", "vae_batch_size", "text_encoder_batch_size", "seed",
             "resume", "validation_prompt", "validation_steps", "validation_epochs", "num_validation_images",
             "validation_resolution", "validation_guidance", "validation_seed", "validation_negative_prompt",
             "validation_num_inference_steps", "gradient_accumulation_steps", "train_batch_size", "vae_cache_ondemand",
             "cache_only", "eval_steps_interval", "num_eval_images", "eval_timesteps", "validation_guidance_skip_layers",
             "validation_guidance_skip_layers_start", "validation_guidance_skip_layers_stop", "validation_guidance_skip_scale",
             "validation_preview", "validation_preview_steps", "validation_preview_model", "webhook_config",
             "layer_statistics", "global_batch_size", "rank_timeout"}
# Flags without whose old value the optimizer's state has no meaning.
_DECISIVE = ("optimizer", "use_8bit_adam", "train_text_encoder", "use_ema", "lr_scheduler", "lora_type", "rank", "use_dora",
             "lora_targets", "conv_rank", "rank_pattern", "lokr_factor", "network_module", "network_args")


@dataclass
class State:
    """All that a run carries from one step to the next. Order and noise are functions of the step: nothing to keep."""

    networks: dict[str, torch.nn.Module]    # trained as a whole, by the folder of the model they belong to; not wrapped
    optimizer: torch.optim.Optimizer
    lr_schedule: torch.optim.lr_scheduler.LRScheduler
    scaler: torch.amp.GradScaler | None
    average: object | None                  # diffusion.ema.EMA of the first network
    step: int = 0                           # optimizer steps done
    unlogged: dict[str, list[float]] = field(default_factory=dict)    # losses and norms since the last line of the log
    adapter: dict[str, torch.nn.Parameter] = field(default_factory=dict)    # trained on top of frozen networks, by name

    def check_space(self, output_dir: Path, state_bytes: float) -> None:
        """Refuse a run whose first checkpoint will not fit on the disk. Raises `UserError`.

        state_bytes: what the optimizer keeps for each trained parameter.
        """
        everything = [p for network in self.networks.values() for p in network.parameters()] + [*self.adapter.values()]
        trained = [p for p in everything if p.requires_grad or self.adapter]    # an adapter's tensors are detached
        averages = self.average.averages.values() if self.average else ()
        need = sum(sharding.numel(p) * p.element_size() for p in (*everything, *averages))
        need += state_bytes * sum(map(sharding.numel, trained))
        free = shutil.disk_usage(output_dir).free
        if free < need:
            raise UserError(f"a checkpoint takes {need / 2**30:.1f} GB and the disk of --output_dir {output_dir} has "
                            f"{free / 2**30:.1f} GB left: free some, or choose another disk")

    def save(self, output_dir: Path, facts: dict, flags: dict, limit: int | None) -> None:
        """Write OUTPUT_DIR/checkpoint-`step`; every process calls this, the main one writes.

        facts: plain values for the manifest. Raises OSError when the disk is full; nothing older is then touched.
        """
        gathered = self._gather()
        if processes.is_main():
            target, partial = output_dir / f"checkpoint-{self.step}", output_dir / f".checkpoint-{self.step}.tmp"
            shutil.rmtree(partial, ignore_errors=True)
            try:
                self._write(partial, gathered, facts, flags)
            except (OSError, SafetensorError, RuntimeError) as error:
                shutil.rmtree(partial, ignore_errors=True)
                raise _as_os_error(error, target) from error
            _replace(partial, target)
            _rotate(output_dir, limit)
        processes.meet()

    def _gather(self) -> dict:
        """What processes share out, whole: on the main process; every process takes part."""
        return {"networks": {name: sharding.whole_network(network) for name, network in self.networks.items()},
                "adapter": sharding.gather(self.adapter), "optimizer": optimizer_state.gather_state(self.optimizer),
                "average": sharding.gather(self.average.averages) if self.average else {}}

    def _write(self, folder: Path, gathered: dict, facts: dict, flags: dict) -> None:
        folder.mkdir(parents=True)
        for name, network in gathered["networks"].items():
            network.save_pretrained(folder / name)
        if self.adapter:
            save_file({name: p.detach().cpu().contiguous() for name, p in gathered["adapter"].items()}, folder / ADAPTER)
        if self.average:
            save_file({name: value.contiguous() for name, value in gathered["average"].items()}, folder / "ema.safetensors")
        torch.save({"optimizer": gathered["optimizer"], "lr_schedule": self.lr_schedule.state_dict(),
                    "scaler": self.scaler.state_dict() if self.scaler else None}, folder / "training_state.pt")
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        for path in files:
            sync(path)
        manifest = {"step": self.step, "written": time.time(), "unlogged": self.unlogged, **facts,
                    "ema_updates": self.average.updates if self.average else None,
                    "flags": {name: value for name, value in flags.items() if name != "hub_token"},
                    "files": {str(path.relative_to(folder)): path.stat().st_size for path in files}}
        (folder / "manifest.json").write_text(json.dumps(manifest, indent=1))
        sync(folder / "manifest.json")
        sync(folder)

    def load(self, checkpoint: "Checkpoint") -> None:
        """Go on from a checkpoint whose networks are loaded already. Raises `UserError` if its state does not fit."""
        try:
            state = torch.load(checkpoint.path / "training_state.pt", map_location="cpu", weights_only=True)
            self._load_optimizer(state["optimizer"], state["lr_schedule"])
            self._load_adapter(checkpoint.path)
            if self.scaler and state["scaler"]:
                self.scaler.load_state_dict(state["scaler"])
            if self.average:
                kept = load_file(checkpoint.path / "ema.safetensors")
                self.average.load({name: sharding.like(kept[name], own) for name, own in self.average.averages.items()},
                                  checkpoint.manifest["ema_updates"])
        except (OSError, RuntimeError, ValueError, KeyError, pickle.UnpicklingError, SafetensorError) as error:
            raise UserError(f"--resume_from_checkpoint: the state in {checkpoint.path} does not fit: {error}") from error
        self.step, self.unlogged = checkpoint.step, checkpoint.manifest["unlogged"]

    def _load_adapter(self, folder: Path) -> None:
        if not self.adapter:
            return
        kept = load_file(folder / ADAPTER)
        if kept.keys() != self.adapter.keys():
            raise ValueError(f"its adapter has other parts: {', '.join(sorted(kept.keys() ^ self.adapter.keys())[:3])}")
        with torch.no_grad():
            for name, parameter in self.adapter.items():
                parameter.copy_(sharding.like(kept[name], parameter))
        deepspeed_engine.take_weights(self.optimizer)

    def _load_optimizer(self, optimizer: dict, lr_schedule: dict) -> None:
        """Moments and position of the schedule are the checkpoint's; rates, betas and decay those of this run's flags."""
        rates = self.lr_schedule.base_lrs
        optimizer_state.load_state(self.optimizer, optimizer)
        self.lr_schedule.load_state_dict(lr_schedule | {"base_lrs": rates})
        now = [rate * rule(self.lr_schedule.last_epoch) for rate, rule in zip(rates, self.lr_schedule.lr_lambdas, strict=True)]
        for group, rate in zip(self.optimizer.param_groups, now, strict=True):
            group["lr"] = rate
        self.lr_schedule._last_lr = now


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint on the disk."""

    path: Path
    manifest: dict

    @property
    def step(self) -> int:
        return self.manifest["step"]


def find(output_dir: Path, wanted: str | None) -> tuple[Checkpoint | None, list[str]]:
    """The checkpoint to resume from, and notes for the user.

    wanted: None, `latest` (the newest whole one; why others are passed over is noted), a name in `output_dir` or a path.
    Raises `UserError` when a named one is absent or not whole.
    """
    if wanted is None:
        return None, []
    if wanted != "latest":
        path = next((path for path in (Path(wanted), output_dir / wanted) if path.is_dir()), None)
        if path is None:
            raise UserError(f"--resume_from_checkpoint: there is no {wanted}, nor {output_dir / wanted}")
        manifest, fault = _inspect(path)
        if fault:
            raise UserError(f"--resume_from_checkpoint: {path} is not whole: {fault}")
        return Checkpoint(path, manifest), []
    notes = []
    for path in sorted(_all(output_dir), key=_written, reverse=True):
        manifest, fault = _inspect(path)
        if not fault:
            return Checkpoint(path, manifest), notes
        notes.append(f"{path.name} is passed over: {fault}")
    return None, [*notes, f"no checkpoint in {output_dir}: starting anew"]


def compare_flags(checkpoint: Checkpoint, flags: dict, facts: dict) -> list[str]:
    """Notes on flags that changed since the checkpoint and change the training. Raises `UserError` for decisive ones.

    facts: as given to `State.save`; what follows from several flags, such as the global batch.
    """
    old = checkpoint.manifest["flags"]
    new = json.loads(json.dumps(flags))
    for name in _DECISIVE:
        was, now = ("adamw" if each.get(name) == "oss" else each.get(name) for each in (old, new))    # one state for both
        if was != now:
            raise UserError(f"--resume_from_checkpoint: {checkpoint.path} was made with --{name} {old.get(name)}, not "
                            f"{new.get(name)}: give the old value, or train anew from its weights")
    changed = [name for name in new if name not in _HARMLESS and name in old and old[name] != new[name]]
    notes = [f"--{name} is now {new[name]}, the checkpoint was made with {old[name]}" for name in changed]
    manifest = checkpoint.manifest
    return notes + [f"the {name.replace('_', ' ')} is now {value}, the checkpoint was made with {manifest[name]}"
                    for name, value in facts.items() if manifest[name] != value]


def clean(output_dir: Path) -> None:
    """Remove what a killed run left half written: names that only this project and safetensors give."""
    for pattern in (".checkpoint-*.tmp", ".saving.tmp", "*/.saving.tmp"):
        for partial in output_dir.glob(pattern):
            shutil.rmtree(partial, ignore_errors=True)
    for pattern in (".*.safetensors.tmp", "*/.*.safetensors.tmp", ".*.ckpt.tmp", ".report.html.tmp", ".loss_curve.png.tmp",
                    ".tmp??????"):
        for partial in output_dir.glob(pattern):
            partial.unlink(missing_ok=True)


def _all(output_dir: Path) -> list[Path]:
    return [path for path in output_dir.glob("checkpoint-*") if NAME.fullmatch(path.name) and path.is_dir()]


def _written(path: Path) -> tuple[float, int]:
    """When a checkpoint was written, and its step: of a run begun anew in an older one's folder, the steps are lower."""
    step = int(NAME.fullmatch(path.name)[1])
    try:
        return json.loads((path / "manifest.json").read_text())["written"], step
    except (OSError, ValueError, KeyError, TypeError):
        return path.stat().st_mtime, step


def _inspect(path: Path) -> tuple[dict, str | None]:
    """(manifest, why it is not whole)."""
    try:
        manifest = json.loads((path / "manifest.json").read_text())
    except FileNotFoundError:
        return {}, "it has no manifest.json, so it was not written to its end or is not ours"
    except (OSError, ValueError) as error:
        return {}, f"its manifest.json cannot be read: {error}"
    if not isinstance(manifest, dict) or not _ENTRIES <= manifest.keys():
        return {}, f"its manifest.json lacks {', '.join(sorted(_ENTRIES - set(manifest)))}"
    for name, size in manifest["files"].items():
        file = path / name
        if not file.is_file():
            return {}, f"{name} is missing"
        if file.stat().st_size != size:
            return {}, f"{name} has {file.stat().st_size} bytes instead of {size}"
    return manifest, None


def _replace(partial: Path, target: Path) -> None:
    """Rename the finished folder into place; one of the same step makes way only now."""
    if target.exists():
        old = target.with_name(f".{target.name}.old.tmp")
        shutil.rmtree(old, ignore_errors=True)
        os.rename(target, old)
        os.rename(partial, target)
        shutil.rmtree(old)
    else:
        os.rename(partial, target)
    sync(target.parent)


def _rotate(output_dir: Path, limit: int | None) -> None:
    ours = sorted((path for path in _all(output_dir) if (path / "manifest.json").exists()), key=_written)
    for path in ours[:-limit] if limit else []:
        hidden = path.with_name(f".{path.name}.old.tmp")    # first out of sight, so that a kill leaves no broken one
        os.rename(path, hidden)
        shutil.rmtree(hidden)


def _as_os_error(error: Exception, target: Path) -> Exception:
    """What the writers of safetensors and torch raise for a full disk, as the OSError that it is."""
    if isinstance(error, SafetensorError):
        return OSError(*os_error(error), str(target))
    if isinstance(error, RuntimeError) and ("PytorchStreamWriter" in str(error) or "inline_container" in str(error)):
        return OSError(errno.ENOSPC, "No space left on device", str(target))
    return error
