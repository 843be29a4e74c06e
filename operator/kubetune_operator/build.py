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
from kubetune_operator import changes, names
from kubetune_operator.api import API_VERSION, KIND, FineTuneJob
from kubetune_operator.errors import InvalidJob
from kubetune_operator.placement import SIDECAR_OFF, gang_annotations, pod_annotations, pod_labels, stage_placement
from kubetune_operator.pods import common_volumes, container_defaults, pod_defaults, scratch_variables, worker_pod
from kubetune_operator.settings import Settings
from kubetune_operator.sources import DatasetSpec, HuggingFaceSource, ValidationSpec

Manifest = dict[str, Any]

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
    labels, annotations = names.worker_labels(job.name, attempt), gang_annotations(job)
    annotations |= {names.GANG_ANNOTATION: changes.gang(job.spec)}
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {
            **_owned(job, names.job_name(job.name, attempt), {**labels, **_queue_labels(job)}),
            "annotations": annotations,
        },
        "spec": {
            "completionMode": "Indexed",
            "completions": nodes,
            "parallelism": nodes,
            "backoffLimit": 0,
            "suspend": job.spec.suspend or job.spec.queue is not None,  # Kueue resumes it
            "podReplacementPolicy": "Failed",
            "podFailurePolicy": {
                "rules": [
                    {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
                    _fail_on_user_errors(),
                ]
            },
            "template": {
                "metadata": {"labels": pod_labels(job, labels), "annotations": pod_annotations(job)},
                "spec": worker_pod(job, attempt, settings),
            },
        },
    }


def stage_job(job: FineTuneJob, settings: Settings) -> Manifest:
    """The Job that downloads or checks the weights, shared by all FineTuneJobs that need the same.

    Apply it under names.stage_manager(job).
    """
    labels = names.stage_labels()
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {
            "name": names.stage_name(job.spec),
            "namespace": job.namespace,
            "labels": {**labels, **({names.QUEUE_LABEL: settings.stage_queue} if settings.stage_queue else {})},
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
                "metadata": {"labels": {**SIDECAR_OFF, **labels}, "annotations": SIDECAR_OFF},
                "spec": {
                    **pod_defaults(settings, job.spec.workers.image_pull_secrets),
                    **stage_placement(job.spec),
                    "containers": [_stager(job, settings)],
                    "volumes": common_volumes(job),
                },
            },
        },
    }


def stage_adoption(job: FineTuneJob) -> Manifest:
    """An apply that adds this job to the owners of a staging Job that is already there.

    It has no spec: the template of an existing Job cannot change, and a Job that has gone is not created by it.
    """
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {
            "name": names.stage_name(job.spec),
            "namespace": job.namespace,
            "ownerReferences": [owner(job, controller=False)],
        },
    }


def owner(job: FineTuneJob, *, controller: bool) -> Manifest:
    """The reference with which an object goes when its FineTuneJob goes."""
    reference = {"apiVersion": API_VERSION, "kind": KIND, "name": job.name, "uid": job.uid}
    return {**reference, "controller": True} if controller else reference


def _queue_labels(job: FineTuneJob) -> dict[str, str]:
    queue = job.spec.queue
    if queue is None:
        return {}
    priority = {names.QUEUE_PRIORITY_LABEL: queue.priority_class} if queue.priority_class else {}
    return {names.QUEUE_LABEL: queue.name, **priority}


def _owned(job: FineTuneJob, name: str, labels: dict[str, str]) -> Manifest:
    return {
        "name": name,
        "namespace": job.namespace,
        "labels": labels,
        "ownerReferences": [owner(job, controller=True)],
    }


def _stager(job: FineTuneJob, settings: Settings) -> Manifest:
    return {
        **container_defaults(settings),
        "args": ["stage", "--source", _stage_source(job).model_dump_json(by_alias=True, exclude_defaults=True)],
        "env": [*scratch_variables(), *_hub_variables(job.spec.model.hugging_face, settings)],
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


def _fail_on_user_errors() -> Manifest:
    codes = {"containerName": names.CONTAINER, "operator": "In", "values": list(USER_ERRORS)}
    return {"action": "FailJob", "onExitCodes": codes}


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
