"""The flags of scripts that train an adapter on a frozen base, and DreamBooth's. Standard library only."""

import argparse

from library.parser import COUNT, NOT_NEGATIVE, Parser, number, switch

PRECISIONS = ("no_change", "int8-quanto", "int4-quanto", "int2-quanto", "fp8-quanto", "int8-torchao", "fp8-torchao", "nf4-bnb")
_BELOW_ONE = number(float, low=0, high=0.99)
_ABOVE_ZERO = number(float, above=0)
# what --network_module, --lycoris_config and an adapter that exists say themselves
_OF_A_NEW_ONE = ("lora_targets", "lora_blocks", "conv_rank", "conv_alpha", "lokr_factor", "rank_pattern", "alpha_pattern",
                 "use_dora", "use_rslora", "lora_init_type")
_BLOCK_RATES = ("down_lr_weight", "mid_lr_weight", "up_lr_weight")


def pair(kind):
    """A type for argparse: `mid_block=4` -> ("mid_block", 4), the value as `kind` reads it."""
    def parse(text: str):
        name, equals, value = text.rpartition("=")
        if not equals or not name:
            raise argparse.ArgumentTypeError(f"{text!r} is not like mid_block=4")
        return name, kind(value)
    return parse


def add_adapter_flags(parser: Parser, sd3: bool = False) -> None:
    """sd3: for an SD3 transformer, which has two streams and blocks by number, and no convolutions; else for SDXL's UNet."""
    presets, denoiser = ("attention, attention-ff, kohya, all-linear", "transformer") if sd3 else (
        "attention, attention-ff, kohya, convolutions, all-linear", "UNet")
    group = parser.add_argument_group("adapter")
    add = group.add_argument
    add("--lora_type", default="lora", choices=("lora", "loha", "lokr", "oft", "lycoris"), metavar="KIND",
        help="lora, loha, lokr, oft; or lycoris, as --lycoris_config says")
    add("--rank", "--network_dim", "--lora_rank", type=COUNT, metavar="N",
        help="rank of the adapter's matrices; of oft the size of its blocks (default: 16; with --network_module 4)")
    add("--lora_alpha", "--network_alpha", type=_ABOVE_ZERO, metavar="A",
        help="the adapter counts alpha / rank times (default: the rank; with --network_module 1)")
    add("--lora_targets", "--lora_layers", nargs="+", default=["attention"], metavar="NAME",
        help=f"modules that get one: {presets}, or names of modules")
    add("--lora_dropout", "--network_dropout", type=_BELOW_ONE, default=0.0, metavar="P", help="dropout of the adapter's input")
    add("--rank_dropout", type=_BELOW_ONE, default=0.0, metavar="P", help="dropout of whole ranks")
    add("--module_dropout", type=_BELOW_ONE, default=0.0, metavar="P", help="dropout of whole modules' adapters")
    if sd3:
        add("--lora_blocks", metavar="BLOCKS", help="of the transformer, these blocks alone: 12,13 or 0-5,8")
    else:
        add("--conv_rank", type=COUNT, metavar="N", help="rank in 3x3 convolutions, which then have one, too")
        add("--conv_alpha", type=_ABOVE_ZERO, metavar="A", help="alpha there (default: --conv_rank)")
    add("--rank_pattern", nargs="+", default=[], type=pair(number(int, low=0)), metavar="NAME=N",
        help=f"other ranks by part of a module's name, such as {'ff=4 attn2=32' if sd3 else 'mid_block=4 attn2=32'}; 0 leaves it "
             "out")
    add("--alpha_pattern", nargs="+", default=[], type=pair(_ABOVE_ZERO), metavar="NAME=A", help="other alphas likewise")
    add("--lokr_factor", type=COUNT, metavar="N", help="size of LoKr's first matrix (default: near the square root)")
    switch(group, "use_dora", "DoRA: train the size of each output beside its direction")
    switch(group, "use_rslora", "rsLoRA: scale by alpha / sqrt(rank)")
    add("--lora_init_type", default="kaiming", choices=("kaiming", "gaussian", "pissa", "olora"), metavar="WAY",
        help="initial values: kaiming, gaussian, pissa, olora")
    add("--init_lora", "--network_weights", metavar="FILE",
        help="start from this adapter, in any format; kind, places, ranks and alphas are its own")
    add("--lycoris_config", default="config/lycoris_config.json", metavar="FILE", help="of --lora_type lycoris")
    add("--network_module", metavar="NAME", help=f"kohya: networks.lora{'_sd3' if sd3 else ''} or lycoris.kohya")
    add("--network_args", nargs="+", default=[], metavar="KEY=VALUE",
        help=f"kohya: {'x_attn_dim, train_block_indices' if sd3 else 'conv_dim, block_dims'}, algo and so on")
    add("--unet_lr", type=NOT_NEGATIVE, metavar="LR",
        help=f"rate of the {denoiser}'s adapter (default: --learning_rate; 0 freezes it)")
    add("--loraplus_lr_ratio", type=_ABOVE_ZERO, metavar="R", help="LoRA+: the up matrices learn R times as fast")
    if sd3:
        add("--learning_rate_te3", type=NOT_NEGATIVE, metavar="LR",
            help="also train an adapter of T5, at this rate (default: T5 stays)")
    else:
        add("--down_lr_weight", metavar="RATES",
            help="factors of the rate in SDXL's 9 down blocks: 1,1,0.5 and so on, or cosine, sine, linear, reverse_linear, zeros")
        add("--mid_lr_weight", metavar="RATES", help="of its 3 middle blocks: three numbers")
        add("--up_lr_weight", metavar="RATES", help="of its 9 up blocks, as the first")
    add("--lora_format", choices=("diffusers", "kohya", "both"),
        help=f"of the file: diffusers, kohya ({'ComfyUI' if sd3 else 'ComfyUI, A1111, Forge'}), or both (default: diffusers; "
             "kohya for what it alone holds, with --network_module and with --save_model_as safetensors)")
    switch(group, "no_metadata", "leave the run's flags, which name folders and prompts, out of the file's header")
    add("--base_model_precision", default="no_change", choices=PRECISIONS, metavar="KIND", help="of the frozen base: "
        + ", ".join(PRECISIONS))
    add("--text_encoder_1_precision", default="no_change", choices=PRECISIONS, metavar="KIND", help="of frozen text encoder 1")
    add("--text_encoder_2_precision", default="no_change", choices=PRECISIONS, metavar="KIND", help="of frozen text encoder 2")
    switch(group, "offload_activations", "keep activations in main memory between forward and backward")


def add_dreambooth_flags(parser: Parser) -> None:
    group = parser.add_argument_group("dreambooth")
    add = group.add_argument
    add("--instance_data_dir", metavar="DIR", help="a few images of one thing, all under --instance_prompt")
    add("--instance_prompt", metavar="PROMPT", help="a prompt with a rare word for it, such as `a photo of sks dog`")
    add("--repeats", type=COUNT, default=1, metavar="N", help="how often an epoch shows each of these images")
    switch(group, "with_prior_preservation", "also train on images of its class, so that the class stays as it was")
    add("--class_data_dir", metavar="DIR", help="images of the class; missing ones are drawn by the base model")
    add("--class_prompt", metavar="PROMPT", help="a prompt for the class, such as `a photo of a dog`")
    add("--num_class_images", type=COUNT, default=100, metavar="N", help="images of the class that there are to be")


def faults_of_adapter(args: argparse.Namespace) -> list[str]:
    """Contradictions among the flags of an adapter and of DreamBooth, a sentence each."""
    faults = []
    if args.save_model_as == "ckpt":
        faults.append("--save_model_as ckpt: adapters are written as .safetensors alone")
    if args.network_args and not args.network_module:
        faults.append("--network_args needs --network_module (networks.lora or lycoris.kohya)")
    if args.use_dora and args.lora_type != "lora":
        faults.append(f"--use_dora goes with --lora_type lora, not {args.lora_type}")
    if args.lora_type == "lycoris" and args.network_module:
        faults.append("--lora_type lycoris and --network_module exclude each other: for the second, --network_args say it")
    if args.network_module and (args.loraplus_lr_ratio or any(getattr(args, name, None) for name in _BLOCK_RATES)):
        faults.append("with --network_module, rates go into --network_args: loraplus_lr_ratio=4 and the like")
    rate, te3 = args.learning_rate if args.unet_lr is None else args.unet_lr, getattr(args, "learning_rate_te3", None)
    if rate == 0 and not (args.train_text_encoder and (args.learning_rate_te1 != 0 or args.learning_rate_te2 != 0 or te3)):
        faults.append("--unet_lr 0 leaves nothing to train: give --train_text_encoder, or another rate")
    elif rate == 0 and args.use_ema:
        faults.append("--use_ema averages the adapter of what draws, and --unet_lr 0 freezes it: leave one out")
    if te3 is not None and not args.train_text_encoder:
        faults.append("--learning_rate_te3 needs --train_text_encoder")
    if te3 and args.no_t5:
        faults.append("--learning_rate_te3 and --no_t5 exclude each other")
    if args.instance_data_dir and not args.instance_prompt:
        faults.append("--instance_data_dir needs --instance_prompt")
    if args.instance_prompt and not (args.instance_data_dir or args.dataset_name):
        faults.append("--instance_prompt needs --instance_data_dir (or --dataset_name)")
    if args.with_prior_preservation and not (args.class_data_dir and args.class_prompt):
        faults.append("--with_prior_preservation needs --class_data_dir and --class_prompt")
    if args.with_prior_preservation and not args.instance_prompt:
        faults.append("--with_prior_preservation needs --instance_prompt")
    if (args.class_data_dir or args.class_prompt) and not args.with_prior_preservation:
        faults.append("--class_data_dir and --class_prompt need --with_prior_preservation")
    return faults


def idle_adapter_flags(args: argparse.Namespace) -> list[tuple[tuple[str, ...], bool, str]]:
    """(flags, whether they are used, why not): what would change nothing, for want of another flag or because of one."""
    kohya, lycoris, exists = args.network_module is not None, args.lora_type == "lycoris", args.init_lora is not None
    needs = [
        (("num_class_images",), args.with_prior_preservation, "without --with_prior_preservation"),
        (("repeats",), bool(args.instance_prompt), "without --instance_prompt"),
        (("lycoris_config",), lycoris and not exists, "without --lora_type lycoris"),
        ((*_OF_A_NEW_ONE, "lora_type"), not kohya or exists, "with --network_module, whose --network_args say it"),
        ((*_OF_A_NEW_ONE, "rank", "lora_alpha", "lora_dropout", "rank_dropout", "module_dropout"), not lycoris or exists,
         "with --lora_type lycoris, whose --lycoris_config says it"),
        ((*_OF_A_NEW_ONE, "lora_type", "rank", "lora_alpha"), not exists, "with --init_lora, whose file says it"),
        (("conv_alpha",), getattr(args, "conv_rank", None) is not None, "without --conv_rank"),
        (("lokr_factor",), args.lora_type == "lokr", "without --lora_type lokr"),
        (("quantize_exclude",), args.base_model_precision != "no_change", "without --base_model_precision"),
    ]
    return [(tuple(name for name in names if hasattr(args, name)), used, why) for names, used, why in needs]
