"""SD 3 as one file: Stability's layout, which diffusers and our own reader read back bit by bit."""

from types import SimpleNamespace

import pytest
import tiny
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers
from safetensors import safe_open
from safetensors.torch import save_file

from library.errors import UserError
from library.models import sd3, sd3_file, sd3_output, single_file
from library.models.parts import Base

NETWORKS = sd3.PARTS[:5]
# what ComfyUI's model_detection.py and supported_models.py look for
OF_COMFYUI = ["model.diffusion_model.joint_blocks.0.context_block.attn.qkv.weight", "model.diffusion_model.pos_embed",
              "model.diffusion_model.x_embedder.proj.weight", "model.diffusion_model.y_embedder.mlp.0.weight",
              "model.diffusion_model.context_embedder.weight", "first_stage_model.decoder.conv_in.weight",
              "text_encoders.clip_l.transformer.text_model.final_layer_norm.weight",
              "text_encoders.clip_g.transformer.text_model.final_layer_norm.weight",
              "text_encoders.t5xxl.transformer.encoder.final_layer_norm.weight", "text_encoders.t5xxl.transformer.shared.weight",
              "text_encoders.t5xxl.transformer.encoder.embed_tokens.weight"]
FULL = {    # Stability's own sizes
    "3-medium": dict(num_layers=24, num_attention_heads=24, pos_embed_max_size=192),
    "3.5-medium": dict(num_layers=24, num_attention_heads=24, pos_embed_max_size=384, qk_norm="rms_norm",
                       dual_attention_layers=tuple(range(13))),
    "3.5-large": dict(num_layers=38, num_attention_heads=38, pos_embed_max_size=192, qk_norm="rms_norm")}


@pytest.fixture(scope="module", params=list(tiny.SD3))
def model(request, tmp_path_factory):
    """A folder of each flavour, and its pipeline. Its CLIP ViT-L projects nothing, as Stability's."""
    folder = tiny.make_sd3(tmp_path_factory.mktemp("model"), request.param, seed=5)
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder)
    torch.nn.init.eye_(pipeline.text_encoder.text_projection.weight)
    pipeline.text_encoder.save_pretrained(folder / "text_encoder")
    return folder, pipeline


def base_of(folder, no_t5: bool = False) -> Base:
    return Base(folder, folder, None, tuple(folder / name for name in sd3.TOKENIZERS[:2 if no_t5 else 3]), None)


def states_of(pipeline, parts=NETWORKS) -> dict:
    return {part: getattr(pipeline, part).state_dict() for part in parts}


def assert_same(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    assert all(one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one)


def test_the_layout_is_stabilitys(model):
    _, pipeline = model
    written = sd3_file.to_original(states_of(pipeline))
    assert set(OF_COMFYUI) <= written.keys()
    own = {name: tensor for name, tensor in written.items() if name.startswith(sd3_file.PREFIXES["transformer"])}
    assert_same(own, tiny.original_layout(pipeline.transformer))
    rest = {name.partition(".")[0] for name in written.keys() - own.keys()}
    assert rest == {"first_stage_model", "text_encoders"}
    assert "text_encoders.clip_l.transformer.text_projection.weight" not in written
    assert "text_encoders.clip_g.transformer.text_projection.weight" in written


@pytest.mark.parametrize("flavour", list(FULL))
def test_full_size(flavour, tmp_path):
    """On the meta device: every tensor has its place, and diffusers' converter leads each back to where it was."""
    with torch.device("meta"):
        transformer = SD3Transformer2DModel(sample_size=128, joint_attention_dim=4096, pooled_projection_dim=2048,
                                            caption_projection_dim=64 * FULL[flavour]["num_attention_heads"], **FULL[flavour])
    state = transformer.state_dict()
    written = sd3_file.to_original({"transformer": state})
    back = convert_sd3_transformer_checkpoint_to_diffusers(dict(written))
    assert {name: tensor.shape for name, tensor in back.items()} == {name: tensor.shape for name, tensor in state.items()}
    small = {name: torch.zeros(tensor.shape[:2] if name.endswith("pos_embed") else 1) for name, tensor in written.items()}
    save_file(small, tmp_path / "model.safetensors")
    assert sd3_file.holds_sd3(tmp_path / "model.safetensors")
    usual = {"3-medium": "stabilityai/stable-diffusion-3-medium-diffusers"}
    assert sd3_file.usual_configs(tmp_path / "model.safetensors") == usual.get(flavour, f"stabilityai/stable-diffusion-{flavour}")


def test_diffusers_and_we_read_back_what_was_written(model, tmp_path):
    folder, pipeline = model
    states, file = states_of(pipeline), tmp_path / "one.safetensors"
    sd3_file.save(file, states, None, (64, 96))
    assert sd3_file.parts_in(file) == tuple(sd3_file.PREFIXES)
    theirs = StableDiffusion3Pipeline.from_single_file(file, config=str(folder))
    for part in NETWORKS:
        assert_same(getattr(theirs, part).state_dict(), states[part])
        assert_same(sd3_file.load_part(file, part, sd3.class_of(part), folder, torch.float32).state_dict(), states[part])
    with safe_open(file, "pt") as opened:
        header, names = opened.metadata(), list(opened.keys())
    assert header["modelspec.title"] == "one" and header["modelspec.resolution"] == "64x96"
    assert len(names) == len(sd3_file.to_original(states))
    assert ("3.5-medium" in header["modelspec.architecture"]) == bool(pipeline.transformer.config.dual_attention_layers)


def test_a_run_writes_one_file_of_each(model, tmp_path):
    """The average and the weights without averaging, in half precision; without T5 where the run has none."""
    folder, pipeline = model
    trained = pipeline.transformer.state_dict()
    average = SimpleNamespace(averages={"proj_out.bias": trained["proj_out.bias"] + 1})
    args = SimpleNamespace(save_model_as="safetensors", save_precision="bf16", resolution=(64, 64))
    networks = {"transformer": pipeline.transformer}
    written = sd3_output.save_model(tmp_path / "mine", args, base_of(folder, True), networks, average)
    assert [path.name for path in written] == ["mine.safetensors", "mine-raw.safetensors"]
    for file, added in zip(written, (1, 0), strict=True):
        assert sd3_file.parts_in(file) == tuple(sd3_file.PREFIXES)[:4]
        ours = sd3_file.load_part(file, "transformer", SD3Transformer2DModel, folder, torch.bfloat16).state_dict()
        wanted = trained | {"proj_out.bias": trained["proj_out.bias"] + added}
        assert_same(ours, {name: tensor.bfloat16() for name, tensor in wanted.items()})
    assert [path.name for path in tmp_path.iterdir() if path.name not in ("mine.safetensors", "mine-raw.safetensors")] == []


def test_a_trained_projection_of_clip_goes_into_the_transformer(tmp_path, capsys):
    """Other programs read CLIP ViT-L unprojected: with the transformer that the file holds, that says the same."""
    folder = tiny.make_sd3(tmp_path / "model", "3.5-medium", seed=2)
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder)
    args = SimpleNamespace(save_model_as="safetensors", save_precision=None, resolution=(64, 64))
    file, = sd3_output.save_model(tmp_path / "mine", args, base_of(folder), {"transformer": pipeline.transformer}, None)
    assert "no place for a projection of CLIP ViT-L" in capsys.readouterr().out
    other = StableDiffusion3Pipeline.from_single_file(file, config=str(folder))
    other.text_encoder_3.eval()    # diffusers leaves it in training, with dropout
    assert torch.equal(other.text_encoder.text_projection.weight, torch.eye(16))
    given = {"hidden_states": torch.randn(1, 16, 8, 8), "timestep": torch.tensor([300.0])}
    said = []
    for each in (pipeline, other):
        with torch.no_grad():
            prompt, _, pooled, _ = each.encode_prompt("a red cat", None, None, do_classifier_free_guidance=False)
            said.append((each.transformer(**given, encoder_hidden_states=prompt, pooled_projections=pooled).sample, pooled))
    torch.testing.assert_close(said[0][0], said[1][0], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(said[0][1], said[1][1], atol=1e-3)
    same = sd3_file.to_original(states_of(pipeline))["model.diffusion_model.y_embedder.mlp.0.weight"]
    assert not torch.equal(same, pipeline.transformer.state_dict()["time_text_embed.text_embedder.linear_1.weight"])


def test_what_cannot_be_written(model, tmp_path):
    _, pipeline = model
    state = pipeline.transformer.state_dict()
    with pytest.raises(ValueError, match="no place for transformer_blocks.0.attn.to_q.base_layer.weight"):
        sd3_file.to_original({"transformer": {name.replace("0.attn.to_q.", "0.attn.to_q.base_layer."): tensor
                                              for name, tensor in state.items()}})
    with pytest.raises(UserError, match="final_layer.linear.bias reaches 7e\\+04, too large for torch.float16: save as bf16"):
        sd3_file.save(tmp_path / "x.safetensors", {"transformer": state | {"proj_out.bias": torch.full((64,), 7e4)}},
                      torch.float16, (64, 64))
    assert not list(tmp_path.iterdir())


def test_which_files_hold_sd3(tmp_path):
    save_file({"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(1)}, tmp_path / "sdxl.safetensors")
    single_file.write(tmp_path / "old.ckpt", {}, {})
    assert not any(sd3_file.holds_sd3(path) for path in tmp_path.iterdir())
    (tmp_path / "cut.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(UserError, match="damaged or cut short"):
        sd3_file.holds_sd3(tmp_path / "cut.safetensors")
