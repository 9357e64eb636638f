"""LoRA training of an SDXL of the true size on this machine: peak resident memory from start to end, CPU time a step.

    python benchmarks/full_size.py out/full_size                                        # make the model, 7 GB, and the pictures
    python benchmarks/full_size.py out/full_size --script train_lora_sdxl.py            # a run: encoders, caches, two steps
    python benchmarks/full_size.py out/full_size --script train_lora_sdxl.py -- --base_model_precision nf4-bnb
    python benchmarks/full_size.py out/full_size --bare int8-torchao                    # the UNet and its adapters alone

The true configurations of UNet, both text encoders and VAE, with random weights in bf16: nothing is downloaded. What
stands behind `--` goes to the script. Resident memory is what the system counts for the process (VmHWM); it includes
the pages of the weights' file that are mapped, which the system may drop again. --bare trains two steps on random
latents and prompts, as the script's inner loop does. estimate.py says what a GPU would need.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
import torch
from measured import HERE, environment, pin

UNET = {"sample_size": 128, "block_out_channels": (320, 640, 1280), "layers_per_block": 2,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), "transformer_layers_per_block": [1, 2, 10],
        "attention_head_dim": [5, 10, 20], "cross_attention_dim": 2048, "use_linear_projection": True,
        "addition_embed_type": "text_time", "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816}
VAE = {"block_out_channels": (128, 256, 512, 512), "down_block_types": ("DownEncoderBlock2D",) * 4,
       "up_block_types": ("UpDecoderBlock2D",) * 4, "layers_per_block": 2, "latent_channels": 4, "sample_size": 1024,
       "scaling_factor": 0.13025, "force_upcast": True}
CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
          "projection_dim": 768, "hidden_act": "quick_gelu"}
CLIP_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20,
          "projection_dim": 1280, "hidden_act": "gelu"}
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


def make_model(folder: Path) -> None:
    """A diffusers folder, one part after the other: never more than the UNet's 5 GB in memory."""
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, UNet2DConditionModel
    from make_data import BOS, EOS, make_tokenizer
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection
    tokenizers = [make_tokenizer(folder / name, pad) for name, pad in (("tokenizer", EOS), ("tokenizer_2", "!"))]
    ids = {"bos_token_id": tokenizers[0].convert_tokens_to_ids(BOS), "eos_token_id": tokenizers[0].convert_tokens_to_ids(EOS)}
    EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading",
                           steps_offset=1).save_pretrained(folder / "scheduler")
    for name, make in (("vae", lambda: AutoencoderKL(**VAE)), ("unet", lambda: UNet2DConditionModel(**UNET)),
                       ("text_encoder", lambda: CLIPTextModel(CLIPTextConfig(**CLIP_L, **ids))),
                       ("text_encoder_2", lambda: CLIPTextModelWithProjection(CLIPTextConfig(**CLIP_G, **ids)))):
        with torch.device("meta"):
            network = make().to(torch.bfloat16)
        network.to_empty(device="cpu")
        torch.manual_seed(0)
        for layer in network.modules():
            if hasattr(layer, "reset_parameters"):
                layer.reset_parameters()
        assert all(p.isfinite().all() for p in network.parameters())
        network.save_pretrained(folder / name)
        print(f"{folder / name}: {sum(p.numel() for p in network.parameters()) / 1e6:.1f} M parameters", flush=True)
        del network
    parts = {"unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"],
             "text_encoder": ["transformers", "CLIPTextModel"], "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
             "tokenizer": ["transformers", "CLIPTokenizer"], "tokenizer_2": ["transformers", "CLIPTokenizer"],
             "scheduler": ["diffusers", "EulerDiscreteScheduler"]}
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionXLPipeline", **parts}, indent=2))


def make_photos(folder: Path) -> None:
    import numpy as np
    from PIL import Image
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(4):
        colours = (np.random.default_rng(number).random((6, 6, 3)) * 255).astype(np.uint8)
        Image.fromarray(colours).resize((640, 640), Image.Resampling.BICUBIC).save(folder / f"{number}.jpg", quality=95)
        (folder / f"{number}.txt").write_text(f"a picture of colours, number {number}")


class Watch(threading.Thread):
    """Looks at a process ten times a second: its memory by kind, its CPU time whenever `metrics` has a new line."""

    def __init__(self, pid: int, metrics: Path):
        super().__init__(daemon=True)
        self.pid, self.metrics, self.at_lines, self.most = pid, metrics, [], {"RssAnon": 0, "RssFile": 0, "VmHWM": 0}
        self.story: list[tuple[float, int, int]] = []    # seconds, anonymous MB, file MB

    def run(self) -> None:
        begin, process = time.monotonic(), psutil.Process(self.pid)
        while process.is_running():
            try:
                status = dict(line.split(":", 1) for line in Path(f"/proc/{self.pid}/status").read_text().splitlines())
                now = {kind: int(status[kind].split()[0]) // 1024 for kind in self.most}
                used = process.cpu_times()
            except (OSError, KeyError, psutil.Error):    # it has ended
                return
            self.most = {kind: max(self.most[kind], now[kind]) for kind in now}
            self.story.append((time.monotonic() - begin, now["RssAnon"], now["RssFile"]))
            if self.metrics.exists() and self.metrics.read_text().count("\n") > len(self.at_lines):
                self.at_lines.append(used.user + used.system)
            time.sleep(0.1)


def measure(command: list[str], output: Path, cores: int) -> None:
    """Run it and print what it took."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    begin, surroundings = time.perf_counter(), environment(cores)
    process = subprocess.Popen(command, env=surroundings)
    watch = Watch(process.pid, output / "metrics.jsonl")
    watch.start()
    if process.wait():
        sys.exit(f"{' '.join(command)} ended with status {process.returncode}")
    wall, after = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_CHILDREN)
    watch.join()
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    most = {kind: value / 2**10 for kind, value in watch.most.items()}
    print(f"peak memory {after.ru_maxrss / 2**20:.2f} GiB (anonymous at most {most['RssAnon']:.2f}, mapped files at most "
          f"{most['RssFile']:.2f}); {wall:.0f} s, {cpu:.0f} CPU-s on {cores} threads")
    for first, second in zip(watch.at_lines, watch.at_lines[1:], strict=False):
        print(f"a step: {second - first:.0f} CPU-s")
    every = max(1, len(watch.story) // 40)
    print("  ".join(f"{seconds:.0f}s {(anonymous + mapped) / 2**10:.1f}" for seconds, anonymous, mapped in watch.story[::every]))


def bare(folder: Path, precision: str, resolution: int, output: Path) -> None:
    """Two steps of LoRA on the UNet alone: rank 16, float32 adapters, bf16 autocast, gradient checkpointing, AdamW."""
    sys.path.insert(0, str(HERE.parent))
    import peft
    from diffusers import UNet2DConditionModel

    from library.models import quantize
    from library.training import devices
    device = devices.best()
    quantize.check(precision, device, "--bare")
    unet = UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=torch.bfloat16).requires_grad_(False)
    begin = time.process_time()
    layers = quantize.apply(unet, precision, device)
    unet.to(device)
    devices.free_memory(device)
    print(f"{precision}: {quantize.bytes_of(unet) / 2**30:.2f} GiB of weights, {layers} layers quantised in "
          f"{time.process_time() - begin:.0f} CPU-s", flush=True)
    torch.manual_seed(0)
    peft.inject_adapter_in_model(peft.LoraConfig(r=16, lora_alpha=16, target_modules=TARGETS), unet)
    trained = [p for p in unet.parameters() if p.requires_grad]
    for p in trained:
        p.data = p.data.float()
    unet.train()
    unet.enable_gradient_checkpointing()
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    latents, prompt = torch.randn(1, 4, resolution // 8, resolution // 8), torch.randn(1, 77, 2048)
    cond = {"text_embeds": torch.randn(1, 1280).to(device),
            "time_ids": torch.tensor([[resolution, resolution, 0, 0, resolution, resolution]])}
    output.mkdir(parents=True, exist_ok=True)
    for step in range(3):    # the first line stands before the first step
        with (output / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": step, "memory_gb": devices.peak_memory(device)}) + "\n")
        if step == 2:
            break
        time.sleep(0.3)    # for the watch to see the line
        with torch.autocast(device, torch.bfloat16):
            predicted = unet(latents.to(device), torch.tensor([500], device=device), prompt.to(device),
                             added_cond_kwargs={name: value.to(device) for name, value in cond.items()}).sample
            loss = predicted.float().square().mean()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step + 1}: loss {loss.item():.4f}, norm of the gradient {norm.item():.3g}, "
              f"peak so far {devices.peak_memory(device):.2f} GiB", flush=True)


def main() -> None:
    sys.path.insert(0, str(HERE.parent))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the model is, or is to be made")
    parser.add_argument("--script", type=Path, help="the training script")
    parser.add_argument("--bare", metavar="PRECISION", help="train the UNet alone, its base held so")
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--cores", type=int, default=1, help="threads")
    parser.add_argument("--core", type=int, help="keep everything on this core")
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)    # this process is the measured one
    given, more = sys.argv[1:], []
    if "--" in given:
        given, more = given[:given.index("--")], given[given.index("--") + 1:]
    args = parser.parse_args(given)
    if args.inside:
        return bare(args.folder / "model", args.bare, args.resolution, args.inside)
    pin(args.core)
    if not (args.folder / "model" / "model_index.json").exists():    # in a process of its own: its memory is not ours
        make_model(args.folder / "model")
        make_photos(args.folder / "photos")
    with tempfile.TemporaryDirectory(dir=args.folder) as output:    # caches too: a run from the very start
        if args.bare:
            command = [sys.executable, __file__, str(args.folder), "--inside", output, "--bare", args.bare,
                       "--resolution", str(args.resolution)]
        elif args.script:
            command = [sys.executable, str(args.script), "--pretrained_model_name_or_path", str(args.folder / "model"),
                       "--train_data_dir", str(args.folder / "photos"), "--resolution", str(args.resolution),
                       "--train_batch_size", "1", "--max_train_steps", str(args.steps), "--logging_steps", "1", "--rank", "16",
                       "--gradient_checkpointing", "--mixed_precision", "bf16", "--report_to", "none", "--seed", "0",
                       "--output_dir", output, *more]
        else:
            return
        measure(command, Path(output), args.cores)


if __name__ == "__main__":
    main()
