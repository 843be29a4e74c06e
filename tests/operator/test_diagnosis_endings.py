"""Why an attempt ended: one case for each way in which a pod can.

`real` objects are the essential fields of what Kubernetes v1.35 wrote when the case was made on a node. The others
cannot be made on one small node; their words are those of Kubernetes' own documentation and source, as each case says.
"""

from typing import Any, NamedTuple

import pytest

from kubetune_operator.diagnosis import Cause, Inquiry, about, disruption, ending, ending_by_job, node_lost

Object = dict[str, Any]
FAILED = {"type": "Failed", "status": "True", "reason": "BackoffLimitExceeded"}
POLICY = {
    "type": "FailureTarget",
    "status": "True",
    "reason": "PodFailurePolicy",
    "message": "Pod team/bot-a1-0-x0 has condition DisruptionTarget matching FailJob rule at index 0",
}


@pytest.fixture
def failing(attempt_job, job):
    """failing(condition): the failing Job of the first attempt."""
    return lambda condition=FAILED: attempt_job(job(), 1, (condition,))


@pytest.fixture
def dead(pod, failing):
    """dead(status, **container): a pod on node gpu-3 with exactly that status, of worker 1."""

    def make(status: Object, **container: Any) -> Object:
        made = pod(failing(), 1)
        made["spec"] = {**made["spec"], "nodeName": "gpu-3"}
        made["spec"]["containers"] = [{**made["spec"]["containers"][0], **container}]
        made["status"] = status
        return made

    return make


def terminated(code: int, reason: str = "Error", **more: Any) -> Object:
    """The status of our own container."""
    state = {"exitCode": code, "reason": reason, "finishedAt": "2026-11-24T14:41:39Z", **more}
    return {"containerStatuses": [{"name": "main", "state": {"terminated": state}}]}


def disrupted(reason: str, message: str, **more: Any) -> Object:
    """The status of a pod that is taken away."""
    target = {"type": "DisruptionTarget", "status": "True", "reason": reason, "message": message}
    return {"phase": "Running", "conditions": [target], **more}


class Case(NamedTuple):
    """One way to end."""

    name: str
    status: Object
    cause: Cause
    reason: str
    says: str
    container: Object = {}  # noqa: RUF012 - a NamedTuple's default


LIMIT = {"resources": {"limits": {"memory": "64Mi"}}}
CASES = [
    Case(
        "real: more memory than the container's limit",
        {"phase": "Failed", **terminated(137, "OOMKilled")},
        Cause.CRASH,
        "OOMKilled",
        "Worker 1 ended with exit code 137 (OOMKilled; memory limit 64Mi). Raise workers.resources.limits.memory, or "
        "lower training.batchSize, dataset.maxSequenceLength or the processes of a worker.",
        LIMIT,
    ),
    Case(
        "real: one process of several was killed for its memory, and the launcher said only what it saw",
        {
            "phase": "Failed",
            **terminated(
                137, "OOMKilled", message='{"reason":"Crash","message":"a training process ended with exit code 137"}'
            ),
        },
        Cause.CRASH,
        "OOMKilled",
        "(OOMKilled; memory limit 64Mi)",
        LIMIT,
    ),
    Case(
        "real: more scratch space than the container may use",
        {
            "phase": "Failed",
            "reason": "Evicted",
            "message": "Pod ephemeral local storage usage exceeds the total limit of containers 8Mi. ",
            **terminated(137),
        },
        Cause.CRASH,
        "StorageLimitExceeded",
        'Worker 1 was ended by node "gpu-3": Pod ephemeral local storage usage exceeds the total limit of containers '
        "8Mi. Raise ephemeral-storage under workers.resources.limits: /tmp and all that is not a volume count.",
    ),
    Case(
        "real: an emptyDir grew beyond its limit",
        {
            "phase": "Failed",
            "reason": "Evicted",
            "message": 'Usage of EmptyDir volume "v" exceeds the limit "8Mi". ',
            **terminated(143),
        },
        Cause.CRASH,
        "StorageLimitExceeded",
        'Usage of EmptyDir volume "v" exceeds the limit "8Mi".',
    ),
    Case(
        "real: the node had no room any more when the pod arrived",
        {
            "phase": "Failed",
            "reason": "OutOfcpu",
            "message": "Pod was rejected: Node didn't have enough resource: cpu, requested: 64000, used: 50, "
            "capacity: 2000",
        },
        Cause.DISRUPTION,
        "NodeRejected",
        'Node "gpu-3" did not take worker 1 (OutOfcpu): Node didn\'t have enough resource: cpu, requested: 64000, '
        "used: 50, capacity: 2000.",
    ),
    Case(
        "real: the node's labels no longer fit",
        {
            "phase": "Failed",
            "reason": "NodeAffinity",
            "message": "Pod was rejected: Predicate NodeAffinity failed: node(s) didn't match Pod's node "
            "affinity/selector",
        },
        Cause.DISRUPTION,
        "NodeRejected",
        "(NodeAffinity): Predicate NodeAffinity failed",
    ),
    Case(
        "a device plugin that lost its GPUs (kubelet/cm/devicemanager; docs: Device Plugins)",
        {
            "phase": "Failed",
            "reason": "UnexpectedAdmissionError",
            "message": "Pod was rejected: Allocate failed due to no healthy devices present; cannot allocate "
            "unhealthy devices nvidia.com/gpu, which is unexpected",
        },
        Cause.DISRUPTION,
        "NodeRejected",
        "(UnexpectedAdmissionError): Allocate failed due to no healthy devices present",
    ),
    Case(
        "a node under pressure takes no pod (kubelet/eviction; docs: Node-pressure Eviction)",
        {
            "phase": "Failed",
            "reason": "Evicted",
            "message": "Pod was rejected: The node had condition: [DiskPressure]. ",
        },
        Cause.DISRUPTION,
        "NodeRejected",
        "(Evicted): The node had condition: [DiskPressure].",
    ),
    Case(
        "real: an eviction through the API",
        disrupted("EvictionByEvictionAPI", "Eviction API: evicting", **terminated(143)),
        Cause.DISRUPTION,
        "Evicted",
        'Worker 1 had to leave node "gpu-3": an eviction, such as kubectl drain, autoscalers and deschedulers ask for '
        "(EvictionByEvictionAPI: Eviction API: evicting).",
    ),
    Case(
        "real: a pod of a higher priority, while nobody has read which",
        disrupted(
            "PreemptionByScheduler",
            "default-scheduler: preempting to accommodate a higher priority pod",
            **terminated(80),
        ),
        Cause.DISRUPTION,
        "Preempted",
        'Worker 1 had to leave node "gpu-3": a pod of a higher priority takes its place',
    ),
    Case(
        "real: a NoExecute taint, as the node lifecycle controller sets it on a node that does not answer",
        disrupted("DeletionByTaintManager", "Taint manager: deleting due to NoExecute taint"),
        Cause.DISRUPTION,
        "NodeLost",
        "a NoExecute taint: the node does not answer, or it is being emptied (DeletionByTaintManager: Taint manager",
    ),
    Case(
        "a node that was deleted (docs: Pod disruption conditions)",
        disrupted("DeletionByPodGC", "PodGC: node no longer exists"),
        Cause.DISRUPTION,
        "NodeLost",
        "the node no longer exists",
    ),
    Case(
        "a node that ran out of memory (docs: Node-pressure Eviction)",
        {
            **disrupted(
                "TerminationByKubelet",
                "The node was low on resource: memory. Threshold quantity: 100Mi, available: 47352Ki. Container main "
                "was using 61Gi, request is 8Gi, has larger consumption of memory. ",
                **terminated(137),
            ),
            "phase": "Failed",
            "reason": "Evicted",
        },
        Cause.DISRUPTION,
        "NodePressure",
        "the node ran out of a resource, of which it used more than it requests (TerminationByKubelet: The node was "
        "low on resource: memory.",
    ),
    Case(
        "a node that shuts down (docs: Node Shutdowns)",
        {
            **disrupted("TerminationByKubelet", "Pod was terminated in response to imminent node shutdown."),
            "phase": "Failed",
            "reason": "Terminated",
        },
        Cause.DISRUPTION,
        "NodeShutdown",
        "the node shuts down",
    ),
    Case(
        "a critical pod needed the node (docs: Guaranteed Scheduling For Critical Add-On Pods)",
        disrupted("TerminationByKubelet", "Pod was preempted by Kubelet to accommodate a critical pod."),
        Cause.DISRUPTION,
        "Preempted",
        "a critical pod takes its place",
    ),
    Case(
        "somebody whom we do not know",
        disrupted("EvictionByAcme", "because"),
        Cause.DISRUPTION,
        "Disruption",
        "it was taken away (EvictionByAcme: because)",
    ),
    Case(
        "real: a program that is not in the image",
        {
            "phase": "Failed",
            **terminated(128, "StartError", message='failed to create containerd task: exec: "/no/such/program"'),
        },
        Cause.CRASH,
        "StartError",
        'Worker 1\'s container could not be started: failed to create containerd task: exec: "/no/such/program".',
    ),
    Case(
        "a process that was killed, but not for the memory of its own container",
        {"phase": "Failed", **terminated(137)},
        Cause.CRASH,
        "Crash",
        "Worker 1 ended with exit code 137 (SIGKILL, but not by its own memory limit: often its node ran out of "
        "memory).",
        LIMIT,
    ),
    Case(
        "real: one process of several was killed, and the launcher knows no more than its code",
        {
            "phase": "Failed",
            **terminated(137, message='{"reason":"Crash","message":"a training process ended with exit code 137"}'),
        },
        Cause.CRASH,
        "Crash",
        "often its node ran out of memory).",
    ),
    Case(
        "a watchdog that aborted a process (torch, ProcessGroupNCCL)",
        {"phase": "Failed", **terminated(134, message="terminate called after throwing 'c10::DistBackendError'")},
        Cause.LEFT,
        "Crash",
        "Worker 1 ended with exit code 134 (SIGABRT: on GPUs it is NCCL's watchdog that aborts a process whose peer is "
        "gone or silent).\nLast lines of its log:\nterminate called",
    ),
    Case(
        "our own word with the end of the traceback",
        {
            "phase": "Failed",
            **terminated(
                1,
                message=r'{"reason":"Crash","message":"KeyError: 1","log":"File \"loop.py\", line 3\nKeyError: 1"}',
            ),
        },
        Cause.CRASH,
        "Crash",
        'Worker 1 ended with exit code 1: KeyError: 1.\nLast lines of its log:\nFile "loop.py", line 3\nKeyError: 1',
    ),
    Case(
        "a device whose memory was too small after all (torch, CUDACachingAllocator)",
        {
            "phase": "Failed",
            **terminated(
                72,
                message='{"reason":"OutOfMemory","message":"the device\'s memory is too small: CUDA out of memory. '
                'Tried to allocate 2.00 GiB: set training.activation_checkpointing to Full, or use 2 processes"}',
            ),
        },
        Cause.USER_ERROR,
        "OutOfMemory",
        "Tried to allocate 2.00 GiB: set training.activationCheckpointing to Full, or use 2 processes.",
    ),
    Case(
        "an init container that another program has put in",
        {
            "phase": "Failed",
            "initContainerStatuses": [
                {
                    "name": "mesh-init",
                    "state": {"terminated": {"exitCode": 65, "reason": "Error", "message": "no route"}},
                }
            ],
            "containerStatuses": [{"name": "main", "state": {"waiting": {"reason": "PodInitializing"}}}],
        },
        Cause.CRASH,
        "Crash",
        'Worker 1\'s container "mesh-init" ended with exit code 65.\nLast lines of its log:\nno route',
    ),
    Case(
        "a sidecar that failed does not hide our own container",
        {
            "phase": "Failed",
            "containerStatuses": [
                {"name": "proxy", "state": {"terminated": {"exitCode": 1, "reason": "Error"}}},
                *terminated(65, message='{"reason":"InvalidData","message":"no answers."}')["containerStatuses"],
            ],
        },
        Cause.USER_ERROR,
        "InvalidData",
        "no answers.",
    ),
]


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_how_a_pod_ended(failing, dead, case):
    why = ending(failing(), [dead(case.status, **case.container)])
    assert (why.cause, why.reason) == (case.cause, case.reason)
    assert case.says in why.told()


def test_who_preempted_a_pod_stands_in_its_events(failing, dead):
    """Real: the scheduler's Event names the pod as its related object, its message only the uid."""
    pod = dead(disrupted("PreemptionByScheduler", "default-scheduler: preempting to accommodate a higher priority pod"))
    event = {
        "type": "Normal",
        "reason": "Preempted",
        "message": "Preempted by pod 6fa6b0b9-1889-4894-8cbe-431587cbb318 on node node-0",
        "related": {"kind": "Pod", "namespace": "search", "name": "important"},
    }
    why = ending(failing(POLICY), [pod], {about(pod): [{"reason": "Scheduled"}, event]})
    assert "pod search/important of a higher priority takes its place" in why.message
    assert disruption(pod, {about(pod): [event]}, "must leave")[1].startswith('worker 1 must leave node "gpu-3": pod')
    assert about(pod) == Inquiry("Pod", pod["metadata"]["name"], pod["metadata"]["uid"])


def test_a_pod_that_should_be_gone_is_on_a_lost_node(dead):
    why = node_lost(dead({"phase": "Running"}))
    assert (why.cause, why.reason) == (Cause.DISRUPTION, "NodeLost")
    assert why.message == 'Worker 1 does not end on node "gpu-3", which no longer answers'


def test_the_staging_pods_limit_is_not_the_jobs(stage_job, pod, job):
    made = pod(stage_job(job(), (FAILED,)))
    made["spec"] = {**made["spec"], "containers": [{"name": "main", **LIMIT}]}
    made["status"] = {"phase": "Failed", **terminated(137, "OOMKilled")}
    assert "raise that of the namespace's LimitRange" in ending(stage_job(job(), (FAILED,)), [made]).message


BY_JOB = [
    (
        "Container main for pod team/bot-a1-0-x0 failed with exit code 65 matching FailJob rule at index 1",
        Cause.USER_ERROR,
        "InvalidData",
    ),
    ("Container main for pod team/bot-a1-0-x0 failed with exit code 3", Cause.CRASH, "Crash"),
    ("Pod team/bot-a1-0-x0 has condition DisruptionTarget matching FailJob rule", Cause.DISRUPTION, "Disruption"),
]


@pytest.mark.parametrize(("words", "cause", "reason"), BY_JOB, ids=["ours", "not ours", "a disruption"])
def test_the_jobs_own_words_tell_the_cause_when_no_pod_is_left(failing, words, cause, reason):
    """Real words: an operator that was down must not retry what only a person can repair."""
    why = ending_by_job(failing({**POLICY, "message": words}))
    assert (why.cause, why.reason) == (cause, reason)
    assert words in why.message
