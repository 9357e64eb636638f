"""generate.py on a tiny SD 3.5: what diffusers draws, skip-layer guidance, files of all kinds, and mistakes in one sentence."""

import json
import shutil
from pathlib import Path

import numpy as np
import peft
import pytest
import tiny
import torch
from diffusers import StableDiffusion3Img2ImgPipeline, StableDiffusion3Pipeline
from PIL import Image
from test_generate import pixels

import generate
from library import errors
from library.models import sd3, sd3_file

PROMPT = ("--prompt", "a red cat")
T5 = 154    # tokens of a prompt, as in training


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tiny.make_sd3(tmp_path_factory.mktemp("sd3"), "3.5-medium")
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder)
    torch.nn.init.eye_(pipeline.text_encoder.text_projection.weight)    # one file has none
    pipeline.text_encoder.save_pretrained(folder / "text_encoder")
    return folder


@pytest.fixture(scope="module")
def pipeline(model):
    pipeline = StableDiffusion3Pipeline.from_pretrained(model)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def args_of(model, output, *flags):
    return generate.parse_args(["--model", str(model), "--steps", "4", "--size", "64", "--output_dir", str(output),
                                *map(str, flags)])


@pytest.fixture
def draw(model, tmp_path):
    """`draw(*flags)` -> {file name: picture} of a run with four steps."""
    def draw(*flags, model=model):
        output = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
        generate.main(args_of(model, output, *flags))
        return {path.name: Image.open(path) for path in sorted(output.glob("*.png"))}
    return draw


@pytest.fixture(scope="module")
def plain(model, tmp_path_factory):
    """The picture that every other flag is compared with."""
    output = tmp_path_factory.mktemp("plain")
    generate.main(args_of(model, output, *PROMPT))
    return pixels(Image.open(output / "000-0.png"))


def drawn_by(pipeline, prompt: str = "a red cat", **options) -> np.ndarray:
    usual = dict(num_inference_steps=4, width=64, height=64, guidance_scale=5.0, max_sequence_length=T5)
    with torch.no_grad():
        return pixels(pipeline(prompt, generator=torch.Generator().manual_seed(0), **usual | options).images[0])


@pytest.mark.parametrize(("flags", "options"), [
    ((), {}), (("--guidance", 1), {"guidance_scale": 1}), (("--steps", 6), {"num_inference_steps": 6}),
    (("--negative_prompt", "a blue dog"), {"negative_prompt": "a blue dog"}), (("--size", "96,64"), {"width": 96}),
    (("--tokenizer_max_length", 77), {"max_sequence_length": 77})], ids=lambda value: str(value)[:30])
def test_it_draws_what_diffusers_draws(draw, pipeline, plain, flags, options):
    ours = pixels(draw(*PROMPT, *flags)["000-0.png"])
    assert np.abs(ours - drawn_by(pipeline, **options)).max() <= 1
    assert not flags or ours.shape != plain.shape or (ours != plain).any()


@pytest.mark.parametrize("layers", [("0", "2"), ("[0, 2]",), ("0,2",)])
def test_skip_layer_guidance_is_the_pipelines(draw, pipeline, plain, layers):
    flags = (*PROMPT, "--skip_layers", *layers, "--skip_layer_stop", 0.9)
    drawn = draw(*flags)["000-0.png"]
    options = dict(skip_guidance_layers=[0, 2], skip_layer_guidance_scale=2.8, skip_layer_guidance_start=0.01,
                   skip_layer_guidance_stop=0.9)
    assert np.abs(pixels(drawn) - drawn_by(pipeline, **options)).max() <= 1 and (pixels(drawn) != plain).any()
    said = json.loads(drawn.text["generate"])
    assert {name: said[name] for name in options} == options
    if layers == ("0", "2"):
        for changed in (("--skip_layer_scale", 6), ("--skip_layer_start", 0.3), ("--skip_layer_stop", 0.4), ("--skip_layers", 1)):
            assert (pixels(draw(*flags, *changed)["000-0.png"]) != pixels(drawn)).any(), changed


def test_from_a_picture(draw, model, tmp_path):
    start = tiny.picture(70, 90, 3)    # its sides are made multiples of 16
    start.save(tmp_path / "start.png")
    flags = (*PROMPT, "--image", tmp_path / "start.png", "--strength", 0.5)
    made = generate.read_start(generate.parse_args(["--model", "x", *map(str, flags)]), 16)
    assert made.size == (64, 80)
    ours = draw(*flags, "--size", "64,80")["000-0.png"]
    theirs = StableDiffusion3Img2ImgPipeline.from_pretrained(model)
    assert np.abs(pixels(ours) - drawn_by(theirs, image=made, height=80, strength=0.5)).max() <= 1
    assert (pixels(ours) != pixels(draw(*flags[:-1], 0.9, "--size", "64,80")["000-0.png"])).any()
    assert draw(*flags, "--precision", "bf16", "--scheduler", "heun")["000-0.png"].size == (64, 64)


@pytest.mark.parametrize("scheduler", ["heun", "dpm++", "unipc"])
def test_every_sampler_ends_where_the_models_own_does(draw, scheduler, plain):
    """They solve one equation: with many steps, they draw one picture."""
    fine = pixels(draw(*PROMPT, "--steps", 60)["000-0.png"])
    own = pixels(draw(*PROMPT, "--steps", 30, "--scheduler", scheduler)["000-0.png"])
    assert np.abs(own - fine).mean() < 0.25 * np.abs(plain - fine).mean()


def test_without_t5(draw, model, plain, tmp_path):
    asked = pixels(draw(*PROMPT, "--no_t5")["000-0.png"])
    lean = shutil.copytree(model, tmp_path / "lean", ignore=shutil.ignore_patterns("*_3"))
    index = json.loads((lean / "model_index.json").read_text()) | {"text_encoder_3": [None, None], "tokenizer_3": [None, None]}
    (lean / "model_index.json").write_text(json.dumps(index))
    assert (asked == pixels(draw(*PROMPT, model=lean)["000-0.png"])).all() and (asked != plain).any()
    theirs = StableDiffusion3Pipeline.from_pretrained(model, text_encoder_3=None, tokenizer_3=None)
    assert np.abs(asked - drawn_by(theirs)).max() <= 1


def test_one_file_and_raw_weights(draw, pipeline, model, plain, tmp_path):
    """Stability's files hold some text encoders or none: the others, and the tokenizers, come from --config."""
    for count in (0, 2, 3):
        file = tiny.write_one_file(tmp_path / f"{count}.safetensors", pipeline, *sd3.TEXT_ENCODERS[:count])
        assert (pixels(draw(*PROMPT, "--config", model, model=file)["000-0.png"]) == plain).all()
    ours = tmp_path / "ours.safetensors"
    sd3_file.save(ours, {part: getattr(pipeline, part).state_dict() for part in sd3_file.PREFIXES}, None, (64, 64))
    assert (pixels(draw(*PROMPT, "--config", model, model=ours)["000-0.png"]) == plain).all()
    both = shutil.copytree(model, tmp_path / "both")
    raw = StableDiffusion3Pipeline.from_pretrained(model).transformer
    torch.nn.init.normal_(raw.proj_out.weight, std=0.1)
    raw.save_pretrained(both / "transformer_raw")
    assert (pixels(draw(*PROMPT, model=both)["000-0.png"]) == plain).all()
    assert (pixels(draw(*PROMPT, "--raw", model=both)["000-0.png"]) != plain).any()


def test_an_adapter_of_sd3(draw, model, plain, tmp_path):
    """Trained in appearance, and written by diffusers."""
    theirs = StableDiffusion3Pipeline.from_pretrained(model)
    theirs.set_progress_bar_config(disable=True)
    targets = ["to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "to_add_out", "ff.net.2", "norm1.linear", "proj_out"]
    theirs.transformer.add_adapter(peft.LoraConfig(r=4, lora_alpha=4, target_modules=targets, init_lora_weights=False))
    StableDiffusion3Pipeline.save_lora_weights(tmp_path / "lora", peft.get_peft_model_state_dict(theirs.transformer))
    ours = pixels(draw(*PROMPT, "--lora", tmp_path / "lora")["000-0.png"])
    assert np.abs(ours - drawn_by(theirs)).max() <= 1 and np.abs(ours - plain).max() > 5


@pytest.mark.parametrize(("flags", "message"), [
    (("--size", "72,64"), "SD3 takes no images of 72 x 64 pixels: sides must be multiples of 16, and in this model at most 768; "
                          "change --size"),
    (("--size", "784"), "SD3 takes no images of 784 x 784 pixels"),
    (("--scheduler", "ddim"), "--scheduler ddim: SD3 is drawn with dpm++, euler, heun, unipc"),
    (("--image", "{picture}", "--scheduler", "unipc"), "with --image, use euler or heun"),
    (("--skip_layers", "3", "--skip_layer_stop", "0.9"), "--skip_layers: there is no layer 3: the transformer in"),
    (("--raw",), "lacks transformer_raw"), (("--model", "{sdxl}", "--no_t5"), "--no_t5 is of SD3, and --model"),
    (("--model", "{sdxl}", "--skip_layers", "1", "--steps", "30"), "--skip_layers is of SD3"),
    (("--model", "{flux}"), "is a FluxPipeline; there are SDXL, SD 3 and SD 3.5 here"),
    (("--model", "{none}"), "has no model_index.json that says what it is")])
def test_mistakes_end_in_one_sentence(model, tiny_model, capsys, flags, message, tmp_path):
    places = {name: tmp_path / name for name in ("none", "flux", "picture")} | {"sdxl": tiny_model}
    for name in ("none", "flux"):
        places[name].mkdir()
    (places["flux"] / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    tiny.picture(64, 64, 1).save(places["picture"], "PNG")
    with pytest.raises(SystemExit) as left, errors.exit_on_user_error("generate.py"):
        generate.main(args_of(model, tmp_path, *PROMPT, *(flag.format(**places) for flag in flags)))
    assert left.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("flags", "message"), [
    (("--skip_layer_scale", "3"), "--skip_layer_scale needs --skip_layers"),
    (("--skip_layers", "1", "--image", "x.png"), "--skip_layers and --image exclude each other"),
    (("--skip_layers", "1", "--guidance", "1"), "changes nothing without --guidance above 1"),
    (("--skip_layers", "1", "--steps", "4"), "none of 4 steps lies between --skip_layer_start 0.01 and --skip_layer_stop 0.2"),
    (("--skip_layers", "one"), "'one' is neither the number of a layer nor a list of them")])
def test_skipping_that_would_change_nothing_is_refused(capsys, flags, message):
    with pytest.raises(SystemExit) as left:
        generate.parse_args(["--model", "x", *PROMPT, *flags])
    assert left.value.code == 2 and message in capsys.readouterr().err
    assert not Path("x.png").exists()
