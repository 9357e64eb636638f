"""Config files of this and other trainers -> command lines. Standard library only."""

import json
import re
import shlex
from pathlib import Path

# SimpleTuner's config.env: names that are not merely those of flags in capitals
OF_ENV = {"model_name": "pretrained_model_name_or_path", "dataloader_config": "data_backend_config", "training_seed": "seed",
          "max_num_steps": "max_train_steps", "num_epochs": "num_train_epochs", "checkpointing_limit": "checkpoints_total_limit",
          "use_xformers": "enable_xformers_memory_efficient_attention", "hub_model_name": "hub_model_id",
          "lr_schedule": "lr_scheduler", "minimum_resolution": "minimum_image_size"}
_FOLDER = "BASE_DIR"    # no flag, but a part of other values
_EXTRA = "trainer_extra_args"    # free text there: flags, as typed


class DialectError(ValueError):
    """A config file that cannot be read, or a value that has no meaning here."""


def read(path: Path, switches) -> list[str]:
    """A flat or sectioned .json or .toml file, or an .env -> a command line. Keys are flags, with or without dashes.

    kohya's files put flags in sections of any name; sections are opened up. true and false set switches, null leaves the
    default, a list gives several values. In capitals, as SimpleTuner's config.env has them, keys are the same.
    switches: names of flags that take no value. Raises `DialectError`.
    """
    kind = path.suffix.lower()
    if kind not in (".json", ".toml", ".env"):
        raise DialectError(f"--config_file: {path} is neither .json nor .toml nor .env")
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if kind == ".json" else _toml(text) if kind == ".toml" else _env(text)
    except OSError as error:
        raise DialectError(f"--config_file: cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise DialectError(f"--config_file: {path} is not valid {kind[1:].upper()}: {error}") from None
    if not isinstance(content, dict):
        raise DialectError(f"--config_file: {path} must hold one object of flags and values")
    return [token for key, value in _flatten(content) for token in _tokens(key, value, switches)]


def read_prompts(path: Path) -> dict[str, str]:
    """SimpleTuner's user_prompt_library: {short name: prompt} in a .json file. Raises `DialectError`."""
    try:
        prompts = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DialectError(f"--user_prompt_library: cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise DialectError(f"--user_prompt_library: {path} is not valid JSON: {error}") from None
    if not isinstance(prompts, dict) or not all(isinstance(prompt, str) for prompt in prompts.values()):
        raise DialectError(f'--user_prompt_library: {path} must hold one object, such as {{"cat": "a cat at dusk"}}')
    if wrong := [name for name, prompt in prompts.items() if prompt.startswith("--")]:
        raise DialectError(f"--user_prompt_library: {path}: {wrong[0]} looks like a flag: {prompts[wrong[0]]!r}")
    return prompts


def _toml(text: str) -> dict:
    try:
        import tomllib
    except ModuleNotFoundError:    # Python 3.10
        import tomli as tomllib
    return tomllib.loads(text)


def _env(text: str) -> dict:
    """`export NAME="value"`, NAME+=value and $NAME of what stands before, as a shell reads them. Raises ValueError."""
    values = {}
    for number, line in enumerate(text.splitlines(), 1):
        words = [word for word in shlex.split(line, comments=True) if word != "export"]
        if not words:
            continue
        name, equals, value = words[0].partition("=")
        if "$(" in value or "`" in value:
            raise ValueError(f"line {number}: commands are not run: {line.strip()!r}")
        if not equals or len(words) > 1 or not name.removesuffix("+").isidentifier():
            raise ValueError(f'line {number}: {line.strip()!r} is not like NAME="value"')
        value = re.sub(r"\$\{(\w+)\}|\$(\w+)", lambda found: values.get(found[1] or found[2], ""), value)
        plain = name.removesuffix("+")
        values[plain] = values.get(plain, "") + value if name.endswith("+") else value
    flags = {OF_ENV.get(name.lower(), name.lower()): value for name, value in values.items() if value and name != _FOLDER}
    extra = {_EXTRA: shlex.split(flags.pop(_EXTRA))} if _EXTRA in flags else {}
    return flags | extra


def _flatten(content: dict):
    for key, value in content.items():
        if isinstance(value, dict):
            yield from _flatten(value)
        else:
            key = key.lstrip("-")
            yield key.lower() if key.isupper() else key, value


def _tokens(key: str, value, switches) -> list[str]:
    if value is None:
        return []
    if key == _EXTRA:
        return value if isinstance(value, list) else shlex.split(value)
    if key in switches and str(value).lower() in ("true", "false"):
        value = str(value).lower() == "true"
    if value is True and key in switches:
        return [f"--{key}"]
    if value is False and key in switches:
        return []
    if isinstance(value, bool):
        return [f"--{key}={str(value).lower()}"]
    if isinstance(value, list):
        return [f"--{key}", *map(str, value)]
    return [f"--{key}={value}"]
