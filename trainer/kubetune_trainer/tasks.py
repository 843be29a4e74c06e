"""What `tune run` does besides training: single tasks, each with a closed configuration of its own."""

from collections.abc import Callable
from typing import Any, Final, NamedTuple

from kubetune_contract.base import ContractModel
from kubetune_trainer.task_config import EvaluationConfig, GenerationConfig, MergeConfig, QuantizeConfig


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


def _generate(config: GenerationConfig) -> int:
    from kubetune_trainer import answer

    return answer.run(config)


def _evaluate(config: EvaluationConfig) -> int:
    from kubetune_trainer import evaluate

    return evaluate.run(config)


def _quantize(config: QuantizeConfig) -> int:
    from kubetune_trainer import convert

    return convert.quantize(config)


def _merge(config: MergeConfig) -> int:
    from kubetune_trainer import convert

    return convert.merge(config)


TASKS: Final[dict[str, Task]] = {
    task.name: task
    for task in (
        Task("generate", GenerationConfig, _generate, ("generation",)),
        Task("evaluate", EvaluationConfig, _evaluate, ("evaluation",)),
        Task("quantize", QuantizeConfig, _quantize, ("quantization",)),
        Task("merge", MergeConfig, _merge, ("merge",)),
    )
}
