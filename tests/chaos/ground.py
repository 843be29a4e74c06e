"""The drills' site on a node that is ours to hurt, and the weights that came of each run."""

import json
import threading
from pathlib import Path
from typing import Any

from cluster_tool import ClusterError, Layout
from shell import wait_until
from tests.chaos import host
from tests.chaos.gate import GatedKube
from tests.drills.drill import MAIN, Step
from tests.drills.scene import PATIENCE, Scene
from tests.drills.site import Site
from tests.drills.watch import TooLate

from kubetune_operator.names import JOB_LABEL

ADAPTER = "adapter/adapter_model.safetensors"


class Ground(Site):
    """Where chaos takes place."""

    def __init__(self, kube: GatedKube, layout: Layout, prefix: str = "chaos") -> None:
        super().__init__(kube, layout, prefix)
        self.layout = layout
        self.gate = kube.gate
        self._operator = threading.Lock()
        self.folders: dict[str, Path] = {}
        """Claim -> its folder on this machine."""
        self.digests: dict[str, str] = {}
        """Run -> digest of its adapter's weights."""

    def remove(self) -> None:
        """As the base does, and the file systems that a run which was cut short has left."""
        super().remove()
        host.unmount_all()

    def strike_component(self, name: str, seconds: float) -> None:
        """Kill a component of the cluster; it is started again after so long. Nobody's kubectl runs meanwhile."""
        with self.gate.closed():
            host.kill_component(self.layout, name, seconds)
            self.bring_back(name)

    def strike_operator(self) -> None:
        """Kill the main operator's process, and delete its pod, so that no back-off of the kubelet adds up."""
        with self._operator:
            for pod in self.operator_pods():
                host.kill_container(self.layout, pod["metadata"]["uid"])
                name = ["pod", pod["metadata"]["name"], "--namespace", self.system]
                self.kube.kubectl("delete", *name, "--force", "--grace-period=0", "--ignore-not-found")
            self.kube.kubectl("rollout", "status", "deployment", *self._main, "--timeout=120s")

    def operator_pods(self) -> list[dict[str, Any]]:
        """The running pods of the main operator."""
        found: list[dict[str, Any]] = json.loads(self.kube.kubectl("get", "pods", *self._main, "--output=json"))[
            "items"
        ]
        return [pod for pod in found if pod["status"].get("phase") == "Running"]

    def volume(self, claim: str) -> Path:
        """The folder of this machine that a claim is: provisioned, or the run's own."""
        if host.own_folder(claim).is_dir():
            return host.own_folder(claim)
        where = ["--namespace", self.namespace(MAIN), "--output=jsonpath={.spec.volumeName}"]
        name = self.kube.kubectl("get", "persistentvolumeclaim", claim, *where)
        return Path(self.kube.kubectl("get", "persistentvolume", name, "--output=jsonpath={.spec.local.path}"))

    def orphans(self, seconds: float = 90) -> list[str]:
        """What is still there so long after the last FineTuneJob was deleted: Jobs, pods, Services, ConfigMaps."""
        here = self.namespace(MAIN)
        mine = lambda found: [f"{item['kind']}/{key[1]}" for key, item in found.items() if key[0] == here]  # noqa: E731
        left: list[str] = []
        for watch in (self.jobs_of_users, self.child_jobs, self.pods):
            try:
                watch.until(lambda found: None if mine(found) else True, seconds, "nothing is left")
            except TooLate:
                left += watch.ask(mine) or []
        where = ["--namespace", here, f"--selector={JOB_LABEL}"]
        for name in self.kube.kubectl("get", "services,configmaps", "--output=name", *where).split():
            try:
                self.kube.kubectl("wait", "--for=delete", name, "--namespace", here, f"--timeout={seconds:.0f}s")
            except ClusterError:
                left.append(name)
        return left


def ground_of(scene: Scene) -> Ground:
    """The site as what it is here."""
    assert isinstance(scene.site, Ground)
    return scene.site


def note_weights(scene: Scene) -> None:
    """Keep the digest of the adapter that the run has exported."""
    file = f"/output/{scene.status()['outputPath']}/{ADAPTER}"
    ground = ground_of(scene)
    ground.digests[scene.name] = ground.files.shell(f"sha256sum {file}").split()[0]


def checkpoints(scene: Scene) -> list[Path]:
    """The folders of a run's checkpoints on this machine, the newest last."""
    claim = scene.manifest()["spec"]["storage"]["output"]["claimName"]
    ground = ground_of(scene)
    if claim not in ground.folders:
        ground.folders[claim] = ground.volume(claim)
    return sorted((ground.folders[claim] / str(scene.status()["outputPath"])).glob("checkpoints/step-*"))


def written(step: int) -> Step:
    """Until a checkpoint of that step or a later one lies on the volume, which has no watch."""

    def wait(scene: Scene) -> None:
        scene.until(lambda status: "outputPath" in status, "the name of its folder")
        reached = lambda: any(int(path.name[5:]) >= step for path in checkpoints(scene))  # noqa: E731
        wait_until(f"{scene.name}: a checkpoint of step {step}", reached, PATIENCE, scene.told)

    return wait
