"""The command of diffusers' SDXL guide, as its reader types it: only the names of script, model and data are ours."""

import importlib.util
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import datasets
import huggingface_hub.constants
import pytest
import tiny
from PIL import Image
from safetensors.torch import load_file
from test_hub import TOKEN, hub  # noqa: F401

REPOSITORY = Path(__file__).resolve().parents[2]
COMMAND = """accelerate launch train_text_to_image_sdxl.py \
  --pretrained_model_name_or_path=$MODEL_NAME \
  --pretrained_vae_model_name_or_path=$VAE_NAME \
  --dataset_name=$DATASET_NAME \
  --enable_xformers_memory_efficient_attention \
  --resolution=512 \
  --center_crop \
  --random_flip \
  --proportion_empty_prompts=0.2 \
  --train_batch_size=1 \
  --gradient_accumulation_steps=4 \
  --gradient_checkpointing \
  --max_train_steps=10000 \
  --use_8bit_adam \
  --learning_rate=1e-06 \
  --lr_scheduler="constant" \
  --lr_warmup_steps=0 \
  --mixed_precision="fp16" \
  --report_to="wandb" \
  --validation_prompt="a cute Sundar Pichai creature" \
  --validation_epochs 5 \
  --checkpointing_steps=5000 \
  --output_dir="sdxl-pokemon-model" \
  --push_to_hub"""


@pytest.fixture
def reader(tmp_path, tiny_model, hub):  # noqa: F811
    """`reader(**replaced)`: the command, run in an empty folder with the reader's variables set."""
    pictures = [tiny.picture(80, 64, number) for number in range(6)]
    data = datasets.Dataset.from_dict({"image": pictures, "text": [f"a drawing of a cat {number}" for number in range(6)]})
    data.cast_column("image", datasets.Image()).save_to_disk(tmp_path / "pokemon")
    vae = tiny.make_model(tmp_path / "other", seed=4) / "vae"
    here = {"MODEL_NAME": tiny_model, "VAE_NAME": vae, "DATASET_NAME": tmp_path / "pokemon"}
    machine = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "HF_HOME": tmp_path / "home", "HF_TOKEN": TOKEN,
               "HF_ENDPOINT": huggingface_hub.constants.ENDPOINT, "WANDB_MODE": "offline", "WANDB_SILENT": "true"}

    def run(replaced: dict[str, str]) -> subprocess.CompletedProcess:
        text = COMMAND.replace("train_text_to_image_sdxl.py", str(REPOSITORY / "train_sdxl.py"))
        for old, new in replaced.items():
            assert text.count(old) == 1, old
            text = text.replace(old, new)
        for name, value in here.items():
            text = text.replace(f"${name}", shlex.quote(str(value)))
        text = text.replace("accelerate launch", f"{shlex.quote(sys.executable)} -m accelerate.commands.launch", 1)
        return subprocess.run(text, shell=True, cwd=tmp_path, text=True, capture_output=True, timeout=300,
                              env=os.environ | {name: str(value) for name, value in machine.items()})

    return run


def test_without_a_gpu_fp16_is_refused_in_one_sentence(reader, tmp_path):
    done = reader({})
    assert done.returncode != 0 and "Traceback" not in done.stderr.split("train_sdxl.py: error:")[0]
    refusal = "train_sdxl.py: error: --mixed_precision fp16 needs a GPU or NPU and there is none here: use bf16, or no\n"
    assert refusal in done.stderr
    assert not (tmp_path / "sdxl-pokemon-model").exists()


def test_on_a_cpu_it_trains_with_what_a_cpu_has(reader, tmp_path, hub):  # noqa: F811
    replaced = {'"fp16"': '"bf16"', "  --enable_xformers_memory_efficient_attention": "", "=512": "=64", "=10000": "=3"}
    if importlib.util.find_spec("wandb") is None:
        replaced['"wandb"'] = '"tensorboard"'
    done = reader(replaced)
    assert done.returncode == 0, done.stderr[-3000:]
    out = tmp_path / "sdxl-pokemon-model"
    lines = [json.loads(line) for line in (out / "metrics.jsonl").open()]
    assert lines[-1]["step"] == 3 and 0 < lines[-1]["loss"] < 5 and lines[-1]["lr"] == 1e-6
    assert "6 images in 1 bucket" in done.stdout and "4 a step; 3 steps" in done.stdout
    manifest = json.loads((out / "checkpoint-3" / "manifest.json").read_text())
    assert manifest["flags"]["use_8bit_adam"] and manifest["flags"]["mixed_precision"] == "bf16"
    (shown,) = (out / "validation").glob("step-*")
    images = sorted(shown.glob("00-a-cute-sundar-pichai-creature-64x64-?.png"))
    assert len(images) == 4
    with Image.open(images[0]) as image:
        assert image.size == (64, 64)
    ours = load_file(out / "vae" / "diffusion_pytorch_model.safetensors")    # the VAE that was asked for goes along
    theirs = load_file(tmp_path / "other" / "vae" / "diffusion_pytorch_model.safetensors")
    assert all((ours[name] == value).all() for name, value in theirs.items())
    assert (out / "wandb").exists() == ('"wandb"' not in replaced)
    uploaded = hub.repositories["me/sdxl-pokemon-model"]
    assert "unet/diffusion_pytorch_model.safetensors" in uploaded and "model_index.json" in uploaded
    assert not [name for name in uploaded if name.startswith(("checkpoint-", "cache/", "logs/", "wandb/"))]
