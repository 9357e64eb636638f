"""Every flag that two or more scripts share, declared once and grouped for --help.

Standard library only: `--help` and every mistake in a command line are answered before torch is imported.
diffusers' names are used where diffusers has the flag; `dialects.py` knows the other trainers' names.
"""

import argparse
import ast
import difflib
import math
import os
import sys

from library.flags_adapter import faults_of_adapter, idle_adapter_flags
from library.flags_data import add_cache_flags, add_data_flags, faults_of_data, idle_data_flags  # noqa: F401
from library.flags_sd3 import add_flow_flags, faults_of_sd3, idle_sd3_flags
from library.flags_validation import add_validation_flags, faults_of_validation, idle_validation_flags  # noqa: F401
from library.parser import COUNT, FRACTION, NOT_NEGATIVE, Parser, launched, number, size, switch  # noqa: F401

LR_SCHEDULERS = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup",
                 "piecewise_constant", "inverse_sqrt", "cosine_with_min_lr", "warmup_stable_decay")
OPTIMIZERS = (
    "adamw", "adamw_fused", "oss", "adamw_8bit", "adamw_bf16", "adafactor", "sgd", "lion", "stableadamw", "flashadamw",
    "ademamix", "adopt", "prodigy", "dadapt-adam", "dadapt-lion", "dadapt-sgd", "dadapt-adagrad", "dadapt-adan",
    "adamw-schedulefree", "radam-schedulefree", "sgd-schedulefree", "came", "soap", "muon", "optimi-adam", "optimi-adamw",
    "optimi-lion", "optimi-stableadamw", "optimi-adan", "optimi-ranger", "optimi-radam", "optimi-sgd", "bnb-adam", "bnb-adam8bit",
    "bnb-adamw", "bnb-adamw-paged", "bnb-adamw8bit-paged", "bnb-lion", "bnb-lion8bit", "bnb-lion-paged", "bnb-lion8bit-paged",
    "bnb-ademamix", "bnb-ademamix8bit", "bnb-ademamix-paged", "bnb-ademamix8bit-paged", "bnb-adagrad", "bnb-adagrad8bit",
    "bnb-sgd", "bnb-sgd8bit", "ao-adamw8bit", "ao-adamw4bit", "ao-adamwfp8", "ao-adamfp8")

ATTENTION = ("default", "sdpa", "xformers", "flash", "sageattention", "npu")


def add_model_flags(parser: Parser, required: bool = True) -> None:
    """required: whether the script cannot do without a base model."""
    group = parser.add_argument_group("model")
    add = group.add_argument
    add("--pretrained_model_name_or_path", required=required, metavar="MODEL",
        help="base model: a diffusers folder, a hub id, or one .safetensors/.ckpt file")
    add("--pretrained_vae_model_name_or_path", metavar="VAE", help="another VAE: a folder, a hub id or one file")
    add("--revision", help="revision of the base model (and of the VAE) on the hub")
    add("--variant", help="variant of the weight files, such as fp16")
    add("--single_file_config", metavar="MODEL", default="stabilityai/stable-diffusion-xl-base-1.0",
        help="where a single-file base takes its configs and tokenizers from: a diffusers folder or hub id")
    add("--tokenizer1_path", metavar="PATH", help="another folder or hub id for the first tokenizer")
    add("--tokenizer2_path", metavar="PATH", help="another folder or hub id for the second tokenizer")
    add("--max_token_length", type=int, choices=(75, 77, 150, 225, 512), default=77, metavar="N",
        help="prompt tokens read: 77 (the model's own), or 150, 225, 512 in pieces of 75 as kohya does")
    add("--vae_dtype", choices=("fp32", "fp16", "bf16"), default="fp32",
        help="precision of the VAE; SDXL's own VAE overflows in fp16")
    switch(group, "gradient_checkpointing", "recompute activations in the backward pass: less memory, more time")
    add("--attention_mechanism", default="default", choices=ATTENTION, metavar="NAME",
        help=f"of the UNet or transformer: {', '.join(ATTENTION)}; default and sdpa are PyTorch's, npu is Ascend's")
    add("--sageattention_usage", default="inference", choices=("inference", "training", "training+inference"), metavar="WHEN",
        help="sageattention: inference (validation alone), training or training+inference")


def add_training_flags(parser: Parser) -> None:
    group = parser.add_argument_group("training")
    add = group.add_argument
    add("--train_batch_size", type=COUNT, default=16, metavar="N", help="images a device takes at once")
    add("--gradient_accumulation_steps", type=COUNT, default=1, metavar="N",
        help="batches added up for one optimizer step")
    add("--global_batch_size", type=COUNT, metavar="N",
        help="images of one optimizer step on any number of processes: the accumulation follows from it")
    add("--num_train_epochs", type=COUNT, default=100, metavar="N", help="how often each image is seen")
    add("--max_train_steps", type=COUNT, metavar="N", help="optimizer steps; overrides --num_train_epochs")
    add("--learning_rate", type=NOT_NEGATIVE, default=1e-4, metavar="LR", help="peak learning rate")
    switch(group, "scale_lr", "multiply the learning rate by accumulation x batch x processes")
    switch(group, "train_text_encoder", "also train both text encoders (their cache is then off)")
    add("--learning_rate_te1", type=NOT_NEGATIVE, metavar="LR", 
        help="rate of text encoder 1 (default: --learning_rate; 0 freezes it)")
    add("--learning_rate_te2", type=NOT_NEGATIVE, metavar="LR", 
        help="rate of text encoder 2 (default: --learning_rate; 0 freezes it)")
    add("--lr_scheduler", default="constant", choices=LR_SCHEDULERS, metavar="NAME", help=", ".join(LR_SCHEDULERS))
    add("--lr_warmup_steps", type=NOT_NEGATIVE, default=500, metavar="N",
        help="optimizer steps of warm-up, or a share of the run if below 1; `constant` has none")
    add("--lr_num_cycles", type=COUNT, default=1, metavar="N", help="cosine_with_restarts: number of cycles")
    add("--lr_power", type=NOT_NEGATIVE, default=1.0, metavar="P", help="polynomial: its power")
    add("--lr_scheduler_min_lr_ratio", type=FRACTION, default=0.0, metavar="R",
        help="cosine_with_min_lr, warmup_stable_decay: last rate over the peak")
    add("--lr_decay_steps", type=NOT_NEGATIVE, default=0, metavar="N",
        help="warmup_stable_decay: length of the decay, or a share if below 1")
    add("--lr_scheduler_timescale", type=COUNT, metavar="N", help="inverse_sqrt: its time scale (default: the warm-up)")
    add("--lr_step_rules", metavar="RULES",
        help="piecewise_constant: `1:10,0.1:20,0.01` is x1 to step 10, x0.1 to step 20, then x0.01")
    add("--max_grad_norm", type=NOT_NEGATIVE, default=1.0, metavar="NORM",
        help="gradients are scaled down to this norm; 0 leaves them")


def optimizer(text: str) -> str:
    """A type for argparse: a name of OPTIMIZERS; the nearest is named for another."""
    if text in OPTIMIZERS:
        return text
    near = difflib.get_close_matches(text, OPTIMIZERS, n=1, cutoff=0.4)
    raise argparse.ArgumentTypeError(f"there is no optimizer {text}; " + (f"did you mean {near[0]}?" if near else "see --help"))


def keyword(text: str) -> tuple[str, object]:
    """`name=value` -> (name, value): numbers, tuples, True, False, None, inf as Python has them; another word is a string."""
    name, equals, value = (part.strip() for part in text.partition("="))
    words = {"true": True, "false": False, "none": None, "inf": math.inf}
    try:
        if equals and name.isidentifier():
            return name, words[value.lower()] if value.lower() in words else ast.literal_eval(value)
    except (ValueError, SyntaxError):
        if value.isidentifier():
            return name, value
    raise argparse.ArgumentTypeError(f"{text!r} is not like d_coef=2, betas=0.9,0.99 or decouple=True")


def add_optimizer_flags(parser: Parser) -> None:
    group = parser.add_argument_group("optimizer")
    add = group.add_argument
    add("--optimizer", default="adamw", type=optimizer, metavar="NAME",
        help=f"{', '.join(OPTIMIZERS)}; docs/optimizers.md tells which")
    add("--optimizer_args", nargs="+", default=[], type=lambda text: keyword(text) and text, metavar="K=V",
        help="keywords of the optimizer's class, such as d_coef=2 betas=0.9,0.99")
    switch(group, "use_8bit_adam", "the same as --optimizer adamw_8bit")
    add("--optimizer_sharding", default="none", choices=("none", "zero1"),
        help="zero1: each process keeps the optimizer's state of its share of the parameters alone")
    add("--adam_beta1", type=FRACTION, metavar="B", help="decay of the first moment (default: its own, AdamW's is 0.9)")
    add("--adam_beta2", type=FRACTION, metavar="B", help="decay of the second moment (default: its own, AdamW's is 0.999)")
    add("--adam_weight_decay", type=NOT_NEGATIVE, metavar="W", help="weight decay (default: its own, AdamW's is 0.01)")
    add("--adam_epsilon", type=NOT_NEGATIVE, metavar="E", help="added to the denominator (default: its own, AdamW's is 1e-8)")
    switch(group, "allow_tf32", "let NVIDIA GPUs multiply float32 matrices in TF32: faster, 10 bits of mantissa")


def add_ddpm_objective_flags(parser: Parser) -> None:
    group = parser.add_argument_group("objective")
    add = group.add_argument
    add("--prediction_type", choices=("epsilon", "v_prediction"),
        help="what the UNet predicts (default: as the base model)")
    add("--snr_gamma", type=number(float, above=0), metavar="G",
        help="min-SNR loss weighting; the paper's value is 5.0")
    _add_noise_offset(group)
    switch(group, "zero_terminal_snr", "rescale the noise schedule so that its last step is pure noise")
    add("--timestep_bias_strategy", default="none", choices=("earlier", "later", "range", "none"),
        help="which timesteps are drawn more often: the last or first share, or a range")
    add("--timestep_bias_multiplier", type=number(float, above=0), default=1.0, metavar="M", help="how much more often")
    add("--timestep_bias_begin", type=number(int, low=0), default=0, metavar="T", help="range: first timestep")
    add("--timestep_bias_end", type=number(int, low=1), default=1000, metavar="T",
        help="range: the timestep after its last")
    add("--timestep_bias_portion", type=FRACTION, default=0.25, metavar="P",
        help="earlier, later: share of all timesteps")
    _add_average(group)


def add_flow_objective_flags(parser: Parser) -> None:
    group = parser.add_argument_group("objective", "of noise levels: 1 is noise, 0 the image")
    add_flow_flags(group)
    _add_noise_offset(group)
    _add_average(group)


def _add_noise_offset(group) -> None:
    group.add_argument("--noise_offset", type=NOT_NEGATIVE, default=0.0, metavar="S",
                       help="strength of noise that shifts a whole channel")


def _add_average(group) -> None:
    switch(group, "use_ema", "also keep an exponential average of the weights; it is what validation and output use")
    group.add_argument("--ema_decay", type=FRACTION, default=0.9999, metavar="D", help="largest decay of that average")


def add_checkpoint_flags(parser: Parser) -> None:
    group = parser.add_argument_group("checkpoints and output")
    add = group.add_argument
    add("--output_dir", default="sdxl-model-finetuned", metavar="DIR", help="where everything is written")
    add("--checkpointing_steps", type=COUNT, default=500, metavar="N",
        help="optimizer steps between checkpoints to resume from")
    add("--checkpoints_total_limit", type=COUNT, metavar="N", help="keep the newest N of them (default: all)")
    add("--resume_from_checkpoint", metavar="NAME", help="`latest`, a name in OUTPUT_DIR, or the path of a checkpoint")
    add("--output_name", default="last", metavar="NAME", help="name of saved models that are one file or numbered")
    add("--save_every_n_epochs", type=COUNT, metavar="N", help="also save the model, ready to use, every N epochs")
    add("--save_every_n_steps", type=COUNT, metavar="N",
        help="also save the model, ready to use, every N optimizer steps")
    add("--save_model_as", default="diffusers", choices=("diffusers", "safetensors", "ckpt"),
        help="a diffusers folder, or one file that kohya, ComfyUI and A1111 read")
    add("--save_precision", choices=("float", "fp16", "bf16"), help="precision of saved models (default: as trained)")
    switch(group, "push_to_hub", "upload the finished model to the Hugging Face hub")
    add("--hub_model_id", metavar="ID", help="name of the repository there (default: the name of OUTPUT_DIR)")
    add("--hub_token", metavar="TOKEN", help="access token of the hub (default: the one of `hf auth login`)")


def add_runtime_flags(parser: Parser) -> None:
    group = parser.add_argument_group("run")
    add = group.add_argument
    add("--config_file", metavar="FILE", help="flags from a .json, .toml or .env file; the command line goes before it")
    add("--seed", type=number(int, low=0, high=2**63 - 1), metavar="N",
        help="fixes the whole run (default: drawn, and written down)")
    add("--mixed_precision", choices=("no", "fp16", "bf16"),
        help="precision of the forward pass (default: accelerate's)")
    add("--local_rank", type=int, default=-1, metavar="N",
        help="set by torch.distributed.launch; LOCAL_RANK goes before it")
    add("--rank_timeout", type=number(float, low=1), default=120, metavar="SECONDS",
        help="a process without a sign of life for so long ends the run and is named; one that is late is named")
    add("--report_to", default="tensorboard", metavar="NAME", choices=("tensorboard", "wandb", "all", "none"),
        help="tensorboard, wandb, all or none")
    add("--logging_dir", default="logs", metavar="DIR", help="folder of TensorBoard's files, inside OUTPUT_DIR")
    add("--tracker_project_name", default="text2image-fine-tune", metavar="NAME",
        help="name of the project in the trackers")
    add("--logging_steps", type=COUNT, default=10, metavar="N", help="optimizer steps between two lines of the log")
    add("--layer_statistics", type=COUNT, metavar="N",
        help="write what each layer computes at step 1 and every N steps, for tools/compare_runs.py (default: never)")


def check(parser: Parser, args: argparse.Namespace) -> None:
    """Refuse flags that contradict each other, all of them in one sentence."""
    faults = faults_of_data(args) + (faults_of_adapter(args) if hasattr(args, "lora_type") else [])
    faults += faults_of_sd3(args, parser.given) if hasattr(args, "weighting_scheme") else []
    if args.use_8bit_adam and args.optimizer not in ("adamw", "adamw_8bit"):
        faults.append(f"--use_8bit_adam and --optimizer {args.optimizer} exclude each other")
    if args.use_ema and args.optimizer.endswith("schedulefree"):
        faults.append(f"--use_ema and --optimizer {args.optimizer} exclude each other: it averages the weights itself")
    given = [keyword(text)[0] for text in args.optimizer_args]
    faults += [f"--optimizer_args gives {name} twice" for name in dict.fromkeys(given) if given.count(name) > 1]
    for name in ("learning_rate_te1", "learning_rate_te2"):
        if getattr(args, name) is not None and not args.train_text_encoder:
            faults.append(f"--{name} needs --train_text_encoder")
    faults += _faults_of_global_batch(parser, args) + faults_of_validation(args)
    if args.push_to_hub and args.save_model_as != "diffusers":
        faults.append("--push_to_hub needs --save_model_as diffusers")
    if getattr(args, "zero_terminal_snr", False) and args.prediction_type == "epsilon":
        faults.append("--zero_terminal_snr needs --prediction_type v_prediction: at pure noise, epsilon says nothing "
                      "of the image")
    if faults:
        parser.error("; ".join(faults))
    if os.environ.get("RANK", "0") == "0":
        for note in without_effect(parser, args):
            print(f"{parser.prog}: note: {note}", file=sys.stderr)


def _faults_of_global_batch(parser: Parser, args: argparse.Namespace) -> list[str]:
    """Why no accumulation, which `Parser` has derived, makes --global_batch_size on the processes that were launched."""
    if args.global_batch_size is None:
        return []
    if "gradient_accumulation_steps" in parser.given:
        return ["--global_batch_size and --gradient_accumulation_steps exclude each other: one follows from the other"]
    if args.global_batch_size == args.train_batch_size * args.gradient_accumulation_steps * launched():
        return []
    return [f"--global_batch_size {args.global_batch_size} is no multiple of --train_batch_size {args.train_batch_size} x "
            f"{launched()} process{'es' if launched() > 1 else ''}"]


def without_effect(parser: Parser, args: argparse.Namespace) -> list[str]:
    """Sentences on flags that were given a value and change nothing, for want of another flag.

    They are not refused: a config file may well list every flag that there is.
    """
    schedule, bias = args.lr_scheduler, getattr(args, "timestep_bias_strategy", None)
    needs = [    # (flags, whether they are used, why not)
        *idle_data_flags(args), *idle_validation_flags(args), *(idle_adapter_flags(args) if hasattr(args, "lora_type") else []),
        *(idle_sd3_flags(args) if hasattr(args, "weighting_scheme") else []),
        (("ema_decay",), args.use_ema, "without --use_ema"),
        (("sageattention_usage",), args.attention_mechanism == "sageattention", "without --attention_mechanism sageattention"),
        (("hub_model_id", "hub_token"), args.push_to_hub, "without --push_to_hub"),
    ]
    needs += [
        (("timestep_bias_multiplier",), bias != "none", "without --timestep_bias_strategy"),
        (("timestep_bias_portion",), bias in ("earlier", "later"), "without --timestep_bias_strategy earlier or later"),
        (("timestep_bias_begin", "timestep_bias_end"), bias == "range", "without --timestep_bias_strategy range"),
    ] if bias else []
    schedules = {"lr_num_cycles": ("cosine_with_restarts",), "lr_power": ("polynomial",),
                 "lr_step_rules": ("piecewise_constant",), "lr_decay_steps": ("warmup_stable_decay",),
                 "lr_scheduler_timescale": ("inverse_sqrt",),
                 "lr_scheduler_min_lr_ratio": ("cosine_with_min_lr", "warmup_stable_decay")}
    needs += [((name,), schedule in users, f"with --lr_scheduler {schedule}") for name, users in schedules.items()]
    told = [f"--{name} has no effect {why}" for names, used, why in needs if not used
            for name in names if getattr(args, name) != parser.get_default(name)]
    if args.validation_preview and args.validation_prompt and not args.webhook_config:
        told.append("--validation_preview writes files alone; with --webhook_config FILE it posts them, too")
    return told
