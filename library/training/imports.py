"""Importing diffusers' models, and PEFT, without the packages they would pull in.

`from diffusers import UNet2DConditionModel` imports bitsandbytes, peft and scipy where installed, and every
transformer that diffusers has: 4 of 9 CPU-seconds before the first step, and 110 MB. Nothing of that is used here.
"""

import contextlib
import importlib.metadata
import importlib.util
import sys
import types
from pathlib import Path

_UNUSED = ("bitsandbytes", "peft", "scipy", "torchao", "optimum", "sklearn", "pandas", "matplotlib")
_deferred: set[str] = set()


@contextlib.contextmanager
def lean():
    """Within this context, optional packages that no script needs from diffusers look absent."""
    if "diffusers" in sys.modules and not _deferred:    # it has looked already: it imports what it found
        yield
        return
    whole = importlib.metadata.packages_distributions
    with alone():
        _defer("diffusers", "models/transformers")
        importlib.metadata.packages_distributions = dict    # it reads what all packages say of themselves: 1.5 s
        try:
            yield
        finally:
            importlib.metadata.packages_distributions = whole


@contextlib.contextmanager
def alone(*wanted: str):
    """Within this context, optional packages look absent, but for the wanted and for what is imported already."""
    hidden = [name for name in _UNUSED if name not in sys.modules and name not in wanted]
    sys.modules.update(dict.fromkeys(hidden))    # None: `import` raises, `find_spec` finds nothing
    _ask_again()
    try:
        yield
    finally:
        for name in hidden:
            sys.modules.pop(name, None)
        _ask_again()


def _ask_again() -> None:
    """transformers and PEFT remember which packages there are; what is hidden changes that."""
    for name in ("transformers.utils.import_utils", "peft.import_utils"):
        answers = sys.modules.get(name)
        for answer in vars(answers).values() if answers else ():
            if hasattr(answer, "cache_clear"):
                answer.cache_clear()


class _Deferred(types.ModuleType):
    """A package whose __init__ runs when a name of it is first asked for; its modules import as ever."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        self.__class__ = types.ModuleType
        self.__spec__.loader.exec_module(self)
        return getattr(self, name)


def _defer(package: str, folder: str) -> None:
    name = ".".join((package, *folder.split("/")))
    if name in sys.modules:
        return
    root = Path(importlib.util.find_spec(package).origin).parent / folder
    spec = importlib.util.spec_from_file_location(name, root / "__init__.py", submodule_search_locations=[str(root)])
    module = _Deferred(name)
    module.__spec__, module.__path__, module.__package__ = spec, [str(root)], name
    module.__file__, module.__loader__ = spec.origin, spec.loader
    sys.modules[name] = module
    _deferred.add(name)
