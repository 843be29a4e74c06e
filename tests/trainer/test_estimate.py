"""The memory estimate: against traces of the real code, and what it says where memory is too small."""

from typing import Any

import pytest
import torch
from tests.trainer.memory_trace import trace_step

from kubetune_contract.architecture import LlamaConfig
from kubetune_contract.config import RunConfig, TrainingConfig
from kubetune_contract.estimate import GIB, Estimate, embedding_on_host, estimate
from kubetune_trainer.families import FAMILIES
from kubetune_trainer.model import Llama

SMALL = LlamaConfig(
    vocab_size=97,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=8,
    rms_norm_eps=1e-5,
    rope_theta=1e4,
    rope_scaling=None,
    tie_word_embeddings=False,
    max_position_embeddings=512,
)
B8 = FAMILIES["llama3/8B"]


def settings(**changes: Any) -> RunConfig:
    """A run on packed rows of 2048 tokens; a change of `training` or `dataset` names the field alone."""
    values: dict[str, Any] = {"model": {"path": "m"}, "output_dir": "o", "training": {"precision": "BF16"}}
    values["dataset"] = {"path": "d", "packed": True}
    for name, value in changes.items():
        place = values["training"] if name in TrainingConfig.model_fields else values
        (values["dataset"] if name == "max_sequence_length" else place)[name] = value
    return RunConfig.model_validate(values)


# --- against the real code --------------------------------------------------------------------------------------------

FULL: dict[str, Any] = {"activation_checkpointing": "Full"}
TRACED: dict[str, tuple[LlamaConfig, dict[str, Any]]] = {
    "8B LoRA as the presets have it": (B8, FULL),
    "8B QLoRA as the presets have it": (B8, FULL | {"method": "QLoRA"}),
    "two blocks of 8B, nothing computed again": (B8.model_copy(update={"num_hidden_layers": 2}), {}),
    "two blocks of 8B, a short micro-batch, whose peak is the loss": (
        B8.model_copy(update={"num_hidden_layers": 2}),
        FULL | {"batch_size": 1, "max_sequence_length": 512},
    ),
    "two blocks of 8B, every weight in bf16": (
        B8.model_copy(update={"num_hidden_layers": 2}),
        FULL | {"method": "Full", "master_weights": "BF16"},
    ),
    "two blocks of 8B in fp32": (B8.model_copy(update={"num_hidden_layers": 2}), FULL | {"precision": "FP32"}),
    "two blocks of 8B, rank 64 with dropout on attention alone": (
        B8.model_copy(update={"num_hidden_layers": 2}),
        FULL | {"adapter": {"rank": 64, "dropout": 0.1, "target_modules": ["q_proj", "v_proj"]}},
    ),
    "two blocks of 8B, dropout on all layers, nothing computed again": (
        B8.model_copy(update={"num_hidden_layers": 2}),
        {"adapter": {"dropout": 0.1}},
    ),
    "two blocks of 8B, DoRA, nothing computed again": (
        B8.model_copy(update={"num_hidden_layers": 2}),
        {"method": "DoRA"},
    ),
    "two blocks of 8B, QDoRA with dropout, short rows, one level of scales": (
        B8.model_copy(update={"num_hidden_layers": 2}),
        FULL
        | {"method": "QDoRA", "adapter": {"dropout": 0.1}, "quantization": {"double": False}, "batch_size": 1}
        | {"max_sequence_length": 1024},
    ),
    "two blocks of 8B, selective checkpointing": (
        B8.model_copy(update={"num_hidden_layers": 2}),
        {"activation_checkpointing": "Selective"},
    ),
    "1B with its tied head": (FAMILIES["llama3_2/1B"].model_copy(update={"num_hidden_layers": 2}), FULL),
}


@pytest.mark.parametrize(("architecture", "changes"), TRACED.values(), ids=TRACED)
def test_the_estimate_is_within_5_percent_of_the_live_tensors_of_a_step(architecture, changes):
    config = settings(**changes)
    trace, parts = trace_step(architecture, config), estimate(config, architecture)
    static = parts.weights + parts.adapter + parts.gradients + parts.optimizer
    assert static == pytest.approx(trace.static, rel=0.01)
    assert parts.total == pytest.approx(trace.peak, rel=0.05)
    assert parts.total - static == pytest.approx(trace.peak - trace.static, rel=0.1)  # not hidden behind the weights


REACHED: dict[str, tuple[str, dict[str, Any], float]] = {
    "8B LoRA": ("llama3/8B", FULL, 16.2),
    "8B QLoRA": ("llama3/8B", FULL | {"method": "QLoRA"}, 7.4),
    "70B QLoRA on a card of 80 GB, libraries and gaps included": (
        "llama3/70B",
        FULL | {"method": "QLoRA", "adapter": {"rank": 16, "alpha": 32}},
        74.5,
    ),
}


@pytest.mark.parametrize(("model", "changes", "most"), REACHED.values(), ids=REACHED)
def test_two_rows_of_2048_tokens_fit_into(model, changes, most):
    parts = estimate(settings(**changes), FAMILIES[model])
    assert (parts.needed if most > 70 else parts.total) / GIB <= most


# --- what must be so whatever the numbers are -------------------------------------------------------------------------

SMALLER: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "checkpointing": ({}, {"activation_checkpointing": "Full"}),
    "selective checkpointing": ({}, {"activation_checkpointing": "Selective"}),
    "full instead of selective checkpointing": ({"activation_checkpointing": "Selective"}, FULL),
    "a smaller batch": ({"batch_size": 4}, {"batch_size": 1}),
    "shorter rows": ({"max_sequence_length": 4096}, {"max_sequence_length": 512}),
    "a lower rank": ({"adapter": {"rank": 64}}, {"adapter": {"rank": 8}}),
    "fewer targets": ({}, {"adapter": {"target_modules": ["q_proj"]}}),
    "no dropout": ({"adapter": {"dropout": 0.1}}, {}),
    "no magnitudes": ({"method": "DoRA"}, {"method": "LoRA"}),
    "an adapter": ({"method": "Full"}, {"method": "LoRA"}),
    "four bits": ({"method": "LoRA"}, {"method": "QLoRA"}),
    "double quantization": ({"method": "QLoRA", "quantization": {"double": False}}, {"method": "QLoRA"}),
    "bf16 products": ({"precision": "FP32"}, {"precision": "BF16"}),
    "bf16 weights": ({"method": "Full"}, {"method": "Full", "master_weights": "BF16"}),
    "an 8-bit optimizer": ({"method": "Full"}, {"method": "Full", "optimizer": "AdamW8bit"}),
    "a paged optimizer": (
        {"method": "Full", "optimizer": "AdamW8bit"},
        {"method": "Full", "optimizer": "PagedAdamW8bit"},
    ),
    "an optimizer in the backward pass": (
        {"method": "Full"},
        {
            "method": "Full",
            "optimizer_in_backward": True,
            "gradient_accumulation_steps": 1,
            "max_gradient_norm": 0,
        },
    ),
    "offloading": ({"method": "Full"}, {"method": "Full", "cpu_offload": True}),
}


@pytest.mark.parametrize(("more", "less"), SMALLER.values(), ids=SMALLER)
@pytest.mark.parametrize("processes", [1, 8])
def test_less_memory_is_needed_with(more, less, processes):
    large, small = (estimate(settings(**changes), B8, processes) for changes in (more, less))
    assert small.total < large.total


def test_more_processes_take_less_each_and_hybrid_counts_those_of_a_node():
    sizes = [estimate(settings(method="Full"), B8, processes).total for processes in (1, 2, 4, 8, 16)]
    assert sizes == sorted(sizes, reverse=True)
    hybrid = estimate(settings(method="Full", sharding="Hybrid"), B8, 16, per_node=4)
    assert hybrid == estimate(settings(method="Full"), B8, 4)


def test_preferences_take_two_documents_for_each_sample():
    pair = settings(dataset={"path": "d", "format": "Preference", "max_sequence_length": 1024})
    plain = settings(dataset={"path": "d", "max_sequence_length": 2048})
    assert estimate(pair, B8) == estimate(plain, B8)


def test_offloaded_state_is_in_host_memory():
    parts = estimate(settings(method="Full", cpu_offload=True), B8, 4)
    assert parts.weights == parts.gradients == parts.optimizer == 0
    assert parts.host == pytest.approx(16 * B8.parameters / 4, rel=0.001)


def test_the_table_has_a_line_for_each_part_and_their_sum():
    parts = Estimate(4 * GIB, GIB, 0, 0, GIB, 0, 0, 0, host=3 * GIB)
    lines = parts.table().splitlines()
    assert [line.split()[:2] for line in lines] == [
        ["weights", "4.00"],
        ["adapter", "1.00"],
        ["activations", "1.00"],
        ["total", "6.00"],
        ["needed", "6.78"],
        ["host", "3.00"],
    ]


def test_the_sizes_of_the_families_are_those_of_their_published_weights():
    billions = {name: round(model.parameters / 1e9, 2) for name, model in FAMILIES.items()}
    assert billions == {
        "llama3/8B": 8.03,
        "llama3/70B": 70.55,
        "llama3_1/8B": 8.03,
        "llama3_1/70B": 70.55,
        "llama3_1/405B": 405.85,
        "llama3_2/1B": 1.24,
        "llama3_2/3B": 3.21,
        "llama3_3/70B": 70.55,
    }


# --- the embedding in host memory -------------------------------------------------------------------------------------

PLACES: dict[str, tuple[dict[str, Any], int, bool, bool]] = {
    "an adapter on one device": ({}, 1, False, True),
    "four bits on one device": ({"method": "QLoRA"}, 1, False, True),
    "the embedding is trained whole": ({"method": "Full"}, 1, False, False),
    "the embedding has an adapter": ({"adapter": {"target_modules": ["embed_tokens", "q_proj"]}}, 1, False, False),
    "the embedding is the head too": ({}, 1, True, False),
    "the embedding is sharded": ({}, 2, False, False),
}


@pytest.mark.parametrize(("changes", "processes", "tied", "on_host"), PLACES.values(), ids=PLACES)
def test_the_embedding_stays_on_the_host_where_it_is_only_read(changes, processes, tied, on_host):
    architecture = SMALL.model_copy(update={"tie_word_embeddings": tied})
    assert embedding_on_host(settings(**changes), architecture, processes) is on_host


def test_rows_of_an_embedding_on_another_device_move_to_the_blocks():
    model = Llama(SMALL).to("meta")  # the one device beside the CPU that is always at hand
    model.model.embed_tokens.to_empty(device="cpu")
    assert model.model.embed(torch.zeros(1, 3, dtype=torch.int64)).device.type == "meta"
