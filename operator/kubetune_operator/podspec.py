"""What a worker pod takes from Kubernetes' own API, word for word: where it may run, what it mounts, what it is told.

Small types are closed models. Where Kubernetes' own schema is large it is kept as it is and judged by the API server
when the worker Job is created: a fault in it ends the FineTuneJob with the API server's own words.
"""

from typing import Annotated, Any, ClassVar, Final, Literal

from pydantic import Field

from kubetune_contract.base import ContractModel, Rule
from kubetune_operator.sources import DnsName

QualifiedName = Annotated[
    str,
    Field(pattern=r"^([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?$", max_length=317),
]
"""A key of a label, such as `cloud.google.com/gke-spot`."""
LabelValue = Annotated[str, Field(pattern=r"^([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)?$", max_length=63)]
DeviceName = Annotated[
    str, Field(pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?/[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?$", max_length=317)
]
"""An extended resource, such as `amd.com/gpu`."""
KubernetesObject = Annotated[dict[str, Any], Field(json_schema_extra={"x-kubernetes-preserve-unknown-fields": True})]
"""A part of Kubernetes' own API that is passed on as it stands."""

OWN_PREFIXES: Final = ("KUBETUNE_", "PET_")
OWN_VARIABLES: Final = ("HOME", "HF_HOME", "MPLCONFIGDIR")
"""Variables that the operator sets itself, beside those with its prefixes."""
OWN_VOLUMES: Final = ("models", "output", "config", "token", "shm", "scratch")
OWN_MOUNTS: Final = ("/kubetune", "/tmp", "/dev", "/proc", "/sys")  # noqa: S108 - the container's own
"""Folders of the container in which nothing else is mounted."""


class Toleration(ContractModel):
    """A taint that the pods put up with, as in a pod."""

    key: QualifiedName | None = None
    """Key of the taint; without one, and with operator Exists, every taint."""
    operator: Literal["Exists", "Equal"] = "Equal"
    """Whether the taint's value counts."""
    value: LabelValue | None = None
    """Value of the taint."""
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    """Effect of the taint; without one, every effect."""
    toleration_seconds: Annotated[int, Field(ge=0, le=10**9)] | None = None
    """Seconds for which a taint of effect NoExecute is put up with; without it, for ever."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            cel="has(self.key) || (has(self.operator) && self.operator == 'Exists')",
            holds=lambda toleration: toleration.key is not None or toleration.operator == "Exists",
            message="a toleration without key needs operator Exists",
        ),
        Rule(
            cel="!has(self.value) || !has(self.operator) || self.operator == 'Equal'",
            holds=lambda toleration: toleration.value is None or toleration.operator == "Equal",
            message="value does not go with operator Exists",
        ),
        Rule(
            cel="!has(self.tolerationSeconds) || (has(self.effect) && self.effect == 'NoExecute')",
            holds=lambda toleration: toleration.toleration_seconds is None or toleration.effect == "NoExecute",
            message="tolerationSeconds needs effect NoExecute",
        ),
    )


class Affinity(ContractModel):
    """Where the pods may run and beside what, as in a pod."""

    node_affinity: KubernetesObject | None = None
    """A NodeAffinity."""
    pod_affinity: KubernetesObject | None = None
    """A PodAffinity."""
    pod_anti_affinity: KubernetesObject | None = None
    """A PodAntiAffinity."""


class TopologySpread(ContractModel):
    """How the workers of an attempt are spread, as in a pod. The label selector is the operator's: these very pods."""

    topology_key: QualifiedName
    """Label of nodes whose values are the domains, such as `topology.kubernetes.io/zone`."""
    max_skew: int = Field(default=1, ge=1, le=1024)
    """How many more pods a domain may have than another."""
    when_unsatisfiable: Literal["DoNotSchedule", "ScheduleAnyway"] = "DoNotSchedule"
    """Whether a pod that would break the rule waits."""
    min_domains: Annotated[int, Field(ge=1, le=1024)] | None = None
    """Fewest domains over which the pods are spread."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            cel="!has(self.minDomains) || !has(self.whenUnsatisfiable) || self.whenUnsatisfiable == 'DoNotSchedule'",
            holds=lambda spread: spread.min_domains is None or spread.when_unsatisfiable == "DoNotSchedule",
            message="minDomains needs whenUnsatisfiable DoNotSchedule",
        ),
    )


class KeyRef(ContractModel):
    """One key of a Secret or ConfigMap in the job's namespace."""

    name: DnsName
    """Name of the object."""
    key: str = Field(min_length=1, max_length=253, pattern=r"^[-._a-zA-Z0-9]+$")
    """Key in the object."""
    optional: bool = False
    """Whether a pod starts without the variable where the object or key is missing; otherwise it waits for them."""


class ValueFrom(ContractModel):
    """Where a variable's value comes from: exactly one of the two."""

    secret_key_ref: KeyRef | None = None
    """A Secret. The kubelet reads it; the operator never does."""
    config_map_key_ref: KeyRef | None = None
    """A ConfigMap."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            cel="has(self.secretKeyRef) != has(self.configMapKeyRef)",
            holds=lambda source: (source.secret_key_ref is None) != (source.config_map_key_ref is None),
            message="valueFrom needs exactly one of secretKeyRef and configMapKeyRef",
        ),
    )


class EnvVar(ContractModel):
    """A variable of the workers' environment, as in a container."""

    name: str = Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", max_length=256)
    """Name of the variable."""
    value: Annotated[str, Field(max_length=4096)] | None = None
    """Its value."""
    value_from: ValueFrom | None = None
    """Where its value comes from."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            cel="!has(self.value) || !has(self.valueFrom)",
            holds=lambda variable: variable.value is None or variable.value_from is None,
            message="a variable has value or valueFrom, not both",
        ),
        Rule(
            cel=f"!(self.name in {list(OWN_VARIABLES)}) && "
            f"!{list(OWN_PREFIXES)}.exists(own, self.name.startsWith(own))",
            holds=lambda variable: not is_own_variable(variable.name),
            message="variable {name} is set by the operator: take it out",
        ),
    )


def is_own_variable(name: str) -> bool:
    """Whether the operator sets the variable itself."""
    return name in OWN_VARIABLES or name.startswith(OWN_PREFIXES)


class Volume(ContractModel):
    """A further volume of the workers: a name and one source, of the kinds that Pod Security `restricted` allows.

    A projected volume is not among them: it could hold a token for the API server.
    """

    name: str = Field(pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", max_length=63)
    """Name that volumeMounts refer to."""
    config_map: KubernetesObject | None = None
    """A ConfigMapVolumeSource."""
    secret: KubernetesObject | None = None
    """A SecretVolumeSource."""
    persistent_volume_claim: KubernetesObject | None = None
    """A PersistentVolumeClaimVolumeSource."""
    empty_dir: KubernetesObject | None = None
    """An EmptyDirVolumeSource."""
    ephemeral: KubernetesObject | None = None
    """An EphemeralVolumeSource."""
    csi: KubernetesObject | None = None
    """A CSIVolumeSource."""
    downward_api: Annotated[KubernetesObject | None, Field(alias="downwardAPI")] = None
    """A DownwardAPIVolumeSource."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            cel=f"!(self.name in {list(OWN_VOLUMES)})",
            holds=lambda volume: volume.name not in OWN_VOLUMES,
            message="volume {name} is the operator's own: choose another name",
        ),
        Rule(
            cel="[has(self.configMap), has(self.secret), has(self.persistentVolumeClaim), has(self.emptyDir), "
            "has(self.ephemeral), has(self.csi), has(self.downwardAPI)].filter(given, given).size() == 1",
            holds=lambda volume: len(volume.to_dict()) == 2,  # its name and one source
            message="a volume needs exactly one source: configMap, secret, persistentVolumeClaim, emptyDir, ephemeral, "
            "csi or downwardAPI",
        ),
    )


class VolumeMount(ContractModel):
    """Where a volume is seen in the workers' container."""

    name: str = Field(max_length=63)
    """Name of the volume."""
    mount_path: str = Field(pattern=r"^/[A-Za-z0-9._-]+(/[A-Za-z0-9._-]+)*$", max_length=512)
    """Absolute path in the container."""
    sub_path: Annotated[str, Field(min_length=1, max_length=512)] | None = None
    """Folder in the volume, in place of its root."""
    read_only: bool = False
    """Whether the workers may only read."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            cel=f"!self.mountPath.matches('^({'|'.join(OWN_MOUNTS)})(/|$)')",
            holds=lambda mount: not any(f"{mount.mount_path}/".startswith(f"{own}/") for own in OWN_MOUNTS),
            message=f"mountPath {{mountPath}} is taken: nothing is mounted at or below {', '.join(OWN_MOUNTS)}",
        ),
        Rule(
            cel="!has(self.subPath) || "
            "!self.subPath.split('/').exists(part, part == '..') && !self.subPath.startsWith('/')",
            holds=lambda mount: (
                mount.sub_path is None or (".." not in mount.sub_path.split("/") and not mount.sub_path.startswith("/"))
            ),
            message="subPath must be a path below the volume's root: without a leading '/' and without '..'",
        ),
    )
