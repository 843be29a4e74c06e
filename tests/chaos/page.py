"""docs/chaos.md: of each kind of fault, how many runs it hit and what came of them. Pure functions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from statistics import median

from tests.chaos.catalogue import FAULTS
from tests.chaos.fault import DONE, Fault, Run
from tests.drills.runner import Report
from tests.drills.table import escaped, first_words

HEAD = """\
# Chaos

Many short jobs on a real node, four at a time, with one or two workers each, and faults drawn from a seed that hit
them: `make chaos` does all of this on the embedded cluster, with the chart installed, and writes this page. Each job is
the target of one fault; a fault of the operator, of the API server or of etcd hits all jobs that run at that moment.

Last run: {date}, {faults} faults, seed {seed}, {minutes:.0f} minutes. Again: `make chaos FAULTS={faults} SEED={seed}`.

A run has survived if it ended in the right state, for the right reason, with exactly the restarts and disruptions of
the table, holding no pod, and, where it succeeded, with an adapter whose weights are those of an undisturbed run, bit
for bit. Otherwise it is lost. The seconds are those from the fault to the end of the job.
"""
COLUMNS = (
    "| case | the right end | runs | survived | lost | median seconds to the end |\n"
    "| --- | --- | ---: | ---: | ---: | ---: |\n"
)
GAPS = """
## What is not covered

- A node that is lost, or cut off from the API server: there is one node. The [drills](drills.md) do it with a Node that
  is only an object.
- A clock that jumps: the node's clock is that of everybody who works there.
- Delay and reordering of packets: they take the kernel's `netem`. Packets are dropped by `iptables` and held back by
  `tc`'s token bucket in a pod's network namespace instead.
- A power failure: etcd runs without fsync here, and files that were written are in the kernel's cache when a process is
  killed.
- GPUs.
"""


@dataclass(frozen=True)
class Told:
    """What is to be told of all runs together."""

    seed: int
    faults: int
    day: date
    seconds: float
    orphans: Sequence[str]
    """What was left when all FineTuneJobs were gone."""


@dataclass(frozen=True)
class Outcome:
    """What came of a run."""

    run: Run
    problem: str
    """Empty if it survived."""
    seconds: float


def outcomes(runs: Sequence[Run], reports: Sequence[Report], digests: Mapping[str, str]) -> list[Outcome]:
    """Judge every run: what its drill has found, and its weights beside those of the undisturbed run."""
    return [
        Outcome(run, report.problem or _differs(run, digests), report.rows[-1].seconds if report.rows else 0)
        for run, report in zip(runs, reports, strict=True)
    ]


def compares(run: Run) -> bool:
    """Whether a run must have the weights of the undisturbed one."""
    return run.fault is None or run.fault.end is DONE


def _differs(run: Run, digests: Mapping[str, str]) -> str:
    if not compares(run):
        return ""
    own, calm = digests.get(run.drill.name), digests.get(run.like)
    if calm is None:
        return f"there are no weights of {run.like} to compare with"
    return "" if own == calm else f"its weights are {own}, those of {run.like} are {calm}"


def page(told: Told, outcomes: Sequence[Outcome]) -> str:
    """The whole page."""
    head = HEAD.format(date=told.day, faults=told.faults, seed=told.seed, minutes=told.seconds / 60)
    return f"{head}\n## Faults\n\n{COLUMNS}{_rows(outcomes)}{_left(told)}{_lost(outcomes)}{GAPS}"


def _rows(outcomes: Sequence[Outcome]) -> str:
    """Every kind, also one that was not drawn; first the undisturbed runs."""
    return "".join(_row(fault, [one for one in outcomes if one.run.fault is fault]) for fault in (None, *FAULTS))


def _row(fault: Fault | None, found: Sequence[Outcome]) -> str:
    case, must = (fault.case, fault.must) if fault else ("nothing happens", "Succeeded")
    lost = sum(bool(outcome.problem) for outcome in found)
    seconds = f"{median(outcome.seconds for outcome in found):.0f}" if found else ""
    return f"| {escaped(case)} | {must} | {len(found)} | {len(found) - lost} | {lost} | {seconds} |\n"


def _left(told: Told) -> str:
    if not told.orphans:
        return "\nAfterwards, no Job, no pod, no Service and no ConfigMap of theirs was left.\n"
    return f"\n**Left behind:** {', '.join(told.orphans)}.\n"


def _lost(outcomes: Sequence[Outcome]) -> str:
    lost = [outcome for outcome in outcomes if outcome.problem]
    if not lost:
        return ""
    lines = [
        f"| {one.run.drill.name} | {escaped(_done(one))} | {escaped(first_words(one.problem))} |\n" for one in lost
    ]
    return f"\n## Lost runs\n\n| run | what was done | what was wrong |\n| --- | --- | --- |\n{''.join(lines)}"


def _done(outcome: Outcome) -> str:
    return outcome.run.drill.acts[0].done


def summary(told: Told, outcomes: Sequence[Outcome]) -> str:
    """For the terminal: what was lost, then how many were not."""
    lost = [outcome for outcome in outcomes if outcome.problem]
    lines = [f"{one.run.drill.name}: {_done(one)}\n  {one.problem}" for one in lost]
    lines += [f"left behind: {', '.join(told.orphans)}"] * bool(told.orphans)
    survived = len(outcomes) - len(lost)
    return "\n".join([*lines, f"seed {told.seed}: {survived} of {len(outcomes)} runs survived, {told.seconds:.0f} s"])
