"""Images per second of several processes with one thread and core each, joined in one run, against one process.

    bash train.sh                                      # the demo's model and images
    python benchmarks/scaling.py --pretrained_model_name_or_path out/demo/model --train_data_dir out/demo/images \\
        --resolution 128,64 --enable_bucket --min_bucket_reso 64 --max_bucket_reso 128 --bucket_reso_steps 64 \\
        --train_batch_size 16
    python benchmarks/make_data.py out/bench           # a UNet of 126 M parameters
    python benchmarks/scaling.py --steps 12 --log 3 --pretrained_model_name_or_path out/bench/small \\
        --train_data_dir out/bench/photos --resolution 256 --center_crop --train_batch_size 4

What is no flag of this script goes to the training script. Cases take turns, --rounds times: `one` process on the first core;
`apart`, as many runs of one process at once as there are cores; `joined`, as many processes in one run. Each has the same batch
a process. The figures are images over seconds of the optimizer steps behind the first --log ones, and ratios are those of
one round.
What joined lacks to apart is communication, with waiting for each other: what cores share, memory above all, slows both.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from measured import HERE, environment


def start(script: Path, flags: list[str], output: Path, core: int, place: dict[str, str]) -> subprocess.Popen:
    """One process of a run, on one core."""
    command = [sys.executable, str(script), *flags, "--output_dir", str(output)]
    said = (output.parent / f"{output.name}_{core}.log").open("w")
    return subprocess.Popen(command, env=environment() | {"ACCELERATE_USE_CPU": "true"} | place, stdout=said, stderr=said,
                            preexec_fn=lambda: os.sched_setaffinity(0, {core}))


def finish(running: list[subprocess.Popen], folder: Path) -> None:
    if any([process.wait() for process in running]):
        sys.exit("\n".join(path.read_text()[-3000:] for path in sorted(folder.glob("*.log"))))


def rate(output: Path) -> float:
    """Images over seconds, of all processes of a run."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return statistics.harmonic_mean(line["images_per_s"] for line in lines[1:])


def measure(args, flags: list[str], folder: Path, cores: list[int]) -> dict[str, float]:
    """Images per second of each case."""
    def run(*outputs: tuple[Path, int, dict[str, str]]) -> float:
        finish([start(args.script, flags, *each) for each in outputs], folder)
        return sum(rate(output) for output in dict.fromkeys(output for output, _, _ in outputs))

    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(args.port), "WORLD_SIZE": str(len(cores))}
    return {"one": run((folder / "one", cores[0], {})),
            "apart": run(*((folder / f"apart{core}", core, {}) for core in cores)),
            "joined": run(*((folder / "joined", core, place | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
                            for rank, core in enumerate(cores)))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--script", type=Path, default=HERE.parent / "train_sdxl.py", help="the training script")
    parser.add_argument("--processes", type=int, default=2, help="of the joined run, each on a core")
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps of each run")
    parser.add_argument("--log", type=int, default=5, help="optimizer steps of a line of the log; the first is not counted")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--port", type=int, default=29511, help="where processes meet")
    args, flags = parser.parse_known_args()
    cores = sorted(os.sched_getaffinity(0))[:args.processes]
    if len(cores) < args.processes:
        sys.exit(f"--processes {args.processes}: this machine has {len(cores)} cores")
    rounds = []
    with tempfile.TemporaryDirectory() as folder:
        flags = [*flags, "--max_train_steps", str(args.steps), "--logging_steps", str(args.log), "--report_to", "none",
                 "--seed", "0", "--embedding_cache_dir", f"{folder}/cache", "--checkpointing_steps", "9999"]
        finish([start(args.script, [*flags, "--max_train_steps", "1"], Path(folder) / "first", cores[0], {})], Path(folder))
        for number in range(args.rounds):
            place = Path(folder) / str(number)
            place.mkdir()
            found = measure(args, flags, place, cores)
            rounds.append(found)
            print(", ".join(f"{name} {value:.3f} images/s" for name, value in found.items()),
                  f"| joined over one {found['joined'] / found['one']:.2f}, apart over one {found['apart'] / found['one']:.2f}, "
                  f"communication {1 - found['joined'] / found['apart']:.1%}", flush=True)
    for name, over in (("joined", "one"), ("apart", "one"), ("joined", "apart")):
        ratios = [found[name] / found[over] for found in rounds]
        print(f"{name} over {over}: best {max(ratios):.3f}, median {statistics.median(ratios):.3f} of {args.rounds}")


if __name__ == "__main__":
    main()
