"""The gang of workers, as a person writes it."""

import re
from collections.abc import Callable, Iterable
from typing import Annotated, ClassVar, Final

from pydantic import Field

from kubetune_contract.base import ContractModel, Rule
from kubetune_operator.podspec import (
    Affinity,
    DeviceName,
    EnvVar,
    LabelValue,
    QualifiedName,
    Toleration,
    TopologySpread,
    Volume,
    VolumeMount,
)
from kubetune_operator.sources import DnsName

Quantity = Annotated[
    Annotated[int, Field(ge=0)]
    | Annotated[str, Field(pattern=r"^[0-9]+(\.[0-9]+)?(m|k|Ki|[MGTPE]i?|e[0-9]+)?$", max_length=32)],
    Field(json_schema_extra={"x-kubernetes-int-or-string": True}),
]
"""An amount, such as 2, 500m or 16Gi."""

_UNITS: Final = {
    "m": 1e-3,
    "": 1.0,
    "k": 1e3,
    **{unit: 1e3**power for power, unit in enumerate("MGTPE", 2)},
    **{f"{unit}i": 1024.0**power for power, unit in enumerate("KMGTPE", 1)},
}


def amount(quantity: int | str) -> float:
    """The number that a quantity stands for."""
    found = re.fullmatch(r"([0-9.]+)(?:e([0-9]+)|([a-zA-Z]*))", str(quantity))
    assert found is not None, "Quantity has a pattern"
    return float(found[1]) * (10.0 ** int(found[2]) if found[2] else _UNITS[found[3]])


GPU_RESOURCE: Final = "nvidia.com/gpu"
OWN_LABELS: Final = (
    *("kubetune.io/", "batch.kubernetes.io/", "job-name", "controller-uid", "app.kubernetes.io/managed-by"),
    *("kueue.x-k8s.io/queue-name", "kueue.x-k8s.io/priority-class", "kueue.x-k8s.io/managed"),
)
"""Beginnings of labels and annotations that are set by the operator, by the Job controller or through spec.queue."""


class Resources(ContractModel):
    """Resources of one worker pod, as in a container."""

    requests: dict[str, Quantity] = Field(default={}, max_length=32)
    """What the scheduler sets aside."""
    limits: dict[str, Quantity] = Field(default={}, max_length=32)
    """What the pod may use at most."""


def _keeps_off_ours(field: str, keys: Callable[["Workers"], Iterable[str]]) -> Rule:
    return Rule(
        cel=f"!has(self.{field}) || !self.{field}.exists(key, {list(OWN_LABELS)}.exists(own, key.startsWith(own)))",
        holds=lambda workers: not any(key.startswith(OWN_LABELS) for key in keys(workers)),
        message=f"{field} must not begin with {', '.join(OWN_LABELS)}: those are set for you",
    )


class Workers(ContractModel):
    """The gang that trains together."""

    nodes: int = Field(default=1, ge=1, le=1024)
    """Worker pods; all of them start and restart together."""
    gpus_per_node: int = Field(default=0, ge=0, le=64)
    """GPUs of each pod, one process per GPU. 0 trains on the CPU with one process per pod."""
    gpu_resource: DeviceName = GPU_RESOURCE
    """The resource under which nodes offer their GPUs, such as `amd.com/gpu` or `nvidia.com/mig-3g.40gb`."""
    gpu_memory: Quantity | None = None
    """Memory of one GPU, such as 80Gi: a run that cannot fit fails before any GPU is held."""
    resources: Resources = Resources()
    """CPU, memory and other devices of each pod. GPUs are added from gpusPerNode."""
    node_selector: dict[QualifiedName, LabelValue] = Field(default={}, max_length=32)
    """Labels that a node must have. The staging pod follows it too."""
    affinity: Affinity | None = None
    """Where the pods may run and beside what. The staging pod follows nodeAffinity."""
    tolerations: list[Toleration] = Field(default=[], max_length=32)
    """Taints that the pods put up with. The staging pod has them too."""
    topology_spread_constraints: list[TopologySpread] = Field(default=[], max_length=8)
    """How the pods are spread over zones, racks or nodes."""
    priority_class_name: DnsName | None = None
    """PriorityClass of the pods."""
    scheduler_name: DnsName | None = None
    """Scheduler that places the pods, in place of the cluster's default one, such as `volcano`."""
    runtime_class_name: DnsName | None = None
    """RuntimeClass of the pods, such as `nvidia`."""
    service_account_name: DnsName | None = None
    """ServiceAccount of the pods, also for staging; the operator's settings must allow it. Its token is not mounted."""
    image_pull_secrets: list[DnsName] = Field(default=[], max_length=16)
    """Secrets in the job's namespace that open the trainer image's registry, beside those of the settings."""
    labels: dict[QualifiedName, LabelValue] = Field(default={}, max_length=32)
    """Further labels of the pods, such as a scheduler's pod group."""
    annotations: dict[QualifiedName, Annotated[str, Field(max_length=4096)]] = Field(default={}, max_length=32)
    """Further annotations of the pods, such as a scheduler's pod group."""
    env: list[EnvVar] = Field(default=[], max_length=64)
    """Further variables of the workers' environment."""
    volumes: list[Volume] = Field(default=[], max_length=16)
    """Further volumes of the pods."""
    volume_mounts: list[VolumeMount] = Field(default=[], max_length=32)
    """Where the further volumes are seen."""
    host_network: bool = False
    """Whether the pods use their nodes' own network; the operator's settings must allow it."""
    rdma: bool = False
    """Whether the pods may pin memory for RDMA beyond their nodes' limit of locked memory: as root with no capability
    but IPC_LOCK. The operator's settings must allow it."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            cel="!has(self.resources) || ["
            "has(self.resources.requests) ? self.resources.requests : {}, "
            "has(self.resources.limits) ? self.resources.limits : {}"
            "].all(amounts, !(self.gpuResource in amounts))",
            holds=lambda workers: (
                workers.gpu_resource not in {**workers.resources.requests, **workers.resources.limits}
            ),
            message="resources must not name {gpuResource}: set gpusPerNode",
        ),
        Rule(
            cel="!has(self.volumeMounts) || self.volumeMounts.all(mount, "
            "has(self.volumes) && self.volumes.exists(volume, volume.name == mount.name))",
            holds=lambda workers: (
                {mount.name for mount in workers.volume_mounts} <= {volume.name for volume in workers.volumes}
            ),
            message="every one of volumeMounts must name one of volumes",
        ),
        _keeps_off_ours("labels", lambda workers: workers.labels),
        _keeps_off_ours("annotations", lambda workers: workers.annotations),
        Rule(
            cel="!has(self.gpuMemory) || (has(self.gpusPerNode) && self.gpusPerNode > 0)",
            holds=lambda workers: workers.gpu_memory is None or workers.gpus_per_node > 0,
            message="gpuMemory is about GPUs: set gpusPerNode too",
        ),
    )


class Queue(ContractModel):
    """Where the workers wait for quota in a cluster with Kueue."""

    name: DnsName
    """LocalQueue in the job's namespace. Kueue alone decides when the workers start."""
    priority_class: DnsName | None = None
    """WorkloadPriorityClass: who is admitted, and preempted, first."""
