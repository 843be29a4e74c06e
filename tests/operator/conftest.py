"""Builders that the operator's tests share. Each makes a small, valid object; a test names only what it is about."""

import ipaddress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from kubetune_operator import api, build, names, stagers
from kubetune_operator.contents import Content, contents
from kubetune_operator.settings import Settings

Object = dict[str, Any]


def _merge(base: Object, changes: Object) -> Object:
    """`changes` laid over `base` key by key; None takes a key away."""
    merged = dict(base)
    for key, value in changes.items():
        below = merged.get(key)
        merged[key] = _merge(below, value) if isinstance(value, dict) and isinstance(below, dict) else value
    return {key: value for key, value in merged.items() if value is not None}


@pytest.fixture
def now() -> datetime:
    """A fixed present."""
    return datetime(2030, 1, 1, 12, 0, tzinfo=UTC)


@pytest.fixture
def settings() -> Settings:
    """Settings as the chart makes them."""
    return Settings(
        trainer_image="registry.example/trainer:1",
        namespace="kubetune",
        progress_url="https://kubetune-progress.kubetune.svc:8443",
        ca_file=Path("/tls/ca.crt"),
        tls_cert_file=Path("/tls/tls.crt"),
        tls_key_file=Path("/tls/tls.key"),
    )


@pytest.fixture
def spec():
    """spec(training={"epochs": 3}): a small LoRA spec with the changes laid over it; None removes a key."""

    def make(**changes: Any) -> Object:
        small: Object = {
            "preset": "llama3/8B_lora",
            "model": {"volumePath": "models/llama"},
            "dataset": {"volumePath": "data/train.jsonl"},
            "workers": {"nodes": 2},
            "storage": {"models": {"claimName": "models"}, "output": {"claimName": "tuned"}},
        }
        return _merge(small, changes)

    return make


@pytest.fixture
def body(spec):
    """body(name, status=..., metadata=..., **spec changes): a FineTuneJob as the API server gives it."""

    def make(name: str = "bot", status: Object | None = None, metadata: Object | None = None, **changes: Any) -> Object:
        return {
            "apiVersion": api.API_VERSION,
            "kind": api.KIND,
            "metadata": {
                "name": name,
                "namespace": "team",
                "uid": "0a1b2c3d-0000-4000-8000-000000000001",
                "generation": 1,
                "resourceVersion": "7",
                **(metadata or {}),
            },
            "spec": spec(**changes),
            **({"status": status} if status else {}),
        }

    return make


@pytest.fixture
def job(body):
    """job(name, status=..., metadata=..., **spec changes): the typed FineTuneJob."""

    def make(*arguments: Any, **changes: Any) -> api.FineTuneJob:
        return api.parse(body(*arguments, **changes))

    return make


@pytest.fixture
def condition():
    """condition("Failed", reason=..., message=...): a condition of a Job or a Pod, in wire form."""

    def make(kind: str, status: str = "True", reason: str = "", message: str = "", **more: Any) -> Object:
        return {"type": kind, "status": status, "reason": reason, "message": message, **more}

    return make


@pytest.fixture
def attempt_job(settings):
    """attempt_job(job, attempt, conditions, **status): the worker Job of an attempt as observed."""

    def make(job: api.FineTuneJob, attempt: int = 1, conditions: tuple[Object, ...] = (), **status: Any) -> Object:
        manifest = build.worker_job(job, attempt, settings)
        manifest["metadata"] |= {"uid": f"job-uid-{attempt}", "creationTimestamp": "2030-01-01T11:00:00Z"}
        return {**manifest, "status": {"conditions": list(conditions), **status}}

    return make


@pytest.fixture
def stage_job(settings):
    """stage_job(job, conditions, content, **status): the staging Job of the model, or of that content."""

    def make(
        job: api.FineTuneJob, conditions: tuple[Object, ...] = (), content: Content | None = None, **status: Any
    ) -> Object:
        manifest = stagers.stage_job(job, content or contents(job.spec)[0], settings)
        manifest["metadata"] |= {"uid": "stage-uid", "creationTimestamp": "2030-01-01T11:00:00Z"}
        return {**manifest, "status": {"conditions": list(conditions), **status}}

    return make


@pytest.fixture
def terminated():
    """terminated(65, message=...): the state of a container that has ended."""

    def make(exit_code: int, reason: str | None = None, message: str = "") -> Object:
        why = reason or ("Completed" if exit_code == 0 else "Error")
        return {"terminated": {"exitCode": exit_code, "reason": why, "message": message}}

    return make


@pytest.fixture
def waiting():
    """waiting("ErrImagePull", message): the state of a container that cannot start."""

    def make(reason: str, message: str = "") -> Object:
        return {"waiting": {"reason": reason, "message": message}}

    return make


@pytest.fixture
def pod():
    """pod(owner Job, index, phase, state=..., conditions=..., ready=...): one of the Job's pods as observed."""

    def make(
        owner: Object,
        index: int = 0,
        phase: str = "Running",
        state: Object | None = None,
        conditions: tuple[Object, ...] = (),
        ready: bool = False,
        **metadata: Any,
    ) -> Object:
        name = owner["metadata"]["name"]
        template = owner["spec"]["template"]
        labels = {**template["metadata"]["labels"], "batch.kubernetes.io/job-name": name}
        if owner["spec"].get("completionMode") == "Indexed":
            labels["batch.kubernetes.io/job-completion-index"] = str(index)
        ready_condition = {"type": "Ready", "status": "True" if ready else "False"}
        container = {"name": names.CONTAINER, "state": state or {"running": {}}, "ready": ready, "restartCount": 0}
        return {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {
                "name": f"{name}-{index}-x{index}",
                "namespace": owner["metadata"]["namespace"],
                "uid": f"{name}-{index}-uid",
                "labels": labels,
                "ownerReferences": [
                    {
                        "apiVersion": "batch/v1",
                        "kind": "Job",
                        "name": name,
                        "uid": owner["metadata"]["uid"],
                        "controller": True,
                    }
                ],
                **metadata,
            },
            "spec": template["spec"],
            "status": {
                "phase": phase,
                "conditions": [*conditions, ready_condition],
                "containerStatuses": [container],
            },
        }

    return make


@pytest.fixture
def worker(pod, attempt_job, job):
    """worker(index, phase, ...): a pod of the first attempt."""
    return lambda *arguments, **more: pod(attempt_job(job()), *arguments, **more)


@pytest.fixture
def certificate():
    """certificate(folder, name, serial): a self-signed certificate, also for 127.0.0.1, and its key, in two files."""

    def make(folder: Path, name: str = "localhost", serial: int = 1) -> tuple[Path, Path]:
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        start, own = datetime.now(UTC), ipaddress.ip_address("127.0.0.1")
        made = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(subject)
            .public_key(key.public_key())
            .serial_number(serial)
            .not_valid_before(start - timedelta(minutes=1))
            .not_valid_after(start + timedelta(hours=1))
            .add_extension(x509.SubjectAlternativeName([x509.DNSName(name), x509.IPAddress(own)]), critical=False)
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .sign(key, hashes.SHA256())
        )
        pem = serialization.Encoding.PEM
        (folder / "tls.crt").write_bytes(made.public_bytes(pem))
        private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        (folder / "tls.key").write_bytes(private)
        return folder / "tls.crt", folder / "tls.key"

    return make
