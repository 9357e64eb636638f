"""CPU-seconds from `accelerate launch` to the end of the first optimizer step, ours against diffusers' script.

    python benchmarks/make_data.py out/bench
    python benchmarks/first_step.py out/bench --peer diffusers/examples/text_to_image/train_text_to_image_sdxl.py
    python benchmarks/first_step.py out/bench --script train_lora_sd3.py \\
        --peer diffusers/examples/dreambooth/train_dreambooth_lora_sd3.py                                      # [--captions]

240 photographs, the tiny SDXL, resolution 256, batch 4, float32, AdamW, no validation. Cold: nothing is cached. Warm:
the embeddings are there, from a run before. User and system time of launcher and script, on one core with one thread;
the cases take turns (ours cold, ours warm, peer cold, peer warm, and again), and the best and the median are shown.
SD 3's peer keeps its latents in memory alone (--cache_latents) and starts cold every time; without --captions, all images
have one prompt.
"""

import argparse
import statistics
import tempfile
from pathlib import Path

from measured import HERE, OURS, PROMPT, Used, dreambooth_flags, environment, flags, launch, pin, run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="the folder of make_data.py")
    parser.add_argument("--model", default="tiny", choices=("tiny", "small"))
    parser.add_argument("--script", default=OURS.name, choices=(OURS.name, "train_lora_sd3.py"))
    parser.add_argument("--captions", action="store_true", help="of SD 3: a caption an image instead of one prompt")
    parser.add_argument("--peer", type=Path, help="diffusers' train_text_to_image_sdxl.py or train_dreambooth_lora_sd3.py")
    parser.add_argument("--peer_python_path", help="PYTHONPATH of the peer alone (torchvision)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--core", type=int, help="keep everything on this core")
    args = parser.parse_args()
    pin(args.core)

    sd3 = args.script != OURS.name
    scripts = {"ours": (OURS.with_name(args.script), None)} | ({"peer": (args.peer, args.peer_python_path)} if args.peer else {})
    used: dict[str, list[Used]] = {}
    for number in range(args.rounds + 1):
        for name, (script, python_path) in scripts.items():
            with tempfile.TemporaryDirectory() as folder:
                chosen = flags(args.data, args.model, Path(folder) / "out")
                if sd3:
                    more = ["--cache_latents"] + (["--instance_prompt", PROMPT] if args.captions and name == "peer" else [])
                    chosen = dreambooth_flags(args.data, args.model, Path(folder) / "out", *more, captions=args.captions)
                command = launch(script, chosen, HERE / "until_first_step.py")
                for case in ("cold",) if sd3 and name == "peer" else ("cold", "warm"):
                    result = run(command, environment(python_path=python_path, cache=Path(folder) / "datasets"))
                    if number:    # the first round only fills the system's own caches
                        used.setdefault(f"{name} {case}", []).append(result)
                        print(f"{name} {case}: {result.cpu:.2f} CPU-s, {result.wall:.1f} s", flush=True)

    best = {case: min(result.cpu for result in results) for case, results in used.items()}
    median = {case: statistics.median(result.cpu for result in results) for case, results in used.items()}
    for case, results in used.items():
        line = f"{case:10}  best {best[case]:6.2f}  median {median[case]:6.2f} CPU-s  wall {min(r.wall for r in results):6.1f} s"
        if args.peer:
            line += f"  of the peer's cold: {best[case] / best['peer cold']:.2f} best, " \
                    f"{median[case] / median['peer cold']:.2f} median"
        print(line)


if __name__ == "__main__":
    main()
