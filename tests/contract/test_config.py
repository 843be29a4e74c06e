"""RunConfig: what is accepted, and the exact sentence for what is not."""

from typing import Any

import pytest
from pydantic.alias_generators import to_camel

from kubetune_contract.config import AdapterConfig, RunConfig
from kubetune_contract.errors import ConfigError
from kubetune_contract.exit_codes import ExitCode
from kubetune_contract.presets import resolve

COMPLETE: dict[str, Any] = {"model": {"path": "m"}, "dataset": {"path": "d.jsonl"}, "output_dir": "o"}
TARGETS = "'q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate_proj', 'up_proj', 'down_proj', 'embed_tokens' or 'lm_head'"
FORMATS = "'OpenAI', 'ShareGPT', 'Alpaca', 'Instruct', 'Completion' or 'Preference'"
METHODS = "'Full', 'LoRA', 'DoRA', 'QLoRA' or 'QDoRA'"


def problems(values: dict[str, Any], **options: Any) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        resolve(None, values, **options)
    assert caught.value.exit_code == ExitCode.INVALID_CONFIG
    assert str(caught.value) == "; ".join(caught.value.problems)
    return caught.value.problems


WRONG: dict[str, tuple[dict[str, Any], list[str]]] = {
    "magnitudes of the head": (
        {"method": "QDoRA", "adapter": {"target_modules": ["q_proj", "lm_head"]}},
        [
            "adapter.target_modules must not name embed_tokens or lm_head with method QDoRA, "
            "which trains magnitudes inside the blocks only: remove them, or set method to LoRA"
        ],
    ),
    "an unknown field names the nearest one": (
        {"training": {"learning_rte": 1e-3}},
        ["training.learning_rte: unknown field; did you mean learning_rate?"],
    ),
    "an unknown group names the nearest one": ({"trainig": {}}, ["trainig: unknown field; did you mean training?"]),
    "a field that resembles none lists all": (
        {"export": {"zzz": 1}},
        ["export.zzz: unknown field; the fields here are merged"],
    ),
    "a missing path": ({"model": {}}, ["model.path: a value is required"]),
    "a choice in the wrong case": ({"method": "lora"}, [f"method: input should be {METHODS}, but it is 'lora'"]),
    "a format that does not exist": (
        {"dataset": {"path": "d", "format": "Alpaka"}},
        [f"dataset.format: input should be {FORMATS}, but it is 'Alpaka'"],
    ),
    "a number below its bound": (
        {"training": {"epochs": 0}},
        ["training.epochs: input should be greater than or equal to 1, but it is 0"],
    ),
    "a number above its bound": (
        {"validation": {"path": "v", "samples": 65}},
        ["validation.samples: input should be less than or equal to 64, but it is 65"],
    ),
    "a word for a number": (
        {"training": {"learning_rate": "fast"}},
        [
            "training.learning_rate: input should be a valid number, unable to parse string as a number, "
            "but it is 'fast'"
        ],
    ),
    "not a number": (
        {"training": {"learning_rate": float("nan")}},
        ["training.learning_rate: input should be a finite number, but it is nan"],
    ),
    "a value for a group": (
        {"training": 3},
        ["training: input should be a valid dictionary or instance of TrainingConfig, but it is 3"],
    ),
    "a layer that does not exist": (
        {"adapter": {"target_modules": ["q_proj", "qkv"]}},
        [f"adapter.target_modules.1: input should be {TARGETS}, but it is 'qkv'"],
    ),
    "a layer named twice": (
        {"adapter": {"target_modules": ["q_proj", "q_proj"]}},
        ["adapter: target_modules must not name a module twice"],
    ),
    "an adapter without LoRA": (
        {"method": "Full", "adapter": {"rank": 4}},
        ["adapter does not go with method Full: remove adapter, or set method to LoRA"],
    ),
    "a merge without LoRA": (
        {"method": "Full", "export": {"merged": True}},
        ["export.merged does not go with method Full: full fine-tuning writes a whole model anyway"],
    ),
    "three problems are told at once": (
        {"training": {"epochs": 0, "batch_sise": 1}, "checkpoint": {"keep": 0}},
        [
            "training.epochs: input should be greater than or equal to 1, but it is 0",
            "training.batch_sise: unknown field; did you mean batch_size?",
            "checkpoint.keep: input should be greater than or equal to 1, but it is 0",
        ],
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_value_is_told_with_field_value_and_remedy(case: str) -> None:
    values, expected = WRONG[case]
    assert list(problems(COMPLETE | values)) == expected


def test_manifests_are_told_in_camel_case() -> None:
    values = COMPLETE | {
        "training": {"optimizerInBackward": True, "maxGradientNorm": 0},
        "dataset": {"path": "d", "maxSequenceLenght": 1},
    }
    assert problems(values, spell=to_camel) == (
        "dataset.maxSequenceLenght: unknown field; did you mean maxSequenceLength?",
        "training: optimizerInBackward needs gradientAccumulationSteps 1, but it is 8: "
        "a gradient that is used at once cannot be added up",
    )


def test_everything_that_has_a_default_may_be_left_out() -> None:
    config = resolve(None, COMPLETE)
    assert config.method == "LoRA"
    assert config.lora == AdapterConfig()
    assert config.validation is None


def test_full_fine_tuning_has_no_adapter() -> None:
    assert resolve(None, COMPLETE | {"method": "Full"}).lora is None


def test_a_configuration_survives_its_json() -> None:
    config = resolve(None, COMPLETE | {"training": {"learning_rate": 1e-4, "max_steps": 200}})
    assert RunConfig.model_validate_json(config.to_json()) == config
    assert '"maxSteps":200' in config.to_json()


def test_every_field_is_known_by_both_of_its_spellings() -> None:
    config = resolve(None, COMPLETE | {"validation": {"path": "v"}, "adapter": {}})
    assert resolve(None, config.model_dump()) == config
    assert resolve(None, config.to_dict()) == config


def test_a_configuration_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        resolve(None, COMPLETE).training.epochs = 3  # type: ignore[misc]
