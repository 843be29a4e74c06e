"""What Prometheus is told. docs/metrics.md has the same list; a test compares the two."""

from collections import Counter as Tally
from collections.abc import Callable, Collection, Iterable
from typing import Any, Final, get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

from kubetune_contract.progress import Progress
from kubetune_operator.api import FineTuneJobStatus, State
from kubetune_operator.connection import Call

STATES: Final[tuple[str, ...]] = get_args(State)
LATENCIES: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
MOST_REASONS: Final = 100
"""Reasons that are told apart. Trainers have reasons of their own, so there might be any number of them."""
MOST_TRAININGS: Final = 2000
"""FineTuneJobs whose training is shown, of which each costs five series."""
_JOB: Final = ("namespace", "name")
_DECIDING: Final = ("Failed", "Succeeded", "Suspended", "Running")


class Metrics:
    """The operator's metrics, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.leader = Gauge("kubetune_leader", "1 if this replica leads, else 0", registry=registry)
        self._jobs = Gauge(
            "kubetune_jobs",
            "FineTuneJobs by state and by the reason of the condition that decides it",
            ("state", "reason"),
            registry=registry,
        )
        self._finished = Counter(
            "kubetune_jobs_finished_total",
            "FineTuneJobs that have succeeded or failed",
            ("state", "reason"),
            registry=registry,
        )
        self._restarts = Counter(
            "kubetune_restarts_total", "Restarts of a gang after a crash of a worker", registry=registry
        )
        self._disruptions = Counter(
            "kubetune_disruptions_total", "Restarts of a gang after an eviction or a lost node", registry=registry
        )
        self.queue_depth = Gauge("kubetune_queue_depth", "FineTuneJobs that wait for a worker", registry=registry)
        self.reconcile_seconds = Histogram(
            "kubetune_reconcile_duration_seconds", "Duration of one reconcile", buckets=LATENCIES, registry=registry
        )
        self.errors = Counter("kubetune_reconcile_errors_total", "Reconciles that are tried again", registry=registry)
        self.status_writes = Counter("kubetune_status_writes_total", "Writes of a status", registry=registry)
        self._calls = Counter(
            "kubetune_api_requests_total",
            "Requests to the API server; code is `error` where no answer came",
            ("verb", "resource", "code"),
            registry=registry,
        )
        self._call_seconds = Histogram(
            "kubetune_api_request_duration_seconds",
            "Time until the API server's answer began",
            ("verb",),
            buckets=LATENCIES,
            registry=registry,
        )
        self._watches = Counter(
            "kubetune_watch_restarts_total",
            "Watches that were opened anew: ended by the server in time, expired, or broken by an error",
            ("resource", "cause"),
            registry=registry,
        )
        self._reports = Counter(
            "kubetune_progress_reports_total", "Progress reports by how they went", ("outcome",), registry=registry
        )
        self._step = Gauge("kubetune_training_step", "Optimizer steps done", _JOB, registry=registry)
        self._steps = Gauge(
            "kubetune_training_total_steps", "Optimizer steps of the whole run", _JOB, registry=registry
        )
        self._loss = Gauge("kubetune_training_loss", "Loss of the last step, nats per token", _JOB, registry=registry)
        self._speed = Gauge("kubetune_training_tokens_per_second", "Tokens per second", _JOB, registry=registry)
        self._left = Gauge(
            "kubetune_training_remaining_seconds", "Seconds until the last step at the present rate", _JOB,
            registry=registry,
        )  # fmt: skip
        self._gauges = (self._step, self._steps, self._loss, self._speed, self._left)
        self._shown: set[tuple[str, str]] = set()
        self._reasons: set[str] = set()

    # ------------------------------------------------------------ FineTuneJobs

    def count_jobs(self, standings: Iterable[tuple[str, str]]) -> None:
        """Count FineTuneJobs by state and reason. A state without any is 0, under no reason."""
        counts = Tally((state, self._known(reason)) for state, reason in standings)
        missing = set(STATES) - {state for state, _ in counts}
        self._jobs.clear()
        for state in missing:
            self._jobs.labels(state, "").set(0)
        for labels, count in counts.items():
            self._jobs.labels(*labels).set(count)

    def told(self, before: FineTuneJobStatus, after: FineTuneJobStatus) -> None:
        """A status was written: count what it tells for the first time."""
        self._restarts.inc(max(0, after.restarts - before.restarts))
        self._disruptions.inc(max(0, after.disruptions - before.disruptions))
        if after.state != before.state and after.state in ("Succeeded", "Failed"):
            _, reason = standing(after.to_dict())
            self._finished.labels(after.state, self._known(reason)).inc()

    def _known(self, reason: str) -> str:
        if reason not in self._reasons:
            if len(self._reasons) >= MOST_REASONS:
                return "Other"
            self._reasons.add(reason)
        return reason

    # ------------------------------------------------------------ the operator

    def called(self, call: Call) -> None:
        """A request to the API server was made."""
        self._calls.labels(call.verb, call.resource, call.code).inc()
        self._call_seconds.labels(call.verb).observe(call.seconds)

    def watch_of(self, resource: str) -> Callable[[str], None]:
        """Counts restarts of the watch of a resource, by their cause."""
        for cause in ("ended", "expired", "error"):
            self._watches.labels(resource, cause)
        return lambda cause: self._watches.labels(resource, cause).inc()

    def reported(self, outcome: str) -> None:
        """A progress report was taken, handed over, or refused."""
        self._reports.labels(outcome).inc()

    # ------------------------------------------------------------ trainings

    def training(self, namespace: str, name: str, progress: Progress) -> None:
        """Show a trainer's last report."""
        if (namespace, name) not in self._shown and len(self._shown) >= MOST_TRAININGS:
            return
        self._shown.add((namespace, name))
        measured: tuple[tuple[Gauge, float | None], ...] = (
            (self._step, progress.step),
            (self._steps, progress.total_steps),
            (self._loss, progress.loss),
            (self._speed, progress.tokens_per_second),
            (self._left, progress.estimated_remaining_seconds),
        )
        for gauge, value in measured:
            if value is not None:
                gauge.labels(namespace, name).set(value)

    def keep(self, trainings: Collection[str]) -> None:
        """Forget all trainings but these, given as namespace/name."""
        for namespace, name in [job for job in self._shown if "/".join(job) not in trainings]:
            self.forget(namespace, name)

    def forget(self, namespace: str, name: str) -> None:
        """The training is over: an old speed would be a lie."""
        self._shown.discard((namespace, name))
        for gauge in self._gauges:
            try:
                gauge.remove(namespace, name)
            except KeyError:
                continue

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self.registry)


def standing(status: dict[str, Any]) -> tuple[str, str]:
    """State and reason of a status as the API has it: the reason of the condition from which the state follows."""
    conditions = {found["type"]: found for found in status.get("conditions") or []}
    true = [kind for kind in _DECIDING if conditions.get(kind, {}).get("status") == "True"]
    waiting = [kind for kind in ("Started", "Staged") if kind in conditions]
    reason = next((conditions[kind]["reason"] for kind in (*true, *waiting)), "")
    return status.get("state") or "Pending", reason
