"""Adapter files: diffusers' and PEFT's keys, kohya's (which ComfyUI, A1111 and Forge read) and LyCORIS', read and written.

In memory an adapter has one form: "unet.mid_block.attentions.0.proj_in" (of SD3 "transformer.transformer_blocks.0.attn.to_q") ->
tensors by kohya's and LyCORIS' names
("lora_down.weight", "lora_up.weight", "alpha", "dora_scale", "hada_w1_a", "lokr_w1", "oft_blocks", ...).
"""

import collections
import dataclasses
import datetime
import hashlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from library.errors import UserError
from library.models import sd3_adapter, single_file
from library.models.adapter_find import DIFFUSERS_NAME
from library.models.adapter_names import PARTS, PARTS_SD3, sgm_names, split, text_name, to_kohya, to_lycoris
from library.models.adapter_settings import SDXL_UNET, Settings, float_of

SETTINGS_KEY = "adapter_settings"    # of our header: the settings, as JSON
_PEFT_HEADER = "lora_adapter_metadata"
_KINDS = {"lora_down.weight": "lora", "hada_w1_a": "loha", "lokr_w1": "lokr", "lokr_w1_a": "lokr", "oft_blocks": "oft",
          "a1.weight": "glora", "diff": "full", "w_norm": "norm"}
_TOGETHER = {"lora_down.weight": ["lora_up.weight"], "lora_up.weight": ["lora_down.weight"], "lokr_w1_a": ["lokr_w1_b"],
             "hada_w1_a": ["hada_w1_b", "hada_w2_a", "hada_w2_b"], "lokr_w2_a": ["lokr_w2_b"],
             "lora_mid.weight": ["lora_down.weight", "lora_up.weight"], "a1.weight": ["a2.weight", "b1.weight", "b2.weight"]}
_TENSORS = """lora_down.weight lora_up.weight lora_mid.weight alpha dora_scale hada_w1_a hada_w1_b hada_w2_a hada_w2_b hada_t1
    hada_t2 lokr_w1 lokr_w1_a lokr_w1_b lokr_w2 lokr_w2_a lokr_w2_b lokr_t2 oft_blocks rescale a1.weight a2.weight b1.weight
    b2.weight bm.weight diff diff_b w_norm b_norm""".split()
_RANKS = {"lora_down.weight": 0, "hada_w1_b": 0, "lokr_w2_b": 0, "lokr_w1_b": 0, "a2.weight": 0, "oft_blocks": -1}
SDXL, SD3 = "SDXL", "SD 3"    # families
_NAMES = {"Flux": r"double_blocks|single_transformer_blocks|single_blocks",
          SD3: r"joint_blocks|^(transformer\.|lora_unet_|lycoris_)transformer_blocks|^lora_transformer_|^lora_te3_",
          "SD 1.x or 2.x": r"^lora_te_|down_blocks[._]0[._]attentions|up_blocks[._]3[._]",
          SDXL: r"^(unet\.|lora_unet_|lycoris_)(input_blocks|middle_block|output_blocks|down_blocks|mid_block|up_blocks)"}
# of a family, for the header: base, kohya's module, architecture, and where its code is
_TOLD = {SDXL: ("sdxl_base_v1-0", "networks.lora", "stable-diffusion-xl-v1-base/lora", "generative-models"),
         SD3: ("sd3", "networks.lora_sd3", "stable-diffusion-3/lora", "sd3.5")}


@dataclass(frozen=True)
class Adapter:
    """An adapter in memory. kind: lora, dora, loha, lokr, oft, or lycoris (what else LyCORIS has, and mixtures).

    modules: as above, each with its "alpha" if it has a rank. metadata: the header. format: "diffusers", "kohya", "lycoris".
    family: SDXL or SD3.
    """

    kind: str
    modules: dict[str, dict[str, Tensor]]
    metadata: dict[str, str] = field(default_factory=dict)
    format: str = ""
    family: str = SDXL

    @property
    def rank(self) -> int:
        """The rank that most modules have, of those that have one; 0 where none has."""
        return _most([rank for tensors in self.modules.values() if (rank := rank_of(tensors))] or [0])

    @property
    def alpha(self) -> float | None:
        """The alpha that most modules have."""
        return _most(float_of(tensors["alpha"]) if "alpha" in tensors else None for tensors in self.modules.values())

    @property
    def multiplier(self) -> float:
        """LyCORIS' multiplier in training: the weight at which the file does what was trained."""
        settings = json.loads(self.metadata.get(SETTINGS_KEY) or "{}")
        return float((settings.get("lycoris_config") or {}).get("multiplier", 1.0))

    def part(self, name: str) -> dict[str, dict[str, Tensor]]:
        """The modules of one network, without its name."""
        return {key.removeprefix(name + "."): own for key, own in self.modules.items() if key.startswith(name + ".")}


def rank_of(tensors: dict[str, Tensor]) -> int:
    """Rank of one module's factors (for OFT the size of its blocks), 0 where it has none."""
    return next((tensors[name].shape[dim] for name, dim in _RANKS.items() if name in tensors), 0)


def _most(values):
    return collections.Counter(values).most_common(1)[0][0]


def kind_of(modules: dict[str, dict[str, Tensor]]) -> str:
    """The kind of adapter that these tensors make."""
    kinds = {next((kind for name, kind in _KINDS.items() if name in tensors), "") for tensors in modules.values()}
    scaled = {"dora_scale" in tensors for tensors in modules.values()}
    if kinds == {"lora"} and all("dora_scale" in own and len(own["dora_scale"]) == len(own["lora_up.weight"])
                                 for own in modules.values()):
        return "dora"
    return kinds.pop() if scaled == {False} and len(kinds) == 1 and kinds < {"lora", "loha", "lokr", "oft"} else "lycoris"


def check_format(kind: str, fmt: str, family: str = SDXL) -> None:
    """Refuse, before training, a format ("diffusers", "kohya", "lycoris" or "both") that cannot hold the kind of adapter."""
    if fmt in ("diffusers", "both") and kind not in ("lora", "dora"):
        readers = "ComfyUI, A1111, Forge and generate.py" if family == SDXL else "ComfyUI and generate.py"
        raise UserError(f"diffusers has no loader for {kind} adapters of {family}: write it with --lora_format kohya, which "
                        f"{readers} read")


def save(path: str | Path, networks: dict[str, nn.Module], settings: Settings, fmt: str, metadata: dict | None = None,
         dtype: torch.dtype | None = None) -> Path:
    """Write the adapter that the networks carry, as `write` does -> its path.

    networks: {"unet": ..., "text_encoder": ...}, or "transformer" for the first, bare. metadata: for the header; what is
    not a str becomes JSON.
    """
    from library.models import adapters  # with PEFT, which takes seconds to import; reading and writing files does without
    header = {key: value if isinstance(value, str) else json.dumps(value, default=str) for key, value in (metadata or {}).items()}
    header[SETTINGS_KEY] = json.dumps(dataclasses.asdict(settings))
    modules = {f"{part}.{name}": own for part, network in networks.items() for name, own in adapters.weights(network).items()}
    modules = {text_name(key): own for key, own in modules.items()}
    config = networks["unet"].config if "unet" in networks else SDXL_UNET
    family = SD3 if "transformer" in networks else SDXL
    return write(path, Adapter(kind_of(modules), modules, header, fmt, family), fmt, config, dtype)


def write(path: str | Path, adapter: Adapter, fmt: str, unet_config=SDXL_UNET, dtype: torch.dtype | None = None) -> Path:
    """Write an adapter to one .safetensors file, whole or not at all -> its path.

    fmt: "diffusers" (LoRA and DoRA), "kohya" (with the names of Stability's blocks; of SD3 `sd3_adapter.to_kohya`'s) or "lycoris"
    (the UNet or transformer alone, LyCORIS' own names). dtype: of the tensors, None keeps theirs; alphas are float32. The header
    has rank and alpha as the format wants them, kohya's ss_*, modelspec.* and `adapter.metadata`. Raises `UserError`.
    """
    check_format(adapter.kind, fmt, adapter.family)
    path, tensors = Path(path), {}
    for prefix, own in _named(adapter, fmt, unet_config).items():
        for name, tensor in own.items():
            kept = torch.float32 if name == "alpha" else dtype
            tensors[f"{prefix}.{name}"] = tensor.detach().to("cpu", kept).contiguous().clone()
    plain = adapter.kind in ("lora", "dora")
    base, module, architecture, code = _TOLD[adapter.family]
    header = {"ss_base_model_version": base, "ss_network_module": module if plain else "lycoris.kohya",
              "ss_network_args": json.dumps({} if plain else {"algo": {"oft": "diag-oft"}.get(adapter.kind, adapter.kind)}),
              "modelspec.sai_model_spec": "1.0.0", "modelspec.architecture": architecture,
              "modelspec.implementation": f"https://github.com/Stability-AI/{code}", "modelspec.title": path.stem,
              "modelspec.date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
              **{name: value for name, value in adapter.metadata.items() if name != _PEFT_HEADER},
              "ss_network_dim": str(adapter.rank), "ss_network_alpha": str(adapter.alpha), "format": "pt"}
    if fmt == "diffusers":
        header[_PEFT_HEADER] = json.dumps(_peft_configs(adapter), indent=2, sort_keys=True)
    header |= _hashes(tensors, {name: value for name, value in header.items() if name.startswith("ss_")})
    single_file.write(path, tensors, header)
    return path


def _named(adapter: Adapter, fmt: str, unet_config) -> dict[str, dict[str, Tensor]]:
    """The name of each module in the file -> its tensors. Raises `UserError`."""
    denoiser = "unet" if adapter.family == SDXL else "transformer"
    others = sorted({part for key in adapter.modules if (part := key.partition(".")[0]) != denoiser})
    if fmt == "lycoris" and others:
        raise UserError(f"LyCORIS' own layout holds the {denoiser} alone, this adapter has a text encoder, too: write it as "
                        "kohya")
    if fmt == "lycoris":
        return {to_lycoris(key): own for key, own in adapter.modules.items()}
    if fmt == "diffusers":
        if "text_encoder_3" in others:
            raise UserError("diffusers has no loader for adapters of SD3's T5: write it with --lora_format kohya")
        return {key: _to_peft(own, key) for key, own in adapter.modules.items()}
    if adapter.family == SD3:
        return sd3_adapter.to_kohya(adapter.modules, fused=adapter.kind in ("lora", "dora"))
    return {to_kohya(key, unet_config): own for key, own in adapter.modules.items()}


def _to_peft(own: dict[str, Tensor], key: str) -> dict[str, Tensor]:
    down, named = own["lora_down.weight"], {"lora_A.weight": own["lora_down.weight"], "lora_B.weight": own["lora_up.weight"]}
    if "dora_scale" in own:    # [out, 1] or [out, 1, 1, 1] with kohya, [out] or [1, out, 1, 1] with PEFT
        scale = own["dora_scale"]
        of_diffusers = key.startswith(("unet.", "transformer."))
        name = "lora_magnitude_vector" + ("" if of_diffusers else ".weight")    # transformers 5 wants it in full
        named[name] = scale.transpose(0, 1) if down.ndim == 4 else scale.reshape(-1)
    if "lora_mid.weight" in own or ("dora_scale" in own and own["dora_scale"].shape[0] != own["lora_up.weight"].shape[0]):
        raise UserError("diffusers has no Tucker factors (lora_mid) and no magnitudes of inputs: write this adapter as kohya")
    return named


def _peft_configs(adapter: Adapter) -> dict:
    """What diffusers hands to LoraConfig: r, lora_alpha, where they differ, and the modules, each with its network's name."""
    configs = {}
    for part in PARTS | PARTS_SD3:
        if own := {name.removeprefix("text_model."): tensors for name, tensors in adapter.part(part).items()}:
            ranks, alphas = {n: rank_of(t) for n, t in own.items()}, {n: float_of(t["alpha"]) for n, t in own.items()}
            r, alpha = _most(ranks.values()), _most(alphas.values())
            config = {"r": r, "lora_alpha": alpha, "target_modules": sorted(own), "use_dora": adapter.kind == "dora",
                      "use_rslora": False, "rank_pattern": {n: each for n, each in ranks.items() if each != r},
                      "alpha_pattern": {n: each for n, each in alphas.items() if each != alpha}}
            configs |= {f"{part}.{name}": value for name, value in config.items()}
    return configs


def _hashes(tensors: dict[str, Tensor], ss: dict[str, str]) -> dict[str, str]:
    """kohya's two: of the tensors as they lie in the file, and A1111's of 64 KiB from the first MiB on."""
    data = safetensors.torch.save(tensors, ss)
    start = 8 + int.from_bytes(data[:8], "little")
    return {"sshs_model_hash": hashlib.sha256(memoryview(data)[start:]).hexdigest(),
            "sshs_legacy_hash": hashlib.sha256(data[0x100000:0x110000]).hexdigest()[:8]}


def family_of(config) -> str:
    """The family of a UNet or transformer, by its config."""
    return SD3 if "joint_attention_dim" in config else SDXL


def read(path: str | Path, config=None) -> Adapter:
    """Read an adapter in any of the formats; a folder is diffusers'.

    config: of the UNet or transformer that it is for; None: of SDXL's own or of any SD3, as the adapter tells. Raises
    `UserError`: no such file, a damaged one, an adapter of another family, tensors whose place is not known.
    """
    path = Path(path) / DIFFUSERS_NAME if Path(path).is_dir() else Path(path)
    if path.suffix != ".safetensors":
        raise UserError(f"{path} is not a .safetensors file: other files may run code when read; convert it first")
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata, raw = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"cannot read the adapter {path}: {error}") from error
    family = family_of(config) if config else _family_told(raw, metadata)
    _refuse_others(path, raw, family, family if config else f"{SDXL} or {SD3}")
    modules, unknown = collections.defaultdict(dict), []
    names, parts = (sgm_names(config or SDXL_UNET), PARTS) if family == SDXL else ({}, PARTS_SD3)
    for name, tensor in raw.items():
        found = split(name, names, parts)
        if found is None or found[1] not in _TENSORS:
            unknown.append(name)
        else:
            modules[found[0]][found[1]] = tensor
    if unknown or not modules:
        raise UserError(f"{path} is not an adapter of {family} of a known kind: {len(unknown)} of {len(raw)} tensors have no "
                        f"known place{', first ' + unknown[0] if unknown else ''}")
    _refuse_damaged(path, modules, metadata)
    first = next(iter(raw))
    fmt = "lycoris" if first.startswith("lycoris_") else "kohya" if first.startswith("lora_") else "diffusers"
    _complete(modules, json.loads(metadata.get(_PEFT_HEADER) or "{}"), fmt)
    if family == SD3:
        modules = sd3_adapter.to_diffusers(modules)
    return Adapter(kind_of(modules), dict(modules), metadata, fmt, family)


def _refuse_damaged(path: Path, modules: dict[str, dict[str, Tensor]], metadata: dict[str, str]) -> None:
    for name in (_PEFT_HEADER, SETTINGS_KEY):
        try:
            whole = isinstance(json.loads(metadata.get(name) or "{}"), dict)
        except ValueError:
            whole = False
        if not whole:
            raise UserError(f"{path} is damaged: {name} in its header is not a JSON object; copy it again")
    for key, own in modules.items():
        lacking = [name for has, needs in _TOGETHER.items() if has in own for name in needs if name not in own]
        lacking += [f"lokr_w{n}" for n in "12" if any(name.startswith("lokr_") for name in own)
                    and not any(name.startswith(f"lokr_w{n}") for name in own)]
        if lacking or not any(name in _KINDS for name in own):
            raise UserError(f"{path} is not whole: {key} has {', '.join(own)} and no {lacking[0] if lacking else 'weights'}; "
                            "copy it again, or make it anew")
        if "lora_up.weight" in own and "lora_mid.weight" not in own and (
                (up := own["lora_up.weight"].shape[1]) != (down := len(own["lora_down.weight"]))):
            raise UserError(f"{path} is damaged: of {key}, lora_down is of rank {down} and lora_up of rank {up}")


def _family_told(raw: dict[str, Tensor], metadata: dict[str, str]) -> str:
    """By the names; by the header where there are text encoders alone, which both families have."""
    by_name = (family for family in (SD3, SDXL) if any(re.search(_NAMES[family], name) for name in raw))
    return next(by_name, SD3 if metadata.get("ss_base_model_version", "").startswith("sd3") else SDXL)


def _refuse_others(path: Path, raw: dict[str, Tensor], own: str, wanted: str) -> None:
    for family, pattern in _NAMES.items():
        if family != own and (found := next((name for name in raw if re.search(pattern, name)), None)):
            raise UserError(f"{path} is an adapter of {family}, not of {wanted} (it has {found}): name one that was made for "
                            f"{wanted}")
    for name, tensor in raw.items() if own == SDXL else ():
        if re.search(r"attn2[._]to_k\.(lora_down|lora_A)", name) and tensor.shape[1] in (768, 1024):
            family = "SD 1.x" if tensor.shape[1] == 768 else "SD 2.x"
            raise UserError(f"{path} is an adapter of {family}, not of SDXL ({name} reads text of width {tensor.shape[1]}, not "
                            "2048): name one that was made for SDXL")


def _complete(modules: dict[str, dict[str, Tensor]], configs: dict, fmt: str) -> None:
    """An alpha for every module with a rank: its own, the header's, or the rank; DoRA's scales in kohya's shape."""
    for key, own in modules.items():
        part, _, module = key.partition(".")
        if fmt == "diffusers" and "dora_scale" in own:
            scale = own["dora_scale"]
            own["dora_scale"] = scale.transpose(0, 1) if own["lora_down.weight"].ndim == 4 else scale.reshape(-1, 1)
        if "alpha" not in own and (rank := rank_of(own)):
            config = {name: configs.get(f"{part}.{name}") for name in ("alpha_pattern", "lora_alpha", "use_rslora")}
            name, patterns = module.removeprefix("text_model."), config["alpha_pattern"] or {}
            fits = (a for pattern, a in patterns.items() if re.match(rf"(.*\.)?({pattern})$", name))
            alpha = patterns.get(name) or next(fits, None) or config["lora_alpha"] or rank
            own["alpha"] = torch.tensor(float(alpha) * (rank**0.5 if config["use_rslora"] else 1))
