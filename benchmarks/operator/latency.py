"""Submit to child Job, and what a job's life costs, at a rate that the cores can bear."""

from collections import Counter
from typing import Final, NamedTuple

from benchmarks.figures import Table
from benchmarks.operator.case import RATE, Outcome, Size, middle, percentile, repeat, shares
from benchmarks.operator.field import OURS, Field, calls, spent
from benchmarks.operator.load import Load
from benchmarks.operator.usage import Share
from tests.integration.operator.conftest import Operator

COMMAND: Final = "python -m benchmarks.operator --only latency"
WRITES: Final = ("create", "update", "patch", "delete")


class Run(NamedTuple):
    """One run."""

    p50: float
    """Milliseconds from sending the request that creates a FineTuneJob until a watch shows a Job that it owns: the
    staging Job that it has made or joined."""
    p99: float
    cpu: float
    """Milliseconds of the operator's processor time, for each job."""
    calls: Counter[str]
    """Of all jobs."""
    share: Share

    def __repr__(self) -> str:
        """For who waits."""
        return f"p50 {self.p50:.0f} ms, p99 {self.p99:.0f} ms, {self.cpu:.1f} ms of CPU per job"


async def latency(field: Field, size: Size) -> Outcome:
    """Jobs at a fixed rate, through their whole lives, on one model: each makes the staging Job, or joins it."""
    outcome, namespace = Outcome(), field.namespace()
    with field.running(namespace) as operator:
        async with field.load(namespace) as load:
            await load.submit()  # the first does everything for the first time
            await load.all_ended()
            runs = await repeat("latency", size, outcome, lambda: _run(field, size, operator, load))
    outcome.values["child-p50"] = [run.p50 for run in runs]
    outcome.values["child-p99"] = [run.p99 for run in runs]
    outcome.values["cpu-per-job"] = [run.cpu for run in runs]
    outcome.tables["operator-1-calls"] = _calls(runs, size)
    outcome.tables["operator-2-cores"] = _cores(runs, size)
    return outcome


async def _run(field: Field, size: Size, operator: Operator, load: Load) -> tuple[Run, Share]:
    known, before, counted = set(load.sent), field.look(operator), calls(operator)
    await load.submit_at(RATE, size.jobs)
    await load.all_ended()
    share = spent(field, before, operator)
    made = calls(operator) - counted
    delays = [1000 * (load.child[name] - load.sent[name]) for name in load.sent.keys() - known]
    cpu = 1000 * share.by["operator"] / size.jobs
    return Run(percentile(delays, 50), percentile(delays, 99), cpu, made, share), share


def _calls(runs: list[Run], size: Size) -> Table:
    kinds = sorted(set().union(*(run.calls for run in runs)), key=lambda kind: (kind.split()[0] not in WRITES, kind))
    rows = [(kind, middle([run.calls[kind] / size.jobs for run in runs], 2)) for kind in kinds]
    told = [(kind, count) for kind, count in rows if float(count) >= 0.05]
    writes = [sum(run.calls[kind] for kind in kinds if kind.split()[0] in WRITES) / size.jobs for run in runs]
    reads = [sum(run.calls.values()) / size.jobs - made for run, made in zip(runs, writes, strict=True)]
    return Table(
        title="API calls of a job's life",
        note=f"Of the operator, from its own metrics; {RATE:.0f} jobs/s, one worker each, from Pending to Succeeded. "
        "What does not come with every job (the Lease, lists) is shared out among them.",
        columns=("call", "per job"),
        rows=(*told, ("all writes", middle(writes, 2)), ("all reads", middle(reads, 2))),
        command=COMMAND,
    )


def _cores(runs: list[Run], size: Size) -> Table:
    per_job = [middle([1000 * run.share.by[name] / size.jobs for run in runs]) for name in OURS]
    return Table(
        title="Processor time of a job's life",
        note="Milliseconds for each job, and cores while they are submitted and run. The benchmark plays the users and "
        "the kubelets.",
        columns=("", *OURS),
        rows=(("ms per job", *per_job), ("cores", *shares([run.share for run in runs]))),
        command=COMMAND,
    )
