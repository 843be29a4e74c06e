"""Random histories of a job in a queue: Kueue admits and preempts whenever it likes, and all else still happens."""

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, rule, run_state_machine_as_test
from tests.operator.planner.histories.test_histories import STAGED, History

from kubetune_operator.diagnosis import condition, ending_condition


class QueuedHistory(History):
    """The same machine, with one more actor."""

    starts_running = False

    @initialize(nodes=st.integers(1, 3), restarts=st.integers(0, 3))
    def begin(self, nodes: int, restarts: int) -> None:
        self.cluster = self.new_cluster(nodes, restarts)
        self.cluster.body["spec"]["queue"] = {"name": "research"}
        self.operator = self.new_operator(self.cluster)
        self._go_on(6)
        self.cluster.end(self._pods(phase="Running")[0], 0, STAGED)
        self._go_on(6)
        assert self._pods(role="worker") == []
        self.kueue(held=False)
        self._go_on(3)
        assert self._status().state == "Running"

    @rule(held=st.booleans())
    def kueue(self, held: bool) -> None:
        """Admits or preempts."""
        for job in self.cluster.jobs.values():
            over = ending_condition(job) or condition(job, "Complete")
            if job["metadata"]["labels"]["kubetune.io/role"] == "worker" and not over:
                job["spec"]["suspend"] = held

    @invariant()
    def counters_never_go_back(self) -> None:
        """A suspension gives an attempt up without a fault, so that there may be more of them than faults."""
        status, last = self._status(), self.last
        assert status.attempt >= last.attempt
        assert status.restarts >= last.restarts
        assert status.disruptions >= last.disruptions
        assert status.attempt == 0 or status.attempt >= 1 + status.restarts + status.disruptions
        self.last = status

    def _be_kind(self) -> None:
        self.kueue(held=False)
        super()._be_kind()


@pytest.mark.timeout(600)
def test_no_history_of_a_queued_job_breaks_the_invariants(model):
    limits = settings(
        max_examples=20,
        stateful_step_count=50,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
    )
    QueuedHistory.model = model
    run_state_machine_as_test(QueuedHistory, settings=limits)
