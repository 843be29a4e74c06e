"""From apply to an adapter, suspension, deletion, and what cannot work."""

import json
import signal
import time
from typing import Any

import pytest

pytestmark = pytest.mark.integration
Object = dict[str, Any]


# ---------------------------------------------------------------- the good way


def test_from_apply_to_an_adapter(drill):
    """The whole line, and what a person can read afterwards: conditions for what went well, events for the rest."""
    drill = drill()
    drill.submit()
    drill.until_state("job", "Staging")
    drill.stage()
    pods = drill.workers()
    drill.until("job", lambda status: (status["state"], status["attempt"]) == ("Starting", 1))
    drill.runs(pods[0])
    drill.until("job", lambda status: "1 of 2 workers" in drill.condition(status, "Started").get("message", ""))
    drill.runs(pods[1])
    status = drill.until_state("job", "Running")
    assert status["workers"] == {"active": 2, "ready": 2, "succeeded": 0, "failed": 0}
    drill.ends(pods[0], 0, drill.done)
    drill.ends(pods[1], 0)
    status = drill.until_state("job", "Succeeded")
    assert status["result"]["adapterPath"] == f"{status['outputPath']}/adapter"
    assert status["progress"]["percentage"] == 100
    assert drill.condition(status, "Succeeded")["message"].startswith("The adapter is at job-")
    told = drill.kubectl("wait", "--for=condition=Succeeded", "finetunejob/job", "--timeout=5s")
    assert told.strip() == "finetunejob.kubetune.io/job condition met"
    drill.watch(
        "events", drill.every, reached=lambda found: "Succeeded" in {event["reason"] for event in found.values()}
    )
    described = drill.kubectl("describe", "finetunejob", "job")
    lines = [line.split() for line in described[described.index("Events:") :].splitlines()[3:]]
    # The scheduler misses the claims, which are not there on purpose: that, and its end, is told too.
    assert [line[1] for line in lines if line[0] == "Normal"][-1] == "Succeeded"
    assert {line[1] for line in lines if line[0] == "Normal"} <= {"Staged", "Running", "Succeeded"}
    assert {line[1] for line in lines if line[0] == "Warning"} <= {"VolumeMissing"}
    story = [drill.condition(status, kind) for kind in ("Staged", "Started", "Succeeded")]
    assert [item["status"] for item in story] == ["True"] * 3
    assert len({item["message"] for item in story}) == 3


def test_nothing_is_written_while_nothing_happens(drill):
    drill = drill(resync_seconds="1")
    drill.running()
    before = drill.operator.metric("kubetune_status_writes_total")
    looked = drill.operator.metric("kubetune_reconcile_duration_seconds_count")
    version = json.loads(drill.kubectl("get", "finetunejob", "job", "-o", "json"))["metadata"]["resourceVersion"]
    deadline = time.monotonic() + 60
    while drill.operator.metric("kubetune_reconcile_duration_seconds_count") < looked + 3:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert drill.operator.metric("kubetune_status_writes_total") == before
    after = json.loads(drill.kubectl("get", "finetunejob", "job", "-o", "json"))
    assert after["metadata"]["resourceVersion"] == version
    assert "annotations" not in after["metadata"] or list(after["metadata"]["annotations"]) == [
        "kubectl.kubernetes.io/last-applied-configuration"
    ]
    assert "finalizers" not in after["metadata"]


def test_two_jobs_with_one_model_share_one_staging(drill):
    """It goes with the last of them."""
    drill = drill()
    for name in ("one", "two"):
        drill.submit(name)
        drill.until_state(name, "Staging")
    drill.until_shared(2)
    drill.stage()
    for name in ("one", "two"):
        drill.until(name, lambda status: drill.condition(status, "Staged").get("status") == "True")
    drill.kubectl("delete", "finetunejob", "one")
    drill.until_shared(1)
    drill.kubectl("delete", "finetunejob", "two")
    drill.watch("jobs", "--selector=kubetune.io/role=stage", reached=lambda jobs: not jobs)


# ---------------------------------------------------------------- what cannot work


def test_a_configuration_that_only_the_operator_can_judge_creates_nothing(drill):
    """The preset adds gradients up, which the API server does not know."""
    drill = drill()
    drill.submit(method="Full", training={"optimizerInBackward": True})
    status = drill.until_state("job", "Failed")
    assert drill.condition(status, "Failed")["reason"] == "InvalidConfig"
    assert "gradientAccumulationSteps" in drill.condition(status, "Failed")["message"]
    assert drill.kubectl("get", "jobs,pods,services", "-o", "name") == ""


def test_a_missing_claim_ends_the_job_and_frees_its_pods(drill):
    drill = drill(volume_grace_seconds="2")
    drill.submit()
    status = drill.until_state("job", "Failed")
    assert drill.condition(status, "Failed")["reason"] == "VolumeMissing"
    assert '"models" (spec.storage.models.claimName) does not exist' in drill.condition(status, "Failed")["message"]
    drill.watch("jobs", drill.every, reached=lambda jobs: not jobs)


def test_a_service_of_somebody_else_is_left_alone(drill):
    drill = drill()
    drill.kubectl("create", "service", "clusterip", "job", "--tcp=80")
    drill.submit()
    drill.stage()
    status = drill.until("job", lambda status: drill.condition(status, "Started").get("reason") == "NameConflict")
    assert 'Service "job" exists' in drill.condition(status, "Started")["message"]
    service = json.loads(drill.kubectl("get", "service", "job", "-o", "json"))
    assert service["spec"]["selector"] == {"app": "job"}
    drill.kubectl("delete", "service", "job")
    drill.workers()
    drill.until("job", lambda status: drill.condition(status, "Started").get("reason") != "NameConflict")


# ---------------------------------------------------------------- suspension and deletion


def test_suspending_frees_the_workers_and_resuming_goes_on(drill):
    drill = drill()
    drill.running()
    drill.kubectl("patch", "finetunejob", "job", "--type=merge", "--patch", '{"spec": {"suspend": true}}')
    status = drill.until_state("job", "Suspended")
    assert status["workers"]["active"] == 0
    drill.watch("pods", "--selector=kubetune.io/job=job", reached=lambda pods: not pods)
    drill.kubectl("patch", "finetunejob", "job", "--type=merge", "--patch", '{"spec": {"suspend": false}}')
    drill.runs(*drill.workers())
    status = drill.until_state("job", "Running")
    assert (status["attempt"], status["restarts"]) == (1, 0)


def test_a_job_submitted_suspended_waits(drill):
    drill = drill()
    drill.submit(suspend=True)
    status = drill.until_state("job", "Suspended")
    assert drill.condition(status, "Suspended")["message"] == "Nothing was started yet."
    assert drill.kubectl("get", "jobs", "-o", "name") == ""
    drill.kubectl("patch", "finetunejob", "job", "--type=merge", "--patch", '{"spec": {"suspend": false}}')
    drill.stage()
    drill.workers()


def test_a_job_deleted_while_the_operator_is_down_leaves_nothing(drill):
    drill = drill()
    drill.running()
    drill.operator.stop(signal.SIGKILL)
    drill.kubectl("delete", "finetunejob", "job")
    drill.watch("jobs", drill.every, reached=lambda jobs: not jobs)
    drill.operator.start()
    drill.submit("other")
    drill.until_state("other", "Staging")
    drill.watch("pods", "--selector=kubetune.io/job=job", reached=lambda pods: not pods)
    assert drill.children() == []


def test_a_new_job_of_a_deleted_ones_name_starts_from_nothing(drill):
    drill = drill()
    drill.running()
    drill.kubectl("delete", "finetunejob", "job")
    drill.submit()
    drill.stage()
    pods = drill.workers()
    drill.runs(*pods)
    status = drill.until_state("job", "Running")
    assert (status["attempt"], status["restarts"]) == (1, 0)
