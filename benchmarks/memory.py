"""Peak memory of a whole small run, from `accelerate launch` to the finished model, beside the peer's.

    python benchmarks/make_data.py out/bench
    python benchmarks/memory.py out/bench --peer diffusers/examples/text_to_image/train_text_to_image_sdxl.py

The tiny SDXL on 240 photographs, caches and 20 steps included. The sum over launcher and script, sampled ten times a
second: of resident memory (RSS; pages that both share count twice), and where Linux tells, of each one's share (PSS).
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from measured import OURS, environment, flags, launch, pin


def peak(command: list[str], surroundings: dict[str, str]) -> dict[str, float]:
    """Highest sums in MB: {"rss": ..., "pss": ...}, and "largest", the highest RSS of one process."""
    most = {"rss": 0.0, "pss": 0.0, "largest": 0.0}
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, env=surroundings, stdout=said, stderr=said)
        root = psutil.Process(process.pid)
        while process.poll() is None:
            each = []
            try:
                for member in [root, *root.children(recursive=True)]:
                    each.append((member.memory_info().rss, _pss(member.pid)))
            except psutil.Error:
                continue    # one has just ended
            if each:
                most["largest"] = max(most["largest"], max(rss for rss, _ in each) / 2**20)
                most["rss"] = max(most["rss"], sum(rss for rss, _ in each) / 2**20)
                most["pss"] = max(most["pss"], sum(pss for _, pss in each) / 2**20)
            time.sleep(0.1)
        if process.returncode:
            said.seek(0)
            sys.exit(said.read()[-4000:])
    return most


def _pss(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="the folder of make_data.py")
    parser.add_argument("--model", default="tiny", choices=("tiny", "small"))
    parser.add_argument("--peer", type=Path, help="diffusers' train_text_to_image_sdxl.py")
    parser.add_argument("--peer_python_path", help="PYTHONPATH of the peer alone (torchvision)")
    parser.add_argument("--core", type=int, help="keep everything on this core")
    args = parser.parse_args()
    pin(args.core)
    scripts = {"ours": (OURS, None)} | ({"peer": (args.peer, args.peer_python_path)} if args.peer else {})
    for name, (script, python_path) in scripts.items():
        with tempfile.TemporaryDirectory() as folder:
            surroundings = environment(python_path=python_path, cache=Path(folder) / "datasets")
            for case in ("cold", "warm"):
                most = peak(launch(script, flags(args.data, args.model, Path(folder) / "out")), surroundings)
                print(f"{name} {case}: RSS {most['rss']:.0f} MB, PSS {most['pss']:.0f} MB, "
                      f"the script alone {most['largest']:.0f} MB", flush=True)


if __name__ == "__main__":
    main()
