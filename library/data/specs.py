"""What one data set of a run is, whatever it was described in: flags, multidatabackend.json, or kohya's TOML.

Plain values. Every format is read into these; everything after reads nothing else. Standard library only.
"""

from dataclasses import dataclass, field
from pathlib import Path

from library.data.captions import Rules


@dataclass(frozen=True)
class Origin:
    """Where images and captions come from.

    kind: "folder": images in `path` and its subfolders; "shards": tars of images, .json and .txt (webdataset, img2dataset) in
    `path`; "dataset": what the datasets library loads (hub id, folder, parquet, csv, json or arrow file); "urls": a csv
    of addresses, fetched into `downloads`.
    captions: "auto" (metadata.jsonl/.csv, else text files, else file names), "textfile", "filename", "phrase" (`phrases`
    and nothing else), "table" (a parquet, jsonl or csv `table` of file names and captions), "metadata" (kohya's JSON `table`),
    "column" (of the data set, or key of a shard's .json).
    """

    kind: str
    path: str
    captions: str = "auto"
    caption_column: str = "text"
    fallback_column: str | None = None        # where `caption_column` is empty
    extensions: tuple[str, ...] = (".txt", ".caption")    # of text files, in order of preference
    lines: str = "whole"                      # of a text file: "whole" is one caption, "first" line alone, or "each" line one
    phrases: tuple[str, ...] = ()             # "phrase"; or the caption of an image that has no text file (kohya's class tokens)
    table: str | None = None
    name_column: str = "file_name"            # of `table` or of the csv: file name, or address
    names_have_extension: bool = True         # in `table`
    image_column: str = "image"
    config: str | None = None
    split: str = "train"
    revision: str | None = None
    downloads: str | None = None              # where fetched data are kept
    streaming: bool = False
    flag: str = "--train_data_dir"            # what messages name: the flag, or file and key, that this came from


@dataclass(frozen=True)
class Fixed:
    """One size for all, as diffusers' scripts: the short side is resized to it, the rest is cut off."""

    size: tuple[int, int]                     # width, height in pixels
    style: str = "random"                     # of the cut: "random" or "center"


@dataclass(frozen=True)
class Buckets:
    """kohya's buckets: every shape of at most the area of `resolution`, sides in multiples of `step`."""

    resolution: tuple[int, int]
    shortest: int = 256
    longest: int = 1024
    step: int = 64
    no_upscale: bool = False
    style: str = "center"


@dataclass(frozen=True)
class Aspect:
    """SimpleTuner's sizes. `resolution`, `minimum`, `maximum` and `downsample` are in `unit`:

    "pixel" (shorter edge), "area" (megapixels) or "pixel_area" (edge of a square of that area).
    """

    resolution: float
    unit: str = "pixel_area"
    crop: bool = False
    aspect: str = "square"                    # with `crop`: square, preserve, closest, random
    style: str = "random"                     # with `crop`: random, center, corner; without it the few spare pixels go evenly
    choices: tuple[tuple[float, float], ...] = ()    # closest, random: (aspect ratio w/h, weight)
    minimum: float = 0                        # smaller images are left out
    maximum: float | None = None              # with `crop`: larger ones are first resized to `downsample`
    downsample: float | None = None
    max_upscale: float | None = None          # closest, random: enlarge by at most this share
    min_ratio: float | None = None            # w/h below this, or above the next, is left out
    max_ratio: float | None = None
    alignment: int = 64                       # sides are multiples of this
    rounding: int = 2                         # decimals of the aspect ratio that decides the size


@dataclass(frozen=True)
class Spec:
    """One data set: where from, which size, which words, how often, how weighed, how cached."""

    id: str
    origin: Origin
    size: Fixed | Buckets | Aspect
    text: Rules = field(default_factory=Rules)
    flip: bool = False                        # mirror half of the visits
    colour: bool = False                      # shift hue or gamma slightly at a third of the visits (kohya's color_aug)
    rate: float = 1.0                         # how often each image is seen an epoch: repeats x probability
    match: bool = False                       # regularisation: seen, all together, as often as everything else
    weight: float = 1.0                       # of its loss (prior_loss_weight)
    regularisation: bool = False
    keeps_prior: bool = False                 # adapters learn what the model says of it without them (SimpleTuner)
    mask: str | None = None                   # "alpha", or a folder of masks named as the images
    batch_size: int | None = None             # None: --train_batch_size
    max_samples: int | None = None            # a subset, chosen by `id`
    latents: str = "disk"                     # cached before the run; "ondemand": as training meets them; "off": never
    latent_dir: Path | None = None            # None: the run's own cache
    evaluation: bool = False                  # kept out of training
    held_out: tuple[float, int] | None = None    # (share, seed) of images that are kept for evaluation: that set has these, the
                                                 # set that is trained on has the others
    only_known: bool = False                  # trust the last scan: look at no file that it knows
    every_cut_new: bool = False               # no cut is used twice
    interpolation: str | None = None          # None: --image_interpolation_mode

    @property
    def size_style(self) -> str:
        """Where the cut lies: "random", "center", "corner"; a fixed size rounds the middle as torchvision does."""
        if isinstance(self.size, Fixed):
            return "center_half_even" if self.size.style == "center" else self.size.style
        if isinstance(self.size, Aspect) and not self.size.crop:
            return "center"
        return self.size.style


@dataclass(frozen=True)
class Described:
    """All data sets of a run. prompt_dir: where encoded captions are kept (None: the run's own cache)."""

    specs: list[Spec]
    prompt_dir: Path | None = None
    prompts: str = "disk"                     # encoded before the run; "ondemand": as training meets them; "off": never kept
    prompt_batch_size: int | None = None      # captions encoded at once; None: --text_encoder_batch_size
    notes: list[str] = field(default_factory=list)
