"""The flags of scripts that train an adapter on a frozen base, and DreamBooth's. Standard library only."""

import argparse

from library.parser import COUNT, Parser, number, switch

PRECISIONS = ("no_change", "int8-quanto", "int4-quanto", "int2-quanto", "fp8-quanto", "int8-torchao", "fp8-torchao", "nf4-bnb")
_BELOW_ONE = number(float, low=0, high=0.99)


def add_adapter_flags(parser: Parser) -> None:
    group = parser.add_argument_group("adapter")
    add = group.add_argument
    add("--lora_type", default="lora", choices=("lora", "loha", "lokr", "oft", "lycoris"), metavar="KIND",
        help="lora, loha, lokr, oft; or lycoris, as --lycoris_config says")
    add("--rank", "--network_dim", "--lora_rank", type=COUNT, metavar="N",
        help="rank of the adapter's matrices (default: 16; with --network_module 4)")
    add("--lora_alpha", "--network_alpha", type=number(float, above=0), metavar="A",
        help="the adapter counts alpha / rank times (default: the rank; with --network_module 1)")
    add("--lora_targets", nargs="+", default=["attention"], metavar="NAME",
        help="modules that get one: attention, attention-ff, kohya, convolutions, all-linear, or names of modules")
    add("--lora_dropout", "--network_dropout", type=_BELOW_ONE, default=0.0, metavar="P", help="dropout of the adapter's input")
    add("--rank_dropout", type=_BELOW_ONE, default=0.0, metavar="P", help="dropout of whole ranks")
    add("--module_dropout", type=_BELOW_ONE, default=0.0, metavar="P", help="dropout of whole modules' adapters")
    add("--conv_rank", type=COUNT, metavar="N", help="rank in 3x3 convolutions, which then have one, too")
    add("--conv_alpha", type=number(float, above=0), metavar="A", help="alpha there (default: --conv_rank)")
    switch(group, "use_dora", "DoRA: train the size of each output beside its direction")
    switch(group, "use_rslora", "rsLoRA: scale by alpha / sqrt(rank)")
    add("--lora_init_type", default="kaiming", choices=("kaiming", "gaussian", "pissa", "olora"), metavar="WAY",
        help="initial values: kaiming, gaussian, pissa, olora")
    add("--lycoris_config", default="config/lycoris_config.json", metavar="FILE", help="of --lora_type lycoris")
    add("--network_module", metavar="NAME", help="kohya: networks.lora or lycoris.kohya")
    add("--network_args", nargs="+", default=[], metavar="KEY=VALUE", help="kohya: conv_dim, block_dims, algo, ...")
    add("--loraplus_lr_ratio", type=number(float, above=0), metavar="R", help="LoRA+: the up matrices learn R times as fast")
    add("--lora_format", default="diffusers", choices=("diffusers", "kohya", "both"),
        help="of the file that is written: diffusers, kohya (ComfyUI, A1111, Forge), or both")
    add("--base_model_precision", default="no_change", choices=PRECISIONS, metavar="KIND", help="of the frozen base: "
        + ", ".join(PRECISIONS))
    for place in (1, 2):
        add(f"--text_encoder_{place}_precision", default="no_change", choices=PRECISIONS, metavar="KIND",
            help=f"of frozen text encoder {place}")
    switch(group, "offload_activations", "keep activations in main memory between forward and backward")


def add_dreambooth_flags(parser: Parser) -> None:
    group = parser.add_argument_group("dreambooth")
    add = group.add_argument
    add("--instance_data_dir", metavar="DIR", help="a few images of one thing, all under --instance_prompt")
    add("--instance_prompt", metavar="PROMPT", help="a prompt with a rare word for it, such as `a photo of sks dog`")
    switch(group, "with_prior_preservation", "also train on images of its class, so that the class stays as it was")
    add("--class_data_dir", metavar="DIR", help="images of the class; missing ones are drawn by the base model")
    add("--class_prompt", metavar="PROMPT", help="a prompt for the class, such as `a photo of a dog`")
    add("--num_class_images", type=COUNT, default=100, metavar="N", help="images of the class that there are to be")


def faults_of_dreambooth(args: argparse.Namespace) -> list[str]:
    """Contradictions among the DreamBooth flags, a sentence each."""
    faults = []
    if args.instance_data_dir and not args.instance_prompt:
        faults.append("--instance_data_dir needs --instance_prompt")
    if args.with_prior_preservation and not (args.class_data_dir and args.class_prompt):
        faults.append("--with_prior_preservation needs --class_data_dir and --class_prompt")
    if (args.class_data_dir or args.class_prompt) and not args.with_prior_preservation:
        faults.append("--class_data_dir and --class_prompt need --with_prior_preservation")
    return faults
