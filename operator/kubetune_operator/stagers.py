"""The Jobs that put models and data on the models claim, or check what is there: pure functions like those of build.

One Job is shared by all FineTuneJobs that need the same content on the same claim.
"""

from typing import Any, Final

from kubetune_contract import paths
from kubetune_operator import names
from kubetune_operator.api import FineTuneJob
from kubetune_operator.build import Manifest, fail_on_user_errors, owner
from kubetune_operator.contents import Content
from kubetune_operator.placement import SIDECAR_OFF, stage_placement
from kubetune_operator.pods import common_volumes, container_defaults, pod_defaults, scratch_variables
from kubetune_operator.settings import Settings
from kubetune_operator.sources import HuggingFaceSource, S3Source

STAGE_RETRIES: Final = 3
STAGE_REQUESTS: Final = {"cpu": "100m", "memory": "256Mi"}
"""Staging copies and hashes files as a stream."""
_OPTIONAL_KEY: Final = "AWS_SESSION_TOKEN"
_KEYS: Final = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", _OPTIONAL_KEY)
"""Of the Secret with a bucket's credentials, and the variables that take them."""


def stage_job(job: FineTuneJob, content: Content, settings: Settings) -> Manifest:
    """The Job that stages one content. Apply it under names.stage_manager(job)."""
    labels = names.stage_labels()
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {
            **_joined(job, content),
            "labels": {**labels, **({names.QUEUE_LABEL: settings.stage_queue} if settings.stage_queue else {})},
        },
        "spec": {
            "backoffLimit": STAGE_RETRIES,
            "podReplacementPolicy": "Failed",
            "podFailurePolicy": {
                "rules": [
                    {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
                    fail_on_user_errors(),
                ]
            },
            "template": {
                "metadata": {"labels": {**SIDECAR_OFF, **labels}, "annotations": SIDECAR_OFF},
                "spec": {
                    **pod_defaults(settings, job.spec.workers.image_pull_secrets),
                    **stage_placement(job.spec),
                    "containers": [_stager(content, settings)],
                    "volumes": common_volumes(job),
                },
            },
        },
    }


def stage_adoption(job: FineTuneJob, content: Content) -> Manifest:
    """An apply that adds this job to the owners of a staging Job that is already there.

    It has no spec: the template of an existing Job cannot change, and a Job that has gone is not created by it.
    """
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": _joined(job, content)}


def _joined(job: FineTuneJob, content: Content) -> Manifest:
    return {
        "name": names.stage_name(job.spec, content),
        "namespace": job.namespace,
        # No controller: an object has one at most, and this one has many owners.
        "ownerReferences": [owner(job, controller=False)],
    }


def _stager(content: Content, settings: Settings) -> Manifest:
    source = content.source.model_copy(update={"trusted_seconds": settings.staged_trust_seconds})
    return {
        **container_defaults(settings),
        "args": ["stage", "--source", source.model_dump_json(by_alias=True, exclude_defaults=True)],
        "env": [
            *scratch_variables(),
            *_hub_variables(content.place.hugging_face, settings),
            *_bucket_variables(content.place.s3),
        ],
        "resources": {"requests": STAGE_REQUESTS},
        "volumeMounts": [
            {"name": names.MODELS_VOLUME, "mountPath": paths.MODELS_MOUNT},
            {"name": "scratch", "mountPath": "/tmp"},  # noqa: S108
        ],
    }


def _hub_variables(source: HuggingFaceSource | None, settings: Settings) -> list[Manifest]:
    variables: list[Manifest] = []
    if source is None:
        return variables
    if settings.hub_endpoint:
        variables.append({"name": "HF_ENDPOINT", "value": settings.hub_endpoint})
    if source.token_secret_ref:
        secret = source.token_secret_ref
        variables.append(_secret("HF_TOKEN", {"name": secret.name, "key": secret.key}))
    return variables


def _bucket_variables(source: S3Source | None) -> list[Manifest]:
    if source is None or source.credentials_secret_ref is None:
        return []
    name = source.credentials_secret_ref.name
    return [
        _secret(key, {"name": name, "key": key, **({"optional": True} if key == _OPTIONAL_KEY else {})})
        for key in _KEYS
    ]


def _secret(variable: str, reference: dict[str, Any]) -> Manifest:
    return {"name": variable, "valueFrom": {"secretKeyRef": reference}}
