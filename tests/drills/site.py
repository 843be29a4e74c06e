"""What the drills need on the cluster: operators, namespaces, volumes with models and data, a model hub."""

import json
import sys
import threading
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import run as demo
import yaml
from cluster_tool import REPOSITORY, Layout, Plan, run
from kube import Kube
from tests.drills.drill import MAIN, OPERATOR, Drill, Object
from tests.drills.watch import Watch
from volumes_pod import POD, USER, VolumesPod

from kubetune_operator.names import ROLE_LABEL

TOOL = (sys.executable, REPOSITORY / "tests" / "cluster" / "cluster.py")
HUB_PORT = 8000
NODE_PORT = 30808
"""The hub's port on the node: the kubelet asks it for an image."""
WEIGHTS = "model.safetensors"
"""The file of the hub's model whose download is disturbed."""
RESOURCE = "drills.kubetune.io"
"""Domain of the resources that the node offers to single drills."""
SETTINGS = {
    "restartBackoffSeconds": "2",
    "lostNodeGraceSeconds": "10",
    "volumeGraceSeconds": "5",
    "progressWriteSeconds": "2",
}
"""What differs from an operator as it is installed: shorter waits, so that drills are short."""
OPERATORS: Mapping[str, Mapping[str, str]] = {
    MAIN: {"settings.allowHostNetwork": "true"},
    "missing-image": {"trainerImage.tag": "never-built"},
    "denied-image": {
        "trainerImage.repository": f"127.0.0.1:{NODE_PORT}/private/trainer",
        "trainerImage.pullSecrets[0]": "nowhere",
    },
}
"""Name -> values of a release of the chart, for what an administrator decides."""
RESTRICTED = {"pod-security.kubernetes.io/enforce": "restricted"}
UNMET: Object = {"kind": "ResourceQuota", "spec": {"hard": {"pods": "0"}}}
SMALL: Object = {"kind": "LimitRange", "spec": {"limits": [{"type": "Container", "max": {"memory": "64Mi"}}]}}
PLACES: Mapping[str, tuple[Object, ...]] = {MAIN: (), "no-quota": (UNMET,), "small-limits": (SMALL,)}
"""Namespace -> what governs it."""


class Site:
    """The drills' part of the cluster. All names begin with `prefix`."""

    def __init__(self, kube: Kube, layout: Layout, prefix: str = "drill") -> None:
        self.kube = kube
        self.prefix = prefix
        self.images = demo.read_images(layout)
        self.files = VolumesPod(kube, self.namespace(MAIN), self.images["trainer"])
        self._models = threading.Lock()
        self._node = ""

    # ------------------------------------------------------------ names

    def namespace(self, place: str) -> str:
        """A namespace of the drills."""
        return f"{self.prefix}-{place}"

    def operator(self, name: str) -> str:
        """The name under which an operator handles jobs."""
        return f"{self.prefix}-{name}"

    def release(self, name: str) -> str:
        """The release of an operator."""
        return f"{self.prefix}-kubetune-{name}"

    @property
    def system(self) -> str:
        """Namespace of the operators."""
        return self.namespace("system")

    def spec(self, drill: Drill) -> Object:
        """The spec of a drill's job: the small job that all start from, and what differs."""
        base: Object = {
            "method": "LoRA",
            "model": {"volumePath": f"m/{drill.name}"},
            "dataset": {"volumePath": "data/train.jsonl", "maxSequenceLength": 512},
            "training": {
                "epochs": 1000,
                "maxSteps": 4,
                "batchSize": 4,
                "gradientAccumulationSteps": 1,
                "warmupSteps": 0,
                "learningRate": 1e-3,
                "precision": "FP32",
            },
            "checkpoint": {"everySteps": 10},
            "workers": {
                "nodes": 1,
                "resources": {"requests": {"cpu": "50m", "memory": "600Mi"}, "limits": {"memory": "3Gi"}},
            },
            "storage": {"models": {"claimName": "models"}, "output": {"claimName": "output"}},
        }
        return merged(base, drill.spec)

    # ------------------------------------------------------------ up and down

    def set_up(self, drills: Iterable[Drill], folder: Path) -> None:
        """Bring up what these drills need; `folder` holds the models and data to put on the volume."""
        drills = list(drills)
        plan = Plan()
        operators = dict.fromkeys(drill.operator for drill in drills)
        plan.add("namespaces", lambda: self._make_namespaces({drill.place for drill in drills}))
        for name in operators:
            # One after the other: each brings the CRD, and helm refuses one that changes under its hands.
            before = ("namespaces", *(f"operator {other}" for other in operators))
            plan.add(f"operator {name}", lambda name=name: self._install(name), after=before)  # type: ignore[misc]
        plan.add("volumes", self.files.ensure, after=("namespaces",))
        plan.add("models and data", lambda: self._put(folder, drills), after=("volumes",))
        plan.add("model hub", self._make_hub, after=("models and data",))
        plan.run()
        for resource in self._offered():
            self._withdraw(resource)
        self.jobs_of_users = Watch(self.kube, "finetunejobs")
        self.child_jobs = Watch(self.kube, "jobs", f"--selector={ROLE_LABEL}")
        self.pods = Watch(self.kube, "pods", f"--selector={ROLE_LABEL}")

    def tear_down(self) -> None:
        """Remove everything; the CRD stays, with other people's FineTuneJobs."""
        for watch in (self.jobs_of_users, self.child_jobs, self.pods):
            watch.stop()
        self.remove()

    def remove(self) -> None:
        """Remove what these or earlier drills left on the cluster."""
        for resource in self._offered():
            self._withdraw(resource)
        for place in PLACES:
            self.kube.kubectl("delete", "finetunejobs", "--all", "--namespace", self.namespace(place), "--wait=false")
        for name in OPERATORS:
            self.kube.helm("uninstall", self.release(name), "--namespace", self.system, "--ignore-not-found")
        names = [self.system, *(self.namespace(place) for place in PLACES)]
        self.kube.kubectl("delete", "namespace", *names, "--ignore-not-found")
        self.kube.kubectl("delete", "persistentvolume", f"--selector=drills={self.prefix}", "--ignore-not-found")

    def take_away(self, what: str) -> None:
        """Stop the main operator, or the API server, and wait until it is so."""
        if what == OPERATOR:
            self.kube.kubectl("scale", "deployment", *self._main, "--replicas=0")
            self.kube.kubectl("wait", "--for=delete", "pod", *self._main, "--timeout=120s")
        else:
            run([*TOOL, "stop", what])

    def bring_back(self, what: str) -> float:
        """Start it again and wait until it is so. Returns when that began."""
        began = self.now()
        if what == OPERATOR:
            self.kube.kubectl("scale", "deployment", *self._main, "--replicas=1")
            self.kube.kubectl("rollout", "status", "deployment", *self._main, "--timeout=120s")
        else:
            run([*TOOL, "up"])
        return began

    def operator_lives(self) -> Object:
        """Of each pod of the main operator: how often its container was started again, and its last exit code."""
        pods = json.loads(self.kube.kubectl("get", "pods", *self._main, "--output=json"))["items"]
        containers = {pod["metadata"]["name"]: pod["status"]["containerStatuses"][0] for pod in pods}
        return {
            name: (found["restartCount"], found.get("lastState", {}).get("terminated", {}).get("exitCode"))
            for name, found in containers.items()
        }

    @property
    def _main(self) -> list[str]:
        """Where the main operator's deployment and pods are."""
        return [f"--selector=app.kubernetes.io/instance={self.release(MAIN)}", "--namespace", self.system]

    @staticmethod
    def now() -> float:
        """The time that the watches note."""
        return time.monotonic()

    # ------------------------------------------------------------ what steps ask for

    def offer(self, name: str, amount: int) -> None:
        """Let the node offer so much of the resource of that name to the scheduler."""
        where = ("capacity", "allocatable")
        path = f"{RESOURCE}~1{name}"
        self._patch_node([{"op": "add", "path": f"/status/{side}/{path}", "value": str(amount)} for side in where])

    def withdraw(self, name: str) -> None:
        """Let the node offer it no more."""
        self._withdraw(f"{RESOURCE}/{name}")

    def sent(self, owner: str) -> int:
        """Bytes of the weights that left the hub for an owner's repository."""
        path = f"/api/v1/namespaces/{self.namespace(MAIN)}/services/hub:{HUB_PORT}/proxy/sent/{owner}"
        return int(self.kube.kubectl("get", "--raw", path))

    def weights(self) -> int:
        """Bytes of the weights that the hub has."""
        return int(self.files.shell(f"stat -c %s /models/hub/{WEIGHTS}"))

    # ------------------------------------------------------------ parts

    def _make_namespaces(self, places: set[str]) -> None:
        names = [self.namespace(place) for place in {*places, MAIN}]
        # Everything that we create must pass where Pod Security is at its strictest.
        spaces = [_namespace(name, RESTRICTED) for name in names] + [_namespace(self.system, {})]
        rules = [
            {"apiVersion": "v1", "metadata": {"name": "rule", "namespace": self.namespace(place)}, **rule}
            for place in places
            for rule in PLACES[place]
        ]
        claims = [_claim(name, self.namespace(MAIN)) for name in ("models", "output")]
        self.kube.apply(*spaces, *rules, *claims)

    def _install(self, name: str) -> str:
        chart = REPOSITORY / "charts" / "kubetune"
        where = ["--namespace", self.system, "--take-ownership", "--wait", "--timeout", "10m"]
        values = {f"settings.{key}": value for key, value in SETTINGS.items()} | OPERATORS[name]
        values["settings.operatorName"] = self.operator(name)
        values["settings.hubEndpoint"] = f"http://hub.{self.namespace(MAIN)}.svc:{HUB_PORT}"
        options = [*demo.image_values(self.images), "--set=rbac.aggregate=false"]
        # helm lays --set-string over --set, whatever their order: what is text must come as text.
        kinds = {key: "--set" if key.startswith("settings.") else "--set-string" for key in values}
        options += [f"{kinds[key]}={key}={value}" for key, value in values.items()]
        self.kube.helm("upgrade", "--install", self.release(name), chart, *where, *options)
        return "ready"

    def _put(self, folder: Path, drills: list[Drill]) -> None:
        for part in folder.iterdir():
            self.files.put(part, part.name)
        own = {f"/models/m/{drill.name}": f"/models/{drill.model}" for drill in drills}
        copies = [f"rm -rf {target}; cp -r {source} {target}" for target, source in own.items()]
        self.files.shell("; ".join(["set -e; rm -rf /models/huggingface; mkdir -p /models/m", *copies]))

    def _make_hub(self) -> None:
        sources = [REPOSITORY / "tests" / "trainer" / "hub_server.py", REPOSITORY / "tests" / "drills" / "hub.py"]
        where = {"namespace": self.namespace(MAIN)}
        self.kube.kubectl("delete", "pod/hub", "--namespace", self.namespace(MAIN), "--ignore-not-found")
        objects = _hub(where, {source.name: source.read_text() for source in sources}, self.images["trainer"])
        self.kube.apply(*objects)
        ready = ["--for=condition=Ready", "pod/hub", "--timeout=120s"]
        self.kube.kubectl("wait", *ready, "--namespace", self.namespace(MAIN))

    def _patch_node(self, changes: list[Object]) -> None:
        words = ["--subresource=status", "--type=json", "--patch", json.dumps(changes)]
        self.kube.kubectl("patch", "node", self.node(), *words)

    def node(self) -> str:
        """The node whose resources the drills use: that of the volumes' pod."""
        if not self._node:
            pod = self.kube.get("pod", POD, self.namespace(MAIN))
            assert pod is not None
            self._node = pod["spec"]["nodeName"]
        return self._node

    def _offered(self) -> list[str]:
        """The resources that drills have put on the node."""
        if self.kube.get("pod", POD, self.namespace(MAIN)) is None:
            return []
        node = json.loads(self.kube.kubectl("get", "node", self.node(), "--output=json"))
        return [name for name in node["status"]["capacity"] if name.startswith(RESOURCE)]

    def _withdraw(self, resource: str) -> None:
        """The kubelet takes what can be allocated from the capacity, but not back: it is set to 0."""
        path = resource.replace("/", "~1")
        self._patch_node(
            [
                {"op": "add", "path": f"/status/allocatable/{path}", "value": "0"},
                {"op": "remove", "path": f"/status/capacity/{path}"},
            ]
        )


def merged(base: Object, changes: Mapping[str, Any]) -> Object:
    """`changes` laid over `base` key by key; None takes a key away."""
    result = dict(base)
    for key, value in changes.items():
        below = result.get(key)
        result[key] = merged(below, value) if isinstance(value, dict) and isinstance(below, dict) else value
    return {key: value for key, value in result.items() if value is not None}


def _namespace(name: str, labels: Mapping[str, str]) -> Object:
    return {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}}


def _claim(name: str, namespace: str) -> Object:
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "2Gi"}}},
    }


HUB = """
apiVersion: v1
kind: Service
metadata: {name: hub}
spec: {type: NodePort, selector: {app: hub}, ports: [{port: %(port)d, nodePort: %(node_port)d}]}
---
apiVersion: v1
kind: Pod
metadata: {name: hub, labels: {app: hub}}
spec:
  automountServiceAccountToken: false
  terminationGracePeriodSeconds: 1
  securityContext: {runAsNonRoot: true, seccompProfile: {type: RuntimeDefault}}
  containers:
    - name: hub
      command: [python, /code/hub.py, /models/hub, %(weights)s, "%(port)d"]
      env: [{name: PYTHONDONTWRITEBYTECODE, value: "1"}]
      readinessProbe: {tcpSocket: {port: %(port)d}, periodSeconds: 1}
      securityContext: {allowPrivilegeEscalation: false, capabilities: {drop: [ALL]}}
      resources: {requests: {cpu: 10m, memory: 64Mi}}
      volumeMounts: [{name: code, mountPath: /code}, {name: models, mountPath: /models, readOnly: true}]
  volumes:
    - {name: code, configMap: {name: hub}}
    - {name: models, persistentVolumeClaim: {claimName: models}}
"""


def _hub(where: Object, code: Mapping[str, str], image: str) -> list[Object]:
    service, pod = yaml.safe_load_all(HUB % {"port": HUB_PORT, "node_port": NODE_PORT, "weights": WEIGHTS})
    pod["spec"]["securityContext"] |= {"runAsUser": USER, "runAsGroup": USER}
    pod["spec"]["containers"][0]["image"] = image
    config = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "hub"}, "data": dict(code)}
    for item in (service, config, pod):
        item["metadata"] |= where
    return [service, config, pod]
