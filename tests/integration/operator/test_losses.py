"""Workers that are lost, and an operator that dies."""

import json
import signal
from typing import Any

import pytest

from kubetune_contract.progress import TerminationMessage

pytestmark = pytest.mark.integration
Object = dict[str, Any]


# ---------------------------------------------------------------- lost workers


def test_a_crash_restarts_the_gang(drill):
    drill = drill()
    pods = drill.running()
    drill.ends(pods[1], 1, "Traceback\nRuntimeError: boom")
    status = drill.until("job", lambda status: status["restarts"] == 1)
    says = drill.condition(status, "Started")["message"]
    assert "Worker 1 ended with exit code 1. Attempt 2 starts from the beginning" in says
    assert says.endswith("Last lines of its log:\nTraceback\nRuntimeError: boom")
    second = drill.workers(attempt=2)
    drill.runs(*second)
    status = drill.until_state("job", "Running")
    assert (status["attempt"], status["restarts"], status["disruptions"]) == (2, 1, 0)


LOSSES = [
    (
        "kubectl delete pod",
        lambda drill, pods: drill.kubectl("delete", "pod", pods[1]["metadata"]["name"], "--wait=false"),
        (1, 0),
        "pod was deleted",
    ),
    (
        "kubectl delete job",
        lambda drill, pods: drill.kubectl("delete", "job", "job-a1"),
        (1, 0),
        "Job job-a1 was deleted by somebody else.",
    ),
    (
        "an eviction",
        lambda drill, pods: evict(drill, pods[1]),
        (0, 1),
        "EvictionByEvictionAPI",
    ),
]


def evict(drill: Any, pod: Object) -> None:
    name = pod["metadata"]["name"]
    body = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": name, "namespace": drill.namespace}}
    path = f"/api/v1/namespaces/{drill.namespace}/pods/{name}/eviction"
    drill.kube.kubectl("create", "--raw", path, "-f", "-", stdin=json.dumps(body))


@pytest.mark.parametrize(("lose", "counts", "says"), [loss[1:] for loss in LOSSES], ids=[loss[0] for loss in LOSSES])
def test_a_lost_worker_restarts_the_gang(drill, lose, counts, says):
    drill = drill()
    lose(drill, drill.running())
    status = drill.until("job", lambda status: status["attempt"] == 2)
    assert (status["restarts"], status["disruptions"]) == counts
    assert says in drill.condition(status, "Started")["message"]
    assert len(drill.workers(attempt=2)) == 2


def test_an_error_of_the_user_ends_the_job_at_once(drill):
    drill = drill()
    pods = drill.running()
    message = "data/train.jsonl, line 3: no assistant turn: every conversation needs one"
    drill.ends(pods[1], 65, TerminationMessage(reason="InvalidData", message=message).to_json())
    status = drill.until_state("job", "Failed")
    assert drill.condition(status, "Failed")["reason"] == "InvalidData"
    assert drill.condition(status, "Failed")["message"] == f"{message}."
    assert status["restarts"] == 0
    drill.watch("pods", "--selector=kubetune.io/job=job", reached=lambda found: not _live(found))


def _live(pods: dict[str, Object]) -> list[str]:
    return [name for name, pod in pods.items() if pod["status"]["phase"] not in ("Succeeded", "Failed")]


def test_restarts_are_not_endless(drill):
    drill = drill()
    drill.submit(failurePolicy={"maxRestarts": 1})
    drill.stage()
    for attempt in (1, 2):
        pods = drill.workers(attempt=attempt)
        drill.ends(pods[0], 1, "boom")
    status = drill.until_state("job", "Failed")
    assert "No restart is left: failurePolicy.maxRestarts is 1." in drill.condition(status, "Failed")["message"]
    assert (status["attempt"], status["restarts"]) == (2, 1)


# ---------------------------------------------------------------- an operator that dies


def test_an_operator_that_was_down_loses_nothing(drill):
    """The result stands in the pod's status, the counters in the job's."""
    drill = drill()
    pods = drill.running()
    drill.operator.stop(signal.SIGKILL)
    drill.ends(pods[0], 1, "boom")
    drill.watch("jobs", drill.named("job-a1"), reached=lambda jobs: any(_has(job, "Failed") for job in jobs.values()))
    drill.operator.start()
    status = drill.until("job", lambda status: status["attempt"] == 2)
    assert status["restarts"] == 1
    pods = drill.workers(attempt=2)
    drill.runs(*pods)
    drill.until_state("job", "Running")
    drill.operator.stop(signal.SIGKILL)
    drill.ends(pods[0], 0, drill.done)
    drill.ends(pods[1], 0)
    drill.operator.start()
    status = drill.until_state("job", "Succeeded")
    assert (status["restarts"], status["result"]["steps"]) == (1, 50)


def test_sigterm_ends_the_operator_cleanly(drill):
    drill = drill()
    drill.running()
    assert drill.operator.stop(signal.SIGTERM) == 0
    assert json.loads(drill.operator.log.read_text().splitlines()[-1])["message"] == "stopped"


def _has(manifest: Object, kind: str) -> bool:
    return any(item["type"] == kind for item in manifest.get("status", {}).get("conditions") or [])


def test_an_operator_killed_again_and_again_neither_loses_nor_doubles_an_attempt(drill):
    """Six jobs crash once each, while the operator is killed at a different moment every time."""
    drill = drill()
    names = [f"job-{number}" for number in range(6)]
    for name in names:
        drill.submit(name, workers={"nodes": 1})
    drill.until_shared(len(names))
    drill.stage()
    for name in names:
        drill.ends(drill.workers(name, count=1)[0], 1)
        drill.operator.stop(signal.SIGKILL)
        drill.operator.start()
    for name in names:
        pod = drill.workers(name, attempt=2, count=1)[0]
        drill.operator.stop(signal.SIGKILL)
        drill.ends(pod, 0, drill.done)
        drill.operator.start()
    for name in names:
        status = drill.until_state(name, "Succeeded")
        assert (status["attempt"], status["restarts"]) == (2, 1)
    jobs = drill.kubectl("get", "jobs", "-l", "kubetune.io/role=worker", "-o", "name").split()
    assert sorted(jobs) == sorted(f"job.batch/{name}-a{attempt}" for name in names for attempt in (1, 2))
