"""Every kind of adapter with every optimizer: at step 0 the loss is that of the bare base, after 20 steps it is lower.

On a UNet of SDXL's kinds of blocks that is as small as they allow. What does not depend on the adapter is computed once,
for the batch is always the same: 20 steps take a tenth of a second. torchao's optimizers are run as they are written, for
torch would compile each for ten seconds, and with four of the kinds; test_optimizers.py compiles one.
"""

import collections
import contextlib
import functools
from types import SimpleNamespace

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch.nn import functional as F

from library.errors import UserError
from library.models import adapters
from library.models.adapter_settings import Rates, Settings
from library.training import optimizers

STEPS = 20
LAYERS = tuple(f"up_blocks.0.attentions.1.transformer_blocks.0.{name}" for name in ("attn2.to_q", "attn2.to_v", "ff.net.2"))
BOTH = (*LAYERS, "up_blocks.0.resnets.1.conv2")
CONFIG = {"linear_dim": 4, "linear_alpha": 2.0, "apply_preset": {
    "target_module": [], "target_name": [name.replace(".", r"\.") + "$" for name in BOTH]}}
KINDS = {"lora": Settings("lora", 4, targets=LAYERS), "lora-conv": Settings("lora", 4, targets=BOTH, conv_rank=2),
         "rslora": Settings("lora", 4, 1.0, LAYERS, rslora=True), "dora": Settings("dora", 4, targets=BOTH),
         "loha": Settings("loha", 4, targets=BOTH), "lokr": Settings("lokr", 4, targets=BOTH, factor=4),
         "oft": Settings("oft", 4, targets=BOTH), "pissa": Settings("lora", 4, targets=LAYERS, init="pissa"),
         "olora": Settings("lora", 4, targets=LAYERS, init="olora"),
         "large": Settings("lora", 32, targets=LAYERS[2:]),    # 4096 values: torchao holds no fewer in 8 bits
         "lycoris": Settings("lycoris", lycoris_config=CONFIG | {"algo": "glora"})}
TORCHAO = [name for name in optimizers.TABLE if name.startswith("ao-")]
HERE = [name for name, entry in optimizers.TABLE.items() if "cpu" in entry.devices and name not in TORCHAO]
# what each needs to show in 20 steps that it learns; those that find their rate begin nearer to it than at 1e-6
RATES = dict.fromkeys(optimizers.TABLE, 0.03) | {name: 1.0 for name in HERE if name.startswith(("prodigy", "dadapt"))} | {
    name: 1.0 for name in HERE if "sgd" in name} | {"sgd-schedulefree": 10.0, "radam-schedulefree": 0.1, "optimi-radam": 0.1,
                                                    "optimi-ranger": 0.1}
SETTINGS = {name: ["min_8bit_size=1"] for name in HERE if name.startswith("bnb-") and "8bit" in name} | {
    "adamw_8bit": ["min_8bit_size=1"], "dadapt-lion": ["d0=1e-3"], "dadapt-sgd": ["d0=1e-2"], "dadapt-adagrad": ["d0=1e-2"],
    "dadapt-adan": ["d0=1e-2", "growth_rate=1.02"]}


def small_unet():
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=4, block_out_channels=(32,), down_block_types=("DownBlock2D",), layers_per_block=1,
        up_block_types=("CrossAttnUpBlock2D",), mid_block_type=None, norm_num_groups=8, attention_head_dim=2,
        cross_attention_dim=24, use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=16 + 6 * 8).requires_grad_(False)


@functools.cache
def batch() -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=draw) for shape in ((2, 4, 4, 4), (2, 5, 24), (2, 16), (2, 4, 4, 4))]


def loss_of(unet) -> torch.Tensor:
    latents, prompt, pooled, noise = batch()
    cond = {"text_embeds": pooled, "time_ids": torch.full((2, 6), 64.0)}
    return F.mse_loss(unet(latents, torch.tensor([10, 500]), prompt, added_cond_kwargs=cond).sample, noise)


def keep_what_stays(unet) -> None:
    """Modules whose output does not depend on the adapter return from now on what they made of the batch."""
    made = collections.defaultdict(list)
    hooks = [module.register_forward_hook(lambda module, _, output: made[module].append(output)) for module in unet.modules()]
    with torch.no_grad():
        loss_of(unet)
        for tensor in adapters.trained(unet).values():
            tensor.add_(0.1 * torch.randn(tensor.shape))
        loss_of(unet)
    for hook in hooks:
        hook.remove()
    for module, outputs in made.items():
        if len(outputs) == 2 and torch.is_tensor(outputs[0]) and torch.equal(*outputs):
            module.forward = lambda *_, kept=outputs[0], **__: kept


@functools.cache
def adapted(kind: str):
    """(a UNet with such an adapter, the adapter's initial values, the loss without it)."""
    unet = small_unet()
    bare = loss_of(unet)
    adapters.add(unet, [], KINDS[kind])
    unet.train()
    assert torch.equal(loss_of(unet), bare)
    initial = {name: tensor.clone() for name, tensor in adapters.state_dict(unet).items()}
    keep_what_stays(unet)
    return unet, initial, bare.item()


def train(kind: str, optimizer: str) -> list[float]:
    """Losses: without the adapter, before the first step, and after the last."""
    unet, initial, bare = adapted(kind)
    adapters.load_state_dict(unet, initial)
    args = SimpleNamespace(optimizer=optimizer, use_8bit_adam=False, optimizer_args=SETTINGS.get(optimizer, []), adam_beta1=None,
                           adam_beta2=None, adam_epsilon=None, adam_weight_decay=None)
    made = optimizers.from_groups(args, adapters.parameter_groups({"unet": unet}, {"unet": RATES[optimizer]}, Rates()), "cpu")
    losses, parameters = [bare], [*adapters.trained(unet).values()]
    for step in range(STEPS):
        loss = loss_of(unet)
        losses += [loss.item()] * (step == 0)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)    # the script's default
        made.step()
        made.zero_grad()
    with optimizers.evaluated(made), torch.no_grad():
        return [*losses, loss_of(unet).item()]


@pytest.mark.parametrize(("optimizer", "kind"), [(optimizer, kind) for optimizer in HERE for kind in KINDS if kind != "large"]
                         + [(optimizer, kind) for optimizer in TORCHAO for kind in ("large", "lora-conv", "oft", "lycoris")])
def test_every_pair_learns(optimizer, kind):
    with torch.compiler.set_stance("force_eager") if optimizer in TORCHAO else contextlib.nullcontext():
        bare, first, last = train(kind, optimizer)
    assert first == bare
    assert last < 0.97 * first


@pytest.mark.parametrize("optimizer", [name for name in optimizers.TABLE if name not in HERE + TORCHAO])
def test_what_needs_a_gpu_says_so(optimizer):
    args = SimpleNamespace(optimizer=optimizer, use_8bit_adam=False, optimizer_sharding="none")
    with pytest.raises(UserError, match=f"--optimizer {optimizer} does not run on cpu, only on cuda, xpu; use"):
        optimizers.check_optimizer(args, "cpu")
