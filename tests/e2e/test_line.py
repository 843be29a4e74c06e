"""From `kubectl apply` to an adapter on the real node: the good way, lost workers, suspension, an upgrade, errors."""

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import run as demo

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]
Object = dict[str, Any]
ADAPTER = "adapter/adapter_model.safetensors"
SILENT_SECONDS = 30.0
"""Between two steps in a status: 10 between two writes, and what a change of the leader takes on two busy cores."""


@pytest.fixture(scope="module")
def undisturbed(bench: Any) -> Object:
    """A run of two workers that nothing happened to."""
    bench.submit("calm")
    return bench.until_ended("calm")


def test_a_run_of_two_workers_succeeds_and_says_where_its_adapter_is(bench, undisturbed):
    status = undisturbed["status"]
    assert status["state"] == "Succeeded", bench.told(undisturbed)
    assert status["attempt"] == 1
    assert (status["restarts"], status["disruptions"]) == (0, 0)
    assert status["progress"]["step"] == status["progress"]["totalSteps"] == 40
    assert status["progress"]["percentage"] == 100
    assert status["result"]["adapterPath"] == f"{status['outputPath']}/adapter"
    assert status["staged"]["architecture"] == "LlamaForCausalLM"
    assert status["result"]["adapterPath"] in bench.condition(undisturbed, "Succeeded")["message"]


def test_kubectl_wait_returns_for_a_run_that_succeeded(bench, undisturbed):
    name = undisturbed["metadata"]["name"]
    where = ["--namespace", bench.namespace, "--timeout=5s"]
    told = bench.kube.kubectl("wait", "--for=condition=Succeeded", f"finetunejob/{name}", *where)
    assert told.strip() == f"finetunejob.kubetune.io/{name} condition met"


def test_the_conditions_tell_the_run_as_a_story_and_an_event_its_end(bench, undisturbed):
    name = undisturbed["metadata"]["name"]
    told = bench.kube.kubectl("describe", "finetunejob", name, "--namespace", bench.namespace)
    reasons = [line.split()[1] for line in told[told.index("Events:") :].splitlines() if " kubetune " in line]
    assert reasons == ["Succeeded"]
    story = [bench.condition(undisturbed, kind) for kind in ("Staged", "Started", "Succeeded")]
    assert [item["status"] for item in story] == ["True"] * 3
    times = [item["lastTransitionTime"] for item in story]
    assert times == sorted(times)


def test_a_killed_worker_costs_nothing_the_weights_are_the_same_bits(bench, undisturbed, tmp_path):
    bench.submit("killed")
    bench.until("killed", lambda job: (job["status"].get("checkpoint") or {}).get("step", 0) >= 8)
    victim = bench.worker("killed", attempt=1, index=1)
    bench.kube.kubectl("delete", "pod", victim, "--namespace", bench.namespace, "--force", "--grace-period=0")
    restarting = bench.until("killed", lambda job: job["status"]["restarts"] == 1)
    assert restarting["status"]["attempt"] == 2
    ended = bench.until_ended("killed")
    assert ended["status"]["state"] == "Succeeded", bench.told(ended)
    calm, killed = (bench.output(job, tmp_path) for job in (undisturbed, ended))
    assert (killed / ADAPTER).read_bytes() == (calm / ADAPTER).read_bytes()
    steps = [line["step"] for line in metrics(killed) if "loss" in line]
    assert steps == list(range(1, 41))


def test_a_suspended_run_holds_no_pod_and_goes_on_to_the_same_bits(bench, undisturbed, tmp_path):
    bench.submit("paused")
    bench.until("paused", lambda job: (job["status"].get("checkpoint") or {}).get("step", 0) >= 4)
    bench.suspend("paused", True)
    held = bench.until("paused", lambda job: bench.condition(job, "Suspended").get("status") == "True")
    assert held["status"]["state"] == "Suspended"
    assert bench.active_pods("paused") == []
    bench.suspend("paused", False)
    ended = bench.until_ended("paused")
    assert ended["status"]["state"] == "Succeeded", bench.told(ended)
    assert ended["status"]["restarts"] == 0
    calm, paused = (bench.output(job, tmp_path) for job in (undisturbed, ended))
    assert (paused / ADAPTER).read_bytes() == (calm / ADAPTER).read_bytes()


def test_an_upgrade_of_the_operator_leaves_a_job_that_trains_alone(bench, operator, record_property):
    """The chart as it is installed, with two replicas: other pods, another leader, and reports are taken meanwhile."""
    bench.scale_operator(operator, 2)
    bench.submit("rolled", training={"maxSteps": 5000}, checkpoint={"everySteps": 100}, workers={"nodes": 1})
    bench.until("rolled", lambda job: step_of(job) > 0)
    worker, pods = worker_of(bench, "rolled"), operator_pods(bench, operator)
    assert len(pods) == 2
    assert leader_of(bench, operator) in pods
    enough = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        following = pool.submit(follow, bench, "rolled", enough)
        try:
            began = time.monotonic()
            upgrade(bench.kube, operator)
            seconds = time.monotonic() - began
            reached = step_of(bench.kube.get("finetunejob", "rolled", bench.namespace))
            bench.until("rolled", lambda job: step_of(job) > reached)
        finally:
            enough.set()
        sights = following.result()
    silent = longest_silence(sights)
    record_property("longest time without a new step in the status, seconds", round(silent, 1))
    print(f"rolled out in {seconds:.1f} s; longest time without a new step: {silent:.1f} s")
    told = [
        tuple(job["status"][field] for field in ("state", "attempt", "restarts", "disruptions")) for _, job in sights
    ]
    assert set(told) == {("Running", 1, 0, 0)}
    steps = [step_of(job) for _, job in sights]
    assert steps == sorted(steps)
    assert silent < SILENT_SECONDS
    assert worker_of(bench, "rolled") == worker
    successors = operator_pods(bench, operator)
    assert len(successors) == 2
    assert pods.isdisjoint(successors)
    assert leader_of(bench, operator) in successors
    bench.kube.kubectl("delete", "finetunejob", "rolled", "--namespace", bench.namespace)


def upgrade(kube: Any, namespace: str) -> None:
    """Change the pods' template with helm, and nothing else: the value is the default. Until the last old pod ends."""
    where = ["--namespace", namespace, "--take-ownership", "--wait", "--timeout", "5m"]
    kube.helm("upgrade", demo.RELEASE, demo.CHART, "--reuse-values", "--set", "settings.logLevel=INFO", *where)
    kube.kubectl("rollout", "status", "deployment", demo.RELEASE, "--namespace", namespace, "--timeout=120s")


def follow(bench: Any, name: str, enough: threading.Event) -> list[tuple[float, Object]]:
    """What is seen of a FineTuneJob, and when, until it is enough."""
    sights: list[tuple[float, Object]] = []
    while not enough.is_set():
        for event in bench.kube.watch("finetunejob", name, bench.namespace):
            if event is not None:
                sights.append((time.monotonic(), event[1]))
            if enough.is_set():
                break
    sights.append((time.monotonic(), bench.kube.get("finetunejob", name, bench.namespace)))
    return sights


def longest_silence(sights: list[tuple[float, Object]]) -> float:
    """Most seconds between two sights that tell another step."""
    first: dict[int, float] = {}
    for moment, job in sights:
        first.setdefault(step_of(job), moment)
    moments = list(first.values())
    return max(later - earlier for earlier, later in pairwise(moments))


def step_of(job: Object) -> int:
    """The last step that the status tells."""
    return int(((job.get("status") or {}).get("progress") or {}).get("step", 0))


def worker_of(bench: Any, name: str) -> tuple[str, int]:
    """The first worker's pod, by its uid, and how often its container was started again."""
    pod = bench.kube.get("pod", bench.worker(name, attempt=1, index=0), bench.namespace)
    return pod["metadata"]["uid"], pod["status"]["containerStatuses"][0]["restartCount"]


def operator_pods(bench: Any, namespace: str) -> set[str]:
    """The names of the operator's pods, without those that are going."""
    words = ["--selector", "app.kubernetes.io/name=kubetune", "--namespace", namespace, "--output", "json"]
    items = json.loads(bench.kube.kubectl("get", "pods", *words))["items"]
    return {item["metadata"]["name"] for item in items if "deletionTimestamp" not in item["metadata"]}


def leader_of(bench: Any, namespace: str) -> str:
    """The pod that holds the operator's Lease."""
    lease = bench.kube.get("lease", demo.RELEASE, namespace)
    return str(lease["spec"].get("holderIdentity") or "")


def test_deleting_a_running_job_leaves_nothing(bench):
    bench.submit("unwanted")
    bench.until("unwanted", lambda job: bench.condition(job, "Running").get("status") == "True")
    assert len(bench.children("unwanted")) == 5  # a Job, two Pods, a Service, a ConfigMap
    bench.kube.kubectl("delete", "finetunejob", "unwanted", "--namespace", bench.namespace)
    bench.wait_gone("unwanted")


def test_a_job_deleted_while_the_operator_is_down_does_not_come_back(bench, operator):
    bench.submit("orphan")
    bench.until("orphan", lambda job: bench.condition(job, "Running").get("status") == "True")
    bench.scale_operator(operator, 0)
    try:
        bench.kube.kubectl("delete", "finetunejob", "orphan", "--namespace", bench.namespace)
        bench.wait_gone("orphan")
    finally:
        bench.scale_operator(operator, 1)
    # A job after it is carried through: by then the operator has seen everything that it would bring back.
    bench.submit("next", training={"maxSteps": 1, "warmupSteps": 0}, workers={"nodes": 1})
    assert bench.until_ended("next")["status"]["state"] == "Succeeded"
    assert bench.children("orphan") == []


USER_ERRORS = [
    pytest.param(
        {"model": {"volumePath": "data"}},
        "InvalidModel",
        "config.json",
        id="a model folder without config.json",
    ),
    pytest.param(
        {"model": {"volumePath": "bert"}},
        "InvalidModel",
        "BertForMaskedLM",
        id="a model that is no Llama",
    ),
    pytest.param(
        {"dataset": {"volumePath": "data/missing.jsonl"}},
        "InvalidData",
        "data/missing.jsonl",
        id="a dataset that is not on the volume",
    ),
    pytest.param(
        {"dataset": {"volumePath": "data/questions.jsonl"}},
        "InvalidData",
        "no assistant message",
        id="a dataset without answers",
    ),
    pytest.param(
        {"storage": {"models": {"claimName": "nowhere"}}},
        "VolumeMissing",
        'PersistentVolumeClaim "nowhere"',
        id="a claim that does not exist",
    ),
]


@pytest.mark.parametrize(("spec", "reason", "word"), USER_ERRORS)
def test_an_error_of_the_user_ends_the_job_at_once_and_says_what_to_change(bench, request, spec, reason, word):
    name = f"wrong-{[case.id for case in USER_ERRORS].index(request.node.callspec.id)}"
    bench.submit(name, **spec)
    ended = bench.until_ended(name)
    failed = bench.condition(ended, "Failed")
    assert (ended["status"]["state"], failed["reason"]) == ("Failed", reason), bench.told(ended)
    assert word in failed["message"]
    assert ended["status"]["restarts"] == 0
    assert ended["status"]["attempt"] <= 1
    bench.wait_no_active_pod(name)


def metrics(folder: Path) -> list[Object]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
