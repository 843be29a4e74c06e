"""What is read out of Jobs and pods, apart from what the planner's cases already show."""

from datetime import UTC, datetime

import pytest

from kubetune_operator.diagnosis import (
    Cause,
    Ending,
    cause_of,
    culprit,
    ended_container,
    ending_by_job,
    ending_condition,
    index_of,
    is_live,
    is_lost,
    is_ready,
    last_word,
    moment,
    name_of,
)

NOON = datetime(2030, 1, 1, 12, 0, tzinfo=UTC)


@pytest.fixture
def stager(pod, stage_job, job):
    """stager(...): a pod of the staging Job."""
    return lambda *arguments, **more: pod(stage_job(job()), *arguments, **more)


def test_the_last_word_is_our_own_document(worker, terminated):
    state = terminated(65, message='{"reason": "InvalidData", "message": "no answers"}')
    assert last_word(worker(0, "Failed", state=state)).reason == "InvalidData"


@pytest.mark.parametrize(
    "text",
    ["", "Traceback (most recent call last):", "{", '{"reason": "x"}', '{"reason": "no word", "message": ""}', "[]"],
    ids=["nothing", "a log", "half a document", "a document without a message", "a reason that is none", "a list"],
)
def test_anything_else_is_no_last_word(worker, terminated, text):
    assert last_word(worker(0, "Failed", state=terminated(1, message=text))) is None


def test_a_running_container_has_not_ended(worker):
    assert ended_container(worker()) is None
    assert last_word(worker()) is None


def test_a_pod_without_any_container_status_has_not_ended(worker):
    pod = worker(0, "Pending")
    del pod["status"]["containerStatuses"]
    assert ended_container(pod) is None


@pytest.mark.parametrize(
    ("phase", "live"),
    [("Pending", True), ("Running", True), ("Unknown", True), ("Succeeded", False), ("Failed", False)],
)
def test_a_pod_is_live_until_its_phase_is_final(worker, phase, live):
    assert is_live(worker(0, phase)) is live


def test_ready_is_what_the_kubelet_says(worker):
    assert is_ready(worker(ready=True))
    assert not is_ready(worker(ready=False))


def test_a_pod_is_lost_when_its_deletion_is_overdue(worker):
    pod = worker(deletionTimestamp="2030-01-01T11:59:00Z")
    assert is_lost(pod, NOON, grace_seconds=60)
    assert not is_lost(pod, NOON, grace_seconds=61)
    assert not is_lost(worker(), NOON, grace_seconds=0)


def test_workers_have_numbers_and_the_staging_pod_has_none(worker, stager):
    assert (name_of(worker(3)), index_of(worker(3))) == ("worker 3", 3)
    assert (name_of(stager()), index_of(stager())) == ("the staging pod", 0)


def test_times_may_be_absent():
    assert moment(None) is None
    assert moment("2030-01-01T12:00:00Z") == NOON


# ---------------------------------------------------------------- why something ended

CAUSES = [
    ("an error of the user", 65, {}, (), Cause.USER_ERROR),
    ("an error of the user, even if the pod was being deleted", 78, {"asked": -9}, (), Cause.USER_ERROR),
    ("an eviction", 143, {"asked": 0}, ("DisruptionTarget",), Cause.DISRUPTION),
    ("a deletion before the end", 137, {"asked": 5}, (), Cause.REMOVED),
    ("a deletion in the second of the end", 137, {"asked": 0}, (), Cause.UNCLEAR),
    ("a deletion after the end", 137, {"asked": -1}, (), Cause.COLLATERAL),
    ("a crash", 1, {}, (), Cause.CRASH),
    ("a kill", 137, {}, (), Cause.CRASH),
    ("a saved run", 80, {}, (), Cause.LEFT),
    ("a lost peer", 81, {}, (), Cause.LEFT),
    ("a signal", 143, {}, (), Cause.LEFT),
    ("a source that is not there", 82, {}, (), Cause.CRASH),
]


@pytest.mark.parametrize(("code", "deletion", "targets", "cause"), [c[1:] for c in CAUSES], ids=[c[0] for c in CAUSES])
def test_the_cause_of_one_pods_end(worker, terminated, condition, code, deletion, targets, cause):
    metadata = {}
    if deletion:
        seconds = 60 * 60 * 12 + 30 - deletion["asked"]
        due = datetime.fromtimestamp(datetime(2030, 1, 1, tzinfo=UTC).timestamp() + seconds, UTC)
        metadata = {"deletionTimestamp": due.strftime("%Y-%m-%dT%H:%M:%SZ"), "deletionGracePeriodSeconds": 30}
    pod = worker(0, "Failed", state=terminated(code), conditions=tuple(condition(k) for k in targets), **metadata)
    assert cause_of(pod, NOON) is cause


BLAMED = {
    "a deletion that the Job controller asked for before it wrote the end down": (58, 1),
    "a deletion that came first, of which the other one died": (50, 0),
    "a deletion in the second of the crash": (56, 0),
}


@pytest.mark.parametrize("case", BLAMED)
def test_a_worker_that_crashed_is_blamed_before_one_that_was_deleted_for_it(
    worker, terminated, attempt_job, job, condition, case
):
    asked, blamed = BLAMED[case]
    deletion = {"deletionTimestamp": f"2030-01-01T12:02:{asked}Z", "deletionGracePeriodSeconds": 120}
    left, crashed = terminated(81), terminated(137)
    left["terminated"]["finishedAt"], crashed["terminated"]["finishedAt"] = (
        "2030-01-01T12:00:59Z",
        "2030-01-01T12:00:56Z",
    )
    pods = [worker(0, "Failed", state=left, **deletion), worker(1, "Failed", state=crashed)]
    pods[0]["metadata"]["deletionTimestamp"] = f"2030-01-01T12:02:{asked}Z"
    end = condition("FailureTarget", reason="BackoffLimitExceeded", lastTransitionTime="2030-01-01T12:00:59Z")
    failing = attempt_job(job(), 1, (end,))
    found = culprit(failing, pods)
    assert found is not None
    assert index_of(found) == blamed


def test_causes_are_ordered_from_the_most_telling():
    assert sorted(Cause) == [
        Cause.USER_ERROR,
        Cause.DISRUPTION,
        Cause.REMOVED,
        Cause.CRASH,
        Cause.LEFT,
        Cause.UNCLEAR,
        Cause.COLLATERAL,
    ]


def test_the_condition_of_the_end_prefers_what_is_final(attempt_job, job, condition):
    found = ending_condition(
        attempt_job(job(), 1, (condition("FailureTarget", reason="A"), condition("Failed", reason="B")))
    )
    assert found["reason"] == "B"
    assert ending_condition(attempt_job(job(), 1, (condition("Failed", "False"),))) is None


@pytest.mark.parametrize(
    ("reason", "message", "ending"),
    [
        (
            "BackoffLimitExceeded",
            "Job has reached the specified backoff limit",
            (Cause.CRASH, "Job bot-a1 has failed: a pod failed or was deleted, and nothing of it is left to read"),
        ),
        ("DeadlineExceeded", "too long", (Cause.CRASH, "Job bot-a1 has failed: too long")),
        ("PodFailurePolicy", "Pod x has condition DisruptionTarget matching", (Cause.DISRUPTION, None)),
        ("Odd", "", (Cause.CRASH, "Job bot-a1 has failed: Odd")),
    ],
)
def test_an_end_that_only_the_job_tells(attempt_job, job, condition, reason, message, ending):
    found = ending_by_job(attempt_job(job(), 1, (condition("Failed", reason=reason, message=message),)))
    assert (found.cause, found.message) == (ending[0], ending[1] or message)


def test_an_ending_is_told_in_sentences_with_its_log_below():
    ending = Ending(Cause.CRASH, "Crash", "Worker 1 ended with exit code 1", "one\ntwo")
    assert ending.told("It comes back.") == (
        "Worker 1 ended with exit code 1. It comes back.\nLast lines of its log:\none\ntwo"
    )


@pytest.mark.parametrize("text", ["data/x.jsonl: no answers.", "data/x.jsonl: no answers"])
def test_an_ending_leaves_the_first_letter_alone(text):
    """It may be a path's."""
    assert Ending(Cause.USER_ERROR, "InvalidData", text).told() == "data/x.jsonl: no answers."
