"""The training phase, case by case: what the planner decides, and what a person reads."""

from collections.abc import Callable
from datetime import timedelta
from typing import Any, NamedTuple

import pytest

from kubetune_contract.exit_codes import ExitCode
from kubetune_contract.progress import CheckpointStatus, Result, TerminationMessage
from kubetune_operator.plan import Plan

SAVED = TerminationMessage(reason="Saved", message="The run was stopped and saved.").to_json()
PEER = TerminationMessage(reason="PeerLost", message="Lost the connection to another worker.").to_json()
BAD_DATA = "train.jsonl, line 3: no assistant turn"
INVALID = TerminationMessage(reason="InvalidData", message=BAD_DATA).to_json()


class Ends(NamedTuple):
    """A case of an attempt's end."""

    name: str
    arrange: Callable[[Any], Any]
    state: str
    attempt: int
    restarts: int
    disruptions: int
    delay: float | None
    says: str


ENDS = [
    Ends(
        "a crash is restarted after ten seconds, with the log's last lines",
        lambda world: world.running().ends(1, 1, "Traceback\nRuntimeError: boom\n").ends(0, 143).fails(),
        "Restarting",
        2,
        1,
        0,
        10,
        "Worker 1 ended with exit code 1. Attempt 2 starts from the beginning at 12:00:10 UTC (restart 1 of 3).\n"
        "Last lines of its log:\nTraceback\nRuntimeError: boom",
    ),
    Ends(
        "the second crash waits twice as long",
        lambda world: world.running(2).with_status(restarts=1).ends(0, 1).ends(1, 1).fails(),
        "Restarting",
        3,
        2,
        0,
        20,
        "Worker 0 ended with exit code 1. Attempt 3 starts from the beginning at 12:00:20 UTC (restart 2 of 3).",
    ),
    Ends(
        "the wait stops growing at five minutes",
        lambda world: (
            world.with_spec(failurePolicy={"maxRestarts": 100})
            .running(10)
            .with_status(restarts=9)
            .ends(0, 1)
            .ends(1, 1)
            .fails()
        ),
        "Restarting",
        11,
        10,
        0,
        300,
        "at 12:05:00 UTC (restart 10 of 100)",
    ),
    Ends(
        "too little memory names the container's limit",
        lambda world: (
            world.with_spec(workers={"nodes": 2, "resources": {"limits": {"memory": "2Gi"}}})
            .running()
            .ends(1, 137, reason="OOMKilled")
            .ends(0, 81, PEER, after=1)
            .fails()
        ),
        "Restarting",
        2,
        1,
        0,
        10,
        "Worker 1 ended with exit code 137 (OOMKilled; memory limit 2Gi). Attempt 2",
    ),
    Ends(
        "memory without a limit says that the node ran out",
        lambda world: world.running().ends(1, 137, reason="OOMKilled").ends(0, 143).fails(),
        "Restarting",
        2,
        1,
        0,
        10,
        "(OOMKilled; it has no memory limit, its node ran out)",
    ),
    Ends(
        "the crash is quoted and not the peer that lost it, even if the peer ended first",
        lambda world: world.running().ends(0, 81, PEER).ends(1, 139, after=2).fails(),
        "Restarting",
        2,
        1,
        0,
        10,
        "Worker 1 ended with exit code 139.",
    ),
    Ends(
        "of two crashes the first is quoted",
        lambda world: world.running().ends(0, 1, "second", after=3).ends(1, 1, "first").fails(),
        "Restarting",
        2,
        1,
        0,
        10,
        "Worker 1 ended with exit code 1. Attempt 2 starts from the beginning at 12:00:10 UTC (restart 1 of 3).\n"
        "Last lines of its log:\nfirst",
    ),
    Ends(
        "a lost peer alone is a crash with its own sentence",
        lambda world: world.running().ends(0, 81, PEER).ends(1, 81, PEER, after=1).fails(),
        "Restarting",
        2,
        1,
        0,
        10,
        "Worker 0 ended with exit code 81: Lost the connection to another worker. Attempt 2",
    ),
    Ends(
        "an error of the user ends the job with the trainer's sentence",
        lambda world: world.running().ends(1, 65, INVALID).ends(0, 143, after=1).fails("PodFailurePolicy"),
        "Failed",
        1,
        0,
        0,
        None,
        "train.jsonl, line 3: no assistant turn.",
    ),
    Ends(
        "an error of the user counts more than a peer's crash before it",
        lambda world: world.running().ends(0, 1).ends(1, 66, after=5).fails(),
        "Failed",
        1,
        0,
        0,
        None,
        "Worker 1 ended with exit code 66.",
    ),
    Ends(
        "an error of the user without a message quotes the log",
        lambda world: world.running().ends(1, 64, "error: spec is bad").ends(0, 143).fails(),
        "Failed",
        1,
        0,
        0,
        None,
        "Worker 1 ended with exit code 64.\nLast lines of its log:\nerror: spec is bad",
    ),
    Ends(
        "an error of the user is acted on while the other worker still ends",
        lambda world: world.running().ends(1, 65, INVALID).fails("PodFailurePolicy", target=True),
        "Failed",
        1,
        0,
        0,
        None,
        BAD_DATA,
    ),
    Ends(
        "no restart is left after as many as were granted",
        lambda world: world.running(4).with_status(restarts=3).ends(0, 1, "boom").ends(1, 143).fails(),
        "Failed",
        4,
        3,
        0,
        None,
        "Worker 0 ended with exit code 1. No restart is left: failurePolicy.maxRestarts is 3.\n"
        "Last lines of its log:\nboom",
    ),
    Ends(
        "without granted restarts the first crash is the end",
        lambda world: world.with_spec(failurePolicy={"maxRestarts": 0}).running().ends(0, 1).ends(1, 143).fails(),
        "Failed",
        1,
        0,
        0,
        None,
        "No restart is left: failurePolicy.maxRestarts is 0.",
    ),
    Ends(
        "an eviction is not counted as a restart and waits the shortest time",
        lambda world: world.running(3).with_status(restarts=2).evicted(1).fails("PodFailurePolicy", target=True),
        "Restarting",
        4,
        2,
        1,
        10,
        "Worker 1 was evicted (EvictionByEvictionAPI: Eviction API). Attempt 4 starts from the beginning at "
        "12:00:10 UTC (an eviction is not counted).",
    ),
    Ends(
        "an eviction goes on when no restart is left",
        lambda world: world.running(4).with_status(restarts=3, disruptions=7).evicted(0).fails("PodFailurePolicy"),
        "Restarting",
        5,
        3,
        8,
        10,
        "Worker 0 was evicted",
    ),
    Ends(
        "workers that saved together after an eviction are a disruption",
        lambda world: world.running().evicted(1).ends(0, 80, SAVED).ends(1, 80, SAVED).evicted(1).fails(),
        "Restarting",
        2,
        0,
        1,
        10,
        "Worker 1 was evicted",
    ),
    Ends(
        "an evicted pod that is already gone is told by the Job",
        lambda world: (
            world.running()
            .ends(0, 80, SAVED)
            .deleted(1, gone=True, ago=2)
            .fails("PodFailurePolicy", "Pod team/bot-a1-1-x has condition DisruptionTarget matching FailJob rule")
        ),
        "Restarting",
        2,
        0,
        1,
        10,
        "Pod team/bot-a1-1-x has condition DisruptionTarget",
    ),
    Ends(
        "an eviction does not excuse an error of the user",
        lambda world: world.running().evicted(0).ends(1, 65, INVALID).fails("PodFailurePolicy"),
        "Failed",
        1,
        0,
        0,
        None,
        BAD_DATA,
    ),
    Ends(
        "kubectl delete pod is a crash and says so",
        lambda world: world.running().deleted(1, ago=3).ends(1, 80, SAVED).ends(0, 80, SAVED).fails(),
        "Restarting",
        2,
        1,
        0,
        10,
        "Worker 1's pod was deleted. Attempt 2",
    ),
    Ends(
        "kubectl delete pod is told from the last sight of the pod",
        lambda world: world.running().ends(1, 143).deleted(1, ago=3, gone=True).ends(0, 143).deleted(0, ago=-1).fails(),
        "Restarting",
        2,
        1,
        0,
        10,
        "Worker 1's pod was deleted. Attempt 2",
    ),
    Ends(
        "pods deleted in the very second of the end: one of them was the cause",
        lambda world: world.running().ends(0, 143).deleted(0).ends(1, 143).deleted(1).fails(),
        "Restarting",
        2,
        1,
        0,
        10,
        "A worker's pod was deleted. Attempt 2",
    ),
    Ends(
        "pods that only the Job controller removed tell nothing: the Job itself is quoted",
        lambda world: (
            world.running()
            .ends(0, 143)
            .deleted(0)
            .ends(1, 143)
            .deleted(1)
            .fails("DeadlineExceeded", "Job was active too long", ago=6)
        ),
        "Restarting",
        2,
        1,
        0,
        10,
        "Job bot-a1 has failed: Job was active too long. Attempt 2",
    ),
    Ends(
        "a Job that failed without leaving a trace is restarted after a moment",
        lambda world: world.staged().attempt(1).fails(ago=5),
        "Restarting",
        2,
        1,
        0,
        10,
        "Job bot-a1 has failed: a pod failed or was deleted, and nothing of it is left to read. Attempt 2",
    ),
    Ends(
        "a worker Job deleted by a person is a crash",
        lambda world: world.staged().with_status(attempt=1, attemptStartTime="2030-01-01T11:59:00Z"),
        "Restarting",
        2,
        1,
        0,
        10,
        "Job bot-a1 was deleted by somebody else. Attempt 2",
    ),
    Ends(
        "a pod that the kubelet rejected is told by its own message",
        lambda world: _rejected(world.running()).fails(),
        "Restarting",
        2,
        1,
        0,
        10,
        "Last lines of its log:\nPod was rejected: node is low on memory",
    ),
]


def _rejected(world: Any) -> Any:
    pod = world.pods[0]
    pod["status"] |= {"phase": "Failed", "containerStatuses": [], "message": "Pod was rejected: node is low on memory"}
    world.pods[1]["status"]["phase"] = "Succeeded"
    return world


@pytest.mark.parametrize("case", ENDS, ids=lambda case: case.name)
def test_how_an_attempt_ends(world, told, case):
    """State, counters, waiting time and words follow from the way in which the workers ended."""
    case.arrange(world)
    decided = world.plan()
    status = decided.status
    assert (status.state, status.attempt, status.restarts, status.disruptions) == case[2:6]
    said = told(decided, "Failed" if case.state == "Failed" else "Started")[2]
    assert case.says in said
    assert decided.apply == [], "the end is written down before anything new is created"
    if case.delay is None:
        assert status.next_attempt_time is None
        assert status.completion_time == world.now
        assert [event.reason for event in decided.events] == ["Failed"]
    else:
        assert status.next_attempt_time == world.now + timedelta(seconds=case.delay)
        assert decided.requeue_after == case.delay
        assert status.attempt_start_time is None
        assert [event.reason for event in decided.events] == ["Restarting"]


def test_a_crash_is_not_judged_while_a_peer_may_still_tell_more(world, told):
    """A gloo error may come before the real one: the verdict waits until all workers have ended."""
    world.running().ends(0, 1, "gloo: connection closed").fails(target=True)
    decided = world.plan()
    assert decided.status.state == "Running"
    assert told(decided, "Running")[1] == "Ending"
    assert "exit code 1. The other workers are ending." in told(decided, "Running")[2]
    world.next().ends(1, 66, INVALID)
    assert world.plan().status.state == "Failed"


def test_without_a_trace_the_verdict_waits_for_the_cache(world, told):
    """The Job's condition may be seen before its pods' last words."""
    world.running().fails(target=True, ago=1)
    decided = world.plan()
    assert decided.status.attempt == 1
    assert decided.requeue_after == 1
    assert told(decided, "Running") == ("True", "Ending", "The workers are ending.")


def test_a_job_that_ends_before_it_ran_says_nothing_of_running(world, told):
    world.staged().attempt(1).worker(0, "Pending").worker(1, "Pending").ends(0, 1).fails(target=True)
    decided = world.plan()
    assert told(decided, "Running") is None
    assert decided.status.state == "Starting"


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
    assert told(decided, "Started") == ("False", "Starting", "Job bot-a2 with 2 workers is being created.")
    assert [event[:2] for event in decided.events] == [("Normal", "Starting")]


def test_a_restarted_operator_finds_the_job_that_it_has_just_created(world):
    """It died between the creation and the status write: the Job is taken over, not created again."""
    world.waiting_for(2, restarts=1).attempt(2, seen=False).worker(0, "Pending").worker(1, "Pending")
    decided = world.plan()
    assert [item["kind"] for item in decided.apply] == ["ConfigMap"]
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


# ---------------------------------------------------------------- starting and running


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
    assert [event[:2] for event in decided.events] == [("Normal", "Running")]


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
        "Disruption",
        "Worker 1 is being evicted (EvictionByEvictionAPI): Eviction API",
    )
    assert decided.events[0][:2] == ("Warning", "Disruption")


def test_the_configuration_is_kept_while_workers_run(world, kinds):
    """A renewed certificate of the progress endpoint reaches running workers through their ConfigMap."""
    assert kinds(world.running().plan()) == ["ConfigMap/bot-kubetune"]


OBSTACLES = [
    (
        "no node has room",
        lambda world: _unschedulable(world, "0/3 nodes are available: 3 Insufficient nvidia.com/gpu."),
        "Unschedulable",
        "0 of 2 workers run: worker 0 cannot be scheduled: 0/3 nodes are available: 3 Insufficient nvidia.com/gpu.",
    ),
    (
        "an image that is not there",
        lambda world: _waits(world, "ErrImagePull", "manifest unknown"),
        "ImagePull",
        "0 of 2 workers run: worker 0 cannot pull image registry.example/trainer:1: manifest unknown",
    ),
    (
        "an image that is waited for, in the kubelet's second wording",
        lambda world: _waits(world, "ImagePullBackOff", 'Back-off pulling image "a": ErrImagePull: manifest unknown'),
        "ImagePull",
        "0 of 2 workers run: worker 0 cannot pull image registry.example/trainer:1: manifest unknown",
    ),
    (
        "a secret that is not there",
        lambda world: _waits(world, "CreateContainerConfigError", 'secret "token" not found'),
        "CreateContainerConfigError",
        '0 of 2 workers run: worker 0 cannot start its container: secret "token" not found',
    ),
    (
        "a program that cannot be started",
        lambda world: _waits(world, "RunContainerError", "exec: no such file"),
        "RunContainerError",
        "0 of 2 workers run: worker 0 cannot start its container: exec: no such file",
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


# ---------------------------------------------------------------- progress


def test_a_report_is_shown(world):
    decided = world.running().reports(10, checkpoint=8, loss=1.23456).plan()
    status = decided.status
    assert (status.progress.step, status.progress.loss, status.checkpoint.step) == (10, 1.23456, 8)
    assert status.display.to_dict() == {"progress": "20%", "loss": "1.235"}


def test_progress_never_goes_back_within_an_attempt(world):
    world.running().reports(20, checkpoint=15).next().reports(10, checkpoint=5)
    status = world.plan().status
    assert (status.progress.step, status.checkpoint.step) == (20, 15)


def test_progress_goes_back_to_the_checkpoint_when_the_gang_is_lost(world):
    """Steps that no checkpoint holds are done again: the status says so."""
    world.running().reports(23, checkpoint=20, loss=1.0, tokens_per_second=500.0).next()
    progress = world.ends(0, 1).ends(1, 1).fails().plan().status.progress
    assert (progress.step, progress.percentage, progress.loss, progress.tokens_per_second) == (20, 40, None, None)
    assert progress.epoch == pytest.approx(0.4)


def test_without_a_checkpoint_progress_goes_back_to_nothing(world):
    world.running().reports(7).next()
    progress = world.ends(0, 1).ends(1, 1).fails().plan().status.progress
    assert (progress.step, progress.percentage) == (0, 0)


def test_a_checkpoint_saved_on_the_way_out_is_known_from_the_last_word(world, message):
    """The operator may have been down when it was reported."""
    saved = message("Saved", "saved", checkpoint=world.checkpoint(30))
    world.running().reports(25, checkpoint=20).next()
    decided = world.evicted(1).ends(1, 80, saved).evicted(1).ends(0, 80).fails("PodFailurePolicy").plan()
    assert decided.status.checkpoint.step == 30
    assert decided.status.progress.step == 30
    assert "starts from the checkpoint of step 30" in decided.events[0].message


def test_a_checkpoint_is_also_known_from_a_pod_that_is_gone(world, message):
    saved = message("Saved", "saved", checkpoint=world.checkpoint(30))
    world.running().ends(1, 80, saved).deleted(1, ago=3, gone=True).ends(0, 80).fails()
    assert world.plan().status.checkpoint == CheckpointStatus.model_validate(world.checkpoint(30))


# ---------------------------------------------------------------- the end


def test_success_tells_where_the_adapter_is_and_what_was_gained(world, message, told):
    result = Result(
        adapter_path="adapter",
        merged_path="merged",
        final_loss=0.5,
        initial_validation_loss=2.25,
        final_validation_loss=0.75,
        steps=50,
        tokens=9,
    )
    world.running().reports(40).next()
    decided = world.ends(0, 0, message("Done", "done", result=result)).ends(1, 0).completes().plan()
    status = decided.status
    assert told(decided, "Succeeded") == (
        "True",
        "Done",
        'The adapter is at bot-0a1b2c3d/adapter on claim "tuned". Held-out loss 2.250 before, 0.750 after. '
        "Training loss 0.500 after 50 steps.",
    )
    assert (status.result.adapter_path, status.result.merged_path) == ("bot-0a1b2c3d/adapter", "bot-0a1b2c3d/merged")
    assert (status.progress.step, status.progress.percentage, status.progress.loss) == (50, 100, 0.5)
    assert status.state == "Succeeded"
    assert status.completion_time == world.now
    assert told(decided, "Running")[0] == "False"
    assert [event[:2] for event in decided.events] == [("Normal", "Succeeded")]


def test_success_of_full_fine_tuning_tells_where_the_model_is(world, message, told):
    world.with_spec(method="Full").running()
    result = Result(model_path="model", steps=1, tokens=9)
    decided = world.ends(0, 0, message("Done", "done", result=result)).ends(1, 0).completes().plan()
    assert told(decided, "Succeeded")[2] == 'The trained model is at bot-0a1b2c3d/model on claim "tuned".'


def test_a_result_that_is_not_seen_yet_is_waited_for(world):
    decided = world.running().ends(0, 0).ends(1, 0).completes(ago=2).plan()
    assert decided.status.state == "Running"
    assert decided.requeue_after == 1


def test_success_without_a_result_still_says_where_to_look(world, told):
    """The pods were removed before anybody read them."""
    world.running().completes(ago=5).pods.clear()
    decided = world.plan()
    assert told(decided, "Succeeded")[2] == (
        'The adapter is at bot-0a1b2c3d/adapter on claim "tuned". The workers left no report of their losses.'
    )
    assert decided.status.progress.percentage == 100


@pytest.mark.parametrize("end", ["Succeeded", "Failed"])
def test_a_finished_job_is_never_touched_again(world, end):
    """Whoever deletes its children, suspends it or reports progress: it stays as it was."""
    world.running().with_condition(end, "True", "Done").with_status(state=end, observedGeneration=1)
    world.jobs.clear()
    world.pods.clear()
    world.with_spec(suspend=True).reports(3)
    decided = world.plan()
    assert (decided.apply, decided.delete, decided.suspend, decided.events) == ([], [], [], [])
    assert decided.status.to_dict() == world.job.status.to_dict()


def test_a_failed_job_holds_no_workers(world):
    world.running().with_condition("Failed", "True", "VolumeMissing")
    assert [(item.kind, item.name, item.uid) for item in world.plan().delete] == [("Job", "bot-a1", "job-uid-1")]


def test_a_failed_job_keeps_what_has_ended_for_its_logs(world):
    world.running().ends(0, 65).fails().with_condition("Failed", "True", "InvalidData")
    assert world.plan().delete == []


def test_worker_counts_of_a_failed_job_follow_its_last_pods(world):
    world.running().with_condition("Failed", "True", "InvalidData")
    world.with_status(workers={"active": 2, "ready": 2, "succeeded": 0, "failed": 0})
    world.ends(0, 65).fails(target=True)
    world.pods.pop()
    assert world.plan().status.workers.to_dict() == {"active": 0, "ready": 0, "succeeded": 0, "failed": 1}


def test_a_job_being_deleted_is_left_to_its_owner_references(world):
    world.metadata["deletionTimestamp"] = "2030-01-01T12:00:00Z"
    decided = world.staged().plan()
    assert decided == Plan([], [], [], world.job.status, [], None)


# ---------------------------------------------------------------- suspension


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
    assert world.with_spec(suspend=False).next().plan().apply[-1]["metadata"]["name"] == "bot-a2"


def test_an_attempt_that_ends_during_the_suspension_keeps_its_verdict(world):
    world.running().with_spec(suspend=True).ends(1, 65, INVALID).ends(0, 143).fails("PodFailurePolicy")
    assert world.plan().status.state == "Failed"


def test_suspension_waits_for_pods_of_an_earlier_attempt(world, told):
    world.with_spec(suspend=True).waiting_for(2, restarts=1).attempt(1, seen=False).fails(target=True)
    world.worker(0).deleted(0)
    decided = world.plan()
    assert told(decided, "Suspended")[:2] == ("False", "Suspending")
    assert decided.requeue_after == 1
