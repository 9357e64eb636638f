"""Config files of this and other trainers -> command lines. Standard library only."""

import difflib
import json
import re
import shlex
import urllib.parse
from pathlib import Path

# SimpleTuner's config.env: names that are not merely those of flags in capitals
OF_ENV = {"model_name": "pretrained_model_name_or_path", "dataloader_config": "data_backend_config", "training_seed": "seed",
          "max_num_steps": "max_train_steps", "num_epochs": "num_train_epochs", "checkpointing_limit": "checkpoints_total_limit",
          "use_xformers": "enable_xformers_memory_efficient_attention", "hub_model_name": "hub_model_id",
          "lr_schedule": "lr_scheduler", "minimum_resolution": "minimum_image_size"}
_FOLDER = "BASE_DIR"    # no flag, but a part of other values
_EXTRA = "trainer_extra_args"    # free text there: flags, as typed
_OWN_FILE = "webhook_config"    # SimpleTuner's may stand in the config itself
_OF_WEBHOOKS = {"webhook_type": str, "webhook_url": str, "callback_url": str, "message_prefix": str, "log_level": str,
                "ssl_no_verify": bool, "auth_token": str}
_LEVELS = ("critical", "error", "warning", "info", "debug")    # a preview is info


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
    prompts = _json("--user_prompt_library", path)
    if not isinstance(prompts, dict) or not all(isinstance(prompt, str) for prompt in prompts.values()):
        raise DialectError(f'--user_prompt_library: {path} must hold one object, such as {{"cat": "a cat at dusk"}}')
    if wrong := [name for name, prompt in prompts.items() if prompt.startswith("--")]:
        raise DialectError(f"--user_prompt_library: {path}: {wrong[0]} looks like a flag: {prompts[wrong[0]]!r}")
    return prompts


def read_webhooks(path: Path) -> list[dict]:
    """SimpleTuner's webhook_config: one object or a list of them in a .json file. Addresses are secrets: no message holds one.

    Returns a dict each: type (raw or discord), url, prefix (None: the project's name), told (whether its log_level lets
    previews through), verify and token. Raises `DialectError`.
    """
    content = _json("--webhook_config", path)
    return [_webhook(given, f"--webhook_config: {path}" + (f", webhook {number}" if isinstance(content, list) else ""))
            for number, given in enumerate(content if isinstance(content, list) else [content], 1)]


def _webhook(given, where: str) -> dict:
    if not isinstance(given, dict):
        raise DialectError(f'{where} must be an object such as {{"webhook_type": "raw", "callback_url": "https://..."}}')
    if unknown := sorted(given.keys() - _OF_WEBHOOKS):
        near = difflib.get_close_matches(unknown[0], _OF_WEBHOOKS, n=1, cutoff=0.5)
        raise DialectError(f"{where}: there is no key {unknown[0]}; " + (f"did you mean {near[0]}?" if near else
                                                                         f"there are {', '.join(_OF_WEBHOOKS)}"))
    if wrong := [key for key, kind in _OF_WEBHOOKS.items() if not isinstance(given.get(key), kind | None)]:
        raise DialectError(f"{where}: {wrong[0]} must be {'true or false' if _OF_WEBHOOKS[wrong[0]] is bool else 'text'}")
    if given.get("webhook_type") not in ("raw", "discord"):
        raise DialectError(f"{where}: webhook_type must be raw or discord")
    if (level := given.get("log_level") or "info") not in _LEVELS:
        raise DialectError(f"{where}: log_level must be one of {', '.join(_LEVELS)}")
    if any(not character.isprintable() for character in given.get("auth_token") or ""):
        raise DialectError(f"{where}: auth_token must be one line of text")
    url = given.get("webhook_url") or given.get("callback_url") or ""
    try:
        parts = urllib.parse.urlsplit(url)
        good = parts.scheme in ("http", "https") and parts.hostname and (parts.port is None or parts.port)
    except ValueError:    # a port that is no number
        good = False
    if not good or not url.isascii() or any(character.isspace() or not character.isprintable() for character in url):
        raise DialectError(f"{where}: webhook_url (or callback_url) must be an address that begins with https:// or http://")
    return {"type": given["webhook_type"], "url": url, "prefix": given.get("message_prefix"), "token": given.get("auth_token"),
            "verify": not given.get("ssl_no_verify"), "told": _LEVELS.index(level) >= _LEVELS.index("info")}


def faults_of_webhooks(name: str, published: str | None) -> list[str]:
    """Why --webhook_config cannot be used, a sentence each. published: a folder that is uploaded, no place for a secret."""
    if name.lstrip().startswith(("{", "[")) or "://" in name:
        return [_in_a_file()]
    try:
        if not any(hook["told"] for hook in read_webhooks(Path(name))):
            return [f"--webhook_config: no webhook in {name} is told of previews: their log_level must be info or debug"]
    except DialectError as error:
        return [str(error)]
    if published and Path(name).resolve().is_relative_to(Path(published).resolve()):
        return [f"--webhook_config: {name} lies in --output_dir, which --push_to_hub uploads: keep its address elsewhere"]
    return []


def _in_a_file() -> str:
    return ("--webhook_config takes the name of a .json file: move the webhook there, as its address is a secret, and flags are "
            "copied into reports and checkpoints")


def _json(flag: str, path: Path):
    """What a .json file holds. Raises `DialectError`."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        example = path.with_name(f"{path.name}.example")
        more = f"; to begin with, copy {example} there" if example.is_file() else ""
        raise DialectError(f"{flag}: cannot read {path}: {error.strerror}{more}") from None
    except ValueError as error:
        raise DialectError(f"{flag}: {path} is not valid JSON: {error}") from None


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
        if key.lstrip("-").lower() == _OWN_FILE and isinstance(value, (dict, list)):
            raise DialectError(_in_a_file())
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
