"""FineTuneJobs as the plugin reads them, and the sentence that says why one is where it is."""

import difflib
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any, Final, NamedTuple, get_args

from pydantic import BaseModel, ValidationError

from kubetune_contract.base import snake
from kubetune_contract.errors import explain
from kubetune_kubectl.errors import NoSuchJob, NotFound, PluginError
from kubetune_kubectl.kubectl import Kubectl, Object
from kubetune_operator.api import GROUP, PLURAL, Condition, ConditionType, FineTuneJobStatus, State
from kubetune_operator.diagnosis import moment
from kubetune_operator.status import find, is_finished, is_true

RESOURCE: Final = f"{PLURAL}.{GROUP}"
CONDITIONS: Final[tuple[ConditionType, ...]] = get_args(ConditionType)
"""In the order of a job's life."""
UNSEEN_SECONDS: Final = 30
"""An operator that runs answers a new job in well under a second."""

_EXPLAINED_BY: Final[dict[State, ConditionType]] = {
    "Pending": "Staged",
    "Staging": "Staged",
    "Starting": "Started",
    "Restarting": "Started",
    "Running": "Running",
    "Suspended": "Suspended",
    "Succeeded": "Succeeded",
    "Failed": "Failed",
}


class Job(NamedTuple):
    """A FineTuneJob: what the plugin needs of it."""

    namespace: str
    name: str
    uid: str
    created: datetime
    spec: dict[str, Any]
    status: FineTuneJobStatus
    body: Object
    """As the API server gave it."""

    @property
    def state(self) -> State:
        """The job in one word."""
        return self.status.state or "Pending"

    @property
    def finished(self) -> bool:
        """Whether it is over for good."""
        return is_finished(self.status)

    @property
    def succeeded(self) -> bool:
        """Whether it is over and well."""
        return is_true(self.status, "Succeeded")

    @property
    def nodes(self) -> int:
        """Worker pods."""
        return int(self.spec.get("workers", {}).get("nodes", 1))

    @property
    def processes_per_node(self) -> int:
        """Ranks in each worker pod."""
        return max(1, int(self.spec.get("workers", {}).get("gpusPerNode", 0)))


def read(body: Object) -> Job:
    """The job of an API object. Fields of the status that a newer operator writes are passed over."""
    metadata = body["metadata"]
    return Job(
        namespace=metadata["namespace"],
        name=metadata["name"],
        uid=metadata["uid"],
        created=moment(metadata.get("creationTimestamp")) or datetime.now(UTC),
        spec=body.get("spec") or {},
        status=_status(body.get("status") or {}, metadata["name"]),
        body=body,
    )


def _status(document: Object, name: str) -> FineTuneJobStatus:
    try:
        return FineTuneJobStatus.model_validate(known(FineTuneJobStatus, document))
    except ValidationError as error:
        problems = "; ".join(f"status.{problem}" for problem in explain(error, FineTuneJobStatus))
        raise PluginError(
            f"the status of {name} is of another version of Kubetune than this plugin ({problems}): update the plugin"
        ) from error


def known(model: type[BaseModel], document: Any) -> Any:
    """The document without fields that the closed model does not have, at every depth."""
    if isinstance(document, list):
        return [known(model, item) for item in document]
    if not isinstance(document, dict):
        return document
    kept = {}
    for key, value in document.items():
        field = model.model_fields.get(snake(key))
        if field is not None:
            below = model_in(field.annotation)
            kept[key] = known(below, value) if below else value
    return kept


def model_in(annotation: Any) -> type[BaseModel] | None:
    """The model in `Model`, `Model | None` or `list[Model]`."""
    for kind in (annotation, *get_args(annotation)):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
    return None


def get(kubectl: Kubectl, name: str) -> Job:
    """The job. Raises NoSuchJob with the nearest names."""
    try:
        return read(kubectl.document("get", RESOURCE, name))
    except NotFound as error:
        raise missing(kubectl, name) from error


def get_all(kubectl: Kubectl, everywhere: bool = False) -> list[Job]:
    """All jobs of the namespace, or of all namespaces."""
    return [read(body) for body in kubectl.items(RESOURCE, *(["--all-namespaces"] if everywhere else []))]


def missing(kubectl: Kubectl, name: str) -> NoSuchJob:
    """The error that tells which jobs there are instead."""
    namespace = kubectl.default_namespace()
    here = [item["metadata"]["name"] for item in kubectl.items(RESOURCE)]
    return NoSuchJob(f"there is no FineTuneJob {name} in namespace {namespace}; {_instead(kubectl, name, here)}")


def _instead(kubectl: Kubectl, name: str, here: list[str]) -> str:
    near = difflib.get_close_matches(name, here, n=3)
    if near:
        return f"did you mean {' or '.join(near)}?"
    elsewhere = _namespaces_of(kubectl, name)
    if elsewhere:
        return f"there is one in namespace {' and in '.join(elsewhere)}: give -n {elsewhere[0]}"
    if not here:
        return "there is none at all: choose a namespace with -n, or look with `kubectl finetune status -A`"
    return f"the newest are {', '.join(here[-5:])}" if len(here) > 5 else f"there are {', '.join(here)}"


def _namespaces_of(kubectl: Kubectl, name: str) -> list[str]:
    """Where else a job of the name is; nowhere, for those who may not look."""
    try:
        found = kubectl.items(RESOURCE, "--all-namespaces", f"--field-selector=metadata.name={name}")
    except PluginError:
        return []
    return [item["metadata"]["namespace"] for item in found]


def explanation(job: Job, now: datetime) -> Condition | None:
    """The condition that says why the job is where it is; None before the operator has said anything."""
    suspended = find(job.status, "Suspended")
    if not job.finished and suspended is not None and suspended.reason == "Suspending":
        return suspended
    found = find(job.status, _EXPLAINED_BY[job.state])
    if found is not None or (now - job.created).total_seconds() < UNSEEN_SECONDS:
        return found
    return _latest(job.status.conditions)


def _latest(conditions: Iterable[Condition]) -> Condition | None:
    return max(conditions, key=lambda condition: condition.last_transition_time, default=None)


def why(job: Job, now: datetime) -> str:
    """Why the job is where it is, in a sentence; empty where there is nothing to say."""
    condition = explanation(job, now)
    if condition is not None:
        return condition.message
    if job.status.observed_generation is None and (now - job.created).total_seconds() > UNSEEN_SECONDS:
        return (
            "No operator has seen this job: look at `kubectl get pods -A -l app.kubernetes.io/name=kubetune`, "
            "and at the job's label kubetune.io/operator if it has one."
        )
    return ""


def in_order(conditions: Iterable[Condition]) -> list[Condition]:
    """The conditions in the order of a job's life."""
    return sorted(conditions, key=lambda condition: CONDITIONS.index(condition.type))
