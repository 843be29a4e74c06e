"""Presets: all resolve, overrides lie over them at every depth."""

from typing import Any

import pytest

from kubetune_contract.config import AdapterConfig
from kubetune_contract.dataset import DatasetConfig, PromptTemplate
from kubetune_contract.errors import ConfigError
from kubetune_contract.presets import config_names, merge, preset_names, preset_text, resolve

PATHS: dict[str, Any] = {"model": {"path": "m"}, "dataset": {"path": "d.jsonl"}, "output_dir": "o"}


LLAMA = [name for name in preset_names() if name.startswith("llama3")]
SHIPPED = {
    "llama3": "8B_lora 8B_lora_single_device 8B_qlora_single_device 8B_dora 8B_dora_single_device "
    "8B_qdora_single_device 8B_full 8B_full_single_device 8B_lora_dpo 8B_lora_dpo_single_device 70B_lora 70B_full "
    "70B_qlora_single_device",
    "llama3_1": "8B_lora 8B_lora_single_device 8B_qlora_single_device 8B_dora 8B_dora_single_device "
    "8B_qdora_single_device 8B_full 8B_full_single_device 8B_lora_dpo 8B_lora_dpo_single_device 70B_lora 70B_full "
    "70B_qlora_single_device 405B_qlora",
    "llama3_2": "1B_lora 1B_lora_single_device 1B_qlora_single_device 1B_full 1B_full_single_device "
    "3B_lora 3B_lora_single_device 3B_qlora_single_device 3B_full 3B_full_single_device",
    "llama3_3": "70B_lora 70B_qlora 70B_full 70B_full_multinode",
    "demo": "smollm2_lora",
}


def test_the_presets_are_torchtunes_and_some_more() -> None:
    assert set(preset_names()) == {f"{group}/{name}" for group, names in SHIPPED.items() for name in names.split()}


@pytest.mark.parametrize("name", LLAMA)
def test_a_preset_of_llama_needs_nothing_more(name: str) -> None:
    resolve(name, {})


def test_the_demo_s_preset_needs_only_paths() -> None:
    resolve("demo/smollm2_lora", PATHS)


def test_a_configuration_of_a_task_is_no_preset() -> None:
    assert set(preset_names()) == {name for name in config_names() if "\nmethod: " in preset_text(name)}


# --- what families share ---

FOLDERS = {
    "llama3/8B": "Meta-Llama-3-8B-Instruct",
    "llama3/70B": "Meta-Llama-3-70B-Instruct",
    "llama3_1/8B": "Meta-Llama-3.1-8B-Instruct",
    "llama3_1/70B": "Meta-Llama-3.1-70B-Instruct",
    "llama3_1/405B": "Meta-Llama-3.1-405B-Instruct",
    "llama3_2/1B": "Llama-3.2-1B-Instruct",
    "llama3_2/3B": "Llama-3.2-3B-Instruct",
    "llama3_3/70B": "Llama-3.3-70B-Instruct",
}
RANKS = {"1B": 64, "3B": 64, "8B": 8, "70B": 16, "405B": 16}
METHODS = {"lora": "LoRA", "qlora": "QLoRA", "dora": "DoRA", "qdora": "QDoRA", "full": "Full"}


def parts(name: str) -> tuple[str, str, list[str]]:
    """llama3/8B_lora_single_device: the model, its size, the words of the rest."""
    model, *words = name.split("_single", maxsplit=1)[0].replace("llama3_", "llama3-").split("_")
    return model.replace("-", "_"), model.rpartition("/")[2], words


@pytest.mark.parametrize("name", LLAMA)
def test_a_preset_trains_the_instruct_weights_of_its_model_with_the_method_of_its_name(name: str) -> None:
    config, (model, _, words) = resolve(name, {}), parts(name)
    assert config.model.path == f"/tmp/{FOLDERS[model]}"
    assert config.output_dir == f"/tmp/kubetune/{name.replace('/', '_').replace('B_', 'B/')}"
    assert config.method == METHODS[words[0]]
    assert (config.preference is not None) == ("dpo" in words)


@pytest.mark.parametrize("name", LLAMA)
def test_the_adapters_of_a_size_are_alike(name: str) -> None:
    config, (_, size, _) = resolve(name, {}), parts(name)
    if config.lora is not None:
        assert config.lora == AdapterConfig(rank=RANKS[size], alpha=2 * RANKS[size])


@pytest.mark.parametrize("name", LLAMA)
def test_the_optimisation_of_a_method_is_the_same_for_all_models(name: str) -> None:
    training, (_, _, words) = resolve(name, {}).training, parts(name)
    found = (training.learning_rate, training.weight_decay, training.schedule, training.warmup_steps)
    if "dpo" in words:
        assert found == (5e-4, 0.05, "Cosine", 100)
    elif "full" in words:
        assert found == (2e-5, 0.01, "Constant", 0)
    else:
        assert found == (3e-4, 0.01, "Cosine", 100)
    assert (training.epochs, training.max_gradient_norm, training.precision) == (1, 0, "Auto")


@pytest.mark.parametrize("name", LLAMA)
def test_all_learn_the_same_data(name: str) -> None:
    config, (_, _, words) = resolve(name, {}), parts(name)
    dataset = config.dataset
    if "dpo" in words:
        assert (dataset.repo, dataset.format) == ("HuggingFaceH4/ultrafeedback_binarized", "Preference")
    else:
        assert (dataset.repo, dataset.format, dataset.train_on) == ("yahma/alpaca-cleaned", "Alpaca", "All")
        assert dataset.prompt_template == PromptTemplate(name="Alpaca")


@pytest.mark.parametrize("name", [name for name in LLAMA if f"{name}_single_device" in LLAMA])
def test_the_single_device_twin_differs_only_where_one_device_needs_it(name: str) -> None:
    one, many = resolve(f"{name}_single_device", {}).to_dict(), resolve(name, {}).to_dict()
    differing = {key for key in one["training"] if one["training"][key] != many["training"][key]}
    assert differing <= {"optimizer", "masterWeights", "optimizerInBackward", "activationCheckpointing"}
    assert {key for key in one if one[key] != many[key]} <= {"training", "outputDir"}


@pytest.mark.parametrize("name", LLAMA)
def test_a_preset_says_how_it_is_downloaded_and_run(name: str) -> None:
    text, (model, _, words) = preset_text(name), parts(name)
    single = name.endswith("_single_device")
    family = "full_finetune" if "full" in words else "lora_dpo" if "dpo" in words else "lora_finetune"
    assert f"tune download meta-llama/{FOLDERS[model]} --output-dir /tmp/{FOLDERS[model]}\n" in text
    assert f"{family}{'_single_device' if single else '_distributed'} --config {name}\n" in text
    assert ("embeddings" in text) == ("full" not in words)


# --- what is laid over a preset ---


def test_other_data_take_the_preset_s_rows_away_and_what_describes_them() -> None:
    dataset = resolve("llama3/8B_lora", {"dataset": {"path": "d.jsonl"}}).dataset
    assert dataset == DatasetConfig(path="d.jsonl")


def test_an_option_of_the_data_leaves_the_preset_s_rows() -> None:
    dataset = resolve("llama3/8B_lora", {"dataset": {"packed": True, "trainOn": "Last", "weight": 0.5}}).dataset
    assert (dataset.repo, dataset.format, dataset.train_on) == ("yahma/alpaca-cleaned", "Alpaca", "Last")


def test_full_fine_tuning_over_a_preset_of_adapters_drops_the_adapter() -> None:
    config = resolve("llama3/8B_qlora_single_device", {"method": "Full"})
    assert (config.lora, config.quantized, config.quantization) == (None, None, None)


def test_an_unknown_preset_names_the_shipped_ones() -> None:
    with pytest.raises(
        ConfigError, match=r"preset: 'llama3/9B' is unknown; the presets are demo/smollm2_lora, llama3/"
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
