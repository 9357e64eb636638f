"""Which family a model is of, SDXL or SD 3 and 3.5, and where its configs lie: for programs that take either."""

import json
from pathlib import Path

import torch

from library.errors import UserError
from library.models import parts, sd3, sd3_file, sdxl, single_file
from library.models.adapter_files import SD3, SDXL
from library.models.locate import find_model

MODULES = {SDXL: sdxl, SD3: sd3}
PIPELINES = {SDXL: "StableDiffusionXL", SD3: "StableDiffusion3"}    # how diffusers' names for theirs begin


def of_model(name: str, flag: str) -> str:
    """The family of one file, a folder, or a hub id (of which model_index.json alone is fetched). Raises `UserError`."""
    path = find_model(name, flag, ())
    if path.is_file():
        return SD3 if sd3_file.holds_sd3(path) else SDXL
    try:
        kind = str(json.loads((path / "model_index.json").read_text())["_class_name"])
    except (ValueError, LookupError, TypeError) as error:
        raise UserError(f"{flag}: model_index.json in {path} does not say what {name} is: {error}") from error
    except OSError as error:
        if family := next((family for family in MODULES if (path / MODULES[family].PARTS[0]).is_dir()), None):
            return family
        raise UserError(f"{flag}: {name} has no model_index.json that says what it is: {error}") from error
    for family, pipeline in PIPELINES.items():
        if kind.startswith(pipeline):
            return family
    raise UserError(f"{flag}: {name} is a {kind}; there are SDXL, SD 3 and SD 3.5 here")


def find_configs(family: str, config: str | None, *models: Path, wanted: tuple[str, ...] = ()) -> Path:
    """The folder with the configs of these models: the first that is a folder, else --config, else Stability's on the hub.

    wanted: what is to lie there beside configs. Raises `UserError`.
    """
    if folder := next((path for path in models if path.is_dir()), None):
        return folder
    usual = sd3_file.usual_configs(models[0]) if family == SD3 and models else single_file.SDXL_BASE
    return find_model(config or usual, "--config", wanted, loose=("*/config.json",))


def config_of(family: str, configs: Path) -> dict:
    """The config of the UNet or transformer. Raises `UserError`."""
    denoiser = MODULES[family].PARTS[0]
    return parts.config_of(denoiser, configs / denoiser)


def on_meta(family: str, part: str, configs: Path):
    """A network without its weights: what a file must fit. Raises `UserError`."""
    kind = MODULES[family].class_of(part)
    with torch.device("meta"):
        if part in ("unet", "transformer"):
            return kind.from_config(config_of(family, configs))
        try:
            return kind(kind.config_class.from_pretrained(configs / part))
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read the {part}'s config in {configs / part}: {error}") from error
