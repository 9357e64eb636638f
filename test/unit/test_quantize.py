"""Quantised bases on a CPU: their memory, their error, and that adapters on top learn what they learn on the bf16 base."""

import copy
import importlib.util
import itertools
import weakref
from pathlib import Path

import peft
import pytest
import tiny
import torch
from diffusers import UNet2DConditionModel
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from library import flags_adapter
from library.errors import UserError
from library.models import quantize

QUANTISED = [name for name in quantize.PRECISIONS if name != "no_change"
             and all(importlib.util.find_spec(part) for part in (quantize.SCHEMES[name].module.split(".")[0],))]
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"]
# relative error of one layer (normal weights and inputs, 256 in), of the tiny UNet's output, and 1 - cosine of the adapters'
# gradients, at most: about 1.5 times what was measured in bf16
BOUNDS = {"int8-quanto": (0.008, 0.02, 0.001), "int8-torchao": (0.008, 0.02, 0.001), "fp8-quanto": (0.04, 0.05, 0.008),
          "fp8-torchao": (0.04, 0.05, 0.008), "int4-quanto": (0.1, 0.12, 0.055), "nf4-bnb": (0.14, 0.165, 0.09),
          "int2-quanto": (0.5, 0.53, 0.6)}
# bits a weight with scales, at 1280 inputs: bf16 16
TEXT = 2.5    # error of a text encoder of random weights, in errors of the UNet, at most
BITS = {"int8-quanto": 8.02, "fp8-quanto": 8.02, "int8-torchao": 8.05, "fp8-torchao": 8.05, "int4-quanto": 4.26,
        "int2-quanto": 2.26, "nf4-bnb": 4.15}
each = pytest.mark.parametrize("precision", QUANTISED)
each_package = pytest.mark.parametrize("precision", sorted({"int4-quanto", "int8-torchao", "nf4-bnb"} & set(QUANTISED)))


def load(kind, folder, dtype=torch.bfloat16):
    return kind.from_pretrained(folder, dtype=dtype).requires_grad_(False).eval()


def fits(layer, precision):
    """bitsandbytes' kernel for a CPU is wrong where a row is no whole number of blocks: such layers stay."""
    return precision != "nf4-bnb" or layer.in_features % 64 == 0


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Wide enough for blocks of 64."""
    return tiny.make_model(tmp_path_factory.mktemp("model"), widths=(64, 128, 128))


@pytest.fixture
def unet(model):
    return load(UNet2DConditionModel, model / "unet")


@pytest.fixture
def another(model):
    return load(UNet2DConditionModel, model / "unet")


def inputs(dtype=torch.float32):
    draw = torch.Generator().manual_seed(0)
    cond = {"text_embeds": torch.randn(2, 32, generator=draw).to(dtype), "time_ids": torch.tensor([[64., 64, 0, 0, 64, 64]] * 2)}
    return (torch.randn(2, 4, 8, 8, generator=draw).to(dtype), torch.tensor([10, 700]),
            torch.randn(2, 77, 48, generator=draw).to(dtype)), cond


def predict(unet):
    positional, cond = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        return unet(*positional, added_cond_kwargs=cond).sample.float()


def error(found, wanted):
    return ((found - wanted).norm() / wanted.norm()).item()


def add_lora(unet, seed=3, scale=0.05):
    """LoRA of rank 4 in float32, away from its zero start so that both halves have a gradient."""
    peft.inject_adapter_in_model(peft.LoraConfig(r=4, lora_alpha=4, target_modules=TARGETS), unet)
    draw = torch.Generator().manual_seed(seed)
    for name, p in sorted(unet.named_parameters()):
        if "lora_" in name:
            p.data = scale * torch.randn(p.shape, generator=draw)
    return unet.train()


def gradients(unet):
    unet.enable_gradient_checkpointing()
    (predict(unet) - 1).square().mean().backward()
    return {name: p.grad for name, p in unet.named_parameters() if p.requires_grad}


def resident(file):
    """KB of a mapped file that are in memory."""
    lines, found = Path("/proc/self/smaps").read_text().splitlines(), 0
    for number, line in enumerate(lines):
        if line.endswith(str(file)):
            found += int(next(other for other in lines[number:] if other.startswith("Rss:")).split()[1])
    return found


def linear(in_features, out_features, dtype=torch.bfloat16, bias=True, seed=0):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(in_features, out_features, bias)).to(dtype).requires_grad_(False)


@each
def test_bits_a_weight(precision):
    """8 bits are half of bf16, 4 a quarter and the scales; nothing of the bf16 weight is kept."""
    layer = linear(1280, 1280, bias=False)
    assert quantize.bytes_of(layer) == 2 * 1280**2
    gone = weakref.ref(layer[0].weight.untyped_storage())
    assert quantize.apply(layer, precision) == 1
    assert quantize.SCHEMES[precision].bits < 8 * quantize.bytes_of(layer) / 1280**2 < BITS[precision]
    assert gone() is None


@each
@settings(max_examples=40)
@given(st.sampled_from([32, 64, 96, 128, 320, 384, 40]), st.sampled_from([32, 64, 72]), st.booleans(),
       st.sampled_from([torch.bfloat16, torch.float32, torch.float16]), st.integers(0, 99))
def test_one_layer(precision, in_features, out_features, bias, dtype, seed):
    """Of any shape: the product, and its gradient, are those of the dequantised weight; that is near the weight."""
    layer = linear(in_features, out_features, dtype, bias, seed)
    assume(fits(layer[0], precision))
    weight, offset = layer[0].weight.float().clone(), layer[0].bias.float() if bias else 0
    quantize.apply(layer, precision)
    x = torch.randn(2, 5, in_features).to(dtype).requires_grad_()
    y = layer(x)
    assert y.dtype == dtype and y.shape == (2, 5, out_features)
    assert error(y.float(), x.float() @ weight.T + offset) < 1.5 * BOUNDS[precision][0]
    direction = torch.randn(y.shape).to(dtype)
    y.backward(direction)
    assert error(x.grad.float(), direction.float() @ weight) < 1.5 * BOUNDS[precision][0]
    kept = layer(torch.eye(in_features).to(dtype)).float() - offset    # the weight that the layer computes with, transposed
    assert error(x.grad.float(), direction.float() @ kept.T) < 0.02


@each
def test_error_of_a_wide_layer(precision):
    layer = linear(256, 256)
    x, weight, bias = torch.randn(64, 256), layer[0].weight.float().clone(), layer[0].bias.float()
    quantize.apply(layer, precision)
    assert error(layer(x.bfloat16()).float(), x @ weight.T + bias) < BOUNDS[precision][0]


@each
def test_output_of_the_unet(precision, unet):
    wanted = predict(unet)
    before = quantize.bytes_of(unet)
    eligible = [layer.weight.nbytes for name, layer in unet.named_modules() if isinstance(layer, torch.nn.Linear)
                and ("transformer_blocks" in name or name.endswith(("proj_in", "proj_out"))) and fits(layer, precision)]
    assert quantize.apply(unet, precision) == len(eligible) > 90
    now = (sum(eligible) - before + quantize.bytes_of(unet)) / sum(eligible)    # of what they took in bf16
    assert quantize.SCHEMES[precision].bits / 16 < now < 0.02 + 1.17 * quantize.SCHEMES[precision].bits / 16
    found = predict(unet)
    assert 0 < error(found, wanted) < BOUNDS[precision][1]


@each
def test_what_stays(precision, unet):
    """Convolutions, norms and embeddings keep their very tensors."""
    stay = {name: p for name, p in unet.named_parameters() if p.ndim != 2 or "emb" in name}
    stay = {name: p for name, p in stay.items() if "emb" in name or "conv" in name or "norm" in name}
    assert {"conv_in.weight", "conv_out.bias", "time_embedding.linear_1.weight", "add_embedding.linear_2.weight",
            "down_blocks.0.resnets.0.time_emb_proj.weight", "mid_block.attentions.0.norm.weight"} <= stay.keys()
    quantize.apply(unet, precision)
    now = dict(unet.named_parameters())
    assert all(now[name] is p and p.dtype == torch.bfloat16 for name, p in stay.items())
    types = {type(p) for name, p in now.items() if name not in stay and not name.endswith("bias")}
    assert len(types - {torch.nn.Parameter}) == 1 and (torch.nn.Parameter not in types or precision == "nf4-bnb")


@each
def test_skip(precision, unet):
    """Patterns of the caller's own stand in place of the usual ones."""
    count = quantize.apply(unet, precision, skip=("*", ))
    assert count == 0 and unet.dtype == torch.bfloat16
    assert quantize.apply(unet, precision, skip=(*quantize.SKIP, "mid_block.*", "*.to_q")) > 0
    names = {name for name, p in unet.named_parameters() if type(p) is not torch.nn.Parameter}
    assert names and not any(name.startswith("mid_block") or ".to_q." in name for name in names)


@each
def test_gradients_of_adapters(precision, unet, another):
    """Under gradient checkpointing: nearly those on the bf16 base, in float32, and none for the base."""
    wanted = gradients(add_lora(unet))
    quantize.apply(another, precision)
    found = gradients(add_lora(another))
    assert found.keys() == wanted.keys() and len(found) > 200
    assert all("lora_" in name and g is not None and g.dtype == torch.float32 and g.isfinite().all() for name, g in found.items())
    assert all(p.grad is None for name, p in another.named_parameters() if "lora_" not in name)
    a, b = (torch.cat([g.flatten() for _, g in sorted(grads.items())]) for grads in (found, wanted))
    assert 1 - torch.cosine_similarity(a, b, 0) < BOUNDS[precision][2]
    assert abs(a.norm() / b.norm() - 1) < max(0.03, BOUNDS[precision][2])


@each_package
def test_checkpointing_changes_no_gradient(precision, unet, another):
    for network in (unet, another):
        quantize.apply(network, precision)
        add_lora(network)
    found = gradients(unet)
    (predict(another) - 1).square().mean().backward()
    plain = {name: p.grad for name, p in another.named_parameters() if p.requires_grad}
    assert all(error(found[name], g) < 1e-5 for name, g in plain.items())


@each
def test_nothing_dequantised_is_kept(precision):
    """What autograd keeps of a frozen layer until the backward pass is smaller than its weight in bf16."""
    layer, kept = linear(256, 256), []
    quantize.apply(layer, precision)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.nbytes) or t, lambda t: t):
        layer(torch.randn(8, 256, dtype=torch.bfloat16, requires_grad=True))
    assert sum(kept) < 256 * 256


@each
def test_no_gradient_first(precision, monkeypatch):
    """A pass without gradients (validation) leaves the layer able to pass them on afterwards.

    bitsandbytes would change its weights to a layout for inference then, on a CPU that has AVX512-BF16.
    """
    if precision == "nf4-bnb":
        from bitsandbytes.nn import modules
        monkeypatch.setattr(modules, "has_avx512bf16", lambda: True)
    layer = linear(64, 64).eval()
    quantize.apply(layer, precision)
    assert not layer[0].training
    with torch.no_grad():
        before = layer(torch.ones(1, 64, dtype=torch.bfloat16))
    x = torch.ones(1, 64, dtype=torch.bfloat16, requires_grad=True)
    after = layer(x)
    after.sum().backward()
    assert torch.equal(before, after) and x.grad.abs().sum() > 0


@each_package
def test_learns(precision, unet):
    quantize.apply(unet, precision)
    add_lora(unet, scale=0.02)
    optimizer = torch.optim.AdamW([p for p in unet.parameters() if p.requires_grad], lr=5e-3)
    losses = []
    for _ in range(6):
        loss = (predict(unet) - 1).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.97 * losses[0], losses


@each
def test_adapters_know_nothing_of_the_base(precision, unet, another):
    """Saved from the quantised base they have the keys, dtypes and values that load on the bf16 base."""
    quantize.apply(unet, precision)
    saved = peft.get_peft_model_state_dict(add_lora(unet))
    kept = peft.get_peft_model_state_dict(add_lora(another, seed=9))
    assert {key: (t.shape, t.dtype) for key, t in saved.items()} == {key: (t.shape, t.dtype) for key, t in kept.items()}
    result = peft.set_peft_model_state_dict(another, saved)
    assert not result.unexpected_keys
    loaded = peft.get_peft_model_state_dict(another)
    assert all(torch.equal(loaded[key], t) for key, t in saved.items())
    assert error(predict(unet), predict(another)) < BOUNDS[precision][1] * 1.5


def test_peft_takes_its_own_4_bit_layer(unet):
    pytest.importorskip("bitsandbytes")
    quantize.apply(unet, "nf4-bnb")
    add_lora(unet)
    layers = [layer for layer in unet.modules() if isinstance(layer, peft.tuners.lora.LoraLayer)]
    assert {(type(layer).__name__, type(layer.get_base_layer()).__name__) for layer in layers} == {
        ("Linear4bit", "Linear4bit"), ("Linear", "Linear")}    # the latter where rows are no whole number of blocks


@each
@pytest.mark.parametrize("part", ["text_encoder", "text_encoder_2"])
def test_text_encoders(precision, part, model):
    kind = CLIPTextModel if part == "text_encoder" else CLIPTextModelWithProjection
    torch.manual_seed(0)
    made = tiny.make_text_encoder(kind, 128, CLIPTokenizer.from_pretrained(model / "tokenizer"))
    wanted, found = (copy.deepcopy(made).to(torch.bfloat16).requires_grad_(False) for _ in range(2))
    before = quantize.bytes_of(found)
    assert quantize.apply(found, precision) == 3 * 6    # q, k, v, out and two of the MLP, in three layers
    assert quantize.bytes_of(found) < before and found.dtype == torch.bfloat16
    ids = torch.randint(0, 100, (2, 77), generator=torch.Generator().manual_seed(0))
    a, b = (encoder(ids, output_hidden_states=True).hidden_states[-2].float() for encoder in (found, wanted))
    assert error(a, b) < TEXT * BOUNDS[precision][1]


@pytest.mark.parametrize("width", [32, 96, 160])
def test_rows_of_broken_blocks_stay(width):
    """bitsandbytes 0.50 multiplies them by the wrong scales on a CPU: an error of 0.25 instead of 0.09."""
    pytest.importorskip("bitsandbytes")
    network = torch.nn.Sequential(linear(width, 64)[0], linear(64, width)[0])
    first = network[0].weight
    assert quantize.apply(network, "nf4-bnb") == 1 and network[0].weight is first and type(network[1]) is not torch.nn.Linear


def test_no_change(unet):
    before, state = predict(unet), {name: p for name, p in unet.named_parameters()}
    assert quantize.apply(unet, "no_change") == 0
    assert all(p is state[name] for name, p in unet.named_parameters()) and torch.equal(predict(unet), before)


@each
def test_one_layer_at_a_time(precision, monkeypatch):
    """At every moment: the old weights that still live and the new ones are at most the bf16 network and one layer."""
    network = torch.nn.Sequential(*[linear(128, 128, bias=False)[0] for _ in range(8)])
    whole, one = quantize.bytes_of(network), 2 * 128**2
    old = [weakref.ref(layer.weight) for layer in network]
    most, inner = [], quantize._quantised

    def watched(layer, scheme):
        made = inner(layer, scheme)
        new = quantize.bytes_of(made) + sum(quantize.bytes_of(other) for other in network if type(other.weight) is not
                                            torch.nn.Parameter and other is not layer)
        most.append(one * sum(ref() is not None and type(ref()) is torch.nn.Parameter for ref in old) + new)
        return made

    monkeypatch.setattr(quantize, "_quantised", watched)
    assert quantize.apply(network, precision) == 8
    assert max(most) <= whole + one and most[-1] < 0.8 * whole


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux")
@each
def test_pages_of_a_mapped_file_are_forgotten(precision, tmp_path):
    """A weight that is a page of a mapped file leaves resident memory when it is replaced; its neighbours are as they were."""
    file = tmp_path / "weights.safetensors"
    save_file({name: torch.randn(1024, 1024).bfloat16() for name in "abcd"}, file)
    weights = load_file(file)
    network = torch.nn.Sequential(*[linear(64, 64, bias=False)[0] for _ in weights])
    for layer, weight in zip(network, weights.values(), strict=True):
        layer.weight, layer.in_features, layer.out_features = torch.nn.Parameter(weight, requires_grad=False), 1024, 1024
    copies = {name: weight.clone() for name, weight in weights.items()}
    assert resident(file) >= 4 * 2048
    assert quantize.apply(network, precision, skip=("3",)) == 3
    assert 2048 - 8 <= resident(file) < 2 * 2048
    assert all(torch.equal(weights[name], copy) for name, copy in copies.items())    # read again where asked for


def test_only_frozen_networks(unet):
    with pytest.raises(ValueError, match="frozen"):
        quantize.apply(add_lora(unet), QUANTISED[0])


def test_bytes_of_nf4():
    """Half a byte a weight, a byte for each block of 64, four for each 256 blocks, two code books and a mean."""
    pytest.importorskip("bitsandbytes")
    layer = linear(1280, 1280, bias=False)
    quantize.apply(layer, "nf4-bnb")
    count = 1280**2
    assert quantize.bytes_of(layer) == count // 2 + count // 64 + count // 64 // 256 * 4 + 16 * 4 + 256 * 4 + 4


def test_shared_weights_count_once():
    layer = torch.nn.Linear(8, 8, bias=False)
    layer.again = layer.weight
    other = torch.nn.Sequential(layer, torch.nn.Linear(8, 8, bias=False))
    other[1].weight = layer.weight
    assert quantize.bytes_of(other) == 4 * 64


# refusals

@pytest.mark.parametrize("device", ["cpu", "cuda", "xpu", "mps", "npu"])
@pytest.mark.parametrize("precision", quantize.SCHEMES)
def test_devices(precision, device, monkeypatch):
    """Apple's GPUs have no 8-bit floats, Ascend's NPUs take plain 8-bit integers alone; what is refused names what can."""
    monkeypatch.setattr(quantize, "_compile_helper", lambda *_: None)
    refused = {"mps": ["fp8-quanto", "fp8-torchao"], "npu": [name for name in quantize.SCHEMES if name != "int8-torchao"]}
    if precision not in refused.get(device, ()):
        return quantize.check(precision, device, "--base_model_precision")
    with pytest.raises(UserError) as caught:
        quantize.check(precision, device, "--text_encoder_1_precision")
    said, can = str(caught.value).split("there, use ")
    assert said.startswith(f"--text_encoder_1_precision {precision} does not run on {device}")
    assert can.split(", ") == [name for name in quantize.SCHEMES if name not in refused[device]] + ["no_change"]


@pytest.mark.parametrize(("precision", "package"), [(name, scheme.package) for name, scheme in quantize.SCHEMES.items()])
def test_missing_package(precision, package, monkeypatch):
    """Also when `optimum`, the folder that quanto shares with others, is not there at all."""
    inner = importlib.util.find_spec
    top = quantize.SCHEMES[precision].module.split(".")[0]

    def find_spec(name, *more):
        if name.split(".")[0] == top:
            if "." in name:
                raise ModuleNotFoundError(name)
            return None
        return inner(name, *more)

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    with pytest.raises(UserError, match=f"--base_model_precision {precision} needs {package}: pip install {package}$"):
        quantize.check(precision, "cpu", "--base_model_precision")
    quantize.check("no_change", "cpu", "--base_model_precision")


@pytest.mark.parametrize(("given", "near"), [("int8_quanto", "int8-quanto"), ("nf4", "nf4-bnb"), ("fp8-torcha", "fp8-torchao")])
def test_misspelt(given, near):
    with pytest.raises(UserError, match=f"did you mean {near}"):
        quantize.check(given, "cpu", "--base_model_precision")


@pytest.mark.parametrize("fault", [RuntimeError("Ninja is required to load C++"), PermissionError(13, "denied"), OSError()])
def test_helper_that_cannot_be_compiled(fault, monkeypatch):
    extension = pytest.importorskip("optimum.quanto.library.extensions")

    class Broken:
        @property
        def lib(self):
            raise fault

    monkeypatch.setattr(extension, "get_extension", lambda name: Broken())
    with pytest.raises(UserError, match=r"--base_model_precision int4-quanto: .*needs g\+\+ and ninja.*nf4-bnb need no compiler"):
        quantize.check("int4-quanto", "cpu", "--base_model_precision")
    quantize.check("int8-quanto", "cpu", "--base_model_precision")    # needs none


@pytest.fixture
def group():
    """A process group of this process alone: DDP sends and receives as ever."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@each_package
def test_ddp(precision, unet, another, group):
    """DDP leaves the base out, and gives the adapters the gradients that they have without it."""
    for network in (unet, another):
        quantize.apply(network, precision)
        add_lora(network)
    quantize.leave_out_of_ddp(unet)
    wrapped = torch.nn.parallel.DistributedDataParallel(unet)
    left_out = {name for name, p in unet.named_parameters() if not p.requires_grad}
    assert wrapped.parameters_to_ignore >= left_out and not any("lora_" in name for name in wrapped.parameters_to_ignore)
    unet.enable_gradient_checkpointing()
    (predict(wrapped) - 1).square().mean().backward()
    wanted = gradients(another)
    assert all(torch.equal(p.grad, wanted[name]) for name, p in unet.named_parameters() if p.requires_grad)


def test_ddp_cannot_send_a_base_of_torchao(unet, group):
    """Why `leave_out_of_ddp` is there; once this passes it may go."""
    pytest.importorskip("torchao")
    quantize.apply(unet, "int8-torchao")
    with pytest.raises((NotImplementedError, RuntimeError)):
        torch.nn.parallel.DistributedDataParallel(add_lora(unet))


def test_flags_offer_what_there_is():
    assert flags_adapter.PRECISIONS == quantize.PRECISIONS


def test_bounds_are_in_order():
    """The table of errors says what a user needs to know: more bits, less error."""
    order = ["int8-quanto", "fp8-quanto", "int4-quanto", "int2-quanto"]
    assert all(BOUNDS[a] < BOUNDS[b] for a, b in itertools.pairwise(order))
