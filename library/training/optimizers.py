"""Optimizers by name: one table, and what it takes to check and make them."""

import difflib
import importlib
import importlib.util
import inspect
import os
import shutil
from typing import NamedTuple

import torch

import third_patch
from library import flags
from library.errors import UserError
from library.training import devices, processes
from library.training.accelerator import say
from library.training.lr_schedules import make_lr_schedule  # noqa: F401
from library.training.optimizer_state import evaluated, load_state, share_out  # noqa: F401

PIP = {"bitsandbytes": "bitsandbytes", "dadaptation": "dadaptation", "optimi": "torch-optimi", "torchao": "torchao",
       "pytorch_optimizer": "pytorch-optimizer"}
EVERY = ("cuda", "npu", "xpu", "mps", "cpu")
WHOLE = ("prodigy", "dadapt", "adamw-schedulefree", "radam-schedulefree", "sgd-schedulefree")    # not parameter by parameter
KERNELS = ("cuda", "xpu", "cpu")    # those of bitsandbytes, torch.compile and torch.linalg
PAGED, KAHAN, FREE = "; paged to main memory on CUDA", {"kahan_sum": True}, "needs no schedule: averages its weights as it goes; "


class Entry(NamedTuple):
    """One optimizer."""

    path: str                           # of its class: the package is the library it comes from
    state: float                        # bytes of state a float32 parameter, in large square matrices
    use: str                            # when to choose it
    devices: tuple[str, ...] = EVERY    # "cuda" is ROCm, too
    own: dict = {}                      # keywords that are not the class's own defaults
    bf16: float | None = None           # bytes of state a bfloat16 parameter; None: its rounding is not compensated


TABLE = {
    "adamw": Entry("torch.optim.AdamW", 8, "the default; fused where the device has it"),
    "adamw_fused": Entry("torch.optim.AdamW", 8, "adamw, insisting on the fused kernel", ("cuda", "xpu", "mps", "cpu")),
    "oss": Entry("torch.optim.AdamW", 8, "adamw, its state shared out over processes by fairscale, as Ascend's port has it"),
    "adamw_8bit": Entry("bitsandbytes.optim.AdamW8bit", 2.03, "AdamW in a quarter of the memory", KERNELS),
    "adamw_bf16": Entry("optimi.AdamW", 8, "weights in bfloat16, with Kahan's compensation",
                        own=KAHAN | {"betas": (0.9, 0.999), "eps": 1e-8}, bf16=6),
    "adafactor": Entry("transformers.optimization.Adafactor", 0.02, "next to no memory; no step size of its own",
                       own={"relative_step": False, "scale_parameter": False, "weight_decay": 1e-2}),
    "sgd": Entry("torch.optim.SGD", 4, "with Nesterov's momentum", own={"momentum": 0.9, "nesterov": True}),
    "lion": Entry("pytorch_optimizer.Lion", 4, "half of AdamW's memory; a third to a tenth of its rate"),
    "stableadamw": Entry("pytorch_optimizer.StableAdamW", 8, "AdamW that clips its own updates", bf16=6),
    "flashadamw": Entry("pytorch_optimizer.FlashAdamW", 2.12, "8-bit state in plain torch, for devices without bitsandbytes"),
    "ademamix": Entry("pytorch_optimizer.AdEMAMix", 12, "a second, slow momentum: long runs"),
    "adopt": Entry("pytorch_optimizer.ADOPT", 8, "converges with any beta2"),
    "prodigy": Entry("pytorch_optimizer.Prodigy", 16, "finds its rate: --learning_rate 1"),
    "dadapt-adam": Entry("pytorch_optimizer.DAdaptAdam", 12, "finds its rate: --learning_rate 1"),
    "dadapt-lion": Entry("pytorch_optimizer.DAdaptLion", 8, "finds its rate: --learning_rate 1"),
    "dadapt-sgd": Entry("pytorch_optimizer.DAdaptSGD", 12, "finds its rate: --learning_rate 1"),
    "dadapt-adagrad": Entry("pytorch_optimizer.DAdaptAdaGrad", 12, "finds its rate: --learning_rate 1"),
    "dadapt-adan": Entry("dadaptation.DAdaptAdan", 20, "finds its rate: --learning_rate 1"),    # pytorch-optimizer's is wrong
    "adamw-schedulefree": Entry("pytorch_optimizer.ScheduleFreeAdamW", 8, FREE + "AdamW's rate or up to ten times it"),
    "radam-schedulefree": Entry("pytorch_optimizer.ScheduleFreeRAdam", 8, FREE + "needs no warm-up either"),
    "sgd-schedulefree": Entry("pytorch_optimizer.ScheduleFreeSGD", 4, FREE + "ten to fifty times SGD's rate"),
    "came": Entry("pytorch_optimizer.CAME", 4.02, "factored moments, guided by their confidence"),
    "soap": Entry("pytorch_optimizer.SOAP", 24, "Adam in Shampoo's eigenbasis: fewer steps, much memory", KERNELS),
    "muon": Entry("pytorch_optimizer.Muon", 4, "orthogonal updates of matrices at AdamW's rate; what is not a matrix has AdamW",
                  own={"use_adjusted_lr": True, "weight_decay": 1e-2, "adamw_wd": 1e-2, "adamw_betas": (0.9, 0.999),
                       "adamw_eps": 1e-8}),
    "optimi-adam": Entry("optimi.Adam", 8, "Adam with L2 instead of weight decay", own=KAHAN, bf16=6),
    "optimi-adamw": Entry("optimi.AdamW", 8, "AdamW with beta2 0.99", own=KAHAN, bf16=6),
    "optimi-lion": Entry("optimi.Lion", 4, "Lion for weights in bfloat16", own=KAHAN, bf16=4),
    "optimi-stableadamw": Entry("optimi.StableAdamW", 8, "StableAdamW for weights in bfloat16", own=KAHAN, bf16=6),
    "optimi-adan": Entry("optimi.Adan", 16, "Nesterov's momentum and the change of gradients", own=KAHAN, bf16=10),
    "optimi-ranger": Entry("optimi.Ranger", 12, "RAdam that looks ahead"),
    "optimi-radam": Entry("optimi.RAdam", 8, "AdamW that warms itself up", own=KAHAN, bf16=6),
    "optimi-sgd": Entry("optimi.SGD", 4, "SGD for weights in bfloat16", own=KAHAN | {"momentum": 0.9}, bf16=4),
    "bnb-adam": Entry("bitsandbytes.optim.Adam", 8, "Adam with L2 instead of weight decay", KERNELS),
    "bnb-adam8bit": Entry("bitsandbytes.optim.Adam8bit", 2.03, "the same in 8 bits", KERNELS),
    "bnb-adamw": Entry("bitsandbytes.optim.AdamW", 8, "bitsandbytes' AdamW in 32 bits", KERNELS),
    "bnb-adamw-paged": Entry("bitsandbytes.optim.PagedAdamW", 8, "AdamW" + PAGED, KERNELS),
    "bnb-adamw8bit-paged": Entry("bitsandbytes.optim.PagedAdamW8bit", 2.03, "adamw_8bit" + PAGED, KERNELS),
    "bnb-lion": Entry("bitsandbytes.optim.Lion", 4, "bitsandbytes' Lion in 32 bits", KERNELS),
    "bnb-lion8bit": Entry("bitsandbytes.optim.Lion8bit", 1.02, "Lion in an eighth of AdamW's memory", KERNELS),
    "bnb-lion-paged": Entry("bitsandbytes.optim.PagedLion", 4, "Lion" + PAGED, KERNELS),
    "bnb-lion8bit-paged": Entry("bitsandbytes.optim.PagedLion8bit", 1.02, "bnb-lion8bit" + PAGED, KERNELS),
    "bnb-ademamix": Entry("bitsandbytes.optim.AdEMAMix", 12, "bitsandbytes' AdEMAMix in 32 bits", KERNELS),
    "bnb-ademamix8bit": Entry("bitsandbytes.optim.AdEMAMix8bit", 3.05, "AdEMAMix in a quarter of the memory", KERNELS),
    "bnb-ademamix-paged": Entry("bitsandbytes.optim.PagedAdEMAMix", 12, "AdEMAMix" + PAGED, KERNELS[:2]),
    "bnb-ademamix8bit-paged": Entry("bitsandbytes.optim.PagedAdEMAMix8bit", 3.05, "bnb-ademamix8bit" + PAGED, KERNELS[:2]),
    "bnb-adagrad": Entry("bitsandbytes.optim.Adagrad", 4, "rates that only fall", KERNELS),
    "bnb-adagrad8bit": Entry("bitsandbytes.optim.Adagrad8bit", 1.02, "the same in 8 bits", KERNELS),
    "bnb-sgd": Entry("bitsandbytes.optim.SGD", 4, "SGD with momentum", KERNELS, {"momentum": 0.9}),
    "bnb-sgd8bit": Entry("bitsandbytes.optim.SGD8bit", 1.02, "the same in 8 bits", KERNELS, {"momentum": 0.9}),
    "ao-adamw8bit": Entry("torchao.optim.AdamW8bit", 2.03, "AdamW in 8 bits, compiled: needs a C++ compiler", KERNELS),
    "ao-adamw4bit": Entry("torchao.optim.AdamW4bit", 1.06, "in 4 bits, compiled: coarser", KERNELS),
    "ao-adamwfp8": Entry("torchao.optim.AdamWFp8", 2.03, "in float8, compiled", KERNELS),
    "ao-adamfp8": Entry("torchao.optim.AdamFp8", 2.03, "Adam in float8, compiled", KERNELS),
}

HIDDEN = {"self", "params", "lr", "args", "kwargs", "fused", "optim_bits", "is_paged", "gradient_release", "clip_lambda",
          "maximize", "differentiable", "capturable"}    # keywords that the name says already, or that make no sense here
RENAMED = {"decouple": "weight_decouple", "use_bias_correction": "bias_correction"}    # of prodigyopt and dadaptation


def name_of(args) -> str:
    return "adamw_8bit" if args.use_8bit_adam else args.optimizer


def state_bytes(args, dtype: torch.dtype = torch.float32) -> float:
    """Bytes of optimizer state for each trained parameter of that type."""
    entry = TABLE[name_of(args)]
    return entry.bf16 if dtype == torch.bfloat16 and entry.bf16 else entry.state


def compensates(args) -> bool:
    """Whether weights may be bfloat16: the optimizer keeps what rounding takes from them."""
    return TABLE[name_of(args)].bf16 is not None


def check_optimizer(args, device: str) -> None:
    """Refuse what this machine or the optimizer cannot do, before anything is loaded; say what has no effect.

    The optimizer's library is imported only to judge flags that were given to it. Raises `UserError`.
    """
    name, entry = name_of(args), TABLE[name_of(args)]
    package, typed = entry.path.split(".")[0], "--optimizer " + name + " (--use_8bit_adam)" * args.use_8bit_adam
    if kind := sharding_of(args):
        if kind == "oss" and args.optimizer_sharding != "none":
            say("--optimizer oss: fairscale shares its state out, and --optimizer_sharding has no effect")
        _check_sharding(kind, name)
    if package in PIP and not importlib.util.find_spec(package):
        raise UserError(f"{typed} needs {package}: pip install {PIP[package]}")
    if device not in entry.devices:
        other = {"adamw_fused": "adamw"}.get(name, name[:-6] if device == "cpu" else "adamw, adafactor or flashadamw")
        raise UserError(f"{typed} does not run on {device}, only on {', '.join(entry.devices)}; use {other}")
    if package == "torchao" and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "g++", "clang++"))):
        raise UserError(f"{typed} is compiled when it first runs, and there is no C++ compiler: install g++, or use adamw_8bit")
    if name.endswith("-paged") and device == "cpu":
        say(f"{typed} has nothing to page to on a CPU: it runs as without -paged")
    if name.endswith("schedulefree") and args.lr_scheduler not in ("constant", "constant_with_warmup"):
        say(f"{typed} is meant to run at a constant rate, and --lr_scheduler is {args.lr_scheduler}")
    rates = learning_rates(args, 1)
    if _finds_its_rate(name):
        _check_one_rate(name, rates.values() if args.train_text_encoder else [rates["unet"]])
        if 0 < rates["unet"] < 0.1:
            say(f"{typed} finds its own step size and multiplies it by --learning_rate, which is {rates['unet']:g}: 1 is usual")
    if args.optimizer_args or _flags_given(args):
        _make(args, [{"params": [torch.nn.Parameter(torch.zeros(2, 2))], "lr": 1e-3, "use_muon": True}], None)    # muon wants it
        for flag in _keywords(args)[1]:
            say(f"--{flag} has no effect with {typed}")


def sharding_of(args) -> str | None:
    """How --optimizer oss or --optimizer_sharding share the optimizer's state out: "oss", "zero1", or None."""
    return "oss" if args.optimizer == "oss" else "zero1" if args.optimizer_sharding == "zero1" else None


def _check_sharding(kind: str, name: str) -> None:
    """Refuse what has no parts that step by themselves; say where there is nothing to share."""
    typed, off = {"oss": ("--optimizer oss", "another one"),
                  "zero1": ("--optimizer_sharding zero1", "--optimizer_sharding none")}[kind]
    if name.startswith(WHOLE):
        raise UserError(f"{typed}: {name} looks at all parameters together, so that each process would find its own "
                        f"{'weights' if name.endswith('free') else 'step size'}; use an optimizer like adamw, or {off}")
    if name.startswith("ao-"):
        raise UserError(f"{typed}: {name} is changed at each step in a way that cannot be shared out; use adamw_8bit, or {off}")
    if processes.world() == 1:
        return say(f"{typed}: one process has nobody to share the optimizer's state with, and keeps it all")
    third_patch.apply(oss=kind == "oss")


def learning_rates(args, global_batch: int) -> dict[str, float]:
    """Peak rate of each trained network: its own, or --learning_rate; T5 is trained only at a rate of its own."""
    denoiser = getattr(args, "unet_lr", None)
    own = {"unet": denoiser, "transformer": denoiser, "text_encoder": args.learning_rate_te1,
           "text_encoder_2": args.learning_rate_te2}
    own |= {"text_encoder_3": args.learning_rate_te3 or 0} if hasattr(args, "learning_rate_te3") else {}
    factor = global_batch if args.scale_lr else 1
    return {name: factor * (args.learning_rate if rate is None else rate) for name, rate in own.items()}


def make_optimizer(args, networks: dict[str, torch.nn.Module], global_batch: int, device: str) -> torch.optim.Optimizer:
    """The optimizer of all parameters that want a gradient, one group a network (two with muon). Raises `UserError`."""
    rates = learning_rates(args, global_batch)
    groups = [{"params": [p for p in network.parameters() if p.requires_grad], "lr": rates[name]}
              for name, network in networks.items()]
    tables = {id(module.weight) for network in networks.values() for module in network.modules()
              if isinstance(module, torch.nn.Embedding)}
    return from_groups(args, groups, device, tables)


def from_groups(args, groups: list[dict], device: str, embeddings: set[int] = frozenset()) -> torch.optim.Optimizer:
    """The optimizer of groups {"params": [...], "lr": rate}.

    adafactor is transformers' with the given rate as it is: no relative step, no scaling by the parameters, as kohya
    sets it. embeddings: ids of matrices that muon leaves to AdamW, as their rows are independent.
    Raises `UserError` for weights in half precision whose rounding the optimizer does not compensate.
    """
    name, entry = name_of(args), TABLE[name_of(args)]
    low = {p.dtype for group in groups for p in group["params"]} - {torch.float32, torch.float64}
    if low and (entry.bf16 is None or low != {torch.bfloat16}):
        raise UserError(f"--optimizer {name} would lose most of its steps to the rounding of {', '.join(map(str, low))} weights: "
                        "train float32 ones, or bfloat16 ones with adamw_bf16, stableadamw or an optimi- one but ranger")
    if name == "adamw_bf16" and torch.bfloat16 not in low:
        say("--optimizer adamw_bf16: the trained weights are float32, so that there is no rounding to compensate")
    if _finds_its_rate(name):
        _check_one_rate(name, [group["lr"] for group in groups])
        groups = [group for group in groups if group["lr"]] or groups    # it knows no other rate than the first group's
    if name == "muon":
        groups = [group | {"params": chosen, "use_muon": wanted} for group in groups for wanted in (True, False) if (
            chosen := [p for p in group["params"] if (p.ndim == 2 and id(p) not in embeddings) == wanted])]
    if entry.path == "torch.optim.AdamW":
        groups = [group | {"fused": name == "adamw_fused" or devices.fused_adamw(device)} for group in groups]
    kind = sharding_of(args) if processes.world() > 1 else None
    for p in (p for group in groups for p in group["params"] if kind):    # text encoders are there already, the rest is not
        p.data = p.data.to(device)
    return _make(args, groups, kind)


def _class(entry: Entry) -> type:
    module, name = entry.path.rsplit(".", 1)
    return getattr(importlib.import_module(module), name)


def _finds_its_rate(name: str) -> bool:
    return name.startswith(("prodigy", "dadapt"))


def _check_one_rate(name: str, rates) -> None:
    if len(set(rates) - {0}) > 1:
        raise UserError(f"--optimizer {name} finds one step size for all that is trained, and the learning rates are "
                        f"{', '.join(f'{rate:g}' for rate in rates)}: give one rate, and 0 to what is to stay as it is")


def _flags_given(args) -> list[tuple[str, float, tuple[str, ...]]]:
    """(flag, value, keywords that it sets) of each that goes before an optimizer's own default."""
    known = [("adam_beta1", args.adam_beta1, ("betas", "adamw_betas")), ("adam_beta2", args.adam_beta2, ("betas", "adamw_betas")),
             ("adam_epsilon", args.adam_epsilon, ("eps", "adamw_eps")),    # adamw_: of what muon leaves to AdamW
             ("adam_weight_decay", args.adam_weight_decay, ("weight_decay", "adamw_wd"))]
    return [each for each in known if each[1] is not None]


def _keywords(args) -> tuple[dict, list[str]]:
    """(keywords of the optimizer's class, flags that it has no use for). Raises `UserError`."""
    name, entry = name_of(args), TABLE[name_of(args)]
    taken = inspect.signature(_class(entry)).parameters
    known = {each: entry.own.get(each, taken[each].default) for each in taken if each not in HIDDEN}
    keywords, ignored, from_flags = dict(entry.own), [], set()
    for flag, value, targets in _flags_given(args):
        targets = [each for each in targets if each in known and (each != "eps" or name != "adafactor")]    # its are two others
        for each in targets:
            now, at = keywords.get(each, known[each]), int(flag == "adam_beta2")
            keywords[each] = (*now[:at], value, *now[at + 1:]) if flag.startswith("adam_beta") else value
        from_flags |= set(targets)
        ignored += [] if targets else [flag]
    for text in args.optimizer_args:
        each, value = flags.keyword(text)
        each = RENAMED.get(each, each) if each not in known else each
        if each not in known:
            near = difflib.get_close_matches(each, known, n=1, cutoff=0.4)
            raise UserError(f"--optimizer_args {text}: {name} has no {each}" + (f"; did you mean {near[0]}?" if near else ";")
                            + f" It takes {', '.join(known)}" + ". The rate is --learning_rate" * (each == "lr"))
        if each in from_flags:
            raise UserError(f"--optimizer_args {text} and the flag of the same meaning (--adam_...) exclude each other")
        keywords[each] = value
    return keywords, ignored


def _make(args, groups: list[dict], kind: str | None) -> torch.optim.Optimizer:
    """kind: how it is shared out over processes, as of `sharding_of`."""
    name, entry = name_of(args), TABLE[name_of(args)]
    keywords, own = {"lr": groups[0]["lr"]} | _keywords(args)[0], [dict(group) for group in groups]
    try:
        optimizer = share_out(kind, _class(entry), own, keywords) if kind else _class(entry)(own, **keywords)
    except Exception as error:    # each library has its own
        raise UserError(f"--optimizer {name} {' '.join(args.optimizer_args)}: {error}") from error
    if entry.path.startswith("torchao"):    # its rates must be tensors, but in step() alone: elsewhere they are numbers
        optimizer.register_step_pre_hook(lambda *_: _each_rate(optimizer, torch.tensor))
        optimizer.register_step_post_hook(lambda *_: _each_rate(optimizer, float))
        for group, given in zip(optimizer.param_groups, groups, strict=True):
            group["lr"] = given["lr"]
    return optimizer


def _each_rate(optimizer: torch.optim.Optimizer, change) -> None:
    for group in optimizer.param_groups:
        group["lr"] = change(group["lr"])
