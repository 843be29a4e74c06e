"""The Kubernetes objects of a FineTuneJob: pure functions from its spec to manifests that read like the YAML."""

import re
from typing import Any, Final

from pydantic import ValidationError
from pydantic.alias_generators import to_camel

from kubetune_contract import paths
from kubetune_contract.base import ContractModel
from kubetune_contract.config import RunConfig
from kubetune_contract.errors import ConfigError, explain
from kubetune_contract.exit_codes import USER_ERRORS
from kubetune_contract.presets import resolve
from kubetune_contract.staging import StageSource
from kubetune_operator import names
from kubetune_operator.api import API_VERSION, KIND, FineTuneJob
from kubetune_operator.errors import InvalidJob
from kubetune_operator.settings import Settings
from kubetune_operator.sources import DatasetSpec, HuggingFaceSource, ValidationSpec

Manifest = dict[str, Any]

USER: Final = 65532
"""User and group of all containers; both images have it."""
GPU_RESOURCE: Final = "nvidia.com/gpu"
TERMINATION_GRACE_SECONDS: Final = 120
"""Time to finish a step and save a checkpoint after SIGTERM."""
TOKEN_SECONDS: Final = 3600
"""Lifetime of a progress token; the kubelet renews it at 80 %."""
STAGE_RETRIES: Final = 3
STAGE_REQUESTS: Final = {"cpu": "100m", "memory": "256Mi"}
"""Staging copies and hashes files as a stream."""
SECTIONS: Final = (
    "method",
    "adapter",
    "quantization",
    "dpo",
    "training",
    "checkpoint",
    "export",
    "logging",
    "profiler",
)
"""Parts of the spec that the run gets as they are."""
RANK_FIELD: Final = "metadata.annotations['batch.kubernetes.io/job-completion-index']"


def run_config(job: FineTuneJob) -> RunConfig:
    """The complete configuration of the run: the preset, the spec laid over it, and paths as the containers see them.

    Raises InvalidJob with every problem, spelt as in the manifest.
    """
    spec = job.spec
    problems: list[str] = []
    overrides: dict[str, Any] = {
        "model": {"path": f"{paths.MODELS_MOUNT}/{names.model_path(spec)}"},
        "dataset": _data(spec.dataset, DatasetSpec, "dataset", problems),
        "output_dir": f"{paths.OUTPUT_MOUNT}/{names.output_path(job)}",
    }
    if spec.validation is not None:
        overrides["validation"] = _data(spec.validation, ValidationSpec, "validation", problems)
    sections = {section: getattr(spec, section) for section in SECTIONS}
    overrides |= {section: value for section, value in sections.items() if value is not None}
    try:
        config = resolve(spec.preset, overrides, to_camel)
    except ConfigError as error:
        raise InvalidJob(f"spec.{problem}" for problem in (*problems, *error.problems)) from error
    if problems:
        raise InvalidJob(f"spec.{problem}" for problem in problems)
    return config


def _data(section: dict[str, Any], model: type[ContractModel], name: str, problems: list[str]) -> dict[str, Any]:
    """A section with a volumePath as the run sees it; its problems are added to `problems`."""
    try:
        model.model_validate(section)
    except ValidationError as error:
        fields = {to_camel(field) for field in model.model_fields}
        for problem in explain(error, model, to_camel):
            about_field = re.match(r"[\w.]+:", problem) or problem.split()[0] in fields
            problems.append(f"{name}{'.' if about_field else ': '}{problem}")
        return {"path": "unknown"}  # so that the problems of the other sections are found too
    return _mounted(section)


def _mounted(section: dict[str, Any]) -> dict[str, Any]:
    """The section with each volumePath as a path in the container."""
    mounted = {key: value for key, value in section.items() if key != "volumePath"}
    if "volumePath" in section:
        mounted["path"] = f"{paths.MODELS_MOUNT}/{section['volumePath']}"
    if "mixture" in section:
        mounted["mixture"] = [_mounted(other) for other in section["mixture"]]
    return mounted


def config_map(job: FineTuneJob, config: RunConfig, ca_pem: str) -> Manifest:
    """What the workers read: the run's configuration and the authority of the progress endpoint, "" without one."""
    data = {paths.RUN_CONFIG_FILE: config.to_json(indent=2) + "\n"}
    if ca_pem:
        data[paths.CA_FILE] = ca_pem
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": _owned(job, names.config_map_name(job.name), names.job_labels(job.name)),
        "data": data,
    }


def service(job: FineTuneJob) -> Manifest:
    """The headless Service under which the workers find rank 0. Names exist before the pods are ready."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": _owned(job, names.service_name(job.name), names.job_labels(job.name)),
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,
            "selector": {names.JOB_LABEL: job.name, names.ROLE_LABEL: names.WORKER},
            "ports": [{"name": "rendezvous", "port": names.RENDEZVOUS_PORT, "protocol": "TCP"}],
        },
    }


def worker_job(job: FineTuneJob, attempt: int, settings: Settings) -> Manifest:
    """One attempt: an Indexed Job whose pods start together and end together."""
    nodes = job.spec.workers.nodes
    labels = names.worker_labels(job.name, attempt)
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": _owned(job, names.job_name(job.name, attempt), labels),
        "spec": {
            "completionMode": "Indexed",
            "completions": nodes,
            "parallelism": nodes,
            "backoffLimit": 0,
            "suspend": job.spec.suspend,
            "podReplacementPolicy": "Failed",
            "podFailurePolicy": {
                "rules": [
                    {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
                    _fail_on_user_errors(),
                ]
            },
            "template": {"metadata": {"labels": labels}, "spec": _worker_pod(job, attempt, settings)},
        },
    }


def stage_job(job: FineTuneJob, settings: Settings) -> Manifest:
    """The Job that downloads or checks the weights, shared by all FineTuneJobs that need the same.

    Apply it under names.stage_manager(job).
    """
    claim = job.spec.storage.models.claim_name
    labels = names.stage_labels()
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {
            "name": names.stage_name(job.spec.model, claim),
            "namespace": job.namespace,
            "labels": labels,
            # No controller: an object has one at most, and this one has many owners.
            "ownerReferences": [owner(job, controller=False)],
        },
        "spec": {
            "backoffLimit": STAGE_RETRIES,
            "podReplacementPolicy": "Failed",
            "podFailurePolicy": {
                "rules": [
                    {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
                    _fail_on_user_errors(),
                ]
            },
            "template": {
                "metadata": {"labels": labels},
                "spec": {
                    **_pod_defaults(settings),
                    "containers": [_stager(job, settings)],
                    "volumes": _common_volumes(job),
                },
            },
        },
    }


def stage_adoption(job: FineTuneJob) -> Manifest:
    """An apply that adds this job to the owners of a staging Job that is already there.

    It has no spec: the template of an existing Job cannot change, and a Job that has gone is not created by it.
    """
    claim = job.spec.storage.models.claim_name
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {
            "name": names.stage_name(job.spec.model, claim),
            "namespace": job.namespace,
            "ownerReferences": [owner(job, controller=False)],
        },
    }


def owner(job: FineTuneJob, *, controller: bool) -> Manifest:
    """The reference with which an object goes when its FineTuneJob goes."""
    reference = {"apiVersion": API_VERSION, "kind": KIND, "name": job.name, "uid": job.uid}
    return {**reference, "controller": True} if controller else reference


def _owned(job: FineTuneJob, name: str, labels: dict[str, str]) -> Manifest:
    return {
        "name": name,
        "namespace": job.namespace,
        "labels": labels,
        "ownerReferences": [owner(job, controller=True)],
    }


def _worker_pod(job: FineTuneJob, attempt: int, settings: Settings) -> Manifest:
    output = {"claimName": job.spec.storage.output.claim_name}
    return {
        **_pod_defaults(settings),
        "subdomain": names.service_name(job.name),
        "terminationGracePeriodSeconds": TERMINATION_GRACE_SECONDS,
        "containers": [_trainer(job, attempt, settings)],
        "volumes": [
            *_common_volumes(job),
            {"name": names.OUTPUT_VOLUME, "persistentVolumeClaim": output},
            {"name": "config", "configMap": {"name": names.config_map_name(job.name)}},
            {"name": "token", "projected": {"sources": [_progress_token()]}},
            {"name": "shm", "emptyDir": {"medium": "Memory"}},
        ],
    }


def _trainer(job: FineTuneJob, attempt: int, settings: Settings) -> Manifest:
    return {
        **_container_defaults(settings),
        "args": ["launch", "--config", f"{paths.CONFIG_MOUNT}/{paths.RUN_CONFIG_FILE}"],
        "env": [
            *_scratch_variables(),
            {"name": paths.CACHE_ENV, "value": f"{paths.OUTPUT_MOUNT}/{paths.CACHE_DIR}"},
            *_rendezvous(job, attempt),
            *_threads(job),
            *_progress_url(job, attempt, settings),
        ],
        "ports": [{"name": "rendezvous", "containerPort": names.RENDEZVOUS_PORT, "protocol": "TCP"}],
        "resources": _worker_resources(job),
        "volumeMounts": [
            {"name": names.MODELS_VOLUME, "mountPath": paths.MODELS_MOUNT, "readOnly": True},
            {"name": names.OUTPUT_VOLUME, "mountPath": paths.OUTPUT_MOUNT},
            {"name": "config", "mountPath": paths.CONFIG_MOUNT, "readOnly": True},
            {"name": "token", "mountPath": paths.TOKEN_MOUNT, "readOnly": True},
            {"name": "shm", "mountPath": "/dev/shm"},  # noqa: S108 - the container's own
            {"name": "scratch", "mountPath": "/tmp"},  # noqa: S108
        ],
    }


def _stager(job: FineTuneJob, settings: Settings) -> Manifest:
    return {
        **_container_defaults(settings),
        "args": ["stage", "--source", _stage_source(job).model_dump_json(by_alias=True, exclude_defaults=True)],
        "env": [*_scratch_variables(), *_hub_variables(job.spec.model.hugging_face, settings)],
        "resources": {"requests": STAGE_REQUESTS},
        "volumeMounts": [
            {"name": names.MODELS_VOLUME, "mountPath": paths.MODELS_MOUNT},
            {"name": "scratch", "mountPath": "/tmp"},  # noqa: S108
        ],
    }


def _stage_source(job: FineTuneJob) -> StageSource:
    path, hub = names.model_path(job.spec), job.spec.model.hugging_face
    if hub is None:
        return StageSource(path=path)
    return StageSource(path=path, repo=hub.repo, revision=hub.revision, ignore_patterns=hub.ignore_patterns)


def _pod_defaults(settings: Settings) -> Manifest:
    defaults: Manifest = {
        "restartPolicy": "Never",
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER,
            "runAsGroup": USER,
            "fsGroup": USER,
            "fsGroupChangePolicy": "OnRootMismatch",  # a walk over every file of a large volume takes minutes
            "seccompProfile": {"type": "RuntimeDefault"},
        },
    }
    if settings.image_pull_secrets:
        defaults["imagePullSecrets"] = [{"name": name} for name in settings.image_pull_secrets]
    return defaults


def _container_defaults(settings: Settings) -> Manifest:
    return {
        "name": names.CONTAINER,
        "image": settings.trainer_image,
        "imagePullPolicy": settings.image_pull_policy,
        "terminationMessagePath": paths.TERMINATION_LOG,
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
    }


def _fail_on_user_errors() -> Manifest:
    codes = {"containerName": names.CONTAINER, "operator": "In", "values": list(USER_ERRORS)}
    return {"action": "FailJob", "onExitCodes": codes}


def _common_volumes(job: FineTuneJob) -> list[Manifest]:
    models = {"claimName": job.spec.storage.models.claim_name}
    return [{"name": names.MODELS_VOLUME, "persistentVolumeClaim": models}, {"name": "scratch", "emptyDir": {}}]


def _progress_token() -> Manifest:
    return {
        "serviceAccountToken": {
            "path": paths.TOKEN_FILE,
            "audience": paths.TOKEN_AUDIENCE,
            "expirationSeconds": TOKEN_SECONDS,
        }
    }


def _worker_resources(job: FineTuneJob) -> Manifest:
    workers = job.spec.workers
    gpus = {GPU_RESOURCE: workers.gpus_per_node} if workers.gpus_per_node else {}
    amounts = {"requests": workers.resources.requests, "limits": {**workers.resources.limits, **gpus}}
    return {side: {name: str(amount) for name, amount in of.items()} for side, of in amounts.items() if of}


def _scratch_variables() -> list[Manifest]:
    """The root filesystem is read-only: what libraries write goes to the scratch volume."""
    return [
        {"name": "HOME", "value": "/tmp"},  # noqa: S108
        {"name": "HF_HOME", "value": "/tmp/huggingface"},  # noqa: S108
        {"name": "MPLCONFIGDIR", "value": "/tmp/matplotlib"},  # noqa: S108
    ]


def _rendezvous(job: FineTuneJob, attempt: int) -> list[Manifest]:
    workers = job.spec.workers
    leader = names.leader_host(job.name, attempt) if workers.nodes > 1 else "127.0.0.1"
    return [
        {"name": "PET_NNODES", "value": str(workers.nodes)},
        {"name": "PET_NPROC_PER_NODE", "value": str(max(1, workers.gpus_per_node))},
        {"name": "PET_NODE_RANK", "valueFrom": {"fieldRef": {"fieldPath": RANK_FIELD}}},
        {"name": "PET_MASTER_ADDR", "value": leader},
        {"name": "PET_MASTER_PORT", "value": str(names.RENDEZVOUS_PORT)},
    ]


def _threads(job: FineTuneJob) -> list[Manifest]:
    """On the CPU, as many threads as the pod has cores (rounded up); without this, as many as the node has."""
    workers = job.spec.workers
    side = next((side for side in ("limits", "requests") if "cpu" in getattr(workers.resources, side)), None)
    if workers.gpus_per_node or side is None:
        return []
    return [{"name": "OMP_NUM_THREADS", "valueFrom": {"resourceFieldRef": {"resource": f"{side}.cpu", "divisor": "1"}}}]


def _progress_url(job: FineTuneJob, attempt: int, settings: Settings) -> list[Manifest]:
    if settings.progress_url is None:
        return []
    path = paths.PROGRESS_PATH.format(namespace=job.namespace, name=job.name, attempt=attempt)
    return [{"name": paths.PROGRESS_URL_ENV, "value": settings.progress_url + path}]


def _hub_variables(source: HuggingFaceSource | None, settings: Settings) -> list[Manifest]:
    variables: list[Manifest] = []
    if source is None:
        return variables
    if settings.hub_endpoint:
        variables.append({"name": "HF_ENDPOINT", "value": settings.hub_endpoint})
    if source.token_secret_ref:
        secret = source.token_secret_ref
        reference = {"secretKeyRef": {"name": secret.name, "key": secret.key}}
        variables.append({"name": "HF_TOKEN", "valueFrom": reference})
    return variables
