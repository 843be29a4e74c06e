"""Give every claim of the storage class `standard` a folder of this machine; run as `volumes.py STATE`.

A real cluster answers a claim by itself, so ours must too: the same manifests then work on both. The program is one
file on the standard library, because `up` copies it into the state and runs it there: a removed clone does not break
the node.
"""

from __future__ import annotations

import http.client
import json
import os
import shutil
import ssl
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

SERVER = ("127.0.0.1", 6443)
CLASS = "standard"
PROVISIONER = "kubetune.io/folders"
CLAIMS = "/api/v1/persistentvolumeclaims"
VOLUMES = "/api/v1/persistentvolumes"
CLASSES = "/apis/storage.k8s.io/v1/storageclasses"
WATCH_SECONDS = 300
RETRY_SECONDS = 1.0

Object = dict[str, Any]


class Server:
    """The API server, as the cluster's administrator."""

    def __init__(self, pki: Path) -> None:
        self.context = ssl.create_default_context(cafile=str(pki / "ca.crt"))
        self.context.load_cert_chain(pki / "admin.crt", pki / "admin.key")

    def open(self, method: str, path: str, body: Object | None = None) -> http.client.HTTPResponse:
        """Send one request and return its answer, unread."""
        connection = http.client.HTTPSConnection(*SERVER, context=self.context, timeout=WATCH_SECONDS + 30)
        connection.request(method, path, json.dumps(body) if body else None, {"Content-Type": "application/json"})
        return connection.getresponse()

    def call(self, method: str, path: str, body: Object | None = None, fine: tuple[int, ...] = ()) -> Object:
        """Send one request and return its object; statuses of 400 and up raise OSError unless they are in `fine`."""
        with self.open(method, path, body) as answer:
            text = answer.read()
            if answer.status >= 400 and answer.status not in fine:
                raise OSError(f"{method} {path}: {answer.status} {text[:300]!r}")
            return dict(json.loads(text))

    def follow(self, path: str) -> Iterator[Object]:
        """Yield every object of a kind as it is now, then each that changes, until the watch ends."""
        listed = self.call("GET", path)
        yield from listed["items"]
        version = listed["metadata"]["resourceVersion"]
        with self.open("GET", f"{path}?watch=1&resourceVersion={version}&timeoutSeconds={WATCH_SECONDS}") as stream:
            for line in stream:
                event = json.loads(line)
                if event["type"] in ("ADDED", "MODIFIED"):
                    yield event["object"]


def storage_class() -> Object:
    """Return the default storage class."""
    return {
        "apiVersion": "storage.k8s.io/v1",
        "kind": "StorageClass",
        "metadata": {"name": CLASS, "annotations": {"storageclass.kubernetes.io/is-default-class": "true"}},
        "provisioner": PROVISIONER,
        "reclaimPolicy": "Delete",
        "volumeBindingMode": "Immediate",
    }


def wants_volume(claim: Object) -> bool:
    """Say whether a claim waits for us."""
    spec, metadata = claim["spec"], claim["metadata"]
    return (
        spec.get("storageClassName") == CLASS
        and not spec.get("volumeName")
        and claim["status"].get("phase") == "Pending"
        and "deletionTimestamp" not in metadata
    )


def volume_for(claim: Object, folder: Path) -> Object:
    """Return the volume that binds a claim to a folder, with the size and the access modes that were asked for."""
    metadata, spec = claim["metadata"], claim["spec"]
    on_node = {"matchExpressions": [{"key": "kubernetes.io/os", "operator": "In", "values": ["linux"]}]}
    reference = {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "uid": metadata["uid"]}
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolume",
        "metadata": {
            "name": f"pvc-{metadata['uid']}",
            "annotations": {"pv.kubernetes.io/provisioned-by": PROVISIONER},
        },
        "spec": {
            "storageClassName": CLASS,
            "capacity": spec["resources"]["requests"],
            "accessModes": spec["accessModes"],
            "persistentVolumeReclaimPolicy": "Delete",
            "claimRef": {**reference, "namespace": metadata["namespace"], "name": metadata["name"]},
            "local": {"path": str(folder)},
            "nodeAffinity": {"required": {"nodeSelectorTerms": [on_node]}},
        },
    }


def provision(server: Server, root: Path, claim: Object) -> None:
    """Make the folder and the volume of a waiting claim; both may be there from a try that was cut off."""
    if not wants_volume(claim):
        return
    metadata = claim["metadata"]
    folder = root / f"{metadata['namespace']}-{metadata['name']}-{metadata['uid'][:8]}"
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o777)  # containers run as any user
    server.call("POST", VOLUMES, volume_for(claim, folder), fine=(409,))
    print(f"provisioned {folder}", flush=True)


def release(server: Server, root: Path, volume: Object) -> None:
    """Remove the folder and the volume of a claim that was deleted."""
    metadata = volume["metadata"]
    ours = metadata.get("annotations", {}).get("pv.kubernetes.io/provisioned-by") == PROVISIONER
    if not ours or volume["status"].get("phase") != "Released":
        return
    folder = Path(volume["spec"]["local"]["path"])
    if folder.parent == root:
        shutil.rmtree(folder, ignore_errors=True)
    server.call("DELETE", f"{VOLUMES}/{metadata['name']}", fine=(404,))
    print(f"released {folder}", flush=True)


def keep_up(server: Server, path: str, handle: Callable[[Object], None]) -> None:
    """Handle every object of a kind for ever; after an error list afresh, which also repeats what failed."""
    while True:
        try:
            for thing in server.follow(path):
                handle(thing)
        except (OSError, http.client.HTTPException, ValueError, KeyError) as error:
            print(f"{path}: {error!r}; again in {RETRY_SECONDS} s", file=sys.stderr, flush=True)
            time.sleep(RETRY_SECONDS)


def main(state: Path) -> None:
    """Create the class, say that we are ready, and serve claims."""
    server, root = Server(state / "pki"), state / "volumes"
    server.call("POST", CLASSES, storage_class(), fine=(409,))
    threading.Thread(target=keep_up, args=(server, VOLUMES, lambda it: release(server, root, it)), daemon=True).start()
    (state / "run" / "volumes.ready").write_text(str(os.getpid()))
    keep_up(server, CLAIMS, lambda it: provision(server, root, it))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
