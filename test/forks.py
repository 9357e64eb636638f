"""Runs of a training script's main as processes of their own, forked from a warm parent: without 7 s of imports.

The parent (a fork server of `multiprocessing`, one a script: diffusers looks for PEFT once, and only one of them has it)
has imported what a run imports, and holds one thread, no accelerator and no process group. What it forks computes the
bits of a fresh `python train_sdxl.py`: test_kill.py continues one by the other.
"""

import contextlib
import ctypes
import importlib
import multiprocessing.forkserver
import os
import resource
import signal
import socket
import struct
import sys
import threading
import time
from functools import cache
from pathlib import Path
from unittest import mock

REPOSITORY = Path(__file__).resolve().parents[1]
_WARM = "FORKS_WARM"


def flags(model, images, output, *more) -> list[str]:
    """The command line of a small run; later flags go before earlier ones."""
    return ["--pretrained_model_name_or_path", str(model), "--train_data_dir", str(images), "--output_dir", str(output),
            "--resolution", "64", "--train_batch_size", "4", "--seed", "1", "--report_to", "none", "--logging_steps", "1",
            *map(str, more)]


class Run:
    """A run of a script (by the name of its module) in a process of its own; what it prints lies in the file `log`.

    setting: env, added to its environment; file_limit, bytes that a file may have, as on a full disk; humble=True,
    without root's right to any file; shard_bytes, the size of the caches' shards; plots=True, with the report's plots,
    which take half of the time of so short a run; module, whose main is called instead of the script's.
    """

    def __init__(self, flags: list[str], log: Path, script: str = "train_sdxl", **setting):
        self.log = Path(log)
        self.log.write_text("")
        context = multiprocessing.get_context("forkserver")
        self._process = context.Process(target=_run, args=(script, flags, str(log)), kwargs=setting, daemon=True)
        with mock.patch.object(multiprocessing.forkserver, "connect_to_new_process", _server(script).connect_to_new_process):
            self._process.start()
        self.pid = self._process.pid

    def poll(self) -> int | None:
        """As that of Popen: its exit status once it has ended."""
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):    # it has ended by itself
            os.kill(self.pid, number)

    def wait(self, seconds: float = 120) -> int:
        """Its exit status, as subprocess gives it."""
        self._process.join(seconds)
        if self._process.is_alive():
            self._process.kill()
            raise TimeoutError(f"still running after {seconds} s:\n{self.text()[-3000:]}")
        return self._process.exitcode

    def text(self) -> str:
        return self.log.read_text(errors="replace")


def run(flags: list[str], log: Path, status: int = 0, **setting) -> str:
    """Run to the end -> what it printed."""
    made = Run(flags, log, **setting)
    ended = made.wait()
    assert ended == status, f"exit status {ended} instead of {status}:\n{made.text()[-5000:]}"
    return made.text()


def together(flags: list[str], log: Path, processes: int, **setting) -> list[Run]:
    """The processes of one run, as `torch.distributed.run` would start them."""
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(processes)}
    return [Run(flags, log.with_name(f"{log.name}.{rank}"), env={**place, "RANK": str(rank), "LOCAL_RANK": str(rank)}, **setting)
            for rank in range(processes)]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def until(condition, seconds: float = 120, pause: float = 0.001):
    """Wait for `condition()` -> what it returned."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, f"nothing after {seconds} s"
        time.sleep(pause)
    return value


@cache
def _server(script: str) -> multiprocessing.forkserver.ForkServer:
    server = multiprocessing.forkserver.ForkServer()
    server.set_forkserver_preload(["pytest", "forks"])
    before = dict(os.environ)
    path = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "test"), *filter(None, [os.environ.get("PYTHONPATH")])])
    os.environ.update({_WARM: script, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"})
    try:
        server.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)
    return server


def _warm(script: str) -> None:
    import torch.utils.tensorboard  # noqa: F401
    importlib.import_module(script)
    from library.training.accelerator import calm
    calm()
    model = importlib.import_module("library.models." + ("sd3" if "sd3" in script else "sdxl"))
    for part in model.PARTS[:2] + model.TEXT_ENCODERS:
        model.class_of(part)
    import diffusers  # after what a run imports first
    import matplotlib.backends.backend_agg
    import matplotlib.backends.backend_svg
    import matplotlib.figure  # noqa: F401
    _ = diffusers.StableDiffusionXLPipeline, diffusers.StableDiffusion3Pipeline, diffusers.EulerDiscreteScheduler
    threads = os.listdir("/proc/self/task") if os.path.isdir("/proc/self/task") else [0]
    assert len(threads) == 1, "a parent with threads must not fork"


def _run(script: str, flags: list[str], log: str, env: dict | None = None, file_limit: int | None = None, humble: bool = False,
         shard_bytes: int | None = None, plots: bool = False, module: str = "") -> None:
    handle = os.open(log, os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(handle, stream)
    os.environ.update(env or {})
    signal.signal(signal.SIGINT, signal.default_int_handler)    # a shell has its background jobs ignore it, with their children
    if file_limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    if humble:    # no capability is left
        ctypes.CDLL(None).capset(struct.pack("Ii", 0x20080522, 0), bytes(24))
    sys.argv = [f"{script}.py", *flags]
    from tqdm import tqdm

    from library import errors
    from library.data import cache
    given = importlib.import_module(module or script)
    tqdm.set_lock(threading.RLock())    # its own is a semaphore that multiprocessing would miss after a kill
    cache.SHARD_BYTES = shard_bytes or cache.SHARD_BYTES
    if not plots:
        report = importlib.import_module("library.validation.report")
        report.write_loss_curve = lambda folder: folder
        report.write_report = lambda folder, **_: folder
    with errors.exit_on_user_error(f"{script}.py"):
        given.main(given.parse_args(flags))


if _WARM in os.environ:
    _warm(os.environ.pop(_WARM))
