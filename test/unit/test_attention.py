"""Every attention computes what diffusers' own does, in each layer that there is, and a kernel that is not called is noticed.

xformers, flash-attn and SageAttention are stubs here: they take the layouts of the real ones and compute by PyTorch.
"""

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import tiny
import torch
import torch.nn.functional as F
from diffusers import SD3Transformer2DModel, UNet2DConditionModel

from library.errors import UserError
from library.models import attention
from library.training import devices

FAMILIES = ("sdxl", *tiny.SD3)


@pytest.fixture(scope="module")
def networks(tiny_model):
    """{family: a small network of it}, with random norms: those of a fresh one are all 1."""
    made = {"sdxl": UNet2DConditionModel.from_pretrained(tiny_model, subfolder="unet")}
    for flavour, options in tiny.SD3.items():
        torch.manual_seed(0)
        made[flavour] = SD3Transformer2DModel(
            sample_size=8, patch_size=2, in_channels=16, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=64,
            caption_projection_dim=32, pooled_projection_dim=48, out_channels=16, **options)
        for name, parameter in made[flavour].named_parameters():
            if ".norm_" in name:
                torch.nn.init.uniform_(parameter, 0.5, 2.0)
    return made


def ask(network, dtype=None, **more) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """What a network says of a 12 x 8 latent, and the gradients of the sum of its squares."""
    draw = torch.Generator().manual_seed(1)
    t = torch.tensor([3.0, 700.0])
    if isinstance(network, UNet2DConditionModel):
        given = (torch.randn(2, 4, 12, 8, generator=draw), t, torch.randn(2, 7, 48, generator=draw))
        more["added_cond_kwargs"] = {"text_embeds": torch.randn(2, 32, generator=draw),
                                     "time_ids": torch.rand(2, 6, generator=draw)}
    else:
        given = (torch.randn(2, 16, 12, 8, generator=draw), torch.randn(2, 7, 64, generator=draw),
                 torch.randn(2, 48, generator=draw), t)
    network.zero_grad()
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        out = network(*given, **more).sample
    if out.requires_grad:
        out.float().square().sum().backward()
    return out.detach(), {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}


@pytest.fixture
def changed(networks):
    """`changed(family, ...)`: the network with another attention, which is put back at the end."""
    before = {name: network.attn_processors for name, network in networks.items()}

    def changed(family, mechanism, usage="inference", train=True):
        attention.set_attention(networks[family].train(train), mechanism, usage)
        return networks[family]

    yield changed
    for name, network in networks.items():
        network.set_attn_processor(before[name])
        network._forward_hooks.clear()


@pytest.fixture
def stubs(monkeypatch):
    """What was called: [(package, shape of the queries, whether there was a mask)]."""
    called = []

    def computed(package, q, k, v, mask=None):
        assert q.dtype == k.dtype == v.dtype, "the real ones refuse two types"
        called.append((package, tuple(q.shape), mask is not None))
        return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=mask).transpose(1, 2)

    def flash_attn_func(q, k, v):
        return computed("flash", q, k, v)

    def memory_efficient_attention(q, k, v, attn_bias=None):
        if attn_bias is not None:
            assert attn_bias.shape == (len(q), q.shape[2], q.shape[1], k.shape[1]) and attn_bias.dtype == q.dtype
            assert attn_bias.stride(2) % 8 == 0
        return computed("xformers", q, k, v, attn_bias)

    @torch.no_grad()
    def sageattn(q, k, v, tensor_layout):
        assert tensor_layout == "HND"
        return computed("sageattention", *(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

    for name, content in (("flash_attn", {"flash_attn_func": flash_attn_func}), ("sageattention", {"sageattn": sageattn}),
                          ("xformers", {}), ("xformers.ops", {"memory_efficient_attention": memory_efficient_attention})):
        module = ModuleType(name)
        module.__spec__, module.__path__ = ModuleSpec(name, None), []
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    return called


def assert_same(ours, theirs, tolerance: float = 0.0) -> None:
    """tolerance: of the norm of each tensor."""
    assert ours[1].keys() == theirs[1].keys() and len(ours[1]) > 50
    for name, value in ({"": theirs[0]} | theirs[1]).items():
        mine = ours[1][name] if name else ours[0]
        assert (mine - value).float().norm() <= tolerance * value.float().norm(), name


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_processor_computes_what_diffusers_does(networks, changed, family, dtype):
    usual = ask(networks[family], dtype)
    # in bfloat16, SD 3.5's norms make the tensors lie otherwise in memory, and another product of matrices rounds otherwise
    assert_same(ask(changed(family, "sdpa"), dtype), usual, 0 if dtype is None else 0.03)


@pytest.mark.parametrize("mechanism", ["flash", "xformers", "sageattention"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_kernel_is_called_in_every_layer_and_changes_nothing(networks, changed, stubs, family, mechanism):
    usual = ask(changed(family, "sdpa"), torch.bfloat16)
    network = changed(family, mechanism, "training+inference")
    assert_same(ask(network, torch.bfloat16), usual)    # sageattn has no gradient of its own: it would be missing here
    heads = {shape[2] for _, shape, _ in stubs}
    assert len(stubs) == len(network.attn_processors) and heads <= {1, 2} and {name for name, *_ in stubs} == {mechanism}
    network.enable_gradient_checkpointing()
    assert_same(ask(network, torch.bfloat16), usual)
    network.disable_gradient_checkpointing()


@pytest.mark.parametrize("usage, in_training, in_validation", [
    ("inference", False, True), ("training", True, False), ("training+inference", True, True)])
def test_when_sageattention_is_used(changed, stubs, usage, in_training, in_validation):
    network = changed("sdxl", "sageattention", usage)
    for train, wanted in ((True, in_training), (False, in_validation)):
        stubs.clear()
        with torch.no_grad():
            ask(network.train(train), torch.bfloat16)
        assert bool(stubs) == wanted


@pytest.mark.parametrize("mechanism", ["sdpa", "xformers"])
def test_masks(networks, changed, stubs, mechanism):
    mask = torch.tensor([[1, 1, 1, 0, 0, 1, 0], [1] * 7])
    usual = ask(networks["sdxl"], encoder_attention_mask=mask)
    ours = ask(changed("sdxl", mechanism), encoder_attention_mask=mask)
    assert_same(ours, usual)
    assert not torch.equal(ours[0], ask(networks["sdxl"])[0])
    if mechanism == "xformers":
        q, k, v = (torch.randn(2, 2, length, 8) for length in (5, 7, 7))
        seen = torch.rand(2, 1, 1, 7) > 0.5
        seen[..., 0] = True
        torch.testing.assert_close(devices.attention("xformers")(q, k, v, seen), devices.sdpa(q, k, v, seen))


@pytest.mark.parametrize("mechanism", ["flash", "sageattention"])
def test_a_kernel_without_masks_refuses_them(changed, stubs, mechanism):
    with pytest.raises(UserError, match="takes no mask"):
        ask(changed("sdxl", mechanism, "training"), encoder_attention_mask=torch.ones(2, 7))


@pytest.mark.parametrize("family", ["sdxl", "medium"])
def test_a_kernel_that_is_not_called_is_noticed(networks, changed, stubs, monkeypatch, family):
    """As with diffusers' set_attention_backend, which has no effect on these networks."""
    network = networks[family]
    monkeypatch.setattr(network, "set_attn_processor", lambda processor: None)
    with pytest.raises(UserError, match=f"flash was called by 0 of the {len(network.attn_processors)} attention layers"):
        ask(changed(family, "flash"))


def test_the_check_is_of_the_first_pass_alone(changed, stubs):
    network = changed("sdxl", "sageattention")    # in validation: passes of training say nothing
    with torch.no_grad():
        ask(network)
        assert len(network._forward_hooks) == 1
        ask(network.eval())
    assert not network._forward_hooks


def test_a_kernel_is_tried_before_anything_is_loaded(stubs, monkeypatch):
    cpu = torch.device("cpu")
    for mechanism in ("default", "sdpa"):
        devices.try_attention(mechanism, "no", cpu)
    assert not stubs
    for mechanism in ("flash", "xformers", "sageattention"):
        devices.try_attention(mechanism, "bf16", cpu)
    assert [name for name, *_ in stubs] == ["flash", "xformers", "sageattention"]
    monkeypatch.setattr(sys.modules["flash_attn"], "flash_attn_func", lambda q, k, v: F.scaled_dot_product_attention(q, k, v))
    with pytest.raises(UserError, match="flash is .* away from PyTorch's attention"):
        devices.try_attention("flash", "bf16", cpu)    # another layout
    monkeypatch.delattr(sys.modules["flash_attn"], "flash_attn_func")
    with pytest.raises(UserError, match="flash does not run on cpu.*flash_attn_func"):
        devices.try_attention("flash", "bf16", cpu)


def test_a_run_with_another_attention(train, stubs, monkeypatch):
    """The flags reach the network: training with PyTorch's attention, validation with Sage's."""
    for name in ("sageattention", "flash"):
        monkeypatch.setitem(devices.ATTENTION, name, devices.ATTENTION[name]._replace(devices=("cpu",)))
    common = ("--mixed_precision=bf16", "--max_train_steps=1")
    drawn = ("--validation_prompt=a cat", "--num_validation_images=1", "--validation_num_inference_steps=1",
             "--validation_guidance=1")
    for mechanism, *flags in (("flash",), ("sageattention", *drawn), ("sageattention", "--sageattention_usage=training")):
        stubs.clear()
        train(*common, f"--attention_mechanism={mechanism}", *flags)
        assert len(stubs) == 1 + 22    # what it is tried with, and two layers in each of eleven blocks
        assert {name for name, *_ in stubs} == {mechanism}
