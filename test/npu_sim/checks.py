"""Checks of the stand-in itself, and of what the trainer calls on it; test_npu.py runs them in a process that has it.

Each function is one check, and raises where it fails.
"""

import copy
import tempfile
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
import torch_npu
from safetensors.torch import load_file, save_file

from library.errors import UserError
from library.training import devices


def fails(kind: type, words: str, call, *args, **options) -> None:
    try:
        call(*args, **options)
    except kind as error:
        assert words in str(error), f"{words!r} is not in {error}"
    else:
        raise AssertionError(f"no {kind.__name__} with {words!r}")


def layers_and_the_optimizer_agree_with_the_host():
    host = torch.nn.Sequential(torch.nn.Conv2d(4, 8, 3, padding=1), torch.nn.GroupNorm(2, 8), torch.nn.SiLU(),
                               torch.nn.LayerNorm(8), torch.nn.ConvTranspose2d(8, 4, 2, stride=2))
    device = copy.deepcopy(host)
    before = list(device.parameters())
    device.to("npu")
    assert all(new is old for new, old in zip(device.parameters(), before, strict=True)), "an optimizer would hold the old ones"
    x = torch.randn(2, 4, 8, 8)
    for network, given in ((host, x), (device, x.to("npu"))):
        optimizer = torch.optim.AdamW(network.parameters(), 1e-2)
        for _ in range(3):
            (network(given) - 1).pow(4).mean().backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    for a, b in zip(host.parameters(), device.parameters(), strict=True):
        assert b.device == torch.device("npu", 0)
        torch.testing.assert_close(a, b.cpu(), atol=1e-5, rtol=1e-4)


def norms_of_tensors_in_channels_last():
    norm, x = torch.nn.GroupNorm(2, 8), torch.randn(2, 8, 5, 4).to(memory_format=torch.channels_last)
    device = copy.deepcopy(norm).to("npu")
    torch.testing.assert_close(device(x.to("npu")).cpu(), norm(x))


def devices_are_not_mixed():
    x = torch.ones(3, 3, device="npu")
    fails(RuntimeError, "same device", torch.matmul, x, torch.ones(3, 3))
    fails(TypeError, "numpy", x.numpy)


def layouts_of_fused_attention():
    b, n, s, d = 2, 4, 6, 8
    q, k, v = (torch.randn(b, n, s, d, device="npu") for _ in range(3))
    hidden = torch.rand(b, 1, s, s, device="npu") > 0.7
    hidden[..., 0] = False
    wanted = F.scaled_dot_product_attention(q, k, v, attn_mask=~hidden, scale=0.3)
    for layout, to in {"BNSD": lambda x: x, "BSND": lambda x: x.transpose(1, 2),
                       "BSH": lambda x: x.transpose(1, 2).reshape(b, s, n * d),
                       "SBH": lambda x: x.permute(2, 0, 1, 3).reshape(s, b, n * d)}.items():
        got = torch_npu.npu_fusion_attention(to(q), to(k), to(v), n, layout, atten_mask=hidden, scale=0.3)
        assert len(got) == 7 and got[1].shape == (b, n, s, 8)
        torch.testing.assert_close(got[0].cpu(), to(wanted).contiguous().cpu())


def fused_attention_refuses_what_the_real_one_does():
    q = torch.randn(2, 4, 6, 8, device="npu")
    for wrong in (dict(input_layout="BHSD"), dict(head_num=3), dict(keep_prob=0.0), dict(sparse_mode=2), dict(unknown=1),
                  dict(atten_mask=torch.zeros(2, 1, 6, 6, device="npu")),
                  dict(atten_mask=torch.zeros(2, 1, 1, 6, device="npu", dtype=torch.bool))):
        fails(RuntimeError, "", torch_npu.npu_fusion_attention, q, q, q, **dict(head_num=4, input_layout="BNSD") | wrong)
    fails(RuntimeError, "dtype", torch_npu.npu_fusion_attention, q, q, q.bfloat16(), 4, "BNSD")
    fails(NotImplementedError, "CPU", torch_npu.npu_fusion_attention, q.cpu(), q.cpu(), q.cpu(), 4, "BNSD")


def every_length_and_mask_is_fused():
    """Ascend's port fused 9 of 33 buckets: those of 256 n tokens, without masks."""
    fused = devices.attention("npu")
    torch_npu.ops.calls.clear()
    asked = 0
    for dtype in (torch.float16, torch.bfloat16):
        for s, t in ((4096, 77), (3952, 77), (247, 247), (1, 31)):    # 3952: 832 x 1216 pixels
            q, k, v = (torch.randn(2, 2, length, 8, device="npu").to(dtype).requires_grad_(True) for length in (s, t, t))
            seen = torch.rand(2, 1, 1, t, device="npu") > 0.5
            seen[..., 0] = True
            added = torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, -10000.0)
            for mask in (None, seen, added, seen.expand(2, 2, 1, t), seen[:1, :, :, :].expand(1, 1, s, t)):
                ours, usual = fused(q, k, v, mask), devices.sdpa(q, k, v, mask)
                torch.testing.assert_close(ours, usual, atol=0.02, rtol=0.02)
                asked += 1
        gradients = torch.autograd.grad(ours.float().square().sum(), (q, k, v))
        assert all(gradient.abs().max() > 0 for gradient in gradients[2:])
    assert len(torch_npu.ops.calls["npu_fusion_attention"]) == asked == 40


def random_states_and_files():
    torch.npu.manual_seed_all(5)
    state = torch.npu.get_rng_state()
    a = torch.randn(4, device="npu")
    torch.npu.set_rng_state(state)
    assert torch.equal(a, torch.randn(4, device="npu"))
    torch.manual_seed(5)    # seeds every device
    assert torch.equal(a, torch.randn(4, device="npu"))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a"
        torch.save({"a": a, "view": a[1:]}, path)
        assert torch.load(path)["a"].device.type == "npu"
        assert torch.equal(torch.load(path, map_location="cpu")["view"], a[1:].cpu())
        save_file({"a": a}, path)
        assert torch.equal(load_file(path, device="npu:0")["a"], a)


def settings_of_the_process():
    assert devices.best() == "npu"
    torch.npu.config.allow_internal_format, torch.npu.jit_compile = True, True
    devices.prepare("npu")
    assert torch.npu.config.allow_internal_format is False and torch.npu.jit_compile is False
    assert devices.description("npu") == "Ascend (simulated)" and devices.peak_memory("npu") >= 0
    devices.free_memory("npu")


def what_an_npu_has_not_is_refused():
    fails(UserError, "--allow_tf32 is for NVIDIA GPUs; this run is on npu", devices.allow_tf32, "npu")
    fails(UserError, "add --mixed_precision bf16", devices.check_attention, "npu", "no", "npu")
    for other in ("xformers", "flash", "sageattention"):
        fails(UserError, f"--attention_mechanism {other}", devices.check_attention, other, "bf16", "npu")
    with mock.patch.object(torch.npu, "is_bf16_supported", lambda: False):    # a 910A
        fails(UserError, "this NPU has no bfloat16; use fp16", devices.prepare, "npu", "bf16")


CHECKS = [check for name, check in list(globals().items()) if getattr(check, "__module__", "") == __name__ and name != "fails"]
