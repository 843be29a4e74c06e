"""What `tune run` does besides training: single tasks, each with a closed configuration of its own."""

from collections.abc import Callable
from typing import Any, Final, NamedTuple

from kubetune_contract.base import ContractModel


class Task(NamedTuple):
    """One task. Importing this module is cheap: what needs torch is imported by `run`."""

    name: str
    """As `tune run` takes it."""
    model: type[ContractModel]
    """Its configuration."""
    run: Callable[[Any], int]
    """From a complete configuration to an exit code (kubetune_contract.exit_codes). Raises JobError."""
    configs: tuple[str, ...]
    """The shipped configurations that go with it (kubetune_contract.presets.config_names)."""


TASKS: Final[dict[str, Task]] = {}
