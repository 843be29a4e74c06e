"""Drills: workers that crash, are deleted, evicted or lost. The gang restarts from its newest checkpoint."""

import json

from tests.drills.drill import Act, Drill, Object, Seen, submit
from tests.drills.scene import Scene
from tests.drills.site import RESOURCE
from tests.drills.steps import (
    LONG,
    all_pending,
    checkpoint,
    counted,
    delete,
    evict,
    holds,
    kill,
    kubectl,
    left,
    make,
    nothing_held,
    offer,
    runs_again,
    then,
)

TOPIC = "Lost workers"
GOES_ON = Act("(the wait is over)", Seen("Running", "Running", "Running", ("Attempt 2",)), (then,), seconds=240)


def restarts(words: tuple[str, ...], done: str, *steps: object, seconds: float = 150) -> Act:
    """The act that makes the gang restart."""
    return Act(done, Seen("Restarting", "Started", "Restarting", words), (submit, *steps), seconds)  # type: ignore[arg-type]


def seat(name: str) -> Object:
    """A spec whose workers need something that the node does not have before the drill says so."""
    resource = {f"{RESOURCE}/{name}-seat": 1}
    return {"workers": {"resources": {"requests": resource, "limits": {**resource, "memory": "3Gi"}}}}


def preemptor(scene: Scene) -> Object:
    """A pod that takes the workers' seat."""
    resources = seat(scene.name)["workers"]["resources"]["requests"]
    return sleeper(scene, "preemptor", resources, priorityClassName="drill-high")


def sleeper(scene: Scene, name: str, resources: Object, **spec: object) -> Object:
    """A pod that does nothing, as `restricted` allows it."""
    container = {
        "name": "main",
        "image": scene.site.images["trainer"],
        "command": ["sleep", "600"],
        "resources": {"requests": resources, "limits": resources},
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
    }
    security = {"runAsNonRoot": True, "runAsUser": 65532, "seccompProfile": {"type": "RuntimeDefault"}}
    more = {"terminationGracePeriodSeconds": 0, "securityContext": security, "containers": [container]}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": {**more, **spec}}


PRIORITY: Object = {
    "apiVersion": "scheduling.k8s.io/v1",
    "kind": "PriorityClass",
    "metadata": {"name": "drill-high"},
    "value": 1000,
}

# ---------------------------------------------------------------- a node that is only an object


def node_of(scene: Scene) -> str:
    """Name of a drill's own Node."""
    return f"{scene.site.prefix}-{scene.name}"


def fake_node(scene: Scene) -> Object:
    """A Node without a kubelet, on which the scheduler places nothing."""
    taint = {"key": RESOURCE, "effect": "NoSchedule"}
    return {"apiVersion": "v1", "kind": "Node", "metadata": {"name": node_of(scene)}, "spec": {"taints": [taint]}}


def delete_node(scene: Scene) -> None:
    """Remove the drill's own Node, as an administrator or a cloud does."""
    scene.kube.kubectl("delete", "node", node_of(scene), "--wait=false")


def comes_up_on_it(scene: Scene) -> None:
    """Put the pending worker onto the node, and write what its kubelet would."""
    pod = scene.worker()
    target = {"apiVersion": "v1", "kind": "Node", "name": node_of(scene)}
    binding = {"apiVersion": "v1", "kind": "Binding", "metadata": {"name": pod}, "target": target}
    path = f"/api/v1/namespaces/{scene.namespace}/pods/{pod}/binding"
    scene.kube.kubectl("create", "--raw", path, "--filename", "-", stdin=json.dumps(binding))
    status = {"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}]}
    scene.kubectl("patch", "pod", pod, "--subresource=status", "--patch", json.dumps({"status": status}))


DRILLS = (
    Drill(
        "crash",
        "a worker crashes",
        (
            restarts(
                ("Worker 0", "exit code 137", "from the checkpoint of step", "restart 1 of 3"),
                "its training process killed after a checkpoint",
                checkpoint(20),
                kill(),
            ),
            GOES_ON,
        ),
        spec=LONG,
        after=(counted(attempt=2, restarts=1, disruptions=0),),
        topic=TOPIC,
        quick=True,
    ),
    Drill(
        "no-restart-left",
        "a worker crashes again and again",
        (
            Act(
                "killed with `failurePolicy.maxRestarts: 1`, and its successor too",
                Seen(
                    "Failed", "Failed", "Crash", ("exit code 137", "No restart is left: failurePolicy.maxRestarts is 1")
                ),
                (submit, holds("Running"), kill(), runs_again(), kill()),
            ),
        ),
        spec={**LONG, "failurePolicy": {"maxRestarts": 1}},
        after=(nothing_held, counted(attempt=2, restarts=1)),
        topic=TOPIC,
    ),
    Drill(
        "oom-killed",
        "a worker needs more memory than it may have",
        (
            Act(
                "`workers.resources.limits.memory: 200Mi`, no restart allowed",
                Seen("Failed", "Failed", "OOMKilled", ("Worker 0", "OOMKilled", "memory limit 200Mi")),
                seconds=240,
            ),
        ),
        spec={
            "failurePolicy": {"maxRestarts": 0},
            "workers": {"resources": {"requests": {"memory": None}, "limits": {"memory": "200Mi"}}},
        },
        after=(nothing_held,),
        topic=TOPIC,
    ),
    Drill(
        "peer-lost",
        "one of two workers crashes",
        (
            restarts(
                ("Worker 1 ended with exit code 137", "restart 1 of 3"),
                "worker 1's training process killed; worker 0 ends for want of its peer",
                checkpoint(20),
                kill(1),
                seconds=240,
            ),
        ),
        spec={**LONG, "workers": {"nodes": 2}},
        after=(counted(attempt=2, restarts=1),),
        topic=TOPIC,
    ),
    Drill(
        "pod-deleted",
        "a person deletes a worker pod",
        (
            restarts(
                ("Worker 0's pod was deleted", "restart 1 of 3"),
                "`kubectl delete pod`",
                holds("Running"),
                delete("pod/{worker}"),
            ),
            GOES_ON,
        ),
        spec=LONG,
        after=(counted(attempt=2, restarts=1, disruptions=0),),
        topic=TOPIC,
    ),
    Drill(
        "evicted",
        "a worker is evicted",
        (
            restarts(
                ("Worker 0 had to leave node", "EvictionByEvictionAPI", "a disruption is not counted"),
                "evicted through the API, as `kubectl drain` does",
                holds("Running"),
                evict,
            ),
            GOES_ON,
        ),
        spec=LONG,
        after=(counted(attempt=2, restarts=0, disruptions=1),),
        topic=TOPIC,
        quick=True,
    ),
    Drill(
        "preempted",
        "a pod of higher priority takes the worker's place",
        (
            restarts(
                ("Worker 0 had to leave node", "preemptor of a higher priority", "a disruption is not counted"),
                "a pod of higher priority created that needs what only the worker has",
                holds("Running"),
                make(lambda _: PRIORITY),
                make(preemptor),
            ),
            Act(
                "(the other pod has the place)",
                Seen("Starting", "Started", "Unschedulable", ("drills.kubetune.io/preempted-seat",)),
                (then,),
            ),
            Act(
                "the other pod deleted",
                Seen("Running", "Running", "Running", ("Attempt 2",)),
                (delete("pod/preemptor"),),
            ),
        ),
        before=(offer("seat", 1),),
        spec={**LONG, **seat("preempted")},
        after=(counted(restarts=0, disruptions=1),),
        topic=TOPIC,
    ),
    Drill(
        "job-deleted",
        "a person deletes the worker Job",
        (
            restarts(
                ("Job job-deleted-a1 was deleted by somebody else",),
                "`kubectl delete job`",
                holds("Running"),
                delete("job/{attempt}"),
            ),
            GOES_ON,
        ),
        spec=LONG,
        after=(counted(attempt=2, restarts=1), left(job=1)),
        topic=TOPIC,
    ),
    Drill(
        "service-deleted",
        "a person deletes the Service, then a worker crashes",
        (
            Act(
                "`kubectl delete service`, then worker 1 of 2 killed",
                Seen("Running", "Running", "Running", ("Attempt 2: 2 of 2 workers",)),
                (submit, checkpoint(20), delete("service/{name}"), kill(1)),
                seconds=240,
            ),
        ),
        spec={**LONG, "workers": {"nodes": 2}},
        after=(left(service=1), counted(attempt=2)),
        topic=TOPIC,
    ),
    Drill(
        "configmap-deleted",
        "a person deletes the ConfigMap before the worker starts",
        (
            Act(
                "`kubectl delete configmap` while the worker waits for a place, then the place given",
                Seen("Running", "Running", "Running"),
                (submit, all_pending(), delete("configmap/{name}-kubetune"), offer("seat", 1)),
                seconds=240,
            ),
        ),
        spec={**LONG, **seat("configmap-deleted")},
        after=(counted(attempt=1), left(configmap=1)),
        topic=TOPIC,
    ),
    Drill(
        "node-lost",
        "a node does not answer any more: its pod stays Terminating",
        (
            restarts(
                ("Worker 0 does not end on node", "is not counted"),
                "the pod bound to a Node object without a kubelet, then deleted: nobody ends it",
                all_pending(),
                comes_up_on_it,
                holds("Running"),
                delete("pod/{worker}", "--grace-period=1"),
                seconds=240,
            ),
        ),
        before=(make(fake_node),),
        spec={**LONG, **seat("node-lost")},
        after=(
            counted(attempt=2, restarts=0, disruptions=1),
            kubectl("delete", "pods", "--selector=kubetune.io/job={name}", "--force", "--grace-period=0"),
        ),
        topic=TOPIC,
        trains=False,
    ),
    Drill(
        "node-deleted",
        "a node is removed from the cluster",
        (
            restarts(
                ("Worker 0", "DeletionByPodGC", "a disruption is not counted"),
                "the Node object (one without a kubelet) under the pod deleted",
                all_pending(),
                comes_up_on_it,
                holds("Running"),
                delete_node,
                seconds=240,
            ),
        ),
        before=(make(fake_node),),
        spec={**LONG, **seat("node-deleted")},
        after=(counted(restarts=0, disruptions=1),),
        topic=TOPIC,
        trains=False,
    ),
)
