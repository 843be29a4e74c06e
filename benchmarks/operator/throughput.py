"""How many jobs per second one replica carries through their whole lives.

First as many jobs are under way all the time as keep everybody busy: how many end per second is what can be carried at
most. Then jobs come at nearly that rate, whether others have ended or not: a rate is sustained if they do not pile up.
"""

import asyncio
import time
from typing import Final, NamedTuple

from benchmarks.figures import Table
from benchmarks.operator.case import Outcome, Size, middle, repeat, shares, tell
from benchmarks.operator.field import OURS, Field, spent
from benchmarks.operator.load import Load
from benchmarks.operator.usage import Share
from tests.integration.operator.conftest import Operator

COMMAND: Final = "python -m benchmarks.operator --only throughput"
IN_FLIGHT: Final = 150
"""Jobs under way that keep everybody busy: a life is 4 s long even where nobody waits for a processor."""
SLOWER: Final = 0.95
"""Share of the rate before that is offered next."""
TRIES: Final = 4
MOST_GROWTH: Final = 0.05
"""Share of the offered jobs by which those under way may be more in the end than half-way, to be no growth."""


class Run(NamedTuple):
    """One run."""

    carried: float
    """Jobs that ended per second while as many as possible were under way."""
    sustained: float
    """Jobs per second that came, and did not pile up."""
    waiting: tuple[int, ...]
    """Jobs under way after each quarter of the time in which they came."""
    share: Share

    def __repr__(self) -> str:
        """For who waits."""
        return f"{self.sustained:.1f} jobs/s, under way {self.waiting}, at most {self.carried:.1f} jobs/s"


async def throughput(field: Field, size: Size) -> Outcome:
    """The largest rate at which jobs do not pile up."""
    outcome, namespace = Outcome(), field.namespace()
    with field.running(namespace) as operator:
        async with field.load(namespace) as load:
            await load.submit()  # the first does everything for the first time
            await load.all_ended()
            runs = await repeat("throughput", size, outcome, lambda: _run(field, size, operator, load))
    outcome.values["sustained"] = [run.sustained for run in runs]
    rows = [
        (f"run {number}", f"{run.sustained:.1f}", ", ".join(map(str, run.waiting)), *shares([run.share]))
        for number, run in enumerate(runs, 1)
    ]
    rows.append(("at most, jobs always waiting", middle([run.carried for run in runs]), *[""] * (1 + len(OURS))))
    outcome.tables["operator-3-sustained"] = Table(
        title="Sustained jobs per second, and who uses the cores",
        note=f"At that rate jobs of one worker come for {size.seconds:.0f} s, and those under way become no more. All "
        "parts share the machine's cores; the benchmark plays the users and the kubelets.",
        columns=("", "jobs/s", "under way at 1/4, 2/4, 3/4, 4/4", *(f"{name}, cores" for name in OURS)),
        rows=tuple(rows),
        command=COMMAND,
    )
    return outcome


async def _run(field: Field, size: Size, operator: Operator, load: Load) -> tuple[Run, Share]:
    ended, begun = len(load.ended), time.monotonic()
    await load.keep_going(IN_FLIGHT, size.seconds)
    carried = rate = (len(load.ended) - ended) / (time.monotonic() - begun)
    await load.all_ended()
    for _ in range(TRIES):
        rate *= SLOWER
        before = field.look(operator)
        waiting = await _offered(load, rate, size.seconds)
        share = spent(field, before, operator)
        await load.all_ended()
        if not grows(waiting, round(rate * size.seconds)):
            return Run(carried, rate, waiting, share), share
        tell(f"throughput: {rate:.1f} jobs/s are too many, under way {waiting}; others: {share.foreign:.2f} cores")
    raise RuntimeError(f"jobs pile up at {rate:.1f} jobs/s, although {carried:.1f} jobs/s ended before")


async def _offered(load: Load, rate: float, seconds: float) -> tuple[int, ...]:
    """Let jobs come; those under way after each quarter."""
    waiting: list[int] = []
    coming = asyncio.create_task(load.submit_at(rate, round(rate * seconds)))
    for _ in range(4):
        await asyncio.sleep(seconds / 4)
        waiting.append(len(load.sent) - len(load.ended))
    await coming
    return tuple(waiting)


def grows(waiting: tuple[int, ...], offered: int) -> bool:
    """Whether jobs pile up, by those under way after each quarter of the time."""
    return waiting[3] - waiting[1] > MOST_GROWTH * offered
