"""The fused operators that diffusers and this project call: the schemas of torch_npu 2.13.0, and its limits, checked strictly.

Made of ordinary operators, so they have gradients. Like the real ones, they refuse tensors that are not on an NPU.
"""

import torch
import torch.nn.functional as F

_lib = torch.library.Library("npu", "DEF")
calls = {}  # name -> list of what was passed (the cheap things), for tests


def _define(schema):
    def register(fn):
        name = schema.split("(")[0]
        _lib.define(schema)

        def kernel(*args, **kwargs):
            x = args[0]
            if x.device.type not in ("npu", "meta"):
                raise NotImplementedError(f"Could not run 'npu::{name}' with arguments from the "
                                          f"'{x.device.type.upper()}' backend.")
            calls.setdefault(name, []).append((tuple(x.shape), x.dtype, dict(kwargs)))
            return fn(*args, **kwargs)

        _lib.impl(name, kernel, "CompositeImplicitAutograd")
        globals()[name] = getattr(torch.ops.npu, name)
        return fn
    return register


@_define(
    'npu_fusion_attention(Tensor query, Tensor key, Tensor value, int head_num, str input_layout, '
    'Tensor? pse=None, Tensor? padding_mask=None, Tensor? atten_mask=None, float scale=1., float keep_prob=1., '
    'int pre_tockens=2147483647, int next_tockens=2147483647, int inner_precise=0, int[]? prefix=None, '
    'int[]? actual_seq_qlen=None, int[]? actual_seq_kvlen=None, int sparse_mode=0, bool gen_mask_parallel=True, '
    'bool sync=False, str softmax_layout="", Tensor? sink=None, Tensor? dropout_mask=None, int seed=0, '
    'int offset=0) -> (Tensor, Tensor, Tensor, Tensor, int, int, int)')
def _fusion_attention(query, key, value, head_num, input_layout, pse=None, padding_mask=None, atten_mask=None,
                      scale=1.0, keep_prob=1.0, pre_tockens=2147483647, next_tockens=2147483647, inner_precise=0,
                      prefix=None, actual_seq_qlen=None, actual_seq_kvlen=None, sparse_mode=0,
                      gen_mask_parallel=True, sync=False, softmax_layout="", sink=None, dropout_mask=None, seed=0,
                      offset=0):
    def need(ok, why):
        if not ok:
            raise RuntimeError(f"npu_fusion_attention: {why}")

    def bnsd(x, heads):
        if input_layout == "BNSD":
            return x
        if input_layout == "BSND":
            return x.transpose(1, 2)
        if input_layout == "SBH":
            x = x.transpose(0, 1)
        return x.reshape(x.shape[0], x.shape[1], heads, -1).transpose(1, 2)

    need(input_layout in ("BSH", "SBH", "BSND", "BNSD", "TND"), f"input_layout {input_layout!r}")
    need(input_layout != "TND", "TND (varlen) is not simulated")
    need(query.dtype in (torch.float16, torch.bfloat16, torch.float32), f"dtype {query.dtype}")
    need(query.dtype == key.dtype == value.dtype, "query, key and value must share a dtype")
    need(query.dim() == key.dim() == value.dim() == (3 if input_layout in ("BSH", "SBH") else 4),
         f"{query.dim()}-D query for layout {input_layout}")
    need(padding_mask is None, "padding_mask is not supported")
    need(0 < keep_prob <= 1, "keep_prob must be in (0, 1]")
    need(sparse_mode in (0, 1), f"sparse_mode {sparse_mode} is not simulated")
    h = query.shape[2] // head_num if query.dim() == 3 else 0
    kv_heads = key.shape[2] // h if h else key.shape[1 if input_layout == "BNSD" else 2]
    q, k, v = bnsd(query, head_num), bnsd(key, kv_heads), bnsd(value, kv_heads)
    B, N, S, D = q.shape
    need(N == head_num, f"head_num {head_num}, but query has {N} heads")
    need(k.shape[0] == B and v.shape[0] == B, "batch sizes differ")
    need(k.shape[2] == v.shape[2], "key and value lengths differ")
    need(k.shape[3] == D and v.shape[3] <= D and 1 <= D <= 768, f"head dims {D}, {k.shape[3]}, {v.shape[3]}")
    need(N % k.shape[1] == 0 and N <= 256, f"{N} query heads over {k.shape[1]}")
    bias = None
    if atten_mask is not None:
        need(atten_mask.dtype in (torch.bool, torch.uint8), f"atten_mask dtype {atten_mask.dtype}")
        need(tuple(atten_mask.shape) in {(B, N, S, k.shape[2]), (B, 1, S, k.shape[2]), (1, 1, S, k.shape[2]),
                                         (S, k.shape[2])},
             f"atten_mask shape {tuple(atten_mask.shape)} is none of BNSS, B1SS, 11SS, SS")
        bias = torch.zeros(atten_mask.shape, dtype=q.dtype, device=q.device).masked_fill(
            atten_mask.bool(), torch.finfo(q.dtype).min)  # True = hidden
    if pse is not None:
        need(pse.dtype == query.dtype, "pse must share query's dtype")
        bias = pse * scale if bias is None else pse * scale + bias  # scale*(pse + qk)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=1.0 - keep_prob, scale=scale,
                                         enable_gqa=k.shape[1] != N)
    if input_layout != "BNSD":
        out = out.transpose(1, 2)
    if input_layout in ("BSH", "SBH"):
        out = out.reshape(B, S, -1)
    if input_layout == "SBH":
        out = out.transpose(0, 1)
    stat = torch.empty(B, N, S, 8, dtype=torch.float32, device=q.device)  # softmax_max / softmax_sum
    return out.contiguous(), stat, torch.empty_like(stat), torch.empty(0, dtype=q.dtype, device=q.device), 0, 0, 0


@_define("npu_geglu(Tensor input, int dim=-1, int approximate=1, bool activate_left=False) -> (Tensor, Tensor)")
def _geglu(input, dim=-1, approximate=1, activate_left=False):
    a, b = input.chunk(2, dim=dim)
    if activate_left:
        a, b = b, a
    gelu = F.gelu(b, approximate="tanh" if approximate else "none")
    return a * gelu, gelu


@_define("npu_rms_norm(Tensor input, Tensor gamma, float epsilon=1e-06) -> (Tensor, Tensor)")
def _rms_norm(input, gamma, epsilon=1e-6):
    x = input.float()
    dims = tuple(range(-gamma.dim(), 0))
    rstd = torch.rsqrt(x.pow(2).mean(dims, keepdim=True) + epsilon)
    return (x * rstd).to(input.dtype) * gamma, rstd


@_define("npu_swiglu(Tensor input, int dim=-1) -> Tensor")
def _swiglu(input, dim=-1):
    a, b = input.chunk(2, dim=dim)
    return F.silu(a) * b


@_define("npu_rotary_mul(Tensor input, Tensor r1, Tensor r2, str rotary_mode='half', Tensor? rotate=None) -> Tensor")
def _rotary_mul(input, r1, r2, rotary_mode="half", rotate=None):
    if rotary_mode == "half":
        a, b = input.chunk(2, -1)
        turned = torch.cat((-b, a), -1)
    else:  # interleave
        a, b = input[..., ::2], input[..., 1::2]
        turned = torch.stack((-b, a), -1).flatten(-2)
    return input * r1 + turned * r2
