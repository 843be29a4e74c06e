"""What keeps pods from starting.

The objects in CASES are what Kubernetes v1.35 wrote when each case was made on a real node: see `case`.
"""

from datetime import UTC, datetime

import pytest

from kubetune_operator.obstacles import obstacle

NOON = datetime(2030, 1, 1, 12, 0, tzinfo=UTC)


@pytest.fixture
def worker(pod, attempt_job, job):
    """worker(index, phase, ...): a pod of the first attempt."""
    return lambda *arguments, **more: pod(attempt_job(job()), *arguments, **more)


# ---------------------------------------------------------------- why something does not start


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
