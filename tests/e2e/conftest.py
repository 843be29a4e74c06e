"""The real line: the chart on a real node, real images, a small model on real volumes."""

import json
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import run as demo
import yaml
from cluster_tool import default_layout
from kube import Kube
from tests.trainer.conftest import write_llama
from volumes_pod import VolumesPod

Object = dict[str, Any]
ENDED = ("Succeeded", "Failed")
DEADLINE = 240.0
"""Seconds for a job of this size, start of its pods included, on two busy cores."""


@pytest.fixture(scope="session")
def kube() -> Kube:
    """The cluster; `make test-e2e` brings it up."""
    return Kube(default_layout())


@pytest.fixture(scope="session")
def operator(kube: Kube) -> str:
    """The installed chart, with the images of this tree. The value is its namespace."""
    demo.Demo(kube, default_layout()).install()
    return demo.SYSTEM_NAMESPACE


class Bench:
    """A namespace with volumes, and what the tests do there."""

    def __init__(self, kube: Kube, name: str, image: str) -> None:
        self.kube = kube
        self.namespace = name
        self.files = VolumesPod(kube, name, image)

    def manifest(self, name: str, **spec: Any) -> Object:
        """A FineTuneJob that a test changes as it needs."""
        base: Object = {
            "method": "LoRA",
            "model": {"volumePath": "tiny"},
            "dataset": {"volumePath": "data/train.jsonl", "maxSequenceLength": 512},
            "training": {
                "epochs": 100,
                "maxSteps": 40,
                "batchSize": 4,
                "gradientAccumulationSteps": 1,
                "warmupSteps": 2,
                "learningRate": 1e-3,
                "precision": "FP32",
            },
            "checkpoint": {"everySteps": 4},
            "workers": {"nodes": 2, "resources": {"requests": {"cpu": "200m"}, "limits": {"memory": "3Gi"}}},
            "storage": {"models": {"claimName": "models"}, "output": {"claimName": "output"}},
        }
        for section, value in spec.items():
            merged = isinstance(value, dict) and isinstance(base.get(section), dict)
            base[section] = {**base[section], **value} if merged else value
        return {
            "apiVersion": "kubetune.io/v1alpha1",
            "kind": "FineTuneJob",
            "metadata": {"name": name, "namespace": self.namespace},
            "spec": base,
        }

    def submit(self, name: str, **spec: Any) -> Object:
        """Apply a FineTuneJob and return it as the server has it."""
        self.kube.apply(self.manifest(name, **spec))
        found = self.kube.get("finetunejob", name, self.namespace)
        assert found is not None
        return found

    def until(self, name: str, reached: Callable[[Object], bool], seconds: float = DEADLINE) -> Object:
        """Watch a FineTuneJob until it is where the test wants it; fails when it ends elsewhere or time is up."""
        ticks = 0.0
        last: Object = {}
        while True:
            for event in self.kube.watch("finetunejob", name, self.namespace):
                if event is None:
                    ticks += 1.0
                    assert ticks < seconds, (
                        f"{name} did not get there in {seconds:.0f} quiet seconds: {self.told(last)}"
                    )
                    continue
                _, last = event
                if reached(last):
                    return last
                assert self.state(last) not in ENDED, f"{name} ended first: {self.told(last)}"

    def until_ended(self, name: str) -> Object:
        """Watch a FineTuneJob until it succeeded or failed."""
        return self.until(name, lambda job: self.state(job) in ENDED)

    def children(self, name: str) -> list[str]:
        """The Jobs, Pods, Services and ConfigMaps of a FineTuneJob."""
        selector = ["--selector", f"kubetune.io/job={name}", "--output", "name"]
        kinds = "jobs,pods,services,configmaps"
        return self.kube.kubectl("get", kinds, "--namespace", self.namespace, *selector).split()

    def wait_gone(self, name: str) -> None:
        """Wait until no child of a FineTuneJob is left; kubectl watches each of them."""
        for child in self.children(name):
            where = ["--namespace", self.namespace, "--timeout=180s"]
            self.kube.kubectl("wait", "--for=delete", child, *where)
        assert self.children(name) == []

    def worker(self, name: str, attempt: int, index: int) -> str:
        """The pod of one worker."""
        labels = (
            f"kubetune.io/job={name},kubetune.io/attempt={attempt},batch.kubernetes.io/job-completion-index={index}"
        )
        where = ["--namespace", self.namespace, "--output", "jsonpath={.items[0].metadata.name}"]
        return self.kube.kubectl("get", "pods", "--selector", labels, *where).strip()

    def suspend(self, name: str, suspended: bool) -> None:
        """Suspend or resume a FineTuneJob."""
        patch = json.dumps({"spec": {"suspend": suspended}})
        where = ["--namespace", self.namespace, "--type=merge"]
        self.kube.kubectl("patch", "finetunejob", name, *where, "--patch", patch)

    def scale_operator(self, namespace: str, replicas: int) -> None:
        """Stop or start the operator and wait until it is so."""
        where = ["--namespace", namespace]
        self.kube.kubectl("scale", "deployment", "--all", f"--replicas={replicas}", *where)
        if replicas:
            self.kube.kubectl("rollout", "status", "deployment", *where, "--timeout=120s")
        else:
            gone = ["--for=delete", "pod", "--selector", "app.kubernetes.io/name=kubetune", "--timeout=120s"]
            self.kube.kubectl("wait", *gone, *where)

    def active_pods(self, name: str) -> list[str]:
        """The worker pods of a FineTuneJob that are pending or running; one that has ended holds nothing."""
        selector = ["--selector", f"kubetune.io/job={name}", "--namespace", self.namespace]
        active = ["--field-selector", "status.phase!=Succeeded,status.phase!=Failed", "--output", "name"]
        return self.kube.kubectl("get", "pods", *selector, *active).split()

    def wait_no_active_pod(self, name: str) -> None:
        """Wait until no worker pod of a FineTuneJob is pending or running."""
        for pod in self.active_pods(name):
            self.kube.kubectl("wait", "--for=delete", pod, "--namespace", self.namespace, "--timeout=180s")

    def output(self, job: Object, folder: Path) -> Path:
        """The run's output folder, copied to a local one."""
        path = job["status"]["outputPath"]
        self.files.get([path], folder)
        return folder / path

    @staticmethod
    def state(job: Object) -> str | None:
        """The job in one word."""
        found: str | None = (job.get("status") or {}).get("state")
        return found

    @staticmethod
    def condition(job: Object, kind: str) -> Object:
        """A condition; {} where it was never set."""
        conditions = (job.get("status") or {}).get("conditions") or []
        return next((one for one in conditions if one["type"] == kind), {})

    @staticmethod
    def told(job: Object) -> str:
        """What the operator says about a job, for the messages of failing tests."""
        return json.dumps(job.get("status") or {}, indent=2)


@pytest.fixture(scope="session")
def volume(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the models volume holds: a small Llama, a model that is none, and data."""
    root: Path = tmp_path_factory.mktemp("volume")
    # Wide enough that a step takes most of a second on one core: the tests must get in between.
    write_llama(root / "tiny", hidden_size=192, num_hidden_layers=4, intermediate_size=512)
    bert = write_llama(root / "bert") / "config.json"
    bert.write_text(
        json.dumps(json.loads(bert.read_text()) | {"architectures": ["BertForMaskedLM"], "model_type": "bert"})
    )
    chats = [(f"What is {n} and {n}?", f"It is {2 * n}. " * 24) for n in range(64)]
    (root / "data").mkdir()
    (root / "data" / "train.jsonl").write_text("".join(map(chat, chats)))
    (root / "data" / "questions.jsonl").write_text("".join(chat((question, None)) for question, _ in chats))
    return root


def chat(turns: tuple[str, str | None]) -> str:
    """A row of a data file: a question and, where there is one, its answer."""
    roles = zip(("user", "assistant"), turns, strict=True)
    return json.dumps({"messages": [{"role": role, "content": text} for role, text in roles if text]}) + "\n"


@pytest.fixture(scope="module")
def bench(kube: Kube, operator: str, volume: Path) -> Iterator[Bench]:
    """A namespace with the small model and its data on the models volume; gone afterwards."""
    name = f"kubetune-e2e-{uuid.uuid4().hex[:6]}"
    images = demo.read_images(default_layout())
    objects = yaml.safe_load_all(demo.CLAIMS.read_text().replace("kubetune-demo", name))
    kube.apply(*objects)
    bench = Bench(kube, name, images["trainer"])
    bench.files.ensure()
    for folder in volume.iterdir():
        bench.files.put(folder, folder.name)
    yield bench
    kube.kubectl("delete", "finetunejobs", "--all", "--namespace", name)
    kube.kubectl("delete", "namespace", name, "--wait=false")
