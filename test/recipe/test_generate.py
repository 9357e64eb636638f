"""generate.py on a tiny model: every flag changes what it says, and mistakes end in one sentence."""

import functools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image

import generate
from library import errors
from library.models import adapter_files, adapter_find, adapter_merge, adapters
from library.models.adapter_settings import Settings

ROOT = Path(__file__).parents[2]
PARTS = ("unet", "text_encoder", "text_encoder_2")
LYCORIS = {"algo": "lokr", "linear_dim": 4, "linear_alpha": 2, "factor": 4, "dora_wd": True,
           "apply_preset": {"target_module": ["Attention", "CLIPAttention"]}}
KINDS = {"lora": (Settings("lora", 4, 3.0), "diffusers"), "dora": (Settings("dora", 4, 3.0, "convolutions"), "diffusers"),
         "loha": (Settings("loha", 4, 3.0), "kohya"), "lokr": (Settings("lokr", 4, 3.0, "convolutions"), "kohya"),
         "oft": (Settings("oft", 4), "kohya"), "lycoris": (Settings("lycoris", lycoris_config=LYCORIS), "kohya"),
         "second": (Settings("lora", 2, 1.0, "attention-ff"), "kohya")}


@pytest.fixture
def draw(tiny_model, tmp_path):
    """`draw(*flags)` -> {file name: picture} of a run with two steps."""
    def draw(*flags, model=tiny_model):
        output = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
        generate.main(generate.parse_args(["--model", str(model), "--steps", "2", "--size", "64", "--output_dir", str(output),
                                           *map(str, flags)]))
        return {path.name: Image.open(path) for path in sorted(output.glob("*.png"))}
    return draw


@pytest.fixture(scope="module")
def plain(tiny_model, tmp_path_factory):
    """The picture that every other flag is compared with."""
    output = tmp_path_factory.mktemp("plain")
    generate.main(generate.parse_args(["--model", str(tiny_model), "--steps", "2", "--size", "64", "--prompt", "a red cat",
                                       "--output_dir", str(output)]))
    return Image.open(output / "000-0.png")


@functools.cache
def make_adapters(model: Path) -> dict:
    """Kind -> a file of such an adapter of UNet and text encoders, trained in appearance, and the pipeline it was made on."""
    made = {}
    for seed, (kind, (settings, fmt)) in enumerate(KINDS.items()):
        pipeline = StableDiffusionXLPipeline.from_pretrained(model)
        networks = {part: getattr(pipeline, part) for part in PARTS}
        adapters.add(pipeline.unet, [pipeline.text_encoder, pipeline.text_encoder_2], settings, seed=seed)
        draw = torch.Generator().manual_seed(seed)
        for network in networks.values():
            for tensor in adapters.trained(network).values():
                tensor.data += 0.1 * torch.randn(tensor.shape, generator=draw)
        path = model.parent / "adapters" / f"{kind}.safetensors"
        made[kind] = adapter_files.save(path, networks, settings, fmt, {"flags": {"seed": 1}}), pipeline
    return made


@pytest.fixture
def adapted(tiny_model):
    return make_adapters(tiny_model)


def drawn_by(pipeline) -> np.ndarray:
    """What diffusers draws for the flags of `plain`."""
    pipeline.set_progress_bar_config(disable=True)
    with torch.no_grad():
        return pixels(pipeline("a red cat", num_inference_steps=2, width=64, height=64, guidance_scale=5.0,
                               generator=torch.Generator().manual_seed(0)).images[0])


def pixels(image) -> np.ndarray:
    return np.asarray(image).astype(int)


def test_a_png_each_and_a_grid(draw):
    drawn = draw("--prompt", "a red cat", "a blue dog", "--num_images", 2, "--batch_size", 3)
    assert list(drawn) == ["000-0.png", "000-1.png", "001-2.png", "001-3.png", "grid.png"]
    assert drawn["grid.png"].size == (2 * 68, 2 * 68)
    said = json.loads(drawn["001-3.png"].text["generate"])
    assert (said["prompt"], said["seed"], said["steps"], said["size"]) == ("a blue dog", 3, 2, "64x64")
    assert drawn["000-0.png"].text["parameters"].startswith("a red cat\n")


def test_the_same_flags_draw_the_same_whatever_the_batch(draw):
    one, other = (draw("--prompt", "a red cat", "--num_images", 3, "--seed", 7, "--batch_size", size) for size in (1, 3))
    assert list(one) == list(other)
    for name in one:
        assert np.abs(pixels(one[name]) - pixels(other[name])).max() <= 1


@pytest.mark.parametrize("flags", [
    ("--prompt", "a blue dog"), ("--negative_prompt", "a blue dog"), ("--steps", "3"), ("--guidance", "9"), ("--seed", "5"),
    ("--scheduler", "ddim"), ("--scheduler", "dpm++"), ("--precision", "bf16")])
def test_each_flag_changes_the_picture(draw, plain, flags):
    changed = draw("--prompt", "a red cat", *flags)["000-" + (flags[1] if flags[0] == "--seed" else "0") + ".png"]
    assert (pixels(plain) != pixels(changed)).any()


def test_prompts_from_a_file_and_other_sizes(draw, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red cat\n\na blue dog\n")
    drawn = draw("--prompt_file", tmp_path / "prompts.txt", "--size", "64,96")
    assert list(drawn) == ["000-0.png", "001-1.png", "grid.png"]
    assert drawn["000-0.png"].size == (64, 96)


def test_from_a_picture(draw, tmp_path):
    start = tiny.picture(64, 64, 3)
    start.save(tmp_path / "start.png")
    near, far = (draw("--prompt", "a red cat", "--image", tmp_path / "start.png", "--steps", 10, "--strength", strength,
                      "--guidance", 1)["000-0.png"] for strength in (0.1, 1.0))
    nothing = draw("--prompt", "a red cat", "--steps", 10, "--guidance", 1)["000-0.png"]
    assert (pixels(near) != pixels(far)).any()
    assert (pixels(far) != pixels(nothing)).any()


def test_raw_weights_beside_the_average(train, draw):
    output = train("--use_ema", "--learning_rate", "0.01", "--max_train_steps", "4", "--lr_warmup_steps", "0")
    average, raw = (draw("--prompt", "a red cat", *flags, model=output)["000-0.png"] for flags in ((), ("--raw",)))
    assert (pixels(average) != pixels(raw)).any()


def test_one_file(train, draw, tiny_model):
    folder = draw("--prompt", "a red cat", model=train("--save_precision", "float"))
    file = train("--save_model_as", "safetensors", "--output_name", "mine") / "mine.safetensors"
    single = draw("--prompt", "a red cat", "--config", tiny_model, model=file)
    assert np.abs(pixels(folder["grid.png"]) - pixels(single["grid.png"])).max() <= 1


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "second"])
def test_it_draws_with_an_adapter_of_any_kind_what_was_trained(draw, plain, adapted, kind, tiny_model):
    file, pipeline = adapted[kind]
    found = draw("--prompt", "a red cat", "--lora", file)["000-0.png"]
    assert np.abs(pixels(found) - drawn_by(pipeline)).max() <= 1
    assert np.abs(pixels(found) - pixels(plain)).max() > 5
    assert json.loads(found.text["generate"])["lora"] == str(file) and f"lora: {file}" in found.text["parameters"]
    if kind in ("lora", "dora"):    # of the rest diffusers reads none
        other = StableDiffusionXLPipeline.from_pretrained(tiny_model)
        other.load_lora_weights(file.parent, weight_name=file.name)
        assert np.abs(pixels(found) - drawn_by(other)).max() <= 1


def test_each_adapter_has_a_weight(draw, plain, adapted, tmp_path):
    (one, _), (two, _), (dora, _) = adapted["lora"], adapted["second"], adapted["dora"]
    none = draw("--prompt", "a red cat", "--lora", f"{one}=0", f"{dora}=0")["000-0.png"]
    assert (pixels(none) == pixels(plain)).all()
    both = draw("--prompt", "a red cat", "--lora", f"{one}=0.5", f"{two}=-2")["000-0.png"]
    other = StableDiffusionXLPipeline.from_pretrained(json.loads(both.text["generate"])["model"])
    for name, (file, _) in (("one", adapted["lora"]), ("two", adapted["second"])):
        other.load_lora_weights(file.parent, weight_name=file.name, adapter_name=name)
    other.set_adapters(["one", "two"], [0.5, -2.0])
    assert np.abs(pixels(both) - drawn_by(other)).max() <= 1
    folder = tmp_path / "run=0.5"    # a folder, and not a weight
    folder.mkdir()
    (folder / "name.safetensors").write_bytes(one.read_bytes())
    whole = draw("--prompt", "a red cat", "--lora", f"{folder}=1")["000-0.png"]
    assert (pixels(whole) == pixels(draw("--prompt", "a red cat", "--lora", folder)["000-0.png"])).all()
    assert (pixels(whole) == pixels(draw("--prompt", "a red cat", "--lora", one)["000-0.png"])).all()


@pytest.mark.parametrize("kind", ["lora", "dora", "loha", "oft"])
def test_at_weight_nothing_the_networks_compute_what_they_did(adapted, kind, tiny_model):
    pipeline = StableDiffusionXLPipeline.from_pretrained(tiny_model)
    before = drawn_by(pipeline)
    state = {part: {name: tensor.clone() for name, tensor in getattr(pipeline, part).state_dict().items()} for part in PARTS}
    adapter = adapter_files.read(adapted[kind][0], pipeline.unet.config)
    adapter_merge.apply(adapter, {part: getattr(pipeline, part) for part in PARTS}, 0.0)
    assert (drawn_by(pipeline) == before).all()
    for part in PARTS:
        after = {name.replace("base_layer.", ""): tensor for name, tensor in getattr(pipeline, part).state_dict().items()}
        assert all(torch.equal(tensor, after[name]) for name, tensor in state[part].items())


def test_a_name_and_its_weight(tmp_path, adapted, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.safetensors", "b=c.safetensors", "d=1.safetensors", "e:2=x.safetensors"):
        Path(name).write_bytes(b"")
        for weight, text in ((1.0, name), (0.5, f"{name}=0.5"), (-1.0, f"{name}=-1"), (1e-3, f"{name}=1e-3")):
            assert adapter_find.find(text) == (Path(name), weight)
    (tmp_path / "run" / "checkpoint-5").mkdir(parents=True)
    for text, words in (("run", "none"), ("no.safetensors", "FILE=0.8"), ("a.safetensors=nan", "weight"),
                        ("a.safetensors=inf", "weight"), ("a.safetensors:0.5", "FILE=0.8"), ("a.safetensors=", "no adapter")):
        with pytest.raises(errors.UserError, match=words):
            adapter_find.find(text)
    for count, name in enumerate(("step.safetensors", "last.safetensors")):
        (tmp_path / "run" / name).write_bytes(b"")
        if not count:
            assert adapter_find.find("run=2") == (Path("run/step.safetensors"), 2.0)
    with pytest.raises(errors.UserError, match="last.safetensors, step.safetensors"):
        adapter_find.find("run")
    (tmp_path / "run" / adapter_files.DIFFUSERS_NAME).write_bytes(b"")
    assert adapter_find.find("run") == (Path("run") / adapter_files.DIFFUSERS_NAME, 1.0)


@pytest.mark.parametrize("flags, message", [
    (("--prompt", "x", "--lora", "/nowhere.safetensors"), "there is no adapter /nowhere.safetensors"),
    (("--prompt", "x", "--model", "/nowhere/model"), "--model: there is no file or folder"),
    (("--prompt", "x", "--image", "/nowhere.png"), "--image: cannot read /nowhere.png"),
    (("--prompt_file", "/nowhere.txt"), "--prompt_file: cannot read /nowhere.txt")])
def test_mistakes_end_in_one_sentence(tiny_model, capsys, flags, message, tmp_path):
    args = generate.parse_args(["--model", str(tiny_model), "--output_dir", str(tmp_path), *flags])
    with pytest.raises(SystemExit) as left, errors.exit_on_user_error("generate.py"):
        generate.main(args)
    assert left.value.code == 2
    assert message in capsys.readouterr().err


def test_mistakes_in_flags_are_answered_without_torch():
    run = subprocess.run([sys.executable, "-X", "importtime", "generate.py", "--model", "x"], cwd=ROOT, text=True,
                         capture_output=True)
    assert run.returncode == 2
    assert "give --prompt or --prompt_file" in run.stderr
    assert " torch" not in run.stderr
