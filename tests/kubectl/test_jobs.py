"""FineTuneJobs as the plugin reads them, over recorded ones."""

import json
from datetime import timedelta

import pytest
from tests.kubectl.conftest import listed, recorded

from kubetune_kubectl import jobs
from kubetune_kubectl.errors import NoSuchJob, PluginError

FORBIDDEN = (
    "Error from server (Forbidden): finetunejobs.kubetune.io is forbidden: "
    'User "ann" cannot list resource "finetunejobs" in API group "kubetune.io" at the cluster scope\n'
)
STATES = {
    "running": ("Running", False, "Attempt 1: 2 of 2 workers running."),
    "unschedulable": ("Starting", False, "0 of 1 worker run: worker 0 cannot be scheduled: 0/1 nodes are available"),
    "suspended": ("Suspended", False, "No worker is held; it goes on from step 52."),
    "failed": ("Failed", True, "/kubetune/models/data/missing.jsonl cannot be read: No such file or directory."),
    "succeeded": ("Succeeded", True, 'The adapter is at two-e5582462/adapter on claim "output".'),
}


@pytest.mark.parametrize("name", STATES)
def test_state_and_reason_are_the_operators_words(job, now, name):
    state, finished, told = STATES[name]
    found = job(name)
    assert (found.state, found.finished, found.succeeded) == (state, finished, name == "succeeded")
    assert jobs.why(found, now).startswith(told)


def test_a_restarting_job_says_what_ended_it_and_when_it_goes_on(job, now):
    told = jobs.why(job("restarting"), now)
    assert "Attempt 2 starts from the checkpoint of step 36" in told


def test_a_job_that_is_being_suspended_says_for_what_it_waits(now):
    body = recorded("running")
    waiting = {
        "type": "Suspended",
        "status": "False",
        "reason": "Suspending",
        "message": "The workers save and stop: 2 worker pods still to end.",
        "lastTransitionTime": "2026-11-24T15:11:00Z",
    }
    body["status"]["conditions"].append(waiting)
    assert jobs.why(jobs.read(body), now) == waiting["message"]


@pytest.mark.parametrize(
    ("seconds", "told"),
    [
        pytest.param(5, "", id="a new job is no news"),
        pytest.param(60, "No operator has seen this job", id="after a minute an operator is missed"),
    ],
)
def test_a_job_without_a_status(seconds, told):
    body = {**recorded("running"), "status": {}}
    found = jobs.read(body)
    assert found.state == "Pending"
    assert jobs.why(found, found.created + timedelta(seconds=seconds)).startswith(told)


def test_what_a_newer_operator_adds_to_the_status_is_passed_over():
    body = recorded("succeeded")
    body["status"]["novelty"] = {"a": 1}
    body["status"]["progress"]["perplexity"] = 3.0
    body["status"]["conditions"][0]["severity"] = "none"
    assert jobs.read(body).status == jobs.read(recorded("succeeded")).status


def test_a_state_that_is_not_known_asks_for_a_newer_plugin():
    body = recorded("succeeded")
    body["status"]["state"] = "Dreaming"
    with pytest.raises(PluginError, match=r"status\.state.*'Dreaming'.*update the plugin"):
        jobs.read(body)


def test_conditions_come_in_the_order_of_a_jobs_life(job):
    found = jobs.in_order(reversed(job("failed").status.conditions))
    assert [condition.type for condition in found] == ["Staged", "Started", "Running", "Succeeded", "Failed"]


def named(*names: str) -> str:
    return listed(*({"metadata": {"name": name, "namespace": "other"}} for name in names))


MISSING = {
    "a near name": (["support-bot", "second"], [], "did you mean support-bot?"),
    "the name in another namespace": (["second"], ["suport-bot"], "there is one in namespace other: give -n other"),
    "nothing like it": (["second", "third"], [], "there are second, third"),
    "many others": (["a1", "b2", "c3", "d4", "e5", "f6"], [], "the newest are b2, c3, d4, e5, f6"),
    "an empty namespace": ([], [], "there is none at all: choose a namespace with -n, or look with"),
}


@pytest.mark.parametrize("case", MISSING)
def test_a_name_that_is_not_there_is_told_with_what_is(replay, kubectl, case):
    here, elsewhere, told = MISSING[case]
    replay.answer("get", "suport-bot", err='Error from server (NotFound): finetunejobs.kubetune.io "x" not found\n')
    replay.answer("get", "--all-namespaces", out=named(*elsewhere))
    replay.answer("get", out=named(*here))
    with pytest.raises(NoSuchJob, match="there is no FineTuneJob suport-bot in namespace kubetune-plugin; ") as raised:
        jobs.get(kubectl, "suport-bot")
    assert told in str(raised.value)


def test_who_may_not_look_elsewhere_still_hears_what_is_here(replay, kubectl):
    replay.answer("get", "x", err='Error from server (NotFound): finetunejobs.kubetune.io "x" not found\n')
    replay.answer("get", "--all-namespaces", err=FORBIDDEN)
    replay.answer("get", out=named("second"))
    with pytest.raises(NoSuchJob, match="there are second"):
        jobs.get(kubectl, "x")


def test_the_namespace_of_the_context_is_named(replay, kubectl):
    replay.answer("config", "view", out="team")
    assert kubectl.default_namespace() == "kubetune-plugin"
    assert type(kubectl)().default_namespace() == "team"


def test_all_jobs_of_all_namespaces(replay, kubectl):
    replay.answer("get", "--all-namespaces", out=listed(recorded("running"), recorded("failed")))
    assert [found.name for found in jobs.get_all(kubectl, everywhere=True)] == ["lost", "no-answers"]


def test_a_recorded_job_is_read_whole(replay, kubectl):
    replay.answer("get", "lost", out=json.dumps(recorded("running")))
    found = jobs.get(kubectl, "lost")
    assert (found.nodes, found.processes_per_node, found.status.attempt) == (2, 1, 1)
