"""What a run will read on this machine, looked for before any process starts."""

from collections.abc import Iterator
from pathlib import Path

from kubetune_contract.config import RunConfig
from kubetune_contract.errors import ConfigError
from kubetune_contract.exit_codes import JobError
from kubetune_trainer.hub import check_model, missing_path


def check_files(config: RunConfig) -> None:
    """Raises ConfigError with everything that is missing. Of weights only the headers are read."""
    problems = []
    try:
        check_model(Path(config.model.path))
    except JobError as error:
        problems.append(f"model.path: {error}")
    problems += [f"{key}: {missing_path(path)}" for key, path in _data_paths(config) if not path.exists()]
    if problems:
        raise ConfigError(problems)


def _data_paths(config: RunConfig) -> Iterator[tuple[str, Path]]:
    named = [("dataset", config.dataset.path)]
    named += [(f"dataset.mixture.{number}", other.path) for number, other in enumerate(config.dataset.mixture)]
    named += [("validation", config.validation.path if config.validation else None)]
    yield from ((f"{section}.path", Path(path)) for section, path in named if path is not None)
