"""A whole run on preferences: what it learns, what it tells, and that ranks do not change it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from kubetune_contract.config import RunConfig
from kubetune_trainer import train
from kubetune_trainer.distributed import World
from kubetune_trainer.report import read_metrics


@pytest.fixture
def config(training_run: RunConfig, tmp_path: Path) -> RunConfig:
    """Right sums are preferred to wrong ones; answers differ in length."""
    rows = [
        {"prompt": f"{a}+{b}?", "chosen": f"{a + b}.", "rejected": f"{a * b + 20} or so."}
        for a in range(1, 8)
        for b in range(1, 7)
    ]
    for name, part in (("train", rows[:36]), ("held-out", rows[36:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    values = training_run.model_dump()
    values["dataset"] |= {"format": "Preference"}
    values["validation"] |= {"samples": 0}
    values["adapter"] |= {"dropout": 0.0}
    values["training"] |= {"max_steps": 8}
    return RunConfig.model_validate(values | {"dpo": {"beta": 0.2}})


def run_as_rank(world: World, config: RunConfig) -> None:
    train.run(config, world, train.StopFlag())


def metrics_of(config: RunConfig) -> list[dict[str, Any]]:
    """Without what depends on the clock."""
    lines = read_metrics(Path(config.output_dir) / "metrics.jsonl")
    return [{k: v for k, v in line.items() if k != "time" and not k.endswith("_per_second")} for line in lines]


def test_a_run_learns_what_is_preferred(config: RunConfig, alone: World) -> None:
    result = train.run(config, alone, train.StopFlag())
    before, *steps, after = metrics_of(config)
    assert before["validation_loss"] == pytest.approx(0.693147, abs=1e-6)  # log 2: the model is its own reference
    assert after["validation_loss"] < 0.5
    first, last = (step for step in (steps[0], steps[-1]))
    assert (first["reward_chosen"], first["reward_rejected"], first["reward_accuracy"]) == (0, 0, 0)
    assert last["reward_chosen"] > last["reward_rejected"]
    assert last["reward_accuracy"] == 1
    assert result.adapter_path == "adapter"


def test_two_ranks_take_the_steps_of_one(
    config: RunConfig, alone: World, spawn: Callable[..., list[Any]], tmp_path: Path
) -> None:
    """Sums over ranks are rounded in another order: 1e-5."""
    train.run(config, alone, train.StopFlag())
    training = config.training.model_copy(update={"gradient_accumulation_steps": 1})
    split = config.model_copy(update={"training": training, "output_dir": str(tmp_path / "two")})
    spawn(2, run_as_rank, split)
    for one, two in zip(metrics_of(config), metrics_of(split), strict=True):
        assert one == pytest.approx(two, abs=1e-5)
    adapters = [load_file(Path(each.output_dir, "adapter/adapter_model.safetensors")) for each in (config, split)]
    for name, tensor in adapters[0].items():
        torch.testing.assert_close(tensor, adapters[1][name], rtol=1e-4, atol=1e-5, msg=name)
