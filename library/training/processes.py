"""This process among the others of the run: rank, share of the work, exchange. One process without a launcher."""

import contextlib
import os
import socket
import uuid
from pathlib import Path

import psutil
import torch.distributed as dist

from library.errors import UserError
from library.parser import launched


class Apart(UserError):
    """Some processes have met a fault, and others have not."""


def rank() -> int:
    return dist.get_rank() if _running() else 0


def world() -> int:
    return dist.get_world_size() if _running() else 1


def is_main() -> bool:
    return rank() == 0


def host() -> str:
    """The name of this machine."""
    return socket.gethostname()


def machine() -> str:
    """What no other machine has in common with this one: several may have one name."""
    with contextlib.suppress(OSError):
        return f"{host()} {Path('/proc/sys/kernel/random/boot_id').read_text().strip()}"
    return host()


def face_others() -> None:
    """Have gloo use the network device by which the first process is reached, where there are other machines and none is set.

    By itself it takes the address that this machine's own name has: none, or one that no other machine can reach (Debian's
    127.0.1.1), and no two machines find each other.
    """
    first, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    if not first or "GLOO_SOCKET_IFNAME" in os.environ or launched() == int(os.environ.get("LOCAL_WORLD_SIZE", launched())):
        return
    try:
        family, kind, _, _, place = socket.getaddrinfo(first, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(place)    # sends nothing
            own = probe.getsockname()[0]
    except OSError:    # whoever waits for that machine will say so
        return
    for name, addresses in psutil.net_if_addrs().items():
        if any(each.address.partition("%")[0] == own.partition("%")[0] for each in addresses):
            os.environ["GLOO_SOCKET_IFNAME"] = name


def gather(values: list, faulty: bool = False) -> list:
    """The lists of all processes joined in the order of ranks; on every process. A point where all meet.

    faulty: this process has met a fault in what it read. Raises `Apart` where some have and others have not.
    """
    if not _running():
        return values
    parts = [None] * world()
    dist.all_gather_object(parts, (faulty, values))
    if any(apart != faulty for apart, _ in parts):
        who = next(number for number, (apart, _) in enumerate(parts) if apart != parts[0][0])
        raise Apart(f"rank 0 and rank {who} do not see the same: one of them has met a fault, which it names, the other has not")
    return [value for _, part in parts for value in part]


def meet() -> None:
    """Wait until every process is here."""
    gather([])


def alike(value) -> tuple[list[int], str]:
    """Ranks that have this value, too, and the host of the first of them. A point where all meet."""
    everyone = gather([(value, host())])
    ranks = [number for number, (other, _) in enumerate(everyone) if other == value]
    return ranks, everyone[ranks[0]][1]


def team(folder: Path) -> list[int]:
    """Ranks, in their order, that see what this one writes to `folder`: all on shared storage, else those of one machine.

    A point where all meet. The folder is made. Of one that cannot be written to, the processes of a machine see the same.
    """
    if world() == 1:
        return [0]
    probe, written = Path(folder) / f".tmp{uuid.uuid4().hex}", None
    place = (machine(), rank())
    try:
        probe.parent.mkdir(parents=True, exist_ok=True)
        status = probe.parent.stat()
        place = (machine(), status.st_dev, status.st_ino)
        probe.touch()
        written = probe.name
    except OSError:
        pass    # whoever has something to write there will say so
    try:
        everyone = gather([(written, place)])
        sees = gather([[(name is not None and (probe.parent / name).exists()) or where == place for name, where in everyone]])
    finally:
        if written:
            probe.unlink(missing_ok=True)
    found = {rank()}
    while more := {other for one in found for other in range(world()) if sees[one][other] or sees[other][one]} - found:
        found |= more
    return sorted(found)


def share(jobs: list, ranks: list[int]) -> list:
    """This process's part of work that these ranks divide among themselves."""
    return jobs[ranks.index(rank())::len(ranks)]


def _running() -> bool:
    return dist.is_available() and dist.is_initialized()
