"""A dead, silent, late or faulty process is named by the others, with its host, and in time."""

import contextlib
import multiprocessing
import os
import signal
import socket
import sys
import time

import pytest
import torch
import torch.distributed as dist
from forks import free_port, until

from library import errors
from library.training import processes, signals, watch

HOST = socket.gethostname()
BEAT, PATIENCE = 0.1, 1.5


def work(rank: int, kind: str, port: int, folder, limit: float, world: int) -> None:
    """One process of three: four steps with a collective in each, in which something of this kind happens to one."""
    handle = os.open(folder / f"said{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 2)    # what torch says, too
    sys.stderr = open(handle, "w", buffering=1, closefd=False)
    watch.BEAT, watch.PATIENCE, sys.argv = BEAT, PATIENCE, ["train.py"]
    if kind == "killed elsewhere" and rank == world - 1:
        processes.machine = lambda: "another one of the same name"
    sys.excepthook = sys.__excepthook__
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    watch.start(limit)
    if kind == "asked":
        signals.StopRequest()
    try:
        with errors.exit_on_user_error("train.py"):
            for step in range(1, 5):
                watch.now(f"the data of step {step}")
                if step == 3 and rank == world - 1:
                    happen(kind, folder)
                watch.now(f"step {step}")
                dist.all_reduce(torch.ones(1))
                (folder / f"{rank} did {step}").touch()
    except Exception:
        sys.excepthook(*sys.exc_info())    # as at the end of a script, which multiprocessing forestalls
        sys.exit(1)


def happen(kind: str, folder) -> None:
    time.sleep(4 * BEAT)    # so that the others know where this one is
    if kind == "late":
        time.sleep(3)
    elif kind == "mistaken":
        raise errors.UserError("the fourth image is missing")
    elif kind == "faulty":
        raise ValueError("not a number")
    elif kind in ("held", "asked"):
        (folder / "here").touch()
        os.kill(os.getpid(), signal.SIGSTOP)
    elif kind.startswith("killed"):
        os.kill(os.getpid(), signal.SIGKILL)
    elif kind == "main killed":
        time.sleep(1)    # the others are in the collective by now


@pytest.fixture
def run(tmp_path):
    """`run(kind, limit)` -> the processes, and a function that ends the wait for them: (exit codes, what each said)."""
    going = []

    def run(kind: str, limit: float, world: int = 3):
        port, context = free_port(), multiprocessing.get_context("fork")
        going.extend(context.Process(target=work, args=(rank, kind, port, tmp_path, limit, world)) for rank in range(world))
        for process in going:
            process.start()

        def ends(of=going, seconds: float = 60):
            for process in of:
                process.join(seconds)
            return [process.exitcode for process in of], [(tmp_path / f"said{rank}").read_text() for rank in range(world)]

        return going, ends

    yield run
    for process in going:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGCONT)
        process.kill()
        process.join()


def test_all_is_well(run):
    _, ends = run("nothing", 60)
    assert ends() == ([0, 0, 0], ["", "", ""])


def test_one_is_killed(run):
    going, ends = run("killed", 60)
    codes, said = ends()
    assert codes == [1, 1, -signal.SIGKILL]
    assert said[0].strip() == (
        f"train.py: error: rank 2 (host {HOST}, process {going[2].pid}) is gone: it was killed, or has crashed; last heard of at "
        "the data of step 3. This run ends; --resume_from_checkpoint latest takes it up from its last checkpoint")
    assert said[1] == "", "one says it"


def test_one_is_killed_on_another_machine_of_the_same_name(run):
    """Process ids of another machine mean nothing here: one that lives there may be absent here."""
    going, ends = run("killed elsewhere", 60)
    codes, said = ends()
    assert codes == [1, 1, -signal.SIGKILL] and said[1] == ""
    assert f"rank 2 (host {HOST}, process {going[2].pid}) has not answered for 1.5 s: it is dead, or its machine" in said[0]


def test_the_main_process_is_killed_which_holds_the_store(run, tmp_path):
    going, ends = run("main killed", 60)
    until(lambda: (tmp_path / "0 did 2").exists())
    going[0].kill()
    codes, said = ends()
    assert codes == [-signal.SIGKILL, 1, 1]
    assert f"error: rank 0 (host {HOST}, process {going[0].pid}) is gone" in said[1]
    assert "Traceback" not in said[1] + said[2] and "train.py: error" not in said[2]


def test_one_does_not_answer(run, tmp_path):
    """It is stopped, so that no connection breaks. It ends, too, when it wakes: the others are gone."""
    going, ends = run("held", 2)
    until((tmp_path / "here").exists)
    begin = time.monotonic()
    codes, said = ends(going[:2])
    assert codes == [1, 1] and 2 <= time.monotonic() - begin < 30
    assert f"error: rank 2 (host {HOST}, process {going[2].pid}) has not answered for 2 s" in said[0]
    assert "last heard of at the data of step 3" in said[0] and said[1] == ""
    os.kill(going[2].pid, signal.SIGCONT)
    codes, said = ends()
    assert codes == [1, 1, 1] and "Traceback" not in said[2]


def test_asked_to_stop_while_one_does_not_answer(run, tmp_path):
    """A launcher asks the others when one is dead: the step in which they wait can never be finished."""
    going, ends = run("asked", 600)
    until((tmp_path / "here").exists)
    for process in going[:2]:
        os.kill(process.pid, signal.SIGTERM)
    codes, said = ends(going[:2])
    assert codes == [1, 1]
    assert f"rank 2 (host {HOST}, process {going[2].pid}) has not answered for 1.5 s" in said[0]


def test_one_is_late(run):
    going, ends = run("late", 1)
    codes, said = ends()
    assert codes == [0, 0, 0] and said[1:] == ["", ""]
    note = (f"train.py: note: rank 2 (host {HOST}, process {going[2].pid}) has kept the others waiting for 1 s: it is at "
            "the data of step 3")
    assert 1 <= said[0].count(note) <= 3 and not said[0].replace(note, "").strip()


def test_one_finds_a_mistake_that_the_others_cannot_see(run):
    going, ends = run("mistaken", 60)
    codes, said = ends()
    assert codes == [1, 1, 2]
    assert said[2] == "train.py: error: the fourth image is missing\n"
    assert f"rank 2 (host {HOST}, process {going[2].pid}) has ended: the fourth image is missing" in said[0] and said[1] == ""


def test_one_fails(run):
    going, ends = run("faulty", 60)
    codes, said = ends()
    assert codes == [1, 1, 1] and "Traceback" in said[2] and "ValueError: not a number" in said[2]
    assert f"rank 2 (host {HOST}, process {going[2].pid}) has ended: ValueError: not a number" in said[0]
    assert "Traceback" not in said[0] + said[1]


def test_a_process_that_nobody_joins(tmp_path, monkeypatch):
    """The launcher has started two, and the other one never comes."""
    def wait():
        sys.stderr = open(tmp_path / "said", "w")
        os.environ.update(WORLD_SIZE="2", MASTER_ADDR="10.0.0.1", MASTER_PORT="7000")
        watch.ARRIVAL = 0.5
        with watch.arriving(0.1):
            time.sleep(60)

    process = multiprocessing.get_context("fork").Process(target=wait)
    process.start()
    process.join(30)
    assert process.exitcode == 1
    said = (tmp_path / "said").read_text()
    assert "error: not all of the 2 processes that were launched have come within 0.5 s" in said and "10.0.0.1:7000" in said


def test_machines_that_do_not_reach_each_other(monkeypatch):
    """As where a firewall is between them; what has nothing to do with that is no mistake of the user."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(errors.UserError, match="does not reach the others of this run .*Connection refused.* All ports"):
        with watch.arriving(60):
            raise RuntimeError("Gloo connectFullMesh failed with SO_ERROR: Connection refused, remote=[10.0.0.1]:32668\nx")
    with pytest.raises(RuntimeError, match="out of memory"), watch.arriving(60):
        raise RuntimeError("out of memory")


def test_a_store_of_an_older_torch_gets_a_connection_of_its_own():
    """2.7's stores have no `clone`."""
    class Older:
        _underlying_non_prefix_store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    stores = [watch._connected(store) for store in (Older(), dist.PrefixStore("a", Older._underlying_non_prefix_store))]
    stores[0].set("here", "1")
    stores[1].set("here", "2")
    Older._underlying_non_prefix_store.set("there", "3")
    assert [stores[0].get("here"), stores[1].get("here"), stores[0].get("there")] == [b"1", b"2", b"3"]
    assert Older._underlying_non_prefix_store not in stores
