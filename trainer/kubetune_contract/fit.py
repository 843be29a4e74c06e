"""Whether a run fits into the memory of its devices, and which settings would, told before the first step."""

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, NamedTuple

from pydantic import ValidationError

from kubetune_contract.architecture import LlamaSizes
from kubetune_contract.base import snake
from kubetune_contract.config import Method, RunConfig
from kubetune_contract.errors import in_words_of
from kubetune_contract.estimate import GIB, estimate
from kubetune_contract.exit_codes import ExitCode, JobError

_SMALLER: Final[Mapping[Method, Method]] = {"Full": "LoRA", "LoRA": "QLoRA", "DoRA": "QDoRA"}
_PROCESSES: Final = (2, 4, 8, 16, 32, 64)
_MOST_CHANGES: Final = 4
"""In one remedy."""
MARGIN: Final = 0.05
"""Share by which the closed form may be wrong: its test against traces allows so much."""
NO_REMEDY: Final = "no settings are enough: use larger devices, or a smaller model"


class DoesNotFitError(JobError):
    """The device's memory is too small for these settings, as the estimate says before the first step."""

    exit_code = ExitCode.DOES_NOT_FIT


class NoMemoryError(JobError):
    """The device's memory was too small after all."""

    exit_code = ExitCode.OUT_OF_MEMORY


class _Change(NamedTuple):
    """One thing that makes a run smaller."""

    text: str
    """What to do; fields in camelCase."""
    values: Mapping[str, Any]
    """Of sections of RunConfig, or of `method`."""
    processes: int = 0
    """0 leaves them."""

    @property
    def kind(self) -> str:
        """With more processes or shorter rows than needed nothing new is said."""
        return "processes" if self.processes else " ".join(self.values)


def _processes(count: int) -> str | None:
    return f"use {count} processes"


def check_memory(
    config: RunConfig, architecture: LlamaSizes, processes: int, per_node: int, *, memory: int, longest: int
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


def relief(config: RunConfig, processes: int, count: int = 3) -> str:
    """The simplest changes that need less memory than these settings, for a run that has just met the limit."""
    kinds: dict[str, str] = {}
    for change in _changes(config, processes, _processes):
        if _changed(config, (change,)) is not None:
            kinds.setdefault(change.kind, change.text)
    ways = list(kinds.values())[:count]
    return in_words_of(", or ".join(ways), snake) if ways else NO_REMEDY


def remedies(
    config: RunConfig,
    architecture: LlamaSizes,
    processes: int,
    per_node: int,
    memory: int,
    *,
    spell: Callable[[str], str] = snake,
    gang: Callable[[int], str | None] = _processes,
) -> Iterator[str]:
    """Changes with which the run fits, the simplest first; none contains another.

    `spell` spells the fields; `gang` says how to have so many processes, None where that is no choice.
    """
    told: list[set[str]] = []
    changes = list(_changes(config, processes, gang))
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
                words = in_words_of(" and ".join(change.text for change in chosen), spell)
                yield f"{words} ({needed.needed / GIB:.1f} GiB)"


def _changes(config: RunConfig, processes: int, gang: Callable[[int], str | None]) -> Iterator[_Change]:
    training, dataset = config.training, config.dataset
    if training.activation_checkpointing != "Full":
        yield _Change("set training.activationCheckpointing to Full", {"training.activation_checkpointing": "Full"})
    if config.method in _SMALLER:
        method = _SMALLER[config.method]
        yield _Change(f"set method to {method}", {"method": method})
    if config.method == "Full" and training.optimizer == "AdamW":
        yield _Change("set training.optimizer to AdamW8bit", {"training.optimizer": "AdamW8bit"})
    if training.batch_size > 1:
        steps = training.gradient_accumulation_steps * training.batch_size
        yield _Change(
            f"set training.batchSize to 1 and training.gradientAccumulationSteps to {steps}",
            {"training.batch_size": 1, "training.gradient_accumulation_steps": steps},
        )
    if training.sharding == "Full":
        for count in _PROCESSES:
            if count > processes and (text := gang(count)) is not None:
                yield _Change(text, {}, count)
    for length in (2048, 1024, 512):
        if length < dataset.max_sequence_length:
            yield _Change(f"set dataset.maxSequenceLength to {length}", {"dataset.max_sequence_length": length})
    if not training.cpu_offload:
        yield _Change("set training.cpuOffload to true", {"training.cpu_offload": True})


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
