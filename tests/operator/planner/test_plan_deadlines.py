"""Deadlines: what counts, when they are due, what they say, and what they leave alone."""

from collections.abc import Callable
from datetime import timedelta
from typing import Any, NamedTuple

import pytest

ACTIVE = {"activeDeadlineSeconds": 100}
STARTUP = {"failurePolicy": {"startupDeadlineSeconds": 100}}
PROGRESS = {"failurePolicy": {"progressDeadlineSeconds": 100}}
UNSCHEDULABLE = "0/3 nodes are available: 3 Insufficient nvidia.com/gpu."


def unscheduled(world: Any) -> dict[str, Any]:
    return {"conditions": (world.make.condition("PodScheduled", "False", "Unschedulable", UNSCHEDULABLE),)}


def starting(world: Any) -> Any:
    """One worker is up, the other one has no node."""
    world.staged().attempt(1).worker(0, ready=True).worker(1, "Pending", **unscheduled(world))
    return world


def without_image(world: Any) -> Any:
    """A worker whose image is not there."""
    world.worker(0, "Pending", state=world.make.waiting("ErrImagePull", "not found"))
    world.pods[0]["status"]["containerStatuses"][0]["image"] = "registry.example/trainer:1"
    return world


def training(world: Any, step: int = 12) -> Any:
    """A running gang that has just finished a step, in a status that was written."""
    return world.running().reports(step, checkpoint=10).next()


class Late(NamedTuple):
    """A case of a deadline: nothing happens one second before it, and the next look is when it is due."""

    name: str
    spec: dict[str, Any]
    arrange: Callable[[Any], Any]
    reason: str
    says: str
    """` ... ` stands for the remedy of what held it up."""


LATE = [
    Late(
        "a job whose staging pod gets no node",
        STARTUP,
        lambda world: world.staging().stage_pod("Pending", **unscheduled(world)),
        "Unschedulable",
        f"The staging pod cannot be scheduled: {UNSCHEDULABLE} ... The staging pod was not up after 100 seconds, which "
        "is failurePolicy.startupDeadlineSeconds: everything was freed.",
    ),
    Late(
        "a staging pod that never starts, nobody knows why",
        STARTUP,
        lambda world: world.staging().stage_pod("Pending"),
        "StartupDeadlineExceeded",
        'Checking the model at models/llama on claim "models": the staging pod is starting. The staging pod was not',
    ),
    Late(
        "a worker that gets no node",
        STARTUP,
        starting,
        "Unschedulable",
        f"1 of 2 workers run: worker 1 cannot be scheduled: {UNSCHEDULABLE} ... The workers were not up after 100 "
        "seconds, which is failurePolicy.startupDeadlineSeconds: everything was freed.",
    ),
    Late(
        "an image that cannot be pulled",
        STARTUP,
        lambda world: without_image(world.staged().attempt(1)),
        "ImagePull",
        "not found. ... The workers were not up after 100 seconds",
    ),
    Late(
        "workers that never come up, nobody knows why",
        STARTUP,
        lambda world: world.staged().attempt(1).worker(0).worker(1),
        "StartupDeadlineExceeded",
        "0 of 2 workers run. The workers were not up",
    ),
    Late(
        "a worker that goes on for ever on a node that is back",
        STARTUP,
        lambda world: world.waiting_for(2, restarts=1).attempt(1, seen=False).fails().worker(0),
        "StartupDeadlineExceeded",
        "Attempt 2 waits for 1 worker pod to end. The workers were not up",
    ),
    Late(
        "a job that trains too long",
        ACTIVE,
        training,
        "DeadlineExceeded",
        "The job was active for 100 seconds, as long as spec.activeDeadlineSeconds allows. Its newest checkpoint is "
        "checkpoints/step-10, of step 10. Create it again with a longer deadline, more workers or fewer steps.",
    ),
    Late(
        "a job that stages too long",
        ACTIVE,
        lambda world: world.staging().stage_pod(ready=True),
        "DeadlineExceeded",
        "The job was active for 100 seconds, as long as spec.activeDeadlineSeconds allows. Create it again",
    ),
    Late(
        "a job that waits for a node",
        ACTIVE,
        starting,
        "DeadlineExceeded",
        "active for 100 seconds",
    ),
]


@pytest.mark.parametrize("case", LATE, ids=[case.name for case in LATE])
def test_fails_when_its_deadline_is_over(world, told, case):
    case.arrange(world.with_spec(**case.spec)).next()
    before = world.later(99).plan()
    assert before.status.state not in ("Failed", "Restarting") or before.status.completion_time is None
    assert before.requeue_after is not None
    assert before.requeue_after <= 1, "the next look is no later than the deadline"
    after = world.later(1).plan()
    status, reason, message = told(after, "Failed")
    assert (status, reason) == ("True", case.reason)
    assert all(part in message for part in case.says.split(" ... ")), message
    assert (after.apply, after.suspend) == ([], [])
    assert [event.reason for event in after.events] == ["Failed"]


def test_a_restarted_operator_needs_nothing_but_the_status(world):
    """The plan has no memory: whatever is decided follows from what was written."""
    training(world.with_spec(**ACTIVE))
    for _ in range(3):
        world.later(30).next()
    assert world.later(9.5).plan().status.state == "Running"
    assert world.later(0.5).plan().status.state == "Failed"


ENDED = {
    "is complete": lambda world: world.completes(ago=1),
    "is found to fail": lambda world: world.ends(0, 1).fails(),
}


@pytest.mark.parametrize("case", ENDED)
def test_an_attempt_is_judged_by_its_own_end_rather_than_by_a_deadline_when_it(world, case):
    training(world.with_spec(**ACTIVE)).later(200)
    ENDED[case](world)
    status = world.plan().status
    assert all(condition.reason != "DeadlineExceeded" for condition in status.conditions)


def test_a_crash_that_comes_too_late_for_another_attempt_ends_the_job(world, told):
    training(world.with_spec(**ACTIVE)).later(99).ends(0, 1).ends(1, 1).fails().next()
    decided = world.later(1).plan()
    assert told(decided, "Failed")[:2] == ("True", "DeadlineExceeded")


# ---------------------------------------------------------------- what counts as active


def test_time_in_suspension_does_not_count(world):
    training(world.with_spec(**ACTIVE)).later(60)
    world.with_spec(suspend=True).attempt(1, suspend=True).pods.clear()
    assert world.next().status["activeSeconds"] == 60
    assert "activeSince" not in world.status
    world.later(3600).with_spec(suspend=False).next()
    assert world.plan().status.state != "Failed"
    assert world.later(39).plan().requeue_after <= 1
    assert world.later(1).plan().status.state == "Failed"


def test_a_suspended_job_is_not_looked_at_for_its_deadline(world):
    world.with_spec(**ACTIVE, suspend=True).staged()
    assert world.plan().requeue_after is None


def test_time_in_a_queue_does_not_count(world):
    """The queue holds the Job back by its suspension, and its label says so."""
    world.with_spec(**ACTIVE).staged().attempt(1, suspend=True).next()
    world.jobs[1]["metadata"]["labels"] = {**world.jobs[1]["metadata"]["labels"], "kueue.x-k8s.io/queue-name": "team"}
    assert "activeSince" not in world.next().status
    assert world.later(3600).plan().status.state != "Failed"


def test_a_deadline_may_be_moved_while_the_job_runs(world):
    training(world.with_spec(**ACTIVE)).later(150)
    assert world.with_spec(activeDeadlineSeconds=200).plan().status.state == "Running"
    assert world.with_spec(activeDeadlineSeconds=None).plan().status.state == "Running"


def test_the_sum_stays_when_the_job_is_over(world):
    training(world).later(30).completes(ago=10)
    status = world.plan().status
    assert (status.active_seconds, status.active_since) == (30, None)


# ---------------------------------------------------------------- what counts as waiting


def test_staging_and_workers_wait_each_on_their_own(world):
    world.with_spec(**STARTUP).staging().stage_pod("Pending").next()
    world.status["conditions"].clear()
    world.later(90).staged()
    world.stage_pods.clear()
    assert world.next().status["waitingSince"] == "2030-01-01T12:01:30Z"


def test_a_download_may_take_longer_than_the_start(world):
    world.with_spec(**STARTUP).staging().stage_pod(ready=True).next()
    decided = world.later(10000).plan()
    assert decided.status.state == "Staging"
    assert decided.status.waiting_since is None


def test_a_gang_that_was_up_waits_no_more_when_a_worker_is_lost(world):
    training(world.with_spec(**STARTUP)).pods.pop()
    decided = world.later(10000).plan()
    assert (decided.status.state, decided.status.waiting_since) == ("Running", None)


def test_the_wait_before_a_restart_is_no_wait_for_workers(world):
    training(world.with_spec(**STARTUP)).ends(0, 1).ends(1, 1).fails().next()
    assert "waitingSince" not in world.later(5).next().status
    assert world.later(5).next().status["waitingSince"] == "2030-01-01T12:00:10Z"


def test_a_suspension_ends_the_wait(world):
    starting(world.with_spec(**STARTUP)).next().later(99)
    world.with_spec(suspend=True).next()
    assert world.later(100).plan().status.state != "Failed"


def test_a_name_that_stays_taken_ends_the_job(world, told):
    world.with_spec(**STARTUP).staged().conflict = 'Service "bot" exists'
    world.next()
    decided = world.later(100).plan()
    assert told(decided, "Failed")[:2] == ("True", "NameConflict")
    assert told(decided, "Failed")[2].startswith('Service "bot" exists. The workers were not up after 100 seconds')


# ---------------------------------------------------------------- no new step


def test_a_stalled_attempt_ends_as_a_crash(world, told):
    training(world.with_spec(**PROGRESS))
    assert world.later(99).plan().requeue_after == 1
    decided = world.later(1).plan()
    status = decided.status
    assert (status.state, status.attempt, status.restarts, status.progress.step) == ("Restarting", 2, 1, 10)
    assert told(decided, "Running")[:2] == ("False", "Stalled")
    assert told(decided, "Started")[2] == (
        "The workers run, but no step was finished after step 12 within 100 seconds, which is "
        "failurePolicy.progressDeadlineSeconds. Attempt 2 starts from the checkpoint of step 10 at 12:01:50 UTC "
        "(restart 1 of 3)."
    )
    assert (decided.delete, decided.apply) == ([], []), "the status is written first"


def test_the_stalled_workers_are_removed_before_the_next_come(world, kinds):
    training(world.with_spec(**PROGRESS)).later(100).next()
    decided = world.later(10).plan()
    assert [item.name for item in decided.delete] == ["bot-a1"]
    assert decided.apply == []
    world.jobs.clear()
    world.pods.clear()
    assert "Job/bot-a2" in kinds(world.plan())


def test_a_job_that_stalls_once_too_often_fails(world, told):
    world.with_spec(failurePolicy={"progressDeadlineSeconds": 100, "maxRestarts": 0})
    decided = training(world).later(100).plan()
    assert told(decided, "Failed")[:2] == ("True", "Stalled")
    assert told(decided, "Failed")[2].endswith("No restart is left: failurePolicy.maxRestarts is 0.")


def test_the_first_step_is_counted_from_the_start_of_the_gang(world, told):
    world.with_spec(**PROGRESS).staged().attempt(1).worker(0, ready=True).worker(1, ready=True).next()
    assert world.later(99).plan().status.state == "Running"
    decided = world.later(1).plan()
    assert told(decided, "Started")[2].startswith(
        "The workers run, but no step was reported within 100 seconds, which is failurePolicy.progressDeadlineSeconds. "
        "If their logs show steps, they cannot reach the operator's progress endpoint. Attempt 2 starts"
    )


def test_each_new_step_gives_new_time(world):
    training(world.with_spec(**PROGRESS)).later(90).reports(13).next()
    assert world.later(99).plan().status.state == "Running"
    assert world.later(1).plan().status.state == "Restarting"


def test_the_same_report_again_gives_no_new_time(world):
    training(world.with_spec(**PROGRESS)).later(90).next()
    assert world.later(10).plan().status.state == "Restarting"


def test_reports_that_no_operator_heard_are_not_missed(world):
    """It was down for an hour: the trainers' reports were lost, not the trainers."""
    training(world.with_spec(**PROGRESS)).report = None
    world.later(3600)
    world.reports_since = world.now
    assert world.plan().status.state == "Running"
    assert world.later(99).plan().requeue_after == 1
    assert world.later(1).plan().status.state == "Restarting"


NOT_JUDGED = {
    "what follows the last step": lambda world: training(world, step=50),
    "a job that is being suspended": lambda world: training(world).with_spec(suspend=True),
    "workers that are not all up": lambda world: starting(world).next(),
    "an attempt that is ending": lambda world: training(world).fails(target=True),
}


@pytest.mark.parametrize("case", NOT_JUDGED)
def test_the_deadline_of_steps_does_not_judge(world, case):
    NOT_JUDGED[case](world.with_spec(**PROGRESS))
    assert world.later(1000).plan().status.attempt == 1


def test_without_an_endpoint_for_reports_the_deadline_cannot_be_kept(world, told):
    world.settings = world.settings.model_copy(update={"progress_url": None})
    decided = world.with_spec(**PROGRESS).plan()
    assert told(decided, "Failed") == (
        "True",
        "InvalidConfig",
        "failurePolicy.progressDeadlineSeconds needs the operator's progress endpoint, which is switched off: "
        "remove it, or ask who installed the operator to switch it on",
    )


def test_a_running_job_is_told_that_its_steps_are_not_watched(world, told):
    """The endpoint went, or the deadline came, while it ran: that is no reason to end it."""
    training(world)
    world.settings = world.settings.model_copy(update={"progress_url": None})
    decided = world.with_spec(**PROGRESS).later(1000).plan()
    assert decided.status.state == "Running"
    assert told(decided, "Running")[2].endswith("progress endpoint, which is switched off.")


def test_times_in_the_status_are_whole_seconds(world):
    """The API server would cut them anyway, and the next look would see another status."""
    world.now += timedelta(microseconds=123456)
    training(world.with_spec(**ACTIVE))
    assert world.next().plan().status.to_dict() == world.status
