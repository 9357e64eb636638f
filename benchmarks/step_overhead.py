"""Share of the training loop that is not forward, backward, clipping or optimizer, and whole steps against a bare loop.

    python benchmarks/make_data.py out/bench
    python benchmarks/step_overhead.py out/bench --model tiny --steps 120
    python benchmarks/step_overhead.py out/bench --model tiny --steps 120 --script train_lora_sdxl.py    # or train_sd3.py ...

Runs the script in this process with warm caches and counts CPU-seconds around the calls of the UNet or transformer, of
backward, of clip_grad_norm_ and of the optimizer; all the rest of a step (batch, loss, log, schedule) is the overhead.
Before every step it also makes a step of a bare loop on a second network (for the scripts of LoRA: on PEFT's, of rank 16,
on it) with the same batch: forward, backward, clipping, fused AdamW and nothing else. So both see the same machine;
medians over the steps are compared.
"""

import argparse
import importlib
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

from measured import OURS, Watch, environment, flags, pin
from measured import run as fill

WARM_UP = 5    # first steps, not counted
SCRIPTS = (OURS.name, "train_lora_sdxl.py", "train_sd3.py", "train_lora_sd3.py")
TARGETS = ["to_k", "to_q", "to_v", "to_out.0"]


class BareLoop:
    """Forward, backward, clipping and fused AdamW on ready tensors. lora: of a LoRA on the attention layers, the rest frozen."""

    def __init__(self, model: Path, sd3: bool, lora: bool):
        import torch
        from diffusers import SD3Transformer2DModel, UNet2DConditionModel
        part, kind = ("transformer", SD3Transformer2DModel) if sd3 else ("unet", UNet2DConditionModel)
        self.network, self.sd3 = kind.from_pretrained(model / part).train(), sd3
        if lora:
            from peft import LoraConfig
            targets = [*TARGETS, "add_k_proj", "add_q_proj", "add_v_proj", "to_add_out"] if sd3 else TARGETS
            self.network.requires_grad_(False)
            self.network.add_adapter(LoraConfig(r=16, lora_alpha=16, target_modules=targets))
        self.trained = [parameter for parameter in self.network.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-5, fused=True)
        self.seconds: list[float] = []

    def step(self, batch: dict) -> None:
        import torch
        latents, hidden, pooled, noise = (
            batch[name].clone() for name in ("latents", "prompt_embeds", "pooled_prompt_embeds", "noise"))
        levels = torch.randint(0, 1000, (len(latents),))
        if self.sd3:
            ready = {"hidden_states": latents, "timestep": levels, "encoder_hidden_states": hidden, "pooled_projections": pooled}
        else:
            ready = {"sample": latents, "timestep": levels, "encoder_hidden_states": hidden,
                     "added_cond_kwargs": {"text_embeds": pooled, "time_ids": batch["time_ids"].clone()}}
        begin = time.process_time()
        prediction = self.network(**ready).sample
        torch.nn.functional.mse_loss(prediction, noise).backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.seconds.append(time.process_time() - begin)


def instrument(watch: Watch, bare: BareLoop | None) -> None:
    """Put timers around what the loop calls; the training script itself is as it is."""
    import torch
    from accelerate import Accelerator

    from library.data.loader import Loader
    from library.models import sd3, sdxl
    Accelerator.backward = watch.timed("backward", Accelerator.backward)
    Accelerator.clip_grad_norm_ = watch.timed("clip", Accelerator.clip_grad_norm_)
    torch.optim.AdamW.step = watch.timed("optimizer", torch.optim.AdamW.step)
    batches = Loader.batches

    def timing(load_part):
        def load_and_time(base, part, *rest):
            model = load_part(base, part, *rest)
            if part in ("unet", "transformer"):
                model.forward = watch.timed("forward", model.forward)
            return model
        return load_and_time

    def batches_between_bare_steps(self, first_step, steps):
        composed = batches(self, first_step, steps)
        for step in range(first_step, steps):
            watch.stop()
            if bare:
                bare.step(self.compose(step, 0))
            watch.start()
            yield next(composed)

    sdxl.load_part, sd3.load_part, Loader.batches = timing(sdxl.load_part), timing(sd3.load_part), batches_between_bare_steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="the folder of make_data.py")
    parser.add_argument("--script", default=OURS.name, choices=SCRIPTS)
    parser.add_argument("--model", default="tiny", choices=("tiny", "small"))
    parser.add_argument("--photos", default="photos_80", help="folder of photographs in DATA")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--no_bare", action="store_true", help="leave out the bare loop")
    parser.add_argument("--core", type=int, help="keep everything on this core")
    args = parser.parse_args()
    pin(args.core)
    os.environ.update(environment())
    sd3, lora = "sd3" in args.script, "lora" in args.script
    model = f"sd3_{args.model}" if sd3 else args.model

    with tempfile.TemporaryDirectory() as folder:
        run = flags(args.data, model, Path(folder) / "out", "--max_train_steps", str(args.steps),
                    "--embedding_cache_dir", str(Path(folder) / "cache"), photos=args.photos)
        script = OURS.with_name(args.script)
        fill([sys.executable, str(script), *run, "--cache_only"], environment())
        sys.path.insert(0, str(script.parent))
        task, watch = importlib.import_module(script.stem), Watch()
        instrument(watch, None if args.no_bare else (bare := BareLoop(args.data / model, sd3, lora)))
        run[run.index("--output_dir") + 1] = str(Path(folder) / "again")
        task.main(task.parse_args(run))

    steps = watch.steps[WARM_UP:]
    whole = sum(step["whole"] for step in steps)
    parts = {name: sum(step.get(name, 0.0) for step in steps) for name in ("forward", "backward", "clip", "optimizer")}
    median = statistics.median(step["whole"] for step in steps)
    print(f"\n{args.script}, {args.model}: {len(steps)} steps of {median:.4f} CPU-s (median)")
    for name, seconds in parts.items():
        print(f"  {name:10} {seconds / whole:7.2%}")
    each = [1 - sum(step.get(name, 0.0) for name in parts) / step["whole"] for step in steps]
    print(f"  overhead   {1 - sum(parts.values()) / whole:7.2%}  (median of the steps {statistics.median(each):.2%})")
    if not args.no_bare:
        ratios = [step["whole"] / seconds for step, seconds in zip(steps, bare.seconds[WARM_UP:], strict=False)]
        print(f"  bare loop  {statistics.median(bare.seconds[WARM_UP:]):.4f} CPU-s a step; "
              f"a whole step is {statistics.median(ratios):.3f} of it (median of pairs)")


if __name__ == "__main__":
    main()
