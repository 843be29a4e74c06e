"""Named configurations: YAML files in presets/, named as in torchtune, each a part of a RunConfig to be completed."""

from collections.abc import Callable, Mapping
from functools import cache
from importlib.resources import files
from typing import Any

import yaml
from pydantic import ValidationError

from kubetune_contract.base import snake
from kubetune_contract.config import RunConfig
from kubetune_contract.errors import ConfigError, explain

_SOURCES = {
    "dataset": ("path", "repo", "revision", "split", "format", "columns", "prompt_template", "weight", "mixture"),
    "validation": ("path", "fraction"),
}
"""Fields of a section that say where its rows come from and what they are called."""
_FOLDER = files("kubetune_contract") / "presets"


@cache
def preset_names() -> tuple[str, ...]:
    """All shipped presets, such as `llama3/8B_lora`, sorted."""
    groups = (group for group in _FOLDER.iterdir() if group.is_dir())
    found = ((group.name, file.name) for group in groups for file in group.iterdir() if file.name.endswith(".yaml"))
    return tuple(sorted(f"{group}/{file.removesuffix('.yaml')}" for group, file in found))


def preset_text(name: str) -> str:
    """The preset's file. Raises ConfigError for a name that is not shipped."""
    if name not in preset_names():
        raise ConfigError([f"preset: {name!r} is unknown; the presets are {', '.join(preset_names())}"])
    return (_FOLDER / f"{name}.yaml").read_text()


def resolve(preset: str | None, overrides: Mapping[str, Any], spell: Callable[[str], str] = snake) -> RunConfig:
    """The complete configuration: the preset's values, replaced by the overrides'.

    Keys of the overrides may be camelCase or snake_case; `spell` is how error messages spell them.
    Raises ConfigError with all problems at once.
    """
    base = yaml.safe_load(preset_text(preset)) if preset else {}
    try:
        return RunConfig.model_validate(merge(_fitting(base, overrides), overrides))
    except ValidationError as error:
        raise ConfigError(explain(error, RunConfig, spell)) from error


def _fitting(base: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The preset without what another choice in the overrides makes meaningless.

    A source of data replaces the preset's source as a whole, a method the settings that go with the preset's method.
    """
    fitting = dict(base)
    for section, sources in _SOURCES.items():
        given = {snake(key) for key in overrides.get(section) or {}}
        if given & set(sources):
            fitting[section] = {key: value for key, value in base.get(section, {}).items() if key not in sources}
    method = overrides.get("method")
    if method == "Full":
        fitting.pop("adapter", None)
        fitting.pop("dpo", None)
    if method not in (None, "QLoRA", "QDoRA"):
        fitting.pop("quantization", None)
    return fitting


def merge(base: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the values of `overrides` laid over it, key by key at every depth; keys become snake_case."""
    merged = {snake(key): value for key, value in base.items()}
    for key, value in overrides.items():
        name = snake(key)
        if isinstance(value, Mapping):
            below = merged.get(name)
            merged[name] = merge(below if isinstance(below, Mapping) else {}, value)
        else:
            merged[name] = value
    return merged
