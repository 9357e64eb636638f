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
STEPS = 12
SMALL = ("--resolution=64,64", "--enable_bucket", "--min_bucket_reso=32", "--max_bucket_reso=128", "--bucket_reso_steps=32",
         "--report_to=none", "--logging_steps=1", "--device=cpu", "--vae_name=", "--adam_epsilon=1e-6")
RUN = ("--nnodes=2", "--nproc_per_node=1", "--batch_size=1", "--global_batch_size=4", f"--max_train_steps={STEPS}",
       "--checkpointing_steps=2")

SOON = "keep_alive_interval=1,keep_alive_max_attempt=5"    # seconds, times: torchrun gives up on a machine after 5, not 15
TAKEN_UP = re.compile(r"going on from \S+checkpoint-\d+")

needs_machines = pytest.mark.skipif(bool(netns.lacking()), reason=netns.lacking())


class Machines:
    """Two of them, and what runs there."""

    def __init__(self, pair, folder: Path, common: tuple):
        self.pair, self.folder, self.common, self.port, self.going = pair, folder, common, free_port(), []
        self.script = folder / "small.sh"
        self.script.write_text(f"script=train_sdxl.py script_flags=()\nsource {LAUNCH}\n")

    def launch(self, index: int, again: bool = False) -> None:
        """Start the command there. again: with a loop around it that starts it again until it ends well."""
        log = (self.folder / f"log{index}").open("a")
        command = ["bash", str(self.script), f"--node_rank={index}", f"--master_ip={netns.ADDRESSES[0]}",
                   f"--master_port={self.port}", *self.common]
        if again:
            command = ["sh", "-c", 'until "$@"; do sleep 1; done', "again", *command]
        machine = self.pair[index]
        for before in self.going[index:index + 1]:
            before.wait(60)
        self.going[index:index + 1] = [subprocess.Popen(
            netns.on(machine, command), cwd=self.folder, stdout=log, stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"})]

    def ends(self) -> list[int]:
        """The exit statuses."""
        return [one.wait(200) for one in self.going]

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


def going_on(pair, times: int, step: int) -> None:
    """Wait until the run has been taken up so many times, and has done this step since. The first machine has rank 0."""
    def there():
        assert any(one.poll() is None for one in pair.going), pair.said(0) + pair.said(1)
        *before, now = TAKEN_UP.split(pair.said(0))
        return len(before) >= times and any(int(done) >= step for done in re.findall(rf"(\d+)/{STEPS} \[", now))
    until(there, 200, 0.02)


@needs_machines
def test_a_process_and_either_machine_are_lost(machines, whole, tmp_path):
    """The launchers start a killed process anew by themselves, a lost machine is waited for; even the first one, where all
    machines try again (`until`, or systemd). The run becomes what it would have been, bit by bit."""
    output = tmp_path / "out"
    pair = machines(output, "--max_restarts=9", "--rank_timeout=5", f"--rdzv_conf={SOON}")
    for index in range(2):
        pair.launch(index, again=True)
    going_on(pair, 0, 3)
    victim, = workers(pair.pair[1])
    os.kill(victim, signal.SIGKILL)
    for times, lost in ((1, 1), (2, 0)):
        going_on(pair, times, 2 * times + 3)
        netns.fail(pair.pair[lost])
        pair.launch(lost, again=True)
    assert pair.ends() == [0, 0], pair.said(0) + pair.said(1)
    assert len(TAKEN_UP.findall(pair.said(0))) >= 3
    assert losses(output) == losses(whole)
    ours, theirs = weights(output), weights(whole)
    assert all((ours[name] == theirs[name]).all() for name in theirs)


@needs_machines
def test_fewer_machines_go_on(machines, whole, tmp_path):
    """--min_nodes: where a cable is cut, each side names the other; one goes on with the same global batch, and is joined when
    the other starts again."""
    output = tmp_path / "out"
    pair = machines(output, "--max_restarts=9", "--min_nodes=1", "--rank_timeout=5", f"--rdzv_conf=last_call_timeout=2,{SOON}")
    for index in range(2):
        pair.launch(index)
    going_on(pair, 0, 3)
    netns.cut(pair.pair[1])
    going_on(pair, 1, 3)
    alone, = workers(pair.pair[0])
    os.kill(alone, signal.SIGSTOP)    # so that the run is not over before the other machine is back
    begun = len(losses(output))
    for index in range(2):
        other = f"rank {1 - index} (host {pair.pair[1 - index][0]}, process "
        assert other in pair.said(index) and "has not answered for 5 s" in pair.said(index), pair.said(index)
    netns.fail(pair.pair[1])
    netns.plug(pair.pair[1])
    pair.launch(1)
    until(lambda: f"Sending process {alone} closing signal SIGTERM" in pair.said(0), 200, 0.1)
    os.kill(alone, signal.SIGCONT)
    assert pair.ends() == [0, 0], pair.said(0) + pair.said(1)
    assert re.search(rf"stopped after step ({begun}|{begun + 1}|{begun + 2}) of {STEPS}", pair.said(0)), pair.said(0)
    assert len(TAKEN_UP.findall(pair.said(0))) >= 2
    np.testing.assert_allclose(losses(output), losses(whole), rtol=0, atol=1e-5)
    assert losses(output) != losses(whole), "one process adds up in another order"


@needs_machines
def test_all_end_where_none_is_to_start_again(machines, tmp_path):
    """A static run, of which one process is killed."""
    output = tmp_path / "out"
    pair = machines(output, "--rank_timeout=5")
    for index in range(2):
        pair.launch(index)
    going_on(pair, 0, 3)
    victim, = workers(pair.pair[1])
    os.kill(victim, signal.SIGKILL)
    begin = time.monotonic()
    assert pair.ends() == [1, 1] and time.monotonic() - begin < 40
    assert re.search(rf"rank 1 \(host {pair.pair[1][0]}, process {victim}\) has not answered", pair.said(0)), pair.said(0)
    for index in range(2):
        assert "error: training ended with status 1" in pair.said(index)
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


def test_a_name_that_leads_back_here(tmp_path):
    """As that of the machine itself does on Debian. Here it is another spelling of 127.0.0.1."""
    script = tmp_path / "small.sh"
    script.write_text(f"script=train_sdxl.py script_flags=()\nsource {LAUNCH}\n")
    command = ["bash", str(script), "--nnodes=2", "--master_ip=0x7f000001", "--model_name=m", "--dataset_name=d", "--device=cpu"]
    done = subprocess.run(command, cwd=tmp_path, env={**os.environ, "PYTHON": sys.executable}, capture_output=True, text=True)
    assert done.returncode == 2
    assert "error: --master_ip=0x7f000001 is 127.0.0.1 on this machine, which no other one can reach" in done.stderr
