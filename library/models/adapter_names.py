"""Names of an adapter's tensors: kohya's flat ones (SGM's or diffusers' blocks) and PEFT's -> "unet.mid_block...", and back.

SD3's blocks have names of their own in kohya's files: `sd3_adapter`.
"""

import re

import torch

from library.models import single_file
from library.models.adapter_settings import SDXL_UNET

PARTS = {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}
PARTS_SD3 = {"transformer": "lora_unet_", **{part: PARTS[part] for part in ("text_encoder", "text_encoder_2")},
             "text_encoder_3": "lora_te3_"}
LYCORIS, ONETRAINER = "lycoris_", "lora_transformer_"    # of the UNet or transformer; the second of SD3 alone
# a flat name has underscores for dots: these words have underscores of their own
_WORDS = """down_blocks up_blocks mid_block transformer_blocks to_q to_k to_v to_out proj_in proj_out time_emb_proj conv_in
    conv_out conv_shortcut conv_norm_out time_embedding linear_1 linear_2 add_embedding input_blocks middle_block output_blocks
    in_layers out_layers emb_layers skip_connection time_embed label_emb text_model self_attn q_proj k_proj v_proj out_proj
    text_projection layer_norm1 layer_norm2 final_layer_norm token_embedding position_embedding
    add_q_proj add_k_proj add_v_proj to_add_out ff_context norm1_context norm_out pos_embed context_embedder time_text_embed
    timestep_embedder text_embedder joint_blocks x_block context_block adaLN_modulation x_embedder t_embedder y_embedder
    final_layer SelfAttention DenseReluDense wi_0 wi_1""".split()
_TOKEN = re.compile("(" + "|".join(sorted(_WORDS, key=len, reverse=True)) + r"|[a-z0-9]+)(?:_|$)")
# longest first: "lora.up.weight" also ends what "lora_linear_layer.up.weight" does not
_PEFT = {"lora_linear_layer.down.weight": "lora_down.weight", "lora_linear_layer.up.weight": "lora_up.weight",
         "lora_magnitude_vector.weight": "dora_scale", "lora_magnitude_vector": "dora_scale", "lora_A.weight": "lora_down.weight",
         "lora_B.weight": "lora_up.weight", "lora.down.weight": "lora_down.weight", "lora.up.weight": "lora_up.weight",
         "alpha": "alpha"}


def to_kohya(key: str, unet_config=SDXL_UNET) -> str:
    """"unet.mid_block.attentions.0.proj_in" -> "lora_unet_middle_block_1_proj_in", as kohya names SDXL's blocks."""
    part, _, module = key.partition(".")
    if part == "unet":
        renamed = single_file.to_sgm({"unet": {f"{module}.weight": torch.empty(0)}}, unet_config)
        module = next(iter(renamed)).removeprefix(single_file.PARTS["unet"]).removesuffix(".weight")
    return PARTS[part] + module.replace(".", "_")


def to_lycoris(key: str) -> str:
    """"unet.mid_block.attentions.0.proj_in" -> "lycoris_mid_block_attentions_0_proj_in"; of SD3's transformer likewise."""
    return LYCORIS + key.partition(".")[2].replace(".", "_")


def sgm_names(unet_config=SDXL_UNET) -> dict[str, str]:
    """SGM's name of a block, or of a layer in a resnet -> diffusers'."""
    blocks = single_file.UNET_NAMES | single_file.unet_blocks(unet_config)
    names = {theirs: ours for ours, theirs in blocks.items()}
    for ours, theirs in blocks.items():
        if ".resnets." in ours:
            names |= {f"{theirs}.{layer}": f"{ours}.{own}" for own, layer in single_file.RESNET_NAMES.items()}
    return names


def split(name: str, sgm: dict[str, str], parts: dict[str, str] = PARTS) -> tuple[str, str] | None:
    """A tensor's name in a file -> the module and the kind of tensor, in our terms; None for a name that is not known.

    sgm: from `sgm_names`; of SD3 nothing. parts: the networks, PARTS or PARTS_SD3. Of CLIP, PEFT's names with and without
    "text_model." mean the same.
    """
    if name.startswith((*parts.values(), LYCORIS, ONETRAINER)):
        return _split_flat(name, sgm, parts)
    name = re.sub(r"\.processor\.to_(q|k|v|out)_lora\.", r".to_\1.lora.", name).replace(".to_out.lora.", ".to_out.0.lora.")
    name = name.replace(".default.", ".")
    part, _, rest = name.partition(".")
    ending = next((ending for ending in _PEFT if rest.endswith("." + ending)), None)
    if part not in parts or ending is None:
        return None
    module = rest.removesuffix("." + ending)
    return text_name(f"{part}.{module}"), _PEFT[ending]


def text_name(key: str) -> str:
    """The same name whichever transformers made a CLIP: version 5 left "text_model." out of CLIPTextModel."""
    part, _, module = key.partition(".")
    same = part not in ("text_encoder", "text_encoder_2") or module.startswith(("text_model.", "text_projection"))
    return key if same else f"{part}.text_model.{module}"


def _split_flat(name: str, sgm: dict[str, str], parts: dict[str, str]) -> tuple[str, str] | None:
    flat, _, kind = name.partition(".")
    known = [*parts.items()] + [(next(iter(parts)), each) for each in (LYCORIS, ONETRAINER)]
    part, prefix = next((part, prefix) for part, prefix in known if flat.startswith(prefix))
    pieces = _TOKEN.findall(flat.removeprefix(prefix))
    if "_".join(pieces) != flat.removeprefix(prefix):
        return None
    for n in range(len(pieces), 0, -1) if part == "unet" else ():
        if (head := ".".join(pieces[:n])) in sgm:
            pieces = [sgm[head], *pieces[n:]]
            break
    return f"{part}.{'.'.join(pieces)}", kind
