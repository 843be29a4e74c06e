"""Suspension: workers are freed, nothing is counted, the same attempt goes on."""

from kubetune_contract.exit_codes import ExitCode
from kubetune_contract.progress import TerminationMessage

SAVED = TerminationMessage(reason="Saved", message="The run was stopped and saved.").to_json()
BAD_DATA = "train.jsonl, line 3: no assistant turn"
INVALID = TerminationMessage(reason="InvalidData", message=BAD_DATA).to_json()


def test_suspending_stops_the_workers_first(world, told):
    decided = world.running().with_spec(suspend=True).plan()
    assert [tuple(item) for item in decided.suspend] == [("bot-a1", "job-uid-1", True)]
    assert told(decided, "Suspended") == (
        "False",
        "Suspending",
        "The workers save and stop: 2 worker pods still to end.",
    )
    assert decided.status.state == "Running"


def test_suspended_once_no_worker_is_left(world, told):
    world.running().reports(12, checkpoint=10).next()
    world.with_spec(suspend=True).attempt(1, suspend=True).pods.clear()
    decided = world.plan()
    assert told(decided, "Suspended") == ("True", "Suspended", "No worker is held; it goes on from step 10.")
    assert told(decided, "Running")[:2] == ("False", "Suspended")
    assert (decided.status.state, decided.suspend, decided.status.progress.step) == ("Suspended", [], 10)
    assert [event[:2] for event in decided.events] == [("Normal", "Suspended")]


def test_workers_stopped_by_a_suspension_are_no_failures(world):
    """The Job has no failure condition: their exit codes are not looked at."""
    world.running().with_spec(suspend=True).attempt(1, suspend=True)
    world.ends(0, ExitCode.SAVED, SAVED).deleted(0).ends(1, 137).deleted(1)
    status = world.plan().status
    assert (status.state, status.attempt, status.restarts) == ("Suspended", 1, 0)


def test_resuming_goes_on_with_the_same_attempt(world, told):
    world.running().attempt(1, suspend=True).with_condition("Suspended", "True", "Suspended").pods.clear()
    decided = world.plan()
    assert [tuple(item) for item in decided.suspend] == [("bot-a1", "job-uid-1", False)]
    assert told(decided, "Suspended")[:2] == ("False", "Resumed")
    assert decided.status.attempt == 1


def test_a_job_suspended_before_its_workers_were_created_creates_none(world, told):
    decided = world.with_spec(suspend=True).staged().plan()
    assert decided.apply == []
    assert decided.status.state == "Suspended"
    assert told(decided, "Suspended")[2] == "No worker is held."


def test_a_restart_that_is_due_waits_for_the_resumption(world):
    world.with_spec(suspend=True).waiting_for(2, seconds=-30, restarts=1).attempt(1, seen=False).fails()
    decided = world.plan()
    assert (decided.apply, decided.status.state, decided.status.attempt) == ([], "Suspended", 2)
    assert world.next().with_spec(suspend=False).plan().apply[-1]["metadata"]["name"] == "bot-a2"


def test_an_attempt_that_ends_during_the_suspension_keeps_its_verdict(world):
    world.running().with_spec(suspend=True).ends(1, 65, INVALID).ends(0, 143).fails("PodFailurePolicy")
    assert world.plan().status.state == "Failed"


def test_suspension_waits_for_pods_of_an_earlier_attempt(world, told):
    world.with_spec(suspend=True).waiting_for(2, restarts=1).attempt(1, seen=False).fails(target=True)
    world.worker(0).deleted(0)
    decided = world.plan()
    assert told(decided, "Suspended")[:2] == ("False", "Suspending")
    assert decided.requeue_after == 1
