"""Two machines on one: network namespaces with a pair of virtual network devices between them. Needs root and iproute2."""

import contextlib
import os
import pathlib
import shutil
import signal
import subprocess
import time
import uuid

ADDRESSES = ("10.77.0.1", "10.77.0.2")


def lacking() -> str:
    """Why this computer cannot have them, or ""."""
    if os.name != "posix" or not shutil.which("ip"):
        return "`ip` of iproute2 is not installed"
    name = f"probe{uuid.uuid4().hex[:6]}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if made.returncode:
        return f"network namespaces cannot be made: {made.stderr.strip()}"
    named = shutil.which("unshare") and subprocess.run(["unshare", "--uts", "hostname", name], capture_output=True)
    subprocess.run(["ip", "netns", "del", name], check=True)
    return "" if named and not named.returncode else "a name of its own cannot be given to a process (`unshare --uts`)"


@contextlib.contextmanager
def machines():
    """Names of two namespaces that reach each other at ADDRESSES, and of the network device of each."""
    tag = uuid.uuid4().hex[:6]
    names, links = [f"node{index}{tag}" for index in range(2)], [f"v{index}{tag}" for index in range(2)]
    try:
        for name in names:
            _ip("netns", "add", name)
        _ip("link", "add", links[0], "type", "veth", "peer", "name", links[1])
        for name, link, address in zip(names, links, ADDRESSES, strict=True):
            _ip("link", "set", link, "netns", name)
            _ip("-n", name, "addr", "add", f"{address}/24", "dev", link)
            _ip("-n", name, "link", "set", link, "up")
            _ip("-n", name, "link", "set", "lo", "up")
        yield list(zip(names, links, strict=True))
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def on(machine: tuple[str, str], command: list[str]) -> list[str]:
    """A command line that runs `command` on one of the machines, which has a host name of its own."""
    named = 'hostname "$0" && exec "$@"'
    return ["ip", "netns", "exec", machine[0], "unshare", "--uts", "sh", "-c", named, machine[0], *command]


def environment(machine: tuple[str, str]) -> dict[str, str]:
    """The network device that leads to the others, by the names under which users give it to gloo; it is found without, too."""
    return {"GLOO_SOCKET_IFNAME": machine[1], "TP_SOCKET_IFNAME": machine[1]}


def cut(machine: tuple[str, str]) -> None:
    """Pull the cable."""
    _ip("-n", machine[0], "link", "set", machine[1], "down")


def plug(machine: tuple[str, str]) -> None:
    """Put it in again."""
    _ip("-n", machine[0], "link", "set", machine[1], "up")


def processes(machine: tuple[str, str]) -> dict[int, list[str]]:
    """The processes on a machine: {process id: its command line}."""
    found = {}
    for pid in subprocess.run(["ip", "netns", "pids", machine[0]], check=True, capture_output=True, text=True).stdout.split():
        with contextlib.suppress(OSError):
            found[int(pid)] = pathlib.Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
    return found


def fail(machine: tuple[str, str]) -> None:
    """All of its processes at once, as when the power fails."""
    while left := processes(machine):
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)
