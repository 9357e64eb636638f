"""Start of a run: accelerate, precision, trackers, and a calm terminal."""

import datetime
import logging
import os
import secrets
import shlex
import sys
import warnings
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs
from tqdm import tqdm

from library.errors import UserError
from library.training import agreement, checkpoints, deepspeed_engine, devices, processes, sharding, watch


def calm() -> None:
    """Let other packages speak only of errors: the terminal belongs to what the user needs to know."""
    for name in ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY", "DATASETS_VERBOSITY"):
        os.environ.setdefault(name, "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")    # its threads do not survive a fork
    os.environ.setdefault("TQDM_MININTERVAL", "0.5")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    for name in ("bitsandbytes", "torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # it sets its level itself; where it is installed, transformers imports it to save a text encoder
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
    warnings.filterwarnings("ignore", module=r"(diffusers|transformers|accelerate|torch|huggingface_hub|bitsandbytes)\b")


def start(args) -> Accelerator:
    """The accelerator of this run. Raises `UserError` for what the machine cannot do."""
    calm()
    if args.local_rank >= 0:
        os.environ.setdefault("LOCAL_RANK", str(args.local_rank))
    device = devices.best()
    precision = args.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    devices.check_precision(precision, device)
    devices.check_count(device)
    devices.check_attention(args.attention_mechanism, precision, device)
    deepspeed_engine.check_installed(device)
    processes.face_others()
    with watch.arriving(args.rank_timeout):
        accelerator = Accelerator(
            cpu=device == "cpu", mixed_precision=precision, gradient_accumulation_steps=args.gradient_accumulation_steps,
            # one process may decode for hours while another is done: no collective may give up on it, as `watch` does that
            kwargs_handlers=[InitProcessGroupKwargs(timeout=datetime.timedelta(days=7)),
                             # DDP keeps no second copy of the gradients, and sends no buffers, which are constants: it would do
                             # so at each evaluation of a trained text encoder, and processes make unlike numbers of those
                             DistributedDataParallelKwargs(gradient_as_bucket_view=True, broadcast_buffers=False)])
    wanted = processes.launched()
    if accelerator.num_processes != wanted:
        raise UserError(f"{wanted} processes were launched, but accelerate made {accelerator.num_processes} of them one run: "
                        "each would train alone. Launch with `accelerate launch --multi_gpu`, without a GPU, too")
    if accelerator.device.type != device:
        raise UserError(f"this machine has the device {device}, but accelerate chose {accelerator.device.type}: look at "
                        "`accelerate env` and at the config file of accelerate")
    devices.prepare(device, precision)
    if "ACCELERATE_USE_CPU" in os.environ and "MASTER_PORT" in os.environ and "WORLD_SIZE" not in os.environ:
        say("accelerate launch has started one process: it starts several only for --multi_gpu, on CPUs and one GPU, too")
    watch.start(args.rank_timeout)
    agreement.check_start(args, device)
    agreement.check_engine(accelerator)
    sharding.check(accelerator, args)
    sharding.prepare(accelerator, args)
    if args.allow_tf32:
        devices.allow_tf32(device)
    devices.try_attention(args.attention_mechanism, precision, accelerator.device)
    return accelerator


def say(text: str) -> None:
    """One line for the user, from the main process."""
    if text and processes.is_main():
        tqdm.write(text)


def bare(network: torch.nn.Module) -> torch.nn.Module:
    """A network without the wrapper that many processes put around it."""
    return getattr(network, "module", network)


def choose_seed(given: int | None) -> int:
    """The seed of the run: the given one, or a fresh one that all processes share."""
    seed = [secrets.randbits(31) if given is None else given]
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(seed)
    return seed[0]


def seed_dropout(seed: int, step: int, device: str) -> None:
    """Fix what dropout draws in this optimizer step: a function of (seed, step, process), so that a restart draws it again."""
    words = np.random.SeedSequence([seed, step, processes.rank()]).generate_state(1, np.uint64)
    devices.manual_seed(int(words[0]) >> 1, device)


def public(args) -> dict:
    """The flags as plain values, without the secret ones."""
    return {name: value for name, value in vars(args).items() if name != "hub_token"}


def command() -> str:
    """The command line as typed, without the secret values."""
    words, hide = ["python"], False
    for word in sys.argv:
        secret = word.startswith(("--hub_token", "--huggingface_token"))
        words.append("***" if hide else word.split("=")[0] + "=***" if secret and "=" in word else word)
        hide = secret and "=" not in word
    return shlex.join(words)


def open_output(output_dir: Path, base: Path, found: checkpoints.Checkpoint | None) -> None:
    """Make OUTPUT_DIR and clear away what a killed run left half written. Raises `UserError`.

    found: the checkpoint that this process goes on from, which must be that of all.
    """
    if output_dir.resolve() == base.resolve():
        raise UserError(f"--output_dir {output_dir} is the base model: it would be overwritten. Choose another folder")
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output_dir: cannot make {output_dir}: {error.strerror}") from None
    if not os.access(output_dir, os.W_OK):
        raise UserError(f"--output_dir: {output_dir} cannot be written to. Choose another folder, or change its rights")
    agreement.check_output(output_dir)
    agreement.check("what they go on from", {"the checkpoint's step": found.step if found else "none"},
                    "Start again when all machines see the same files there")
    if processes.is_main():
        checkpoints.clean(output_dir)
    processes.meet()


class Trackers:
    """TensorBoard and wandb, on the main process. Raises `UserError` for a package that is not installed."""

    def __init__(self, args, output_dir: Path):
        self._board = self._wandb = None
        main, report_to, folder = processes.is_main(), args.report_to, str(output_dir / args.logging_dir)
        if report_to in ("tensorboard", "all"):
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise UserError("--report_to tensorboard needs `pip install tensorboard`; or choose none") from None
            self._board = SummaryWriter(folder) if main else None
        if report_to in ("wandb", "all"):
            try:
                import wandb
            except ImportError:
                raise UserError("--report_to wandb needs `pip install wandb`; or choose tensorboard or none") from None
            # its metadata hold the command line, and so the token
            settings = wandb.Settings(x_disable_meta=args.hub_token is not None)
            try:
                self._wandb = wandb.init(project=args.tracker_project_name, config=public(args), dir=output_dir,
                                         settings=settings) if main else None
            except wandb.errors.Error as error:
                raise UserError(f"--report_to wandb: {error} Or choose tensorboard or none") from error

    def numbers(self, step: int, values: dict[str, float]) -> None:
        if self._board:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)
        if self._wandb:
            self._wandb.log(values, step=step)

    def images(self, step: int, images: dict[str, object]) -> None:
        """images: {title: PIL image}."""
        if self._board:
            import numpy as np
            for title, image in images.items():
                self._board.add_image(f"validation/{title}", np.asarray(image), step, dataformats="HWC")
        if self._wandb:
            import wandb
            self._wandb.log({"validation": [wandb.Image(image, caption=title) for title, image in images.items()]}, step=step)

    def close(self) -> None:
        if self._board:
            self._board.close()
        if self._wandb:
            self._wandb.finish()


def versions(device: torch.device) -> dict[str, str]:
    """What the run stands on, for the report."""
    found = {"device": devices.description(device.type), "python": sys.version.split()[0]}
    for package in ("torch", "diffusers", "transformers", "accelerate", "safetensors", "numpy", "torch-npu"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def publish(args, output_dir: Path) -> None:
    """Upload the finished model, but no checkpoint, cache, log or model of an earlier step.

    Raises `UserError`; the model is then still here.
    """
    if not args.push_to_hub or not processes.is_main():
        return
    from huggingface_hub import HfApi
    api, here = HfApi(token=args.hub_token), output_dir.resolve()
    folders = [here / args.logging_dir, Path(args.embedding_cache_dir or here / "cache"), here / "wandb"]
    private = [f"{folder.resolve().relative_to(here)}/**" for folder in folders if folder.resolve().is_relative_to(here)]
    try:
        repository = api.create_repo(args.hub_model_id or here.name, exist_ok=True).repo_id
        api.upload_folder(repo_id=repository, folder_path=output_dir, commit_message="End of training",
                          ignore_patterns=["checkpoint-*", f"{args.output_name}-*", ".*", *private])
    except Exception as error:    # network, rights, names: the hub says which
        raise UserError(f"--push_to_hub: {error}. The model is finished and lies in {output_dir}") from error
    say(f"uploaded to {repository}")
