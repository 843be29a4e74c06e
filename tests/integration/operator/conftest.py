"""The operator as a process of its own against a real API server.

Its pods never reach a node: their claims do not exist, so the scheduler leaves them alone and the tests write the
status that a kubelet would write. Everything else is real: the Job controller, evictions, the collector, tokens.
"""

import datetime as dt
import http.client
import json
import os
import signal
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
from kube import Kube, events
from tests.integration.operator.server import Account, Proxy, free_port

from kubetune_contract.progress import ProgressReport, Result, TerminationMessage
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


class Operator:
    """`python -m kubetune_operator` for one namespace."""

    def __init__(self, kubeconfig: Path, namespace: str, folder: Path, **settings: str) -> None:
        self.port = free_port()
        self.log = folder / "operator.log"
        chosen = {
            "namespace": namespace,
            "pod_name": namespace,  # a restarted one leads at once
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
        self.environment = {**kept, **variables, "KUBECONFIG": str(kubeconfig)}
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it and wait until its caches are complete."""
        self.launch()
        assert self.process is not None
        deadline = time.monotonic() + SECONDS
        while not self.answers("/readyz"):
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.1)

    def launch(self) -> None:
        """Start it."""
        with self.log.open("ab") as log:
            command = [sys.executable, "-m", "kubetune_operator"]
            self.process = subprocess.Popen(command, env=self.environment, stderr=log)

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

    def leads(self) -> bool:
        """Whether it says that it leads. One that does not answer does not."""
        try:
            return self.metric("kubetune_leader ") == 1
        except (OSError, http.client.HTTPException):
            return False

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

    done = DONE
    """The last word of a worker that did its work."""
    every = "--selector="
    """The selector of everything."""

    def __init__(
        self,
        kube: Kube,
        namespace: str,
        operator: Operator,
        manifest: Callable[..., Object],
        proxy: Proxy | None = None,
    ) -> None:
        self.kube = kube
        self.proxy = proxy
        self.namespace = namespace
        self.operator = operator
        self.manifest = manifest

    def replica(self, folder: Path, **settings: str) -> Operator:
        """Another replica of the operator, which is not started."""
        return Operator(self.kube.config, self.namespace, folder, **settings)

    def kubectl(self, *words: str, stdin: Object | None = None) -> str:
        text = None if stdin is None else json.dumps(stdin)
        return self.kube.kubectl(*words, "--namespace", self.namespace, stdin=text)

    def submit(self, name: str = "job", **spec: Any) -> None:
        spec = {"preset": "llama3/8B_lora", "workers": {"nodes": 2}, **spec}
        manifest = self.manifest(name, **spec)
        manifest["metadata"]["labels"] = {OPERATOR_LABEL: self.namespace}
        self.kubectl("apply", "-f", "-", stdin=manifest)

    def watch(
        self, kind: str, selector: str, reached: Callable[[dict[str, Object]], bool], seconds: float = SECONDS
    ) -> dict[str, Object]:
        """Watch objects until the set of them, by name, is as it should be.

        Always by a selector: of one named object kubectl drops what happens between its read and its watch.
        """
        found: dict[str, Object] = {}
        deadline = time.monotonic() + seconds
        words = [*self.kube.words(), "get", kind, selector, "--namespace", self.namespace]
        words += ["--watch", "--output-watch-events", "--output", "json"]
        with subprocess.Popen(words, stdout=subprocess.PIPE) as process:
            try:
                for event in events(process.stdout):
                    if event is not None:
                        self._take(found, *event)
                    if reached(found):
                        return found
                    assert time.monotonic() < deadline, f"{kind} did not get there: {json.dumps(found)[-4000:]}"
            finally:
                process.terminate()
        raise AssertionError(f"the watch of {kind} ended")

    def _take(self, found: dict[str, Object], kind: str, item: Object) -> None:
        found.pop(item["metadata"]["name"], None)
        if kind != "DELETED":
            found[item["metadata"]["name"]] = item

    def until(self, name: str, reached: Callable[[Object], bool], seconds: float = SECONDS) -> Object:
        """Watch a FineTuneJob until its status is as it should be."""
        holds = lambda found: name in found and reached(found[name].get("status", {}))  # noqa: E731
        return self.watch("finetunejobs", self.named(name), reached=holds, seconds=seconds)[name]["status"]

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

    @staticmethod
    def named(name: str) -> str:
        """The selector of one object."""
        return f"--field-selector=metadata.name={name}"

    @staticmethod
    def condition(status: Object, kind: str) -> Object:
        """A condition of a FineTuneJob; empty if it has none of that type."""
        found: Object = next((item for item in status.get("conditions", []) if item["type"] == kind), {})
        return found

    def children(self, name: str = "job") -> list[str]:
        kinds = "jobs,pods,services,configmaps"
        return self.kubectl("get", kinds, "-l", f"kubetune.io/job={name}", "-o", "name").split()


def _now() -> str:
    return dt.datetime.now(dt.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


@pytest.fixture
def tls(tmp_path: Path) -> dict[str, str]:
    """Settings of a progress endpoint on this machine, with a certificate of its own."""
    return tls_settings(tmp_path)


def tls_settings(folder: Path) -> dict[str, str]:
    """The same, of a certificate that is made in the folder."""
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
    (folder / "tls.crt").write_bytes(certificate.public_bytes(pem))
    (folder / "tls.key").write_bytes(private)
    port = free_port()
    return {
        "progress_port": str(port),
        "progress_url": f"https://localhost:{port}",
        "ca_file": str(folder / "tls.crt"),
        "tls_cert_file": str(folder / "tls.crt"),
        "tls_key_file": str(folder / "tls.key"),
    }


@pytest.fixture
def post() -> Callable[..., int]:
    """post(tls, path, token, report): report as a trainer does; the answer's code."""

    def send(tls: dict[str, str], path: str, token: str, report: ProgressReport) -> int:
        request = urllib.request.Request(f"{tls['progress_url']}{path}", data=report.to_json().encode(), method="POST")
        request.add_header("Authorization", f"Bearer {token}")
        context = ssl.create_default_context(cafile=tls["ca_file"])
        try:
            with urllib.request.urlopen(request, timeout=10, context=context) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            error.close()
            return error.code

    return send


@pytest.fixture
def drill(kube: Kube, crd: str, manifest: Callable[..., Object], tmp_path: Path) -> Iterator[Callable[..., Drill]]:
    """drill(**settings): a running operator in a namespace of the test's own, before it a proxy if `proxied`.

    `login` gets the namespace and returns the kubeconfig of the account under which the operator runs.
    """
    made: list[Drill] = []

    def make(proxied: bool = False, login: Callable[[str], Path] | None = None, **settings: str) -> Drill:
        namespace = f"kubetune-it-{uuid.uuid4().hex[:8]}"
        kube.kubectl("create", "namespace", namespace)
        proxy = Proxy(Account.of(kube.config), tmp_path) if proxied else None
        config = proxy.start() if proxy is not None else login(namespace) if login is not None else kube.config
        made.append(Drill(kube, namespace, Operator(config, namespace, tmp_path, **settings), manifest, proxy))
        made[-1].operator.start()
        return made[-1]

    yield make
    for drill in made:
        kube.kubectl("delete", "finetunejobs", "--all", "--namespace", drill.namespace, "--wait=false")
        if drill.operator.process is not None:
            drill.operator.stop(signal.SIGKILL)
        if drill.proxy is not None:
            drill.proxy.stop()
        kube.kubectl("delete", "namespace", drill.namespace, "--wait=false")
        assert drill.operator.errors() == []
