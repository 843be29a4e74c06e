"""Where a FineTuneJob's pods may run, from spec.workers: parts of a pod that read like the YAML. Pure.

The staging pod holds no GPU, but it mounts the same claim and pulls the same image. It follows what says which nodes
(nodeSelector, nodeAffinity, tolerations) and as whom (service account, pull secrets), and nothing of what is about the
gang (spread, pod affinity, priority, scheduler, runtime class).
"""

from typing import Any, Final

from kubetune_operator.api import FineTuneJob, FineTuneJobSpec

Manifest = dict[str, Any]

ISTIO_INJECT: Final = "sidecar.istio.io/inject"
SIDECAR_OFF: Final = {ISTIO_INJECT: "false"}
"""As a label for Istio, as an annotation for its older versions. A sidecar would not end when the Job's own container
ends, and every byte between the workers would go through it."""
GROUP_SIZE: Final = "scheduling.volcano.sh/group-min-member"
"""On a Job: how many of its pods Volcano starts together."""
VOLCANO: Final = "volcano"


def worker_placement(job: FineTuneJob, selector: dict[str, str]) -> Manifest:
    """The scheduling fields of a worker pod. `selector` matches the pods of its attempt."""
    workers = job.spec.workers
    fields: Manifest = {
        **_shared(job.spec),
        "affinity": None if workers.affinity is None else workers.affinity.to_dict(),
        "topologySpreadConstraints": [
            {**spread.to_dict(), "labelSelector": {"matchLabels": selector}}
            for spread in workers.topology_spread_constraints
        ],
        "priorityClassName": workers.priority_class_name,
        "schedulerName": workers.scheduler_name,
        "runtimeClassName": workers.runtime_class_name,
    }
    if workers.host_network:
        # Cluster names are still looked up in the cluster: the workers find rank 0 by one.
        fields |= {"hostNetwork": True, "dnsPolicy": "ClusterFirstWithHostNet"}
    return {name: value for name, value in fields.items() if value}


def stage_placement(spec: FineTuneJobSpec) -> Manifest:
    """The scheduling fields of a staging pod. Jobs that differ in them do not share one."""
    affinity = spec.workers.affinity
    nodes = None if affinity is None else affinity.node_affinity
    fields: Manifest = {
        **_shared(spec),
        "affinity": nodes and {"nodeAffinity": nodes},
    }
    return {name: value for name, value in fields.items() if value}


def pull_secrets(names: list[str]) -> list[Manifest]:
    """Secrets of an image's registry; one that is named twice is enough once."""
    return [{"name": name} for name in dict.fromkeys(names)]


def pod_labels(job: FineTuneJob, own: dict[str, str]) -> dict[str, str]:
    """Labels of a worker pod; `own` are the operator's."""
    return {**SIDECAR_OFF, **job.spec.workers.labels, **own}


def pod_annotations(job: FineTuneJob) -> dict[str, str]:
    """Annotations of a worker pod."""
    return {**SIDECAR_OFF, **job.spec.workers.annotations}


def gang_annotations(job: FineTuneJob) -> dict[str, str]:
    """Annotations of a worker Job: schedulers look for what is about the whole gang there."""
    workers = job.spec.workers
    size = {GROUP_SIZE: str(workers.nodes)} if workers.scheduler_name == VOLCANO else {}
    return {**size, **workers.annotations}


def _shared(spec: FineTuneJobSpec) -> Manifest:
    workers = spec.workers
    return {
        "nodeSelector": workers.node_selector,
        "tolerations": [toleration.to_dict() for toleration in workers.tolerations],
        "serviceAccountName": workers.service_account_name,
    }
