"""The adapters of SimpleTuner's SDXL quickstart: its config.json as it stands there, the model's place and size apart."""

import json
import sys

import pytest
from safetensors import safe_open
from test_data_sets import losses

from library import dialects
from library.models import quantize

QUICKSTART = {"model_type": "lora", "model_family": "sdxl", "model_flavour": "base-1.0", "validation_resolution":
              "1024x1024,1280x768", "validation_guidance": 3.4, "use_gradient_checkpointing": True, "learning_rate": 1e-4}
QUANTISED = {"base_model_precision": "int8-quanto", "text_encoder_1_precision": "no_change",
             "text_encoder_2_precision": "no_change", "optimizer": "optimi-lion"}


@pytest.mark.parametrize("more", [{}, {"use_dora": True}, QUANTISED, QUANTISED | {"use_dora": True}],
                         ids=["lora", "dora", "quantised", "quantised dora"])
def test_the_quickstart(train_lora, tmp_path, monkeypatch, more):
    config, quantised, apply = tmp_path / "config.json", [], quantize.apply
    config.write_text(json.dumps(QUICKSTART | more))
    assert dialects.script_of(config) == "train_lora_sdxl.py"
    monkeypatch.setattr(sys, "argv", ["train_lora_sdxl.py"])
    monkeypatch.setattr(quantize, "apply", lambda network, precision, *rest: quantised.append(
        (precision, apply(network, precision, *rest))))
    out = train_lora("--config_file", config, "--lr_warmup_steps", 0, without=["rank"])
    assert len(losses(out)) == 2
    kinds = {precision for precision, layers in quantised if layers}
    assert kinds == ({"int8-quanto"} if "base_model_precision" in more else set())
    with safe_open(out / "pytorch_lora_weights.safetensors", "pt") as file:
        names, header = list(file.keys()), file.metadata()
    assert header["ss_network_dim"] == "16" and json.loads(header["flags"])["learning_rate"] == 1e-4
    assert any("lora_magnitude_vector" in name for name in names) == ("use_dora" in more)
    assert json.loads(header["flags"])["optimizer"] == more.get("optimizer", "adamw")
