"""Every process of a run says once a second that it lives and what it is at; a dead, silent or late one is named with its host.

What they say goes through a connection of its own to the store of the process group. No two clocks are compared: each process
counts by its own how long it has heard nothing new. One thread talks to the store, and may block in it when a cable is cut;
another one judges, so that this is noticed, too.
"""

import contextlib
import json
import multiprocessing.util
import os
import re
import signal
import sys
import threading
import time
import uuid
from importlib import import_module

import torch.distributed as dist

from library import errors
from library.training import processes

BEAT = 1.0        # seconds between two signs of life
PATIENCE = 10.0   # seconds without one that make a process dead where a lost connection or a request to stop says so, too
ARRIVAL = 600.0   # seconds in which all processes have to come together, at least
_LOST = re.compile(r"closed by peer|reset by peer|broken pipe|gloo|nccl|hccl|socket|connection|timed out", re.IGNORECASE)
_watch: "_Watch | None" = None


@contextlib.contextmanager
def arriving(limit: float):
    """Within this context the processes of a run come together; one that still waits after `limit` seconds ends.

    Raises `UserError` where they cannot connect to each other.
    """
    if processes.launched() == 1:
        yield
        return
    limit = max(limit, ARRIVAL)
    timer = threading.Timer(limit, lambda: _leave(
        f"not all of the {processes.launched()} processes that were launched have come within {limit:g} s: look at what those of "
        "the other machines say, and whether they reach "
        f"{os.environ.get('MASTER_ADDR', '')}:{os.environ.get('MASTER_PORT', '')}"))
    timer.daemon = True
    timer.start()
    try:
        yield
    except RuntimeError as error:
        if not _LOST.search(str(error)):
            raise
        raise errors.UserError(
            f"host {processes.host()} does not reach the others of this run ({str(error).partition(chr(10))[0][:300]}). All "
            "ports between machines have to be open; GLOO_SOCKET_IFNAME (NCCL_SOCKET_IFNAME, HCCL_SOCKET_IFNAME) names the "
            "network device that leads there") from None
    finally:
        timer.cancel()


def start(limit: float) -> None:
    """Begin to watch the other processes, if there are any. limit: seconds without a sign of life that end the run."""
    global _watch
    if processes.world() == 1:
        return
    store = import_module("torch.distributed.distributed_c10d")._get_default_store()    # torch has no public name for it
    if _watch and _watch.of is store:    # another run of the same processes
        _watch.limit = limit
        return
    space = os.readlink("/proc/self/ns/pid") if os.path.exists("/proc/self/ns/pid") else ""
    everyone = processes.gather([{"host": processes.host(), "machine": processes.machine(), "pid": os.getpid(), "space": space,
                                  "token": uuid.uuid4().hex}])
    _watch = _Watch(store, everyone, limit)
    processes.meet()    # all have said something: reading waits for nobody
    _watch.run()


def now(phase: str) -> None:
    """What this process does from now on. All processes go through the same phases: who is behind keeps others waiting."""
    if _watch:
        _watch.phase, _watch.detail, _watch.place = phase, "", _watch.place + 1


def progress(detail: str) -> None:
    """How far it is within its phase."""
    if _watch:
        _watch.detail = f", {detail}"


def _connected(store):
    """A connection of its own to a store, which a thread may use."""
    if hasattr(store, "clone"):    # from torch 2.8 on
        return store.clone()
    of = store._underlying_non_prefix_store
    return dist.TCPStore(of.host, of.port, is_master=False, wait_for_workers=False)


class _Watch:
    def __init__(self, store, everyone: list[dict], limit: float):
        self.of, self.store, self.everyone, self.limit = store, _connected(store), everyone, limit
        self.rank, self.pid, self.others = processes.rank(), os.getpid(), set(range(len(everyone))) - {processes.rank()}
        self.phase, self.detail, self.place = "the start", "", 0
        self.farewell = self.verdict = None
        self.lost = self.hurried = self.stopped = False
        self.watched = set(self.others) if self.rank == 0 else {0}
        self.time, self.contact = 0.0, 0.0    # as the judge counts it: a process that was held up has not heard less
        self.heard = dict.fromkeys(self.others, 0.0)
        self.news: dict[int, dict] = {other: {"beat": -1, "place": 0, "phase": "the start"} for other in self.others}
        self._gone: dict[int, float] = {}
        self._behind: dict[int, tuple[int, float]] = {}
        self._beat, self._told, self._wake, self._ending = 0, threading.Event(), threading.Event(), threading.Lock()
        self._say()

    def run(self) -> None:
        self._previous, sys.excepthook = sys.excepthook, self._explain
        multiprocessing.util.Finalize(None, self._go, exitpriority=100)    # at exit, of what multiprocessing started, too
        if threading.current_thread() is threading.main_thread():
            # a signal that comes while this thread waits for the others reaches no handler of Python
            self._signals, inlet = os.pipe()
            for end in (self._signals, inlet):
                os.set_blocking(end, False)
            signal.set_wakeup_fd(inlet, warn_on_full_buffer=False)
            os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))
        else:
            self._signals = None
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._talk, self._judge)]
        for thread in self._threads:
            thread.start()

    def _key(self, rank: int) -> str:
        return f"watch/{self.everyone[0]['token']}/{rank}"

    def _say(self) -> None:
        self._beat += 1
        said = {"beat": self._beat, "place": self.place, "phase": f"{self.phase}{self.detail}", "lost": self.lost,
                "farewell": self.farewell, "verdict": self.verdict}
        self.store.set(self._key(self.rank), json.dumps(said))
        if said["farewell"] or said["verdict"]:
            self._told.set()

    def _talk(self) -> None:
        while not self.stopped:
            self._wake.wait(BEAT)
            self._wake.clear()
            try:
                self._say()
                ranks = sorted(self.watched)
                for rank, text in zip(ranks, self.store.multi_get([self._key(rank) for rank in ranks]), strict=True):
                    news = json.loads(text)
                    if news["beat"] != self.news[rank]["beat"]:
                        self.news[rank], self.heard[rank] = news, self.time
                self.contact = self.time
            except RuntimeError:    # the store is gone, with the machine that held it: time will tell
                return

    def _judge(self) -> None:
        tick, last = BEAT / 4, time.monotonic()
        while not self.stopped:
            time.sleep(tick)
            moment = time.monotonic()
            self.time, last = self.time + min(moment - last, 2 * tick), moment
            if self._signals is not None:
                with contextlib.suppress(BlockingIOError):
                    if {signal.SIGTERM, signal.SIGINT} & set(os.read(self._signals, 64)):
                        self.hurried = True
                        self._watch_all()
            if self.rank and self.news[0].get("verdict"):    # told by the main process
                os._exit(1)
            if not self.farewell and not self.lost and (silent := self._silent()):
                self._end(silent)
            if self.rank == 0 and not (self.farewell or self.verdict):
                self._name_late()

    def _watch_all(self) -> None:
        for rank in self.others - self.watched:
            self.heard[rank] = self.time
        self.watched = set(self.others)

    def _silent(self) -> dict[int, str]:
        """Those that are dead as far as this process can tell -> what there is to say of each."""
        hasty = self.hurried or self.lost or any(self.news[rank].get("lost") for rank in self.watched)
        limit, found = min(self.limit, PATIENCE) if hasty else self.limit, {}
        cut_off = self.time - self.contact > min(limit, PATIENCE) / 2    # then nobody is heard: it is the store's machine
        for rank in sorted(self.watched):
            if farewell := self.news[rank].get("farewell"):
                if farewell != "done" and self.time - self._gone.setdefault(rank, self.time) > 3 * BEAT:    # or all end for it
                    found[rank] = f"has ended: {farewell}"
            elif self._is_gone(rank):
                found[rank] = "is gone: it was killed, or has crashed"
            elif self.time - self.heard[rank] > limit and (rank == 0 or self.rank == 0 or not cut_off):
                found[rank] = f"has not answered for {limit:g} s: it is dead, or its machine cannot be reached"
        return found

    def _is_gone(self, rank: int) -> bool:
        """Whether a process of this machine has been gone for some beats; what it said last has then been heard."""
        one, own = self.everyone[rank], self.everyone[self.rank]
        if (one["machine"], one["space"]) != (own["machine"], own["space"]) or not one["space"]:
            return False
        try:
            with open(f"/proc/{one['pid']}/stat") as file:
                dead = file.read().rpartition(")")[2].split()[0] in "ZX"
        except OSError:
            dead = True
        if not dead:
            return False
        return self.time - self._gone.setdefault(rank, self.time) > 3 * BEAT

    def _name(self, rank: int) -> str:
        return f"rank {rank} (host {self.everyone[rank]['host']}, process {self.everyone[rank]['pid']})"

    def _end(self, silent: dict[int, str]) -> None:
        """Name the silent ones, and end this process."""
        with self._ending:
            first, why = next(iter(silent.items()))
            last = f"; last heard of at {self.news[first]['phase']}" if first in self.watched else ""
            others = list(silent)[1:]
            more = f". Silent, too: {', '.join(map(self._name, others[:3]))}" if others else ""
            more += f" and {len(others) - 3} more" if len(others) > 3 else ""
            sentence = (f"{self._name(first)} {why}{last}{more}. This run ends; --resume_from_checkpoint latest takes it up from "
                        "its last checkpoint")
            if self.rank == 0:
                self.verdict = sentence
                self._told.clear()
                self._wake.set()
                _print(sentence)
                self._told.wait(2 * BEAT)
                time.sleep(2.5 * BEAT)    # until it has been read
            elif 0 not in silent:
                return    # the main process will tell
            elif "has ended" not in silent[0] and self._speaks(silent):
                _print(sentence)
            os._exit(1)

    def _speaks(self, silent: dict[int, str]) -> bool:
        """Whether this is the first living process of its machine."""
        here = [rank for rank, one in enumerate(self.everyone) if one["machine"] == self.everyone[self.rank]["machine"]]
        return self.rank == min(rank for rank in here if rank == self.rank or not (rank in silent or rank in self._gone))

    def _name_late(self) -> None:
        places = {rank: news["place"] for rank, news in self.news.items() if not news.get("farewell")} | {0: self.place}
        for rank, place in places.items():
            if place == max(places.values()):
                self._behind.pop(rank, None)
                continue
            was, since = self._behind.get(rank, (place, self.time))
            if was != place:
                since = self.time
            elif self.time - since >= self.limit:
                phase = self.news[rank]["phase"] if rank else f"{self.phase}{self.detail}"
                _print(f"{self._name(rank)} has kept the others waiting for {self.limit:g} s: it is at {phase}", "note")
                since = self.time
            self._behind[rank] = (place, since)

    def _explain(self, kind, error, trace) -> None:
        """sys.excepthook: a connection that broke is told as the process that broke it."""
        if os.getpid() == self.pid and isinstance(error, RuntimeError) and _LOST.search(str(error)):
            self.lost = True
            self._watch_all()
            self._wake.set()
            end = time.monotonic() + min(self.limit, PATIENCE) + 5 * BEAT
            while time.monotonic() < end:
                if silent := self._silent():
                    self._end(silent)
                time.sleep(BEAT / 4)
            if silent:
                os._exit(1)
        if os.getpid() == self.pid:
            self.farewell = f"{kind.__name__}: {str(error).partition(chr(10))[0][:300]}"
        self._previous(kind, error, trace)

    def _go(self) -> None:
        """At exit: tell the others; the main process, whose end may take the store with it, waits for their words."""
        if os.getpid() != self.pid:
            return
        self._told.clear()
        self.farewell = self.farewell or errors.ended_on or "done"
        self._wake.set()
        self._told.wait(3 * BEAT)
        end = time.monotonic() + PATIENCE
        while self.rank == 0 and time.monotonic() < end and not all(
                self.news[rank].get("farewell") or rank in self._gone or self._is_gone(rank) for rank in self.others):
            time.sleep(BEAT / 20)
            self._wake.set()
        self.stopped = True
        self._wake.set()
        for thread in self._threads:    # one that is in the store's C++ when Python ends would abort the process
            thread.join(2 * BEAT)


def _print(sentence: str, kind: str = "error") -> None:
    program = os.path.basename(sys.argv[0])
    sys.stderr.write(f"\n{program}: {kind}: {sentence}\n")
    sys.stderr.flush()


def _leave(sentence: str) -> None:
    _print(sentence)
    os._exit(1)
