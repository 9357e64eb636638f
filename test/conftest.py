"""What all tests share: a tiny model, small pictures, and whole runs in this process."""

import os

os.environ["OMP_NUM_THREADS"] = "1"    # before torch is imported: another thread count changes the last bits

import signal
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("steady", deadline=None, derandomize=True)    # what is red is red for everyone, on a busy machine, too
settings.load_profile("steady")
SIZES = ((64, 64), (96, 64), (64, 96), (80, 72), (128, 64), (70, 70))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """The folder of an SDXL of the true topology with 0.5 M parameters."""
    import tiny
    return tiny.make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def tiny_images(tmp_path_factory):
    """A folder of six pictures of six sizes, each with its caption in a text file."""
    import tiny
    return tiny.make_images(tmp_path_factory.mktemp("images"), SIZES)


@pytest.fixture(scope="session")
def shared_cache(tmp_path_factory):
    """Latents and prompts of all runs that do not ask for their own: encoded once a session."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def small_run(tiny_model, tiny_images, shared_cache, tmp_path):
    """`small_run(*flags)`: the command line of a small run; later flags go before earlier ones.

    without: names of flags that are not to be given at all.
    """
    usual = {"pretrained_model_name_or_path": tiny_model, "train_data_dir": tiny_images, "output_dir": tmp_path / "out",
             "embedding_cache_dir": shared_cache, "resolution": 64, "train_batch_size": 2, "max_train_steps": 2, "seed": 1,
             "report_to": "none", "logging_steps": 1}

    def small_run(*flags, without=()):
        return [*(f"--{name}={value}" for name, value in usual.items() if name not in without), *map(str, flags)]

    return small_run


@pytest.fixture
def parse(small_run):
    """`parse(*flags)`: the arguments of a small run of train_sdxl.py."""
    import train_sdxl
    return lambda *flags, without=(): train_sdxl.parse_args(small_run(*flags, without=without))


@pytest.fixture
def parse_lora(small_run, tmp_path):
    """The same of train_lora_sdxl.py, whose adapter has rank 4 and lies in a folder of its own."""
    import train_lora_sdxl
    own = {"rank": 4, "output_dir": tmp_path / "lora"}

    def parse_lora(*flags, without=()):
        given = [f"--{name}={value}" for name, value in own.items() if name not in without]
        return train_lora_sdxl.parse_args(small_run(*given, *flags, without=without))

    return parse_lora


@pytest.fixture
def one_process(monkeypatch):
    """`one_process()` makes room for a new run in this process; what runs changed of it is put back at the end."""
    from accelerate.state import AcceleratorState, GradientState
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    environment = dict(os.environ)
    monkeypatch.setattr(sys, "argv", ["train_sdxl.py"])

    def reset():
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()

    yield reset
    reset()
    os.environ.clear()
    os.environ.update(environment)
    for number, handler in handlers.items():
        signal.signal(number, handler)


def _run(module, args, one_process, monkeypatch, plots: bool) -> Path:
    one_process()
    with monkeypatch.context() as patch:
        if not plots:    # half of the time of so short a run
            patch.setattr(module.report, "write_loss_curve", lambda folder: folder)
            patch.setattr(module.report, "write_report", lambda folder, **_: folder)
        module.main(args)
    return Path(args.output_dir)


@pytest.fixture
def train(parse, one_process, monkeypatch):
    """`train(*flags)`: a whole run in this process -> its output folder. The plots of the report are left out."""
    import train_sdxl
    return lambda *flags, without=(), plots=False: _run(
        train_sdxl, parse(*flags, without=without), one_process, monkeypatch, plots)


@pytest.fixture
def train_lora(parse_lora, one_process, monkeypatch):
    """`train_lora(*flags)`: the same of train_lora_sdxl.py."""
    import train_lora_sdxl
    return lambda *flags, without=(): _run(train_lora_sdxl, parse_lora(*flags, without=without), one_process, monkeypatch, False)
