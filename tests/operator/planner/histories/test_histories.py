"""Random histories of a cluster and of an operator that dies between any two of its writes.

The cluster is a model of the Job controller and the kubelet, as far as the planner can see them: objects in wire form,
and caches that lag behind them. The operator carries out plans write by write, in the order of reconciler.py.
"""

from datetime import timedelta
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from kubetune_contract.progress import CheckpointStatus, Progress, ProgressReport, Result, TerminationMessage
from kubetune_contract.staging import StagedModel
from kubetune_operator import api
from kubetune_operator.diagnosis import condition, ending_condition, is_live, is_lost
from kubetune_operator.settings import Settings

Object = dict[str, Any]

SETTINGS = Settings(trainer_image="trainer", namespace="kubetune", restart_backoff_seconds=10)
STAGED = TerminationMessage(
    reason="Done",
    message="staged",
    staged=StagedModel(path="m", architecture="LlamaForCausalLM", parameters=1, bytes=1),
).to_json()
DONE = TerminationMessage(reason="Done", message="done", result=Result(steps=50, tokens=1)).to_json()


SPECS = st.fixed_dictionaries(
    {
        "failurePolicy": st.fixed_dictionaries(
            {"maxRestarts": st.integers(0, 3)}, optional={"startupDeadlineSeconds": st.sampled_from([50, 700])}
        )
    },
    optional={
        "cleanPodPolicy": st.sampled_from(["Running", "All", "None"]),
        "ttlSecondsAfterFinished": st.sampled_from([0, 100]),
        "activeDeadlineSeconds": st.sampled_from([100, 1500]),
        "queue": st.just({"name": "team"}),
    },
)
EXIT_CODES = st.sampled_from([1, 0, 137, 80, 81, 65])
LAG = st.booleans()


class History(RuleBasedStateMachine):
    """Every rule is one thing that happens; the invariants hold after each."""

    def __init__(self) -> None:
        super().__init__()
        self.new_cluster, self.new_operator = self.model
        self.cluster = self.new_cluster(1)
        self.operator = self.new_operator(self.cluster)
        self.report: ProgressReport | None = None
        self.last = api.FineTuneJobStatus()
        self.created_at_end: int | None = None
        self.is_replaced = False
        """Whether attempts may have been given up without a loss: for other nodes, or to leave a queue."""

    model: Any
    """What makes a cluster, and what makes an operator on it."""
    starts_running = True
    """Whether a history starts with a gang that runs: the way there is always the same."""

    @initialize(nodes=st.integers(1, 3), spec=SPECS)
    def begin(self, nodes: int, spec: Object) -> None:
        self.cluster = self.new_cluster(nodes, **spec)
        self.operator = self.new_operator(self.cluster)
        if self.starts_running:
            self._go_on(6)
            self.cluster.end(self._pods(phase="Running")[0], 0, STAGED)
            self._go_on(6)
            assert self._status().state == "Running"

    def _go_on(self, rounds: int) -> None:
        for _ in range(rounds):
            self._admit()
            self.cluster.settle()
            for pod in self._pods(phase="Pending"):
                self.cluster.run(pod)
            self.operator.look()
            self.operator.reconcile(self.report, writes=99)

    def _admit(self) -> None:
        for job in self.cluster.queued():
            job["spec"]["suspend"] = False

    @rule(rounds=st.integers(1, 4), seconds=st.sampled_from([0, 30]))
    def all_goes_well(self, rounds: int, seconds: int) -> None:
        """Everybody does their work for a while."""
        self.cluster.now += timedelta(seconds=seconds)
        self._go_on(rounds)

    # ---------------------------------------------------------------- the operator

    @rule(writes=st.integers(0, 6), jobs=LAG, pods=LAG)
    def reconcile(self, writes: int, jobs: bool, pods: bool) -> None:
        """With caches that may lag, and as many writes as it gets done."""
        self.operator.look(jobs, pods)
        self.operator.reconcile(self.report, writes)

    @rule(writes=st.integers(0, 2))
    def die_between_writes(self, writes: int) -> None:
        self.operator.look()
        self.operator.reconcile(self.report, writes)
        self.operator, self.report = self.new_operator(self.cluster), None

    # ---------------------------------------------------------------- the cluster

    @rule()
    def controllers(self) -> None:
        self.cluster.settle()

    @rule(seconds=st.sampled_from([1, 6, 30, 400]))
    def time(self, seconds: int) -> None:
        """Caches lag by less than a second: after any of these they have caught up."""
        self.cluster.now += timedelta(seconds=seconds)
        self.operator.look()

    @precondition(lambda self: self._pods(phase="Pending"))
    @rule(data=st.data())
    def come_up(self, data: Any) -> None:
        self.cluster.run(data.draw(st.sampled_from(self._pods(phase="Pending"))))

    @precondition(lambda self: self._pods(phase="Running"))
    @rule(data=st.data(), code=EXIT_CODES)
    def container_ends(self, data: Any, code: int) -> None:
        pod = data.draw(st.sampled_from(self._pods(phase="Running")))
        stage = pod["metadata"]["labels"]["kubetune.io/role"] == "stage"
        self.cluster.end(pod, code, "" if code else STAGED if stage else DONE)

    @precondition(lambda self: self._pods())
    @rule(data=st.data(), evicted=st.booleans())
    def pod_is_removed(self, data: Any, evicted: bool) -> None:
        """By kubectl, or by an eviction."""
        pod = data.draw(st.sampled_from(self._pods()))
        if evicted and is_live(pod):
            pod["status"]["conditions"].append({"type": "DisruptionTarget", "status": "True", "reason": "Eviction"})
        self.cluster.ask(pod)

    @precondition(lambda self: self._pods(phase="Running"))
    @rule(data=st.data())
    def node_is_lost(self, data: Any) -> None:
        """The pod is marked for deletion and never heard of again."""
        pod = data.draw(st.sampled_from(self._pods(phase="Running")))
        self.cluster.lost.add(pod["metadata"]["name"])
        pod["status"]["conditions"].append({"type": "DisruptionTarget", "status": "True", "reason": "TaintManager"})
        self.cluster.ask(pod)
        owner = pod["metadata"]["ownerReferences"][0]["name"]
        job = self.cluster.jobs.get(owner)
        if job is not None and not ending_condition(job) and not condition(job, "Complete"):
            words = {"reason": "PodFailurePolicy", "message": "pod has condition DisruptionTarget matching"}
            job["status"]["conditions"].append(self.cluster._condition("FailureTarget", words))

    @precondition(lambda self: self.cluster.jobs)
    @rule(data=st.data())
    def person_deletes_a_job(self, data: Any) -> None:
        self.cluster.delete_job(data.draw(st.sampled_from(sorted(self.cluster.jobs))))

    @rule(suspend=st.booleans())
    def person_suspends_or_resumes(self, suspend: bool) -> None:
        if self.cluster.body["spec"].get("suspend", False) != suspend:
            self.cluster.change(suspend=suspend)
            self.is_replaced |= "queue" in self.cluster.body["spec"]

    @precondition(lambda self: self.cluster.body["spec"].get("suspend"))
    @rule(nodes=st.integers(1, 3))
    def person_changes_the_nodes_of_a_suspended_job(self, nodes: int) -> None:
        if self.cluster.body["spec"]["workers"]["nodes"] != nodes:
            self.cluster.change(workers={"nodes": nodes})
            self.is_replaced = True

    @precondition(lambda self: not self.cluster.is_deleted and not self.ended)
    @rule(more=st.integers(0, 3))
    def person_allows_more_restarts(self, more: int) -> None:
        policy = self.cluster.body["spec"]["failurePolicy"]
        self.cluster.change(failurePolicy={**policy, "maxRestarts": max(policy["maxRestarts"], more)})

    @precondition(lambda self: self.cluster.others)
    @rule(data=st.data())
    def person_deletes_a_config_map_or_service(self, data: Any) -> None:
        self.cluster.others.discard(data.draw(st.sampled_from(sorted(self.cluster.others))))

    @precondition(lambda self: self.cluster.queued())
    @rule(suspend=st.booleans())
    def queue_admits_or_preempts(self, suspend: bool) -> None:
        for job in self.cluster.queued():
            job["spec"]["suspend"] = suspend

    @precondition(lambda self: self._status().attempt_start_time is not None and not self.cluster.is_deleted)
    @rule(step=st.integers(0, 50), saved=st.booleans())
    def trainer_reports(self, step: int, saved: bool) -> None:
        known = self._status().checkpoint
        step = max(step, known.step if known else 0)  # it has resumed from there
        checkpoint = CheckpointStatus(step=step, path=f"step-{step}", time=self.cluster.now) if saved else None
        progress = Progress(step=step, total_steps=50, epoch=0, percentage=2 * step)
        self.report = ProgressReport(progress=progress, checkpoint=checkpoint)
        self.operator.look()
        self.operator.reconcile(self.report, writes=99)

    # ---------------------------------------------------------------- what always holds

    @invariant()
    def at_most_one_attempt_is_alive(self) -> None:
        """A gang on a lost node counts as gone after its grace: nobody can do better."""
        grace = SETTINGS.lost_node_grace_seconds
        alive = set()
        for pod in self._pods(role="worker"):
            if is_live(pod) and not is_lost(pod, self.cluster.now, grace):
                alive.add(pod["metadata"]["labels"]["kubetune.io/attempt"])
        for job in self.cluster.jobs.values():
            labels = job["metadata"]["labels"]
            over = ending_condition(job) or condition(job, "Complete") or job["spec"].get("suspend")
            if labels["kubetune.io/role"] == "worker" and not over:
                alive.add(labels["kubetune.io/attempt"])
        assert len(alive) <= 1, f"attempts {alive} are alive"

    @invariant()
    def counters_never_go_back(self) -> None:
        status, last = self._status(), self.last
        assert status.attempt >= last.attempt
        assert status.restarts >= last.restarts
        assert status.disruptions >= last.disruptions
        losses = status.restarts + status.disruptions
        assert status.attempt in (0, 1 + losses) or (self.is_replaced and status.attempt > losses)
        assert status.restarts <= self.cluster.body["spec"]["failurePolicy"]["maxRestarts"]
        if status.attempt > 1:
            assert f"bot-a{status.attempt - 1}" in self.cluster.created, "an attempt was given up that never was"
        if last.start_time is not None:
            assert status.start_time == last.start_time
        if last.completion_time is not None:
            assert status.completion_time == last.completion_time
        if last.checkpoint is not None:
            assert status.checkpoint is not None
            assert status.checkpoint.step >= last.checkpoint.step, "a checkpoint was forgotten"
        assert status.active_seconds >= last.active_seconds
        if status.attempt == last.attempt and status.progress and last.progress and "Suspended" not in self._held():
            assert status.progress.step >= last.progress.step or status.attempt_start_time is None
        self.last = status

    def _held(self) -> set[str]:
        return {item.type for item in (*self.last.conditions, *self._status().conditions) if item.status == "True"}

    @invariant()
    def the_end_is_final(self) -> None:
        ends = {item.type for item in self._status().conditions if item.status == "True"} & {"Succeeded", "Failed"}
        if self.created_at_end is None:
            if ends:
                self.created_at_end, self.ends = len(self.cluster.created), ends
            return
        assert ends == self.ends
        assert len(ends) == 1
        assert len(self.cluster.created) == self.created_at_end, "something was created after the end"

    def teardown(self) -> None:
        """Let the world be kind from now on: the job must come to its end, and hold nothing then."""
        self.cluster.lost.clear()
        self.cluster.change(suspend=False)
        for _ in range(40):
            self.cluster.now += timedelta(seconds=301)
            for _ in range(6):
                self.cluster.settle()
                self.operator.look()
                self.operator.reconcile(None, writes=99)
                self._be_kind()
                if self.cluster.is_deleted:
                    assert self.ended, "a job was deleted before its end"
                    assert "ttlSecondsAfterFinished" in self.cluster.body["spec"]
            if self.ended and self._is_tidy():
                break
        status = self._status()
        assert status.state in ("Succeeded", "Failed"), f"no end: {status.to_dict()}"
        assert self._is_tidy(), f"held after the end: {[*self.cluster.jobs, *self.cluster.pods, *self.cluster.others]}"
        assert self.cluster.is_deleted or status.workers is None or status.workers.active == 0

    def _is_tidy(self) -> bool:
        """Whether nothing is left but what the spec wants to be kept."""
        spec = self.cluster.body["spec"]
        if any(is_live(pod) for pod in self._pods(role="worker")):
            return False
        if "ttlSecondsAfterFinished" in spec:
            return self.cluster.is_deleted
        workers = [name for name in self.cluster.jobs if name.startswith("bot-a")]
        return spec.get("cleanPodPolicy") != "All" or not (workers or self.cluster.others)

    def _be_kind(self) -> None:
        self._admit()
        for pod in self._pods(phase="Pending"):
            self.cluster.run(pod)
        if all(pod["status"]["phase"] != "Pending" for pod in self._pods()):
            for pod in [] if self.ended else self._pods(phase="Running"):  # after the end the operator frees them
                stage = pod["metadata"]["labels"]["kubetune.io/role"] == "stage"
                self.cluster.end(pod, 0, STAGED if stage else DONE)

    # ---------------------------------------------------------------- helpers

    @property
    def ended(self) -> bool:
        return self._status().state in ("Succeeded", "Failed")

    def _status(self) -> api.FineTuneJobStatus:
        return api.FineTuneJobStatus.model_validate(self.cluster.body.get("status") or {})

    def _pods(self, phase: str | None = None, role: str | None = None) -> list[Object]:
        def fits(pod: Object) -> bool:
            right_role = role is None or pod["metadata"]["labels"]["kubetune.io/role"] == role
            return right_role and (phase is None or pod["status"]["phase"] == phase)

        return [pod for _, pod in sorted(self.cluster.pods.items()) if fits(pod)]


class HistoryOfANewJob(History):
    """From the very beginning, which is mostly staging."""

    starts_running = False


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("history", "examples"), [(History, 80), (HistoryOfANewJob, 30)])
def test_no_history_breaks_the_invariants(model, history, examples):
    """Never two live attempts, never a retry after the end, no counter moves backwards, always an end."""
    limits = settings(
        max_examples=examples,
        stateful_step_count=50,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
    )
    history.model = model
    run_state_machine_as_test(history, settings=limits)
