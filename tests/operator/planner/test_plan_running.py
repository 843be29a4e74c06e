"""Workers that come up and run, and what keeps them from it."""

from typing import Any

import pytest


def test_workers_that_come_up_are_counted(world, told):
    decided = world.staged().attempt(1).worker(0, ready=True).worker(1, "Pending").plan()
    assert told(decided, "Started") == ("False", "Starting", "1 of 2 workers run.")
    assert decided.status.state == "Starting"
    assert decided.status.workers.to_dict() == {"active": 2, "ready": 1, "succeeded": 0, "failed": 0}


def test_a_single_worker_is_told_in_the_singular(world, told):
    decided = world.with_spec(workers={"nodes": 1}).staged().attempt(1).worker(0, "Pending").plan()
    assert told(decided, "Started")[2] == "0 of 1 worker runs."


def test_all_workers_up_is_running(world, told):
    decided = world.staged().attempt(1).worker(0, ready=True).worker(1, ready=True).plan()
    assert decided.status.state == "Running"
    assert told(decided, "Started") == ("True", "Started", "All workers of attempt 1 came up.")
    assert told(decided, "Running") == ("True", "Running", "Attempt 1: 2 of 2 workers running.")
    assert decided.events == [], "nothing else was ever expected"


def test_running_after_trouble_is_told_by_an_event(world):
    world.staged().attempt(2).worker(0, ready=True).worker(1, ready=True)
    assert [event[:2] for event in world.plan().events] == [("Normal", "Running")]


def test_running_after_a_suspension_is_told_by_an_event(world):
    world.staged().attempt(1).worker(0, ready=True).worker(1, ready=True)
    world.with_condition("Suspended", "False", "Resumed")
    assert [event[:2] for event in world.plan().events] == [("Normal", "Running")]


def test_a_worker_that_is_done_does_not_end_running(world, told):
    decided = world.running().ends(1, 0).plan()
    assert decided.status.state == "Running"
    assert told(decided, "Running")[2] == "Attempt 1: 1 of 2 workers running, 1 done."


def test_running_stays_until_the_verdict(world):
    """A pod that has just failed is seen before its Job's condition: no flicker through Starting."""
    assert world.running().ends(1, 1).plan().status.state == "Running"


def test_an_eviction_is_told_while_the_worker_still_saves(world, told):
    decided = world.running().evicted(1).plan()
    assert told(decided, "Running") == (
        "True",
        "Evicted",
        "Worker 1 must leave its node: an eviction, such as kubectl drain, autoscalers and deschedulers ask for "
        "(EvictionByEvictionAPI: Eviction API).",
    )
    assert decided.events[0][:2] == ("Warning", "Evicted")


def test_configuration_and_service_are_kept_while_workers_run(world, kinds):
    """A renewed certificate of the progress endpoint reaches running workers through their ConfigMap."""
    assert kinds(world.running().plan()) == ["ConfigMap/bot-kubetune", "Service/bot"]


OBSTACLES = [
    (
        "no node has room",
        lambda world: _unschedulable(world, "0/3 nodes are available: 3 Insufficient nvidia.com/gpu."),
        "Unschedulable",
        "0 of 2 workers run: worker 0 cannot be scheduled: 0/3 nodes are available: 3 Insufficient nvidia.com/gpu. "
        "Wait for GPUs to become free, add nodes with GPUs, or lower workers.gpusPerNode.",
    ),
    (
        "an image that is not there",
        lambda world: _waits(world, "ErrImagePull", "manifest unknown"),
        "ImagePull",
        "0 of 2 workers run: worker 0 cannot pull image registry.example/trainer:1: manifest unknown. "
        "Check that the image exists and that the node can reach its registry.",
    ),
    (
        "an image that is waited for, in the kubelet's second wording",
        lambda world: _waits(world, "ImagePullBackOff", 'Back-off pulling image "a": ErrImagePull: manifest unknown'),
        "ImagePull",
        "0 of 2 workers run: worker 0 cannot pull image registry.example/trainer:1: manifest unknown. "
        "Check that the image exists and that the node can reach its registry.",
    ),
    (
        "a secret that is not there",
        lambda world: _waits(world, "CreateContainerConfigError", 'secret "token" not found'),
        "SecretMissing",
        '0 of 2 workers run: worker 0 cannot start its container: secret "token" not found. '
        'Create Secret "token" in this namespace, or name one that exists. The pod then starts by itself.',
    ),
    (
        "a program that cannot be started",
        lambda world: _waits(world, "RunContainerError", "exec: no such file"),
        "RunContainerError",
        "0 of 2 workers run: worker 0 cannot start its container: exec: no such file. "
        "The kubelet tries again by itself once that is corrected.",
    ),
]


def _unschedulable(world: Any, words: str) -> Any:
    condition = world.make.condition("PodScheduled", "False", "Unschedulable", words)
    created = {"creationTimestamp": "2030-01-01T12:00:00Z"}
    for index in (0, 1):
        world.worker(
            index, "Pending", conditions=(condition,), state=world.make.waiting("ContainerCreating"), **created
        )
    return world


def _waits(world: Any, reason: str, words: str) -> Any:
    for index in (0, 1):
        world.worker(index, "Pending", state=world.make.waiting(reason, words))
        world.pods[-1]["status"]["containerStatuses"][0]["image"] = "registry.example/trainer:1"
    return world


@pytest.mark.parametrize(("arrange", "reason", "says"), [case[1:] for case in OBSTACLES], ids=[c[0] for c in OBSTACLES])
def test_what_keeps_workers_from_starting(world, told, arrange, reason, says):
    """In the words of the scheduler or the kubelet; the job waits, it does not fail."""
    arrange(world.staged().attempt(1))
    decided = world.plan()
    assert told(decided, "Started") == ("False", reason, says)
    assert decided.status.state == "Starting"
    assert decided.events[0][:2] == ("Warning", reason)
    world.next()
    assert world.plan().events == [], "it is said once"


def test_two_wordings_of_one_image_do_not_flicker(world, told):
    """The kubelet alternates every ten seconds; each would be a status write and an event."""
    _waits(world.staged().attempt(1), "ErrImagePull", "manifest unknown")
    world.next().pods.clear()
    _waits(world, "ImagePullBackOff", 'Back-off pulling image "registry.example/trainer:1"')
    decided = world.plan()
    assert decided.status.to_dict() == world.status
    assert decided.events == []


MISSING = 'persistentvolumeclaim "tuned" not found'


def test_a_missing_claim_is_given_a_moment(world, told):
    """A claim that is created right after the job must not fail it."""
    decided = _unschedulable(world.staged().attempt(1), f"0/1 nodes are available: {MISSING}").later(5).plan()
    assert told(decided, "Started")[1] == "VolumeMissing"
    assert decided.status.state == "Starting"
    assert decided.requeue_after == 10


def test_a_claim_that_stays_missing_ends_the_job_with_the_remedy(world, told):
    _unschedulable(world.staged().attempt(1), f"0/1 nodes are available: {MISSING}").later(15)
    decided = world.plan()
    says = (
        'PersistentVolumeClaim "tuned" (spec.storage.output.claimName) does not exist in namespace team: '
        "create it, or name one that exists, and submit the job again"
    )
    assert told(decided, "Failed") == ("True", "VolumeMissing", says)
    assert decided.status.state == "Failed"
    assert decided.delete == [], "the verdict is written before the pods are removed"
    assert [item.name for item in world.next().plan().delete] == ["bot-a1"]
