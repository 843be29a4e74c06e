"""Metrics for TensorBoard and for Weights & Biases. Both packages are imported only where they are wished."""

import importlib.util
import os
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any, Final, Protocol

from kubetune_contract.config import LoggingConfig, RunConfig
from kubetune_contract.errors import ConfigError
from kubetune_contract.exit_codes import ExitCode, JobError
from kubetune_contract.paths import TENSORBOARD_DIR
from kubetune_trainer.distributed import World

KEY_ENV: Final = "WANDB_API_KEY"
_OFFLINE: Final = frozenset({"offline", "dryrun", "disabled"})
"""Values of WANDB_MODE with which no key is needed."""


class LoggerError(JobError):
    """A service for metrics cannot be reached. A retry may help."""

    exit_code = ExitCode.SOURCE_UNAVAILABLE


class Logger(Protocol):
    """Takes numbers by step."""

    def begin(self, step: int) -> None:
        """The run goes on after `step` steps; what was logged past it is done again."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers after `step` steps."""

    def close(self) -> None:
        """Everything is logged."""


def check_loggers(options: LoggingConfig) -> None:
    """Raises ConfigError where a package or a key is missing, all problems at once."""
    problems = []
    if options.tensorboard and importlib.util.find_spec("tensorboard") is None:
        problems.append("logging.tensorboard needs the package tensorboard: install kubetune[logging]")
    if options.wandb_project is not None:
        if importlib.util.find_spec("wandb") is None:
            problems.append("logging.wandb_project needs the package wandb: install kubetune[logging]")
        if not os.environ.get(KEY_ENV) and os.environ.get("WANDB_MODE") not in _OFFLINE:
            problems.append(
                f"logging.wandb_project needs your key in the environment variable {KEY_ENV} "
                "(or WANDB_MODE=offline, which keeps the metrics in the output folder)"
            )
    if problems:
        raise ConfigError(problems)


def make_loggers(config: RunConfig, folder: Path, world: World, started: str) -> list[Logger]:
    """The loggers of rank 0. `started` is when the run was first started: its attempts share a name."""
    if not world.is_main:
        return []
    loggers: list[Logger] = []
    if config.logging.tensorboard:
        loggers.append(TensorBoard(folder / TENSORBOARD_DIR))
    if config.logging.wandb_project is not None:
        loggers.append(WeightsAndBiases(config, config.logging.wandb_project, folder, started))
    return loggers


class TensorBoard:
    """Event files in a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writer: Any = None

    def begin(self, step: int) -> None:
        """TensorBoard is told to forget what an earlier attempt wrote past `step`."""
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(self._folder), purge_step=step + 1 if step else None)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """One scalar for each value."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Writes what is waiting."""
        if self._writer is not None:
            self._writer.close()


class WeightsAndBiases:
    """A run in a project of Weights & Biases; a restarted attempt goes on with it."""

    def __init__(self, config: RunConfig, project: str, folder: Path, started: str) -> None:
        self._config, self._project, self._folder = config, project, folder
        self._id = sha256(f"{folder.resolve()} {started}".encode()).hexdigest()[:16]
        self._run: Any = None

    def begin(self, step: int) -> None:  # noqa: ARG002 - wandb counts itself
        """Steps that are done again have the same values: the service keeps the first of each."""
        import wandb

        try:
            self._run = wandb.init(
                project=self._project,
                id=self._id,
                name=self._folder.name,
                resume="allow",
                dir=str(self._folder),
                config=self._config.to_dict(),
                settings=wandb.Settings(silent=True, console="off"),
            )
        except wandb.Error as error:
            raise LoggerError(f"Weights & Biases does not take the run: {error}") from error

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """One row."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """Waits until everything has been sent."""
        if self._run is not None:
            self._run.finish()
