"""A network on the disk, in a diffusers folder or a single file, read tensor by tensor: no model need fit in memory."""

import contextlib
import re
from pathlib import Path

import torch
from torch import Tensor, nn

from library.errors import UserError
from library.models import sd3_file, single_file


@contextlib.contextmanager
def open_part(path: Path, part: str, network: nn.Module, config=None):
    """One network of a diffusers folder or single file, left on the disk -> a function: name of a parameter -> tensor.

    Tensors come from a memory map as they are asked for. network: on the meta device, what is to be there: names and shapes.
    config: of the UNet or transformer, for a file. Raises `UserError`, before any is read, for a network of another architecture.
    """
    other = f"{path} is of another architecture than the other model or the configuration:"
    with tensors_of(path, part) as tensors:
        places, left = {}, set(tensors)
        buffers = {name: tensor for name, tensor in network.named_buffers() if name in network.state_dict()}    # SD3's grid
        place_of = _place_in_file(path, part, config) if path.is_file() else lambda name: (name, Tensor.detach)
        for name, parameter in {**dict(network.named_parameters()), **buffers}.items():
            place, change = place_of(name)
            spellings = (place, f"text_model.{place}", place.removeprefix("text_model."))
            if not (place := next((each for each in spellings if each in tensors), None)):
                raise UserError(f"{other} its {part} has no {name}")
            if (shape := change(tensors[place](place)).shape) != parameter.shape:
                raise UserError(f"{other} {part}.{name} is {tuple(shape)} instead of {tuple(parameter.shape)}")
            places[name] = (place, change)
            left.discard(place)
        if unknown := sorted(name for name in left if not name.endswith(single_file.IDLE_TENSORS)):
            raise UserError(f"{other} its {part} also has {unknown[0]}")

        def read(name: str) -> Tensor:
            name = name if name in places else name.removeprefix("text_model.")
            if name not in places:
                raise UserError(f"the adapter was made for another model: the {part} of {path} has no {name}")
            place, change = places[name]
            return change(tensors[place](place))

        yield read


@contextlib.contextmanager
def tensors_of(path: Path, part: str):
    """The tensors of one network in a diffusers folder or single file: name there -> the function that reads it by that name."""
    with contextlib.ExitStack() as stack:
        files = [path] if path.is_file() else sorted((path / part).glob("*.safetensors"))
        tensors = {}
        for file in [file for file in files if file.name.count(".") == 1] or files:    # a variant where there is nothing else
            names, get = stack.enter_context(single_file.reading(file))
            prefix = "" if not path.is_file() else (sd3_file.PREFIXES if sd3_file.holds_sd3(path) else single_file.PARTS)[part]
            tensors |= {name: get for name in names if name.startswith(prefix)}
            if prefix == sd3_file.PREFIXES["text_encoder"] and tensors:    # Stability's layout knows the identity alone
                norm = get(f"{prefix}text_model.final_layer_norm.weight")
                tensors.setdefault(f"{prefix}text_projection.weight", lambda _: torch.eye(len(norm), dtype=norm.dtype))    # noqa: B023
        if not tensors:
            raise UserError(f"{path} has no weights of the {part} as .safetensors")
        yield tensors


def dtype_of(path: Path, part: str) -> torch.dtype:
    """The precision that a network is stored in; float32 where its tensors differ, or it is none that is computed in."""
    with tensors_of(path, part) as tensors:
        dtypes = {dtype for name, get in tensors.items() if (dtype := get(name).dtype).is_floating_point}
    return dtypes.pop() if len(dtypes) == 1 and dtypes < {torch.float32, torch.float16, torch.bfloat16} else torch.float32


def _place_in_file(path: Path, part: str, config):
    """Where a parameter lies in a single file: a function, its name -> that there, and what makes the parameter of it."""
    if sd3_file.holds_sd3(path):
        return lambda name: sd3_file.place_of(part, name, config["num_layers"])
    return lambda name: _sgm_place(part, name, config)


def _sgm_place(part: str, name: str, unet_config):
    def rename(*names):
        return next(iter(single_file.to_sgm({part: {each: torch.empty(0, 0) for each in names}}, unet_config)))
    if part == "text_encoder_2" and (found := re.fullmatch(r"(.+)\.([qkv])_proj\.(\w+)", name)):
        joined = rename(*(f"{found[1]}.{letter}_proj.{found[3]}" for letter in "qkv"))
        return joined, lambda tensor: tensor.chunk(3)["qkv".index(found[2])]
    return rename(name), torch.t if name == "text_projection.weight" else Tensor.detach
