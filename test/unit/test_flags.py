"""The command line: every flag, its default, its aliases, config files, and what is said to a mistake."""

import ast
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from library import flags

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPTS = sorted(path.name for path in REPOSITORY.glob("*.py"))
NEEDED = ["--pretrained_model_name_or_path=model", "--train_data_dir=images"]


def script(name: str = "train_sdxl.py"):
    return __import__(name.removesuffix(".py"))


def parse(*argv):
    return script().parse_args([*NEEDED, *argv])


def parser_of(name: str = "train_sdxl.py") -> flags.Parser:
    """The parser that a script builds, caught when it is about to parse."""
    caught = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flags.Parser, "parse_args", lambda self, argv=None: caught.append(self) or sys.exit(0))
        with pytest.raises(SystemExit):
            script(name).parse_args([])
    return caught[0]


ACTIONS = {action.dest: action for action in parser_of()._actions if action.dest != "help"}
OF_SD3 = {action.dest: action for action in parser_of("train_sd3.py")._actions if action.dest not in {"help", *ACTIONS}}
OF_ADAPTERS = {action.dest for action in parser_of("train_lora_sdxl.py")._actions} - {"help", *ACTIONS}
OF_UNETS = {"conv_rank", "conv_alpha", "down_lr_weight", "mid_lr_weight", "up_lr_weight"}


def parse_sd3(*argv):
    return script("train_sd3.py").parse_args([*NEEDED, *map(str, argv)])


def refused(capsys, *argv, name: str = "train_sdxl.py") -> str:
    """The one line said to a command line that is refused."""
    with pytest.raises(SystemExit) as ending:
        script(name).parse_args(list(argv))
    said = capsys.readouterr().err
    assert ending.value.code == 2 and said.count("\n") == 1 and said.startswith(Path(sys.argv[0]).name + ": error: ")
    return said


@pytest.mark.parametrize("processes, batch, steps", [(1, 4, 6), (2, 4, 3), (3, 8, 1), (4, 2, 3)])
def test_global_batch_size(monkeypatch, processes, batch, steps):
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    args = parse("--train_batch_size", str(batch), "--global_batch_size", "24")
    assert args.gradient_accumulation_steps == steps


def test_global_batch_sizes_that_cannot_be(monkeypatch, capsys):
    given = (*NEEDED, "--train_batch_size=4", "--global_batch_size=24")
    assert "exclude each other" in refused(capsys, *given, "--gradient_accumulation_steps=2")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert "--global_batch_size 24 is no multiple of --train_batch_size 4 x 4 processes" in refused(capsys, *given)


# every flag

@pytest.mark.parametrize("name", SCRIPTS)
def test_every_flag_has_help_and_stands_in_a_group_with_a_title(name):
    parser = parser_of(name)
    for group in parser._action_groups:
        if group.title in ("positional arguments", "options"):
            assert [action.dest for action in group._group_actions] in ([], ["help"])
        assert group.title
        for action in group._group_actions:
            assert action.help and action.help[0] != " " and not action.help.endswith("."), action.dest
    titles = [group.title for group in parser._action_groups]
    assert len(set(titles)) == len(titles)


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_committed_help_is_the_live_one(name):
    live = subprocess.run([sys.executable, name, "--help"], cwd=REPOSITORY, env=os.environ | {"COLUMNS": "120"}, text=True,
                          capture_output=True, check=True).stdout
    page = f"docs/help/{Path(name).stem}.txt"
    assert live == (REPOSITORY / page).read_text(), f"COLUMNS=120 python {name} --help > {page}"


# column T of the inventory of diffusers' scripts: train_text_to_image_sdxl.py
DIFFUSERS = dict(
    pretrained_vae_model_name_or_path=None, revision=None, variant=None, dataset_name=None, dataset_config_name=None,
    cache_dir=None, image_column="image", caption_column="text", num_validation_images=4, validation_epochs=1,
    max_train_samples=None, proportion_empty_prompts=0, output_dir="sdxl-model-finetuned", seed=None, center_crop=False,
    random_flip=False, image_interpolation_mode="lanczos", train_batch_size=16, num_train_epochs=100, max_train_steps=None,
    checkpointing_steps=500, checkpoints_total_limit=None, resume_from_checkpoint=None, gradient_accumulation_steps=1,
    gradient_checkpointing=False, learning_rate=1e-4, scale_lr=False, lr_scheduler="constant", lr_warmup_steps=500,
    timestep_bias_strategy="none", timestep_bias_multiplier=1.0, timestep_bias_begin=0, timestep_bias_end=1000,
    timestep_bias_portion=0.25, snr_gamma=None, noise_offset=0, prediction_type=None, use_ema=False, use_8bit_adam=False,
    max_grad_norm=1.0, allow_tf32=False, adam_beta1=None,    # AdamW has theirs: test_optimizer_of_a_run
    adam_beta2=None, adam_weight_decay=None, adam_epsilon=None,
    mixed_precision=None, dataloader_num_workers=0, local_rank=-1,
    attention_mechanism="default",    # neither xformers nor Ascend's
    report_to="tensorboard", logging_dir="logs", push_to_hub=False,
    hub_model_id=None, hub_token=None,
    resolution=(1024, 1024),    # theirs is one side: 1024
    validation_prompt=[])    # theirs is one, or None


def test_diffusers_flags_have_diffusers_defaults():
    args = vars(parse())
    assert {name: args[name] for name in DIFFUSERS} == DIFFUSERS
    assert args["pretrained_model_name_or_path"] == "model" and args["train_data_dir"] == "images"    # no default there either
    assert args["cache_latents"] is True and args["cache_text_encoder_outputs"] is True    # diffusers' script always caches


ASCEND = """--max_train_steps=9 --max_train_epoch=120 --pretrained_model_name_or_path=model --vae=vae-fix --tokenizer1_path=t1
    --tokenizer2_path=t2 --train_data_dir=images --resolution=1024,1024 --enable_bucket --min_bucket_reso=512
    --max_bucket_reso=2048 --output_dir=out --output_name=sdxl --save_every_n_epochs=10 --save_precision=float
    --logging_dir=logs --gradient_checkpointing --gradient_accumulation_steps=1 --learning_rate=1e-6 --train_text_encoder
    --learning_rate_te1=1e-7 --learning_rate_te2=1e-7 --lr_warmup_steps=0 --max_grad_norm=1.0
    --lr_scheduler=cosine_with_restarts --lr_scheduler_num_cycles=1 --train_batch_size=4 --mixed_precision=fp16 --seed=1
    --caption_extension=.txt --shuffle_caption --keep_tokens=1 --optimizer_type=AdamW --max_token_length=77
    --enable_npu_flash_attention"""


@pytest.mark.parametrize("apart", [False, True])
def test_the_command_line_of_ascends_scripts(apart):
    argv = ASCEND.split()
    argv = [part for word in argv for part in word.split("=")] if apart else argv
    args = vars(script().parse_args(argv))
    expected = dict(
        max_train_steps=9, num_train_epochs=120, pretrained_model_name_or_path="model", tokenizer1_path="t1",
        tokenizer2_path="t2", pretrained_vae_model_name_or_path="vae-fix", train_data_dir="images", resolution=(1024, 1024),
        enable_bucket=True, min_bucket_reso=512, max_bucket_reso=2048, output_dir="out", output_name="sdxl",
        save_every_n_epochs=10, save_precision="float", logging_dir="logs", gradient_checkpointing=True,
        gradient_accumulation_steps=1, learning_rate=1e-6, train_text_encoder=True, learning_rate_te1=1e-7,
        learning_rate_te2=1e-7, lr_warmup_steps=0, max_grad_norm=1.0, lr_scheduler="cosine_with_restarts", lr_num_cycles=1,
        train_batch_size=4, mixed_precision="fp16", seed=1, caption_extension=".txt", shuffle_caption=True, keep_tokens=1,
        optimizer="adamw", max_token_length=77, attention_mechanism="npu")
    assert {name: args[name] for name in expected} == expected


@pytest.mark.parametrize("name, flags", [
    ("train_sdxl.py", {*ACTIONS}), ("train_sd3.py", {*OF_SD3}), ("train_lora_sdxl.py", OF_ADAPTERS),
    ("train_lora_sd3.py", {*OF_SD3, *OF_ADAPTERS} - OF_UNETS | {"lora_blocks", "learning_rate_te3", "quantize_exclude"})])
def test_every_flag_is_read_by_something_that_acts_on_it(name, flags):
    # read by dialects.translate and Parser, before there are arguments; by a name that is put together; and by flags_sd3.density
    read = {"config_file", "global_batch_size", "text_encoder_3_precision", "flow_use_uniform_schedule", "flow_use_beta_schedule"}
    assert "--config_file" in (REPOSITORY / "library/dialects.py").read_text()
    for path in [REPOSITORY / name, *REPOSITORY.glob("library/*/**/*.py")]:    # flags.check alone would be no use
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and "getattr(args, " in ast.unparse(node):    # by names that it lists
                read |= {each.value for each in ast.walk(node) if isinstance(each, ast.Constant) and isinstance(each.value, str)}
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "args":
                read.add(node.attr)
    assert flags - read == set()


def test_nothing_writes_to_the_arguments():
    for path in [*REPOSITORY.glob("*.py"), *REPOSITORY.glob("library/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            written = isinstance(node, ast.Attribute) and isinstance(node.ctx, (ast.Store, ast.Del))
            assert not (written and ast.unparse(node.value).lower() == "args"), f"{path.name}:{node.lineno}"
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            assert called not in ("setattr", "delattr") or ast.unparse(node.args[0]) != "args", f"{path.name}:{node.lineno}"


def test_no_shared_flag_is_declared_twice():
    declared = ["minimum_image_size", "maximum_image_size", "target_downsample_size"]    # in a loop, and so are
    declared += [name for name in OF_SD3 if name.endswith(("_dropout_rate", "_uncond_behaviour"))]
    for path in [*REPOSITORY.glob("train_*.py"), *REPOSITORY.glob("library/flags*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                named = [word.value for word in node.args if isinstance(word, ast.Constant) and isinstance(word.value, str)]
                if ast.unparse(node.func).split(".")[-1] in ("add", "add_argument", "switch") and named:
                    declared.append(named[0].lstrip("-"))
    known = {action.dest for name in SCRIPTS if name.startswith("train_") for action in parser_of(name)._actions} - {"help"}
    assert set(declared) == known and len(set(declared)) == len(declared)


# mistakes

@pytest.mark.parametrize("typed, near", [
    ("--learning_rat=1", "--learning_rate"), ("--resume", None), ("--train_data_dri=x", "--train_data_dir"),
    ("--enable_buckets", "--enable_bucket"), ("--max_train_epochss=3", "--max_train_epochs"), ("--zzzzqqqq", None)])
def test_an_unknown_flag_names_the_nearest(capsys, typed, near):
    if typed == "--resume":    # kohya's name of --resume_from_checkpoint, never an abbreviation
        assert parse("--resume", "latest").resume_from_checkpoint == "latest"
        return
    said = refused(capsys, typed)    # although other flags are missing, too
    assert f"there is no flag {typed.split('=')[0]}" in said
    assert (f"did you mean {near}?" in said) if near else "--help" in said


@pytest.mark.parametrize("action", [action for action in [*ACTIONS.values(), *OF_SD3.values()] if action.type or action.choices],
                         ids=lambda a: a.dest)
def test_a_bad_value_names_its_flag(capsys, action):
    flag = action.option_strings[0]
    for argv in ([f"{flag}=@bad"], [flag, "@bad"]):
        said = refused(capsys, *NEEDED, *argv, name="train_sd3.py" if action.dest in OF_SD3 else "train_sdxl.py")
        assert f"{flag}:" in said and "@bad" in said


@pytest.mark.parametrize("argv, words", [
    ([], ["--pretrained_model_name_or_path"]), (NEEDED[:1], ["--train_data_dir", "--dataset_name"]),
    ([*NEEDED, "--dataset_name=x"], ["--train_data_dir", "--dataset_name"]), ([*NEEDED, "stray"], ["'stray'"]),
    ([*NEEDED, "--seed"], ["--seed"]), ([*NEEDED, "--resolution=100"], ["--resolution", "100", "multiple of 8"]),
    ([*NEEDED, f"--validation_seed={2**64}"], ["--validation_seed", "at most"]),
    ([*NEEDED, "--resolution=64,64,64"], ["--resolution", "64,64,64"]), ([*NEEDED, "--learning_rate=nan"], ["nan"]),
    ([*NEEDED, "--learning_rate=-1"], ["--learning_rate", "at least 0"]), ([*NEEDED, "--snr_gamma=0"], ["more than 0"]),
    ([*NEEDED, "--adam_beta2=1.5"], ["--adam_beta2", "at most 1"]), ([*NEEDED, "--train_batch_size=1.5"], ["whole number"]),
    ([*NEEDED, "--train_batch_size=0"], ["at least 1"]), ([*NEEDED, "--enable_bucket=maybe"], ["--enable_bucket", "maybe"]),
    ([*NEEDED, "--alpha_mask", "--conditioning_data_dir=m"], ["--alpha_mask", "--conditioning_data_dir", "exclude each other"]),
    ([*NEEDED, "--random_crop"], ["--random_crop", "--enable_bucket"]), ([*NEEDED, "--bucket_no_upscale"], ["--enable_bucket"]),
    ([*NEEDED, "--keep_tokens=1"], ["--shuffle_caption"]), ([*NEEDED, "--learning_rate_te2=1"], ["--train_text_encoder"]),
    ([*NEEDED, "--use_8bit_adam", "--optimizer=adafactor"], ["--use_8bit_adam", "adafactor"]),
    ([*NEEDED, "--use_safetensors=true"], ["--use_safetensors", "--save_model_as"]),
    ([*NEEDED, "--config_file"], ["--config_file"]), ([*NEEDED, "--config_file=none.json"], ["none.json"]),
    ([*NEEDED, "--config_file=setup.py"], ["setup.py", ".json", ".toml"])])
def test_other_mistakes(capsys, argv, words):
    said = refused(capsys, *argv)
    assert all(word in said for word in words), said


def test_contradictions_are_named_all_at_once(capsys):
    said = refused(capsys, *NEEDED, "--keep_tokens=2", "--random_crop", "--center_crop", "--learning_rate_te1=0")
    assert all(word in said for word in ("--keep_tokens", "--random_crop needs", "exclude each other", "--learning_rate_te1"))


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize("argv", [["--help"], ["--hepl"], [], ["--seed=x"], ["--config_file=none.toml"]], ids=str)
def test_help_and_mistakes_take_no_time_and_no_torch(name, argv):
    program = f"import runpy, sys\nsys.argv = {[name, *argv]!r}\ntry:\n    runpy.run_path({name!r}, run_name='__main__')\n" \
              "finally:\n    heavy = {'torch', 'numpy', 'PIL', 'accelerate'} & set(sys.modules)\n    print('heavy:', heavy)"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, text=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == (0 if argv == ["--help"] else 2)
    assert done.stdout.endswith("heavy: set()\n") and "Traceback" not in done.stderr
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5


@pytest.mark.parametrize("flag, value, why, partner", [
    ("ema_decay", "0.9", "without --use_ema", "--use_ema"),
    ("min_bucket_reso", "512", "without --enable_bucket", "--enable_bucket"),
    ("validation_steps", "5", "without --validation_prompt", "--validation_prompt=cat"),
    ("hub_token", "secret", "without --push_to_hub", "--push_to_hub"),
    ("lr_power", "2", "with --lr_scheduler constant", "--lr_scheduler=polynomial"),
    ("timestep_bias_multiplier", "3", "without --timestep_bias_strategy", "--timestep_bias_strategy=later"),
    ("timestep_bias_begin", "3", "without --timestep_bias_strategy range", "--timestep_bias_strategy=range")])
def test_a_flag_that_lacks_its_partner_is_named(capsys, flag, value, why, partner):
    parse(f"--{flag}={value}")
    said = capsys.readouterr().err
    assert said == f"{Path(sys.argv[0]).name}: note: --{flag} has no effect {why}\n"
    parse(f"--{flag}={value}", partner)
    assert capsys.readouterr().err == ""


def test_the_center_crop_that_buckets_make_by_themselves_is_named(capsys):
    parse("--center_crop", "--enable_bucket")
    assert "--center_crop has no effect with --enable_bucket" in capsys.readouterr().err


def test_only_the_first_process_names_it(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    parse("--ema_decay=0.9")
    assert capsys.readouterr().err == ""


# SD3

def test_defaults_of_sd3():
    args = parse_sd3()
    expected = dict(weighting_scheme="logit_normal", logit_mean=0.0, logit_std=1.0, mode_scale=1.29, precondition_outputs=False,
                    flow_schedule_shift=3.0, flow_schedule_auto_shift=False, flow_use_uniform_schedule=False,
                    flow_use_beta_schedule=False, tokenizer_max_length=154, t5_padding="unmodified", no_t5=False,
                    apply_lg_attn_mask=False, apply_t5_attn_mask=False, clip_l_dropout_rate=0.0, clip_g_dropout_rate=0.0,
                    t5_dropout_rate=0.0, sd3_clip_uncond_behaviour="empty_string", sd3_t5_uncond_behaviour="empty_string",
                    text_encoder_3_precision="no_change", spike_guard="off", spike_factor=10.0,
                    validation_guidance_skip_layers=None, validation_guidance_skip_layers_start=0.01,
                    validation_guidance_skip_layers_stop=0.2, validation_guidance_skip_scale=2.8)
    assert {name: getattr(args, name) for name in OF_SD3} == expected
    assert args.output_dir == "sd3-model-finetuned" and "stable-diffusion-3.5" in args.single_file_config
    gone = {"prediction_type", "snr_gamma", "zero_terminal_snr"} | {name for name in ACTIONS if name.startswith("timestep_bias")}
    assert {*ACTIONS} - {*vars(args)} == gone


@pytest.mark.parametrize("flags, density", [
    ((), "logit_normal"), (("--weighting_scheme", "mode"), "mode"), (("--weighting_scheme", "cosmap"), "uniform"),
    (("--weighting_scheme", "sigma_sqrt"), "uniform"), (("--weighting_scheme", "none"), "uniform"),
    (("--flow_use_uniform_schedule",), "uniform"), (("--flow_use_beta_schedule",), "beta"),
    (("--weighting_scheme", "cosmap", "--flow_use_beta_schedule"), "beta")])
def test_the_density_that_the_flags_ask_for(flags, density):
    from library import flags_sd3
    from library.diffusion import flow
    assert flags_sd3.density(parse_sd3(*flags)) == density and density in flow.DENSITIES and flags_sd3.SCHEMES == flow.SCHEMES


@pytest.mark.parametrize("value, truth", [("1", True), ("0", False), ("true", True), (None, True)])
def test_precondition_outputs_is_a_switch_that_takes_numbers(value, truth):
    assert parse_sd3("--precondition_outputs", *([value] if value else [])).precondition_outputs is truth


@pytest.mark.parametrize("argv, words", [
    (["--flow_use_uniform_schedule", "--flow_use_beta_schedule"], ["exclude each other"]),
    (["--flow_use_beta_schedule", "--weighting_scheme=mode"], ["--weighting_scheme mode", "--flow_use_beta_schedule"]),
    (["--flow_use_uniform_schedule", "--weighting_scheme", "logit_normal"],    # its default, but here the user says so
     ["--weighting_scheme logit_normal and --flow_use_uniform_schedule exclude each other"]),
    (["--validation_guidance_skip_layers_start=0.5"], ["_start must be below --validation_guidance_skip_layers_stop"]),
    (["--resolution=1000"], ["--resolution 1000,1000", "multiple of 16"]),
    (["--validation_resolution=512,520"], ["--validation_resolution 512,520"]),
    (["--enable_bucket", "--bucket_reso_steps=8"], ["--bucket_reso_steps 8"]),
    (["--save_model_as=ckpt"], ["--save_model_as ckpt"]),
    (["--spike_factor=1"], ["more than 1"]), (["--mode_scale=2"], ["at most 1.75"]),
    (["--snr_gamma=5"], ["no flag --snr_gamma"]),
    (["--validation_guidance_skip_layers=[7,x]"], ["'x'"]), (["--tokenizer_max_length=100"], ["77, 154, 256"])])
def test_contradictions_of_sd3(capsys, argv, words):
    said = refused(capsys, *NEEDED, *argv, name="train_sd3.py")
    assert all(word in said for word in words), said


@pytest.mark.parametrize("flag, value, why, partner", [
    ("logit_mean", "1", "with --flow_use_uniform_schedule", None), ("mode_scale", "1", "without --weighting_scheme mode", None),
    ("flow_schedule_shift", "1", "with --flow_schedule_auto_shift", None), ("spike_factor", "5", "without --spike_guard", None),
    ("t5_padding", "zero", "with --no_t5", None),
    ("validation_guidance_skip_layers", "7", "without guidance: --validation_guidance above 1", "--validation_guidance=1"),
    ("validation_guidance_skip_layers", "7", "as none of 3 steps lies between 0.01 and 0.2 of them",
     "--validation_num_inference_steps=3"),
    ("validation_guidance_skip_scale", "2", "without --validation_guidance_skip_layers", None)])
def test_a_flag_of_sd3_that_has_no_effect_is_named(capsys, flag, value, why, partner):
    why_flags = [word for word in why.split() if word.startswith("--") and "with " in why]
    parse_sd3(f"--{flag}={value}", "--validation_prompt=a cat", *([partner] if partner else why_flags))
    assert capsys.readouterr().err == f"{Path(sys.argv[0]).name}: note: --{flag} has no effect {why}\n"
