"""The attention of SDXL's UNet and SD3's transformer by a function of q, k, v and a mask, whose calls are counted.

diffusers' set_attention_backend changes nothing in these two (0.42: their processors call PyTorch's attention themselves), and
says nothing of it. So here is a processor for both, and the first batch shows whether it was called.
"""

import torch

from library.errors import UserError
from library.training import devices


class Processor:
    """Attention as diffusers' AttnProcessor2_0 and JointAttnProcessor2_0 compute it, by `call` instead of PyTorch's function.

    call: as `devices.sdpa`. training, inference: in which of the two modes of a network; in the other, PyTorch's is used.
    """

    def __init__(self, call, training: bool = True, inference: bool = True):
        self._call, self._training, self._inference = call, training, inference
        self.calls = 0    # of `call`

    def used(self, training: bool) -> bool:
        return self._training if training else self._inference

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        """hidden_states [B, S, D], encoder_hidden_states [B, T, E], attention_mask [B, 1 or S, T] -> [B, S, D].

        With projections of its own, SD3's text is a stream beside the image: both are attended to together, and returned. In its
        second attention there is the image alone.
        """
        joint = encoder_hidden_states is not None and attn.added_kv_proj_dim is not None
        context = hidden_states if joint or encoder_hidden_states is None else encoder_hidden_states
        q = _heads(attn, hidden_states, attn.to_q, attn.norm_q)
        k, v = _heads(attn, context, attn.to_k, attn.norm_k), _heads(attn, context, attn.to_v)
        if joint:
            q = torch.cat([q, _heads(attn, encoder_hidden_states, attn.add_q_proj, attn.norm_added_q)], dim=2)
            k = torch.cat([k, _heads(attn, encoder_hidden_states, attn.add_k_proj, attn.norm_added_k)], dim=2)
            v = torch.cat([v, _heads(attn, encoder_hidden_states, attn.add_v_proj)], dim=2)
        out = self._attend(attn.training, q.to(v.dtype), k.to(v.dtype), v,    # norms give float32 under autocast
                           None if attention_mask is None else attention_mask[:, None])
        out = out.transpose(1, 2).flatten(2)    # [B, S, N D]
        if not joint:
            return attn.to_out[1](attn.to_out[0](out))
        image, text = out.split([hidden_states.shape[1], encoder_hidden_states.shape[1]], dim=1)
        return attn.to_out[1](attn.to_out[0](image)), text if attn.context_pre_only else attn.to_add_out(text)

    def _attend(self, training: bool, q, k, v, mask):
        if not self.used(training):
            return devices.sdpa(q, k, v, mask)
        self.calls += 1
        return self._call(q, k, v, mask)


def _heads(attn, states: torch.Tensor, projection, norm=None) -> torch.Tensor:
    """[B, S, D] -> [B, N, S, D / N], projected and, with q and k of SD3.5, normed."""
    split = projection(states).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
    return split if norm is None else norm(split)


def set_attention(network, mechanism: str, sage_usage: str = "inference") -> None:
    """Have a UNet or transformer of diffusers attend by an --attention_mechanism; `default` leaves it as it is.

    sage_usage: --sageattention_usage. The first forward pass in which it is to be used raises `UserError` if any layer went
    another way.
    """
    if mechanism == "default":
        return
    usage = sage_usage.split("+") if mechanism == "sageattention" else ("training", "inference")
    processor = Processor(devices.attention(mechanism), "training" in usage, "inference" in usage)
    layers = len(network.attn_processors)
    network.set_attn_processor(processor)

    def check(module, inputs, output):
        if processor.used(module.training):
            hook.remove()
            if processor.calls < layers:
                raise UserError(f"--attention_mechanism {mechanism} was called by {processor.calls} of the {layers} attention "
                                f"layers of {type(network).__name__}: this diffusers goes another way. Leave the flag out")

    hook = network.register_forward_hook(check)
