"""Every method on several processes, with checkpointing, in generation: what one plain process computes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.trainer.conftest import ALL_LINEAR
from tests.trainer.test_parallel import CLOSE, batch, step
from torch.distributed.checkpoint import FileSystemReader

from kubetune_contract.config import RunConfig
from kubetune_contract.presets import merge
from kubetune_trainer import train
from kubetune_trainer.distributed import World
from kubetune_trainer.generate import generate
from kubetune_trainer.hub import WeightReader
from kubetune_trainer.loop import SavedError, StopFlag
from kubetune_trainer.parallel import build
from kubetune_trainer.peft import adapter_disabled, trainable

Spawn = Callable[..., list[Any]]
Configure = Callable[..., RunConfig]

WIDE = {"hidden_size": 128, "intermediate_size": 320, "num_attention_heads": 4, "num_key_value_heads": 2}
EVERYWHERE = {"rank": 3, "alpha": 5, "target_modules": [*ALL_LINEAR, "embed_tokens", "lm_head"]}
CHECKPOINTED = {"precision": "FP32", "activation_checkpointing": "Full"}
CASES: dict[str, dict[str, Any]] = {
    "DoRA": {"method": "DoRA"},
    "QLoRA": {"method": "QLoRA"},
    "QDoRA, single quantization, checkpointing": {
        "method": "QDoRA",
        "quantization": {"double": False},
        "training": CHECKPOINTED,
    },
    "QLoRA, embedding and head too": {"method": "QLoRA", "adapter": EVERYWHERE},
}


def prepare(config: RunConfig) -> RunConfig:
    """The same run without checkpointing."""
    plain = config.training.model_copy(update={"activation_checkpointing": "None"})
    return config.model_copy(update={"training": plain})


def step_and_answer(world: World, config: RunConfig) -> dict[str, Any]:
    """A training step, and what the model answers before and after the adapter is switched off."""
    found = step(world, config) if config.adapter is None or "lm_head" not in config.adapter.target_modules else {}
    model = build(config, WeightReader(config.model.path), world)
    for parameter in trainable(model).values():
        parameter.detach().mul_(1.5).add_(0.01)
    ids, labels = batch()
    mine = slice(world.rank, None, world.size)
    loss = model(ids[mine], labels[mine])
    loss.backward()
    found["more loss"] = loss.item()
    found["answer"] = generate(model, [3, 14, 15, 9], 8, set(), world)
    with torch.no_grad():
        found["more logits"] = model(ids)
        with adapter_disabled(model):
            found["base"] = model(ids)
    return found


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES.keys())
def test_two_ranks_compute_what_one_computes(
    changes: dict[str, Any], llama_folder: Callable[..., Path], run_config: Configure, spawn: Spawn, alone: World
) -> None:
    config = run_config(llama_folder(**WIDE), **changes)
    expected = step_and_answer(alone, prepare(config))
    first, second = spawn(2, step_and_answer, config)
    for name, weight in expected.get("weights", {}).items():
        assert torch.equal(first["weights"][name], weight), name  # packed bytes and magnitudes too: not a bit differs
    for name, gradient in expected.get("gradients", {}).items():
        torch.testing.assert_close(first["gradients"][name], gradient, msg=name, **CLOSE)
    for name in ("more logits", "base"):
        torch.testing.assert_close(first[name], expected[name], **CLOSE)
    assert first["more loss"] + second["more loss"] == pytest.approx(expected["more loss"], rel=1e-5)
    assert first["answer"] == second["answer"] == expected["answer"]
    assert not torch.allclose(expected["more logits"], expected["base"], atol=1e-2)


def logits_in_bf16(world: World, config: RunConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """With a fresh adapter, and without."""
    model = build(config, WeightReader(config.model.path), world)
    with torch.no_grad():
        fresh = model(batch()[0])
        with adapter_disabled(model):
            return fresh, model(batch()[0])


@pytest.mark.parametrize("method", ["DoRA", "QDoRA"])
def test_a_magnitude_is_exact_beside_a_bf16_base(
    method: str, llama_folder: Callable[..., Path], run_config: Configure, spawn: Spawn, alone: World
) -> None:
    """Gathered in bf16 it would be up to 0.4 % off, and a fresh adapter would change the model."""
    config = run_config(llama_folder(**WIDE), method=method, training={"precision": "BF16"})
    alike = [logits_in_bf16(alone, config), *spawn(2, logits_in_bf16, config)]
    assert alike[0][0].dtype == torch.bfloat16
    assert all(torch.equal(one, alike[0][1]) for pair in alike for one in pair)


class StopAfter(StopFlag):
    """As if SIGTERM came in a step, counted from 1."""

    def __init__(self, step: int) -> None:
        self._left = step

    @property
    def requested(self) -> bool:  # type: ignore[override]
        self._left -= 1
        return self._left == 0


@pytest.mark.parametrize("method", ["DoRA", "QLoRA", "QDoRA"])
def test_a_resumed_run_has_the_bits_of_an_undisturbed_one(
    method: str, training_run: RunConfig, llama_folder: Callable[..., Path], alone: World
) -> None:
    """With dropout; the frozen weights are packed again at each start and are in no checkpoint."""
    changes = {
        "method": method,
        "model": {"path": str(llama_folder(**WIDE))},
        "training": {"max_steps": 6},
        "validation": None,
        "checkpoint": {"every_steps": 100},
    }
    config = RunConfig.model_validate(merge(training_run.model_dump(), changes))
    train.run(config, alone, StopFlag())
    stopped = config.model_copy(update={"output_dir": f"{config.output_dir}-stopped"})
    for taken in (2, 3):
        with pytest.raises(SavedError):
            train.run(stopped, alone, StopAfter(taken))
    train.run(stopped, alone, StopFlag())
    one, other = (Path(run.output_dir, "adapter", "adapter_model.safetensors") for run in (config, stopped))
    assert one.read_bytes() == other.read_bytes()
    (newest, *_) = sorted(Path(stopped.output_dir, "checkpoints").iterdir(), reverse=True)
    stored = FileSystemReader(newest).read_metadata().state_dict_metadata
    assert stored
    assert all(".lora_" in name for name in stored)
