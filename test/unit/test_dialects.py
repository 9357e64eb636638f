"""Other trainers' names, switches with values, and config files: all of them are our flags in the end."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import train_lora_sd3
import train_lora_sdxl
import train_sd3
import train_sdxl
from library import dialects

NEEDED = ["--pretrained_model_name_or_path=model", "--train_data_dir=images"]


def parse(*argv):
    return train_sdxl.parse_args([*NEEDED, *argv])


def parse_lora(*argv):
    return train_lora_sdxl.parse_args([*NEEDED, *argv])


def parse_sd3(*argv):
    return train_sd3.parse_args([*NEEDED, *argv])


def parse_lora_sd3(*argv):
    return train_lora_sd3.parse_args([*argv])


def refused(capsys, *argv) -> str:
    with pytest.raises(SystemExit) as ending:
        parse(*argv)
    assert ending.value.code == 2
    return capsys.readouterr().err


# names and spellings

ALIASES = [
    ("vae", "x", "pretrained_vae_model_name_or_path", "x"), ("max_train_epoch", "3", "num_train_epochs", 3),
    ("max_train_epochs", "3", "num_train_epochs", 3), ("min_snr_gamma", "5", "snr_gamma", 5.0),
    ("lr_scheduler_num_cycles", "2", "lr_num_cycles", 2), ("lr_scheduler_power", "2", "lr_power", 2.0),
    ("optimizer_type", "AdamW8bit", "optimizer", "adamw_8bit"), ("optimizer_type", "AdaFactor", "optimizer", "adafactor"),
    ("optimizer", "AdamW", "optimizer", "adamw"), ("max_data_loader_n_workers", "8", "dataloader_num_workers", 8),
    ("caption_extention", ".t", "caption_extension", ".t"), ("caption_dropout_rate", "0.1", "proportion_empty_prompts", 0.1),
    ("resize_interpolation", "area", "image_interpolation_mode", "box"), ("resume", "latest", "resume_from_checkpoint", "latest"),
    ("image_interpolation_mode", "cubic", "image_interpolation_mode", "bicubic"), ("log_with", "wandb", "report_to", "wandb"),
    ("log_tracker_name", "x", "tracker_project_name", "x"), ("huggingface_repo_id", "a/b", "hub_model_id", "a/b"),
    ("huggingface_token", "t", "hub_token", "t"), ("local-rank", "1", "local_rank", 1),
    ("validation_prompts", "a cat", "validation_prompt", ["a cat"]),
    ("save_precision", "fp32", "save_precision", "float"), ("save_precision", "bfloat16", "save_precision", "bf16"),
    ("vae_dtype", "float", "vae_dtype", "fp32"), ("mixed_precision", "None", "mixed_precision", "no"),
    ("resolution", "1024x768", "resolution", (1024, 768)), ("resolution", "512", "resolution", (512, 512)),
    ("checkpoint_step_interval", "7", "checkpointing_steps", 7), ("save_total_limit", "7", "checkpoints_total_limit", 7),
    ("validation_step_interval", "7", "validation_steps", 7), ("validation_epoch_interval", "7", "validation_epochs", 7),
    ("caption_dropout_probability", "0.1", "proportion_empty_prompts", 0.1),
    ("optimizer", "bnb-adamw8bit", "optimizer", "adamw_8bit"),
    ("optimizer_config", "eps=1e-7,betas=(0.9,0.99)", "optimizer_args", ["eps=1e-7", "betas=(0.9,0.99)"]),
    ("optimizer_beta1", "0.8", "adam_beta1", 0.8), ("optimizer_beta2", "0.8", "adam_beta2", 0.8),
    ("validation_resolution", "1024x1024,1280x768", "validation_resolution", [(1024, 1024), (1280, 768)]),
    ("validation_resolution", "1024,768", "validation_resolution", [(1024, 768)]),
    ("model_flavour", "base-0.9", "pretrained_model_name_or_path", "model")]    # what is named by path goes before it
SWITCHES = {"flip_aug": "random_flip", "cache_latents_to_disk": "cache_latents",
            "cache_text_encoder_outputs_to_disk": "cache_text_encoder_outputs",
            "use_gradient_checkpointing": "gradient_checkpointing", "rescale_betas_zero_snr": "zero_terminal_snr"}
OF_ADAPTERS = [
    ("network_dim", "8", "rank", 8), ("lora_rank", "8", "rank", 8), ("network_alpha", "0.5", "lora_alpha", 0.5),
    ("network_dropout", "0.1", "lora_dropout", 0.1), ("network_weights", "a", "init_lora", "a"),
    ("lora_type", "standard", "lora_type", "lora"), ("lora_init_type", "default", "lora_init_type", "kaiming"),
    ("lora_format", "comfyui", "lora_format", "kohya"), ("output_kohya_format", None, "lora_format", "both"),
    ("peft_lora_target_modules", '["to_k", "to_out.0"]', "lora_targets", ["to_k", "to_out.0"]),
    ("dim_from_weights", None, "rank", None)]
OF_SD3 = [
    ("training_shift", "2.5", "flow_schedule_shift", 2.5), ("flow_schedule_shift", "0", "flow_schedule_shift", 1.0),
    ("t5xxl_max_token_length", "256", "tokenizer_max_length", 256), ("max_sequence_length", "77", "tokenizer_max_length", 77),
    ("weighting_scheme", "uniform", "weighting_scheme", "none"),
    ("validation_guidance_skip_layers", "[7, 8,9]", "validation_guidance_skip_layers", [7, 8, 9]),
    ("validation_guidance_skip_layers", "7,8", "validation_guidance_skip_layers", [7, 8]),
    ("validation_guidance_skip_layers", "7", "validation_guidance_skip_layers", [7])]
ATTENTION = {"enable_xformers_memory_efficient_attention": "xformers", "xformers": "xformers", "sdpa": "sdpa",
             "enable_npu_flash_attention": "npu"}
IMPLIED = [("v_parameterization", "prediction_type", "v_prediction"), ("no_half_vae", "vae_dtype", "fp32"),
           ("use_safetensors", "save_model_as", "safetensors")]


@pytest.mark.parametrize("alias, typed, name, value", ALIASES)
def test_foreign_names_and_spellings(alias, typed, name, value):
    for argv in ([f"--{alias}={typed}"], [f"--{alias}", typed]):
        assert getattr(parse(*argv), name) == value


@pytest.mark.parametrize("alias, typed, name, value", OF_ADAPTERS)
def test_foreign_names_of_adapters(alias, typed, name, value):
    assert getattr(parse_lora(f"--{alias}", *([typed] if typed else [])), name) == value


@pytest.mark.parametrize("alias, typed, name, value", OF_SD3)
def test_foreign_names_of_sd3(alias, typed, name, value):
    for argv in ([f"--{alias}={typed}"], [f"--{alias}", typed]):
        assert getattr(parse_sd3(*argv), name) == value


@pytest.mark.parametrize("argv, trained, te1, te2, unet", [
    (["--network_module=networks.lora"], True, None, None, None),    # kohya trains text encoders, too
    (["--network_module=networks.lora", "--network_train_unet_only"], False, None, None, None),
    (["--network_module=networks.lora", "--network_train_unet_only=false"], True, None, None, None),
    (["--network_module=networks.lora", "--cache_text_encoder_outputs_to_disk"], False, None, None, None),
    (["--network_module=networks.lora", "--train_text_encoder=false"], False, None, None, None),
    (["--network_module=networks.lora", "--text_encoder_lr=1e-5"], True, 1e-5, 1e-5, None),
    (["--network_module=networks.lora", "--text_encoder_lr", "1e-5", "2e-5", "--unet_lr=3e-5"], True, 1e-5, 2e-5, 3e-5),
    (["--network_module=networks.lora", "--network_train_text_encoder_only"], True, None, None, 0),
    (["--train_text_encoder", "--text_encoder_lr", "1e-5"], True, 1e-5, 1e-5, None)])    # diffusers
def test_what_of_a_network_is_trained(argv, trained, te1, te2, unet):
    args = parse_lora(*argv)
    assert (args.train_text_encoder, args.learning_rate_te1, args.learning_rate_te2, args.unet_lr) == (trained, te1, te2, unet)


KOHYA_SD3 = ["--network_module=networks.lora_sd3"]


@pytest.mark.parametrize("argv, te1, te2, te3", [
    (["--text_encoder_lr", "1e-5"], 1e-5, 1e-5, None), (["--text_encoder_lr", "1e-5", "2e-5"], 1e-5, 2e-5, None),
    (["--text_encoder_lr", "1e-5", "2e-5", "3e-5"], 1e-5, 2e-5, 3e-5),
    (["--text_encoder_lr", "1e-5", "2e-5", "0"], 1e-5, 2e-5, 0),
    (["--text_encoder_lr", "1e-5", "--network_args", "train_t5xxl=True"], 1e-5, 1e-5, 1e-5),
    (["--text_encoder_lr", "1e-5", "2e-5", "--network_args", "rank_dropout=0.1", "train_t5xxl=True"], 1e-5, 2e-5, 2e-5),
    (["--text_encoder_lr", "1e-5", "--network_args", "train_t5xxl=False"], 1e-5, 1e-5, None),
    (["--text_encoder_lr", "1e-5", "--learning_rate_te3=4e-5"], 1e-5, 1e-5, 4e-5)])
def test_rates_of_sd3s_three_text_encoders(argv, te1, te2, te3):
    args = parse_lora_sd3(*NEEDED, *KOHYA_SD3, *argv)
    assert args.train_text_encoder
    assert (args.learning_rate_te1, args.learning_rate_te2, args.learning_rate_te3) == (te1, te2, te3)


def test_rates_of_sd3_that_cannot_be(capsys):
    for rates in ([], ["1"] * 4):
        with pytest.raises(SystemExit):
            parse_lora_sd3(*NEEDED, *KOHYA_SD3, "--text_encoder_lr", *rates)
        assert f"takes one rate for both CLIPs, or two, and a third for T5, not {len(rates)}\n" in capsys.readouterr().err


def test_rates_of_text_encoders_that_are_not_trained_and_of_three(capsys):
    for argv in (["--text_encoder_lr=1e-5"], ["--text_encoder_lr", "1", "2", "3"]):
        with pytest.raises(SystemExit):
            parse_lora(*argv)
    said = capsys.readouterr().err
    assert "needs --train_text_encoder" in said
    assert "takes one rate for both text encoders, or two, not 3: SDXL has no T5, whose rate is the third" in said
    assert "--network_train_unet_only" in refused(capsys, "--network_train_unet_only")    # not of this script


@pytest.mark.parametrize("alias", SWITCHES)
def test_foreign_switches(alias):
    for argv, value in (([], True), (["true"], True), (["false"], False)):
        assert getattr(parse(f"--{alias}", *argv), SWITCHES[alias]) is value
    assert getattr(parse(f"--{alias}=False"), SWITCHES[alias]) is False


@pytest.mark.parametrize("alias", ATTENTION)
def test_switches_that_choose_an_attention(alias, tmp_path, capsys):
    chosen = ATTENTION[alias]
    for argv, value in (([], chosen), (["true"], chosen), (["false"], "default")):
        assert parse(f"--{alias}", *argv).attention_mechanism == value
    assert parse(f"--{alias}=False").attention_mechanism == "default"
    for on in (True, False):
        (tmp_path / "c.json").write_text(json.dumps({alias: on}))
        config = f"--config_file={tmp_path / 'c.json'}"
        assert parse(config).attention_mechanism == (chosen if on else "default")
        assert parse(config, f"--{alias}=false").attention_mechanism == "default"
        assert parse(config, "--attention_mechanism=flash").attention_mechanism == "flash"
    assert "'maybe' is neither true nor false" in refused(capsys, f"--{alias}=maybe")
    other = "sdpa" if chosen != "sdpa" else "xformers"
    assert f"--{alias} and --{other} exclude each other" in refused(capsys, f"--{alias}", f"--{other}")
    assert parse(f"--{alias}", f"--{other}=false").attention_mechanism == chosen


def test_attention_by_simpletuners_names(capsys, tmp_path):
    for name, value in {"diffusers": "default", "flash-attn": "flash", "xformers": "xformers"}.items():
        assert parse(f"--attention_mechanism={name}").attention_mechanism == value
    assert parse("--attention_mechanism=sageattention", "--sageattention_usage=both").sageattention_usage == "training+inference"
    assert "sageattention" in refused(capsys, "--attention_mechanism=sla")
    (tmp_path / "config.env").write_text("USE_XFORMERS=true\n")
    assert parse(f"--config_file={tmp_path / 'config.env'}").attention_mechanism == "xformers"


@pytest.mark.parametrize("alias, name, value", IMPLIED)
def test_switches_that_imply_a_value(alias, name, value, tmp_path):
    assert getattr(parse(f"--{alias}"), name) == value
    for on in (True, False):
        (tmp_path / "c.json").write_text(json.dumps({alias: on}))
        assert getattr(parse(f"--config_file={tmp_path / 'c.json'}"), name) == (value if on else getattr(parse(), name))


def test_every_foreign_name_is_tried_here():
    tried = {alias for alias, *_ in ALIASES + IMPLIED} | set(SWITCHES) | {"model_family", "model_type"} | set(ATTENTION)
    tried |= {alias for alias, *_ in OF_ADAPTERS} | {"network_train_unet_only", "network_train_text_encoder_only"}
    tried |= {"text_encoder_lr", "user_prompt_library"} | {alias for alias, *_ in OF_SD3}
    assert {name.lstrip("-") for name in dialects.names()} <= tried


@pytest.mark.parametrize("flags, words", [
    (["--upcast_before_saving"], "--save_precision"), (["--prodigy_decouple=True"], "--optimizer_args decouple=... says it"),
    (["--clip_l", "clip_l.safetensors"], "--single_file_config")])
def test_what_has_no_counterpart_says_why(capsys, flags, words):
    with pytest.raises(SystemExit):
        parse_lora_sd3(*NEEDED, *flags)
    said = capsys.readouterr().err
    assert f"{flags[0].partition('=')[0]} is not here: " in said and words in said and said.endswith(". Leave it out\n")


def test_a_hint_names_no_flag_that_the_script_lacks(capsys):
    for flag in ("--snr_gamma=5", "--text_encoder_lr=1", "--min_snr_gamme=5"):
        with pytest.raises(SystemExit):
            parse_sd3(*NEEDED, flag)
        said = capsys.readouterr().err
        assert "no flag" in said and "min_snr" not in said.partition(";")[2] and "text_encoder_lr" not in said.partition(";")[2]


@pytest.mark.parametrize("name", ["enable_bucket", "cache_latents", "use_ema"])
@pytest.mark.parametrize("text, value", [("true", True), ("True", True), ("1", True), ("yes", True), ("on", True),
                                         ("false", False), ("FALSE", False), ("0", False), ("no", False), ("off", False)])
def test_switches_take_a_value(name, text, value):
    assert getattr(parse(f"--{name}={text}"), name) is value
    assert getattr(parse(f"--{name}", text), name) is value
    assert getattr(parse(f"--{name}"), name) is True
    assert getattr(parse(f"--{name}", f"--{name}={text}"), name) is value    # the later one counts


# config files

CONTENT = {"learning_rate": 1e-5, "--enable_bucket": True, "cache_latents": False, "resolution": "512,768", "seed": None,
           "validation_prompt": ["a cat", "a dog, running"], "max_train_epochs": 7, "output_name": "x=",
           "optimizer_type": "AdamW"}
EXPECTED = {"learning_rate": 1e-5, "enable_bucket": True, "cache_latents": False, "resolution": (512, 768), "seed": None,
            "validation_prompt": ["a cat", "a dog, running"], "num_train_epochs": 7, "output_name": "x=", "optimizer": "adamw"}


def toml(content: dict) -> str:
    lines = []
    for key, value in content.items():
        if isinstance(value, dict):
            lines += [f"[{key}]", toml(value)]
        elif value is not None:
            lines.append(f"{key} = {json.dumps(value)}")    # their spellings of these values are the same
    return "\n".join(lines) + "\n"


def write(folder: Path, kind: str, content: dict) -> str:
    path = folder / f"config.{kind}"
    path.write_text(json.dumps(content) if kind == "json" else toml(content), encoding="utf-8")
    return f"--config_file={path}"


@pytest.mark.parametrize("kind", ["json", "toml"])
@pytest.mark.parametrize("sections", [False, True])
def test_config_files(tmp_path, kind, sections):
    content = dict(CONTENT)
    if sections:
        keys = list(content)
        content = {"training": {key: content[key] for key in keys[:4]}, "other": {key: content[key] for key in keys[4:]}}
    args = vars(parse(write(tmp_path, kind, content)))
    assert {name: args[name] for name in EXPECTED} == EXPECTED
    assert args["train_batch_size"] == 16 and args["config_file"] == str(tmp_path / f"config.{kind}")


VALUES = {"learning_rate": st.floats(0, 1), "train_batch_size": st.integers(1, 99), "enable_bucket": st.booleans(),
          "output_name": st.text("ab =-,'\"é", max_size=5), "caption_column": st.sampled_from(["a", "b"]),
          "validation_prompt": st.lists(st.text("ab é,", min_size=1, max_size=4), min_size=1, max_size=3)}
SETTINGS = st.fixed_dictionaries({}, optional=VALUES)


@given(SETTINGS, SETTINGS, st.sampled_from(["json", "toml"]), st.booleans())
def test_command_line_goes_before_file_and_file_before_default(tmp_path_factory, typed, filed, kind, file_first):
    argv = [word for name, value in typed.items()
            for word in ([f"--{name}", *value] if isinstance(value, list) else [f"--{name}={value}"])]
    config = write(tmp_path_factory.mktemp("config"), kind, filed)
    args = vars(parse(*([config, *argv] if file_first else [*argv, config])))
    defaults = vars(parse())
    assert {name: args[name] for name in VALUES} == {name: defaults[name] for name in VALUES} | filed | typed


def test_what_is_needed_may_stand_in_the_file(tmp_path):
    file = write(tmp_path, "toml", {"pretrained_model_name_or_path": "m", "train_data_dir": "d"})
    assert train_sdxl.parse_args([file]).train_data_dir == "d"


@pytest.mark.parametrize("kind, text, words", [
    ("json", '{"learning_rat": 1}', ["--learning_rat", "--learning_rate"]), ("toml", "seed = 'x'", ["--seed", "'x'"]),
    ("json", '{"seed": 1', ["config.json", "JSON", "line 1"]), ("toml", "seed = \n", ["config.toml", "TOML", "line 1"]),
    ("json", "[1]", ["config.json", "one object"]), ("json", '{"train_batch_size": 1.5}', ["--train_batch_size", "1.5"]),
    ("json", '{"a": {"seeed": 3}}', ["--seeed", "--seed"]), ("yaml", "seed: 1", ["config.yaml", ".json", ".toml"])])
def test_mistakes_in_a_file(capsys, tmp_path, kind, text, words):
    path = tmp_path / f"config.{kind}"
    path.write_text(text)
    said = refused(capsys, f"--config_file={path}")
    assert said.count("\n") == 1 and all(word in said for word in words), said


def test_a_file_that_is_not_utf8(capsys, tmp_path):
    (tmp_path / "config.json").write_bytes('{"output_name": "Hünd"}'.encode("latin-1"))
    assert "config.json" in refused(capsys, f"--config_file={tmp_path / 'config.json'}")


def test_the_value_of_a_flag_is_never_taken_for_another_flags(tmp_path):
    args = parse("--output_name", "vae", "--validation_prompt", "xformers", "optimizer_type", "--seed", "3")
    assert (args.output_name, args.validation_prompt, args.seed) == ("vae", ["xformers", "optimizer_type"], 3)


# SimpleTuner's config.json

QUICKSTART = """{
  "model_type": "lora",
  "model_family": "sdxl",
  "model_flavour": "base-1.0",
  "output_dir": "/home/user/output/models",
  "validation_resolution": "1024x1024,1280x768",
  "validation_guidance": 3.4,
  "use_gradient_checkpointing": true,
  "learning_rate": 1e-4
}"""
BASE = "stabilityai/stable-diffusion-xl-base-1.0"


def test_the_quickstarts_config(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(QUICKSTART)
    expected = [f"--pretrained_model_name_or_path={BASE}", "--output_dir=/home/user/output/models", "--validation_resolution",
                "1024x1024", "1280x768", "--validation_guidance=3.4", "--gradient_checkpointing=true", "--learning_rate=0.0001"]
    translated = dialects.translate([f"--config_file={path}"], script="train_lora_sdxl.py")
    assert translated[:-1] == expected and translated[-1] == f"--config_file={path}"
    with pytest.raises(dialects.DialectError, match="--model_type lora is not what train_sdxl.py trains, but train_lora_sdxl.py"):
        dialects.translate([f"--config_file={path}"], script="train_sdxl.py")
    path.write_text(QUICKSTART.replace('"lora"', '"full"'))
    assert dialects.translate([f"--config_file={path}"], script="train_sdxl.py") == translated
    args = train_sdxl.parse_args([f"--config_file={path}", "--train_data_dir=images"])
    assert (args.pretrained_model_name_or_path, args.gradient_checkpointing) == (BASE, True)
    assert args.validation_resolution == [(1024, 1024), (1280, 768)] and args.validation_guidance == 3.4


def test_the_example_is_understood(tmp_path):
    path = tmp_path / "config.json"
    path.write_text((Path(__file__).parents[2] / "config/config.json.example").read_text())
    assert dialects.translate([f"--config_file={path}"], script="train_sdxl.py")
    args = train_sdxl.parse_args([f"--config_file={path}"])
    assert args.data_backend_config == "config/multidatabackend.json" and args.pretrained_model_name_or_path == BASE
    assert len(args.validation_resolution) == 2 and args.proportion_empty_prompts == 0.1


def test_the_example_of_an_adapter_is_understood(tmp_path):
    path = tmp_path / "config.json"
    path.write_text((Path(__file__).parents[2] / "config/config_lora.json.example").read_text())
    args = train_lora_sdxl.parse_args([f"--config_file={path}"])
    assert (args.lora_type, args.rank, args.lora_format, args.use_dora) == ("lora", 16, "both", False)
    assert dialects.script_of(path) == "train_lora_sdxl.py"


@pytest.mark.parametrize("content, script", [
    ({}, "train_sdxl.py"), ({"model_type": "full"}, "train_sdxl.py"), ({"--model_family": "sd3", "model_type": "lora"},
    "train_lora_sd3.py"), ({"model_family": "flux"}, None)])
def test_a_config_file_names_its_script(tmp_path, content, script):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(content))
    if script:
        assert dialects.script_of(path) == script
        return
    with pytest.raises(SystemExit, match="model_family flux with model_type full is not trained here"):
        dialects.script_of(path)


@pytest.mark.parametrize("argv, words", [
    (["--model_family=sd3"], ["--model_family sd3", "train_sd3.py"]), (["--model_family", "flux"], ["'flux'", "sdxl and sd3"]),
    (["--model_type=LoRA"], ["'LoRA'", "full and lora"]), (["--model_flavour=large"], ["'large'"]),
    (["--model_flavour=refiner-1.0"], ["'refiner-1.0'", "base-1.0 and base-0.9"]),
    (["--model_type"], ["--model_type takes one value, not 0"]), (["--model_type", "full", "lora"], ["one value, not 2"])])
def test_models_that_are_another_scripts(argv, words):
    with pytest.raises(dialects.DialectError) as error:
        dialects.translate(argv, script="train_sdxl.py")
    assert all(word in str(error.value) for word in words), error.value


def test_scripts_that_are_not_there_are_not_promised(monkeypatch):
    monkeypatch.setitem(dialects.SCRIPTS, ("sd3", "full"), "train_nothing.py")
    with pytest.raises(dialects.DialectError, match=r"train_nothing\.py, which this version does not have"):
        dialects.translate(["--model_family=sd3"], script="train_sdxl.py")
    monkeypatch.setitem(dialects.SCRIPTS, ("sd3", "full"), "generate.py")
    with pytest.raises(dialects.DialectError, match=r"generate\.py$"):
        dialects.translate(["--model_family=sd3"], script="train_sdxl.py")


def test_flavours():
    for argv, expected in ((["--model_family=sdxl"], []),
                           (["--model_flavour", "base-1.0"], [f"--pretrained_model_name_or_path={BASE}"]),
                           (["--model_type=full", "--model_family=sdxl"], []),
                           (["--model_type=lora", "--model_type=full"], [])):    # the later one counts
        assert dialects.translate(argv, script="train_sdxl.py") == expected
    assert dialects.translate(["--model_family=sd3", "--model_flavour=medium"], script="train_sd3.py") == [
        "--pretrained_model_name_or_path=stabilityai/stable-diffusion-3.5-medium"]


def test_epochs_or_steps_of_zero_leave_it_to_the_other(tmp_path):
    file = write(tmp_path, "json", {"max_train_steps": 9, "num_train_epochs": 3})
    for argv, epochs, steps in ((["--num_train_epochs=0", "--max_train_steps=9"], 100, 9),
                                (["--max_train_steps", "0", "--num_train_epochs", "3"], 3, None),
                                ([file, "--max_train_steps=0"], 3, None), ([file, "--num_train_epochs=0"], 100, 9)):
        args = parse(*argv)
        assert (args.num_train_epochs, args.max_train_steps) == (epochs, steps)


@pytest.mark.parametrize("argv", [
    ["--num_train_epochs=0"], ["--max_train_steps=0"], ["--max_train_steps=0", "--num_train_epochs=0"]])
def test_no_length_at_all(capsys, argv):
    said = refused(capsys, *argv)
    assert "--num_train_epochs" in said and "--max_train_steps" in said


@pytest.mark.parametrize("text, value", [("true", True), ("false", False), ("True", True)])
def test_truth_in_quotes(tmp_path, text, value):
    content = {"use_gradient_checkpointing": text, "no_half_vae": text, "cache_latents": text}
    args = parse(write(tmp_path, "json", content))
    assert (args.gradient_checkpointing, args.cache_latents) == (value, value)
    tokens = dialects.read_config(tmp_path / "config.json")
    assert ("--no_half_vae" in tokens) is value and not [token for token in tokens if token.startswith("--no_half_vae=")]


# SimpleTuner's SD3

SKIPPING = """{
  "--validation_guidance_skip_layers": [7, 8, 9],
  "--validation_guidance_skip_layers_start": 0.01,
  "--validation_guidance_skip_layers_stop": 0.2,
  "--validation_guidance_skip_scale": 2.8,
  "--validation_guidance": 4.0,
  "--flow_use_uniform_schedule": true,
  "--flow_schedule_auto_shift": true
}"""
OF_A_LORA = """{
  "model_type": "lora",
  "model_family": "sd3",
  "pretrained_model_name_or_path": "stabilityai/stable-diffusion-3.5-large",
  "output_dir": "/home/user/outputs/models",
  "validation_resolution": "1024x1024,1280x768",
  "validation_guidance": 3.0,
  "validation_prompt": "your main test prompt here",
  "user_prompt_library": "LIBRARY",
  "base_model_precision": "int8-quanto",
  "text_encoder_1_precision": "no_change",
  "text_encoder_2_precision": "no_change",
  "text_encoder_3_precision": "no_change",
  "optimizer": "adamw_bf16"
}"""
OF_ENV = """# of config.env
export MODEL_TYPE="lora"
MODEL_FAMILY=sd3
export MODEL_NAME='stabilityai/stable-diffusion-3.5-large'   # by path
export BASE_DIR="/home/user"
export OUTPUT_DIR="${BASE_DIR}/models"
export VALIDATION_RESOLUTION=1024x1024,1280x768
export VALIDATION_GUIDANCE=3.0
export VALIDATION_PROMPT="a cat, at night"
export OPTIMIZER="adamw_bf16"
export MAX_NUM_STEPS=9
export USE_GRADIENT_CHECKPOINTING=true
export VALIDATION_SEED=
export TRAINER_EXTRA_ARGS="--base_model_precision=int8-quanto"
export TRAINER_EXTRA_ARGS="${TRAINER_EXTRA_ARGS} --text_encoder_1_precision=no_change"
TRAINER_EXTRA_ARGS+=" --lora_rank 8"
"""


def test_the_options_of_skip_layer_guidance(tmp_path):
    path = tmp_path / "config.json"
    for layers in ("[7, 8, 9]", '"[7,8,9]"', '"[7, 8, 9]"', '"7,8,9"'):
        path.write_text(SKIPPING.replace("[7, 8, 9]", layers))
        args = parse_sd3(f"--config_file={path}")
        assert args.validation_guidance_skip_layers == [7, 8, 9] and args.validation_guidance_skip_scale == 2.8
        assert args.flow_use_uniform_schedule and args.flow_schedule_auto_shift and args.validation_guidance == 4.0


def test_the_config_of_an_adapter_and_its_library_of_prompts(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["train_lora_sd3.py"])
    path, library = tmp_path / "config.json", tmp_path / "library.json"
    library.write_text(json.dumps({"one": "a cat", "two": "a dog, at night"}))
    path.write_text(OF_A_LORA.replace("LIBRARY", str(library)))
    args = parse_lora_sd3(f"--config_file={path}", "--train_data_dir=images")
    assert args.validation_prompt == ["your main test prompt here", "a cat", "a dog, at night"]
    assert (args.base_model_precision, args.text_encoder_3_precision) == ("int8-quanto", "no_change")
    assert args.optimizer == "adamw_bf16"
    assert args.validation_resolution == [(1024, 1024), (1280, 768)] and dialects.script_of(path) == "train_lora_sd3.py"
    args = parse_lora_sd3(f"--config_file={path}", "--train_data_dir=images", "--validation_prompts", "x", "y")
    assert args.validation_prompt == ["x", "y", "a cat", "a dog, at night"]


@pytest.mark.parametrize("content, words", [
    (None, ["cannot read", "library.json"]), ("[", ["not valid JSON"]), ('["a"]', ["must hold one object"]),
    ('{"a": 3}', ["must hold one object"]), ('{"a": "--seed"}', ["a looks like a flag"])])
def test_libraries_that_are_none(tmp_path, content, words):
    path = tmp_path / "library.json"
    if content:
        path.write_text(content)
    with pytest.raises(dialects.DialectError) as error:
        dialects.translate([f"--user_prompt_library={path}"])
    assert all(word in str(error.value) for word in ["--user_prompt_library", *words]), error.value


def test_config_env(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["train_lora_sd3.py"])
    path = tmp_path / "config.env"
    path.write_text(OF_ENV)
    args = parse_lora_sd3(f"--config_file={path}", "--train_data_dir=images", "--max_train_steps=3")
    assert args.output_dir == "/home/user/models"
    assert args.pretrained_model_name_or_path == "stabilityai/stable-diffusion-3.5-large"
    assert (args.validation_guidance, args.validation_prompt) == (3.0, ["a cat, at night"]) and args.validation_seed is None
    assert (args.base_model_precision, args.rank, args.optimizer) == ("int8-quanto", 8, "adamw_bf16")
    assert args.gradient_checkpointing and args.max_train_steps == 3 and dialects.script_of(path) == "train_lora_sd3.py"


@pytest.mark.parametrize("line, words", [("A=$(rm x)", ["commands are not run"]), ("not so", ["line 1", "NAME="]),
                                         ('A="x', ["No closing quotation"]), ("A=1 B=2", ["line 1"])])
def test_mistakes_in_config_env(tmp_path, line, words):
    (tmp_path / "config.env").write_text(line)
    with pytest.raises(dialects.DialectError) as error:
        dialects.read_config(tmp_path / "config.env")
    assert all(word in str(error.value) for word in ["config.env", *words]), error.value


def test_capitals_in_a_json_are_flags_too(tmp_path):
    file = write(tmp_path, "json", {"VALIDATION_GUIDANCE": 3.0, "--FLOW_SCHEDULE_SHIFT": 1})
    args = parse_sd3(file)
    assert (args.validation_guidance, args.flow_schedule_shift) == (3.0, 1.0)


@pytest.mark.parametrize("name", ["config_sd3", "config_sd3_stable", "config_sd3_low_memory"])
def test_the_examples_of_sd3_are_understood(tmp_path, monkeypatch, capsys, name):
    folder = Path(__file__).parents[2] / "config"
    content = json.loads((folder / f"{name}.json.example").read_text())
    if "user_prompt_library" in content:
        content["user_prompt_library"] = str(folder / "user_prompt_library.json.example")
    file = write(tmp_path, "json", content)
    script = dialects.script_of(tmp_path / "config.json")
    monkeypatch.setattr("sys.argv", [script])
    args = train_sd3.parse_args([file]) if script == "train_sd3.py" else parse_lora_sd3(file)
    assert capsys.readouterr().err == "" and "3.5" in args.pretrained_model_name_or_path    # no flag without effect
    if name == "config_sd3_stable":
        assert (args.optimizer, args.flow_schedule_shift, args.learning_rate, args.max_grad_norm, args.base_model_precision,
                args.validation_guidance_skip_layers) == ("adamw_bf16", 1.0, 1e-4, 0.1, "int8-quanto", [7, 8, 9])
        assert args.train_batch_size * args.gradient_accumulation_steps == 4 * 3
    elif name == "config_sd3_low_memory":
        assert (args.optimizer, args.base_model_precision, args.resolution, args.train_batch_size,
                args.gradient_accumulation_steps) == ("bnb-lion8bit-paged", "nf4-bnb", (512, 512), 1, 1)
    else:
        assert len(args.validation_prompt) == 4 and args.optimizer == "stableadamw"


def test_layers_that_keep_their_precision():
    args = parse_lora_sd3(*NEEDED, "--quantize_exclude", "pos_embed*", "*.norm1.*")
    assert args.quantize_exclude == ["pos_embed*", "*.norm1.*"]


def test_kohyas_sdpa_is_what_runs(capsys):
    chosen = ["--attention_mechanism=sdpa"]
    for switch, said in (("--sdpa", chosen), ("--sdpa=true", chosen), ("--sdpa=false", [])):
        assert dialects.translate([switch, "--seed=1"], "train_sdxl.py") == [*said, "--seed=1"]
    with pytest.raises(SystemExit):    # what stands behind it is not lost in silence
        parse_lora_sd3(*NEEDED, "--sdpa", "model.safetensors")
    assert "--sdpa" in capsys.readouterr().err
