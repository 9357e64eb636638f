"""One whole step of train_sdxl.py against the arithmetic of diffusers' train_text_to_image_sdxl.py, in float32."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.training_utils import compute_snr
from PIL import Image

import train_sdxl
from library.data import dataset, draws, loader
from library.diffusion import ddpm
from library.models import caching, sdxl
from library.models.encoders import Encoders

B, T = 4, 1000
PLAIN = dict(strategy="none", multiplier=1.0, begin=0, end=T, portion=0.25)
LONG = ", ".join(f"red cat {number} of house" for number in range(40))    # more than 225 tokens
PROMPTS = ["", "a photo of a red cat", "blue dog, green house, number 7!", " ".join(["dog"] * 75), " ".join(["cat"] * 76), LONG]
CPU = SimpleNamespace(device=torch.device("cpu"), mixed_precision="no", process_index=0, num_processes=1)


@pytest.fixture(scope="module")
def unet(tiny_model):
    network = UNet2DConditionModel.from_pretrained(tiny_model / "unet")
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():    # fresh norms and biases are ones and zeros, and some layers start at nothing
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return network.train()


@pytest.fixture
def batch():
    draw = torch.Generator().manual_seed(11)
    t = torch.tensor([3, 250, 640, 999])
    ids = [[1333, 1001, 17, 0, 1024, 1024], [64, 64, 0, 0, 64, 64], [4096, 257, 3, 1023, 512, 768], [77, 78, 1, 2, 8, 16]]
    return t, {
        "latents": torch.randn(B, 4, 8, 8, generator=draw), "noise": torch.randn(B, 4, 8, 8, generator=draw),
        "noise_offset": torch.randn(B, 4, 1, 1, generator=draw), "prompt_embeds": torch.randn(B, 77, 48, generator=draw),
        "pooled_prompt_embeds": torch.randn(B, 32, generator=draw), "time_ids": torch.tensor(ids, dtype=torch.float32)}


def theirs(unet, schedule, batch, timesteps, snr_gamma, noise_offset):
    """The step of diffusers' script, line by line, with the draws of noise, offset and timesteps given."""
    model_input, noise = batch["latents"], batch["noise"].clone()
    if noise_offset:
        noise += noise_offset * batch["noise_offset"]
    noisy_model_input = schedule.add_noise(model_input, noise, timesteps)
    unet_added_conditions = {"time_ids": batch["time_ids"], "text_embeds": batch["pooled_prompt_embeds"]}
    model_pred = unet(noisy_model_input, timesteps, batch["prompt_embeds"], added_cond_kwargs=unet_added_conditions,
                      return_dict=False)[0]
    if schedule.config.prediction_type == "epsilon":
        target = noise
    else:
        target = schedule.get_velocity(model_input, noise, timesteps)
    if snr_gamma is None:
        return F.mse_loss(model_pred.float(), target.float(), reduction="mean")
    snr = compute_snr(schedule, timesteps)
    weights = torch.stack([snr, snr_gamma * torch.ones_like(timesteps)], dim=1).min(dim=1)[0]
    weights = weights / snr if schedule.config.prediction_type == "epsilon" else weights / (snr + 1)
    loss = F.mse_loss(model_pred.float(), target.float(), reduction="none")
    loss = loss.mean(dim=list(range(1, len(loss.shape)))) * weights
    return loss.mean()


def step(unet, loss):
    unet.zero_grad()
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in unet.named_parameters()}


@pytest.mark.parametrize("bias", [PLAIN, PLAIN | dict(strategy="later", multiplier=5.0), PLAIN | dict(
    strategy="range", multiplier=0.1, begin=100, end=700)], ids=lambda bias: bias["strategy"])
@pytest.mark.parametrize("noise_offset", [0.0, 0.1])
@pytest.mark.parametrize("snr_gamma", [None, 5.0])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_loss_and_every_gradient_are_those_of_diffusers(unet, batch, tiny_model, kind, snr_gamma, noise_offset, bias):
    timesteps, values = batch
    schedule = DDPMScheduler.from_pretrained(tiny_model, subfolder="scheduler", prediction_type=kind)
    wanted, wanted_grads = step(unet, theirs(unet, schedule, values, timesteps, snr_gamma, noise_offset))

    probability = ddpm.timestep_bias(bias["strategy"], T, bias["multiplier"], bias["begin"], bias["end"], bias["portion"])
    before = F.pad(probability.double().cumsum(0), (1, 0))
    values["loss_weight"] = torch.ones(B)
    values["timestep_draw"] = ((before[timesteps] + before[timesteps + 1]) / 2).float()    # the middle of each one's share
    args = SimpleNamespace(snr_gamma=snr_gamma, noise_offset=noise_offset, masked_loss_area="image")
    ours, grads = step(unet, train_sdxl.training_loss(unet, values, schedule, ddpm.cumulative(probability), args))

    torch.testing.assert_close(ours, wanted, rtol=1e-6, atol=0)
    assert grads.keys() == wanted_grads.keys() and len(grads) > 100
    for name, wanted_grad in wanted_grads.items():
        largest = wanted_grad.abs().max()
        assert largest > 0, f"{name} has no gradient: the comparison says nothing"
        assert (grads[name] - wanted_grad).abs().max() <= 1e-6 * largest, name


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bf16 autocast"])
def test_time_ids_reach_the_unet_as_they_are(unet, batch, tiny_model, autocast):
    """1333 stays 1333: bfloat16 would make it 1336."""
    _, values = batch
    args = SimpleNamespace(snr_gamma=None, noise_offset=0.0, masked_loss_area="image")
    values["loss_weight"] = torch.ones(B)
    values["timestep_draw"] = torch.full((B,), 0.5)
    seen = []
    handle = unet.add_time_proj.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    try:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            train_sdxl.training_loss(unet, values, DDPMScheduler.from_pretrained(tiny_model, subfolder="scheduler"),
                                     torch.linspace(1 / T, 1, T), args)
    finally:
        handle.remove()
    assert len(seen) == 1 and seen[0].dtype == torch.float32
    assert seen[0].view(B, 6).tolist() == values["time_ids"].tolist() and seen[0][0] == 1333
    assert torch.tensor(1333.0).bfloat16().item() == 1336


def encoders_of(parse, *flags) -> tuple:
    args = parse(*flags)
    return args, Encoders(sdxl, args, sdxl.find_base(args), CPU)


def test_prompt_embeddings_are_those_of_the_pipeline(parse, tiny_model):
    pipeline = StableDiffusionXLPipeline.from_pretrained(tiny_model)
    _, encoders = encoders_of(parse)
    encoded = encoders.encode_prompts(PROMPTS)
    hidden, _, pooled, _ = pipeline.encode_prompt(PROMPTS, device="cpu", do_classifier_free_guidance=False)
    assert hidden.shape == (len(PROMPTS), 77, 48) and pooled.shape == (len(PROMPTS), 32)
    torch.testing.assert_close(encoded["hidden"], hidden, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(encoded["pooled"], pooled, rtol=1e-6, atol=1e-6)
    assert encoders.truncated == {"--max_token_length 77": {PROMPTS[-2], LONG}}    # 75 tokens fit


def kohya(prompt: str, tokenizer, encoder, length: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """sd-scripts' get_input_ids and get_hidden_states_sdxl for one prompt (peers/kohya_ascend.md, 2.4)."""
    ids = tokenizer(prompt, padding="max_length", truncation=True, max_length=length + 2, return_tensors="pt").input_ids[0]
    chunks = []
    for start in range(1, length - 77 + 4, 75):
        chunk = torch.cat([ids[:1], ids[start:start + 75], ids[-1:]])
        if tokenizer.pad_token_id != tokenizer.eos_token_id:
            if chunk[-2] not in (tokenizer.eos_token_id, tokenizer.pad_token_id):
                chunk[-1] = tokenizer.eos_token_id
            if chunk[1] == tokenizer.pad_token_id:
                chunk[1] = tokenizer.eos_token_id
        chunks.append(chunk)
    output = encoder(torch.stack(chunks), output_hidden_states=True)
    states = output.hidden_states[-2]
    stitched = torch.cat([states[0, :1], *[states[n, 1:76] for n in range(len(chunks))], states[-1, -1:]])
    if not hasattr(output, "text_embeds"):
        return stitched, None
    end = (chunks[0] == tokenizer.eos_token_id).int().argmax()
    return stitched, encoder.text_projection(output.last_hidden_state[0, end])


@pytest.mark.parametrize("length", [150, 225])
def test_long_prompts_are_cut_as_kohya_cuts_them(parse, length):
    _, encoders = encoders_of(parse, "--max_token_length", length)
    encoded = encoders.encode_prompts(PROMPTS)
    assert encoded["hidden"].shape == (len(PROMPTS), length + 2, 48)
    pairs = list(zip(encoders.tokenizers, encoders.text_encoders, strict=True))
    for row, prompt in enumerate(PROMPTS):
        with torch.no_grad():
            (one, _), (two, pooled) = (kohya(prompt, *pair, length) for pair in pairs)
        torch.testing.assert_close(encoded["hidden"][row], torch.cat([one, two], dim=-1), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(encoded["pooled"][row], pooled, rtol=1e-5, atol=1e-5)
    assert encoders.truncated == {f"--max_token_length {length}": {LONG}}


def test_bf16_encodes_as_the_pipeline_in_bf16(parse, tiny_model):
    args = parse("--mixed_precision", "bf16")
    encoders = Encoders(sdxl, args, sdxl.find_base(args), SimpleNamespace(device=torch.device("cpu"), mixed_precision="bf16"))
    pipeline = StableDiffusionXLPipeline.from_pretrained(tiny_model, dtype=torch.bfloat16)
    hidden, _, pooled, _ = pipeline.encode_prompt(PROMPTS[:3], device="cpu", do_classifier_free_guidance=False)
    encoded = encoders.encode_prompts(PROMPTS[:3])
    assert encoded["hidden"].dtype == torch.bfloat16
    assert torch.equal(encoded["hidden"], hidden) and torch.equal(encoded["pooled"], pooled)


@pytest.fixture(params=["plain", "with mean and std"])
def model_and_scale(request, tiny_model, tmp_path):
    """A model folder, and diffusers' arithmetic from a VAE's latents to what the UNet sees."""
    if request.param == "plain":
        return tiny_model, lambda z: z * 0.5
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    config = json.loads((folder / "vae" / "config.json").read_text())
    mean, std = [0.1, -0.2, 0.3, 0.0], [0.5, 1.5, 2.0, 1.0]
    (folder / "vae" / "config.json").write_text(json.dumps(config | {"latents_mean": mean, "latents_std": std}))
    mean, std = (torch.tensor(values).view(1, 4, 1, 1) for values in (mean, std))
    return folder, lambda z: (z - mean) * 0.5 / std    # train_dreambooth_lora_sdxl.py


@pytest.mark.parametrize("cached", [True, False], ids=["cached", "in the step"])
def test_latents_are_those_of_diffusers(parse, tmp_path, tiny_images, model_and_scale, cached):
    """From the picture's file to the UNet: resize, centre crop, normalise, encode, draw, shift and scale."""
    folder, scale = model_and_scale
    flags = ("--pretrained_model_name_or_path", folder, "--center_crop", "--embedding_cache_dir", tmp_path / "cache")
    args, encoders = encoders_of(parse, *flags, f"--cache_latents={cached}")
    data = dataset.load(args, 1, tmp_path / "scan", decode=False)
    data, order, steps, latents = caching.cache_images(args, encoders, data, 1, 1, tmp_path / "cache")
    prompts = caching.cache_captions(args, encoders, data, order, steps, tmp_path / "cache")
    made = loader.Loader(data, order, latents, prompts, args, 1, CPU)
    ours, (rows, visits, _) = made.compose(0, 0)["latents"], made.samples(0, 0)
    draw = torch.from_numpy(np.stack([draws.generator(1, int(row), int(visit), draws.LATENT).standard_normal(
        (4, 8, 8), dtype=np.float32) for row, visit in zip(rows, visits, strict=True)]))

    vae = AutoencoderKL.from_pretrained(folder / "vae")
    pixels = []
    for row in rows:
        with Image.open(tiny_images / str(data.table.name[row])) as image:
            short = min(image.size)
            wide, high = (int(64 * side / short) for side in image.size)    # torchvision's Resize(64)
            left, top = (max(0, int(round((side - 64) / 2.0))) for side in (wide, high))
            image = image.convert("RGB").resize((wide, high), Image.Resampling.LANCZOS).crop((left, top, left + 64, top + 64))
        pixels.append((torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 255 - 0.5) / 0.5)
    with torch.no_grad():
        posterior = vae.encode(torch.stack(pixels)).latent_dist
    wanted = scale(posterior.mean + posterior.std * draw)
    assert ours.shape == (2, 4, 8, 8)
    torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-5)    # another memory layout of the convolutions
