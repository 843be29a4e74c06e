"""A small world for the planner's tests: one FineTuneJob and its children, told in the words of the cases."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Self

import pytest

from kubetune_contract.progress import CheckpointStatus, Progress, ProgressReport, Result, TerminationMessage
from kubetune_contract.staging import StagedModel
from kubetune_operator.conditions import is_known
from kubetune_operator.contents import contents
from kubetune_operator.decision import StageView
from kubetune_operator.obstacles import Obstacle
from kubetune_operator.plan import Observed, Plan, plan

Object = dict[str, Any]

STAGED = StagedModel(path="models/llama", architecture="LlamaForCausalLM", parameters=134515008, bytes=269_000_000)
RESULT = Result(
    adapter_path="adapter",
    final_loss=0.5,
    initial_validation_loss=2.25,
    final_validation_loss=0.75,
    steps=50,
    tokens=12345,
)


def stamp(moment: datetime) -> str:
    """As the API server writes times."""
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")


@dataclass
class Builders:
    """The fixtures of the folder above, so that the world can call them."""

    body: Any
    job: Any
    attempt_job: Any
    stage_job: Any
    pod: Any
    condition: Any
    terminated: Any
    waiting: Any


class World:
    """One FineTuneJob with children. Methods that arrange return the world, so that a case reads as a sentence."""

    def __init__(self, make: Builders, settings: Any, now: datetime) -> None:
        self.make = make
        self.settings = settings
        self.now = now
        self.spec: Object = {}
        self.status: Object = {}
        self.metadata: Object = {}
        self.stage: Object | None = None
        self.stage_pods: list[Object] = []
        self.stage_shared = False
        self.data_stages: list[StageView] = []
        self.jobs: dict[int, Object] = {}
        self.pods: list[Object] = []
        self.gone: list[Object] = []
        self.report: ProgressReport | None = None
        self.conflict: str | None = None
        self.refused: Obstacle | None = None
        self.reports_since: datetime | None = None
        self.events: Object = {}

    # ---------------------------------------------------------------- the FineTuneJob

    @property
    def job(self) -> Any:
        """The typed FineTuneJob."""
        return self.make.job("bot", self.status, self.metadata, **self.spec)

    def with_spec(self, **changes: Any) -> Self:
        """Change the spec."""
        self.spec |= changes
        return self

    def with_status(self, **changes: Any) -> Self:
        """Change the status, in wire form."""
        self.status |= changes
        return self

    def with_condition(self, kind: str, status: str, reason: str, message: str = "") -> Self:
        """A condition of the FineTuneJob."""
        condition = self.make.condition(kind, status, reason, message, lastTransitionTime=stamp(self.now))
        self.status["conditions"] = [*self.status.get("conditions", []), condition]
        return self

    def staged(self) -> Self:
        """The model is staged."""
        return self.with_status(staged=STAGED.to_dict()).with_condition("Staged", "True", "Staged")

    def waiting_for(self, attempt: int, seconds: float = 0.0, **counts: int) -> Self:
        """Attempt `attempt` was decided on and comes in so many seconds."""
        due = stamp(self.now + timedelta(seconds=seconds))
        return self.staged().with_status(attempt=attempt, nextAttemptTime=due, **counts)

    def later(self, seconds: float) -> Self:
        """Let time pass."""
        self.now += timedelta(seconds=seconds)
        return self

    # ---------------------------------------------------------------- staging

    def staging(self, *conditions: Object, owned: bool = True, **status: Any) -> Self:
        """The staging Job exists."""
        self.stage = self.make.stage_job(self.job, conditions, **status)
        if not owned:
            self.stage["metadata"]["ownerReferences"][0] |= {"uid": "another", "name": "other"}
        return self

    def data_staging(self, index: int, *conditions: Object, word: str | None = None, **pod: Any) -> Self:
        """The staging Job of the job's dataset number `index` and its pod; `word`: the pod has ended with it."""
        content = contents(self.job.spec)[1 + index]
        stage = self.make.stage_job(self.job, conditions, content=content)
        stage["metadata"]["uid"] = f"data-stage-{index}"
        if word is not None:
            pod |= {"phase": "Succeeded", "state": self.make.terminated(0, message=word)}
        self.data_stages.append(StageView(stage, [self.make.pod(stage, 0, **pod)]))
        return self

    def stage_pod(self, phase: str = "Running", ready: bool = False, **more: Any) -> Self:
        """A pod of the staging Job."""
        assert self.stage is not None
        self.stage_pods.append(self.make.pod(self.stage, len(self.stage_pods), phase, ready=ready, **more))
        return self

    # ---------------------------------------------------------------- attempts

    def attempt(self, number: int = 1, *conditions: Object, seen: bool = True, **spec: Any) -> Self:
        """The worker Job of an attempt exists; `seen`: the status knows it as the present one."""
        self.jobs[number] = self.make.attempt_job(self.job, number, conditions)
        self.jobs[number]["spec"] |= spec
        if seen:
            self.with_status(attempt=number, attemptStartTime=stamp(self.now), startTime=stamp(self.now))
        return self

    def worker(self, index: int = 0, phase: str = "Running", attempt: int | None = None, **more: Any) -> Self:
        """A worker pod of the newest attempt, or of another."""
        owner = self.jobs[attempt or max(self.jobs)]
        self.pods.append(self.make.pod(owner, index, phase, **more))
        return self

    def running(self, attempt: int = 1) -> Self:
        """Both workers of the attempt run, and the status says so."""
        self.staged().attempt(attempt).worker(0, ready=True).worker(1, ready=True)
        return self.with_condition("Running", "True", "Running").with_condition("Started", "True", "Started")

    def ends(self, index: int, code: int, message: str = "", reason: str | None = None, after: float = 0.0) -> Self:
        """A worker's container ends with that code."""
        pod = next(pod for pod in self.pods if pod["metadata"]["name"].endswith(f"-{index}-x{index}"))
        state = self.make.terminated(code, reason, message)
        state["terminated"]["finishedAt"] = stamp(self.now + timedelta(seconds=after))
        pod["status"] |= {"phase": "Failed" if code else "Succeeded", "conditions": []}
        pod["status"]["containerStatuses"][0]["state"] = state
        return self

    def evicted(self, index: int, reason: str = "EvictionByEvictionAPI", message: str = "Eviction API") -> Self:
        """A worker is being evicted."""
        pod = next(pod for pod in self.pods if pod["metadata"]["name"].endswith(f"-{index}-x{index}"))
        pod["status"]["conditions"].append(self.make.condition("DisruptionTarget", "True", reason, message))
        return self

    def deleted(self, index: int, ago: float = 0.0, grace: int = 120, gone: bool = False) -> Self:
        """Somebody asked `ago` seconds ago for a worker's deletion; `gone`: its object is no more."""
        pod = next(pod for pod in self.pods if pod["metadata"]["name"].endswith(f"-{index}-x{index}"))
        due = self.now + timedelta(seconds=grace - ago)
        pod["metadata"] |= {"deletionTimestamp": stamp(due), "deletionGracePeriodSeconds": grace}
        if gone:
            self.pods.remove(pod)
            self.gone.append(pod)
        return self

    def fails(
        self, reason: str = "BackoffLimitExceeded", message: str = "", ago: float = 0, target: bool = False
    ) -> Self:
        """The newest attempt's Job has failed, or (`target`) is found to fail and waits for its pods."""
        kinds = ["FailureTarget"] if target else ["FailureTarget", "Failed"]
        time = stamp(self.now - timedelta(seconds=ago))
        conditions = [self.make.condition(kind, "True", reason, message, lastTransitionTime=time) for kind in kinds]
        self.jobs[max(self.jobs)]["status"]["conditions"] = conditions
        return self

    def completes(self, ago: float = 0.0) -> Self:
        """The newest attempt's Job is complete."""
        status = self.jobs[max(self.jobs)]["status"]
        status["conditions"] = [self.make.condition("Complete", "True", "CompletionsReached")]
        status["completionTime"] = stamp(self.now - timedelta(seconds=ago))
        return self

    def reports(self, step: int, checkpoint: int | None = None, **progress: Any) -> Self:
        """Rank 0 has reported."""
        self.report = ProgressReport(
            progress=Progress(step=step, total_steps=50, epoch=step / 50, percentage=2 * step, **progress),
            checkpoint=None if checkpoint is None else self.checkpoint(checkpoint),
        )
        return self

    def checkpoint(self, step: int) -> CheckpointStatus:
        """A checkpoint; later steps are later in time."""
        return CheckpointStatus(step=step, path=f"checkpoints/step-{step}", time=self.now + timedelta(seconds=step))

    # ---------------------------------------------------------------- looking

    def observed(self) -> Observed:
        """What the caches would show."""
        return Observed(
            stages=self.stages,
            attempt_jobs=self.jobs,
            pods=self.pods,
            gone_pods=self.gone,
            progress=self.report,
            reports_since=self.reports_since,
            conflict=self.conflict,
            refused=self.refused,
            events=self.events,
        )

    @property
    def stages(self) -> dict[str, StageView]:
        """The staging Jobs."""
        model = [] if self.stage is None else [StageView(self.stage, self.stage_pods, self.stage_shared)]
        return {view.job["metadata"]["name"]: view for view in (*model, *self.data_stages)}

    def plan(self) -> Plan:
        """What the planner decides; every condition of it must stand in the table."""
        decided = plan(self.job, self.observed(), self.settings, self.now, "")
        for item in decided.status.conditions:
            known = is_known(item.type, item.status, item.reason)
            assert known or not item.message, f"{item.type}={item.status} {item.reason} is not in conditions.TABLE"
        return decided

    def next(self) -> Self:
        """The world after the planned status was written."""
        self.status = self.plan().status.to_dict()
        return self


@pytest.fixture
def world(body, job, attempt_job, stage_job, pod, condition, terminated, waiting, settings, now) -> World:
    """An empty world with one new FineTuneJob of two workers."""
    return World(Builders(body, job, attempt_job, stage_job, pod, condition, terminated, waiting), settings, now)


@pytest.fixture
def message():
    """message("InvalidData", "..."): a termination message as our programs write it."""

    def make(reason: str, text: str, **more: Any) -> str:
        return TerminationMessage(reason=reason, message=text, **more).to_json()

    return make


@pytest.fixture
def told():
    """told(plan, "Failed"): a condition as (status, reason, message)."""

    def find(decided: Plan, kind: str) -> tuple[str, str, str] | None:
        found = next((item for item in decided.status.conditions if item.type == kind), None)
        return found and (found.status, found.reason, found.message)

    return find


@pytest.fixture
def kinds() -> Callable[[Plan], list[str]]:
    """kinds(plan): what is applied, as kind/name."""
    return lambda decided: [f"{item['kind']}/{item['metadata']['name']}" for item in decided.apply]
