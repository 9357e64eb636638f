"""What other packages lack for this project, put right in this process: their files stay as they are.

A module is one package's. `apply()` is called where what they lack is about to be needed, and only there. Each patch names the
release that it was made for, refuses another, and has a test that fails without it.
"""

from importlib.metadata import PackageNotFoundError, version

from library.errors import UserError


def apply(oss: bool = False) -> list[str]:
    """Apply what an optimizer that is shared out over processes needs -> what was changed now; again, it changes nothing.

    oss: whether it is fairscale's. Raises `UserError` for a release that the patches were not made for.
    """
    from third_patch import accelerate, fairscale
    return accelerate.apply() + (fairscale.apply() if oss else [])


def demand(package: str, release: str, flag: str) -> None:
    """Refuse another release of `package` than one that begins with these numbers ("1.15.0"). Raises `UserError`."""
    try:
        found = version(package)
    except PackageNotFoundError:
        raise UserError(f"{flag} needs {package}: pip install -r requirements-npu.txt") from None
    if found != release and not found.startswith(release.rpartition(".")[0] + "."):
        raise UserError(f"{flag} is made for {package} {release}, and {found} is installed: pip install '{package}~={release}', "
                        "or leave the flag out")
