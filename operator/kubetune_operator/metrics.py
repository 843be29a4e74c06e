"""What Prometheus is told."""

from collections.abc import Iterable
from typing import Final, get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from kubetune_contract.progress import Progress
from kubetune_operator.api import State

STATES: Final[tuple[str, ...]] = get_args(State)
LATENCIES: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10)
_JOB: Final = ("namespace", "name")


class Metrics:
    """The operator's metrics, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        registry = self.registry
        self._jobs = Gauge("kubetune_jobs", "FineTuneJobs by state", ("state",), registry=registry)
        self.queue_depth = Gauge("kubetune_queue_depth", "FineTuneJobs that wait for a worker", registry=registry)
        self.reconcile_seconds = Histogram(
            "kubetune_reconcile_seconds", "Duration of one reconcile", buckets=LATENCIES, registry=registry
        )
        self.errors = Counter("kubetune_reconcile_errors_total", "Reconciles that are tried again", registry=registry)
        self.status_writes = Counter("kubetune_status_writes_total", "Writes of a status", registry=registry)
        self._step = Gauge("kubetune_training_step", "Optimizer steps done", _JOB, registry=registry)
        self._loss = Gauge("kubetune_training_loss", "Loss of the last step, nats per token", _JOB, registry=registry)
        self._speed = Gauge("kubetune_training_tokens_per_second", "Tokens per second", _JOB, registry=registry)
        self._gauges = (self._step, self._loss, self._speed)

    def count_jobs(self, states: Iterable[str]) -> None:
        """Count FineTuneJobs by state."""
        counts = dict.fromkeys(STATES, 0)
        for state in states:
            counts[state] += 1
        for state, count in counts.items():
            self._jobs.labels(state).set(count)

    def training(self, namespace: str, name: str, progress: Progress) -> None:
        """Show a trainer's last report."""
        self._step.labels(namespace, name).set(progress.step)
        if progress.loss is not None:
            self._loss.labels(namespace, name).set(progress.loss)
        if progress.tokens_per_second is not None:
            self._speed.labels(namespace, name).set(progress.tokens_per_second)

    def forget(self, namespace: str, name: str) -> None:
        """The training is over: an old speed would be a lie."""
        for gauge in self._gauges:
            try:
                gauge.remove(namespace, name)
            except KeyError:
                continue

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self.registry)
