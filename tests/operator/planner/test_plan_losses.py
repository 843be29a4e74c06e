"""What a person or a lost node takes away, at every stage, and names that belong to somebody else."""

from datetime import timedelta
from typing import Any

import pytest

from kubetune_operator.decision import TRUSTED_SECONDS
from kubetune_operator.plan import Plan


def stamp(moment: Any) -> str:
    """As the API server writes times."""
    return str(moment.strftime("%Y-%m-%dT%H:%M:%SZ"))


def names(decided: Plan) -> list[str]:
    """What is applied."""
    return [item["metadata"]["name"] for item in decided.apply]


def staging(world: Any) -> Any:
    return world.staging().stage_pod(ready=True).next()


def starting(world: Any) -> Any:
    return world.staged().attempt(1).worker(0, "Pending").worker(1, "Pending").next()


def running(world: Any) -> Any:
    world.running().reports(12, checkpoint=10).next()
    world.report = None
    return world


def restarting(world: Any) -> Any:
    running(world).ends(0, 1).ends(1, 1).fails().next()
    world.pods.clear()
    return world


def suspending(world: Any) -> Any:
    return running(world).with_spec(suspend=True).next()


def suspended(world: Any) -> Any:
    running(world).with_spec(suspend=True).attempt(1, suspend=True).pods.clear()
    return world.next()


def succeeded(world: Any) -> Any:
    return running(world).completes(ago=10).next()


def failed(world: Any) -> Any:
    return running(world.with_spec(failurePolicy={"maxRestarts": 0})).ends(0, 1).ends(1, 1).fails().next()


STAGES = {
    "it is new": lambda world: world,
    "it stages": staging,
    "its workers start": starting,
    "it runs": running,
    "it waits for a restart": restarting,
    "it is being suspended": suspending,
    "it is suspended": suspended,
    "it has succeeded": succeeded,
    "it has failed": failed,
}

# ---------------------------------------------------------------- the FineTuneJob


@pytest.mark.parametrize("stage", STAGES)
def test_a_job_that_is_being_deleted_is_left_to_the_collector_when(world, stage):
    """Its children go by their owner references, also while no operator runs; nothing may come back meanwhile."""
    STAGES[stage](world).metadata = {"deletionTimestamp": "2030-01-01T12:00:00Z"}
    decided = world.later(1000).plan()
    assert decided == Plan([], [], [], world.job.status, [], None)


# ---------------------------------------------------------------- the worker Job


WITHOUT_JOB = {
    "its workers start": ("Restarting", 2, 1),
    "it runs": ("Restarting", 2, 1),
    "it waits for a restart": ("Restarting", 2, 1),
    "it is being suspended": ("Restarting", 2, 1),
    "it is suspended": ("Suspended", 1, 0),
    "it has succeeded": ("Succeeded", 1, 0),
    "it has failed": ("Failed", 1, 0),
}


@pytest.mark.parametrize("stage", WITHOUT_JOB)
def test_somebody_deletes_the_worker_job_when(world, stage):
    """What ran in it is a crash; what stood still has lost nothing; what is over stays over."""
    STAGES[stage](world).jobs.clear()
    world.pods.clear()
    status = world.plan().status
    assert (status.state, status.attempt, status.restarts) == WITHOUT_JOB[stage]


@pytest.mark.parametrize("stage", WITHOUT_JOB)
def test_somebody_deletes_the_worker_job_and_it_is_not_gone_yet_when(world, stage):
    STAGES[stage](world).jobs[1]["metadata"]["deletionTimestamp"] = "2030-01-01T12:00:00Z"
    decided = world.plan()
    assert (decided.status.state, decided.status.attempt, decided.status.restarts) == WITHOUT_JOB[stage]
    assert (decided.apply, decided.suspend, decided.delete) == ([], [], [])


@pytest.mark.parametrize("stage", ["it has succeeded", "it has failed"])
def test_nothing_comes_back_once_the_job_is_over_when(world, stage):
    STAGES[stage](world).jobs.clear()
    world.pods.clear()
    world.stage = None
    for _ in range(3):
        decided = world.later(3600).next().plan()
        assert (decided.apply, decided.suspend, decided.delete, decided.events) == ([], [], [], [])


def test_a_job_deleted_in_suspension_is_made_anew_on_resumption(world):
    suspended(world).jobs.clear()
    assert world.next().plan().apply == []
    decided = world.with_spec(suspend=False).plan()
    assert names(decided) == ["bot-kubetune", "bot", "bot-a1"]
    assert (decided.status.attempt, decided.status.restarts) == (1, 0)


def test_a_job_deleted_in_suspension_and_resumed_before_anybody_looked_is_no_crash(world):
    suspended(world).jobs.clear()
    decided = world.with_spec(suspend=False).plan()
    assert (names(decided)[2], decided.status.restarts) == ("bot-a1", 0)


def test_a_job_that_does_not_go_is_told_and_ends_with_the_startup_deadline(world, told):
    """Somebody deletes it before its start was noted, and a finalizer of theirs keeps it."""
    world.with_spec(failurePolicy={"startupDeadlineSeconds": 100}).staged().attempt(1, seen=False)
    world.jobs[1]["metadata"]["deletionTimestamp"] = "2030-01-01T12:00:00Z"
    says = "Job bot-a1 is being deleted; it is created again once it is gone."
    assert told(world.plan(), "Started") == ("False", "Starting", says)
    decided = world.next().later(100).plan()
    assert told(decided, "Failed")[:2] == ("True", "StartupDeadlineExceeded")
    assert told(decided, "Failed")[2].startswith(says)


# ---------------------------------------------------------------- the staging Job and its pod


def test_a_staging_job_that_somebody_deletes_is_created_again(world, told):
    staging(world).stage = None
    world.stage_pods.clear()
    decided = world.plan()
    assert [item["kind"] for item in decided.apply] == ["Job"]
    assert told(decided, "Staged")[:2] == ("False", "Staging")


def test_a_staging_pod_that_somebody_deletes_is_the_job_controller_s_to_replace(world, told):
    staging(world).stage_pods.clear()
    decided = world.plan()
    assert (decided.apply, decided.delete) == ([], [])
    assert told(decided, "Staged")[2].endswith("the staging pod is starting.")


@pytest.mark.parametrize("stage", ["its workers start", "it runs", "it waits for a restart", "it is suspended"])
def test_a_staging_job_deleted_after_its_work_is_not_missed_when(world, stage):
    STAGES[stage](world).stage = None
    assert all("stage" not in name for name in names(world.plan()))


# ---------------------------------------------------------------- the ConfigMap and the Service


@pytest.mark.parametrize("stage", ["its workers start", "it runs"])
def test_configmap_and_service_are_wanted_when(world, stage):
    assert names(STAGES[stage](world).plan()) == ["bot-kubetune", "bot"]


def test_while_pods_start_both_are_looked_at_often(world):
    """A pod waits for its ConfigMap, and for the Service's names: the kubelet and the gang try again by themselves."""
    starting(world)
    assert world.plan().trusted_seconds == TRUSTED_SECONDS, "no pod has a node yet"
    for pod in world.pods:
        pod["status"]["conditions"].append(world.make.condition("PodScheduled"))
    decided = world.plan()
    assert (decided.trusted_seconds, decided.requeue_after) == (10, 10)


def test_until_the_first_report_both_are_looked_at_often(world):
    """Workers that run may still be looking for each other."""
    decided = world.running().plan()
    assert (decided.trusted_seconds, decided.requeue_after) == (10, 10)


def test_while_workers_train_both_are_looked_at_seldom(world):
    assert world.running().reports(5).next().plan().trusted_seconds == TRUSTED_SECONDS


# ---------------------------------------------------------------- names of somebody else


TAKEN = 'Service "bot" exists in namespace team and does not belong to this FineTuneJob: delete it'


def test_a_name_that_is_taken_while_workers_start_is_told(world, told):
    starting(world).conflict = TAKEN
    decided = world.plan()
    assert told(decided, "Started") == ("False", "NameConflict", TAKEN)
    assert decided.requeue_after == 10


def test_a_name_that_is_taken_while_workers_run_is_told_and_stops_nothing(world, told):
    """They have found each other; only the next attempt needs the name."""
    running(world).conflict = TAKEN
    decided = world.plan()
    assert told(decided, "Running") == ("True", "Running", f"Attempt 1: 2 of 2 workers running. {TAKEN}.")
    assert (decided.status.state, decided.requeue_after) == ("Running", 10)


def test_a_staging_job_s_name_that_is_taken_is_told(world, told):
    world.conflict = 'Job "kubetune-stage-1" exists in namespace team and was not made by Kubetune: delete it'
    decided = world.plan()
    assert told(decided, "Staged") == ("False", "NameConflict", world.conflict)
    assert decided.requeue_after == 10
    assert [event[:2] for event in decided.events] == [("Warning", "NameConflict")]


def test_a_conflict_is_over_when_the_name_is_free(world, told):
    world.conflict = TAKEN
    world.staged().next()
    world.conflict = None
    decided = world.plan()
    assert told(decided, "Started")[:2] == ("False", "Starting")
    assert names(decided) == ["bot-kubetune", "bot", "bot-a1"]


# ---------------------------------------------------------------- lost nodes


def test_a_suspension_does_not_wait_for_ever_for_a_lost_node(world, told):
    """120 s of the pod's own grace, 60 s for the node."""
    suspending(world).attempt(1, suspend=True).deleted(0).deleted(1, gone=True)
    assert told(world.later(179).plan(), "Suspended")[:2] == ("False", "Suspending")
    assert told(world.later(1).plan(), "Suspended")[:2] == ("True", "Suspended")


def test_a_suspended_gang_with_a_lost_pod_is_replaced_when_its_workers_have_changed(world):
    suspending(world).attempt(1, suspend=True).deleted(0).deleted(1, gone=True)
    world.later(180).next()
    world.with_spec(suspend=False, workers={"nodes": 1}).next()
    assert [item.name for item in world.plan().delete] == ["bot-a1"]
    assert names(world.plan())[2:] == ["bot-a2"], "the lost pod counts as gone"


def test_a_resumed_gang_does_not_wait_for_a_pod_on_a_lost_node(world, told):
    """Its Job would: it replaces a pod only once that has ended."""
    suspending(world).attempt(1, suspend=True).deleted(0).deleted(1, gone=True)
    world.later(180).next()
    decided = world.with_spec(suspend=False).plan()
    status = decided.status
    assert (status.state, status.attempt, status.restarts, status.disruptions) == ("Restarting", 2, 0, 1)
    assert "Worker 0 does not end on its node, which no longer answers." in told(decided, "Started")[2]
    assert decided.suspend == []


def test_a_deleted_pod_on_a_lost_node_ends_an_attempt_whose_job_fails_never(world, told):
    running(world).deleted(1)
    assert world.later(179).plan().status.state == "Running"
    decided = world.later(1).plan()
    assert told(decided, "Running")[:2] == ("False", "NodeLost")


def staging_on_a_lost_node(world: Any) -> Any:
    """Somebody asked for the staging pod's end, and its node does not answer."""
    staging(world)
    due = world.now + timedelta(seconds=30)
    world.stage_pods[0]["metadata"] |= {"deletionTimestamp": stamp(due), "deletionGracePeriodSeconds": 30}
    return world


def test_a_staging_pod_on_a_lost_node_is_given_up_with_its_job(world, told):
    """The Job replaces a pod only once that has ended."""
    staging_on_a_lost_node(world)
    before = world.later(89).plan()
    assert (before.delete, before.requeue_after) == ([], 1)
    decided = world.later(1).plan()
    assert [item.kind for item in decided.delete] == ["Job"]
    assert told(decided, "Staged")[2].endswith(
        "after a pod is given up: The staging pod does not end on its node, which no longer answers."
    )
    world.stage = None
    world.stage_pods.clear()
    assert [item["kind"] for item in world.next().plan().apply] == ["Job"]


def test_a_suspension_does_not_wait_for_a_staging_pod_on_a_lost_node(world, told):
    staging_on_a_lost_node(world).with_spec(suspend=True)
    assert told(world.later(89).plan(), "Suspended")[:2] == ("False", "Suspending")
    assert told(world.later(1).plan(), "Suspended")[:2] == ("True", "Suspended")
