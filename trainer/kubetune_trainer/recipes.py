"""torchtune's recipes as names: the code is the same for all, what differs stands in the configuration."""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple, get_args

from kubetune_contract.config import Method, RunConfig
from kubetune_contract.errors import ConfigError
from kubetune_contract.presets import complete, preset_names, read_preset

_SINGLE: Final = "_single_device"
_ADAPTERS: Final[tuple[Method, ...]] = tuple(method for method in get_args(Method) if method != "Full")
_NEEDED: Final = {
    "model.path: a value is required": (("model.path",), "model.path=FOLDER"),
    "dataset: exactly one of path and repo is required": (("dataset.path", "dataset.repo"), "dataset.path=FILE"),
    "output_dir: a value is required": (("output_dir",), "output_dir=FOLDER"),
}
"""What no default can know: the problem without it, the fields of which one must be there, how it is given."""


class Recipe(NamedTuple):
    """A name for a way to train."""

    name: str
    methods: tuple[Method, ...]
    """What it trains; the first is meant where the configuration names none."""
    preference: bool
    """Whether it learns from pairs of answers."""

    @property
    def distributed(self) -> bool:
        """Whether it runs several processes."""
        return not self.name.endswith(_SINGLE)

    def takes(self, config: Mapping[str, Any]) -> bool:
        """Whether these values are of its kind."""
        method, layout = _kind(config)
        return method in self.methods and (layout == "Preference") == self.preference

    @property
    def presets(self) -> tuple[str, ...]:
        """The shipped configurations for it. The demo's runs on anything."""
        named = [name for name in preset_names() if name.endswith(_SINGLE) != self.distributed or name[:5] == "demo/"]
        return tuple(name for name in named if self.takes(read_preset(name)))


RECIPES: Final = {
    f"{name}{suffix}": Recipe(f"{name}{suffix}", methods, preference)
    for name, methods, preference in (
        ("full_finetune", ("Full",), False),
        ("lora_finetune", _ADAPTERS, False),
        ("lora_dpo", _ADAPTERS, True),
    )
    for suffix in (_SINGLE, "_distributed")
}


def find(name: str, names: Iterable[str]) -> str:
    """The name, if it is one of the recipes. Raises ConfigError with the nearest."""
    known = tuple(names)
    if name in known:
        return name
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]}?" if near else f"the recipes are {', '.join(known)}"
    raise ConfigError([f"recipe: {name!r} is unknown; {hint}"])


def configure(values: Mapping[str, Any], recipe: Recipe | None, others: Sequence[str] = ()) -> RunConfig:
    """The complete configuration of a training run.

    Raises ConfigError with all problems: `others`, those of the values, and what does not go with the recipe.
    """
    whole = {"model": {}, "dataset": {}} | dict(values)
    if recipe:
        whole = {"method": recipe.methods[0]} | whole
    problems = [*others, *(_mismatch(recipe, whole) if recipe else ())]
    lacks = lacking(whole)
    try:
        config = complete(whole)
    except ConfigError as error:
        raise ConfigError([*problems, *(_with_override(problem, lacks) for problem in error.problems)]) from error
    if problems:
        raise ConfigError(problems)
    return config


def _mismatch(recipe: Recipe, values: Mapping[str, Any]) -> list[str]:
    method, layout = _kind(values)
    alike = [other for other in RECIPES.values() if other.distributed == recipe.distributed]
    fitting = [other.name for other in alike if other.takes(values)]
    if not fitting or recipe.takes(values):
        return []  # unknown words are told as such
    if method not in recipe.methods:
        return [
            f"method: {recipe.name} trains with {_listed(recipe.methods)}, but the configuration says {method}: "
            f"use {fitting[0]}, or set method={recipe.methods[0]}"
        ]
    if recipe.preference:
        return [
            f"dataset.format: {recipe.name} learns from data of the format Preference, but the configuration says "
            f"{layout}: use {fitting[0]}, or set dataset.format=Preference"
        ]
    return [f"dataset.format: {recipe.name} does not learn from data of the format Preference: use {fitting[0]}"]


def _kind(values: Mapping[str, Any]) -> tuple[Any, Any]:
    """The method and the data's format."""
    dataset = values.get("dataset")
    layout = dataset.get("format") if isinstance(dataset, Mapping) else None
    return values.get("method", RunConfig.model_fields["method"].default), layout or "OpenAI"


def _listed(words: Sequence[str]) -> str:
    return " or ".join(filter(None, (", ".join(words[:-1]), words[-1])))


def lacking(values: Mapping[str, Any]) -> list[str]:
    """What a run still needs, as overrides."""
    return [given for paths, given in _NEEDED.values() if not any(_has(values, path) for path in paths)]


def filled(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values with a stand-in for each that is lacking, so that the others can be judged."""
    whole = dict(values)
    for paths, _ in _NEEDED.values():
        if not any(_has(values, path) for path in paths):
            section, _, name = paths[0].rpartition(".")
            if section and isinstance(whole.get(section, {}), Mapping):
                whole[section] = {**whole.get(section, {}), name: "-"}
            elif not section:
                whole[name] = "-"
    return whole


def _has(values: Any, path: str) -> bool:
    for key in path.split("."):
        values = values.get(key) if isinstance(values, Mapping) else None
    return values is not None


def _with_override(problem: str, lacks: Sequence[str]) -> str:
    given = _NEEDED[problem][1] if problem in _NEEDED else None
    return f"{problem}; give it as {given}" if given in lacks else problem
