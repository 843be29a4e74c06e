"""Whether a run fits into the memory of its devices, and which settings would, told before the first step."""

import itertools
from collections.abc import Iterator, Mapping
from typing import Any, Final, NamedTuple

from pydantic import ValidationError

from kubetune_contract.config import Method, RunConfig
from kubetune_contract.exit_codes import ExitCode, JobError
from kubetune_trainer.architecture import LlamaConfig
from kubetune_trainer.estimate import GIB, estimate

_SMALLER: Final[Mapping[Method, Method]] = {"Full": "LoRA", "LoRA": "QLoRA", "DoRA": "QDoRA"}
_PROCESSES: Final = (2, 4, 8, 16, 32, 64)
_MOST_CHANGES: Final = 4
"""In one remedy."""
_LENGTH: Final = "dataset.max_sequence_length"
NO_REMEDY: Final = "no settings are enough: use larger devices, or a smaller model"


class DoesNotFitError(JobError):
    """The device's memory is too small for these settings."""

    exit_code = ExitCode.DOES_NOT_FIT


class _Change(NamedTuple):
    """One thing that makes a run smaller."""

    text: str
    """Follows the verb `set` or, for processes, `use`."""
    values: Mapping[str, Any]
    """Of sections of RunConfig, or of `method`."""
    processes: int = 0
    """0 leaves them."""

    @property
    def kind(self) -> str:
        """With more processes or shorter rows than needed nothing new is said."""
        return "processes" if self.processes else " ".join(self.values)


def check_memory(
    config: RunConfig, architecture: LlamaConfig, processes: int, per_node: int, *, memory: int, longest: int
) -> None:
    """Raises DoesNotFitError for devices of `memory` bytes. `longest`: tokens of the longest sample of the data."""
    known = min(config.dataset.max_sequence_length, longest)
    config = config.model_copy(update={"dataset": config.dataset.model_copy(update={"max_sequence_length": known})})
    needed = estimate(config, architecture, processes, per_node)
    if needed.fits(memory):
        return
    ways = list(itertools.islice(remedies(config, architecture, processes, per_node, memory), 2))
    raise DoesNotFitError(
        f"a step needs {needed.needed / GIB:.1f} GiB of memory on each device, but the device has {memory / GIB:.1f}: "
        + (", or ".join(ways) or NO_REMEDY)
    )


def remedies(config: RunConfig, architecture: LlamaConfig, processes: int, per_node: int, memory: int) -> Iterator[str]:
    """Changes with which the run fits, the simplest first; none contains another."""
    told: list[set[str]] = []
    changes = list(_changes(config, processes))
    for count in range(1, _MOST_CHANGES + 1):
        for chosen in itertools.combinations(changes, count):
            kinds = {change.kind for change in chosen}
            if len(kinds) < count or any(known <= kinds for known in told):
                continue
            if (smaller := _changed(config, chosen)) is None:
                continue
            ranks = max(processes, *(change.processes for change in chosen))
            needed = estimate(smaller, architecture, ranks, per_node)
            if needed.fits(memory):
                told.append(kinds)
                yield f"{' and '.join(change.text for change in chosen)} ({needed.needed / GIB:.1f} GiB)"


def _changes(config: RunConfig, processes: int) -> Iterator[_Change]:
    training, dataset = config.training, config.dataset
    if training.activation_checkpointing != "Full":
        yield _Change("set training.activation_checkpointing to Full", {"training.activation_checkpointing": "Full"})
    if config.method in _SMALLER:
        method = _SMALLER[config.method]
        yield _Change(f"set method to {method}", {"method": method})
    if config.method == "Full" and training.optimizer == "AdamW":
        yield _Change("set training.optimizer to AdamW8bit", {"training.optimizer": "AdamW8bit"})
    if training.batch_size > 1:
        steps = training.gradient_accumulation_steps * training.batch_size
        yield _Change(
            f"set training.batch_size to 1 and training.gradient_accumulation_steps to {steps}",
            {"training.batch_size": 1, "training.gradient_accumulation_steps": steps},
        )
    if training.sharding == "Full":
        for count in _PROCESSES:
            if count > processes:
                yield _Change(f"use {count} processes", {}, count)
    for length in (2048, 1024, 512):
        if length < dataset.max_sequence_length:
            yield _Change(f"set {_LENGTH} to {length}", {_LENGTH: length})
    if not training.cpu_offload:
        yield _Change("set training.cpu_offload to true", {"training.cpu_offload": True})


def _changed(config: RunConfig, changes: tuple[_Change, ...]) -> RunConfig | None:
    """None if a rule forbids it."""
    values = config.model_dump()
    for change in changes:
        for path, value in change.values.items():
            section, _, name = path.rpartition(".")
            (values[section] if section else values)[name] = value
    try:
        return RunConfig.model_validate(values)
    except ValidationError:
        return None
