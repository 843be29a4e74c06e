"""What a case is: how much of it is done, what it found, and how its noisy runs are made again."""

import math
import statistics
import sys
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Final, TypeVar

from benchmarks.figures import Table
from benchmarks.harness import BusyError
from benchmarks.operator.field import FOREIGN, OURS
from benchmarks.operator.usage import Share

Found = TypeVar("Found")

RATE: Final = 20.0
"""Jobs per second at which latency and costs are measured."""


@dataclass(frozen=True)
class Size:
    """How much is done."""

    runs: int
    """Of each figure."""
    jobs: int
    """Of one run of the latency."""
    seconds: float
    """Of one window of the throughput and of the progress reports."""
    populations: tuple[int, ...]
    """FineTuneJobs at which memory is looked at."""
    reporting: int
    """Which of them is the one whose jobs report progress."""
    judged: bool
    """Whether noisy runs are made again."""

    @property
    def most_tries(self) -> int:
        """How often a run is made in all."""
        return 3 * self.runs if self.judged else self.runs


FULL: Final = Size(3, 250, 20.0, (100, 1000, 5000), 1000, True)
QUICK: Final = Size(1, 20, 5.0, (5, 20), 20, False)


@dataclass
class Outcome:
    """What a case has found."""

    values: dict[str, list[float]] = field(default_factory=dict)
    """The runs of each figure, by its key in the aims."""
    tables: dict[str, Table] = field(default_factory=dict)
    foreign: list[float] = field(default_factory=list)
    """Cores that others used, of each run."""


async def repeat(
    what: str, size: Size, outcome: Outcome, once: Callable[[], Awaitable[tuple[Found, Share]]]
) -> list[Found]:
    """Make the runs of a measurement; those that others disturbed are made again.

    Raises BusyError where the machine is never quiet.
    """
    found: list[Found] = []
    for _ in range(size.most_tries):
        value, share = await once()
        noisy = size.judged and share.foreign > FOREIGN
        tell(f"{what}: {value}; others: {share.foreign:.2f} cores{', made again' if noisy else ''}")
        if noisy:
            continue
        found.append(value)
        outcome.foreign.append(share.foreign)
        if len(found) == size.runs:
            return found
    raise BusyError(f"{what}: others used more than {FOREIGN} cores in {size.most_tries - len(found)} runs: stop them")


def tell(text: str) -> None:
    """A line for who waits."""
    print(text, file=sys.stderr, flush=True)


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that so many percent of the values do not exceed."""
    return sorted(values)[max(0, math.ceil(percent / 100 * len(values)) - 1)]


def middle(values: Sequence[float], digits: int = 1) -> str:
    """The median, as text."""
    return f"{statistics.median(values):,.{digits}f}"


def shares(found: Sequence[Share]) -> tuple[str, ...]:
    """Cores of each group of processes, the medians, as texts in the order of OURS."""
    return tuple(middle([share.cores(name) for share in found], 2) for name in OURS)
