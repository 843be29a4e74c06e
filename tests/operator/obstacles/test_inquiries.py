"""When Events are asked for, and about what: a gang that comes up costs no request."""

from datetime import datetime, timedelta

import pytest
from tests.operator.obstacles.conftest import EARLIER, NOON, UNBOUND, on_a_node, unscheduled

from kubetune_operator.obstacles import inquiries


def test_a_gang_that_comes_up_costs_no_request(attempt_job, job, worker):
    child = attempt_job(job(), 1, startTime=EARLIER)
    pods = [worker(0, ready=True), worker(1, ready=True)]
    assert inquiries(child, 2, pods, NOON) == ([], None)


WAITS = [
    ("pods that are not created yet", lambda job, pod: (job, []), [], 1.0, 2),
    ("pods that are late", lambda job, pod: (job, []), ["Job"], None, 3),
    ("a pod that is being set up", lambda job, pod: (job, [pod(on_a_node("ContainerCreating"))]), [], 1.0, 9),
    ("a pod that is set up for long", lambda job, pod: (job, [pod(on_a_node("ContainerCreating"))]), ["Pod"], None, 10),
    (
        "a pod whose claim is not bound",
        lambda job, pod: (job, [pod(unscheduled(UNBOUND))]),
        ["PersistentVolumeClaim"] * 2,
        None,
        3,
    ),
    (
        "a pod at which no scheduler has looked",
        lambda job, pod: (job, [pod({"phase": "Pending"})]),
        ["PersistentVolumeClaim"] * 2,
        None,
        3,
    ),
    ("a pod whose status tells all", lambda job, pod: (job, [pod(on_a_node("ErrImagePull", "x"))]), [], None, 99),
    ("a pod without room", lambda job, pod: (job, [pod(unscheduled("Insufficient cpu"))]), [], None, 99),
    ("a suspended Job", lambda job, pod: ({**job, "spec": {**job["spec"], "suspend": True}}, []), [], None, 99),
]


@pytest.mark.parametrize(("arrange", "kinds", "wait", "after"), [w[1:] for w in WAITS], ids=[w[0] for w in WAITS])
def test_events_are_asked_for_when_a_pod_is_late(attempt_job, job, stuck, arrange, kinds, wait, after):
    child, pods = arrange(attempt_job(job(), 1, startTime=EARLIER), stuck)
    now = datetime.fromisoformat(EARLIER) + timedelta(seconds=after)
    asked, again = inquiries(child, 1, pods, now)
    assert ([item.kind for item in asked], again) == (kinds, wait)


def test_only_some_pods_of_a_large_gang_are_asked_for(attempt_job, job, worker):
    pods = [{**worker(index, "Pending"), "status": on_a_node("ContainerCreating")} for index in range(9)]
    asked, _ = inquiries(attempt_job(job(), 1, startTime=EARLIER), 9, pods, NOON)
    assert len(asked) == 4
