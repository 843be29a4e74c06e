"""Names and labels of everything that a FineTuneJob owns. A name that two places need stands here, once."""

from typing import Final

from kubetune_operator.api import FineTuneJob, FineTuneJobSpec
from kubetune_operator.contents import Content, digest
from kubetune_operator.placement import stage_placement

FIELD_MANAGER: Final = "kubetune"

JOB_LABEL: Final = "kubetune.io/job"
"""Name of the FineTuneJob. Shared staging Jobs do not carry it: their owner references say whose they are."""
ATTEMPT_LABEL: Final = "kubetune.io/attempt"
OPERATOR_LABEL: Final = "kubetune.io/operator"
"""On a FineTuneJob: the operator that handles it. Two operators on one cluster, such as one under test, do not meet."""
ROLE_LABEL: Final = "kubetune.io/role"
"""On every Job and Pod; the operator's watches select by its presence."""
GANG_ANNOTATION: Final = "kubetune.io/gang"
"""On a worker Job: the part of spec.workers that it was made for and that may change under it."""
WORKER: Final = "worker"
STAGE: Final = "stage"
QUEUE_LABEL: Final = "kueue.x-k8s.io/queue-name"
"""On a child Job: Kueue suspends and resumes it, and nobody else."""
QUEUE_PRIORITY_LABEL: Final = "kueue.x-k8s.io/priority-class"
MANAGED_BY: Final = {"app.kubernetes.io/managed-by": "kubetune"}

CONTAINER: Final = "main"
"""The only container of a worker or staging pod."""

MODELS_VOLUME: Final = "models"
OUTPUT_VOLUME: Final = "output"

RENDEZVOUS_PORT: Final = 29500

NAME_PATTERN: Final = "^[a-z]([-a-z0-9]*[a-z0-9])?$"
"""Of a FineTuneJob. The headless Service has its name, and a Service's name begins with a letter and has no dots."""
NAME_RULE: Final = "must begin with a letter and hold only a-z, 0-9 and hyphens: host names are made from it"
MAX_NAME_LENGTH: Final = 45
"""Of a FineTuneJob. `<name>-a<attempt>-<index>` is the host name of a pod, which may have 63 characters."""


def job_name(name: str, attempt: int) -> str:
    """The worker Job of one attempt."""
    return f"{name}-a{attempt}"


def service_name(name: str) -> str:
    """The headless Service that gives the workers their host names."""
    return name


def config_map_name(name: str) -> str:
    """The ConfigMap with the run's configuration."""
    return f"{name}-kubetune"


def leader_host(name: str, attempt: int) -> str:
    """Host name of the worker with rank 0, from within the namespace."""
    return f"{job_name(name, attempt)}-0.{service_name(name)}"


def job_labels(name: str) -> dict[str, str]:
    """Labels of what all attempts of a FineTuneJob share."""
    return {**MANAGED_BY, JOB_LABEL: name}


def worker_labels(name: str, attempt: int) -> dict[str, str]:
    """Labels of a worker Job and its pods."""
    return {**job_labels(name), ATTEMPT_LABEL: str(attempt), ROLE_LABEL: WORKER}


def attempt_selector(name: str, attempt: int) -> dict[str, str]:
    """Matches the pods of one attempt."""
    return {JOB_LABEL: name, ATTEMPT_LABEL: str(attempt)}


def stage_labels() -> dict[str, str]:
    """Labels of a staging Job and its pods."""
    return {**MANAGED_BY, ROLE_LABEL: STAGE}


def stage_name(spec: FineTuneJobSpec, content: Content) -> str:
    """The staging Job of this content on this job's claim. The name is the lock: jobs that need the same share it.

    The Secret belongs to the name: who has access does not wait for, or fail with, a job that has not. So does where
    the pod may run: it does not wait for a node that only another job asks for.
    """
    where = [part for part in (stage_placement(spec), spec.workers.image_pull_secrets) if part]
    kind = [content.kind] if content.kind != "Model" else []
    parts = [*kind, content.place.to_dict(), spec.storage.models.claim_name, *where]
    return f"kubetune-stage-{digest(parts)}"


def stage_manager(job: FineTuneJob) -> str:
    """Field manager under which this job applies the staging Job: one each, so that their owner references add up."""
    return f"{FIELD_MANAGER}-{job.uid}"


def output_path(job: FineTuneJob) -> str:
    """Folder of this run, relative to the root of the output claim. A new job of the same name gets a new folder."""
    return f"{job.name}-{job.uid[:8]}"
