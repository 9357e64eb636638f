"""Memory of a training step at the true sizes of SDXL and SD 3, added up on tensors without contents: nothing is computed.

    python benchmarks/estimate.py --resolution 1024                           # a LoRA on SDXL
    python benchmarks/estimate.py --model sd3.5-large --resolution 512        # LoRAs and whole models, T5 and the CLIPs

Neither a device's own overhead nor fragmentation, nor workspaces of kernels. A bf16 base, rank 16, float32 adapters, AdamW,
where nothing else is said.
"""

import argparse
import sys
import weakref

import torch
from full_size import CLIP_G, CLIP_L, TARGETS, UNET
from measured import HERE
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

SD3 = {    # Stability's transformers
    "sd3-medium": {"num_layers": 24, "num_attention_heads": 24, "pos_embed_max_size": 192},
    "sd3.5-medium": {"num_layers": 24, "num_attention_heads": 24, "pos_embed_max_size": 384, "qk_norm": "rms_norm",
                     "dual_attention_layers": tuple(range(13))},
    "sd3.5-large": {"num_layers": 38, "num_attention_heads": 38, "pos_embed_max_size": 192, "qk_norm": "rms_norm"}}
SD3_TARGETS = [*TARGETS, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
BITS = {"int8-quanto": 8.01, "int4-quanto": 4.25, "nf4-bnb": 4.13}    # of a quantised weight, with its scales
SETUPS = [    # (what is trained, bytes of optimizer state for each of its numbers, images, gradient checkpointing)
    ("lora", 8, 1, True), ("lora", 8, 4, True), ("lora", 8, 1, False), ("lora", 1.02, 1, True), ("float32", 8, 1, True),
    ("bfloat16", 6, 1, True)]


class LiveBytes(TorchDispatchMode):
    """Adds up the storages that live, after every operation."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage())
        return made

    def _add(self, storage) -> None:
        if storage._cdata in self.seen:
            return
        self.seen.add(storage._cdata)
        self.now += storage.nbytes()
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._remove, storage._cdata, storage.nbytes())

    def _remove(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.now -= size


def estimate_sdxl(resolution: int, batch: int, checkpointing: bool) -> tuple[float, float]:
    """Weights, and the peak of a LoRA step (rank 16, bf16 base, float32 adapters, AdamW), in GiB of tensors."""
    import peft
    from diffusers import UNet2DConditionModel
    from torch._subclasses import FakeTensorMode
    with torch.device("meta"):
        unet = UNet2DConditionModel(**UNET).to(torch.bfloat16).requires_grad_(False)
        peft.inject_adapter_in_model(peft.LoraConfig(r=16, lora_alpha=16, target_modules=TARGETS), unet)
    unet.train()
    if checkpointing:
        unet.enable_gradient_checkpointing()
    with FakeTensorMode(), LiveBytes() as live:
        empty(unet)
        trained = [p for p in unet.parameters() if p.requires_grad]
        states = [torch.empty_like(p) for p in trained for _ in range(2)]    # AdamW's
        weights, side = live.now - sum(state.nbytes for state in states), resolution // 8
        cond = {"text_embeds": torch.empty(batch, 1280), "time_ids": torch.empty(batch, 6)}
        with torch.autocast("cpu", torch.bfloat16):
            loss = unet(torch.empty(batch, 4, side, side), torch.empty(batch, dtype=torch.long), torch.empty(batch, 77, 2048),
                        added_cond_kwargs=cond).sample.float().square().mean()
        loss.backward()
        del states
    return weights / 2**30, live.most / 2**30


def empty(module, precision=None) -> None:
    """Have a module on the meta device hold fake tensors: what is trained in float32 or `precision`, the rest as it is."""
    for layer in module.modules():
        for name, p in layer._parameters.items():
            if p is not None:
                made = torch.empty(p.shape, dtype=(precision or torch.float32) if p.requires_grad else p.dtype)
                layer._parameters[name] = torch.nn.Parameter(made, requires_grad=p.requires_grad)
        for name, buffer in layer._buffers.items():
            if buffer is not None:
                layer._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def estimate_sd3(model: str, resolution: int, trained: str, state: float, batch: int,
                 checkpointing: bool) -> tuple[float, float, int, int]:
    """Weights and the peak of a step of SD3 in GiB of tensors, and numbers in all weights and in those that are quantised.

    trained: "lora" (rank 16 on attention in both streams, float32, on a frozen bf16 base), or the precision of all weights.
    state: bytes of the optimizer for each trained number; paged ones may lie in main memory, and are counted all the same.
    """
    import peft
    from diffusers import SD3Transformer2DModel
    from torch._subclasses import FakeTensorMode
    with torch.device("meta"):
        transformer = SD3Transformer2DModel(
            sample_size=128, joint_attention_dim=4096, pooled_projection_dim=2048,
            caption_projection_dim=64 * SD3[model]["num_attention_heads"], **SD3[model])
        total, quantised = sum(p.numel() for p in transformer.parameters()), sum(quantised_layers(transformer))
        if trained == "lora":
            transformer.to(torch.bfloat16).requires_grad_(False)
            peft.inject_adapter_in_model(peft.LoraConfig(r=16, lora_alpha=16, target_modules=SD3_TARGETS), transformer)
    transformer.train()
    if checkpointing:
        transformer.enable_gradient_checkpointing()
    with FakeTensorMode(), LiveBytes() as live:
        empty(transformer, None if trained == "lora" else getattr(torch, trained))
        numbers = sum(p.numel() for p in transformer.parameters() if p.requires_grad)
        weights, side = live.now, resolution // 8
        states = torch.empty(int(numbers * state), dtype=torch.uint8)
        with torch.autocast("cpu", torch.bfloat16):
            loss = transformer(
                hidden_states=torch.empty(batch, 16, side, side), timestep=torch.empty(batch),
                encoder_hidden_states=torch.empty(batch, 77 + 154, 4096), pooled_projections=torch.empty(batch, 2048),
            ).sample.float().square().mean()
        loss.backward()
        del states
    return weights / 2**30, live.most / 2**30, total, quantised


def quantised_layers(network) -> list[int]:
    """How many weights each layer has that `quantize.apply` would quantise."""
    from library.models import quantize
    found = []
    quantised, quantize._quantised = quantize._quantised, lambda layer, scheme: found.append(layer.weight.numel()) or layer
    try:
        quantize.apply(network.requires_grad_(False), "nf4-bnb")
    finally:
        quantize._quantised = quantised
        network.requires_grad_(True)
        del network.is_loaded_in_4bit
    return found


def print_text_encoders() -> None:
    """SD3's text encoders, which are on the device together while captions are encoded, and gone afterwards."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel
    t5 = T5Config(vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64,
                  feed_forward_proj="gated-gelu")
    for name, make in (("CLIP ViT-L", lambda: CLIPTextModelWithProjection(CLIPTextConfig(**CLIP_L))),
                       ("CLIP ViT-bigG", lambda: CLIPTextModelWithProjection(CLIPTextConfig(**CLIP_G))),
                       ("T5-XXL", lambda: T5EncoderModel(t5))):
        with torch.device("meta"):
            network = make()
        total, quantised = sum(p.numel() for p in network.parameters()), sum(quantised_layers(network))
        held = {"bf16": 2 * total, **{kind: 2 * total - quantised * (16 - bits) / 8 for kind, bits in BITS.items()}}
        sizes = ", ".join(f"{kind} {size / 2**30:.2f} GiB" for kind, size in held.items())
        print(f"{name}: {total / 1e9:.2f} B numbers: {sizes}", flush=True)


def print_sd3(model: str, resolution: int) -> None:
    """The set-ups of SD3, a line each; of quantised bases the difference in their weights' bytes."""
    for trained, state, batch, checkpointing in SETUPS:
        weights, most, total, quantised = estimate_sd3(model, resolution, trained, state, batch, checkpointing)
        print(f"{model}, {resolution} px, {trained}, {state:g} bytes of state, batch {batch}, gradient checkpointing "
              f"{'on' if checkpointing else 'off'}: weights {weights:.2f} GiB, peak {most:.2f} GiB", flush=True)
        for kind, bits in BITS.items() if trained == "lora" else ():
            saved = quantised * (16 - bits) / 8 / 2**30
            print(f"    {kind}: weights {weights - saved:.2f} GiB, peak {most - saved:.2f} GiB", flush=True)
    print(f"{total / 1e9:.2f} B numbers, of which {quantised / 1e9:.2f} B are quantised", flush=True)
    print_text_encoders()


def main() -> None:
    sys.path.insert(0, str(HERE.parent))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sdxl", choices=("sdxl", *SD3))
    parser.add_argument("--resolution", type=int, default=1024)
    args = parser.parse_args()
    if args.model != "sdxl":
        return print_sd3(args.model, args.resolution)
    for batch, checkpointing in ((1, True), (4, True), (1, False)):
        weights, most = estimate_sdxl(args.resolution, batch, checkpointing)
        print(f"{args.resolution} px, batch {batch}, gradient checkpointing {'on' if checkpointing else 'off'}: "
              f"weights {weights:.2f} GiB, peak {most:.2f} GiB", flush=True)


if __name__ == "__main__":
    main()
