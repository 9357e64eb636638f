"""What the benchmarks share: the launch of a training script, its flags, and what a step or a tree of processes uses."""

import functools
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
OURS = HERE.parent / "train_sdxl.py"
PROMPT = "a photo of sks things"    # of runs with one for all images


@dataclass(frozen=True)
class Used:
    cpu: float     # seconds, user and system, of the process and all its children
    wall: float    # seconds


class Watch:
    """Adds up CPU-seconds by name, step by step."""

    def __init__(self):
        self.steps: list[dict[str, float]] = []
        self._now, self._since, self._inside = {}, 0.0, set()

    def timed(self, name: str, function):
        @functools.wraps(function)
        def call(*args, **kwargs):
            if name in self._inside:    # one text encoder within another counts once
                return function(*args, **kwargs)
            self._inside.add(name)
            begin = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                self._inside.discard(name)
                self._now[name] = self._now.get(name, 0.0) + time.process_time() - begin
        return call

    def stop(self) -> None:
        """A step is over."""
        now = time.process_time()
        if self._since:
            self.steps.append(self._now | {"whole": now - self._since})

    def start(self) -> None:
        """The next one begins; what was done in between does not count."""
        self._now, self._since = {}, time.process_time()


def flags(data: Path, model: str, output: Path, *more: str, photos: str = "photos") -> list[str]:
    """The run that every benchmark makes, in flags that our script and the peer's both know."""
    return ["--train_data_dir", str(data / photos), *_common(data / model, output), *more]


def dreambooth_flags(data: Path, model: str, output: Path, *more: str, captions: bool, photos: str = "photos") -> list[str]:
    """The same for SD 3, whose script at diffusers is for DreamBooth: a caption an image, or `PROMPT` for all.

    A data set with captions goes by --dataset_name; without, by a folder that holds images alone. T5 reads 77 tokens.
    """
    if captions:
        chosen = ["--dataset_name", str(data / photos), "--image_column", "image", "--caption_column", "text"]
    else:
        images = data / f"{photos}_alone"
        if not images.exists():
            images.mkdir()
            for path in sorted((data / photos).glob("*.jpg")):
                (images / path.name).symlink_to(path.resolve())
        chosen = ["--instance_data_dir", str(images), "--instance_prompt", PROMPT]
    return [*chosen, "--max_sequence_length", "77", *_common(data / f"sd3_{model}", output), *more]


def _common(model: Path, output: Path) -> list[str]:
    return ["--pretrained_model_name_or_path", str(model), "--resolution", "256", "--center_crop", "--train_batch_size", "4",
            "--learning_rate", "1e-5", "--seed", "0", "--output_dir", str(output), "--max_train_steps", "20"]


def launch(script: Path, arguments: list[str], runner: Path | None = None) -> list[str]:
    """The command `accelerate launch SCRIPT ARGUMENTS`; with `runner`, that script is given SCRIPT to run."""
    return [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1",
            "--mixed_precision", "no", "--dynamo_backend", "no", "--cpu", *([str(runner)] if runner else []),
            str(script), *arguments]


def environment(cores: int = 1, python_path: str | None = None, cache: Path | None = None) -> dict[str, str]:
    """This environment, with one thread, no network, and the datasets library's cache in `cache`."""
    changes = {"OMP_NUM_THREADS": str(cores), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    if python_path:
        changes["PYTHONPATH"] = python_path
    if cache:
        changes["HF_DATASETS_CACHE"] = str(cache)
    return os.environ | changes


def pin(core: int | None) -> None:
    """Keep this process and its children on one core, where the system can."""
    if core is not None and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {core})


def run(command: list[str], environment: dict[str, str]) -> Used:
    """Run to the end; what it said is shown only when it fails."""
    before, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    with tempfile.TemporaryFile("w+") as said:
        status = subprocess.call(command, env=environment, stdout=said, stderr=said)
        if status:
            said.seek(0)
            sys.exit(f"{said.read()[-4000:]}\n{' '.join(command)} ended with status {status}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return Used(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, time.perf_counter() - begin)
