"""What a launch script says at its end: speed, loss and duration of a run, as three lines, a table and JSON.

    python test/result.py RUN_FOLDER --network train_sdxl --seconds 1234.5

Standard library only. Raises nothing that a user would see as a traceback: a folder without a finished run ends with status 2.
"""

import argparse
import json
import platform
import sys
from itertools import takewhile
from pathlib import Path

WARM_UP = 0.1       # share of the steps that is not counted for speed: compilation, caches, the first allocation
LAST = 100          # steps whose mean is the final loss


def stretches(lines: list[dict]) -> list[tuple[int, dict]]:
    """metrics.jsonl -> (optimizer steps, values) of each line."""
    return [(line["step"] - before, line) for before, line in zip([0, *(line["step"] for line in lines)], lines, strict=False)]


def speed(lines: list[dict], global_batch: int, old: int = 0) -> tuple[float, float, int, int]:
    """(images/s, share of the time spent waiting for data, steps left out as warm-up, steps counted), by the wall clock.

    old: how many lines are of launches before. Waiting for data is in it; validation and saving are not: the meter stands still
    meanwhile.
    """
    begin, parts = lines[old - 1]["step"] if old else 0, stretches(lines)[old:]
    warm_up = min(LAST, WARM_UP * (lines[-1]["step"] - begin))
    warm = [(count, line) for count, line in parts if line["step"] - count - begin >= warm_up] or parts[-1:]
    seconds = [count * global_batch / line["images_per_s"] for count, line in warm]
    waited = sum(each * line["wait"] for each, (_, line) in zip(seconds, warm, strict=True))
    counted = sum(count for count, _ in warm)
    return counted * global_batch / sum(seconds), waited / sum(seconds), lines[-1]["step"] - begin - counted, counted


def final_loss(lines: list[dict]) -> float:
    """Mean loss of about the last 100 steps that have one: --spike_guard leaves some without. Raises `ValueError` for none."""
    told = [(count, line) for count, line in stretches(lines) if line["loss"] is not None]
    if not told:
        raise ValueError("none of its steps has a loss")
    last = [(count, line) for count, line in told if line["step"] > told[-1][1]["step"] - LAST]
    return sum(count * line["loss"] for count, line in last) / sum(count for count, _ in last)


def result(folder: Path, network: str, seconds: float, before: list[str] = ()) -> dict:
    """The table, in the words of Ascend's scripts; TrainingTime is that of one step in seconds.

    before: what metrics.jsonl held before this launch. The steps that it did are counted for speed; if the run was at its end
    and it did none, those before. Raises `ValueError` for a run without steps or losses.
    """
    log, before = (folder / "metrics.jsonl").read_text().splitlines(), set(before)
    lines = [json.loads(line) for line in log]
    if not lines:
        raise ValueError("its metrics.jsonl is empty")
    old = len(list(takewhile(before.__contains__, log))) % len(lines)
    manifests = [json.loads(path.read_text()) for path in folder.glob("checkpoint-*/manifest.json")]
    manifest = max(manifests, key=lambda each: each["written"])    # others may be of another run in this folder
    flags, batch = manifest["flags"], manifest["global_batch"]
    ranks = batch // (flags["train_batch_size"] * flags["gradient_accumulation_steps"])
    images, wait, warm_up, counted = speed(lines, batch, old)
    return {"Network": network, "RankSize": ranks, "BatchSize": flags["train_batch_size"], "DeviceType": platform.machine(),
            "CaseName": f"{network}_bs{flags['train_batch_size']}_{ranks}p_acc", "ActualFPS": round(images, 4),
            "WaitShare": round(wait, 4), "TrainingTime": round(batch / images, 6), "ActualLoss": round(final_loss(lines), 6),
            "E2ETrainingTime": round(seconds, 2), "Steps": lines[-1]["step"], "WarmUpSteps": warm_up, "CountedSteps": counted}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="the run's --output_dir")
    parser.add_argument("--network", required=True, help="name of the case")
    parser.add_argument("--seconds", type=float, required=True, help="how long the launch took")
    parser.add_argument("--before", type=Path, metavar="FILE", help="metrics.jsonl as it was before the launch")
    args = parser.parse_args()
    try:
        before = args.before.read_text().splitlines() if args.before else []
        found = result(args.folder, args.network, args.seconds, before)
    except (OSError, ValueError, KeyError) as error:
        print(f"result.py: error: {args.folder} holds no finished run: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"Final Performance images/sec : {found['ActualFPS']}")
    print(f"Final Train Loss : {found['ActualLoss']}")
    print(f"E2E Training Duration sec : {found['E2ETrainingTime']}")
    path = args.folder / f"{found['CaseName']}.log"
    path.write_text("".join(f"{name} = {value}\n" for name, value in found.items()))
    path.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    print(f"wrote {path} and {path.with_suffix('.json').name}")


if __name__ == "__main__":
    main()
