"""Presets: all resolve, overrides lie over them at every depth."""

from typing import Any

import pytest

from kubetune_contract.errors import ConfigError
from kubetune_contract.presets import merge, preset_names, preset_text, resolve

PATHS: dict[str, Any] = {"model": {"path": "m"}, "dataset": {"path": "d.jsonl"}, "output_dir": "o"}


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_needs_only_paths(name: str) -> None:
    resolve(name, PATHS)


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_says_its_method(name: str) -> None:
    assert "\nmethod: " in preset_text(name)


def test_the_presets_of_the_quick_start_are_shipped() -> None:
    assert {"demo/smollm2_lora", "llama3/8B_lora"} <= set(preset_names())


def test_an_unknown_preset_names_the_shipped_ones() -> None:
    with pytest.raises(
        ConfigError, match=r"preset: 'llama3/9B' is unknown; the presets are demo/smollm2_lora, llama3/8B_lora"
    ):
        resolve("llama3/9B", PATHS)


def test_a_path_is_no_preset() -> None:
    with pytest.raises(ConfigError, match="is unknown"):
        preset_text("../presets/demo/smollm2_lora")


def test_an_override_wins_and_leaves_its_neighbours() -> None:
    config = resolve("demo/smollm2_lora", PATHS | {"adapter": {"rank": 4}, "training": {"learningRate": 1e-5}})
    assert config.adapter is not None
    assert (config.adapter.rank, config.adapter.alpha) == (4, 32)
    assert (config.training.learning_rate, config.training.batch_size) == (1e-5, 4)


MERGES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "a new key is added": ({"a": 1}, {"b": 2}, {"a": 1, "b": 2}),
    "a scalar is replaced": ({"a": 1}, {"a": 2}, {"a": 2}),
    "null replaces too": ({"a": 1}, {"a": None}, {"a": None}),
    "groups are merged at every depth": (
        {"a": {"b": {"c": 1, "d": 2}}},
        {"a": {"b": {"c": 3}}},
        {"a": {"b": {"c": 3, "d": 2}}},
    ),
    "a group replaces a scalar": ({"a": 1}, {"a": {"b": 2}}, {"a": {"b": 2}}),
    "a list is replaced whole": ({"a": [1, 2]}, {"a": [3]}, {"a": [3]}),
    "camelCase and snake_case are one key": ({"max_steps": 1}, {"maxSteps": 2}, {"max_steps": 2}),
    "a digit in a name is part of its word": ({"beta1": 0.9}, {"beta1": 0.8}, {"beta1": 0.8}),
    "camelCase inside a new group": ({}, {"training": {"maxSteps": 2}}, {"training": {"max_steps": 2}}),
}


@pytest.mark.parametrize("case", MERGES)
def test_merge(case: str) -> None:
    base, overrides, expected = MERGES[case]
    assert merge(base, overrides) == expected
