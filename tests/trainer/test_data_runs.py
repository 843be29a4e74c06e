"""Whole runs on every shape of data: packed, mixed and held out by a fraction, from the hub; stopped and gone on."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from kubetune_contract.config import RunConfig
from kubetune_contract.presets import merge
from kubetune_trainer import train
from kubetune_trainer.cache import cache_folder
from kubetune_trainer.claim import OtherRunError
from kubetune_trainer.data import Dataset, load_data
from kubetune_trainer.distributed import World
from kubetune_trainer.hub import WeightReader
from kubetune_trainer.loop import SavedError, StopFlag
from kubetune_trainer.parallel import build
from kubetune_trainer.report import read_metrics
from kubetune_trainer.tokenizer import Tokenizer

from .hub_server import REPO, redirect, serve


def changed(config: RunConfig, **overrides: Any) -> RunConfig:
    return RunConfig.model_validate(merge(config.model_dump(), overrides))


def stopped(config: RunConfig, world: World) -> None:
    """The run until its first step is done."""
    stop = StopFlag()
    stop.requested = True
    with pytest.raises(SavedError):
        train.run(config, world, stop)


def write_instructions(path: Path) -> dict[str, Any]:
    rows = [{"input": f"{a}*{b}?", "output": f"{a * b}."} for a in range(6) for b in range(5)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"path": str(path), "format": "Instruct"}


@pytest.fixture
def mixed(training_run: RunConfig, tmp_path: Path) -> RunConfig:
    """Sums, and half of the products in each epoch, packed; a fifth of both is held out."""
    other = write_instructions(tmp_path / "products.jsonl") | {"weight": 0.5}
    dataset = training_run.dataset.model_dump() | {"packed": True, "mixture": [other]}
    validation = {"path": None, "fraction": 0.2, "samples": 2, "sample_tokens": 3}
    return changed(training_run, dataset=dataset, validation=validation, training={"epochs": 3})


def outcome(config: RunConfig) -> tuple[list[Any], dict[str, torch.Tensor]]:
    folder = Path(config.output_dir)
    lines = read_metrics(folder / "metrics.jsonl")
    losses = [[line.get(name) for name in ("step", "loss", "validation_loss", "tokens")] for line in lines]
    return losses, load_file(folder / "adapter" / "adapter_model.safetensors")


def test_a_packed_mixture_that_was_stopped_goes_on_to_the_same_bits(
    mixed: RunConfig, alone: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    undisturbed = changed(mixed, output_dir=str(tmp_path / "undisturbed"))
    result = train.run(undisturbed, alone, StopFlag())
    assert result.steps > 3
    said = capsys.readouterr().out
    assert "train.jsonl, " in said
    assert "products.jsonl: 78 conversations; 79% of them here (validation.fraction)" in said
    assert "packed into " in said
    stopped(mixed, alone)
    train.run(mixed, alone, StopFlag())
    (losses, adapter), (expected, expected_adapter) = outcome(mixed), outcome(undisturbed)
    assert losses == expected
    assert all(torch.equal(adapter[name], expected_adapter[name]) for name in expected_adapter)


def test_a_held_out_part_belongs_to_the_run(mixed: RunConfig, alone: World) -> None:
    stopped(mixed, alone)
    with pytest.raises((OtherRunError, train.SharedError), match=r"validation was 0\.2, now 0\.3"):
        train.run(changed(mixed, validation={"fraction": 0.3}), alone, StopFlag())


def loss_sum(model: Any, data: Dataset) -> tuple[float, np.ndarray]:
    """The summed loss of all rows, and the gradient of the embedding."""
    model.zero_grad()
    total = torch.zeros(())
    for row in range(len(data)):
        input_ids, labels, lengths = data.batch([row])
        total = total + model(input_ids, labels, lengths=lengths)
    total.backward()  # type: ignore[no-untyped-call]
    return total.item(), model.model.embed_tokens.weight.grad.numpy().copy()


def test_packed_documents_teach_what_they_teach_apart(training_run: RunConfig, alone: World) -> None:
    config = changed(training_run, method="Full", adapter=None, dataset={"max_sequence_length": 64})
    tokenizer, cache = Tokenizer.from_folder(Path(config.model.path)), cache_folder(Path(config.output_dir))
    apart = load_data(config, tokenizer, cache, {}).training
    packed = load_data(changed(config, dataset={"packed": True}), tokenizer, cache, {}).training
    assert len(packed) == len(apart) / 3
    model = build(config, WeightReader(config.model.path), alone)
    (loss, gradient), (expected, expected_gradient) = loss_sum(model, packed), loss_sum(model, apart)
    # float32 sums of some hundred terms in another order
    assert loss == pytest.approx(expected, rel=1e-5)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-4, atol=1e-5)


def test_a_run_on_data_of_the_hub_goes_on_without_the_hub(
    training_run: RunConfig, alone: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "repo").mkdir()
    Path(training_run.dataset.path or "").rename(tmp_path / "repo" / "train.jsonl")
    with serve(tmp_path / "repo") as hub:
        redirect(monkeypatch, hub, tmp_path)
        config = changed(training_run, dataset={"path": None, "repo": REPO}, training={"max_steps": 2})
        stopped(config, alone)
        assert dict(hub.downloads) == {"train.jsonl": 1}
        hub.broken = True
        assert train.run(config, alone, StopFlag()).steps == 2
