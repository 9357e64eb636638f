"""Adapters on networks: they start as nothing, they learn, their arithmetic is the papers', and what cannot be is refused."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from library.errors import UserError
from library.models import adapter_merge, adapters, lycoris, quantize
from library.models.adapter_settings import SDXL_UNET, Rates, Settings, block_of, block_rates, check, from_kohya

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIG = {"linear_dim": 4, "linear_alpha": 2.5, "factor": 4,
          "apply_preset": {"target_module": ["Attention", "FeedForward", "ResnetBlock2D"]}}
LAYER = "mid_block.attentions.0.transformer_blocks.0.attn1.to_k"    # 64 -> 64
CONV = "down_blocks.1.resnets.0.conv1"                              # 32 -> 64, 3x3
FULL = {"block_out_channels": (320, 640, 1280), "layers_per_block": 2, "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20), "cross_attention_dim": 2048, "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816}
TINY = {"block_out_channels": (32, 64, 64), "layers_per_block": 1, "transformer_layers_per_block": 1,
        "attention_head_dim": (1, 2, 2), "cross_attention_dim": 48, "addition_time_embed_dim": 16,
        "projection_class_embeddings_input_dim": 32 + 6 * 16, "norm_num_groups": 16}


def make_unet(dtype=torch.float32, sizes=TINY):
    torch.manual_seed(0)
    return UNet2DConditionModel(
        **sizes, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), use_linear_projection=True,
        addition_embed_type="text_time").to(dtype).requires_grad_(False)


def make_text_encoders():
    torch.manual_seed(0)
    sizes = {"intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "vocab_size": 99, "projection_dim": 16}
    return [kind(CLIPTextConfig(hidden_size=16, **sizes)).eval() for kind in (CLIPTextModel, CLIPTextModelWithProjection)]


def batch():
    draw = torch.Generator().manual_seed(1)
    return [torch.randn(*shape, generator=draw) for shape in ((2, 4, 8, 8), (2, 7, 48), (2, 32), (2, 4, 8, 8))]


def predict(unet, autocast=False):
    noisy, prompt, pooled, _ = (tensor.to(unet.dtype) for tensor in batch())
    cond = {"text_embeds": pooled, "time_ids": torch.full((2, 6), 64.0)}
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        return unet(noisy, torch.tensor([10, 500]), prompt, added_cond_kwargs=cond).sample.float()


def with_noise(network, size=0.05):
    """The adapter as if it had been trained."""
    draw = torch.Generator().manual_seed(7)
    for tensor in adapters.trained(network).values():
        tensor.data += size * torch.randn(tensor.shape, generator=draw)
    return network


KINDS = {kind: Settings(kind, 4, 3.0, "convolutions") for kind in ("lora", "dora", "loha", "lokr")}
KINDS |= {"oft": Settings("oft", 4, targets="convolutions")}
KINDS |= {"rslora": Settings("lora", 4, 3.0, rslora=True), "gaussian": Settings("lora", 4, init="gaussian"),
          "kohya": Settings("lora", 4, 1.0, "kohya", conv_rank=2, conv_alpha=0.7),
          "dora-rslora": Settings("dora", 4, 3.0, rslora=True), "lokr-factor": Settings("lokr", 2, 3.0, factor=4),
          "pissa": Settings("lora", 4, 8.0, "attention-ff", init="pissa"), "olora": Settings("lora", 4, 8.0, init="olora"),
          "all-linear": Settings("lora", 4, targets="all-linear")}
KINDS |= {f"lycoris-{algo}": Settings("lycoris", lycoris_config=CONFIG | {"algo": algo})
          for algo in ("locon", "loha", "lokr", "glora", "full", "diag-oft")}
KINDS |= {f"lycoris-{algo}-dora": Settings("lycoris", lycoris_config=CONFIG | {"algo": algo, "dora_wd": True})
          for algo in ("locon", "loha", "lokr")}
KINDS |= {"lycoris-scalar": Settings("lycoris", lycoris_config=CONFIG | {"algo": "loha", "use_scalar": True}),
          "lycoris-tucker": Settings("lycoris", lycoris_config=CONFIG | {"algo": "loha", "use_tucker": True}),
          "lycoris-both": Settings("lycoris", lycoris_config=CONFIG | {"algo": "lokr", "decompose_both": True}),
          "lycoris-half": Settings("lycoris", lycoris_config=CONFIG | {"algo": "locon", "multiplier": 0.5}),
          "lycoris-rescaled": Settings("lycoris", lycoris_config=CONFIG | {"algo": "diag-oft", "rescaled": True}),
          "lycoris-norms": Settings("lycoris", lycoris_config=CONFIG | {"algo": "locon", "train_norm": True})}


@pytest.mark.parametrize("kind, bf16", [(kind, False) for kind in KINDS] + [(kind, True) for kind in (
    "lora", "dora", "lokr", "pissa", "lycoris-locon", "lycoris-lokr-dora", "lycoris-glora", "lycoris-full", "lycoris-diag-oft")])
def test_an_adapter_starts_as_nothing_and_learns(kind, bf16):
    unet = make_unet(torch.bfloat16 if bf16 else torch.float32)
    bare = predict(unet, bf16)
    before = {name: tensor.clone() for name, tensor in unet.named_parameters()}
    adapters.add(unet, [], KINDS[kind])
    unet.train()
    assert torch.equal(predict(unet, bf16), bare)
    trained = adapters.trained(unet)
    assert {tensor.dtype for tensor in trained.values()} == {torch.float32}

    optimizer = torch.optim.AdamW(trained.values(), lr=3e-3)
    losses = []
    for _ in range(3):
        loss = F.mse_loss(predict(unet, bf16), batch()[3])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] and losses[0] == F.mse_loss(bare, batch()[3]).item()
    with adapters.without(unet):
        assert torch.equal(predict(unet, bf16), bare)
    assert not torch.equal(predict(unet, bf16), bare)
    assert adapters.trained(unet).keys() == trained.keys()    # the switch leaves no parameter frozen, or thawed
    after = {name.replace(".base_layer", ""): tensor for name, tensor in unet.named_parameters()}
    if kind != "lycoris-full":    # there the weights moved into the adapter
        assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("kind, precision", [(kind, "int8-quanto") for kind in ("dora", "olora", "lycoris-locon", "oft")]
                         + [("dora", "int8-torchao"), ("lycoris-lokr", "int8-torchao")])
def test_a_quantised_base_stays_as_it_is(kind, precision):
    pytest.importorskip(quantize.SCHEMES[precision].module)
    unet = make_unet(torch.bfloat16)
    quantize.apply(unet, precision)
    bare = predict(unet, True)
    adapters.add(unet, [], KINDS[kind])
    assert torch.equal(predict(unet, True), bare)
    with_noise(unet)
    predict(unet, True).square().mean().backward()
    assert all(tensor.grad.isfinite().all() for tensor in adapters.trained(unet).values())
    assert not torch.equal(predict(unet, True), bare)
    with adapters.without(unet):
        assert torch.equal(predict(unet, True), bare)
    other = make_unet(torch.bfloat16)
    quantize.apply(other, precision)
    with pytest.raises(UserError, match="quantised|LyCORIS cannot"):
        adapters.add(other, [], KINDS["lycoris-full"])


# the others make no tensors of another kind
DISTINCT = [kind for kind in KINDS if kind not in ("rslora", "dora-rslora", "gaussian", "all-linear", "olora", "lycoris-half")]


@pytest.mark.parametrize("kind", DISTINCT)
def test_state_is_put_back_bit_for_bit(kind):
    one, two = make_unet(), make_unet()
    adapters.add(one, [], KINDS[kind], seed=1)
    with_noise(one)
    adapters.add(two, [], KINDS[kind], seed=2)
    state = {name: tensor.clone() for name, tensor in adapters.state_dict(one).items()}
    assert any(not torch.equal(tensor, adapters.state_dict(two)[name]) for name, tensor in state.items())
    adapters.load_state_dict(two, state)
    assert torch.equal(predict(one), predict(two))
    assert adapters.trained(one).keys() <= state.keys() and not any("base_layer" in name for name in state)


def test_initial_values_are_of_the_seed_alone():
    def values(seed, before):
        unet = make_unet()
        torch.manual_seed(before)
        adapters.add(unet, [], KINDS["lora"], seed=seed)
        assert torch.initial_seed() == before and torch.equal(torch.rand(3), torch.rand(3, generator=torch.manual_seed(before)))
        return torch.cat([tensor.flatten() for tensor in adapters.trained(unet).values()])

    assert torch.equal(values(1, 5), values(1, 6)) and not torch.equal(values(1, 5), values(2, 5))


def layer_with(settings, name):
    """One layer of the tiny UNet with an adapter of random values, its input, and what it computes without."""
    unet = make_unet()
    weight, bias = unet.get_submodule(name).weight.clone(), unet.get_submodule(name).bias
    adapters.add(unet, [], settings)
    with_noise(unet, 0.3)
    x = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(2)) if name == LAYER else torch.randn(
        2, 32, 6, 6, generator=torch.Generator().manual_seed(2))
    return unet.get_submodule(name), adapters.weights(unet)[name], x, weight, 0 if bias is None else bias


def compute(x, weight, bias):
    return F.linear(x, weight) + bias if weight.ndim == 2 else F.conv2d(x, weight, padding=1) + bias.view(1, -1, 1, 1)


@pytest.mark.parametrize("name", [LAYER, CONV])
@pytest.mark.parametrize("rslora", [False, True])
def test_lora_is_its_formula(name, rslora):
    layer, own, x, weight, bias = layer_with(Settings("lora", 4, 3.0, (name,), rslora=rslora), name)
    down, up = own["lora_down.weight"], own["lora_up.weight"]
    scale = 3 / 4**0.5 if rslora else 3 / 4
    inner = F.linear(x, down) if name == LAYER else F.conv2d(x, down, padding=1)
    outer = F.linear(inner, up) if name == LAYER else F.conv2d(inner, up)
    torch.testing.assert_close(layer(x), compute(x, weight, bias) + scale * outer, rtol=1e-5, atol=1e-5)
    assert own["alpha"].item() == pytest.approx(scale * 4)
    torch.testing.assert_close(layer(x), compute(x, weight + adapter_merge.delta(own, weight)[0], bias), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [LAYER, CONV])
def test_dora_is_magnitude_times_direction(name):
    layer, own, x, weight, bias = layer_with(Settings("dora", 4, 3.0, (name,)), name)
    moved = weight.flatten(1) + 3 / 4 * own["lora_up.weight"].flatten(1) @ own["lora_down.weight"].flatten(1)
    rows = torch.stack([row / row.square().sum().sqrt() for row in moved]) * own["dora_scale"].reshape(-1, 1)
    torch.testing.assert_close(layer(x), compute(x, rows.reshape(weight.shape), bias), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(weight + adapter_merge.delta(own, weight)[0], rows.reshape(weight.shape), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", [LAYER, CONV])
@pytest.mark.parametrize("through", ["peft", "lycoris"])
def test_loha_and_lokr_are_their_formulas(name, through):
    for kind in ("loha", "lokr"):
        config = {"algo": kind, "linear_dim": 3, "linear_alpha": 2.0, "factor": 4, "apply_preset": {"target_module": [],
                  "target_name": [name.replace(".", r"\.") + "$"]}}
        settings = Settings(kind, 3, 2.0, (name,), factor=4 if kind == "lokr" else -1)
        settings = settings if through == "peft" else Settings("lycoris", lycoris_config=config)
        layer, own, x, weight, bias = layer_with(settings, name)
        if kind == "loha":
            left, right = (sum(torch.outer(own[f"hada_w{n}_a"][:, i], own[f"hada_w{n}_b"][i]) for i in range(3)) for n in (1, 2))
            update = left * right
        else:
            first, second = own["lokr_w1"], (own["lokr_w2_a"] @ own["lokr_w2_b"]).reshape(16, -1, *weight.shape[2:])
            update = torch.zeros_like(weight)
            for i, j in torch.cartesian_prod(torch.arange(len(first)), torch.arange(first.shape[1])):    # block by block
                update[16 * i:16 * (i + 1), second.shape[1] * j:second.shape[1] * (j + 1)] = first[i, j] * second
        new = weight + 2 / 3 * update.reshape(weight.shape)
        torch.testing.assert_close(layer(x), compute(x, new, bias), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(weight + adapter_merge.delta(own, weight)[0], new, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", [LAYER, CONV])
def test_oft_turns_outputs_in_blocks(name):
    layer, own, x, weight, bias = layer_with(Settings("oft", 4, targets=(name,)), name)
    assert own["oft_blocks"].shape == (16, 4, 4)
    new = weight.clone()
    for block, values in enumerate(own["oft_blocks"].double()):
        skew, eye = values - values.T, torch.eye(4, dtype=torch.double)
        turn = (eye + skew) @ torch.linalg.inv(eye - skew)
        torch.testing.assert_close(turn @ turn.T, eye)    # a rotation
        new[4 * block:4 * block + 4] = torch.einsum("nm,n...->m...", turn, weight[4 * block:4 * block + 4].double()).float()
    torch.testing.assert_close(layer(x), compute(x, new, bias), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(weight + adapter_merge.delta(own, weight)[0], new, rtol=1e-4, atol=1e-5)


def test_glora_and_full_are_their_formulas():
    for algo in ("glora", "full"):
        config = {"algo": algo, "linear_dim": 4, "linear_alpha": 3.0,
                  "apply_preset": {"target_module": [], "target_name": [LAYER.replace(".", r"\.") + "$"]}}
        layer, own, x, weight, bias = layer_with(Settings("lycoris", lycoris_config=config), LAYER)
        update = own["diff"] if algo == "full" else 3 / 4 * (
            weight @ own["a1.weight"] @ own["a2.weight"] + own["b1.weight"] @ own["b2.weight"])
        torch.testing.assert_close(layer(x), compute(x, weight + update, bias), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("algo, factors", [("locon", 2), ("loha", 4), ("lokr", 3), ("glora", 2)])
def test_lycoris_loses_no_small_update_on_a_bf16_base(algo, factors):
    config = {"algo": algo, "linear_dim": 1, "linear_alpha": 1.0, "factor": 8,
              "apply_preset": {"target_module": [], "target_name": [LAYER.replace(".", r"\.") + "$"]}}
    unet = make_unet(torch.bfloat16)
    layer = unet.get_submodule(LAYER)
    layer.weight.data.fill_(1)    # where the next bfloat16 is 1.0078
    adapters.add(unet, [], Settings("lycoris", lycoris_config=config))
    for tensor in with_noise(unet, 1.0).lycoris.parameters():
        tensor.data.mul_(1e-3 ** (1 / factors) / tensor.abs().max())    # so that no update exceeds 0.001
    own = adapters.weights(unet)[LAYER]
    x = torch.tensor([1.0, -1.0]).repeat(3, 32).to(torch.bfloat16)    # of which the weight itself makes 0
    want = F.linear(x.float(), adapter_merge.delta(own, layer.weight)[0])
    assert 1e-4 < want.abs().max() < 0.1
    torch.testing.assert_close(layer(x).float(), want, rtol=0.05, atol=want.abs().max().item() * 0.02)


def test_pissa_starts_from_the_largest_parts():
    unet = make_unet()
    weight = unet.get_submodule(LAYER).weight.clone()
    adapters.add(unet, [], Settings("lora", 4, 2.0, (LAYER,), init="pissa"))
    layer = unet.get_submodule(LAYER)
    u, s, v = torch.linalg.svd(weight)
    torch.testing.assert_close(2 / 4 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight, u[:, :4] * s[:4] @ v[:4],
                               rtol=1e-4, atol=1e-6)
    assert torch.equal(layer.base_layer.weight, weight)
    assert {name.rsplit(".", 2)[1] + "." + name.rsplit(".", 1)[1] for name in adapters.trained(unet)} == {"default.weight"}
    assert adapters.weights(unet)[LAYER]["lora_down.weight"].shape == (8, 64)


def test_loraplus_moves_the_up_matrix_faster():
    unet = make_unet()
    adapters.add(unet, [], Settings("lora", 4, targets=(LAYER,)))
    with_noise(unet)
    groups = adapters.parameter_groups({"unet": unet}, {"unet": 0.01}, Rates(loraplus_unet=16))
    assert [(group["name"], group["lr"]) for group in groups] == [("unet", 0.01), ("unet up", 0.16)]
    before = {name: tensor.clone() for name, tensor in adapters.trained(unet).items()}
    predict(unet).square().mean().backward()
    torch.optim.SGD(groups).step()
    for name, tensor in adapters.trained(unet).items():
        rate = 0.16 if "lora_B" in name else 0.01
        torch.testing.assert_close(tensor, before[name] - rate * tensor.grad)
    for settings in (KINDS["loha"], KINDS["oft"]):
        other = make_unet()
        adapters.add(other, [], settings)
        with pytest.raises(UserError, match="LoRA.*up matri"):
            adapters.parameter_groups({"unet": other}, {"unet": 0.01}, Rates(loraplus_unet=16))


@pytest.mark.parametrize("kind", ["lora", "lycoris-lokr", "oft"])
def test_block_rates(kind):
    unet = make_unet()
    adapters.add(unet, [], KINDS[kind])
    total = len(adapters.trained(unet))
    factors = block_rates("0,0,0,0,0.5,1", "0,2,0", None, unet_config=unet.config)    # 6, 3 and 6 blocks
    groups = adapters.parameter_groups({"unet": unet}, {"unet": 0.1}, Rates(blocks=factors))
    rates = {group["name"]: group["lr"] for group in groups}
    samplers = {} if kind.startswith("lycoris") else {"unet 5": 0.05}    # that configuration has none of them
    assert rates == pytest.approx(samplers | {"unet 6": 0.1, "unet 8": 0.2} | {f"unet {n}": 0.1 for n in range(10, 16)})
    assert sum(len(group["params"]) for group in groups) == len(adapters.trained(unet)) < total
    for name in adapters.trained(unet):
        module = lycoris.module_of(unet, name)
        assert not module.startswith(("down_blocks.0", "down_blocks.1.resnets", "down_blocks.1.att", "mid_block.resnets"))
    with pytest.raises(UserError, match="9 blocks"):
        adapters.parameter_groups({"unet": unet}, {"unet": 0.1}, Rates(blocks=(1.0,) * 9))


def test_shapes_of_block_rates():
    count = len(block_rates("zeros", None, None))
    assert count == 23
    factors = block_rates("cosine+0.25", "0.5,0.1,2", "reverse_linear", zero_threshold=0.2)
    for i in range(9):
        assert factors[1 + i] == pytest.approx(math.cos(math.pi / 2 * i / 8) + 0.25)
        assert factors[13 + i] == (pytest.approx(1 - i / 8) if 1 - i / 8 > 0.2 else 0)
    assert factors[10:13] == (0.5, 0.0, 2.0) and factors[0] == factors[22] == 1
    assert block_rates("sine", None, "linear")[1:10] == pytest.approx([math.sin(math.pi / 2 * i / 8) for i in range(9)])
    assert block_rates(None, None, None) is None
    for wrong in ({"down": "1,2"}, {"down": "cosin"}, {"mid": "cosine"}, {"up": "1,1,1,1,1,1,1,1,-1"}):
        with pytest.raises(UserError, match=f"{next(iter(wrong))}_lr_weight"):
            block_rates(**({"down": None, "mid": None, "up": None} | wrong))


def test_blocks_are_counted_as_kohya_counts():
    names = {"time_embedding.linear_1": 0, "add_embedding.linear_2": 0, "conv_in": 1, "down_blocks.0.resnets.0.conv1": 2,
             "down_blocks.0.downsamplers.0.conv": 4, "down_blocks.1.attentions.1.proj_in": 6, "down_blocks.2.resnets.1.conv2": 9,
             "mid_block.attentions.0.proj_out": 11, "up_blocks.0.resnets.0.conv1": 13, "up_blocks.0.upsamplers.0.conv": 15,
             "up_blocks.2.resnets.2.conv1": 21, "conv_out": 22, "text_model.encoder": None}
    assert {name: block_of(name, SDXL_UNET) for name in names} == names


def full_unet():
    with torch.device("meta"):
        return make_unet(sizes=FULL)


def test_kohyas_arguments():
    settings, rates = from_kohya("networks.lora", 8, 4, {"conv_dim": "4", "conv_alpha": "2.5", "rank_dropout": "0.1",
                                                          "module_dropout": "0.2", "loraplus_unet_lr_ratio": "4"}, 0.05)
    assert (settings.rank, settings.alpha, settings.conv_rank, settings.conv_alpha, settings.targets) == (8, 4, 4, 2.5, "kohya")
    assert (settings.dropout, settings.rank_dropout, settings.module_dropout) == (0.05, 0.1, 0.2)
    assert rates == Rates(4.0, 1.0)
    assert from_kohya("networks.lora", None, None, {})[0] == Settings("lora", 4, 1.0, "kohya")
    settings, rates = from_kohya("lycoris.kohya", 16, 8, {"algo": "lokr", "factor": "8", "dora_wd": "True", "preset": "attn-mlp",
                                                           "loraplus_lr_ratio": "2"})
    assert settings.lycoris_config == {"linear_dim": 16, "linear_alpha": 8, "algo": "lokr", "factor": 8, "dora_wd": True,
                                       "preset": "attn-mlp"} and rates == Rates(2.0, 2.0)
    for module, arguments, word in (
            ("networks.lora_fa", {}, "networks.lora"), ("networks.lora", {"conv_dims": "3"}, "conv_dim"),
            ("networks.lora", {"block_dims": "1,2"}, "23"), ("networks.lora", {"conv_dim": "x"}, "conv_dim")):
        with pytest.raises(UserError, match=word):
            from_kohya(module, 4, 1, arguments)


def test_kohyas_block_dims():
    dims, convs = [n % 5 for n in range(23)], [n % 3 for n in range(23)]
    text = {name: ",".join(map(str, values)) for name, values in (("block_dims", dims), ("conv_block_dims", convs))}
    unet = full_unet()
    chosen = adapters.targets(unet, from_kohya("networks.lora", 4, 2.0, text)[0])
    for name, module in unet.named_modules():
        large = isinstance(module, torch.nn.Conv2d) and module.kernel_size == (3, 3)
        if any(part in name for part in ("attentions", "resnets", "samplers")) and isinstance(
                module, (torch.nn.Linear, torch.nn.Conv2d)):
            rank = (convs if large else dims)[block_of(name, SDXL_UNET)]
            assert chosen.get(name, (0, None)) == ((rank, 1.0 if large else 2.0) if rank else (0, None)), name
    only = adapters.targets(unet, from_kohya("networks.lora", 4, 1, {"block_dims": text["block_dims"]})[0])
    assert not any("resnets" in name for name in only) and {rank for rank, _ in only.values()} == {1, 2, 3, 4}
    zeros = adapters.targets(unet, from_kohya("networks.lora", 4, 1, {"mid_lr_weight": "0,0,0", "down_lr_weight": "zeros"})[0])
    assert {name.split(".")[0] for name in zeros} == {"up_blocks"}


def test_presets():
    unet, count = full_unet(), {}
    for preset in ("attention", "attention-ff", "kohya", "convolutions", "all-linear"):
        count[preset] = len(adapters.targets(unet, Settings(targets=preset)))
    # 70 transformer blocks of 8 projections and 2 more of the feed-forward; 11 times in and out; 17 resnets, 11 with a shortcut
    assert count == {"attention": 560, "attention-ff": 700, "kohya": 722, "convolutions": 722 + 34 + 11 + 4,
                     "all-linear": 722 + 17 + 4}
    assert len(adapters.targets(unet, Settings(targets="kohya", conv_rank=4))) == 722 + 17 + 34 + 11 + 4
    assert len(adapters.targets(unet, Settings(targets="attention", conv_rank=4))) == 560 + 34 + 4
    two = adapters.targets(unet, Settings(rank=8, alpha=4, targets=("to_q", "mid_block.attentions.0.proj_in"),
                                          rank_pattern={"mid_block": 2, r"attn\d": 6}, alpha_pattern={"attn2": 1.5}))
    assert two["mid_block.attentions.0.proj_in"] == (2, 4) and len(two) == 141
    assert two["up_blocks.0.attentions.0.transformer_blocks.0.attn2.to_q"] == (6, 1.5)


def test_text_encoders():
    unet, encoders = make_unet(), make_text_encoders()
    ids = torch.arange(14).reshape(2, 7)
    bare = [encoder(ids, output_hidden_states=True).hidden_states[-2] for encoder in encoders]
    adapters.add(unet, encoders, Settings("lora", 4, targets=("to_q",), conv_rank=None), Settings("lora", 2, targets="kohya"))
    assert all(torch.equal(encoder(ids, output_hidden_states=True).hidden_states[-2], was)
               for encoder, was in zip(encoders, bare, strict=True))
    assert [len(adapters.weights(encoder)) for encoder in encoders] == [18, 18]
    assert not any("layers.2." in name for name in adapters.trained(encoders[0]))    # SDXL does not read it
    assert any("layers.2." in name for name in adapters.trained(encoders[1]))
    loss = sum(encoder(ids, output_hidden_states=True).hidden_states[-2].square().mean() for encoder in encoders)
    (loss + encoders[1](ids).text_embeds.square().mean()).backward()
    assert all(tensor.grad is not None for encoder in encoders for tensor in adapters.trained(encoder).values())
    networks = dict(zip(("unet", "text_encoder", "text_encoder_2"), (unet, *encoders), strict=True))
    groups = adapters.parameter_groups(networks, {"unet": 1e-4, "text_encoder": 0.0, "text_encoder_2": 1e-5}, Rates(1, 8))
    assert [(group["name"], group["lr"]) for group in groups] == [
        ("unet", 1e-4), ("text_encoder_2", 1e-5), ("text_encoder_2 up", pytest.approx(8e-5))]
    with adapters.without(encoders[1]):
        assert torch.equal(encoders[1](ids, output_hidden_states=True).hidden_states[-2], bare[1])
    other = make_text_encoders()
    adapters.add(make_unet(), other, KINDS["kohya"])    # the same preset; convolutions are the UNet's
    assert len(adapters.weights(other[0])) == 18
    third = make_text_encoders()
    adapters.add(None, third, Settings("lycoris", lycoris_config={"algo": "lokr", "preset": "attn-mlp", "linear_dim": 2}))
    assert len(adapters.weights(third[0])) == 18 and not any("layers_2_" in name for name in adapters.trained(third[0]))


def test_dropout_of_ranks_and_modules():
    unet = make_unet()
    adapters.add(unet, [], Settings("lora", 4, targets=(LAYER, CONV), rank_dropout=0.5))
    with_noise(unet, 0.5)
    for name, x in ((LAYER, torch.randn(64, 3, 64)), (CONV, torch.randn(64, 32, 6, 6))):
        layer = unet.get_submodule(name).train()
        down = layer.lora_A["default"]
        dropped, whole = down(x), F.linear(x, down.weight) if name == LAYER else F.conv2d(x, down.weight, padding=1)
        ratio = (dropped / whole).movedim(1 if name == CONV else -1, 1).flatten(2)    # [B, r, ...]: one draw a sample and rank
        assert torch.all((ratio - ratio[..., :1]).abs() < 1e-4)
        assert {round(value) for value in ratio[..., 0].unique().tolist()} == {0, 2}
        assert 0.3 < (ratio[..., 0] == 0).float().mean() < 0.7
        assert torch.equal(down.eval()(x), whole)
    unet = make_unet()
    adapters.add(unet, [], Settings("lora", 4, targets=(LAYER,), module_dropout=0.5))
    layer, x = with_noise(unet).get_submodule(LAYER).train(), torch.randn(2, 3, 64)
    off = [torch.equal(layer(x), layer.base_layer(x)) for _ in range(64)]
    assert 10 < sum(off) < 54


def wrong_lycoris(**config):
    return Settings("lycoris", lycoris_config=config)


@pytest.mark.parametrize("settings, word", [
    (Settings("loar"), "did you mean lora"), (Settings(rank=0), "rank"), (Settings(alpha=0), "alpha"),
    (Settings(alpha=-1), "alpha"), (Settings(conv_rank=0), "conv_rank"), (Settings(alpha_pattern={"to_q": 0}), "to_q"),
    (Settings(dropout=1.0), "dropout"), (Settings(targets="atention"), "did you mean attention"),
    (Settings(init="pisa"), "did you mean pissa"), (Settings("lycoris"), "lycoris_config"),
    (Settings(lycoris_config={}), "lycoris_config"), (Settings("dora", rank_dropout=0.1), "rank_dropout"),
    (Settings("oft", dropout=0.1), "dropout"), (Settings("loha", rslora=True), "rslora"),
    (Settings("dora", init="pissa"), "pissa"), (Settings("loha", init="gaussian"), "gaussian"),
    (Settings(init="olora", dropout=0.1), "olora"), (Settings("oft", alpha=1.0), "alpha"), (Settings(factor=4), "factor"),
    (Settings(targets=("to_z",)), "did you mean to_[qkv]"),
    (Settings(targets=("attn1.to_x",)), r"attn1\.to_x; did you mean attn1\.to_"), (Settings(targets=("norm1",)), "norm1"),
    (Settings(targets=("to_q",), conv_rank=4), "conv_rank"), (Settings(targets=("to_q",), rank_pattern={"to_q": 0}), "no layer"),
    (Settings(targets="convolutions", init="pissa"), "conv"), (Settings(rank=99, init="pissa"), "rank 99"),
    (wrong_lycoris(algo="dylora"), "dylora"), (wrong_lycoris(alg="lora"), "did you mean algo"),
    (wrong_lycoris(linear_alpha=0), "linear_alpha"), (wrong_lycoris(linear_dim=0), "linear_dim"),
    (wrong_lycoris(linear_dim=2.5), "whole"), (wrong_lycoris(wd_on_output=False), "wd_on_output"),
    (wrong_lycoris(preset="atn-mlp"), "no preset 'atn-mlp'; did you mean attn-mlp"),
    (wrong_lycoris(preset="attn-mlp", apply_preset={"target_module": ["Attention"]}), "preset and apply_preset both say"),
    (wrong_lycoris(apply_preset={"target_module": ["Attentions"]}), "Attention, "),
    (wrong_lycoris(apply_preset={"target_modules": ["Attention"]}), "target_modules"),
    (wrong_lycoris(apply_preset={"module_algo_map": {"Attention": {"algo": "ia3"}}}), "ia3")])
def test_what_cannot_be_is_refused_before_anything_changes(settings, word):
    unet = make_unet()
    names = [name for name, _ in unet.named_parameters()]
    with pytest.raises(UserError, match=word):
        adapters.add(unet, [], settings)
    assert names == [name for name, _ in unet.named_parameters()] and not hasattr(unet, "peft_config")


def test_one_adapter_at_a_time_and_its_own_state():
    unet = make_unet()
    adapters.add(unet, [], KINDS["lora"])
    with pytest.raises(UserError, match="already"):
        adapters.add(unet, [], KINDS["lora"])
    other = make_unet()
    adapters.add(other, [], Settings("lora", 8))
    with pytest.raises(UserError, match="another one"):
        adapters.load_state_dict(unet, adapters.state_dict(other))
    with pytest.raises(UserError, match="nothing would be trained"):
        adapters.parameter_groups({"unet": unet}, {"unet": 0.0})


def test_lycoris_keeps_nothing_from_one_network_to_the_next():
    for preset, count in (({"target_module": ["Attention"]}, 56), ({"target_module": ["FeedForward"]}, 14)):
        unet = make_unet()
        adapters.add(unet, [], Settings("lycoris", lycoris_config={"algo": "locon", "apply_preset": preset}))
        assert len(adapters.weights(unet)) == count
    unet = make_unet()
    adapters.add(unet, [], Settings("lycoris", lycoris_config={"algo": "locon", "linear_dim": 2, "conv_dim": 1}))    # all layers
    assert len(adapters.weights(unet)) == sum(isinstance(m, (torch.nn.Linear, torch.nn.Conv2d)) for m in make_unet().modules())


def test_the_example_is_a_configuration():
    unet = make_unet()
    config = json.loads((REPOSITORY / "config/lycoris_config.json.example").read_text())
    adapters.add(unet, [], Settings("lycoris", lycoris_config=config))
    assert len(adapters.weights(unet)) == 56 + 14


def test_multiplier_and_alpha_are_kept_as_written():
    unet = make_unet()
    adapters.add(unet, [], KINDS["lycoris-half"])
    assert unet.lycoris.multiplier == 0.5 and {own["alpha"].item() for own in adapters.weights(unet).values()} == {2.5}
    check(KINDS["lycoris-half"])


def test_import_before_diffusers_finds_peft():
    """library.training.imports hides PEFT from diffusers, which looks once: the order of imports matters."""
    code = ("from library.models import adapters\nfrom library.training.imports import lean\nwith lean():\n"
            "    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel\n"
            "from diffusers.utils import is_peft_available\nassert is_peft_available()")
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True)
