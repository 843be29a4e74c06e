"""What `kubectl apply` prints for workers that cannot be, word by word."""

import pytest

BAD = {
    "no worker": (
        {"nodes": 0},
        ["spec.workers.nodes: Invalid value: 0: spec.workers.nodes in body should be greater than or equal to 1"],
    ),
    "less than no GPU": (
        {"gpusPerNode": -1},
        [
            "spec.workers.gpusPerNode: Invalid value: -1: "
            "spec.workers.gpusPerNode in body should be greater than or equal to 0"
        ],
    ),
    "GPUs among the resources": (
        {"resources": {"limits": {"nvidia.com/gpu": 1}}},
        ["spec.workers: Invalid value: resources must not name nvidia.com/gpu: set gpusPerNode"],
    ),
    "other GPUs among the resources": (
        {"gpuResource": "amd.com/gpu", "resources": {"limits": {"amd.com/gpu": 1}}},
        ["spec.workers: Invalid value: resources must not name amd.com/gpu: set gpusPerNode"],
    ),
    "a toleration of everything by a slip": (
        {"tolerations": [{"effect": "NoSchedule"}]},
        ["spec.workers.tolerations[0]: Invalid value: a toleration without key needs operator Exists"],
    ),
    "patience with a taint that asks for none": (
        {"tolerations": [{"key": "a", "effect": "NoSchedule", "tolerationSeconds": 3}]},
        ["spec.workers.tolerations[0]: Invalid value: tolerationSeconds needs effect NoExecute"],
    ),
    "domains that are only wished for": (
        {
            "topologySpreadConstraints": [
                {"topologyKey": "zone", "whenUnsatisfiable": "ScheduleAnyway", "minDomains": 2}
            ]
        },
        ["spec.workers.topologySpreadConstraints[0]: Invalid value: minDomains needs whenUnsatisfiable DoNotSchedule"],
    ),
    "a variable of the operator's": (
        {"env": [{"name": "PET_NNODES", "value": "3"}]},
        ["spec.workers.env[0]: Invalid value: variable PET_NNODES is set by the operator: take it out"],
    ),
    "a variable with two values": (
        {"env": [{"name": "A", "value": "b", "valueFrom": {"secretKeyRef": {"name": "s", "key": "k"}}}]},
        ["spec.workers.env[0]: Invalid value: a variable has value or valueFrom, not both"],
    ),
    "a volume of the operator's": (
        {"volumes": [{"name": "token", "emptyDir": {}}]},
        ["spec.workers.volumes[0]: Invalid value: volume token is the operator's own: choose another name"],
    ),
    "a volume from two places": (
        {"volumes": [{"name": "a", "emptyDir": {}, "secret": {"secretName": "s"}}]},
        [
            "spec.workers.volumes[0]: Invalid value: a volume needs exactly one source: configMap, secret, "
            "persistentVolumeClaim, emptyDir, ephemeral, csi or downwardAPI"
        ],
    ),
    "a mount of no volume": (
        {"volumeMounts": [{"name": "a", "mountPath": "/a"}]},
        ["spec.workers: Invalid value: every one of volumeMounts must name one of volumes"],
    ),
    "a mount over the operator's own": (
        {
            "volumes": [{"name": "a", "emptyDir": {}}],
            "volumeMounts": [{"name": "a", "mountPath": "/kubetune/token"}],
        },
        [
            "spec.workers.volumeMounts[0]: Invalid value: mountPath /kubetune/token is taken: "
            "nothing is mounted at or below /kubetune, /tmp, /dev, /proc, /sys"
        ],
    ),
    "a way out of the volume": (
        {
            "volumes": [{"name": "a", "emptyDir": {}}],
            "volumeMounts": [{"name": "a", "mountPath": "/a", "subPath": "b/../../c"}],
        },
        [
            "spec.workers.volumeMounts[0]: Invalid value: subPath must be a path below the volume's root: "
            "without a leading '/' and without '..'"
        ],
    ),
    "a label of the operator's": (
        {"labels": {"kubetune.io/job": "other"}},
        [
            "spec.workers: Invalid value: labels must not begin with kubetune.io/, batch.kubernetes.io/, job-name, "
            "controller-uid, app.kubernetes.io/managed-by, kueue.x-k8s.io/queue-name, kueue.x-k8s.io/priority-class, "
            "kueue.x-k8s.io/managed: those are set for you"
        ],
    ),
    "a unit that does not exist": (
        {"resources": {"limits": {"memory": "16GB"}}},
        [
            'spec.workers.resources.limits.memory: Invalid value: "16GB": spec.workers.resources.limits.memory '
            r"in body should match '^[0-9]+(\.[0-9]+)?(m|k|Ki|[MGTPE]i?|e[0-9]+)?$'"
        ],
    ),
    "less than no CPU": (
        {"resources": {"requests": {"cpu": -1}}},
        [
            "spec.workers.resources.requests.cpu: Invalid value: -1: "
            "spec.workers.resources.requests.cpu in body should be greater than or equal to 0"
        ],
    ),
}


@pytest.mark.parametrize(("workers", "lines"), BAD.values(), ids=BAD.keys())
def test_kubectl_refuses_the_workers(refused, manifest, workers, lines):
    refused(manifest("bad", workers=workers), lines)
