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
def parse(tiny_model, tiny_images, shared_cache, tmp_path):
    """`parse(*flags)`: the arguments of a small run of train_sdxl.py; later flags go before earlier ones.

    without: names of flags that are not to be given at all.
    """
    import train_sdxl
    usual = {"pretrained_model_name_or_path": tiny_model, "train_data_dir": tiny_images, "output_dir": tmp_path / "out",
             "embedding_cache_dir": shared_cache, "resolution": 64, "train_batch_size": 2, "max_train_steps": 2, "seed": 1,
             "report_to": "none", "logging_steps": 1}

    def parse(*flags, without=()):
        given = [f"--{name}={value}" for name, value in usual.items() if name not in without]
        return train_sdxl.parse_args([*given, *map(str, flags)])

    return parse


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


@pytest.fixture
def train(parse, one_process, monkeypatch):
    """`train(*flags)`: a whole run in this process -> its output folder. The plots of the report are left out."""
    import train_sdxl

    def train(*flags, without=(), plots=False):
        one_process()
        args = parse(*flags, without=without)
        with monkeypatch.context() as patch:
            if not plots:    # half of the time of so short a run
                patch.setattr(train_sdxl.report, "write_loss_curve", lambda folder: folder)
                patch.setattr(train_sdxl.report, "write_report", lambda folder, **_: folder)
            train_sdxl.main(args)
        return Path(args.output_dir)

    return train
