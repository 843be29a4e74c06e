"""From one attempt to the next: when it is created, and what must have ended before."""

from typing import Any

import pytest

from kubetune_contract.progress import TerminationMessage

PEER = TerminationMessage(reason="PeerLost", message="Lost the connection to another worker.").to_json()


def test_after_the_end_is_written_nothing_happens_until_the_time_has_come(world, told):
    """Status first, the next Job later: a crash in between loses and doubles nothing."""
    world.running().ends(0, 1).ends(1, 143).fails().next()
    again = world.later(4).plan()
    assert again.apply == []
    assert again.requeue_after == 6
    assert again.events == []
    assert again.status.to_dict() == world.status
    assert again.status.state == "Restarting"


def test_the_next_attempt_is_created_with_its_config_and_service(world, kinds, told):
    world.running().ends(0, 1).ends(1, 143).fails().next().later(10)
    decided = world.plan()
    assert kinds(decided) == ["ConfigMap/bot-kubetune", "Service/bot", "Job/bot-a2"]
    assert decided.apply[2]["metadata"]["labels"]["kubetune.io/attempt"] == "2"
    assert told(decided, "Started") == ("False", "Starting", "Job bot-a2 with 2 workers was created.")
    assert decided.events == [], "the restart was told already"
    assert (decided.status.attempt_start_time, decided.status.next_attempt_time) == (world.now, None)


def test_a_restarted_operator_finds_the_job_that_it_has_just_created(world):
    """It died between the creation and the status write: the Job is taken over, not created again."""
    world.waiting_for(2, restarts=1).attempt(2, seen=False).worker(0, "Pending").worker(1, "Pending")
    decided = world.plan()
    assert [item["kind"] for item in decided.apply] == ["ConfigMap", "Service"]
    assert decided.status.attempt_start_time == world.now
    assert decided.status.next_attempt_time is None
    assert (decided.status.attempt, decided.status.restarts) == (2, 1)


def _orphans(world: Any) -> Any:
    world.attempt(1, seen=False).worker(0).worker(1)
    world.jobs.clear()
    return world


BLOCKED = [
    (
        "a Job that only is found to fail",
        lambda world: world.attempt(1, seen=False).fails(target=True),
        "Attempt 2 waits for Job bot-a1 to end.",
    ),
    (
        "a pod that still saves its checkpoint",
        lambda world: world.attempt(1, seen=False).fails().worker(0).deleted(0, ago=5),
        "Attempt 2 waits for 1 worker pod to end.",
    ),
    (
        "pods of a Job that a person has deleted",
        _orphans,
        "Attempt 2 waits for 2 worker pods to end.",
    ),
    (
        "an active Job that should not be there",
        lambda world: world.attempt(1, seen=False),
        "Attempt 2 waits for Job bot-a1 to end.",
    ),
]


@pytest.mark.parametrize(("arrange", "says"), [case[1:] for case in BLOCKED], ids=[case[0] for case in BLOCKED])
def test_the_next_attempt_waits_for(world, told, arrange, says):
    """Two gangs must never write to one output folder."""
    arrange(world.waiting_for(2, restarts=1))
    decided = world.plan()
    assert decided.apply == []
    assert told(decided, "Started") == ("False", "Restarting", says)
    assert decided.requeue_after == 1


def test_an_active_job_of_an_earlier_attempt_is_removed(world):
    """It can only be there because a late write brought it back."""
    world.waiting_for(2).attempt(1, seen=False)
    assert [item.name for item in world.plan().delete] == ["bot-a1"]


def test_a_pod_on_a_lost_node_is_waited_for_until_the_grace_is_over(world, kinds):
    """120 s of its own and 60 s for the node; then it counts as gone, although its object stays."""
    world.waiting_for(2, disruptions=1).attempt(1, seen=False).fails(target=True).worker(0).deleted(0)
    assert world.later(179).plan().apply == []
    assert "Job/bot-a2" in kinds(world.later(1).plan())


def test_an_attempt_with_lost_pods_is_judged_when_their_grace_is_over(world, told):
    world.running().ends(0, 81, PEER).deleted(1).fails(target=True)
    assert world.plan().status.attempt == 1
    assert world.later(180).plan().status.attempt == 2


def test_a_pod_that_nobody_ends_ends_its_attempt_when_the_grace_is_over(world, told):
    """Its Job waits for it for ever, and its peers with it."""
    world.running().reports(5).next()
    world.deleted(1)
    assert world.plan().status.attempt == 1
    assert world.plan().requeue_after == 180
    decided = world.later(180).plan()
    assert (decided.status.attempt, decided.status.disruptions, decided.status.restarts) == (2, 1, 0)
    assert told(decided, "Running")[1] == "NodeLost"
    assert told(decided, "Started")[2].startswith("Worker 1 does not end on")
    assert decided.apply == []


def test_the_next_attempt_replaces_the_job_of_one_whose_pod_nobody_ends(world, kinds):
    world.running().deleted(1)
    world.status = world.later(180).plan().status.to_dict()
    world.ends(0, 81, PEER)
    decided = world.later(10).plan()
    assert "Job/bot-a2" in kinds(decided)
    assert [item.name for item in decided.delete] == ["bot-a1"]


def test_only_the_attempt_before_is_kept(world):
    """Its logs are worth something; with unlimited evictions all of them would be too many."""
    for attempt in (1, 2, 3):
        world.attempt(attempt, seen=False).fails()
    world.waiting_for(4, seconds=5, disruptions=3)
    assert [item.name for item in world.plan().delete] == ["bot-a1", "bot-a2"]


def test_the_first_attempt_is_created_once_the_model_is_staged(world, kinds):
    decided = world.staged().plan()
    assert kinds(decided) == ["ConfigMap/bot-kubetune", "Service/bot", "Job/bot-a1"]
    assert decided.status.state == "Starting"


def test_seeing_the_first_job_sets_the_start(world):
    decided = world.staged().attempt(1, seen=False).plan()
    status = decided.status
    assert (status.attempt, status.start_time, status.attempt_start_time) == (1, world.now, world.now)
    assert status.output_path == "bot-0a1b2c3d"


def test_a_job_being_deleted_before_it_was_seen_is_waited_for(world):
    world.staged().attempt(1, seen=False)
    world.jobs[1]["metadata"]["deletionTimestamp"] = "2030-01-01T12:00:00Z"
    decided = world.plan()
    assert decided.apply == []
    assert decided.status.attempt_start_time is None


def test_a_name_that_belongs_to_somebody_else_is_told_and_tried_again(world, told):
    world.conflict = 'Service "bot" exists'
    decided = world.staged().plan()
    assert told(decided, "Started") == ("False", "NameConflict", 'Service "bot" exists')
    assert decided.requeue_after == 10
    assert [event[:2] for event in decided.events] == [("Warning", "NameConflict")]
