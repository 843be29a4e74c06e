"""From `--config` and KEY=VALUE on the command line to the values of a configuration."""

import difflib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from kubetune_contract import yaml_text
from kubetune_contract.base import snake
from kubetune_contract.errors import ConfigError
from kubetune_contract.presets import config_names, lay_over, preset_text


class Selection(NamedTuple):
    """What the command line chose."""

    shipped: str | None
    """Name of the shipped configuration; None for a file of the user's."""
    base: dict[str, Any]
    """Its values, in snake_case."""
    changes: dict[str, Any]
    """What the overrides set."""

    @property
    def values(self) -> dict[str, Any]:
        """Both together."""
        return lay_over(self.base, self.changes)


def select(config: str, overrides: Sequence[str]) -> Selection:
    """The configuration that is meant, with the overrides. Raises ConfigError with all problems of the overrides."""
    shipped = None if Path(config).is_file() else _shipped(config)
    text = Path(config).read_text() if shipped is None else preset_text(shipped)
    selection = Selection(shipped, _parse_file(text, config), {})
    problems = []
    for override in overrides:
        try:
            _apply(selection, override)
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError(problems)
    return selection


def known_config(name: str) -> str:
    """The name, if it is that of a shipped configuration. Raises ConfigError with the nearest ones."""
    if name in config_names():
        return name
    near = difflib.get_close_matches(name, config_names(), n=1)
    hint = f"did you mean {near[0]}?" if near else "`tune ls` shows the configurations"
    raise ConfigError([f"--config: {name!r} is neither a file nor a configuration; {hint}"])


def set_value(values: dict[str, Any], path: str, value: Any) -> None:
    """Sets the value at a dotted path; what stands in the way is replaced."""
    *above, name = map(snake, path.split("."))
    for key in above:
        below = values.get(key)
        values[key] = below if isinstance(below, dict) else {}
        values = values[key]
    values[name] = value


def _shipped(config: str) -> str:
    """The shipped configuration of this name, or at the end of this path: torchtune's users have paths in its tree."""
    if config in config_names():
        return config
    path = config.removesuffix(".yaml").removesuffix(".yml")
    found = [name for name in config_names() if f"/{path}".endswith(f"/{name}")]
    if found:
        name = max(found, key=len)
        print(f"note: there is no file {config}: taking the shipped configuration {name}", file=sys.stderr)
        return name
    if path != config:
        raise ConfigError([f"--config: there is no file {config}; `tune ls` shows the shipped configurations"])
    return known_config(config)


def _parse_file(text: str, name: str) -> dict[str, Any]:
    try:
        values = yaml_text.parse(text) or {}
    except yaml.YAMLError as error:
        raise ConfigError([f"{name} is not YAML: {' '.join(str(error).split())}"]) from error
    if not isinstance(values, dict):
        raise ConfigError([f"{name} must hold keys and values, such as `method: LoRA`"])
    return _snake(values)


def _snake(values: Mapping[Any, Any]) -> dict[str, Any]:
    return {snake(str(key)): _snake(value) if isinstance(value, Mapping) else value for key, value in values.items()}


def _apply(selection: Selection, override: str) -> None:
    if override.startswith("~"):
        _remove(selection, override[1:])
        return
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise ValueError(f"{override}: an override is KEY=VALUE, such as training.epochs=3, or ~KEY")
    try:
        value = yaml_text.parse(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: {text!r} is not a YAML value") from error
    set_value(selection.changes, path, _snake(value) if isinstance(value, Mapping) else value)


def _remove(selection: Selection, path: str) -> None:
    if not any([_take_out(selection.base, path), _take_out(selection.changes, path)]):
        raise ValueError(f"~{path}: the configuration does not set {path}, so it cannot be removed")


def _take_out(values: Any, path: str) -> bool:
    *above, name = map(snake, path.split("."))
    for key in above:
        values = values.get(key) if isinstance(values, dict) else None
    if not isinstance(values, dict) or name not in values:
        return False
    del values[name]
    return True
