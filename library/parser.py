"""The argument parser of every script, and the types that its flags use. Standard library only."""

import argparse
import difflib
import math
import os
import sys

from library import dialects, errors

SIZE_STEP = 8    # the VAE halves an image three times


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Show `(default: x)`, but stay quiet when there is nothing to show."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=38, width=120)

    def _get_help_string(self, action):
        if action.default is None or action.default is False or action.default in ([], argparse.SUPPRESS):
            return action.help
        return f"{action.help} (default: %(default)s)"


class Parser(argparse.ArgumentParser):
    """An argument parser that reads other trainers' names and config files, and ends on one clear sentence."""

    def __init__(self, description: str):
        # allow_abbrev=False: `--resume` must never silently mean `--resume_from_checkpoint`.
        super().__init__(description=description, usage="%(prog)s [flags]", formatter_class=_HelpFormatter,
                         allow_abbrev=False)

    def parse_args(self, argv=None, namespace=None):
        if argv is None:    # a script begins, and imports torch next
            errors.explain_imports(self.prog)
        argv = sys.argv[1:] if argv is None else list(argv)
        try:
            options = self._option_string_actions
            encoders = 0 if "--network_module" not in options else 3 if "--learning_rate_te3" in options else 2
            argv = dialects.translate(argv, adapters=encoders)
        except dialects.DialectError as error:
            self.error(str(error))
        for token in argv:    # before what is missing: a misspelt flag often is the missing one
            self._check_known(token.partition("=")[0])
        self.given = {token.partition("=")[0][2:] for token in argv}    # flags that were named, if only with their defaults
        args, stray = self.parse_known_args(argv, namespace)
        if stray:
            self.error(f"{' '.join(stray)!r} belongs to no flag; flags begin with --")
        if getattr(args, "global_batch_size", None):
            steps = max(1, args.global_batch_size // (args.train_batch_size * launched()))
            args, _ = self.parse_known_args([*argv, f"--gradient_accumulation_steps={steps}"], namespace)
        return args

    def _check_known(self, name: str) -> None:
        known = [option for action in self._actions for option in action.option_strings]
        if name.startswith("--") and name not in known:
            near = difflib.get_close_matches(name, known + dialects.names(known), n=1, cutoff=0.5)
            self.error(f"there is no flag {name}" + (f"; did you mean {near[0]}?" if near else "; --help lists every flag"))

    def error(self, message: str):
        """Leave with status 2 and one sentence: the usage line of sixty flags would hide it."""
        self.exit(2, f"{self.prog}: error: {message}\n")

    def override_defaults(self, **defaults) -> None:
        """Per-script defaults. Unlike set_defaults, a misspelt flag is an error."""
        unknown = set(defaults) - {action.dest for action in self._actions}
        if unknown:
            raise ValueError(f"no such flag: {', '.join(sorted(unknown))}")
        self.set_defaults(**defaults)


def launched() -> int:
    """How many processes the launcher has started, before they have met."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def number(kind: type, low: float = -math.inf, high: float = math.inf, above: float = -math.inf):
    """A type for argparse: an int or float with low <= value <= high and value > above."""
    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not {'a whole' if kind is int else 'a'} number") from None
        if not (low <= value <= high and value > above and math.isfinite(value)):
            limits = [f"at least {low:g}"] * (low > -math.inf) + [f"more than {above:g}"] * (above > -math.inf)
            limits += [f"at most {high:g}"] * (high < math.inf)
            raise argparse.ArgumentTypeError(f"{text} is out of range: it must be {' and '.join(limits) or 'finite'}")
        return value
    return parse


COUNT = number(int, low=1)            # 1, 2, 3, ...
FRACTION = number(float, low=0, high=1)
NOT_NEGATIVE = number(float, low=0)


def size(text: str) -> tuple[int, int]:
    """`1024`, `1024,768` or `1024x768` -> (width, height) in pixels."""
    try:
        parts = [int(part) for part in text.lower().replace("x", ",").split(",")]
    except ValueError:
        parts = []
    if len(parts) not in (1, 2) or min(parts, default=0) < SIZE_STEP:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write 1024, or width and height as 1024,768")
    width, height = parts[0], parts[-1]
    if width % SIZE_STEP or height % SIZE_STEP:
        raise argparse.ArgumentTypeError(f"{text} must be a multiple of {SIZE_STEP} (the VAE shrinks images by 8)")
    return width, height


def boolean(text: str) -> bool:
    """`true`/`false` in the spellings that config files use."""
    word = text.lower()
    if word in ("true", "1", "yes", "on"):
        return True
    if word in ("false", "0", "no", "off"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")


def switch(group, name: str, help: str, default: bool = False) -> None:
    """`--name`, `--name=true` or `--name=false`."""
    group.add_argument(f"--{name}", nargs="?", const=True, default=default, type=boolean, metavar="true|false", help=help)
