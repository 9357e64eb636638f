"""Validation images: the faults that are named, the seeds, and a training that does not notice them."""

import contextlib
import json
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from diffusers import AutoencoderKL, StableDiffusion3Pipeline, StableDiffusionXLPipeline
from PIL import Image

from library.diffusion.ema import EMA
from library.models.encoders import Prompt
from library.validation import images

SIZES = [(64, 64), (96, 64)]


@pytest.fixture(scope="module")
def pipeline(tiny_model):
    whole = StableDiffusionXLPipeline.from_pretrained(tiny_model)
    whole.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():    # the last layer of a fresh UNet is small: give the prompt something to say
        for parameter in whole.unet.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return whole


@pytest.fixture(scope="module")
def prompts(pipeline):
    texts = ["A photo of a RED cat!", "", "blue dog"]
    with torch.no_grad():
        hidden, _, pooled, _ = pipeline.encode_prompt(texts, device="cpu", do_classifier_free_guidance=False)
    return [Prompt(text, hidden[row:row + 1], pooled[row:row + 1]) for row, text in enumerate(texts)]


def draw(pipeline, prompts, **changes):
    given = dict(count=2, steps=3, guidance=5.0, seed=7, autocast=contextlib.nullcontext, device="cpu") | changes
    return images.draw(pipeline, prompts[:2], prompts[2], given.pop("sizes", SIZES), **given)


def pixels(drawn: dict) -> dict:
    return {name: np.asarray(image).astype(int) for name, (_, image) in drawn.items()}


def test_names_prompts_and_sizes(pipeline, prompts):
    drawn = draw(pipeline, prompts)
    assert list(drawn) == [f"{name}-{size}-{number}.png" for name in ("00-a-photo-of-a-red-cat", "01-empty")
                           for size in ("64x64", "96x64") for number in (0, 1)]
    assert {text for text, _ in drawn.values()} == {"A photo of a RED cat!", ""}
    assert all(f"{image.width}x{image.height}" in name for name, (_, image) in drawn.items())
    assert not images.faults(drawn)


def test_fixed_seeds_give_the_same_images(pipeline, prompts):
    one, same = pixels(draw(pipeline, prompts)), pixels(draw(pipeline, prompts))
    assert all((one[name] == same[name]).all() for name in one)
    other = pixels(draw(pipeline, prompts, seed=8))
    assert all((one[name] != other[name]).any() for name in one)
    following = {name: one[name.replace("-0.png", "-1.png")] for name in one if name.endswith("-0.png")}
    for name, image in following.items():    # image i has seed + i, however many are drawn
        assert abs(image - other[name]).max() <= 1
    alone = pixels(draw(pipeline, prompts, count=1))
    assert all(abs(one[name] - alone[name]).max() <= 1 for name in alone)


def test_the_images_are_those_of_the_whole_pipeline(pipeline, prompts):
    ours = draw(pipeline, prompts, sizes=[(64, 64)], count=1)
    for prompt, (_, image) in zip(prompts[:2], ours.values(), strict=True):
        theirs = pipeline(prompt=prompt.text, negative_prompt=prompts[2].text, width=64, height=64, num_inference_steps=3,
                          guidance_scale=5.0, generator=torch.Generator().manual_seed(7)).images[0]
        assert abs(np.asarray(image).astype(int) - np.asarray(theirs)).max() <= 1


def test_several_images_of_sd3_are_those_drawn_alone(tmp_path):
    """Its pipeline repeats no embeddings that it is given."""
    whole = StableDiffusion3Pipeline.from_pretrained(tiny.make_sd3(tmp_path / "sd3"))
    with torch.no_grad():
        hidden, _, pooled, _ = whole.encode_prompt(["red cat", ""], ["red cat", ""], ["red cat", ""], device="cpu",
                                                   do_classifier_free_guidance=False)
    texts = [Prompt(text, hidden[row:row + 1], pooled[row:row + 1]) for row, text in enumerate(("red cat", ""))]
    options = {"skip_guidance_layers": [0], "skip_layer_guidance_start": 0.1, "skip_layer_guidance_stop": 0.9}
    given = dict(steps=4, guidance=3.0, autocast=contextlib.nullcontext, device="cpu", **options)
    both = pixels(images.draw(whole, texts[:1], texts[1], [(64, 64)], count=2, seed=7, **given))
    alone = [pixels(images.draw(whole, texts[:1], texts[1], [(64, 64)], count=1, seed=seed, **given)) for seed in (7, 8)]
    for image, (other,) in zip(both.values(), (each.values() for each in alone), strict=True):
        assert abs(image - other).max() <= 1
    assert abs(np.subtract(*both.values())).max() > 1


@pytest.mark.parametrize("change", [{"guidance": 1.0}, {"steps": 2}], ids=str)
def test_guidance_and_steps_matter(pipeline, prompts, change):
    one, other = pixels(draw(pipeline, prompts, count=1)), pixels(draw(pipeline, prompts, count=1, **change))
    assert all((one[name] != other[name]).any() for name in one)


def test_the_vae_runs_outside_of_autocast(pipeline, prompts):
    """SDXL's own overflows in half precision."""
    seen = {}
    hooks = [pipeline.vae.decoder.register_forward_hook(lambda module, inputs, output: seen.update(vae=output.dtype)),
             pipeline.unet.conv_in.register_forward_hook(lambda module, inputs, output: seen.update(unet=output.dtype))]
    try:
        draw(pipeline, prompts, count=1, sizes=[(64, 64)], autocast=lambda: torch.autocast("cpu", torch.bfloat16))
    finally:
        for hook in hooks:
            hook.remove()
    assert seen == {"vae": torch.float32, "unet": torch.bfloat16}


def test_images_that_show_nothing_are_named():
    good = Image.effect_noise((16, 16), 50).convert("RGB")
    nearly = Image.new("RGB", (16, 16), (9, 90, 200))
    nearly.putpixel((15, 15), (9, 90, 201))
    drawn = {"black.png": ("a", Image.new("RGB", (16, 16))), "red.png": ("b", Image.new("RGB", (16, 16), (255, 0, 0))),
             "grey.png": ("c", Image.new("RGB", (16, 16), (128, 128, 128))), "nan.png": ("d", None), "good.png": ("e", good),
             "nearly.png": ("f", nearly)}
    assert images.faults(drawn) == ["black.png is black throughout", "red.png is of one colour throughout",
                                    "grey.png is of one colour throughout",
                                    "nan.png is NaN or infinite: the model or the VAE has overflowed"]


def test_latents_are_decoded_as_the_pipeline_decodes_them(tiny_model):
    """StableDiffusionXLPipeline: latents * std / scaling_factor + mean; where the VAE has neither, / scaling_factor."""
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    for mean, std in ((None, None), ([0.3, -0.4, 0.5, 0.0], [0.5, 1.5, 2.0, 1.0])):
        vae = AutoencoderKL.from_pretrained(tiny_model / "vae")
        vae.register_to_config(latents_mean=mean, latents_std=std)
        given = latents / 0.5
        if mean:
            given = latents * torch.tensor(std).view(1, 4, 1, 1) / 0.5 + torch.tensor(mean).view(1, 4, 1, 1)
        with torch.no_grad():
            wanted = ((vae.decode(given).sample / 2 + 0.5).clamp(0, 1)[0] * 255).round().permute(1, 2, 0)
        (image,) = images.decode(vae, latents)
        assert np.abs(np.asarray(image) - wanted.numpy()).max() <= 1 and wanted.std() > 1


def test_latents_that_overflow_become_a_named_fault(pipeline):
    latents = torch.zeros(3, 4, 8, 8)
    latents[1, 0, 0, 0], latents[2, 0, 0, 0] = float("nan"), float("inf")
    decoded = images.decode(pipeline.vae, latents)
    assert decoded[0].size == (64, 64) and decoded[1:] == [None, None]


def test_what_is_saved_is_read_back(tmp_path):
    picture = Image.effect_noise((8, 8), 50).convert("RGB")
    images.save({"a.png": ("a cat", picture), "bad.png": ("a dog", None)}, tmp_path / "step-000001")
    assert sorted(path.name for path in (tmp_path / "step-000001").iterdir()) == ["a.png", "prompts.json"]
    assert json.loads((tmp_path / "step-000001" / "prompts.json").read_text()) == {"a.png": "a cat"}
    with Image.open(tmp_path / "step-000001" / "a.png") as again:
        assert (np.asarray(again) == np.asarray(picture)).all()


def test_the_grid():
    colours = ["red", "lime", "blue", "yellow", "black"]
    sheet = images.grid([Image.new("RGB", (10 + 2 * number, 20), colour) for number, colour in enumerate(colours)], 3)
    assert sheet.size == (3 * 22, 2 * 24)    # five images in rows of three, cells of the largest and a border
    corners = [sheet.getpixel((2 + 22 * (number % 3), 2 + 24 * (number // 3))) for number in range(5)]
    assert corners == [Image.new("RGB", (1, 1), colour).getpixel((0, 0)) for colour in colours]
    assert sheet.getpixel((0, 0)) == sheet.getpixel((60, 40)) == (255, 255, 255)    # border, and the place left over


class Board:
    def __init__(self):
        self.shown = {}

    def images(self, step, images):
        self.shown[step] = images


def validate(pipeline, prompts, network, average, folder, **flags):
    args = SimpleNamespace(**{"validation_resolution": [(64, 64)], "resolution": (64, 64), "num_validation_images": 1,
                              "validation_num_inference_steps": 2, "validation_guidance": 5.0, "validation_seed": 3,
                              "validation_preview": False} | flags)
    board = Board()
    accelerator = SimpleNamespace(is_main_process=True, autocast=contextlib.nullcontext, device=torch.device("cpu"))
    images.run(args, 1, pipeline, (prompts[:1], prompts[2]), network, average, 4, folder, board, accelerator)
    return board.shown[4]["00-a-photo-of-a-red-cat-64x64-0.png"]


def test_averaged_weights_draw_and_the_own_ones_come_back(pipeline, prompts, tmp_path):
    unet = pipeline.unet.train()
    raw = validate(pipeline, prompts, unet, None, tmp_path)
    average = EMA(unet, 0.9)
    for values in average.averages.values():
        values.mul_(0.8)
    own = {name: value.clone() for name, value in unet.state_dict().items()}
    averaged = validate(pipeline, prompts, unet, average, tmp_path)
    assert unet.training and all(torch.equal(value, own[name]) for name, value in unet.state_dict().items())
    assert (np.asarray(raw) != np.asarray(averaged)).any()
    with average.applied(unet):
        wanted = validate(pipeline, prompts, unet, None, tmp_path)
    assert (np.asarray(wanted) == np.asarray(averaged)).all()
    assert (tmp_path / "validation" / "step-000004" / "00-a-photo-of-a-red-cat-64x64-0.png").exists()


def test_a_fault_is_said_aloud(pipeline, prompts, tmp_path, capsys):
    average = EMA(pipeline.unet, 0.9)
    average.averages["conv_out.bias"].fill_(float("nan"))
    with pytest.raises(KeyError):    # there is no image to show
        validate(pipeline, prompts, pipeline.unet, average, tmp_path)
    assert "validation at step 4: 00-a-photo-of-a-red-cat-64x64-0.png is NaN or infinite" in capsys.readouterr().out
    assert torch.isfinite(pipeline.unet.conv_out.bias).all()
