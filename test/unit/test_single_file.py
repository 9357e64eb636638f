"""The single-file SDXL layout: written here, read back by diffusers' own loader and by ours."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.utils import logging as diffusers_logging
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from library.errors import UserError
from library.models import single_file
from library.models.single_file import PARTS, contents_of, load_part, save_single_file, to_sgm

REPOSITORY = Path(__file__).parents[2]
SDXL_UNET = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 2,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
}
TINY_UNET = SDXL_UNET | {
    "block_out_channels": (8, 16, 24),
    "norm_num_groups": 4,
    "attention_head_dim": (1, 2, 3),
    "transformer_layers_per_block": (1, 1, 2),
    "cross_attention_dim": 24 + 32,
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 6 * 4 + 40,
    "sample_size": 8,
}
VAE_BLOCKS = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "latent_channels": 4,
}
BASE = "model.diffusion_model."
LDM = "first_stage_model."
CLIP_L = "conditioner.embedders.0.transformer.text_model."
BIG_G = "conditioner.embedders.1.model."


def text_config(width, layers, heads, vocabulary, projection):
    return CLIPTextConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        vocab_size=vocabulary,
        projection_dim=projection,
        bos_token_id=0,
        eos_token_id=1,
    )


def tiny_tokenizer(folder):
    folder.mkdir()
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(letter + "</w>" for letter in letters)]
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """A tiny SDXL of the true topology, whose every tensor is random (fresh norms would all be alike)."""
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer(tmp_path_factory.mktemp("tokenizer") / "files")
    vae = AutoencoderKL(block_out_channels=(4, 8, 8, 12), norm_num_groups=4, layers_per_block=2, **VAE_BLOCKS)
    # Unequal widths on purpose: diffusers tells the two encoders of a file apart by width alone.
    pipeline = StableDiffusionXLPipeline(
        vae=vae,
        unet=UNet2DConditionModel(**TINY_UNET),
        text_encoder=CLIPTextModel(text_config(24, 2, 3, len(tokenizer), 24)),
        text_encoder_2=CLIPTextModelWithProjection(text_config(32, 3, 4, len(tokenizer), 40)),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        scheduler=EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
    )
    with torch.no_grad():
        for part in PARTS:
            for parameter in getattr(pipeline, part).parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.02)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def folder(pipeline, tmp_path_factory):
    path = tmp_path_factory.mktemp("pipeline")
    pipeline.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def states(pipeline):
    return {part: getattr(pipeline, part).state_dict() for part in PARTS}


@pytest.fixture(scope="module")
def files(pipeline, states, tmp_path_factory):
    """The same model as {".safetensors": path, ".ckpt": path}."""
    path = tmp_path_factory.mktemp("single")
    files = {ending: path / f"tiny{ending}" for ending in (".safetensors", ".ckpt")}
    for file in files.values():
        save_single_file(file, states, pipeline.unet.config)
    return files


def assert_same(state, expected):
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(state[name], tensor), name


def image(pipeline):
    generator = torch.Generator().manual_seed(1)
    options = {"num_inference_steps": 2, "height": 64, "width": 64, "output_type": "np", "generator": generator}
    return pipeline("a red cat", negative_prompt="b", **options).images


def full_size_states():
    """State dicts of SDXL base 1.0 on the meta device: names and shapes without memory."""
    unet = SDXL_UNET | {
        "block_out_channels": (320, 640, 1280),
        "attention_head_dim": (5, 10, 20),
        "transformer_layers_per_block": (1, 2, 10),
        "cross_attention_dim": 2048,
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    }
    with torch.device("meta"):
        models = {
            "unet": UNet2DConditionModel(**unet),
            "vae": AutoencoderKL(block_out_channels=(128, 256, 512, 512), layers_per_block=2, **VAE_BLOCKS),
            "text_encoder": CLIPTextModel(text_config(768, 12, 12, 49408, 768)),
            "text_encoder_2": CLIPTextModelWithProjection(text_config(1280, 32, 20, 49408, 1280)),
        }
    return {part: model.state_dict() for part, model in models.items()}, unet


# --- names and shapes ---


def test_full_size_names_are_those_of_sd_xl_base():
    states, config = full_size_states()
    shapes = {name: list(tensor.shape) for name, tensor in to_sgm(states, config).items()}
    counts = {part: sum(name.startswith(prefix) for name in shapes) for part, prefix in PARTS.items()}
    # sd_xl_base_1.0.safetensors has 2515 tensors: these, position_ids and logit_scale.
    assert counts == {"unet": 1680, "vae": 248, "text_encoder": 196, "text_encoder_2": 389}
    assert len(shapes) == 2513
    known = {
        BASE + "time_embed.0.weight": [1280, 320],
        BASE + "time_embed.2.bias": [1280],
        BASE + "label_emb.0.0.weight": [1280, 2816],
        BASE + "label_emb.0.2.weight": [1280, 1280],
        BASE + "input_blocks.0.0.weight": [320, 4, 3, 3],
        BASE + "input_blocks.1.0.in_layers.0.weight": [320],
        BASE + "input_blocks.3.0.op.weight": [320, 320, 3, 3],
        BASE + "input_blocks.4.0.skip_connection.weight": [640, 320, 1, 1],
        BASE + "input_blocks.4.1.proj_in.weight": [640, 640],
        BASE + "input_blocks.4.1.transformer_blocks.0.attn1.to_q.weight": [640, 640],
        BASE + "input_blocks.6.0.op.bias": [640],
        BASE + "input_blocks.7.1.transformer_blocks.9.attn2.to_k.weight": [1280, 2048],
        BASE + "input_blocks.8.0.out_layers.3.weight": [1280, 1280, 3, 3],
        BASE + "middle_block.0.emb_layers.1.weight": [1280, 1280],
        BASE + "middle_block.1.transformer_blocks.9.ff.net.0.proj.weight": [10240, 1280],
        BASE + "middle_block.2.out_layers.0.bias": [1280],
        BASE + "output_blocks.0.0.in_layers.2.weight": [1280, 2560, 3, 3],
        BASE + "output_blocks.2.2.conv.weight": [1280, 1280, 3, 3],
        BASE + "output_blocks.5.2.conv.weight": [640, 640, 3, 3],
        BASE + "output_blocks.6.0.skip_connection.weight": [320, 960, 1, 1],
        BASE + "output_blocks.8.0.out_layers.3.weight": [320, 320, 3, 3],
        BASE + "out.0.weight": [320],
        BASE + "out.2.weight": [4, 320, 3, 3],
        LDM + "encoder.conv_in.weight": [128, 3, 3, 3],
        LDM + "encoder.down.1.block.0.nin_shortcut.weight": [256, 128, 1, 1],
        LDM + "encoder.down.2.downsample.conv.weight": [512, 512, 3, 3],
        LDM + "encoder.mid.attn_1.q.weight": [512, 512, 1, 1],
        LDM + "encoder.mid.block_2.conv1.weight": [512, 512, 3, 3],
        LDM + "decoder.mid.attn_1.norm.weight": [512],
        LDM + "decoder.mid.attn_1.proj_out.weight": [512, 512, 1, 1],
        LDM + "decoder.up.3.block.0.norm1.weight": [512],
        LDM + "decoder.up.3.upsample.conv.weight": [512, 512, 3, 3],
        LDM + "decoder.up.1.block.0.nin_shortcut.weight": [256, 512, 1, 1],
        LDM + "decoder.up.0.block.2.conv2.weight": [128, 128, 3, 3],
        LDM + "decoder.norm_out.weight": [128],
        LDM + "quant_conv.weight": [8, 8, 1, 1],
        LDM + "post_quant_conv.bias": [4],
        CLIP_L + "embeddings.token_embedding.weight": [49408, 768],
        CLIP_L + "encoder.layers.11.self_attn.q_proj.weight": [768, 768],
        CLIP_L + "final_layer_norm.bias": [768],
        BIG_G + "token_embedding.weight": [49408, 1280],
        BIG_G + "positional_embedding": [77, 1280],
        BIG_G + "transformer.resblocks.0.ln_1.weight": [1280],
        BIG_G + "transformer.resblocks.31.attn.in_proj_weight": [3840, 1280],
        BIG_G + "transformer.resblocks.31.attn.in_proj_bias": [3840],
        BIG_G + "transformer.resblocks.31.attn.out_proj.weight": [1280, 1280],
        BIG_G + "transformer.resblocks.9.mlp.c_proj.bias": [1280],
        BIG_G + "transformer.resblocks.9.mlp.c_fc.weight": [5120, 1280],
        BIG_G + "ln_final.weight": [1280],
        BIG_G + "text_projection": [1280, 1280],
    }
    assert {name: shapes.get(name) for name in known} == known
    absent = ["input_blocks.9.", "output_blocks.9.", "input_blocks.1.1.", "output_blocks.8.1.", "output_blocks.8.2."]
    assert not [name for name in shapes if any(name.startswith(BASE + part) for part in absent)]


def test_openclip_joins_qkv_and_transposes_the_projection(states):
    whole = to_sgm(states, TINY_UNET)
    theirs = states["text_encoder_2"]
    q, k, v = (theirs[f"text_model.encoder.layers.2.self_attn.{letter}_proj.weight"] for letter in "qkv")
    assert torch.equal(whole[BIG_G + "transformer.resblocks.2.attn.in_proj_weight"], torch.cat([q, k, v]))
    pooled = torch.randn(1, 32)
    ours = pooled @ whole[BIG_G + "text_projection"]  # as open_clip computes it
    torch.testing.assert_close(ours, torch.nn.functional.linear(pooled, theirs["text_projection.weight"]))


def test_clip_names_of_transformers_4_and_5_give_the_same_file(states):
    old = {"text_model." + name: tensor for name, tensor in states["text_encoder"].items()}
    assert not any(name.startswith("text_model.") for name in states["text_encoder"])
    assert_same(to_sgm({"text_encoder": old}), to_sgm({"text_encoder": states["text_encoder"]}))
    assert CLIP_L + "embeddings.position_embedding.weight" in to_sgm({"text_encoder": old})


@pytest.mark.parametrize(
    ("part", "name"),
    [
        ("unet", "class_embedding.linear_1.weight"),
        ("unet", "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.default.weight"),
        ("unet", "_orig_mod.conv_in.weight"),
        ("vae", "encoder.mid_block.attentions.1.to_q.weight"),
        ("text_encoder", "encoder.layers.0.self_attn.q_proj.base_layer.weight"),
        ("text_encoder_2", "text_model.embeddings.extra.weight"),
    ],
)
def test_a_name_without_a_place_is_refused(part, name):
    with pytest.raises(ValueError, match=name.replace("text_model.", "")):
        to_sgm({part: {name: torch.zeros(1, 1)}}, TINY_UNET)


# --- what is written is read by diffusers and by us ---


@pytest.mark.parametrize("ending", [".safetensors", ".ckpt"])
def test_diffusers_reads_the_same_model_and_draws_the_same_image(files, folder, pipeline, states, ending, caplog):
    diffusers_logging.enable_propagation()
    read = StableDiffusionXLPipeline.from_single_file(str(files[ending]), config=folder, local_files_only=True)
    diffusers_logging.disable_propagation()
    assert not [record for record in caplog.records if "not used" in record.getMessage()]
    read.set_progress_bar_config(disable=True)
    for part in PARTS:
        assert_same(getattr(read, part).state_dict(), states[part])
    assert (image(read) == image(StableDiffusionXLPipeline.from_pretrained(folder))).all()


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("ending", [".safetensors", ".ckpt"])
def test_load_part_gives_the_same_tensors(files, folder, pipeline, states, part, ending, caplog):
    model = load_part(files[ending], part, folder)
    assert type(model) is type(getattr(pipeline, part))
    assert_same(model.state_dict(), states[part])
    assert not model.training and all(p.requires_grad and not p.is_meta for p in model.parameters())
    assert not hasattr(model, "_hf_hook")
    assert not caplog.records


@pytest.mark.parametrize("ending", [".safetensors", ".ckpt"])
def test_a_loaded_part_does_not_hang_on_the_file(files, folder, states, tmp_path, ending):
    file = tmp_path / f"copy{ending}"
    file.write_bytes(files[ending].read_bytes())
    model = load_part(file, "unet", folder)
    with open(file, "r+b") as handle:
        handle.write(b"\0" * file.stat().st_size)
    assert_same(model.state_dict(), states["unet"])


@pytest.mark.parametrize(
    ("changes", "upsampler"),
    [
        ({"layers_per_block": 1}, "output_blocks.1.2.conv.weight"),
        ({"layers_per_block": 3, "transformer_layers_per_block": (1, 3, 1)}, "output_blocks.3.2.conv.weight"),
        # As in SD 1: the deepest level without attention, so its upsampler is the second module of its block.
        ({"down_block_types": ("CrossAttnDownBlock2D",) * 2 + ("DownBlock2D",)}, "output_blocks.2.1.conv.weight"),
    ],
    ids=["one_layer", "three_layers", "attention_first"],
)
def test_other_depths_of_unet(tmp_path, changes, upsampler):
    config = TINY_UNET | changes
    config["up_block_types"] = tuple(k.replace("Down", "Up") for k in reversed(config["down_block_types"]))
    unet = UNet2DConditionModel(**config)
    unet.save_pretrained(tmp_path / "unet")
    whole = to_sgm({"unet": unet.state_dict()}, unet.config)
    assert BASE + upsampler in whole  # diffusers reads either number, others only the right one
    safetensors.torch.save_file(whole, tmp_path / "unet.safetensors")
    assert_same(load_part(tmp_path / "unet.safetensors", "unet", str(tmp_path)).state_dict(), unet.state_dict())


# --- precision, metadata, markers ---


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_precision_of_the_file_and_of_the_loaded_part(states, folder, tmp_path, dtype):
    file = tmp_path / "half.safetensors"
    save_single_file(file, states, TINY_UNET, dtype=dtype)
    assert {tensor.dtype for tensor in safetensors.torch.load_file(file).values()} == {dtype}
    for loaded in (torch.float32, torch.bfloat16):
        model = load_part(file, "unet", folder, dtype=loaded)
        assert_same(model.state_dict(), {n: t.to(dtype).to(loaded) for n, t in states["unet"].items()})


def test_weights_too_large_for_float16_are_refused(states, tmp_path):
    large = {name: tensor * 1e6 if name == "conv_in.weight" else tensor for name, tensor in states["unet"].items()}
    with pytest.raises(UserError, match=r"input_blocks\.0\.0\.weight reaches .* too large for torch.float16"):
        save_single_file(tmp_path / "large.safetensors", states | {"unet": large}, TINY_UNET, dtype=torch.float16)
    assert not os.listdir(tmp_path)


def test_channels_last_and_views_are_written_whole_and_alone(states, folder, tmp_path):
    flat = torch.cat([torch.zeros(1_000_000), states["unet"]["conv_in.weight"].flatten()])
    unet = {n: t.to(memory_format=torch.channels_last) if t.ndim == 4 else t for n, t in states["unet"].items()}
    unet["conv_in.weight"] = flat[1_000_000:].view_as(unet["conv_in.weight"])
    for ending in (".safetensors", ".ckpt"):
        save_single_file(tmp_path / f"m{ending}", states | {"unet": unet}, TINY_UNET)
        assert_same(load_part(tmp_path / f"m{ending}", "unet", folder).state_dict(), states["unet"])
        assert (tmp_path / f"m{ending}").stat().st_size < 2_500_000, "the unused million floats went along"


def test_header(states, tmp_path):
    file = tmp_path / "My model.safetensors"
    given = {"modelspec.author": "me", "modelspec.date": "2024-01-01", "ss_steps": 12}
    save_single_file(file, states, TINY_UNET, resolution=(1216, 832), metadata=given)
    with safetensors.safe_open(file, "pt") as handle:
        assert handle.metadata() == {
            "format": "pt",
            "modelspec.sai_model_spec": "1.0.0",
            "modelspec.architecture": "stable-diffusion-xl-v1-base",
            "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
            "modelspec.title": "My model",
            "modelspec.date": "2024-01-01",
            "modelspec.prediction_type": "epsilon",
            "modelspec.resolution": "1216x832",
            "modelspec.author": "me",
            "ss_steps": "12",
        }


@pytest.mark.parametrize("ending", [".safetensors", ".ckpt"])
def test_markers_of_v_prediction(states, folder, files, tmp_path, ending):
    file = tmp_path / f"v{ending}"
    save_single_file(file, states, TINY_UNET, prediction_type="v_prediction", zero_terminal_snr=True)
    assert contents_of(file) == (list(PARTS), "v_prediction", True)
    assert contents_of(files[ending]) == (list(PARTS), "epsilon", False)
    assert_same(load_part(file, "text_encoder", folder).state_dict(), states["text_encoder"])
    if ending == ".safetensors":
        with safetensors.safe_open(file, "pt") as handle:
            assert {"v_pred", "ztsnr"} <= set(handle.keys())
            assert handle.metadata()["modelspec.prediction_type"] == "v"
    with pytest.raises(UserError, match="epsilon or v_prediction"):
        save_single_file(file, states, TINY_UNET, prediction_type="sample")


# --- files that cannot be read or written ---


def altered(file, target, change):
    """Write `file` to `target` with its dict of tensors changed by `change`."""
    tensors = safetensors.torch.load_file(file)
    change(tensors)
    safetensors.torch.save_file(tensors, target)
    return target


@pytest.mark.parametrize("part", PARTS)
def test_a_missing_part_is_named(files, folder, tmp_path, part):
    def drop(tensors):
        for name in [name for name in tensors if name.startswith(PARTS[part])]:
            del tensors[name]

    file = altered(files[".safetensors"], tmp_path / "less.safetensors", drop)
    held = ", ".join(other for other in PARTS if other != part)
    with pytest.raises(UserError, match=rf"less\.safetensors has no {part} \(.*\)\. It holds: {held}\."):
        load_part(file, part, folder)


@pytest.mark.parametrize(
    ("part", "name"),
    [
        ("unet", BASE + "input_blocks.4.1.transformer_blocks.0.attn1.to_q.weight"),
        ("unet", BASE + "label_emb.0.0.weight"),
        ("vae", LDM + "decoder.mid.attn_1.q.bias"),
        ("text_encoder", CLIP_L + "final_layer_norm.bias"),
        ("text_encoder_2", BIG_G + "transformer.resblocks.1.attn.in_proj_weight"),
        ("text_encoder_2", BIG_G + "text_projection"),
    ],
)
def test_a_missing_tensor_is_an_error(files, folder, tmp_path, part, name):
    file = altered(files[".safetensors"], tmp_path / "hole.safetensors", lambda tensors: tensors.pop(name))
    with pytest.raises(UserError, match=r"hole\.safetensors"):
        load_part(file, part, folder)


def test_tensors_without_a_use_are_named_and_the_harmless_ones_are_not(files, folder, tmp_path, caplog):
    def add(tensors):
        tensors[CLIP_L + "embeddings.position_ids"] = torch.arange(77)[None]
        tensors[BIG_G + "logit_scale"] = torch.tensor(4.6)
        tensors[BIG_G + "visual.proj"] = torch.zeros(2)

    file = altered(files[".safetensors"], tmp_path / "more.safetensors", add)
    load_part(file, "text_encoder", folder)
    assert not caplog.records
    load_part(file, "text_encoder_2", folder)
    assert [record.getMessage() for record in caplog.records] == [f"{file}: 1 tensors not used: {BIG_G}visual.proj"]


def test_another_shape_or_configuration_is_an_error(files, folder, tmp_path):
    def widen(tensors):
        tensors[BASE + "input_blocks.0.0.weight"] = torch.zeros(8, 9, 3, 3)  # as an inpainting model has it

    file = altered(files[".safetensors"], tmp_path / "inpaint.safetensors", widen)
    with pytest.raises(UserError, match="unet in .*inpaint.* cannot be built by the configuration in .*conv_in.weight"):
        load_part(file, "unet", folder)
    (tmp_path / "empty").mkdir()
    for part in PARTS:
        with pytest.raises(UserError, match=f"{part} in .* cannot be built by the configuration in .*empty"):
            load_part(files[".safetensors"], part, str(tmp_path / "empty"))


@pytest.mark.parametrize("ending", [".safetensors", ".ckpt"])
@pytest.mark.parametrize("keep", [0.0, 0.00001, 0.5, 0.999])
def test_a_truncated_file_is_an_error(files, folder, tmp_path, ending, keep):
    whole = files[ending].read_bytes()
    file = tmp_path / f"cut{ending}"
    file.write_bytes(whole[: int(len(whole) * keep)])
    with pytest.raises(UserError, match=rf"cut{ending} is damaged, cut short"):
        load_part(file, "vae", folder)
    with pytest.raises(UserError, match=rf"cut{ending} is damaged, cut short"):
        contents_of(file)


def test_no_file_and_other_endings(folder, states, tmp_path):
    with pytest.raises(UserError, match="There is no file .*absent.safetensors"):
        load_part(tmp_path / "absent.safetensors", "unet", folder)
    with pytest.raises(UserError, match=r"ends in \.safetensors or \.ckpt"):
        save_single_file(tmp_path / "model.bin", states, TINY_UNET)
    with pytest.raises(KeyError, match="vae"):
        save_single_file(tmp_path / "m.ckpt", {"unet": states["unet"]}, TINY_UNET)


class Trap:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


@pytest.mark.parametrize("zipped", [True, False])
def test_python_objects_in_a_ckpt_are_never_run(states, folder, tmp_path, zipped):
    file, sprung = tmp_path / "trap.ckpt", tmp_path / "sprung"
    torch.save(
        {"state_dict": states["vae"], "callbacks": Trap(str(sprung))}, file, _use_new_zipfile_serialization=zipped
    )
    with pytest.raises(UserError, match="holds Python objects, which are never run"):
        load_part(file, "vae", folder)
    assert not sprung.exists()


def test_an_old_ckpt_without_state_dict_or_zip_is_read(states, folder, tmp_path):
    torch.save(to_sgm(states, TINY_UNET), tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    assert_same(load_part(tmp_path / "old.ckpt", "vae", folder).state_dict(), states["vae"])


FAILING_WRITE = """
import resource, sys, torch
from library.errors import UserError
from library.models import single_file
assert not {"diffusers", "transformers"} & sys.modules.keys(), "slow to import"
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # the disk is full after 100 kB
single_file.to_sgm = lambda states, config: {"weight": torch.zeros(1_000_000)}
for path in sys.argv[1:]:
    try:
        single_file.save_single_file(path, dict.fromkeys(single_file.PARTS), {})
        sys.exit("no error")
    except UserError as error:
        print(error)
"""


def test_a_failing_write_leaves_the_old_file_and_nothing_else(tmp_path):
    paths = [tmp_path / "new.safetensors", tmp_path / "new.ckpt", tmp_path / "old.safetensors", tmp_path / "old.ckpt"]
    for path in paths[2:]:
        path.write_text("the run before")
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    result = subprocess.run(
        [sys.executable, "-c", FAILING_WRITE, *map(str, paths)], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    for path, line in zip(paths, result.stdout.splitlines(), strict=True):
        assert line.startswith(f"could not write {path}: ")
    assert sorted(os.listdir(tmp_path)) == ["old.ckpt", "old.safetensors"]
    assert all(path.read_text() == "the run before" for path in paths[2:])


def test_the_final_name_appears_only_when_the_file_is_whole(states, tmp_path, monkeypatch):
    seen = []
    replace = os.replace
    monkeypatch.setattr(single_file.os, "replace", lambda *names: seen.append(os.listdir(tmp_path)) or replace(*names))
    save_single_file(tmp_path / "model.safetensors", states, TINY_UNET)
    assert seen == [[".model.safetensors.tmp"]]
    assert os.listdir(tmp_path) == ["model.safetensors"]


@pytest.mark.parametrize("ending", [".safetensors", ".ckpt"])
def test_the_file_has_the_permissions_of_any_new_file(states, tmp_path, ending):
    (tmp_path / "plain").touch()
    save_single_file(tmp_path / f"model{ending}", states, TINY_UNET)
    assert (tmp_path / f"model{ending}").stat().st_mode == (tmp_path / "plain").stat().st_mode
