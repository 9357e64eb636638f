"""The flags of images drawn while training, and of evaluation sets. Standard library only."""

import argparse

from library import config_files
from library.parser import COUNT, NOT_NEGATIVE, Parser, number, size, switch


def add_validation_flags(parser: Parser) -> None:
    group = parser.add_argument_group("validation")
    add = group.add_argument
    add("--validation_prompt", nargs="+", default=[], metavar="PROMPT", help="draw these prompts while training")
    add("--validation_negative_prompt", metavar="PROMPT", help="what those images should not show")
    add("--num_validation_images", type=COUNT, default=4, metavar="N", help="images a prompt and size")
    add("--validation_epochs", type=COUNT, default=1, metavar="N", help="epochs between two validations")
    add("--validation_steps", type=COUNT, metavar="N",
        help="optimizer steps between two; overrides --validation_epochs")
    add("--validation_resolution", nargs="+", type=size, metavar="SIZE",
        help="sizes of the images (default: --resolution)")
    add("--validation_num_inference_steps", type=COUNT, default=25, metavar="N", help="denoising steps")
    add("--validation_guidance", type=NOT_NEGATIVE, default=5.0, metavar="G", help="classifier-free guidance scale")
    switch(group, "validation_preview", "also decode images while they are drawn, into OUTPUT_DIR/validation/*/previews")
    add("--validation_preview_steps", type=COUNT, default=1, metavar="N", help="denoising steps between two previews")
    add("--validation_preview_model", default="madebyollin/taesdxl", metavar="MODEL",
        help="tiny autoencoder that decodes them: a diffusers folder or a hub id")
    add("--webhook_config", metavar="FILE", help="also post previews to the webhooks (raw or discord) in this .json file")
    add("--eval_steps_interval", type=COUNT, metavar="N",
        help="optimizer steps between two losses on the evaluation sets (default: at the end alone)")
    add("--num_eval_images", type=COUNT, default=4, metavar="N", help="images of each evaluation set")
    add("--eval_timesteps", type=COUNT, default=28, metavar="N", help="timesteps, evenly spread, at which each is looked at")
    add("--validation_seed", type=number(int, low=0, high=2**63 - 1), metavar="N", help="seed of the images (default: --seed)")


def faults_of_validation(args: argparse.Namespace) -> list[str]:
    """A sentence for each fault of the webhooks' file."""
    if not args.webhook_config:
        return []
    return config_files.faults_of_webhooks(args.webhook_config, args.output_dir if args.push_to_hub else None)


def idle_validation_flags(args: argparse.Namespace) -> list[tuple[tuple[str, ...], bool, str]]:
    """(flags, whether they are used, why not): what would change nothing, for want of another flag."""
    shown = ("validation_negative_prompt", "num_validation_images", "validation_epochs", "validation_steps",
             "validation_resolution", "validation_num_inference_steps", "validation_guidance", "validation_seed",
             "validation_preview")
    drawn = args.validation_num_inference_steps
    return [
        (shown, args.validation_prompt, "without --validation_prompt"),
        (("validation_preview_steps", "validation_preview_model", "webhook_config"), args.validation_preview,
         "without --validation_preview"),
        (("validation_preview",), args.validation_preview_steps <= drawn,
         f"as --validation_preview_steps {args.validation_preview_steps} is more than the {drawn} steps of an image"),
    ]
