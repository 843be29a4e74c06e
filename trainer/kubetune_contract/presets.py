"""Named configurations: YAML files in presets/, named as in torchtune.

Those that name a `method` are presets: RunConfigs, or parts of them to be completed. The others configure single tasks
of the trainer, such as generating text.
"""

from collections.abc import Callable, Mapping
from functools import cache
from importlib.resources import files
from typing import Any

from kubetune_contract import yaml_text
from kubetune_contract.base import snake
from kubetune_contract.config import RunConfig
from kubetune_contract.errors import ConfigError, validated

_PLACES = {"dataset": ("path", "repo"), "validation": ("path", "fraction")}
"""Fields of a section that say where its rows come from. One of them replaces the preset's rows."""
_OF_ROWS = ("revision", "split", "format", "columns", "prompt_template", "weight", "mixture", "train_on")
"""Fields that describe the preset's rows and mean nothing for others."""
_FOLDER = files("kubetune_contract") / "presets"


@cache
def config_names() -> tuple[str, ...]:
    """All shipped configurations, such as `llama3/8B_lora` and `generation`, sorted."""
    files = [(file.name, file) for file in _FOLDER.iterdir() if not file.is_dir()]
    files += [
        (f"{group.name}/{file.name}", file) for group in _FOLDER.iterdir() if group.is_dir() for file in group.iterdir()
    ]
    return tuple(sorted(name.removesuffix(".yaml") for name, _ in files if name.endswith(".yaml")))


@cache
def preset_names() -> tuple[str, ...]:
    """The shipped configurations of training runs, sorted: those that a FineTuneJob may name."""
    return tuple(name for name in config_names() if "method" in read_preset(name))


def preset_text(name: str) -> str:
    """The configuration's file. Raises ConfigError for a name that is not shipped."""
    if name not in config_names():
        raise ConfigError([f"preset: {name!r} is unknown; the presets are {', '.join(preset_names())}"])
    return (_FOLDER / f"{name}.yaml").read_text()


def read_preset(name: str) -> dict[str, Any]:
    """The configuration's values. Raises ConfigError for a name that is not shipped."""
    return yaml_text.parse(preset_text(name)) or {}


def resolve(preset: str | None, overrides: Mapping[str, Any], spell: Callable[[str], str] = snake) -> RunConfig:
    """The complete configuration: the preset's values, replaced by the overrides'.

    Keys of the overrides may be camelCase or snake_case; `spell` is how error messages spell them.
    Raises ConfigError with all problems at once.
    """
    return complete(lay_over(read_preset(preset) if preset else {}, overrides), spell)


def complete(values: Mapping[str, Any], spell: Callable[[str], str] = snake) -> RunConfig:
    """The configuration of these values. Raises ConfigError with all problems at once."""
    return validated(RunConfig, values, spell)


def lay_over(base: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the overrides laid over it, in snake_case, without what the overrides make meaningless in it.

    A place of data replaces the base's place and all that describes its rows, a method the settings that go with the
    base's method.
    """
    return merge(_fitting(base, overrides), overrides)


def _fitting(base: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    fitting = dict(base)
    for section, places in _PLACES.items():
        given, found = overrides.get(section), base.get(section)
        if isinstance(given, Mapping) and isinstance(found, Mapping) and {snake(str(key)) for key in given} & {*places}:
            fitting[section] = {key: value for key, value in found.items() if key not in (*places, *_OF_ROWS)}
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
