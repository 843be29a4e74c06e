"""Scheduling and permissions with the real operator and API server: a hand of the test plays Kueue."""

import json

import pytest

pytestmark = pytest.mark.integration
HELD = "--selector=kueue.x-k8s.io/queue-name=research"


def kueue(drill, name, held):
    """What Kueue does to an admitted or a preempted Job."""
    patch = json.dumps({"spec": {"suspend": held}})
    drill.kubectl("patch", "job", name, "--type=merge", "--patch", patch)


def waits(status):
    return "WaitingForQuota" in [item["reason"] for item in status.get("conditions", [])]


def test_a_queued_job_is_admitted_preempted_suspended_and_resumed(drill):
    drill = drill(debounce_seconds="0.05")
    drill.submit("queued", queue={"name": "research"})
    drill.stage()
    status = drill.until("queued", waits)
    assert 'waits for quota in queue "research"' in drill.condition(status, "Started")["message"]
    assert drill.kubectl("get", "pods", "--selector=kubetune.io/job=queued", "-o", "name") == ""

    kueue(drill, "queued-a1", held=False)
    drill.runs(*drill.workers("queued"))
    drill.until_state("queued", "Running")

    kueue(drill, "queued-a1", held=True)  # preempted: the Job controller deletes the pods
    status = drill.until("queued", waits)
    assert (status["attempt"], status["restarts"], status["disruptions"]) == (1, 0, 0)

    kueue(drill, "queued-a1", held=False)
    drill.runs(*drill.workers("queued"))
    drill.until_state("queued", "Running")

    drill.kubectl("patch", "ftj", "queued", "--type=merge", "--patch", '{"spec": {"suspend": true}}')
    status = drill.until_state("queued", "Suspended")
    assert (status["restarts"], status["disruptions"]) == (0, 0)
    assert drill.kubectl("get", "jobs", HELD, "-o", "name") == ""  # its quota is free

    drill.kubectl("patch", "ftj", "queued", "--type=merge", "--patch", '{"spec": {"suspend": false}}')
    drill.watch("jobs", HELD, reached=lambda jobs: list(jobs) == ["queued-a2"])
    kueue(drill, "queued-a2", held=False)
    pods = drill.workers("queued", attempt=2)
    drill.runs(*pods)
    drill.ends(pods[0], 0, drill.done)
    drill.ends(pods[1], 0)
    drill.until_state("queued", "Succeeded")


WRONG = {
    "an unknown field of a worker": (
        {"affinity": {"podAffinity": {"foo": 1}}},
        'unknown field "spec.workers.affinity.podAffinity.foo"',
    ),
    "a wrong value": (
        {"volumes": [{"name": "a", "configMap": {"name": "ca", "defaultMode": 4096}}]},
        "spec.workers.volumes[0].configMap.defaultMode: Invalid value: 4096",
    ),
    "an unknown field of the staging pod too": (
        {"affinity": {"nodeAffinity": {"foo": 1}}},
        'unknown field "spec.workers.affinity.nodeAffinity.foo"',
    ),
    "what nobody allows": (
        {"hostNetwork": True},
        "not allowed by the operator's setting KUBETUNE_ALLOW_HOST_NETWORK",
    ),
}


def test_what_is_wrong_ends_the_job_at_once_and_says_where(drill):
    drill = drill(debounce_seconds="0.05")
    names = {f"wrong-{number}": case for number, case in enumerate(WRONG.values())}
    for name, (workers, _) in names.items():
        drill.submit(name, workers=workers)
    drill.stage()  # of those whose staging pod is right
    for name, (_, words) in names.items():
        failed = drill.condition(drill.until_state(name, "Failed"), "Failed")
        assert failed["reason"] == "InvalidConfig"
        assert words in failed["message"]
