"""Activations in main memory: what is sent there, what is not, and that no gradient changes."""

import peft
import pytest
import torch
from diffusers import UNet2DConditionModel

from library.errors import UserError
from library.models import quantize
from library.training import offload


def network():
    torch.manual_seed(0)
    layers = [torch.nn.Linear(256, 256), torch.nn.GELU(), torch.nn.Linear(256, 256), torch.nn.GELU(), torch.nn.Linear(256, 4)]
    return torch.nn.Sequential(*layers)


@pytest.fixture
def sent(monkeypatch):
    """The shapes of what is copied to main memory."""
    shapes, empty = [], torch.empty

    def watched(size, **options):
        if "pin_memory" in options:
            shapes.append(tuple(size))
            options.pop("pin_memory")    # needs a device
        return empty(size, **options)

    monkeypatch.setattr(offload.torch, "empty", watched)
    return shapes


@pytest.mark.parametrize("pin", [False, True])
def test_gradients_are_the_same_bits(pin, sent):
    x = torch.randn(128, 256)
    grads = []
    for context in (torch.enable_grad(), offload.to_main_memory(model := network(), pin)):
        model.zero_grad()
        with context:
            loss = model(x).square().mean()
        loss.backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    assert sent and all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_weights_stay(sent):
    """Autograd saves weights too, and views of them: of the size of activations, but never sent."""
    model = network().requires_grad_(False)
    x = torch.randn(100, 256, requires_grad=True)    # 100 rows: no weight has them
    with offload.to_main_memory(model, pin=False):
        loss = model(x).square().mean()
    loss.backward()
    assert set(sent) == {(100, 256)} and x.grad.abs().sum() > 0


def test_small_tensors_stay(sent):
    x = torch.randn(1, 256, requires_grad=True)
    with offload.to_main_memory(torch.nn.Identity(), pin=False):
        (x * x).sum().backward()
    assert not sent and torch.equal(x.grad, 2 * x)


def test_tensors_of_other_kinds_stay(sent):
    """A quantised or sharded tensor has no storage that could be copied."""
    class Other(torch.Tensor):
        pass

    x = torch.randn(128, 512, requires_grad=True)
    with offload.to_main_memory(torch.nn.Identity(), pin=False):
        product = x * torch.ones(128, 512).as_subclass(Other)
    product.sum().backward()
    assert not sent and torch.equal(x.grad.as_subclass(torch.Tensor), torch.ones(128, 512))


def test_what_was_written_afterwards_does_not_show():
    """The copy is of the moment at which it was made: a later write in place is without effect."""
    x = torch.full((64, 512), 3.0, requires_grad=True)
    with offload.to_main_memory(torch.nn.Identity(), pin=False):
        y = x * 1
        z = y.exp()    # saves its result
    with torch.no_grad():
        z_before = z.clone()
    z.sum().backward()
    assert torch.equal(x.grad, z_before)


@pytest.mark.parametrize("precision", ["no_change", "int8-torchao", "int8-quanto", "nf4-bnb"])
def test_under_gradient_checkpointing_with_adapters(precision, tiny_model, sent, monkeypatch):
    """The UNet with LoRA: the same gradients, inputs of blocks are sent, quantised weights are not."""
    package = quantize.SCHEMES[precision].module.split(".")[0] if precision != "no_change" else "torch"
    pytest.importorskip(package)
    monkeypatch.setattr(offload, "SMALL", 0)
    torch.manual_seed(0)
    unet = UNet2DConditionModel.from_pretrained(tiny_model / "unet").requires_grad_(False)
    quantize.apply(unet, precision)
    peft.inject_adapter_in_model(peft.LoraConfig(r=4, target_modules=["to_q", "to_v"], init_lora_weights=False), unet)
    unet.train().enable_gradient_checkpointing()
    inputs = torch.randn(2, 4, 8, 8), torch.tensor([10, 700]), torch.randn(2, 77, 48)
    cond = {"text_embeds": torch.randn(2, 32), "time_ids": torch.tensor([[64., 64, 0, 0, 64, 64]] * 2)}
    grads = []
    for context in (torch.enable_grad(), offload.to_main_memory(unet, pin=False)):
        unet.zero_grad()
        assert not sent
        with context:
            loss = unet(*inputs, added_cond_kwargs=cond).sample.square().mean()
        loss.backward()
        grads.append([p.grad.clone() for p in unet.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    assert (2, 64, 4, 4) in sent or (2, 16, 64) in sent    # what enters a block
    weights = {tuple(p.shape) for p in unet.parameters() if p.ndim > 1}
    assert not weights & set(sent)


@pytest.mark.parametrize("wanted", [False, True])
def test_a_cpu_has_nothing_to_send(wanted, sent):
    model = network()
    with offload.activations(wanted, model, "cpu"):
        model(torch.randn(128, 256)).sum().backward()
    assert not sent


@pytest.mark.parametrize(("device", "pins"), [("cuda", True), ("npu", True), ("xpu", True)])
def test_on_other_devices(device, pins, monkeypatch):
    asked = []
    monkeypatch.setattr(offload, "to_main_memory", lambda network, pin: asked.append(pin))
    offload.activations(False, network(), device)
    offload.activations(True, network(), device)
    assert asked == [pins]


@pytest.mark.parametrize(("device", "reason"), [("cpu", "in main memory already"), ("mps", "memory is main memory")])
def test_refused_where_it_frees_nothing(device, reason):
    offload.check(False, device)
    with pytest.raises(UserError, match=f"--offload_activations: .*{reason}"):
        offload.check(True, device)


@pytest.mark.parametrize("device", ["cuda", "npu", "xpu"])
def test_allowed_elsewhere(device):
    offload.check(True, device)
