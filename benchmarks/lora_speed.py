"""CPU-seconds of a training step, our scripts for adapters against diffusers', and images/s from them.

    python benchmarks/make_data.py out/bench
    python benchmarks/lora_speed.py out/bench --peer diffusers/examples/text_to_image/train_text_to_image_lora_sdxl.py
    python benchmarks/lora_speed.py out/bench --script train_lora_sd3.py --peer_flags=--cache_latents \\
        --peer diffusers/examples/dreambooth/train_dreambooth_lora_sd3.py                                      # [--captions]

Both scripts run as they are, with the same model, photographs and flags: resolution 256, LoRA of rank 16 on the attention
layers, AdamW, one thread on one core. Both are halted at the end of every optimizer step and take turns step by step,
so that they see the same machine. A step is all from the end of one optimizer step to the end of the next: data, encoders,
UNet, log. Ratios are of pairs of steps. Time spent before the first step, where ours encodes all data, is shown, not counted.
The ratio depends on what the VAE costs beside the UNet. In --model half, UNet and VAE are SDXL's at half their widths.
SD 3's peer encodes one prompt for all images before the first step; with --captions, a caption an image in every step.
"""

import argparse
import json
import os
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from measured import OURS, PROMPT, Watch, dreambooth_flags, environment, flags, pin

# as in make_data.py; the UNet has 642 M parameters
HALF = {"widths": (160, 320, 640), "layers": [1, 2, 10], "heads": [2, 5, 10], "text": (384, 640), "vae": (64, 128, 256, 256),
        "time": 128}


def run_in_turns(script: str, go: int, done: int) -> None:
    """Run a script in this process; after every optimizer step, write to `done` what it took and wait for a byte from `go`."""
    import torch
    import transformers
    from accelerate import Accelerator
    from diffusers import AutoencoderKL, SD3Transformer2DModel, UNet2DConditionModel
    from torch.utils.data import dataloader
    watch = Watch()
    places = [(UNet2DConditionModel, "forward", "forward"), (SD3Transformer2DModel, "forward", "forward"),
              (Accelerator, "backward", "backward"), (transformers.T5EncoderModel, "forward", "text encoders"),
              (Accelerator, "clip_grad_norm_", "clip"), (AutoencoderKL, "encode", "VAE"),
              (dataloader._BaseDataLoaderIter, "__next__", "data"),
              (transformers.CLIPTextModel, "forward", "text encoders"),
              (transformers.CLIPTextModelWithProjection, "forward", "text encoders")]
    if Path(script).parent == OURS.parent:
        from library.data.loader import Loader
        places.append((Loader, "compose", "data"))
    for owner, method, name in places:
        setattr(owner, method, watch.timed(name, getattr(owner, method)))
    step = watch.timed("optimizer", torch.optim.AdamW.step)

    def step_and_wait(*args, **kwargs):
        result = step(*args, **kwargs)
        watch.stop()
        said = watch.steps[-1] if watch.steps else {"before": time.process_time()}
        os.write(done, json.dumps(said).encode() + b"\n")
        if not os.read(go, 1):
            os._exit(0)
        watch.start()
        return result

    torch.optim.AdamW.step = step_and_wait
    runpy.run_path(script, run_name="__main__")


class Turns:
    """A script in a process of its own that goes on for one step when told to."""

    def __init__(self, script: Path, arguments: list[str], python_path: str | None):
        ours, theirs = os.pipe(), os.pipe()    # (read, write): what it says, what it waits for
        command = [sys.executable, __file__, "--turns", str(theirs[0]), str(ours[1]), str(script), *arguments]
        self.said = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(command, pass_fds=(theirs[0], ours[1]), stdout=self.said, stderr=self.said,
                                        env=environment(python_path=python_path) | {"ACCELERATE_USE_CPU": "true"})
        os.close(theirs[0])
        os.close(ours[1])
        self.answers, self.go = os.fdopen(ours[0]), theirs[1]
        self.before = self._answer()["before"]    # CPU-seconds from its start to the end of its first optimizer step

    def step(self) -> dict[str, float]:
        """CPU-seconds of the next step, whole and by part."""
        os.write(self.go, b".")
        return self._answer()

    def close(self) -> None:
        os.close(self.go)
        self.process.wait()

    def _answer(self) -> dict[str, float]:
        line = self.answers.readline()
        if not line:
            self.said.seek(0)
            sys.exit(f"{self.said.read()[-4000:]}\n{self.process.args[5]} ended before its last step")
        return json.loads(line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="the folder of make_data.py")
    parser.add_argument("--script", default="train_lora_sdxl.py", choices=("train_lora_sdxl.py", "train_lora_sd3.py"))
    parser.add_argument("--captions", action="store_true", help="of SD 3: a caption an image instead of one prompt")
    parser.add_argument("--peer", type=Path, required=True, help="diffusers' train_text_to_image_lora_sdxl.py or its like")
    parser.add_argument("--peer_flags", default="", help="more flags of the peer alone")
    parser.add_argument("--peer_python_path", help="PYTHONPATH of the peer alone (torchvision)")
    parser.add_argument("--model", default="tiny", choices=("tiny", "small", "half"), help="half: made where it is missing")
    parser.add_argument("--photos", default="photos", help="folder of photographs in DATA")
    parser.add_argument("--warm_up", type=int, default=5, help="first steps, not counted")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--mixed_precision", default="no", choices=("no", "bf16"), help="both VAEs stay float32")
    parser.add_argument("--core", type=int, help="keep everything on this core")
    args = parser.parse_args()
    pin(args.core)
    sd3 = args.script == "train_lora_sd3.py"
    if args.model == "half" and not sd3 and not (args.data / "half" / "model_index.json").exists():
        import make_data
        make_data.make_model(args.data / "half", **HALF)

    with tempfile.TemporaryDirectory() as folder:
        def arguments(name: str) -> list[str]:
            chosen = {"rank": 16, "lr_warmup_steps": 0, "train_batch_size": args.batch_size,
                      "mixed_precision": args.mixed_precision, "max_train_steps": args.steps + args.warm_up + 2}
            more = [f"--{key}={value}" for key, value in chosen.items()] + (args.peer_flags.split() if name == "peer" else [])
            if not sd3:
                return flags(args.data, args.model, Path(folder) / name, *more, photos=args.photos)
            more += ["--precondition_outputs", "1"] + (["--instance_prompt", PROMPT] if args.captions and name == "peer" else [])
            return dreambooth_flags(args.data, args.model, Path(folder) / name, *more, captions=args.captions, photos=args.photos)

        scripts = {"ours": Turns(OURS.with_name(args.script), arguments("ours"), None),
                   "peer": Turns(args.peer.resolve(), arguments("peer"), args.peer_python_path)}
        steps: dict[str, list[dict]] = {name: [] for name in scripts}
        for number in range(args.warm_up + args.steps):
            for name in sorted(scripts, reverse=number % 2 == 1):
                steps[name].append(scripts[name].step())
        for script in scripts.values():
            script.close()

    whole = {name: [step["whole"] for step in each[args.warm_up:]] for name, each in steps.items()}
    kind = f", {'captions' if args.captions else 'one prompt'}, the peer with {args.peer_flags or 'no more flags'}" if sd3 else ""
    print(f"{args.script}, {args.model}{kind}, batch {args.batch_size}, mixed precision {args.mixed_precision}, "
          f"{args.steps} steps in turns")
    for name, seconds in whole.items():
        parts = {part: sum(step.get(part, 0.0) for step in steps[name][args.warm_up:]) / sum(seconds)
                 for part in dict.fromkeys(part for step in steps[name] for part in step if part != "whole")}
        rest = 1 - sum(parts.values())
        print(f"{name}: {min(seconds):.3f} best, {statistics.median(seconds):.3f} median CPU-s a step; "
              f"{args.batch_size / min(seconds):.2f} best, {args.batch_size / statistics.median(seconds):.2f} median images/s; "
              f"{scripts[name].before:.1f} CPU-s to the end of the first step")
        print("      " + ", ".join(f"{part} {share:.1%}" for part, share in parts.items()) + f", all else {rest:.1%}")
    ratios = [peer / ours for ours, peer in zip(whole["ours"], whole["peer"], strict=True)]
    print(f"images/s, ours over the peer's: {min(whole['peer']) / min(whole['ours']):.2f} of the best steps, "
          f"{statistics.median(ratios):.2f} median of pairs")
    data = [1 - step.get("data", 0.0) / step["whole"] for step in steps["peer"][args.warm_up:]]
    less = [ratio * share for ratio, share in zip(ratios, data, strict=True)]
    print(f"the same, if reading and cutting its images cost the peer nothing: {statistics.median(less):.2f} median of pairs")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--turns"]:
        go, done, *sys.argv = sys.argv[2:]
        sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
        run_in_turns(sys.argv[0], int(go), int(done))
    else:
        main()
