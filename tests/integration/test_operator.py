"""The operator as a process of its own against a real API server.

Its pods never reach a node: their claims do not exist, so the scheduler leaves them alone and the tests write the
status that a kubelet would write. Everything else is real: the Job controller, evictions, the collector, tokens.
"""

import datetime as dt
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from kube import Kube

from kubetune_contract.paths import TOKEN_AUDIENCE
from kubetune_contract.progress import CheckpointStatus, Progress, ProgressReport, Result, TerminationMessage
from kubetune_contract.staging import StagedModel
from kubetune_operator.names import OPERATOR_LABEL

Object = dict[str, Any]
SECONDS = 60.0
"""A deadline on two busy cores; the usual time is under two seconds."""

STAGED = TerminationMessage(
    reason="Done",
    message="staged",
    staged=StagedModel(path="models/llama", architecture="LlamaForCausalLM", parameters=134515008, bytes=269000000),
).to_json()
DONE = TerminationMessage(
    reason="Done", message="done", result=Result(adapter_path="adapter", final_loss=0.5, steps=50, tokens=1)
).to_json()


# ---------------------------------------------------------------- the operator's process


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


class Operator:
    """`python -m kubetune_operator` for one namespace."""

    def __init__(self, kube: Kube, namespace: str, folder: Path, **settings: str) -> None:
        self.port = free_port()
        self.log = folder / "operator.log"
        chosen = {
            "namespace": namespace,
            "watch_namespace": namespace,
            "operator_name": namespace,  # another operator on this cluster leaves our jobs alone
            "trainer_image": "registry.invalid/trainer:1",
            "metrics_port": str(self.port),
            "volume_grace_seconds": "3600",
            "restart_backoff_seconds": "1",
            "debounce_seconds": "0.1",
            "progress_write_seconds": "1",
            **settings,
        }
        kept = {name: value for name, value in os.environ.items() if not name.startswith("KUBE")}
        variables = {f"KUBETUNE_{name.upper()}": value for name, value in chosen.items()}
        self.environment = {**kept, **variables, "KUBECONFIG": str(kube.config)}
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it and wait until its caches are complete."""
        with self.log.open("ab") as log:
            command = [sys.executable, "-m", "kubetune_operator"]
            self.process = subprocess.Popen(command, env=self.environment, stderr=log)
        deadline = time.monotonic() + SECONDS
        while not self.answers("/readyz"):
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.1)

    def answers(self, path: str) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=5) as answer:
                return answer.status == 200
        except OSError:
            return False

    def metric(self, line: str) -> float:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=5) as answer:
            found = [text for text in answer.read().decode().splitlines() if text.startswith(line)]
        return float(found[0].rsplit(" ", 1)[1])

    def stop(self, how: int = signal.SIGTERM) -> int:
        assert self.process is not None
        self.process.send_signal(how)
        code = self.process.wait(timeout=SECONDS)
        self.process = None
        return code

    def errors(self) -> list[str]:
        lines = [json.loads(line) for line in self.log.read_text().splitlines()]
        return [json.dumps(line) for line in lines if line["level"] in ("error", "critical")]


# ---------------------------------------------------------------- the namespace and what is done there


class Drill:
    """A namespace of its own, one operator for it, and hands for the kubelet's work."""

    def __init__(self, kube: Kube, namespace: str, operator: Operator, manifest: Callable[..., Object]) -> None:
        self.kube = kube
        self.namespace = namespace
        self.operator = operator
        self.manifest = manifest

    def kubectl(self, *words: str, stdin: Object | None = None) -> str:
        text = None if stdin is None else json.dumps(stdin)
        return self.kube.kubectl(*words, "--namespace", self.namespace, stdin=text)

    def submit(self, name: str = "job", **spec: Any) -> None:
        spec = {"preset": "llama3/8B_lora", "workers": {"nodes": 2}, **spec}
        manifest = self.manifest(name, **spec)
        manifest["metadata"]["labels"] = {OPERATOR_LABEL: self.namespace}
        self.kubectl("apply", "-f", "-", stdin=manifest)

    def watch(
        self, *what: str, reached: Callable[[dict[str, Object]], bool], seconds: float = SECONDS
    ) -> dict[str, Object]:
        """Watch objects until the set of them, by name, is as it should be."""
        kind, name = what if len(what) == 2 else (what[0], "--show-kind=false")
        found: dict[str, Object] = {}
        deadline = time.monotonic() + seconds
        while True:
            for event in self.kube.watch(kind, name, self.namespace):
                if event is not None:
                    self._take(found, *event)
                if reached(found):
                    return found
                assert time.monotonic() < deadline, f"{what} did not get there: {json.dumps(found, indent=1)[-4000:]}"

    def _take(self, found: dict[str, Object], kind: str, item: Object) -> None:
        found.pop(item["metadata"]["name"], None)
        if kind != "DELETED":
            found[item["metadata"]["name"]] = item

    def until(self, name: str, reached: Callable[[Object], bool], seconds: float = SECONDS) -> Object:
        """Watch a FineTuneJob until its status is as it should be."""
        holds = lambda found: name in found and reached(found[name].get("status", {}))  # noqa: E731
        return self.watch("finetunejob", name, reached=holds, seconds=seconds)[name]["status"]

    def until_state(self, name: str, state: str) -> Object:
        return self.until(name, lambda status: status.get("state") == state)

    def pods(self, selector: str, count: int) -> list[Object]:
        """The live pods of a selector, once there are as many."""

        def live(found: dict[str, Object]) -> list[Object]:
            pods = [pod for pod in found.values() if pod["status"]["phase"] in ("Pending", "Running")]
            return [pod for pod in pods if "deletionTimestamp" not in pod["metadata"]]

        found = self.watch("pods", f"--selector={selector}", reached=lambda pods: len(live(pods)) == count)
        index = "batch.kubernetes.io/job-completion-index"
        return sorted(live(found), key=lambda pod: pod["metadata"]["labels"].get(index, "0"))

    def workers(self, name: str = "job", attempt: int = 1, count: int = 2) -> list[Object]:
        return self.pods(f"kubetune.io/job={name},kubetune.io/attempt={attempt}", count)

    # ------------------------------------------------------------ the kubelet's part

    def play(self, pod: Object, phase: str, state: Object, ready: bool = False) -> None:
        """Write a pod's status."""
        container = {"name": "main", "image": "i", "imageID": "", "ready": ready, "restartCount": 0, "state": state}
        conditions = [{"type": "Ready", "status": str(ready)}]
        status = {"phase": phase, "conditions": conditions, "containerStatuses": [container]}
        patch = json.dumps({"status": status})
        words = ["patch", "pod", pod["metadata"]["name"], "--subresource=status", "--type=merge", "--patch", patch]
        self.kubectl(*words)

    def runs(self, *pods: Object) -> None:
        for pod in pods:
            self.play(pod, "Running", {"running": {"startedAt": _now()}}, ready=True)

    def ends(self, pod: Object, code: int, message: str = "") -> None:
        state = {"exitCode": code, "reason": "Error" if code else "Completed", "message": message, "finishedAt": _now()}
        self.play(pod, "Failed" if code else "Succeeded", {"terminated": state})

    def until_shared(self, owners: int) -> None:
        """Wait until the one staging Job has so many owners."""
        reached = lambda jobs: [len(job["metadata"]["ownerReferences"]) for job in jobs.values()] == [owners]  # noqa: E731
        self.watch("jobs", "--selector=kubetune.io/role=stage", reached=reached)

    def stage(self, count: int = 1) -> None:
        """Do the work of the staging pods."""
        for pod in self.pods("kubetune.io/role=stage", count):
            self.ends(pod, 0, STAGED)

    def running(self, name: str = "job", **spec: Any) -> list[Object]:
        """Submit a job and bring its workers up."""
        self.submit(name, **spec)
        self.stage()
        pods = self.workers(name)
        self.runs(*pods)
        self.until_state(name, "Running")
        return pods

    def children(self, name: str = "job") -> list[str]:
        kinds = "jobs,pods,services,configmaps"
        return self.kubectl("get", kinds, "-l", f"kubetune.io/job={name}", "-o", "name").split()


def _now() -> str:
    return dt.datetime.now(dt.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def condition(status: Object, kind: str) -> Object:
    found: Object = next((item for item in status.get("conditions", []) if item["type"] == kind), {})
    return found


@pytest.fixture
def drill(kube: Kube, crd: str, manifest: Callable[..., Object], tmp_path: Path) -> Iterator[Callable[..., Drill]]:
    """drill(**settings): a running operator in a namespace of the test's own."""
    made: list[Drill] = []

    def make(**settings: str) -> Drill:
        namespace = f"kubetune-it-{uuid.uuid4().hex[:8]}"
        kube.kubectl("create", "namespace", namespace)
        made.append(Drill(kube, namespace, Operator(kube, namespace, tmp_path, **settings), manifest))
        made[-1].operator.start()
        return made[-1]

    yield make
    for drill in made:
        kube.kubectl("delete", "finetunejobs", "--all", "--namespace", drill.namespace, "--wait=false")
        if drill.operator.process is not None:
            drill.operator.stop(signal.SIGKILL)
        kube.kubectl("delete", "namespace", drill.namespace, "--wait=false")
        assert drill.operator.errors() == []


# ---------------------------------------------------------------- the good way


def test_from_apply_to_an_adapter(drill):
    """The whole line, and the story that a person can read afterwards."""
    drill = drill()
    drill.submit()
    drill.until_state("job", "Staging")
    drill.stage()
    pods = drill.workers()
    drill.until("job", lambda status: (status["state"], status["attempt"]) == ("Starting", 1))
    drill.runs(pods[0])
    drill.until("job", lambda status: "1 of 2 workers" in condition(status, "Started").get("message", ""))
    drill.runs(pods[1])
    status = drill.until_state("job", "Running")
    assert status["workers"] == {"active": 2, "ready": 2, "succeeded": 0, "failed": 0}
    drill.ends(pods[0], 0, DONE)
    drill.ends(pods[1], 0)
    status = drill.until_state("job", "Succeeded")
    assert status["result"]["adapterPath"] == f"{status['outputPath']}/adapter"
    assert status["progress"]["percentage"] == 100
    assert condition(status, "Succeeded")["message"].startswith("The adapter is at job-")
    told = drill.kubectl("wait", "--for=condition=Succeeded", "finetunejob/job", "--timeout=5s")
    assert told.strip() == "finetunejob.kubetune.io/job condition met"
    drill.watch("events", reached=lambda events: any(event["reason"] == "Succeeded" for event in events.values()))
    described = drill.kubectl("describe", "finetunejob", "job")
    told = [line.split()[1] for line in described[described.index("Events:") :].splitlines()[3:]]
    assert told == ["Staged", "Starting", "Running", "Succeeded"]


def test_nothing_is_written_while_nothing_happens(drill):
    drill = drill(resync_seconds="1")
    drill.running()
    before = drill.operator.metric("kubetune_status_writes_total")
    looked = drill.operator.metric("kubetune_reconcile_seconds_count")
    version = json.loads(drill.kubectl("get", "finetunejob", "job", "-o", "json"))["metadata"]["resourceVersion"]
    deadline = time.monotonic() + SECONDS
    while drill.operator.metric("kubetune_reconcile_seconds_count") < looked + 3:
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
        drill.until(name, lambda status: condition(status, "Staged").get("status") == "True")
    drill.kubectl("delete", "finetunejob", "one")
    drill.until_shared(1)
    drill.kubectl("delete", "finetunejob", "two")
    drill.watch("jobs", "--selector=kubetune.io/role=stage", reached=lambda jobs: not jobs)


# ---------------------------------------------------------------- lost workers


def test_a_crash_restarts_the_gang(drill):
    drill = drill()
    pods = drill.running()
    drill.ends(pods[1], 1, "Traceback\nRuntimeError: boom")
    status = drill.until("job", lambda status: status["restarts"] == 1)
    says = condition(status, "Started")["message"]
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


def evict(drill: Drill, pod: Object) -> None:
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
    assert says in condition(status, "Started")["message"]
    assert len(drill.workers(attempt=2)) == 2


def test_an_error_of_the_user_ends_the_job_at_once(drill):
    drill = drill()
    pods = drill.running()
    message = "data/train.jsonl, line 3: no assistant turn: every conversation needs one"
    drill.ends(pods[1], 65, TerminationMessage(reason="InvalidData", message=message).to_json())
    status = drill.until_state("job", "Failed")
    assert condition(status, "Failed")["reason"] == "InvalidData"
    assert condition(status, "Failed")["message"] == f"{message}."
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
    assert "No restart is left: failurePolicy.maxRestarts is 1." in condition(status, "Failed")["message"]
    assert (status["attempt"], status["restarts"]) == (2, 1)


# ---------------------------------------------------------------- what cannot work


def test_a_configuration_that_only_the_operator_can_judge_creates_nothing(drill):
    """The preset warms up for 100 steps, which the API server does not know."""
    drill = drill()
    drill.submit(training={"maxSteps": 50})
    status = drill.until_state("job", "Failed")
    assert condition(status, "Failed")["reason"] == "InvalidConfig"
    assert "warmupSteps" in condition(status, "Failed")["message"]
    assert drill.kubectl("get", "jobs,pods,services", "-o", "name") == ""


def test_a_missing_claim_ends_the_job_and_frees_its_pods(drill):
    drill = drill(volume_grace_seconds="2")
    drill.submit()
    status = drill.until_state("job", "Failed")
    assert condition(status, "Failed")["reason"] == "VolumeMissing"
    assert '"models" (spec.storage.models.claimName) does not exist' in condition(status, "Failed")["message"]
    drill.watch("jobs", reached=lambda jobs: not jobs)


def test_a_service_of_somebody_else_is_left_alone(drill):
    drill = drill()
    drill.kubectl("create", "service", "clusterip", "job", "--tcp=80")
    drill.submit()
    drill.stage()
    status = drill.until("job", lambda status: condition(status, "Started").get("reason") == "NameConflict")
    assert 'Service "job" exists' in condition(status, "Started")["message"]
    service = json.loads(drill.kubectl("get", "service", "job", "-o", "json"))
    assert service["spec"]["selector"] == {"app": "job"}
    drill.kubectl("delete", "service", "job")
    drill.workers()
    drill.until("job", lambda status: condition(status, "Started").get("reason") != "NameConflict")


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
    assert condition(status, "Suspended")["message"] == "Nothing was started yet."
    assert drill.kubectl("get", "jobs", "-o", "name") == ""
    drill.kubectl("patch", "finetunejob", "job", "--type=merge", "--patch", '{"spec": {"suspend": false}}')
    drill.stage()
    drill.workers()


def test_a_job_deleted_while_the_operator_is_down_leaves_nothing(drill):
    drill = drill()
    drill.running()
    drill.operator.stop(signal.SIGKILL)
    drill.kubectl("delete", "finetunejob", "job")
    drill.watch("jobs", reached=lambda jobs: not jobs)
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


# ---------------------------------------------------------------- an operator that dies


def test_an_operator_that_was_down_loses_nothing(drill):
    """The result stands in the pod's status, the counters in the job's."""
    drill = drill()
    pods = drill.running()
    drill.operator.stop(signal.SIGKILL)
    drill.ends(pods[0], 1, "boom")
    drill.watch("jobs", "job-a1", reached=lambda jobs: _has(jobs["job-a1"], "Failed") if "job-a1" in jobs else False)
    drill.operator.start()
    status = drill.until("job", lambda status: status["attempt"] == 2)
    assert status["restarts"] == 1
    pods = drill.workers(attempt=2)
    drill.runs(*pods)
    drill.until_state("job", "Running")
    drill.operator.stop(signal.SIGKILL)
    drill.ends(pods[0], 0, DONE)
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
        drill.ends(pod, 0, DONE)
        drill.operator.start()
    for name in names:
        status = drill.until_state(name, "Succeeded")
        assert (status["attempt"], status["restarts"]) == (2, 1)
    jobs = drill.kubectl("get", "jobs", "-l", "kubetune.io/role=worker", "-o", "name").split()
    assert sorted(jobs) == sorted(f"job.batch/{name}-a{attempt}" for name in names for attempt in (1, 2))


# ---------------------------------------------------------------- progress


@pytest.fixture
def tls(tmp_path: Path) -> dict[str, str]:
    """Settings of a progress endpoint on this machine, with a certificate of its own."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = dt.datetime.now(dt.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(minutes=1))
        .not_valid_after(now + dt.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (tmp_path / "tls.crt").write_bytes(certificate.public_bytes(pem))
    (tmp_path / "tls.key").write_bytes(private)
    port = free_port()
    return {
        "progress_port": str(port),
        "progress_url": f"https://localhost:{port}",
        "ca_file": str(tmp_path / "tls.crt"),
        "tls_cert_file": str(tmp_path / "tls.crt"),
        "tls_key_file": str(tmp_path / "tls.key"),
    }


def post(tls: dict[str, str], path: str, token: str, report: ProgressReport) -> int:
    """Post as a trainer does; the answer's code."""
    request = urllib.request.Request(f"{tls['progress_url']}{path}", data=report.to_json().encode(), method="POST")
    request.add_header("Authorization", f"Bearer {token}")
    context = ssl.create_default_context(cafile=tls["ca_file"])
    try:
        with urllib.request.urlopen(request, timeout=10, context=context) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        error.close()
        return error.code


def test_a_worker_reports_on_its_own_attempt_and_on_nothing_else(drill, tls):
    """Tokens are bound to pods by the API server, as the kubelet would ask for them."""
    drill = drill(**tls)
    pods = drill.running("mine")
    drill.submit("other")
    checkpoint = CheckpointStatus(step=10, path="checkpoints/step-10", time=dt.datetime(2030, 1, 1, tzinfo=dt.UTC))
    progress = Progress(step=12, total_steps=50, epoch=0.2, percentage=24, loss=1.25, estimated_remaining_seconds=70)
    report = ProgressReport(progress=progress, checkpoint=checkpoint)

    def token(audience: str) -> str:
        bound = ["--bound-object-kind=Pod", f"--bound-object-name={pods[0]['metadata']['name']}"]
        return drill.kubectl("create", "token", "default", f"--audience={audience}", *bound).strip()

    good, path = token(TOKEN_AUDIENCE), f"/v1/progress/{drill.namespace}"
    assert post(tls, f"{path}/mine/1", good, report) == 204
    assert post(tls, f"{path}/mine/2", good, report) == 403
    assert post(tls, f"{path}/other/1", good, report) == 403
    assert post(tls, "/v1/progress/default/mine/1", good, report) == 403
    assert post(tls, f"{path}/mine/1", "guess", report) == 401
    assert post(tls, f"{path}/mine/1", token("https://kubernetes.default.svc"), report) == 401
    unbound = drill.kubectl("create", "token", "default", f"--audience={TOKEN_AUDIENCE}").strip()
    assert post(tls, f"{path}/mine/1", unbound, report) == 401
    status = drill.until("mine", lambda status: status.get("progress", {}).get("step") == 12)
    assert status["display"] == {"progress": "24%", "loss": "1.25", "eta": "1m10s"}
    assert status["checkpoint"]["path"] == "checkpoints/step-10"
    shown = drill.kubectl("get", "finetunejob", "mine", "--no-headers").split()
    assert shown[:5] == ["mine", "Running", "24%", "1.25", "1m10s"]
    labels = f'{{name="mine",namespace="{drill.namespace}"}}'
    assert drill.operator.metric(f"kubetune_training_loss{labels}") == 1.25
    config = json.loads(drill.kubectl("get", "configmap", "mine-kubetune", "-o", "json"))
    print(config["metadata"].get("managedFields"), config)
    assert config["data"]["ca.crt"] == Path(tls["ca_file"]).read_text()


def test_steps_that_no_checkpoint_holds_are_taken_back_with_the_gang(drill, tls):
    drill = drill(**tls)
    pods = drill.running()
    bound = ["--bound-object-kind=Pod", f"--bound-object-name={pods[0]['metadata']['name']}"]
    token = drill.kubectl("create", "token", "default", f"--audience={TOKEN_AUDIENCE}", *bound).strip()
    checkpoint = CheckpointStatus(step=10, path="checkpoints/step-10", time=dt.datetime(2030, 1, 1, tzinfo=dt.UTC))
    progress = Progress(step=17, total_steps=50, epoch=0.3, percentage=34)
    path = f"/v1/progress/{drill.namespace}/job/1"
    assert post(tls, path, token, ProgressReport(progress=progress, checkpoint=checkpoint)) == 204
    drill.until("job", lambda status: status.get("progress", {}).get("step") == 17)
    drill.ends(pods[1], 1)
    status = drill.until("job", lambda status: status["restarts"] == 1)
    assert status["progress"]["step"] == 10
    assert "starts from the checkpoint of step 10" in condition(status, "Started")["message"]
