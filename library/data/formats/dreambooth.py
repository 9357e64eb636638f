"""diffusers' DreamBooth flags -> data sets: a few images of one thing under one prompt, and images of its class."""

from dataclasses import replace
from pathlib import Path

from library.data.formats import kohya
from library.data.specs import Described, Origin, Spec
from library.errors import UserError


def read(args) -> Described:
    """--instance_data_dir (or --dataset_name) with --instance_prompt and --repeats, and --class_data_dir with --class_prompt.

    With --with_prior_preservation the class images are seen as often, all together, as the others, and their loss is
    multiplied by --prior_loss_weight. Raises `UserError` for what is missing.
    """
    specs = [replace(_instances(args), rate=float(args.repeats))]
    if args.with_prior_preservation:
        folder = _phrase(args.class_data_dir, args.class_prompt, "--class_data_dir")
        prior = kohya.plain(args, args.class_data_dir, folder)
        specs.append(replace(prior, rate=1.0, regularisation=True, match=True, weight=args.prior_loss_weight, mask=None))
    return Described(specs)


def _instances(args) -> Spec:
    if args.instance_data_dir:
        folder = _phrase(args.instance_data_dir, args.instance_prompt, "--instance_data_dir")
        return kohya.plain(args, args.instance_data_dir, folder)
    origin = Origin("dataset", args.dataset_name, captions="phrase", phrases=(args.instance_prompt,),
                    image_column=args.image_column, config=args.dataset_config_name, downloads=args.cache_dir,
                    flag="--dataset_name")
    return kohya.plain(args, args.dataset_name, origin)


def _phrase(folder: str, prompt: str, flag: str) -> Origin:
    if not Path(folder).is_dir():
        raise UserError(f"{flag}: there is no folder {folder}")
    return Origin("folder", folder, captions="phrase", phrases=(prompt,), flag=flag)
