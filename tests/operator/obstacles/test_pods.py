"""What keeps pods from starting.

Cases called `real` have the essential fields of what Kubernetes v1.35 wrote when the case was made on a node. The
others cannot be made on one small node; their words are those of the documentation or source that the case names.
"""

from typing import Any, NamedTuple

import pytest
from tests.operator.obstacles.conftest import EARLIER, NOON, UNBOUND, event, on_a_node, unscheduled

from kubetune_operator.diagnosis import about
from kubetune_operator.obstacles import inquiries, obstacle

Object = dict[str, Any]


def test_what_runs_or_is_over_or_goes_has_no_obstacle(worker, waiting, condition):
    unscheduled = (condition("PodScheduled", "False", "Unschedulable", "no room"),)
    pods = [
        worker(ready=True),
        worker(0, "Failed", conditions=unscheduled),
        worker(0, "Pending", conditions=unscheduled, deletionTimestamp="2030-01-01T12:00:00Z"),
        worker(0, "Pending", state=waiting("ContainerCreating")),
        worker(0, "Pending", state=waiting("PodInitializing")),
    ]
    assert obstacle(pods) is None


def test_the_first_worker_with_an_obstacle_is_told(worker, condition):
    unscheduled = (condition("PodScheduled", "False", "Unschedulable", "no room"),)
    found = obstacle([worker(2, "Pending", conditions=unscheduled), worker(1, "Pending", conditions=unscheduled)])
    assert found.message == "worker 1 cannot be scheduled: no room"


def test_a_scheduling_gate_is_told_by_its_own_reason(worker, condition):
    gated = (condition("PodScheduled", "False", "SchedulingGated", "Scheduling is blocked due to gates"),)
    assert obstacle([worker(0, "Pending", conditions=gated)]).reason == "SchedulingGated"


@pytest.mark.parametrize(
    ("words", "claim"),
    [
        ('0/1 nodes are available: persistentvolumeclaim "models" not found. preemption: ...', "models"),
        ('persistentvolumeclaim "a-b.c" not found', "a-b.c"),
        ("0/1 nodes are available: 1 Insufficient cpu.", None),
    ],
)
def test_a_missing_claim_is_read_from_the_schedulers_words(worker, condition, words, claim):
    unscheduled = (condition("PodScheduled", "False", "Unschedulable", words),)
    found = obstacle([worker(0, "Pending", conditions=unscheduled, creationTimestamp="2030-01-01T12:00:00Z")])
    assert found.missing_claim == claim
    assert found.reason == ("VolumeMissing" if claim else "Unschedulable")
    assert found.since == NOON


def test_an_init_container_is_looked_at_too(worker, waiting):
    pod = worker(0, "Pending", state=waiting("PodInitializing"))
    init = {"name": "sidecar", "image": "proxy:1", "state": waiting("ErrImagePull", "denied")}
    pod["status"]["initContainerStatuses"] = [init]
    assert obstacle([pod]).message == "worker 0 cannot pull image proxy:1: denied"


def test_an_image_without_words_is_told_by_the_kubelets_reason(worker, waiting):
    pod = worker(0, "Pending", state=waiting("InvalidImageName"))
    pod["status"]["containerStatuses"][0]["image"] = "UPPER"
    assert obstacle([pod]).message == "worker 0 cannot pull image UPPER: InvalidImageName"


# ---------------------------------------------------------------- each obstacle, as a real cluster told it


class Case(NamedTuple):
    """One pod that does not start."""

    name: str
    status: Object
    events: tuple[Object, ...]
    """Of the pod, or of its claim `models` where the pod is not scheduled."""
    reason: str
    says: str


NO_HELP = (
    "no new claims to deallocate, preemption: 0/1 nodes are available: 1 Preemption is not helpful for scheduling."
)
CASES = [
    Case(
        "real: too few CPUs",
        unscheduled(f"0/1 nodes are available: 1 Insufficient cpu. {NO_HELP}"),
        (),
        "Unschedulable",
        f"worker 0 cannot be scheduled: 0/1 nodes are available: 1 Insufficient cpu. {NO_HELP} Wait for room, add "
        "nodes, or lower workers.resources.",
    ),
    Case(
        "real: no GPUs",
        unscheduled(f"0/1 nodes are available: 1 Insufficient nvidia.com/gpu. {NO_HELP}"),
        (),
        "Unschedulable",
        "Wait for GPUs to become free, add nodes with GPUs, or lower workers.gpusPerNode.",
    ),
    Case(
        "real: no node with such a label",
        unscheduled(f"0/1 nodes are available: 1 node(s) didn't match Pod's node affinity/selector. {NO_HELP}"),
        (),
        "Unschedulable",
        "No node has the labels that workers.nodeSelector and workers.affinity ask for.",
    ),
    Case(
        "real: the volume is on another node",
        unscheduled(f"0/1 nodes are available: 1 node(s) didn't match PersistentVolume's node affinity. {NO_HELP}"),
        (),
        "Unschedulable",
        "No free node can reach the volume: use one that the nodes can mount.",
    ),
    Case(
        "a taint, and cordoned nodes (scheduler's plugins; docs: Taints and Tolerations)",
        unscheduled(
            "0/3 nodes are available: 1 node(s) were unschedulable, 2 node(s) had untolerated taint {nvidia.com/gpu: }."
        ),
        (),
        "Unschedulable",
        "Tolerate the taint under workers.tolerations, or use other nodes. Nodes are cordoned: kubectl uncordon NODE",
    ),
    Case(
        "real: a gate of a queue",
        unscheduled("Scheduling is blocked due to non-empty scheduling gates", "SchedulingGated"),
        (),
        "SchedulingGated",
        "Whoever set the gate, such as a queue, must lift it.",
    ),
    Case(
        "real: a claim that does not exist",
        unscheduled('0/1 nodes are available: persistentvolumeclaim "models" not found. not found'),
        (),
        "VolumeMissing",
        'worker 0 cannot be scheduled: 0/1 nodes are available: persistentvolumeclaim "models" not found.',
    ),
    Case(
        "real: a claim that is not bound, before anybody has asked why",
        unscheduled(UNBOUND),
        (),
        "VolumeNotBound",
        UNBOUND,
    ),
    Case(
        "real: a claim of a StorageClass that does not exist",
        unscheduled(UNBOUND),
        (event("ProvisioningFailed", 'storageclass.storage.k8s.io "fast-ssd" not found'),),
        "VolumeNotBound",
        'worker 0 waits: PersistentVolumeClaim "models" is not bound: storageclass.storage.k8s.io "fast-ssd" not '
        "found. Name a StorageClass that exists and can provide it, or create a PersistentVolume for it.",
    ),
    Case(
        "real: a claim without a class and without a volume",
        unscheduled(UNBOUND),
        (
            event(
                "FailedBinding", "no persistent volumes available for this claim and no storage class is set", "Normal"
            ),
        ),
        "VolumeNotBound",
        '"models" is not bound: no persistent volumes available for this claim and no storage class is set. Name a',
    ),
    Case(
        "a provisioner that does not answer (docs: Storage Classes)",
        unscheduled(UNBOUND),
        (event("ExternalProvisioning", "Waiting for a volume to be created by the external provisioner", "Normal"),),
        "VolumeNotBound",
        "If this lasts, the provisioner of its StorageClass does not work.",
    ),
    Case(
        "real: a Secret that does not exist",
        on_a_node("CreateContainerConfigError", 'secret "hub" not found'),
        (),
        "SecretMissing",
        'worker 0 cannot start its container: secret "hub" not found. Create Secret "hub" in this namespace',
    ),
    Case(
        "real: a Secret without the key",
        on_a_node("CreateContainerConfigError", "couldn't find key token in Secret team/hub"),
        (),
        "SecretMissing",
        'Add the key "token" to Secret "hub", or name another key. The pod then starts by itself.',
    ),
    Case(
        "real: a ConfigMap that does not exist",
        on_a_node("CreateContainerConfigError", 'configmap "settings" not found'),
        (),
        "ConfigMapMissing",
        'Create ConfigMap "settings" in this namespace',
    ),
    Case(
        "real: a ConfigMap without the key",
        on_a_node("CreateContainerConfigError", "couldn't find key level in ConfigMap team/settings"),
        (),
        "ConfigMapMissing",
        'Add the key "level" to ConfigMap "settings"',
    ),
    Case(
        "real: an image that runs as root",
        on_a_node(
            "CreateContainerConfigError", "container's runAsUser breaks non-root policy (pod: x, container: main)"
        ),
        (),
        "CreateContainerConfigError",
        "breaks non-root policy (pod: x, container: main). The kubelet tries again by itself once that is corrected.",
    ),
    Case(
        "real: an image that does not exist",
        on_a_node("ErrImagePull", "failed to resolve reference: registry.example/trainer:1: not found"),
        (),
        "ImagePull",
        "cannot pull image registry.example/trainer:1: failed to resolve reference: registry.example/trainer:1: not "
        "found. Check that the image exists and that the node can reach its registry.",
    ),
    Case(
        "an image behind a login (containerd)",
        on_a_node("ErrImagePull", "pull access denied, repository does not exist or may require authorization"),
        (),
        "ImagePull",
        "The registry wants a login",
    ),
    Case(
        "real: an image name with a capital letter",
        on_a_node("InvalidImageName", 'couldn\'t parse image name "Bad_Name": invalid reference format'),
        (),
        "ImagePull",
        "invalid reference format",
    ),
    Case(
        "real: a volume whose Secret does not exist",
        on_a_node("ContainerCreating"),
        (event("FailedMount", 'MountVolume.SetUp failed for volume "v" : secret "cert" not found'),),
        "SecretMissing",
        'worker 0 cannot mount its volumes on node "gpu-3": MountVolume.SetUp failed for volume "v" : secret "cert" '
        'not found. Create Secret "cert" in this namespace, or name one that exists. The pod then starts by itself.',
    ),
    Case(
        "real: a volume whose ConfigMap does not exist",
        on_a_node("ContainerCreating"),
        (event("FailedMount", 'MountVolume.SetUp failed for volume "v" : configmap "bot-kubetune" not found'),),
        "ConfigMapMissing",
        'Create ConfigMap "bot-kubetune"',
    ),
    Case(
        "real: a volume with a key that its ConfigMap lacks",
        on_a_node("ContainerCreating"),
        (
            event(
                "FailedMount",
                'MountVolume.SetUp failed for volume "v" : configmap references non-existent config key: run',
            ),
        ),
        "ConfigMapMissing",
        'Add the key "run" to it, or name another key.',
    ),
    Case(
        "real: a file server that the node cannot mount",
        on_a_node("ContainerCreating"),
        (
            event("Scheduled", "Successfully assigned", "Normal", "11:59:59"),
            event(
                "FailedMount",
                'MountVolume.SetUp failed for volume "nfs" : mount failed: exit status 32\nMounting command: mount\n'
                "Output: unknown filesystem type 'nfs'.\n",
            ),
        ),
        "MountFailed",
        "mount failed: exit status 32 Mounting command: mount Output: unknown filesystem type 'nfs'. Check that the "
        "volume is there and that this node can reach it.",
    ),
    Case(
        "real: a folder of the node that is not there",
        on_a_node("ContainerCreating"),
        (
            event(
                "FailedMount",
                'MountVolume.SetUp failed for volume "p" : hostPath type check failed: /x is not a directory',
            ),
        ),
        "MountFailed",
        "hostPath type check failed: /x is not a directory",
    ),
    Case(
        "a volume that another node holds (attach/detach controller; docs: Persistent Volumes, Access Modes)",
        on_a_node("ContainerCreating"),
        (
            event(
                "FailedAttachVolume",
                'Multi-Attach error for volume "pvc-1" Volume is already exclusively attached to one node and '
                "can't be attached to another",
            ),
        ),
        "MountFailed",
        "Another pod holds the volume: end it, or use a claim that several nodes can mount (ReadWriteMany).",
    ),
    Case(
        "a network that gives no addresses (kubelet)",
        on_a_node("ContainerCreating"),
        (
            event(
                "FailedCreatePodSandBox",
                'Failed to create pod sandbox: plugin type="calico" failed (add): no addresses',
            ),
        ),
        "SandboxFailed",
        'The network or the runtime of node "gpu-3" does not work',
    ),
    Case(
        "another warning of the kubelet",
        on_a_node("ContainerCreating"),
        (event("NetworkNotReady", "network is not ready: cni plugin not initialized"),),
        "PodNotStarted",
        'worker 0 does not start on node "gpu-3" (NetworkNotReady): network is not ready',
    ),
    Case(
        "real: an image that takes its time",
        on_a_node("ContainerCreating"),
        (
            event("FailedMount", "timed out", at="11:58:00"),
            event("Pulling", 'Pulling image "registry.example/trainer:1"', "Normal", "11:59:00"),
        ),
        "Starting",
        'worker 0 pulls image registry.example/trainer:1 on node "gpu-3"',
    ),
    Case(
        "real: a driver that is not installed says nothing for two minutes",
        on_a_node("ContainerCreating"),
        (event("Scheduled", "Successfully assigned", "Normal"),),
        "Starting",
        'worker 0 is being set up on node "gpu-3": its volumes and its network',
    ),
    Case(
        "real: a node without a kubelet",
        on_a_node(),
        (),
        "NodeSilent",
        'worker 0 was given to node "gpu-3", which does not start it. Its kubelet may be down',
    ),
]


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_what_keeps_a_pod_from_starting(attempt_job, job, stuck, case):
    """What the plan asks for is what the answer is found in."""
    pod, child = stuck(case.status), attempt_job(job(), 1, startTime=EARLIER)
    asked, _ = inquiries(child, 1, [pod], NOON)
    assert bool(asked) >= bool(case.events)
    found = obstacle([pod], dict.fromkeys(asked[:1], case.events), NOON)
    assert found.reason == case.reason
    assert case.says in found.told
    assert found.warning is (case.reason != "Starting")


def test_a_real_obstacle_goes_before_what_only_takes_its_time(worker, stuck):
    slow, blocked = stuck(on_a_node("ContainerCreating")), worker(1, "Pending")
    blocked["status"] = unscheduled("no room")
    pulls = {about(slow): [event("Pulling", 'Pulling image "a"', "Normal")]}
    assert obstacle([slow, blocked], pulls, NOON).reason == "Unschedulable"
    assert obstacle([slow], pulls, NOON).reason == "Starting"


def test_a_mount_that_succeeded_after_all_is_no_obstacle(stuck):
    pod = stuck(on_a_node("ContainerCreating"))
    failed, fine = event("FailedAttachVolume", "timed out"), event("SuccessfulAttachVolume", "", "Normal", "11:59:55")
    assert obstacle([pod], {about(pod): [fine, failed]}, NOON) is None
