"""The flags that say which images and captions a run sees, and how they are kept. Standard library only."""

import argparse

from library.parser import COUNT, FRACTION, NOT_NEGATIVE, SIZE_STEP, Parser, number, size, switch

CAPTION_FLAGS = ("shuffle_caption", "keep_tokens", "keep_tokens_separator", "caption_separator", "secondary_separator",
                 "enable_wildcard", "caption_prefix", "caption_suffix", "caption_dropout_every_n_epochs",
                 "caption_tag_dropout_rate", "token_warmup_min", "token_warmup_step")
BACKEND_FLAGS = ("resolution_type", "caption_strategy", "minimum_image_size", "maximum_image_size", "target_downsample_size",
                 "aspect_bucket_alignment", "aspect_bucket_rounding")
BUCKET_FLAGS = ("min_bucket_reso", "max_bucket_reso", "bucket_reso_steps", "bucket_no_upscale")


def add_data_flags(parser: Parser) -> None:
    _add_places(parser.add_argument_group("data", "where images and captions come from"))
    _add_sizes(parser.add_argument_group("size and cut"))
    _add_captions(parser.add_argument_group("captions"))
    _add_weights(parser.add_argument_group("masks and regularisation"))


def _add_places(group) -> None:
    add = group.add_argument
    add("--train_data_dir", metavar="DIR", help="folder of images; captions from .txt/.caption files beside them, "
        "metadata.jsonl/.csv, or else the file names. Or a folder of .tar shards; or of folders 10_name (DreamBooth)")
    add("--dataset_name", metavar="NAME",
        help="data set for the datasets library: a hub id, a local folder or a parquet file")
    add("--data_backend_config", metavar="FILE", help="one or many data sets: SimpleTuner's multidatabackend.json")
    add("--dataset_config", metavar="FILE", help="one or many data sets: kohya's .toml or .json")
    add("--dataset_config_name", metavar="NAME", help="config of the data set of --dataset_name")
    switch(group, "streaming", "read --dataset_name forwards only and keep no copy of it on this machine")
    add("--cache_dir", metavar="DIR", help="where the datasets library keeps its downloads")
    add("--image_column", default="image", metavar="NAME", help="column that holds the image")
    add("--caption_column", default="text", metavar="NAME",
        help="column that holds the caption, or a list of captions of which each visit takes one")
    add("--caption_extension", metavar="EXT", help="extension of the caption files (default: .txt, then .caption)")
    add("--in_json", metavar="FILE", help="captions and tags of --train_data_dir: kohya's metadata .json or .jsonl")
    add("--reg_data_dir", metavar="DIR", help="regularisation images, in folders 1_name as kohya's: seen as often, "
        "all together, as the images of --train_data_dir")
    add("--dataset_repeats", type=COUNT, default=1, metavar="N",
        help="how often an epoch shows each image, where the data set does not say it itself")
    add("--max_train_samples", type=COUNT, metavar="N", help="use N images, chosen at random by the seed")
    switch(group, "skip_bad_images", "leave out images that cannot be read (and say how many) instead of stopping")
    add("--dataloader_num_workers", type=number(int, low=0), default=0, metavar="N",
        help="threads that prepare batches ahead; 0 prepares the next one while the device computes")
    add("--caption_strategy", choices=("filename", "textfile", "instanceprompt", "parquet", "csv", "huggingface"), metavar="WAY",
        help="of sets in --data_backend_config that do not say it: filename, textfile, instanceprompt, parquet, csv, huggingface")


def _add_sizes(group) -> None:
    add = group.add_argument
    add("--resolution", type=size, default="1024", metavar="SIZE",
        help="size of the training images: 1024, or 1024,768")
    switch(group, "center_crop", "cut the middle out of the resized image; without it the place is random")
    switch(group, "random_crop", "with buckets: cut at a random place instead of the middle")
    switch(group, "random_flip", "mirror images at random, half of the visits")
    switch(group, "color_aug", "shift hue or gamma a little at random, a third of the visits")
    add("--image_interpolation_mode", default="lanczos", choices=("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"),
        metavar="MODE", help="how images are resized: nearest, bilinear, bicubic, box, hamming, lanczos")
    switch(group, "enable_bucket", "sort images into buckets of different aspect ratio instead of cutting them square")
    add("--min_bucket_reso", type=COUNT, default=256, metavar="PX", help="shortest side of a bucket")
    add("--max_bucket_reso", type=COUNT, default=1024, metavar="PX", help="longest side of a bucket")
    add("--bucket_reso_steps", type=number(int, low=SIZE_STEP), default=64, metavar="PX",
        help="buckets' sides are multiples of this")
    switch(group, "bucket_no_upscale", "never enlarge: small images get a bucket of their own size")
    for name, help in (("minimum_image_size", "leave out smaller images"), ("maximum_image_size", "cropped images larger than "
                       "this are first made smaller"), ("target_downsample_size", "... to this")):
        add(f"--{name}", type=NOT_NEGATIVE, metavar="SIZE", help=f"{help}; for sets in --data_backend_config that do not say it")
    add("--resolution_type", default="pixel_area", choices=("pixel", "area", "pixel_area"), metavar="UNIT",
        help="of sizes in --data_backend_config: pixel (shorter edge), area (megapixels), pixel_area (edge of a square)")
    add("--aspect_bucket_alignment", type=int, choices=(8, 16, 24, 32, 64), default=64, metavar="PX",
        help="sides in --data_backend_config are multiples of this: 8, 16, 24, 32 or 64")
    add("--aspect_bucket_rounding", type=number(int, low=1, high=9), default=2, metavar="N",
        help="decimals of the aspect ratio that decides the size there")


def _add_captions(group) -> None:
    add = group.add_argument
    switch(group, "shuffle_caption", "shuffle the comma-separated tags of a caption")
    add("--keep_tokens", type=number(int, low=0), default=0, metavar="N",
        help="first N tags stay in place when shuffled")
    add("--keep_tokens_separator", default="", metavar="TEXT",
        help="tags before this stay in place instead (and those behind a second one), such as |||")
    add("--caption_separator", default=",", metavar="TEXT", help="what stands between tags")
    add("--secondary_separator", metavar="TEXT", help="what stands between tags that move together; shown as a separator")
    switch(group, "enable_wildcard", "{red|green} in a caption chooses one; of a caption file with many lines, one is taken")
    add("--caption_prefix", default="", metavar="TEXT", help="stands before every caption, dropped ones too")
    add("--caption_suffix", default="", metavar="TEXT", help="stands after every caption, dropped ones too")
    add("--proportion_empty_prompts", type=FRACTION, default=0.0, metavar="P",
        help="share of captions replaced by the empty prompt, drawn anew at each visit")
    add("--caption_dropout_every_n_epochs", type=number(int, low=0), default=0, metavar="N",
        help="drop all captions in every Nth epoch")
    add("--caption_tag_dropout_rate", type=FRACTION, default=0.0, metavar="P",
        help="share of tags left out, drawn anew for each order of tags")
    add("--token_warmup_min", type=COUNT, default=1, metavar="N", help="tags shown at first of those that may move")
    add("--token_warmup_step", type=NOT_NEGATIVE, default=0.0, metavar="N",
        help="optimizer steps until all tags are shown, or a share of the run if below 1 (captions are then not cached)")


def _add_weights(group) -> None:
    add = group.add_argument
    add("--conditioning_data_dir", metavar="DIR", help="masks, named as the images: white is learned, black is not")
    switch(group, "alpha_mask", "the images' own transparency is the mask")
    switch(group, "masked_loss", "insist on masks: without any, the run stops")
    add("--masked_loss_area", default="image", choices=("image", "mask"), metavar="AREA",
        help="a masked loss is averaged over the whole image, or over the mask alone")
    add("--prior_loss_weight", type=NOT_NEGATIVE, default=1.0, metavar="W", help="weight of the loss of regularisation images")


def add_cache_flags(parser: Parser) -> None:
    group = parser.add_argument_group("embedding cache")
    add = group.add_argument
    switch(group, "cache_latents", "encode images once and keep the latents on disk", default=True)
    switch(group, "vae_cache_ondemand", "... not before the run, but as training meets them")
    switch(group, "vae_cache_disable", "encode images at every visit and write no latents, the same as --cache_latents=false")
    switch(group, "cache_text_encoder_outputs", "encode captions once and keep the result on disk", default=True)
    switch(group, "cache_only", "make the caches and stop")
    add("--embedding_cache_dir", metavar="DIR", help="where both are kept (default: OUTPUT_DIR/cache)")
    add("--cache_variants", type=COUNT, default=4, metavar="N",
        help="different random crops (and tag orders) kept of each image; visits take them in turn")
    add("--vae_batch_size", type=COUNT, default=4, metavar="N", help="images encoded at once")
    add("--text_encoder_batch_size", type=COUNT, default=16, metavar="N", help="captions encoded at once")


def faults_of_data(args: argparse.Namespace) -> list[str]:
    """Contradictions among the data flags, a sentence each."""
    faults = []
    ways = {"train_data_dir": args.train_data_dir, "dataset_name": args.dataset_name, "data_backend_config":
            args.data_backend_config, "dataset_config": args.dataset_config}
    if hasattr(args, "instance_data_dir"):    # of scripts that have DreamBooth's flags
        ways["instance_data_dir"] = args.instance_data_dir
    if len(ways) - list(ways.values()).count(None) != 1:
        faults.append(f"give one of {', '.join(f'--{way}' for way in ways)}")
    needs = [("random_crop", "enable_bucket"), ("bucket_no_upscale", "enable_bucket"), ("in_json", "train_data_dir"),
             ("reg_data_dir", "train_data_dir"), ("streaming", "dataset_name")]
    several = args.data_backend_config or args.dataset_config    # there, each set has its own
    faults += [f"--{name} needs --{partner}" for name, partner in needs
               if getattr(args, name) and not getattr(args, partner) and not several]
    moving = args.shuffle_caption or args.caption_tag_dropout_rate or args.token_warmup_step
    faults += [f"--{name} needs --shuffle_caption, --caption_tag_dropout_rate or --token_warmup_step"
               for name in ("keep_tokens", "keep_tokens_separator") if getattr(args, name) and not moving and not several]
    pairs = [("center_crop", "random_crop"), ("vae_cache_ondemand", "vae_cache_disable"), ("alpha_mask", "conditioning_data_dir")]
    faults += [f"--{one} and --{other} exclude each other" for one, other in pairs if getattr(args, one) and getattr(args, other)]
    if args.vae_cache_ondemand and not args.cache_latents:
        faults.append("--vae_cache_ondemand writes a cache and --cache_latents=false forbids it")
    if args.streaming and (args.vae_cache_ondemand or args.vae_cache_disable or not args.cache_latents):
        faults.append("--streaming needs the latents cached before the run: its images can only be read in their order")
    if args.cache_only and not (args.cache_latents and args.cache_text_encoder_outputs):
        faults.append("--cache_only has nothing to do without --cache_latents and --cache_text_encoder_outputs")
    if args.enable_bucket and args.bucket_reso_steps % SIZE_STEP:
        faults.append(f"--bucket_reso_steps {args.bucket_reso_steps} must be a multiple of {SIZE_STEP}")
    return faults


def idle_data_flags(args: argparse.Namespace) -> list[tuple[tuple[str, ...], bool, str]]:
    """(flags, whether they are used, why not): what would change nothing, for want of another flag."""
    backend, config = args.data_backend_config is not None, args.dataset_config is not None
    columns = ("image_column", "dataset_config_name", "cache_dir")
    return [
        (BUCKET_FLAGS, args.enable_bucket or config or backend, "without --enable_bucket"),
        (("center_crop",), not args.enable_bucket, "with --enable_bucket, which cuts the middle out by itself"),
        (BACKEND_FLAGS, backend, "without --data_backend_config"),
        (("enable_bucket", "center_crop", "random_crop", *BUCKET_FLAGS, *CAPTION_FLAGS, "in_json", "reg_data_dir", "alpha_mask",
          "conditioning_data_dir", "dataset_repeats", "caption_column", "caption_extension"), not backend,
         "with --data_backend_config, whose sets say it themselves"),
        (("in_json", "reg_data_dir"), not config, "with --dataset_config, whose sets say it themselves"),
        (("eval_steps_interval", "num_eval_images", "eval_timesteps"), backend or config, "without evaluation sets"),
        (columns, args.dataset_name is not None, "without --dataset_name"),
        (("token_warmup_min",), args.token_warmup_step > 0, "without --token_warmup_step"),
        (("cache_variants",), args.cache_latents or args.cache_text_encoder_outputs, "without a cache"),
    ]
