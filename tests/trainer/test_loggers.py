"""TensorBoard and Weights & Biases get what metrics.jsonl gets."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from kubetune_contract.config import LoggingConfig, RunConfig
from kubetune_contract.errors import ConfigError
from kubetune_trainer.distributed import World
from kubetune_trainer.loggers import TensorBoard, check_loggers, make_loggers
from kubetune_trainer.report import Reporter, Step

MISSING: dict[str, tuple[LoggingConfig, list[str]]] = {
    "nothing is wished": (LoggingConfig(), []),
    "no tensorboard": (
        LoggingConfig(tensorboard=True),
        ["logging.tensorboard needs the package tensorboard: install kubetune[logging]"],
    ),
    "no wandb and no key": (
        LoggingConfig(wandb_project="p"),
        [
            "logging.wandb_project needs the package wandb: install kubetune[logging]",
            "logging.wandb_project needs your key in the environment variable WANDB_API_KEY "
            "(or WANDB_MODE=offline, which keeps the metrics in the output folder)",
        ],
    ),
}


@pytest.mark.parametrize("case", MISSING)
def test_a_missing_package_or_key_is_named(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options, expected = MISSING[case]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    problems: tuple[str, ...] = ()
    try:
        check_loggers(options)
    except ConfigError as error:
        problems = error.problems
    assert list(problems) == expected


@pytest.mark.parametrize(("name", "value"), [("WANDB_API_KEY", "k"), ("WANDB_MODE", "offline")])
def test_with_a_key_or_offline_wandb_can_start(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv(name, value)
    check_loggers(LoggingConfig(wandb_project="p"))


def test_only_rank_0_logs_and_neither_package_is_imported_before(run_config: Any, tmp_path: Path) -> None:
    config: RunConfig = run_config(tmp_path, logging={"tensorboard": True, "wandb_project": "p"})
    before = set(sys.modules)
    world = World(0, 2, 0, torch.device("cpu"))
    assert len(make_loggers(config, tmp_path, world, "today")) == 2
    assert make_loggers(config, tmp_path, World(1, 2, 1, torch.device("cpu")), "today") == []
    assert not {"tensorboard", "wandb"} & (set(sys.modules) - before)


def report(folder: Path, world: World, first: int, last: int) -> None:
    loggers = [TensorBoard(folder / "tensorboard")]
    with Reporter(folder, world, 4, 2, loggers=loggers) as reporter:
        reporter.rewind(first - 1)
        reporter.begin(first - 1)
        for number in range(first, last + 1):
            reporter.step(Step(number, 1.0 / number, 1e-3, 0.5, tokens=100, label_tokens=40))
        reporter.validation(last, 0.25)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_reads_every_step_once_after_a_restart(tmp_path: Path, alone: World) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    report(tmp_path, alone, 1, 3)
    report(tmp_path, alone, 3, 4)
    reader = events.EventAccumulator(str(tmp_path / "tensorboard"))
    reader.Reload()
    assert {"loss", "learning_rate", "tokens_per_second", "label_tokens_per_second"} <= set(reader.Tags()["scalars"])
    assert [(point.step, round(point.value, 4)) for point in reader.Scalars("loss")] == [
        (1, 1.0),
        (2, 0.5),
        (3, 0.3333),
        (4, 0.25),
    ]
    assert [point.step for point in reader.Scalars("validation_loss")] == [4]
