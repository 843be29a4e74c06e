"""Which pod's log is shown."""

import json

import pytest
from tests.kubectl.conftest import changed, events, listed, pods_of, recorded

from kubetune_kubectl import logs
from kubetune_kubectl.errors import NothingThere
from kubetune_kubectl.logs import Wanted

NO_JOB = 'Error from server (NotFound): jobs.batch "x" not found\n'


@pytest.fixture
def cluster(replay):
    """cluster("failed"): the recorded job, its pods by attempt, and its worker Job."""

    def make(name: str, body=None) -> None:
        body = body or recorded(name)
        replay.answer("get", "jobs.batch", "--selector=kubetune.io/role=stage", out=listed(*stage("Job")))
        job_file = f"{name}-job" if name in ("failed", "restarting") else None
        replay.answer("get", "jobs.batch", **({"out": json.dumps(recorded(job_file))} if job_file else {"err": NO_JOB}))
        job = body["metadata"]["name"]
        for attempt in (1, 2):
            found = [pod for pod in pods_of(name) if pod["metadata"]["labels"]["kubetune.io/attempt"] == str(attempt)]
            selector = f"--selector=kubetune.io/job={job},kubetune.io/attempt={attempt}"
            replay.answer("get", "pods", selector, out=listed(*found))
        owned = ",".join(item["metadata"]["name"] for item in stage("Job"))
        replay.answer("get", "pods", f"--selector={logs.JOB_NAME_LABEL} in ({owned})", out=listed(*stage("Pod")))

    return make


def stage(kind: str):
    return [item for item in recorded("stage")["items"] if item["kind"] == kind]


CHOICES = {
    "a running job: rank 0": ("running", Wanted(), "lost-a1-0-", "worker 0 of attempt 1"),
    "a running job: another rank": ("running", Wanted(rank=1), "lost-a1-1-", "worker 1 of attempt 1"),
    "a job that succeeded: rank 0": ("succeeded", Wanted(), "two-a1-0-", "worker 0 of attempt 1"),
    "a job that failed: the rank that failed first": (
        "failed",
        Wanted(),
        "no-answers-a1-0-",
        "worker 0 of attempt 1, which failed first",
    ),
    "a job that failed: the other rank": ("failed", Wanted(rank=1), "no-answers-a1-1-", "worker 1 of attempt 1"),
    "between two attempts: what ended the last one": (
        "restarting",
        Wanted(),
        "lost-a1-1-",
        "worker 1 of attempt 1, which failed first",
    ),
    "the attempt before": ("restarting", Wanted(previous=True), "lost-a1-1-", "worker 1 of attempt 1, which failed"),
    "an attempt by its number": ("restarting", Wanted(attempt=1), "lost-a1-1-", "worker 1 of attempt 1, which failed"),
}


@pytest.mark.parametrize("case", CHOICES)
def test_the_pod_that_matters(cluster, kubectl, job, case):
    name, wanted, pod, what = CHOICES[case]
    cluster(name)
    choice = logs.choose(kubectl, job(name), wanted)
    assert choice.pod["metadata"]["name"].startswith(pod)
    assert choice.what.startswith(what)


def test_a_job_that_is_staged_the_staging_pod(cluster, kubectl, job):
    found = job("running")
    found = found._replace(status=found.status.model_copy(update={"attempt": 0, "state": "Staging"}))
    cluster("running")
    choice = logs.choose(kubectl, found, Wanted())
    assert choice.what == "the staging pod"
    assert choice.pod["metadata"]["name"].startswith("kubetune-stage-")


def test_a_staging_job_of_others_is_not_ours(cluster, kubectl, job):
    found = job("running")
    found = found._replace(uid="other", status=found.status.model_copy(update={"attempt": 0, "state": "Staging"}))
    cluster("running")
    with pytest.raises(NothingThere, match="is Staging and has no pod yet"):
        logs.choose(kubectl, found, Wanted())


NOTHING = {
    "a rank beyond the gang": ("running", Wanted(rank=2), "--rank 2: FineTuneJob lost has the ranks 0 to 1"),
    "a negative rank": ("running", Wanted(rank=-1), "--rank -1: FineTuneJob lost has the ranks 0 to 1"),
    "an attempt to come": ("running", Wanted(attempt=2), "has no attempt 2: there is one only, number 1"),
    "an attempt before the first": ("running", Wanted(previous=True), "has no attempt 0: there is one only"),
    "an attempt beyond several": ("restarting", Wanted(attempt=7), "has no attempt 7: there are 1 to 2"),
    "pods that are gone": ("restarting", Wanted(attempt=2), "attempt 2 of FineTuneJob lost (Restarting) has no pods"),
    "a rank whose pod is gone": ("restarting", Wanted(rank=0, attempt=1), "attempt 1 of FineTuneJob lost (Restarting)"),
}


@pytest.mark.parametrize("case", NOTHING)
def test_where_there_is_nothing_to_show_it_says_why(cluster, kubectl, job, case):
    name, wanted, told = NOTHING[case]
    cluster(name)
    with pytest.raises(NothingThere) as raised:
        logs.choose(kubectl, job(name), wanted)
    assert told in str(raised.value)


def test_pods_that_a_policy_removed_are_told_with_what_the_job_kept_of_them(cluster, kubectl, job, now):
    found = job("restarting")
    status = found.status.model_copy(update={"state": "Failed", "clean_up_time": now})
    cluster("restarting")
    with pytest.raises(NothingThere, match="has no pods: cleanPodPolicy All removed them"):
        logs.choose(kubectl, found._replace(status=status), Wanted(attempt=2))


def test_a_rank_of_a_pod_with_several_gpus_is_found_in_the_pod_that_it_shares(cluster, kubectl, job):
    found = job("running")
    found = found._replace(spec={**found.spec, "workers": {"nodes": 2, "gpusPerNode": 8}})
    cluster("running")
    choice = logs.choose(kubectl, found, Wanted(rank=9))
    assert choice.pod["metadata"]["name"].startswith("lost-a1-1-")
    assert choice.what == "worker 1 of attempt 1, shared by the ranks 8 to 15"


def test_the_log_goes_to_standard_output_and_whose_it_is_to_standard_error(cluster, replay, kubectl, capfd):
    replay.answer("get", "lost", out=json.dumps(recorded("running")))
    replay.answer("logs", out="step 1\n")
    cluster("running")
    assert logs.run(kubectl, "lost", Wanted(), go_on=False) == 0
    told = capfd.readouterr()
    assert told.out == "step 1\n"
    assert told.err.startswith("# worker 0 of attempt 1 (pod lost-a1-0-")


def test_a_pod_that_has_not_started_has_no_log_yet(cluster, replay, kubectl):
    replay.answer("get", "too-big", out=json.dumps(recorded("unschedulable")))
    cluster("unschedulable")
    with pytest.raises(NothingThere, match="has not started: `kubectl finetune status` says why"):
        logs.run(kubectl, "too-big", Wanted(), go_on=False)


def test_following_goes_on_into_the_next_attempt_and_ends_with_the_job(cluster, replay, kubectl, capfd):
    running = recorded("running")
    second = [
        {**pod, "metadata": {**pod["metadata"], "uid": f"second-{number}", "name": f"lost-a2-{number}-abcde"}}
        for number, pod in enumerate(pods_of("running"))
    ]
    later = changed(running, "98", attempt=2)
    done = changed(running, "99", **{**recorded("succeeded")["status"], "attempt": 2})
    field = "--field-selector=metadata.name=lost"
    replay.answer("get", "pods", "--watch", hangs=True)
    replay.answer("get", field, "--watch", out=events(("ADDED", running)), hangs=True, times=1)
    replay.answer("get", field, "--watch", out=events(("MODIFIED", later)), hangs=True, times=1)
    replay.answer("get", field, "--watch", out=events(("MODIFIED", done)), hangs=True)
    replay.answer("get", field, out=listed(running))
    replay.answer("get", "lost", out=json.dumps(running))
    replay.answer("get", "pods", "--selector=kubetune.io/job=lost,kubetune.io/attempt=2", out=listed(*second))
    replay.answer("get", "pods", "--selector=kubetune.io/job=lost,kubetune.io/attempt", out=listed())
    for pod in (pods_of("running")[0], second[0]):
        replay.answer("logs", pod["metadata"]["name"], "--follow", out=f"from {pod['metadata']['name'][:9]}\n")
        replay.answer("get", "pods", f"--field-selector=metadata.name={pod['metadata']['name']}", out=listed())
    cluster("running")
    assert logs.run(kubectl, "lost", Wanted(), go_on=True) == 0
    assert capfd.readouterr().out.splitlines() == ["from lost-a1-0", "from lost-a2-0"]


def test_a_log_that_breaks_off_while_its_container_runs_is_taken_up(cluster, replay, kubectl, capfd):
    pod = pods_of("running")[0]
    name = pod["metadata"]["name"]
    replay.answer("get", "lost", out=json.dumps(recorded("running")))
    replay.answer("--watch", hangs=True)
    replay.answer("get", "--field-selector=metadata.name=lost", out=listed(recorded("running")))
    replay.answer("get", "pods", "--selector=kubetune.io/job=lost,kubetune.io/attempt", out=listed())
    replay.answer("logs", name, out="first\n", times=1)
    replay.answer("logs", name, err="Unable to connect to the server: unexpected EOF\n", times=1)
    replay.answer("logs", name, out="then\n")
    replay.answer("get", "pods", f"--field-selector=metadata.name={name}", out=listed(pod), times=2)
    replay.answer("get", "pods", f"--field-selector=metadata.name={name}", out=listed())
    cluster("running")
    assert logs.run(kubectl, "lost", Wanted(attempt=1), go_on=True) == 0
    told = capfd.readouterr()
    assert told.out == "first\nthen\n"
    assert "# the log was interrupted: the cluster does not answer" in told.err
    assert any(word.startswith("--since-time=") for word in replay.asked("logs")[1])
