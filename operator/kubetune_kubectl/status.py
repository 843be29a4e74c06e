"""`kubectl finetune status [NAME]`: all jobs in a table, or all that is known of one."""

import json
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from enum import IntEnum
from typing import TextIO

from rich.console import Console
from rich.table import Table
from rich.text import Text

from kubetune_kubectl import jobs
from kubetune_kubectl.jobs import Job, in_order, why
from kubetune_kubectl.kubectl import Kubectl
from kubetune_kubectl.live import progress_line
from kubetune_kubectl.outcome import result_rows
from kubetune_kubectl.words import age, columns, console, first_line, pairs, print_table, state_text
from kubetune_operator.api import Condition
from kubetune_operator.status import is_true, readable_bytes


class Code(IntEnum):
    """What the exit code of `status NAME` says."""

    SUCCEEDED = 0
    FAILED = 1
    ON_ITS_WAY = 3
    """2 is that the question could not be answered."""
    SUSPENDED = 4


def code_of(job: Job) -> Code:
    """The job's state as an exit code."""
    if job.finished:
        return Code.SUCCEEDED if job.succeeded else Code.FAILED
    return Code.SUSPENDED if is_true(job.status, "Suspended") else Code.ON_ITS_WAY


def run_all(kubectl: Kubectl, everywhere: bool, as_json: bool, stream: TextIO | None = None) -> int:
    """Show all jobs of a namespace, or of all."""
    if as_json:
        options = ["--all-namespaces"] if everywhere else []
        print(json.dumps(kubectl.document("get", jobs.RESOURCE, *options), indent=2), file=stream or sys.stdout)
        return 0
    found = jobs.get_all(kubectl, everywhere)
    if found:
        print_table(console(stream or sys.stdout), table(found, datetime.now(UTC), everywhere))
        return 0
    where = "any namespace" if everywhere else f"namespace {kubectl.default_namespace()}"
    print(f"There is no FineTuneJob in {where}.", file=sys.stderr)
    return 0


def run_one(kubectl: Kubectl, name: str, as_json: bool, stream: TextIO | None = None) -> int:
    """Show one job; the exit code says its state."""
    job = jobs.get(kubectl, name)
    if as_json:
        print(json.dumps(job.body, indent=2), file=stream or sys.stdout)
    else:
        show(job, console(stream or sys.stdout), datetime.now(UTC))
    return code_of(job)


def table(found: Sequence[Job], now: datetime, everywhere: bool = False) -> Table:
    """The jobs as `kubectl get ftj` shows them, with why each is where it is."""
    header = ["NAME", "STATE", "PROGRESS", "LOSS", "ETA", "RESTARTS", "AGE", "WHY"]
    rows = [[job.name, *_cells(job), age(job.created, now), first_line(why(job, now))] for job in found]
    if everywhere:
        header = ["NAMESPACE", *header]
        rows = [[job.namespace, *row] for job, row in zip(found, rows, strict=True)]
    return columns(header, rows)


def _cells(job: Job) -> list[Text]:
    display = job.status.display
    shown = [display.progress, display.loss, display.eta] if display is not None else [None, None, None]
    return [state_text(job.state), *(Text(cell or "") for cell in (*shown, str(job.status.restarts)))]


def show(job: Job, screen: Console, now: datetime) -> None:
    """All that is known of a job, in the order in which a person asks."""
    screen.print(Text.assemble((f"{job.namespace}/{job.name}  ", "bold"), state_text(job.state)))
    told = why(job, now)
    if told:
        screen.print(Text(told))
    if job.status.conditions:
        screen.print()
        print_table(screen, columns(["CONDITION", "STATUS", "REASON", "SINCE", "MESSAGE"], _conditions(job, now)))
    screen.print()
    print_table(screen, pairs(facts(job, now)))


def _conditions(job: Job, now: datetime) -> list[list[object]]:
    return [_condition(condition, now) for condition in in_order(job.status.conditions)]


def _condition(condition: Condition, now: datetime) -> list[object]:
    style = {"True": "bold", "False": "dim"}.get(condition.status, "yellow")
    since = age(condition.last_transition_time, now)
    words = (condition.type, condition.status, condition.reason, since, first_line(condition.message))
    return [Text(word, style=style) for word in words]


def facts(job: Job, now: datetime) -> list[tuple[str, str]]:
    """Name and value of what the status says besides its conditions."""
    status, rows = job.status, [("age", age(job.created, now))]
    if status.attempt:
        counts = f"{status.restarts} after crashes, {status.disruptions} after disruptions"
        rows.append(("attempt", f"{status.attempt}  (restarts: {counts})"))
    if status.next_attempt_time is not None:
        rows.append(("next attempt", f"at {status.next_attempt_time:%H:%M:%S} UTC"))
    if status.workers is not None:
        workers = status.workers
        counts = f"{workers.ready} ready, {workers.active} active, {workers.failed} failed"
        rows.append(("workers", f"{job.nodes} wanted: {counts}, {workers.succeeded} succeeded"))
    if status.staged is not None:
        rows.append(("model", f"{status.staged.path}: {status.staged.parameters:,} parameters"))
    rows += [("data", f"{data.path}: {readable_bytes(data.bytes)}") for data in status.staged_data or ()]
    if status.estimate is not None:
        estimate = status.estimate
        has = f" of {readable_bytes(estimate.available)}" if estimate.available is not None else ""
        rows.append(("memory estimate", f"{readable_bytes(estimate.bytes)}{has} for each {estimate.device}"))
    if status.progress is not None:
        rows.append(("progress", progress_line(status.progress)))
    if status.checkpoint is not None:
        path = f"{status.output_path}/{status.checkpoint.path}" if status.output_path else status.checkpoint.path
        rows.append(("checkpoint", f"step {status.checkpoint.step}, {age(status.checkpoint.time, now)} ago, {path}"))
    return [*rows, *result_rows(job)]
