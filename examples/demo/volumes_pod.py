"""A small pod that holds the demo's volumes, so that files get onto them and off them on any cluster."""

import hashlib
from pathlib import Path

from kube import Kube, Object

POD = "demo-files"
MODELS = "/models"
OUTPUT = "/output"
READY_SECONDS = 1200
"""The image has 5 GB; the first pull takes minutes on a slow line."""
USER = 65532
"""The user of the worker pods, so that they may read and write what this pod puts there."""

# Whole or not at all: the content goes to a folder of its own, then takes the name; the digest is written last.
PUT = """set -e
rm -rf "$1.new" "$1.digest"
mkdir -p "$1.new"
tar -x -C "$1.new"
rm -rf "$1"
mv "$1.new" "$1"
echo "$2" > "$1.digest"
"""


class VolumesPod:
    """The pod in its namespace. It stays, so that a person can look at the volumes."""

    def __init__(self, kube: Kube, namespace: str, image: str) -> None:
        self.kube = kube
        self.namespace = namespace
        self.image = image

    def ensure(self) -> str:
        """See to it that the pod runs; wait until it is ready."""
        found = self.kube.get("pod", POD, self.namespace)
        if found and found["spec"]["containers"][0]["image"] == self.image and is_ready(found):
            return "already there"
        self.kube.kubectl("delete", "pod", POD, "--namespace", self.namespace, "--ignore-not-found")
        self.kube.apply(manifest(self.namespace, self.image))
        timeout = f"--timeout={READY_SECONDS}s"
        self.kube.kubectl("wait", "--namespace", self.namespace, "--for=condition=Ready", f"pod/{POD}", timeout)
        return "ready"

    def put(self, folder: Path, name: str) -> str:
        """Copy a folder's content to the models volume as `name`, unless it is there already."""
        digest = digest_of(folder)
        if self.shell(f"cat {MODELS}/{name}.digest 2>/dev/null || true").strip() == digest:
            return "already there"
        self.kube.send(POD, self.namespace, PUT, folder, f"{MODELS}/{name}", digest)
        return "copied"

    def get(self, names: list[str], folder: Path) -> None:
        """Copy files and folders of the output volume to a local folder."""
        self.kube.fetch(POD, self.namespace, OUTPUT, names, folder)

    def shell(self, script: str) -> str:
        """Run a shell script in the pod and return what it printed."""
        return self.kube.kubectl("exec", "--namespace", self.namespace, POD, "--", "sh", "-c", script)


def is_ready(pod: Object) -> bool:
    """Whether the pod takes commands."""
    conditions = pod["status"].get("conditions", [])
    ready = any(one["type"] == "Ready" and one["status"] == "True" for one in conditions)
    return ready and "deletionTimestamp" not in pod["metadata"]


def digest_of(folder: Path) -> str:
    """A digest of the names and contents of a folder's files."""
    total = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        with path.open("rb") as file:
            total.update(f"{path.name}\0".encode() + hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


def manifest(namespace: str, image: str) -> Object:
    """The pod."""
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": POD, "namespace": namespace},
        "spec": {
            "terminationGracePeriodSeconds": 1,
            "automountServiceAccountToken": False,
            "securityContext": {
                "runAsNonRoot": True,
                "runAsUser": USER,
                "runAsGroup": USER,
                "fsGroup": USER,
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            "containers": [
                {
                    "name": "files",
                    "image": image,
                    "command": ["sleep", "infinity"],
                    "volumeMounts": [
                        {"name": "models", "mountPath": MODELS},
                        {"name": "output", "mountPath": OUTPUT, "readOnly": True},
                    ],
                    "resources": {"requests": {"cpu": "10m", "memory": "32Mi"}},
                    "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
                }
            ],
            "volumes": [{"name": name, "persistentVolumeClaim": {"claimName": name}} for name in ("models", "output")],
        },
    }
