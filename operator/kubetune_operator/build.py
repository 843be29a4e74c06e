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
from kubetune_operator import changes, names
from kubetune_operator.api import API_VERSION, KIND, FineTuneJob
from kubetune_operator.contents import folder_of
from kubetune_operator.errors import InvalidJob
from kubetune_operator.placement import gang_annotations, pod_annotations, pod_labels
from kubetune_operator.pods import worker_pod
from kubetune_operator.settings import Settings
from kubetune_operator.sources import DataPlace, DatasetSpec, ValidationSpec

Manifest = dict[str, Any]

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
PLACES: Final = tuple(to_camel(name) for name in DataPlace.model_fields)
"""Fields that say where rows come from."""


def run_config(job: FineTuneJob) -> RunConfig:
    """The complete configuration of the run: the preset, the spec laid over it, and paths as the containers see them.

    Raises InvalidJob with every problem, spelt as in the manifest.
    """
    spec = job.spec
    problems: list[str] = []
    overrides: dict[str, Any] = {
        "model": {"path": f"{paths.MODELS_MOUNT}/{folder_of(spec.model)}"},
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
    """The section with each place of rows as a path in the container."""
    mounted = {key: value for key, value in section.items() if key not in PLACES}
    given = {key: section[key] for key in PLACES if section.get(key) is not None}
    if given:
        mounted["path"] = f"{paths.MODELS_MOUNT}/{folder_of(DataPlace.model_validate(given))}"
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
                    fail_on_user_errors(),
                ]
            },
            "template": {
                "metadata": {"labels": pod_labels(job, labels), "annotations": pod_annotations(job)},
                "spec": worker_pod(job, attempt, settings),
            },
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


def fail_on_user_errors() -> Manifest:
    """A rule of a podFailurePolicy: what the user must change is not tried again."""
    codes = {"containerName": names.CONTAINER, "operator": "In", "values": list(USER_ERRORS)}
    return {"action": "FailJob", "onExitCodes": codes}
