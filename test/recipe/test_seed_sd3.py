"""SimpleTuner's SD 3 quickstart as its reader follows it: every sample and command as it stands there, sizes and places apart."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
from diffusers import StableDiffusion3Pipeline
from pieces import note_calls
from PIL import Image
from safetensors import safe_open
from seeds import SD3
from test_data_sets import losses
from test_previews import hooks, make_tiny, raw, receiver  # noqa: F401

import train_lora_sd3
import train_sd3
from library import dialects
from library.diffusion import flow
from library.models import quantize

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIG = """{
  "model_type": "lora",
  "model_family": "sd3",
  "pretrained_model_name_or_path": "stabilityai/stable-diffusion-3.5-large",
  "output_dir": "/home/user/outputs/models",
  "validation_resolution": "1024x1024,1280x768",
  "validation_guidance": 3.0,
  "validation_prompt": "your main test prompt here",
  "user_prompt_library": "config/user_prompt_library.json"
}"""
QUANTISED = """{
  "base_model_precision": "int8-quanto",
  "text_encoder_1_precision": "no_change",
  "text_encoder_2_precision": "no_change",
  "text_encoder_3_precision": "no_change",
  "optimizer": "adamw_bf16"
}"""
ENV = """# its comments are longer; some have one apostrophe, as in that's, or begin with --base_model_default_dtype=bf16
export TRAINER_EXTRA_ARGS="--base_model_precision=int8-quanto"

# `commands` and $(commands) in them are not commands
export TRAINER_EXTRA_ARGS="${TRAINER_EXTRA_ARGS} --text_encoder_1_precision=no_change --text_encoder_2_precision=no_change"

export OPTIMIZER="adamw_bf16"
"""
GUIDED = """{
  "--validation_guidance_skip_layers": [7, 8, 9],
  "--validation_guidance_skip_layers_start": 0.01,
  "--validation_guidance_skip_layers_stop": 0.2,
  "--validation_guidance_skip_scale": 2.8,
  "--validation_guidance": 4.0,
  "--flow_use_uniform_schedule": true,
  "--flow_schedule_auto_shift": true
}"""
PREVIEWED = """{
  "validation_preview": true,
  "validation_preview_steps": 1
}"""
STABLE = {"optimizer": "adamw_bf16", "flow_schedule_shift": 1, "learning_rate": 1e-4, "train_batch_size": 4,
          "gradient_accumulation_steps": 3, "max_grad_norm": 0.1, "base_model_precision": "int8-quanto",
          "validation_guidance_skip_layers": "[7,8,9]"}    # a batch of 4 on each of 3 GPUs
LOWEST = {"base_model_precision": "nf4-bnb", "optimizer": "bnb-lion8bit-paged", "resolution": 512, "train_batch_size": 1,
          "gradient_accumulation_steps": 1}
LAYERS = 11    # so that 7, 8 and 9 are there
SMALL = {'"1024x1024,1280x768"': '"64x64,80x48"', "1024": "64"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """An SD 3.5 Medium with LAYERS layers, small in everything else."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tiny.SD3, "deep", tiny.SD3["3.5-medium"] | {"num_layers": LAYERS})
        return tiny.make_sd3(tmp_path_factory.mktemp("sd3"), "deep")


@pytest.fixture
def reader(tmp_path, model, monkeypatch):
    """`reader(config, **replaced)` writes the reader's files into a folder like a checkout -> that folder.

    There: config/config.json of this text (None: none), the library of prompts, multidatabackend.json and the pictures, which
    are small; the model's place and the length of the run are ours.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train_lora_sd3.py"])
    (tmp_path / "config").mkdir()
    shutil.copy(REPOSITORY / "config/user_prompt_library.json.example", tmp_path / "config/user_prompt_library.json")
    pictures = tmp_path / "datasets/pseudo-camera-10k"
    pictures.mkdir(parents=True)
    for number, (name, size) in enumerate({"a_red_cat": (130, 90), "a_brown_dog": (80, 64), "a_small_house": (50, 40)}.items()):
        tiny.picture(*size, number).save(pictures / f"{name}.png")

    def write(config: dict, sets: str = SD3) -> Path:
        for old, new in (SMALL | {"/home/user/simpletuner": str(tmp_path)}).items():
            sets = sets.replace(old, new)
        (tmp_path / "config/multidatabackend.json").write_text(sets)
        ours = {"pretrained_model_name_or_path": str(model), "data_backend_config": "config/multidatabackend.json",
                "output_dir": str(tmp_path / "out"), "max_train_steps": 2, "train_batch_size": 1, "report_to": "none", "seed": 1,
                "num_validation_images": 1, "validation_num_inference_steps": 6, "logging_steps": 1}
        (tmp_path / "config/config.json").write_text(json.dumps(ours | config | {
            "pretrained_model_name_or_path": str(model), "output_dir": str(tmp_path / "out")}))
        return tmp_path

    return write


@pytest.fixture
def run(one_process, monkeypatch, tmp_path):
    """`run(*flags)`: train_lora_sd3.py with config/config.json, in this process, without the report's plots -> its folder."""
    def run(*flags, script=train_lora_sd3, file="config/config.json") -> Path:
        one_process()
        monkeypatch.setattr(script.report, "write_loss_curve", lambda folder: folder)
        monkeypatch.setattr(script.report, "write_report", lambda folder, **_: folder)
        script.main(script.parse_args([f"--config_file={file}", *map(str, flags)]))
        return tmp_path / "out"
    return run


def sample(text: str) -> dict:
    """A sample config of the document, its sizes made small."""
    for old, new in SMALL.items():
        text = text.replace(old, new)
    return json.loads(text)


def shown(out: Path) -> dict[str, np.ndarray]:
    return {path.name: np.asarray(Image.open(path)).astype(int) for path in (out / "validation/step-000002").glob("*.png")}


def launch(folder: Path, *flags, **environment) -> subprocess.CompletedProcess:
    """`bash train.sh`, everything being installed; PATH decides which python and accelerate there are."""
    shutil.copy(REPOSITORY / "train.sh", folder)
    for name in ("library", "train_lora_sd3.py"):
        if not (folder / name).exists():
            (folder / name).symlink_to(REPOSITORY / name)
    (folder / "setup.sh").write_text("")
    path = f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.run(["bash", "train.sh", *flags], cwd=folder, text=True, capture_output=True, timeout=300,
                          env=os.environ | {"PATH": path, "ACCELERATE_USE_CPU": "true"} | environment)


# the whole way

def test_bash_train_sh_trains_as_the_document_says(reader, tmp_path, model):
    """cp config/config.json.example config/config.json, then the variables that are to be changed; then `bash train.sh`."""
    example = json.loads((REPOSITORY / "config/config.json.example").read_text())
    small = {"max_train_steps": 2, "validation_num_inference_steps": 1, "mixed_precision": "no", "train_batch_size": 1}
    folder = reader(example | sample(CONFIG) | sample(QUANTISED) | small)
    done = launch(folder)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "3 images in 1 bucket" in done.stdout and "2 steps" in done.stdout
    with safe_open(tmp_path / "out/pytorch_lora_weights.safetensors", "pt") as file:
        assert json.loads(file.metadata()["flags"])["base_model_precision"] == "int8-quanto"
    pipeline = StableDiffusion3Pipeline.from_pretrained(model)
    pipeline.load_lora_weights(tmp_path / "out")
    names = {re.sub(r"^0\d-|-\d.png$", "", name) for name in shown(tmp_path / "out")}
    prompts = ["your main test prompt here", *json.loads((folder / "config/user_prompt_library.json").read_text()).values()]
    slugs = [re.sub(r"[^a-z0-9]+", "-", prompt)[:40].strip("-") for prompt in prompts]
    assert names == {f"{slug}-{size}" for slug in slugs for size in ("64x64", "80x48")}
    assert list((folder / "cache/text/sd3/pseudo-camera-10k").glob("*.safetensors"))
    assert list((folder / "output/cache/vae/sd3/pseudo-camera-10k").glob("*.safetensors"))


@pytest.mark.parametrize("there, used", [
    (["json"], "json"), (["toml"], "toml"), (["env"], "env"), (["env", "json", "toml"], "json")])
def test_train_sh_finds_the_config(tmp_path, there, used):
    (tmp_path / "config").mkdir()
    texts = {"json": '{"model_family": "sd3", "model_type": "lora"}', "toml": 'model_family = "sd3"\nmodel_type = "lora"\n',
             "env": 'export MODEL_FAMILY="sd3"\nexport MODEL_TYPE="lora"\n'}
    for kind in there:
        (tmp_path / f"config/config.{kind}").write_text(texts[kind])
    (tmp_path / "accelerate").write_text("#!/bin/sh\necho accelerate $@\n")
    (tmp_path / "accelerate").chmod(0o755)
    done = launch(tmp_path, "--seed", "3")
    assert done.stdout == f"accelerate launch train_lora_sd3.py --config_file config/config.{used} --seed 3\n", done.stderr
    assert done.stderr.count("config/config.") == (3 if len(there) > 1 else 0)    # what is not read is told
    if len(there) == 1:
        (tmp_path / f"config/config.{used}").write_text(texts[used].replace("sd3", "flux"))
        broken = launch(tmp_path)
        assert broken.returncode and "model_family flux with model_type lora is not trained here" in broken.stderr
        assert "Traceback" not in broken.stderr and not broken.stdout


# the samples

@pytest.mark.parametrize("form", ["json", "env"])
def test_the_quantised_samples(reader, run, monkeypatch, form):
    """config.json, and the deprecated config.env: the same run."""
    quantised, apply = [], quantize.apply
    monkeypatch.setattr(quantize, "apply", lambda network, precision, *rest: quantised.append(
        (type(network).__name__, precision, apply(network, precision, *rest))))
    folder, file = reader(sample(QUANTISED) if form == "json" else {}), "config/config.json"
    if form == "env":
        others = json.loads((folder / file).read_text())
        lines = [f'export {name.upper()}="{value}"' for name, value in others.items()]
        names = {"PRETRAINED_MODEL_NAME_OR_PATH": "MODEL_NAME", "DATA_BACKEND_CONFIG": "DATALOADER_CONFIG",
                 "MAX_TRAIN_STEPS": "MAX_NUM_STEPS", "SEED=": "TRAINING_SEED="}    # its own names of these
        text = "\n".join(lines)
        for ours, theirs in names.items():
            text = text.replace(ours, theirs)
        file = "config/config.env"
        (folder / file).write_text(ENV + text)
    out = run(file=file)
    assert len(losses(out)) == 2
    counted = {(network, precision): layers for network, precision, layers in quantised}
    assert counted["SD3Transformer2DModel", "int8-quanto"] > LAYERS
    assert all(not layers for (network, _), layers in counted.items() if network != "SD3Transformer2DModel")
    header = safe_open(out / "pytorch_lora_weights.safetensors", "pt").metadata()
    assert json.loads(header["flags"])["optimizer"] == "adamw_bf16"


def test_the_sample_of_skip_layer_guidance(reader, run, monkeypatch):
    """Its uniform levels and its shift by size are those of training, its guidance that of the images."""
    calls = note_calls(monkeypatch, StableDiffusion3Pipeline, "__call__")
    draws, shifts = note_calls(monkeypatch, flow, "draw_u"), note_calls(monkeypatch, flow, "sigmas")
    drawing = {"validation_prompt": "your main test prompt here", "validation_resolution": "64x64"}
    reader(sample(GUIDED) | drawing)
    guided = shown(run())
    (_, named), = calls
    assert (named["skip_guidance_layers"], named["skip_layer_guidance_scale"], named["guidance_scale"]) == ([7, 8, 9], 2.8, 4.0)
    assert (named["skip_layer_guidance_start"], named["skip_layer_guidance_stop"]) == (0.01, 0.2)
    assert {given[1] for given, _ in draws} == {"uniform"}
    assert {given[1] for given, _ in shifts} == {flow.auto_shift(8, 8)} and flow.auto_shift(8, 8) < 2    # of 64 x 64 pixels
    shutil.rmtree("out")
    reader({name: value for name, value in sample(GUIDED).items() if "skip" not in name} | drawing)
    plain = shown(run())
    assert plain.keys() == guided.keys() and all((plain[name] != guided[name]).any() for name in plain)


def test_the_stable_values(reader, run, monkeypatch, capsys):
    shifts = note_calls(monkeypatch, flow, "sigmas")
    reader(STABLE | {"validation_prompt": "a cat", "validation_resolution": "64x64"})
    out = run()
    found = capsys.readouterr()
    assert len(losses(out)) == 2 and {given[1] for given, _ in shifts} == {1.0}
    assert "12 a step" in found.out and "note" not in found.err    # each has its effect
    flags = json.loads((out / "checkpoint-2/manifest.json").read_text())["flags"]
    assert (flags["max_grad_norm"], flags["learning_rate"], flags["validation_guidance_skip_layers"]) == (0.1, 1e-4, [7, 8, 9])


def test_the_lowest_vram(reader, run, monkeypatch, capsys):
    """All of it runs on a CPU, too; what it then lacks, a device to page from, is told by name."""
    layers, apply = [], quantize.apply
    monkeypatch.setattr(quantize, "apply", lambda *given: layers.append((given[1], apply(*given))) or layers[-1][1])
    reader(LOWEST | {"resolution": 64})
    assert len(losses(run())) == 2
    assert [many > 0 for precision, many in layers if precision == "nf4-bnb"] == [True]
    assert "--optimizer bnb-lion8bit-paged has nothing to page to on a CPU" in capsys.readouterr().out


@pytest.mark.parametrize("steps, total, due", [(1, 3, [1, 2, 3]), (5, 20, [5, 10, 15, 20])])
def test_the_sample_of_previews(reader, run, receiver, hooks, tmp_path, steps, total, due):  # noqa: F811
    """Each preview is posted: at the steps that the document counts."""
    reader(sample(PREVIEWED) | {
        "validation_preview_steps": steps, "validation_num_inference_steps": total, "validation_prompt": "a cat",
        "validation_resolution": "64x64", "webhook_config": str(hooks(raw(receiver.url))), "max_train_steps": 1,
        "validation_preview_model": str(make_tiny(tmp_path / "taesd3", 16))})
    out = run()
    assert [json.loads(post.body)["data"]["step"] for post in receiver.got] == due
    assert len(list((out / "validation/step-000001/previews").glob("00-a-cat-64x64-0-*.png"))) == len(due)


def test_sage_attention(tmp_path):
    """Refused by its name, with what to do, at once."""
    needed = ("--pretrained_model_name_or_path", tmp_path, "--train_data_dir", tmp_path)
    done = subprocess.run([sys.executable, REPOSITORY / "train_lora_sd3.py", "--attention_mechanism=sageattention", *needed],
                          text=True, capture_output=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "Traceback" not in done.stderr
    assert re.search("train_lora_sd3.py: error: --attention_mechanism.*sageattention.*pip install", done.stderr)


@pytest.mark.parametrize("script", [train_sd3, train_lora_sd3])
def test_a_data_set_smaller_than_a_batch(reader, run, capsys, monkeypatch, script):
    """The document's smallest data set is batch x accumulation; here a batch is filled over several epochs, which is said."""
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py"])
    reader({"train_batch_size": 4, "gradient_accumulation_steps": 2})
    assert len(losses(run(script=script))) == 2
    said = capsys.readouterr().out
    assert re.search("3 images in 1 bucket; .*1 bucket with fewer images than a step takes: .* more than once; 8 a step", said)


def test_a_library_of_prompts_that_is_not_there_yet(reader, run, capsys):
    folder = reader(sample(CONFIG))
    library = folder / "config/user_prompt_library.json"
    library.rename(library.with_name("user_prompt_library.json.example"))
    with pytest.raises(SystemExit):
        run()
    assert "copy config/user_prompt_library.json.example there" in capsys.readouterr().err


def test_a_name_without_a_counterpart_is_explained():
    with pytest.raises(dialects.DialectError, match="--base_model_default_dtype is not here: .* --mixed_precision"):
        dialects.translate(["--base_model_default_dtype=bf16"], script="train_lora_sd3.py")
    with pytest.raises(dialects.DialectError, match="medium and large here for sd3; leave it out where"):
        dialects.translate(["--model_family=sd3", "--model_flavour=base-1.0"], script="train_sd3.py")


