"""A short-lived pod that mounts a job's output claim read-only, so that files get from there to here.

The pod fulfils Pod Security's `restricted`, holds no token, and is removed in every case: by the command that made it,
also when it is interrupted; by its own deadline, which frees its node, where that command was killed; and with the job.
"""

import json
import select
import shutil
import signal
import tarfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import IO, Final, NamedTuple

from kubetune_contract.paths import OUTPUT_MOUNT
from kubetune_kubectl.errors import NothingThere, Unreachable
from kubetune_kubectl.jobs import Job
from kubetune_kubectl.kubectl import FIELD_MANAGER, Kubectl, Object
from kubetune_operator.api import API_VERSION, KIND
from kubetune_operator.diagnosis import condition
from kubetune_operator.names import CONTAINER as WORKER_CONTAINER
from kubetune_operator.names import OUTPUT_VOLUME

CONTAINER: Final = "report"
LIFE_SECONDS: Final = 900
"""After so long the pod ends by itself, whatever became of us."""
LABELS: Final = {"app.kubernetes.io/name": "kubetune-report", "app.kubernetes.io/managed-by": FIELD_MANAGER}
RESOURCES: Final = {
    "requests": {"cpu": "10m", "memory": "64Mi"},
    "limits": {"cpu": "1", "memory": "256Mi"},
}
"""A quota may demand both."""

# Run in the pod: a tar of the wanted files that are there. No shell and no tar program is needed in the image.
_SEND: Final = """
import os, sys, tarfile
try:
    os.chdir(sys.argv[1])
except FileNotFoundError:
    sys.exit(f"no such folder: {sys.argv[1]}")
with tarfile.open(fileobj=sys.stdout.buffer, mode="w|") as archive:
    for name in sys.argv[2:]:
        if os.path.isfile(name) and not os.path.islink(name):
            archive.add(name)
"""
_WAIT: Final = f"import time; time.sleep({LIFE_SECONDS})"


class Image(NamedTuple):
    """What the pod takes over from the job's workers, so that it may and can run where they did."""

    image: str
    pull_policy: str | None
    pull_secrets: list[Object]
    tolerations: list[Object]
    security: Object
    node: str | None
    """Where rank 0 ran: the image is there, and a volume that one node only may mount."""

    @classmethod
    def of(cls, pod_spec: Object, node: str | None) -> "Image":
        """From the spec of a worker pod."""
        container = next(one for one in pod_spec["containers"] if one["name"] == WORKER_CONTAINER)
        return cls(
            image=container["image"],
            pull_policy=container.get("imagePullPolicy"),
            pull_secrets=pod_spec.get("imagePullSecrets") or [],
            tolerations=pod_spec.get("tolerations") or [],
            security=pod_spec.get("securityContext") or {},
            node=node,
        )


def reader_pod(job: Job, worker: Image, suffix: str) -> Object:
    """The pod's manifest."""
    claim = job.spec["storage"]["output"]["claimName"]
    spec: Object = {
        "restartPolicy": "Never",
        "activeDeadlineSeconds": LIFE_SECONDS,
        "terminationGracePeriodSeconds": 1,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": {
            **deepcopy(worker.security),
            "runAsNonRoot": True,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [_container(worker)],
        # Read-only is the mount, not the claim: many drivers refuse to attach a volume for reading that is attached
        # for writing, and a running job's is.
        "volumes": [{"name": OUTPUT_VOLUME, "persistentVolumeClaim": {"claimName": claim}}],
    }
    if worker.pull_secrets:
        spec["imagePullSecrets"] = worker.pull_secrets
    if worker.tolerations:
        spec["tolerations"] = worker.tolerations
    if worker.node is not None:
        field = {"key": "metadata.name", "operator": "In", "values": [worker.node]}
        preferred = {"weight": 100, "preference": {"matchFields": [field]}}
        spec["affinity"] = {"nodeAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": [preferred]}}
    owner = {"apiVersion": API_VERSION, "kind": KIND, "name": job.name, "uid": job.uid}
    metadata = {
        "name": f"{job.name}-report-{suffix}",
        "namespace": job.namespace,
        "labels": LABELS,
        "ownerReferences": [owner],
    }
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}


def _container(worker: Image) -> Object:
    container: Object = {
        "name": CONTAINER,
        "image": worker.image,
        "command": ["python", "-c", _WAIT],
        "resources": RESOURCES,
        "volumeMounts": [{"name": OUTPUT_VOLUME, "mountPath": OUTPUT_MOUNT, "readOnly": True}],
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
    }
    if worker.pull_policy is not None:
        container["imagePullPolicy"] = worker.pull_policy
    return container


class Reader:
    """The running pod."""

    def __init__(self, kubectl: Kubectl, pod: str) -> None:
        self._kubectl = kubectl
        self._pod = pod

    def fetch(self, folder: str, names: tuple[str, ...], target: Path) -> list[Path]:
        """Copy those of the files that are in the folder of the volume to a local folder; returns where they are."""
        words = ["exec", self._pod, f"--container={CONTAINER}", "--", "python", "-c", _SEND]
        process = self._kubectl.stream(*words, f"{OUTPUT_MOUNT}/{folder}", *names)
        try:
            found = _unpack(process.stdout, set(names), target)
            process.stdout.read()  # the padding at the end: the sender would be told that nobody reads it
        except tarfile.TarError as error:
            process.end()  # says why, if kubectl knows
            raise Unreachable(f"the copy of {folder} broke off ({error}): run it again") from error
        finally:
            process.close()
        return found


def _unpack(pipe: IO[bytes], names: set[str], target: Path) -> list[Path]:
    """Write the files of a tar, each whole or not at all. Whatever else is in it is passed over."""
    found = []
    target.mkdir(parents=True, exist_ok=True)
    with tarfile.open(fileobj=pipe, mode="r|") as archive:
        for member in archive:
            content = archive.extractfile(member) if member.isreg() and member.name in names else None
            if content is None:
                continue
            scratch = target / f".{member.name}.part"
            try:
                with scratch.open("wb") as file:
                    shutil.copyfileobj(content, file)
                found.append(scratch.replace(target / member.name))
            finally:
                scratch.unlink(missing_ok=True)
    return found


@contextmanager
def reader(kubectl: Kubectl, job: Job, worker: Image, timeout: float, say: Callable[[str], None]) -> Iterator[Reader]:
    """The pod from its creation to its end; `say` takes a line on what it waits for. `timeout` is in seconds.

    Raises NoRights, or NothingThere when the pod does not start in time.
    """
    manifest = reader_pod(job, worker, uuid.uuid4().hex[:5])
    name = manifest["metadata"]["name"]
    try:
        _create(kubectl, manifest)
        _until_running(kubectl, name, timeout, say)
        yield Reader(kubectl, name)
    finally:
        _remove(kubectl, name)


def _create(kubectl: Kubectl, manifest: Object) -> None:
    kubectl.change("create", "--filename=-", stdin=json.dumps(manifest))


def _remove(kubectl: Kubectl, name: str) -> None:
    """Delete the pod. A second Ctrl-C does not keep it alive: this takes a tenth of a second."""
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.signal(number, signal.SIG_IGN) for number in signals]  # kubectl inherits that they are ignored
    try:
        kubectl.run("delete", "pod", name, "--ignore-not-found", "--wait=false")
    finally:
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, handler)


def _until_running(kubectl: Kubectl, name: str, timeout: float, say: Callable[[str], None]) -> None:
    deadline, told = time.monotonic() + timeout, ""
    for pod in _sights(kubectl, name, deadline):
        if condition(pod, "Ready") is not None:
            return
        if pod.get("status", {}).get("phase") in ("Succeeded", "Failed"):
            raise NothingThere(f"the report pod ended early: {pod['status'].get('message') or waits_for(pod)}")
        if waits_for(pod) not in ("", told):
            told = waits_for(pod)
            say(f"The report pod waits: {told}")
    raise NothingThere(f"the report pod did not start in {timeout:.0f} s ({told or 'it is not scheduled'}): --timeout")


def _sights(kubectl: Kubectl, name: str, deadline: float) -> Iterator[Object]:
    """The pod at each of its changes, until the deadline."""
    while time.monotonic() < deadline:
        watch = kubectl.watch("pods", f"--field-selector=metadata.name={name}")
        try:
            while (left := deadline - time.monotonic()) > 0 and select.select([watch], [], [], left)[0]:
                events = watch.read()
                if events is None:
                    break
                yield from (event.object for event in events)
        finally:
            watch.close()


def waits_for(pod: Object) -> str:
    """What keeps the pod from starting, in the words of who keeps it; empty where nothing does."""
    status = pod.get("status", {})
    for item in status.get("conditions") or []:
        if item["type"] == "PodScheduled" and item["status"] == "False":
            return str(item.get("message") or item.get("reason"))
    for container in status.get("containerStatuses") or []:
        waiting = container.get("state", {}).get("waiting") or {}
        if waiting.get("message"):
            return f"{waiting.get('reason')}: {waiting['message']}"
    return ""
