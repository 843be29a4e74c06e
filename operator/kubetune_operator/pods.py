"""Pods of a FineTuneJob: what all of them have in common, and the worker's. Pure, and reads like the YAML."""

from typing import Any, Final

from kubetune_contract import paths
from kubetune_operator import names
from kubetune_operator.api import FineTuneJob
from kubetune_operator.placement import pull_secrets, worker_placement
from kubetune_operator.settings import Settings

Manifest = dict[str, Any]

USER: Final = 65532
"""User and group of all containers; both images have it."""
TERMINATION_GRACE_SECONDS: Final = 120
"""Time to finish a step and save a checkpoint after SIGTERM."""
TOKEN_SECONDS: Final = 3600
"""Lifetime of a progress token; the kubelet renews it at 80 %."""
PINNING: Final = {
    "runAsUser": 0,
    "runAsNonRoot": False,
    "capabilities": {"drop": ["ALL"], "add": ["IPC_LOCK"]},
}
"""With this RDMA registers memory beyond the node's limit of locked pages. Only root's processes get a capability that
is added; without the others this root may do no more to files than their owner and group may."""
THREADS: Final = "OMP_NUM_THREADS"
RANK_FIELD: Final = "metadata.annotations['batch.kubernetes.io/job-completion-index']"


def worker_pod(job: FineTuneJob, attempt: int, settings: Settings) -> Manifest:
    """The pod of one worker: its spec.workers decides where it runs, the rest is the same for all."""
    output = {"claimName": job.spec.storage.output.claim_name}
    return {
        **pod_defaults(settings, job.spec.workers.image_pull_secrets),
        **worker_placement(job, names.attempt_selector(job.name, attempt)),
        "subdomain": names.service_name(job.name),
        "terminationGracePeriodSeconds": TERMINATION_GRACE_SECONDS,
        "containers": [_trainer(job, attempt, settings)],
        "volumes": [
            *(volume.to_dict() for volume in job.spec.workers.volumes),
            *common_volumes(job),
            {"name": names.OUTPUT_VOLUME, "persistentVolumeClaim": output},
            {"name": "config", "configMap": {"name": names.config_map_name(job.name)}},
            {"name": "token", "projected": {"sources": [_progress_token()]}},
            {"name": "shm", "emptyDir": {"medium": "Memory"}},
        ],
    }


def _trainer(job: FineTuneJob, attempt: int, settings: Settings) -> Manifest:
    """What the user adds goes first in each list: an index in the API server's words is then the manifest's."""
    workers = job.spec.workers
    return {
        **container_defaults(settings, PINNING if workers.rdma else {}),
        "args": ["launch", "--config", f"{paths.CONFIG_MOUNT}/{paths.RUN_CONFIG_FILE}"],
        "env": [
            *(variable.to_dict() for variable in workers.env),
            *scratch_variables(),
            {"name": paths.CACHE_ENV, "value": _cache(job)},
            *_rendezvous(job, attempt),
            *_threads(job),
            *_progress_url(job, attempt, settings),
        ],
        "ports": [{"name": "rendezvous", "containerPort": names.RENDEZVOUS_PORT, "protocol": "TCP"}],
        "resources": _worker_resources(job),
        "volumeMounts": [
            *(mount.to_dict() for mount in workers.volume_mounts),
            {"name": names.MODELS_VOLUME, "mountPath": paths.MODELS_MOUNT, "readOnly": True},
            {"name": names.OUTPUT_VOLUME, "mountPath": paths.OUTPUT_MOUNT},
            {"name": "config", "mountPath": paths.CONFIG_MOUNT, "readOnly": True},
            {"name": "token", "mountPath": paths.TOKEN_MOUNT, "readOnly": True},
            {"name": "shm", "mountPath": "/dev/shm"},  # noqa: S108 - the container's own
            {"name": "scratch", "mountPath": "/tmp"},  # noqa: S108
        ],
    }


def _cache(job: FineTuneJob) -> str:
    """The folder of tokenized data. Another user's files would be in the way of jobs that share it."""
    below = f"{names.output_path(job)}/{paths.CACHE_DIR}" if job.spec.workers.rdma else paths.CACHE_DIR
    return f"{paths.OUTPUT_MOUNT}/{below}"


def pod_defaults(settings: Settings, secrets: list[str]) -> Manifest:
    """What every pod has. `secrets` open the image's registry, beside those of the settings."""
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
    opening = pull_secrets([*settings.image_pull_secrets, *secrets])
    return {**defaults, "imagePullSecrets": opening} if opening else defaults


def container_defaults(settings: Settings, security: Manifest | None = None) -> Manifest:
    """What every container has: no privilege but what `security` adds, and no place to write but its volumes."""
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
            **(security or {}),
        },
    }


def common_volumes(job: FineTuneJob) -> list[Manifest]:
    """The volumes of every pod."""
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
    gpus = {workers.gpu_resource: workers.gpus_per_node} if workers.gpus_per_node else {}
    amounts = {"requests": workers.resources.requests, "limits": {**workers.resources.limits, **gpus}}
    return {side: {name: str(amount) for name, amount in of.items()} for side, of in amounts.items() if of}


def scratch_variables() -> list[Manifest]:
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
    chosen = any(variable.name == THREADS for variable in workers.env)
    if chosen or workers.gpus_per_node or side is None:
        return []
    return [{"name": THREADS, "valueFrom": {"resourceFieldRef": {"resource": f"{side}.cpu", "divisor": "1"}}}]


def _progress_url(job: FineTuneJob, attempt: int, settings: Settings) -> list[Manifest]:
    if settings.progress_url is None:
        return []
    path = paths.PROGRESS_PATH.format(namespace=job.namespace, name=job.name, attempt=attempt)
    return [{"name": paths.PROGRESS_URL_ENV, "value": settings.progress_url + path}]
