"""kubectl and helm on the demo's cluster: the embedded one, or the one that KUBE_CONTEXT names."""

import json
import os
import select
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path
from subprocess import DEVNULL, PIPE
from typing import IO, Any

from cluster_tool import ClusterError, Layout, run, which

from kubetune_kubectl.kubectl import Documents

Object = dict[str, Any]
Event = tuple[str, Object]
"""What a watch tells: ADDED, MODIFIED or DELETED, and the object."""

TICK_SECONDS = 1.0
ABSENT = ("(NotFound)", "doesn't have a resource type")


class Kube:
    """One cluster, as the owner of its kubeconfig."""

    def __init__(self, layout: Layout) -> None:
        self.external = os.environ.get("KUBE_CONTEXT")
        self.config = layout.external_kubeconfig if self.external else layout.admin_kubeconfig
        if not self.config.is_file():
            raise ClusterError(f"{self.config} is missing: use `make demo`, which brings the cluster up first")
        self.kubectl_program = find_program(layout, "kubectl")
        self.helm_program = find_program(layout, "helm")

    def kubectl(self, *argv: str | Path, stdin: str | None = None) -> str:
        """Run kubectl and return what it printed. Raises ClusterError with its words."""
        return run([*self.words(), *argv], stdin=stdin).stdout

    def words(self) -> list[str]:
        """The start of every kubectl command line."""
        return [self.kubectl_program, "--kubeconfig", str(self.config)]

    def helm(self, *argv: str | Path) -> str:
        """Run helm and return what it printed. Raises ClusterError with its words."""
        return run([self.helm_program, "--kubeconfig", self.config, *argv]).stdout

    def apply(self, *objects: Object) -> None:
        """Create the objects, or change them to what is given."""
        everything = {"apiVersion": "v1", "kind": "List", "items": objects}
        self.kubectl("apply", "--filename", "-", stdin=json.dumps(everything))

    def get(self, kind: str, name: str, namespace: str) -> Object | None:
        """An object; None where it, or its whole kind, is not there."""
        words = [*self.words(), "get", kind, name, "--namespace", namespace, "--output", "json"]
        answer = run(words, check=False)
        if answer.returncode == 0:
            return dict(json.loads(answer.stdout))
        if any(word in answer.stderr for word in ABSENT):
            return None
        raise ClusterError(f"kubectl get {kind} {name}: {answer.stderr.strip()}")

    def watch(self, kind: str, name: str, namespace: str) -> Iterator[Event | None]:
        """What happens to an object, from its present state on; None when a second passed without news.

        Ends when the server ends the watch. Raises ClusterError when it could not be followed.
        """
        # By a selector: of one named object kubectl drops what happens between its read and its watch.
        words = [*self.words(), "get", kind, f"--field-selector=metadata.name={name}", "--namespace", namespace]
        words += ["--watch", "--output-watch-events", "--output", "json"]
        with subprocess.Popen(words, stdout=PIPE, stderr=PIPE) as process:
            try:
                assert process.stdout is not None
                assert process.stderr is not None
                yield from events(process.stdout)
                if process.wait() != 0:
                    raise ClusterError(process.stderr.read().decode(errors="replace").strip())
            finally:
                process.terminate()

    def send(self, pod: str, namespace: str, script: str, folder: Path, *arguments: str) -> None:
        """Run a shell script in a pod; its standard input is a tar of the folder's content."""
        words = [*self.words(), "exec", "--stdin", "--namespace", namespace, pod, "--", "sh", "-c", script, "sh"]
        words += arguments
        with subprocess.Popen(words, stdin=PIPE, stdout=DEVNULL, stderr=PIPE) as process:
            assert process.stdin is not None
            assert process.stderr is not None
            broken = write_tar(process.stdin, folder)
            told = process.stderr.read().decode(errors="replace").strip()
            if process.wait() != 0 or broken:
                raise ClusterError(f"{folder.name} could not be copied to pod {pod}: {told}")

    def fetch(self, pod: str, namespace: str, source: str, names: list[str], folder: Path) -> None:
        """Copy files and folders below `source` in a pod to a local folder."""
        words = [*self.words(), "exec", "--namespace", namespace, pod, "--", "tar", "-c", "-C", source, *names]
        with subprocess.Popen(words, stdout=PIPE) as process:
            assert process.stdout is not None
            with tarfile.open(fileobj=process.stdout, mode="r|") as archive:
                archive.extractall(folder, filter="data")
            process.stdout.read()  # the padding at the end: tar would be told that nobody reads it
        if process.returncode != 0:
            raise ClusterError(f"{source} in pod {pod} could not be copied: tar ended with {process.returncode}")


def find_program(layout: Layout, name: str) -> str:
    """The cluster's own program, else the one on PATH."""
    own = layout.bin / name
    found = str(own) if own.exists() else which(name)
    if not found:
        raise ClusterError(f"{name} is neither in {layout.bin} nor on PATH: install it, or use the embedded cluster")
    return found


def write_tar(pipe: IO[bytes], folder: Path) -> bool:
    """Write a folder's content to a pipe as tar and close it; says whether the reader went away."""
    try:
        with tarfile.open(fileobj=pipe, mode="w|") as archive:
            for path in sorted(folder.iterdir()):
                archive.add(path.resolve(), arcname=path.name)
        pipe.close()
    except BrokenPipeError:
        return True
    return False


def events(pipe: IO[bytes]) -> Iterator[Event | None]:
    """The events in kubectl's output until it ends; None when a second passed without any."""
    documents = Documents()
    while True:
        if not select.select([pipe], [], [], TICK_SECONDS)[0]:
            yield None
            continue
        chunk = os.read(pipe.fileno(), 65536)
        if not chunk:
            return
        for document in documents.feed(chunk):
            yield document["type"], document["object"]
