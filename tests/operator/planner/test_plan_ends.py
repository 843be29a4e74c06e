"""How an attempt ends, case by case: the verdict, the counters, and what a person reads."""

from collections.abc import Callable
from datetime import timedelta
from typing import Any, NamedTuple

import pytest

from kubetune_contract.progress import TerminationMessage
from kubetune_operator.api import MemoryEstimate

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
        "Worker 1 ended with exit code 137 (OOMKilled; memory limit 2Gi). Raise workers.resources.limits.memory",
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
        "Worker 1 ended with exit code 139 (SIGSEGV).",
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
        "a disruption is not counted as a restart and waits the shortest time",
        lambda world: world.running(3).with_status(restarts=2).evicted(1).fails("PodFailurePolicy", target=True),
        "Restarting",
        4,
        2,
        1,
        10,
        "Worker 1 had to leave its node: an eviction, such as kubectl drain, autoscalers and deschedulers ask for "
        "(EvictionByEvictionAPI: Eviction API). Attempt 4 starts from the beginning at "
        "12:00:10 UTC (a disruption is not counted).",
    ),
    Ends(
        "an eviction goes on when no restart is left",
        lambda world: world.running(4).with_status(restarts=3, disruptions=7).evicted(0).fails("PodFailurePolicy"),
        "Restarting",
        5,
        3,
        8,
        10,
        "Worker 0 had to leave its node",
    ),
    Ends(
        "workers that saved together after an eviction are a disruption",
        lambda world: world.running().evicted(1).ends(0, 80, SAVED).ends(1, 80, SAVED).evicted(1).fails(),
        "Restarting",
        2,
        0,
        1,
        10,
        "Worker 1 had to leave its node",
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
        "of pods deleted in the second of the end or later the one was the cause",
        lambda world: (
            world.running().ends(0, 143).deleted(0, ago=-2).ends(1, 143).deleted(1, grace=0, gone=True).fails()
        ),
        "Restarting",
        2,
        1,
        0,
        10,
        "Worker 1's pod was deleted. Attempt 2",
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


def test_too_little_memory_is_compared_with_the_estimate(world, told):
    parts = {name: 0 for name in MemoryEstimate.model_fields if name not in ("device", "bytes", "available")}
    world.with_spec(workers={"nodes": 2, "resources": {"limits": {"memory": "2Gi"}}}).running()
    world.ends(1, 137, reason="OOMKilled").ends(0, 143).fails()
    world.with_status(estimate={"device": "Pod", "bytes": 5_200_000_000, **parts})
    assert "A step takes at most 5.2 GB by the estimate. Attempt 2 starts" in told(world.plan(), "Started")[2]
    world.with_status(estimate={"device": "GPU", "bytes": 5_200_000_000, **parts})
    assert "by the estimate" not in told(world.plan(), "Started")[2], "it is about other memory"
