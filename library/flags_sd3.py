"""The flags of scripts that train SD 3 and 3.5: its three text encoders, flow matching, its guidance. Standard library only."""

import argparse

from library.flags_adapter import PRECISIONS
from library.parser import FRACTION, NOT_NEGATIVE, Parser, number, switch

SCHEMES = ("none", "sigma_sqrt", "logit_normal", "mode", "cosmap")
SIZE_STEP = 16    # the VAE shrinks images by 8, and the transformer takes its latents 2 by 2
_OF_T5 = ("text_encoder_3_precision", "t5_padding", "apply_t5_attn_mask", "t5_dropout_rate", "sd3_t5_uncond_behaviour")
_OF_SKIPPING = ("validation_guidance_skip_layers_start", "validation_guidance_skip_layers_stop", "validation_guidance_skip_scale")


def add_sd3_text_flags(parser: Parser) -> None:
    group = parser.add_argument_group("text encoders", "CLIP ViT-L, CLIP ViT-bigG and T5-XXL")
    add = group.add_argument
    switch(group, "no_t5", "do without T5, in training and in what is saved: its part of the prompt is zeros")
    add("--text_encoder_3_precision", default="no_change", choices=PRECISIONS, metavar="KIND",
        help="of T5: " + ", ".join(PRECISIONS))
    add("--tokenizer_max_length", type=int, choices=(77, 154, 256), default=154, metavar="N",
        help="T5's tokens of a prompt: 77, 154 or 256; longer ones are cut, and the run says so")
    add("--t5_padding", choices=("zero", "unmodified"), default="unmodified", metavar="WAY",
        help="places behind a prompt: unmodified, as T5 makes them, or zero")
    switch(group, "apply_lg_attn_mask", "hide padding from the attention of both CLIPs")
    switch(group, "apply_t5_attn_mask", "hide padding from the attention of T5")
    for name, encoder in (("clip_l", "CLIP ViT-L"), ("clip_g", "CLIP ViT-bigG"), ("t5", "T5")):
        add(f"--{name}_dropout_rate", type=FRACTION, default=0.0, metavar="P",
            help=f"share of visits at which {encoder} hears no prompt, drawn for each encoder by itself")
    for name, encoder in (("clip", "the CLIPs"), ("t5", "T5")):
        add(f"--sd3_{name}_uncond_behaviour", choices=("empty_string", "zero"), default="empty_string", metavar="WAY",
            help=f"what no prompt is to {encoder}: empty_string, the empty prompt encoded, or zero")


def add_flow_flags(group) -> None:
    """group: of the objective. Noise level 1 is noise, 0 the image; u counts the other way."""
    add = group.add_argument
    add("--weighting_scheme", choices=SCHEMES, default="logit_normal", metavar="NAME",
        help="which noise levels are drawn more often (logit_normal, mode) or count more (sigma_sqrt, cosmap); none")
    add("--logit_mean", type=number(float), default=0.0, metavar="M", help="logit_normal: above 0 less noise, below 0 more")
    add("--logit_std", type=NOT_NEGATIVE, default=1.0, metavar="S", help="logit_normal: how widely levels are spread")
    add("--mode_scale", type=number(float, low=-1, high=1.75), default=1.29, metavar="S",
        help="mode: above 0 middle levels more often, below 0 the ends")
    switch(group, "precondition_outputs", "compare images instead of velocities: levels count sigma^2 times. The paper does not")
    add("--flow_schedule_shift", type=number(float, above=0), default=3.0, metavar="S",
        help="moves levels towards noise: s / (1 + (S - 1) s) for S; 1 leaves them")
    switch(group, "flow_schedule_auto_shift", "a larger shift for larger images: 1.65 at 256 x 256, 3.16 at 1024 x 1024")
    switch(group, "flow_use_uniform_schedule", "draw all levels equally often, whatever --weighting_scheme draws")
    switch(group, "flow_use_beta_schedule", "draw u from Beta(2, 2), whatever --weighting_scheme draws")


def add_spike_flags(parser: Parser) -> None:
    group = parser.add_argument_group("loss spikes")
    add = group.add_argument
    add("--spike_guard", choices=("off", "skip", "stop"), default="off", metavar="WAY",
        help="a gradient that is not finite or outlies those before it is not applied: skip goes on, stop saves and ends")
    add("--spike_factor", type=number(float, above=1), default=10.0, metavar="F",
        help="it outlies when its norm is more than F times the median of the last 100")


def add_skip_layer_flags(parser: Parser) -> None:
    group = parser.add_argument_group("skip-layer guidance", "of validation images; for SD 3.5 Medium")
    add = group.add_argument
    add("--validation_guidance_skip_layers", nargs="+", type=number(int, low=0), metavar="N",
        help="blocks of the transformer that are left out: 7 8 9, or [7, 8, 9]")
    add("--validation_guidance_skip_layers_start", type=FRACTION, default=0.01, metavar="P", help="from this share of the steps")
    add("--validation_guidance_skip_layers_stop", type=FRACTION, default=0.2, metavar="P", help="to this share of them")
    add("--validation_guidance_skip_scale", type=NOT_NEGATIVE, default=2.8, metavar="G",
        help="how far away from what the transformer draws without them")


def add_quantize_exclude_flag(parser: Parser) -> None:
    group = parser.add_argument_group("quantisation")
    group.add_argument("--quantize_exclude", nargs="+", default=[], metavar="PATTERN",
                       help="layers that keep their precision, by name: pos_embed* *.norm1.* (* ? [] as in a shell)")


def density(args: argparse.Namespace) -> str:
    """The density of u that the flags ask for: one of `flow.DENSITIES`."""
    if args.flow_use_uniform_schedule or args.flow_use_beta_schedule:
        return "uniform" if args.flow_use_uniform_schedule else "beta"
    return args.weighting_scheme if args.weighting_scheme in ("logit_normal", "mode") else "uniform"


def faults_of_sd3(args: argparse.Namespace, given: set[str]) -> list[str]:
    """Contradictions among the flags of SD3, a sentence each. given: the names of flags that the user wrote."""
    faults = []
    if args.flow_use_uniform_schedule and args.flow_use_beta_schedule:
        faults.append("--flow_use_uniform_schedule and --flow_use_beta_schedule exclude each other")
    scheme, drawn = args.weighting_scheme, density(args)
    if "weighting_scheme" in given and scheme in ("logit_normal", "mode") and drawn != scheme:
        faults.append(f"--weighting_scheme {scheme} and --flow_use_{drawn}_schedule exclude each other: each says which noise "
                      "levels are drawn; leave one out, or give --weighting_scheme none")
    if args.validation_guidance_skip_layers_start >= args.validation_guidance_skip_layers_stop:
        faults.append("--validation_guidance_skip_layers_start must be below --validation_guidance_skip_layers_stop")
    why = f"must be a multiple of {SIZE_STEP}: SD3 takes latents 2 by 2"
    sizes = {"resolution": [args.resolution], "validation_resolution": args.validation_resolution or []}
    odd = [(name, size) for name, values in sizes.items() for size in values if any(side % SIZE_STEP for side in size)]
    faults += [f"--{name} {size[0]},{size[1]} {why}" for name, size in odd]
    steps = {"bucket_reso_steps": args.enable_bucket, "aspect_bucket_alignment": args.data_backend_config}
    faults += [f"--{name} {getattr(args, name)} {why}" for name, used in steps.items()
               if used and getattr(args, name) % SIZE_STEP]
    if not hasattr(args, "lora_type") and args.save_model_as == "ckpt":
        faults.append("--save_model_as ckpt: SD3 is written as a diffusers folder, or as one file with safetensors")
    return faults


def idle_sd3_flags(args: argparse.Namespace) -> list[tuple[tuple[str, ...], bool, str]]:
    """(flags, whether they are used, why not): what would change nothing, for want of another flag or because of one."""
    drawn, steps = density(args), args.validation_num_inference_steps
    start, stop = args.validation_guidance_skip_layers_start, args.validation_guidance_skip_layers_stop
    instead = f"with --flow_use_{drawn}_schedule" if args.flow_use_uniform_schedule or args.flow_use_beta_schedule else None
    skips = args.validation_guidance_skip_layers is not None
    return [
        (("logit_mean", "logit_std"), drawn == "logit_normal", instead or "without --weighting_scheme logit_normal"),
        (("mode_scale",), drawn == "mode", instead or "without --weighting_scheme mode"),
        (("flow_schedule_shift",), not args.flow_schedule_auto_shift, "with --flow_schedule_auto_shift"),
        (("spike_factor",), args.spike_guard != "off", "without --spike_guard"),
        (_OF_T5, not args.no_t5, "with --no_t5"),
        (_OF_SKIPPING, skips, "without --validation_guidance_skip_layers"),
        (("validation_guidance_skip_layers",), bool(args.validation_prompt), "without --validation_prompt"),
        (("validation_guidance_skip_layers",), args.validation_guidance > 1, "without guidance: --validation_guidance above 1"),
        (("validation_guidance_skip_layers",), any(start * steps < step < stop * steps for step in range(steps)),
         f"as none of {steps} steps lies between {start:g} and {stop:g} of them"),
    ]
