"""Two machines, as network namespaces with names of their own: a dead process, a dead machine, a cut cable, copies of data."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import netns
import numpy as np
import pytest
from forks import Run, flags, free_port, until
from safetensors.torch import load_file

from library.data.cache import Store

LAUNCH = Path(__file__).parents[1] / "launch.sh"
STEPS = 24
SMALL = ("--resolution=64,64", "--enable_bucket", "--min_bucket_reso=32", "--max_bucket_reso=128", "--bucket_reso_steps=32",
         "--report_to=none", "--logging_steps=1", "--device=cpu", "--vae_name=", "--adam_epsilon=1e-6")
RUN = ("--nnodes=2", "--nproc_per_node=1", "--batch_size=1", "--global_batch_size=4", f"--max_train_steps={STEPS}",
       "--checkpointing_steps=4")

needs_machines = pytest.mark.skipif(bool(netns.lacking()), reason=netns.lacking())


class Machines:
    """Two of them, and what runs there."""

    def __init__(self, pair, folder: Path, common: tuple):
        self.pair, self.folder, self.common, self.port, self.going = pair, folder, common, free_port(), []
        self.script = folder / "small.sh"
        self.script.write_text(f"script=train_sdxl.py script_flags=()\nsource {LAUNCH}\n")

    def launch(self, index: int, *more) -> subprocess.Popen:
        log = (self.folder / f"log{index}").open("a")
        command = ["bash", str(self.script), f"--node_rank={index}", f"--master_ip={netns.ADDRESSES[0]}",
                   f"--master_port={self.port}", *self.common, *map(str, more)]
        machine = self.pair[index]
        self.going.append(subprocess.Popen(
            netns.on(machine, command), cwd=self.folder, stdout=log, stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **netns.environment(machine)}))
        return self.going[-1]

    def said(self, index: int) -> str:
        return (self.folder / f"log{index}").read_text()


def workers(machine) -> list[int]:
    """The training processes of a machine; those that load data for them are their children."""
    found = [pid for pid, words in netns.processes(machine).items()
             if any(word.endswith("train_sdxl.py") for word in words) and "torch.distributed.run" not in words]
    return [min(found)] if found else []


@pytest.fixture
def machines(tiny_model, tiny_images, shared_cache, tmp_path):
    """`machines(output, *flags)`: two machines on which the launch script can be started with these flags."""
    with contextlib.ExitStack() as stack:
        made = []

        def machines(output: Path, *more):
            common = (f"--model_name={tiny_model}", f"--dataset_name={tiny_images}", f"--embedding_cache_dir={shared_cache}",
                      f"--output_path={output}", *SMALL, *RUN, *more)
            made.append(Machines(stack.enter_context(netns.machines()), tmp_path, common))
            return made[-1]

        try:
            yield machines
        finally:
            for each in made:
                for machine in each.pair:
                    netns.fail(machine)
                for going in each.going:
                    going.wait()


@pytest.fixture(scope="module")
def whole(tiny_model, tiny_images, shared_cache, tmp_path_factory):
    """The uninterrupted run of two processes."""
    output = tmp_path_factory.mktemp("whole") / "out"
    given = flags(tiny_model, tiny_images, output, "--train_batch_size", 1, "--global_batch_size", 4, "--max_train_steps", STEPS,
                  "--checkpointing_steps", 99, "--embedding_cache_dir", shared_cache, *SMALL[1:7], SMALL[9])
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    going = [Run(given, output.with_name(f"log{rank}"), env=place | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
             for rank in range(2)]
    assert [one.wait(300) for one in going] == [0, 0], going[0].text() + going[1].text()
    return output


def losses(output: Path) -> list[float]:
    path = output / "metrics.jsonl"
    return [json.loads(line)["loss"] for line in path.read_text().splitlines()] if path.exists() else []


def weights(output: Path) -> dict:
    return load_file(output / "unet" / "diffusion_pytorch_model.safetensors")


@needs_machines
def test_a_process_is_killed(machines, whole, tmp_path):
    """Its run ends, the launchers start it anew by themselves, and it becomes what it would have been, bit by bit."""
    output = tmp_path / "out"
    pair = machines(output, "--max_restarts=3")
    going = [pair.launch(index) for index in range(2)]
    until(lambda: len(losses(output)) > 5, 300, 0.01)
    victim, = workers(pair.pair[1])
    os.kill(victim, signal.SIGKILL)
    assert [one.wait(300) for one in going] == [0, 0], pair.said(0) + pair.said(1)
    assert re.search(r"going on from .*checkpoint-\d+", pair.said(0) + pair.said(1))
    assert "Traceback (most recent call last)" not in pair.said(0) + pair.said(1)
    assert losses(output) == losses(whole)
    ours, theirs = weights(output), weights(whole)
    assert all((ours[name] == theirs[name]).all() for name in theirs)


@needs_machines
def test_a_machine_is_lost_and_comes_back(machines, whole, tmp_path):
    """With --min_nodes the other one goes on with the same global batch, and is joined when the lost one starts again."""
    output = tmp_path / "out"
    pair = machines(output, "--max_restarts=5", "--min_nodes=1", "--rdzv_conf=last_call_timeout=3", "--rank_timeout=20")
    going = [pair.launch(index) for index in range(2)]
    until(lambda: len(losses(output)) > 2, 300, 0.01)
    netns.fail(pair.pair[1])
    begun = len(losses(output))
    until(lambda: len(losses(output)) > begun + 4 and "4 a step" in pair.said(0), 300, 0.01)
    back = pair.launch(1)
    assert going[0].wait(300) == 0 and back.wait(300) == 0, pair.said(0) + pair.said(1)
    assert re.search(r"rank 1 \(host node1\w+, process \d+\) (is gone|has not answered)", pair.said(0))
    np.testing.assert_allclose(losses(output), losses(whole), rtol=0, atol=1e-5)


@needs_machines
def test_a_cable_is_cut(machines, tmp_path):
    """Nothing breaks: both sides only wait. Each names the other one's machine, and ends."""
    output = tmp_path / "out"
    pair = machines(output, "--rank_timeout=6")
    going = [pair.launch(index) for index in range(2)]
    until(lambda: len(losses(output)) > 2, 300, 0.01)
    netns.cut(pair.pair[1])
    begin = time.monotonic()
    codes = [one.wait(120) for one in going]
    assert 0 not in codes and time.monotonic() - begin < 60
    for index in range(2):
        other = f"rank {1 - index} (host {pair.pair[1 - index][0]}, process "
        assert other in pair.said(index) and "has not answered for 6 s" in pair.said(index), pair.said(index)
    assert not list(output.glob(".checkpoint*"))


def test_data_and_caches_of_each_machine(tiny_model, tiny_images, whole, tmp_path):
    """Each process with a copy of the data and a cache of its own: all is encoded in both, and the run is the same."""
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    for again in range(2):    # the second time, all is there
        going = []
        for rank in range(2):
            images = tmp_path / f"images{rank}"
            if not again:
                shutil.copytree(tiny_images, images)
            given = flags(tiny_model, images, tmp_path / f"out{again}", "--train_batch_size", 1, "--global_batch_size", 4,
                          "--max_train_steps", 2 if again else STEPS, "--checkpointing_steps", 99, *SMALL[1:7], SMALL[9],
                          "--embedding_cache_dir", tmp_path / f"cache{rank}")
            going.append(Run(given, tmp_path / f"log{again}{rank}", env=place | {"RANK": str(rank), "LOCAL_RANK": str(rank)}))
        assert [one.wait(300) for one in going] == [0, 0], going[0].text() + going[1].text()
        place["MASTER_PORT"] = str(free_port())
    assert losses(tmp_path / "out0") == losses(whole) and losses(tmp_path / "out1") == losses(whole)[:2]
    for kind in ("latents", "prompts"):
        keys = [Store(tmp_path / f"cache{rank}" / kind)._keys.tolist() for rank in range(2)]
        assert keys[0] == keys[1] and len(keys[0]) > 5
        assert all(len(list((tmp_path / f"cache{rank}" / kind).glob("*.safetensors"))) == 1 for rank in range(2)), "made once"


def test_processes_that_differ_are_refused(tiny_model, tiny_images, tmp_path):
    """Flags, data, output: the main process says what differs, and the other one leaves in silence."""
    other = tmp_path / "images"
    shutil.copytree(tiny_images, other)
    text = sorted(other.glob("*.txt"))[0]
    text.write_text("something else")
    cases = [({}, {"learning_rate": 2e-4}, "--learning_rate is 0.0001 on rank 0"),
             ({}, {"train_data_dir": other}, f"{text.stem}.png is not the same"),
             ({}, {"output_dir": tmp_path / "elsewhere"}, "is not one folder for all processes")]
    for number, (*given, said) in enumerate(cases):
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
        going = [Run(flags(tiny_model, tiny_images, tmp_path / f"out{number}", "--max_train_steps", 1, "--embedding_cache_dir",
                           tmp_path / "cache", *(word for name, value in one.items() for word in (f"--{name}", value))),
                     tmp_path / f"said{number}{rank}", env=place | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
                 for rank, one in enumerate(given)]
        assert [one.wait() for one in going] == [2, 2], going[0].text() + going[1].text()
        assert said in going[0].text() and "Traceback" not in going[0].text()
        assert going[1].text() == ""
