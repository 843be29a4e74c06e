"""Deadlines, clean-up, time to live, changed workers and taken names on a real API server."""

import json
from typing import Any

import pytest

pytestmark = pytest.mark.integration
Object = dict[str, Any]


def change(drill: Any, name: str, **spec: Any) -> None:
    """Change a FineTuneJob as `kubectl patch` does."""
    drill.kubectl("patch", "finetunejob", name, "--type=merge", "--patch", json.dumps({"spec": spec}))


def failed(drill: Any, name: str) -> tuple[str, str]:
    """Reason and message of the job's failure, once it has failed."""
    told = drill.condition(drill.until_state(name, "Failed"), "Failed")
    return told["reason"], told["message"]


def until_gone(drill: Any, kind: str, selector: str) -> None:
    drill.watch(kind, selector, reached=lambda found: not found)


def labelled(name: str) -> str:
    return f"--selector=kubetune.io/job={name}"


def test_a_staging_pod_without_a_node_and_workers_without_nodes_end_the_job(drill):
    """Their claims do not exist, and here the grace for that is an hour. Everything that waited is freed."""
    drill = drill()
    drill.submit("job")
    drill.until("job", lambda status: drill.condition(status, "Staged").get("reason") == "VolumeMissing")
    change(drill, "job", failurePolicy={"startupDeadlineSeconds": 1})
    reason, message = failed(drill, "job")
    assert reason == "VolumeMissing"
    assert "The staging pod was not up after 1 second, which is failurePolicy.startupDeadlineSeconds" in message
    until_gone(drill, "jobs", "--selector=kubetune.io/role=stage")
    drill.submit("two")
    drill.stage()
    drill.until("two", lambda status: drill.condition(status, "Started").get("reason") == "VolumeMissing")
    change(drill, "two", failurePolicy={"startupDeadlineSeconds": 1})
    reason, message = failed(drill, "two")
    assert reason == "VolumeMissing"
    assert message.startswith("0 of 2 workers run: worker 0 cannot be scheduled:")
    until_gone(drill, "jobs", labelled("two"))


def test_a_job_that_is_active_too_long_is_stopped_and_what_has_ended_stays_as_it_wishes(drill):
    drill = drill()
    pods = drill.running("keeps", cleanPodPolicy="None")
    drill.ends(pods[0], 0)
    drill.until("keeps", lambda status: status["workers"]["succeeded"] == 1)
    change(drill, "keeps", activeDeadlineSeconds=1)
    reason, message = failed(drill, "keeps")
    assert (reason, message[:36]) == ("DeadlineExceeded", "The job was active for 1 second, as ")
    over = lambda jobs: any(item["type"] == "Failed" for job in jobs.values() for item in conditions(job))  # noqa: E731
    drill.watch("jobs", labelled("keeps"), reached=over)
    pod = f"pod/{pods[0]['metadata']['name']}"
    assert sorted(drill.children("keeps")) == [
        "configmap/keeps-kubetune",
        "job.batch/keeps-a1",
        pod,
        "service/keeps",
    ]


def conditions(manifest: Object) -> list[Object]:
    found: list[Object] = manifest.get("status", {}).get("conditions", [])
    return found


def test_all_removes_every_child_and_then_the_job_s_time_comes(drill):
    drill = drill()
    pods = drill.running("job", cleanPodPolicy="All")
    drill.ends(pods[0], 0, drill.done)
    drill.ends(pods[1], 0)
    drill.until("job", lambda status: status.get("state") == "Succeeded" and "cleanUpTime" in status)
    for kind in ("jobs", "pods", "configmaps", "services"):
        until_gone(drill, kind, labelled("job"))
    change(drill, "job", ttlSecondsAfterFinished=1)
    until_gone(drill, "finetunejobs", drill.named("job"))


def test_a_gang_that_makes_no_step_restarts(drill, tls):
    drill = drill(**tls)
    drill.running("job", failurePolicy={"progressDeadlineSeconds": 3600})
    change(drill, "job", failurePolicy={"progressDeadlineSeconds": 1})
    status = drill.until("job", lambda status: status["restarts"] == 1)
    assert drill.condition(status, "Running")["reason"] == "Stalled"
    assert "no step was reported within 1 second" in drill.condition(status, "Started")["message"]
    change(drill, "job", failurePolicy={"progressDeadlineSeconds": 3600})
    drill.runs(*drill.workers(attempt=2))
    status = drill.until_state("job", "Running")
    assert (status["attempt"], status["restarts"]) == (2, 1)
    assert "job-a1" not in drill.kubectl("get", "jobs", "-o", "name")


def test_workers_that_were_changed_in_suspension_are_made_anew(drill):
    drill = drill()
    drill.running("job")
    change(drill, "job", suspend=True, workers={"nodes": 3})
    drill.until_state("job", "Suspended")
    change(drill, "job", suspend=False)
    pods = drill.workers("job", attempt=2, count=3)
    drill.runs(*pods)
    status = drill.until_state("job", "Running")
    assert (status["attempt"], status["restarts"], status["disruptions"]) == (2, 0, 0)
    assert "job-a1" not in drill.kubectl("get", "jobs", "-o", "name")


def test_what_starting_pods_need_comes_back_when_somebody_deletes_it(drill):
    drill = drill()
    drill.submit("job")
    drill.stage()
    for pod in drill.workers("job"):
        status = {"conditions": [{"type": "PodScheduled", "status": "True"}]}
        words = ["--subresource=status", "--type=merge", "--patch", json.dumps({"status": status})]
        drill.kubectl("patch", "pod", pod["metadata"]["name"], *words)
    drill.kubectl("delete", "configmap/job-kubetune", "service/job")
    drill.watch("configmaps", labelled("job"), reached=lambda found: "job-kubetune" in found)
    drill.watch("services", labelled("job"), reached=lambda found: "job" in found)


def test_a_name_that_somebody_else_has_is_told_left_alone_and_used_when_it_is_free(drill):
    drill = drill(restart_backoff_seconds="1")
    drill.kubectl("create", "service", "clusterip", "job", "--tcp=80")
    before = drill.kubectl("get", "service", "job", "-o", "jsonpath={.metadata.uid} {.metadata.resourceVersion}")
    drill.submit("job")
    drill.stage()
    taken = lambda status: drill.condition(status, "Started").get("reason") == "NameConflict"  # noqa: E731
    status = drill.until("job", taken)
    assert 'Service "job" exists in namespace' in drill.condition(status, "Started")["message"]
    after = drill.kubectl("get", "service", "job", "-o", "jsonpath={.metadata.uid} {.metadata.resourceVersion}")
    assert after == before
    drill.kubectl("delete", "service", "job")
    drill.workers("job")
    drill.until("job", lambda status: drill.condition(status, "Started").get("reason") != "NameConflict")
