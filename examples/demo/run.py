"""`make demo`: fine-tune a real model on the cluster that is up, and show what it learnt.

Can be run again and again, also after it was killed: what is there is used, a job that still runs is followed.
"""

import argparse
import json
import os
import shutil
import sys
from pathlib import Path

import make_data
import smollm2
import summary
import yaml
from cluster_tool import REPOSITORY, ClusterError, Layout, Plan, default_layout, describe
from follow import ENDED, Screen, follow
from kube import Kube, Object
from volumes_pod import VolumesPod

HERE = Path(__file__).resolve().parent
MANIFEST = HERE.parent / "demo.yaml"
CLAIMS = HERE / "claims.yaml"
CHART = REPOSITORY / "charts" / "kubetune"
RELEASE = "kubetune"
SYSTEM_NAMESPACE = "kubetune-system"
DATA_FOLDER = "demo"
"""On the models volume; examples/demo.yaml names it."""
KIND = "finetunejob"
LOCKED = f"owner=helm,name={RELEASE},status in (pending-install,pending-upgrade,pending-rollback)"


def main() -> int:
    """Run the demo; 0 when the job succeeded."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clean", action="store_true", help="remove what the demo made from the cluster")
    arguments = parser.parse_args()
    layout = default_layout()
    try:
        demo = Demo(Kube(layout), layout)
        return demo.clean() if arguments.clean else demo.run()
    except (ClusterError, OSError) as error:
        print(f"error: {describe(error)}", file=sys.stderr)
        return 1


class Demo:
    """The demo on one cluster."""

    def __init__(self, kube: Kube, layout: Layout) -> None:
        self.kube = kube
        self.job: Object = yaml.safe_load(MANIFEST.read_text())
        self.name: str = self.job["metadata"]["name"]
        self.namespace: str = self.job["metadata"]["namespace"]
        self.images = read_images(layout)
        self.folder = layout.cache / "demo"
        self.pod = VolumesPod(kube, self.namespace, self.images["trainer"])

    def run(self) -> int:
        """Prepare, apply, follow, tell."""
        try:
            self.prepare()
            ended = self.follow()
        except KeyboardInterrupt:
            print(summary.of_interruption(self.kube, self.job), file=sys.stderr)
            return 130
        if ended["status"]["state"] != "Succeeded":
            print(summary.of_failure(self.kube, ended))
            return 1
        results = self.fetch(ended)
        print(summary.of_success(self.kube, ended, results))
        return 0

    def prepare(self) -> None:
        """Bring everything to where the job runs."""
        plan = Plan()
        plan.add("operator", self.install)
        found = self.kube.get(KIND, self.name, self.namespace)
        if found and state_of(found) not in ENDED:
            plan.add(f"FineTuneJob {self.name}", lambda: "runs already: following it")
            plan.run()
            return
        plan.add("model", self.make_model)
        plan.add("data", self.make_data)
        plan.add("namespace and claims", self.make_claims)
        plan.add("pod with the volumes", self.pod.ensure, after=("namespace and claims",))
        plan.add("model on the volume", self.put_model, after=("model", "pod with the volumes"))
        plan.add("data on the volume", self.put_data, after=("data", "model on the volume"))
        plan.add(f"FineTuneJob {self.name}", self.apply, after=("operator", "data on the volume"))
        plan.run()

    def install(self) -> str:
        """Install the chart, or bring it up to date."""
        where = ["--namespace", SYSTEM_NAMESPACE]
        # A helm that was killed leaves its release locked. The record of such a revision goes; the next one takes over.
        self.kube.kubectl("delete", "secret", *where, "--selector", LOCKED, "--ignore-not-found")
        # The CRD may be there already, from another release or by hand: it becomes this release's.
        options = [*where, "--create-namespace", "--take-ownership", "--wait", "--timeout", "10m"]
        self.kube.helm("upgrade", "--install", RELEASE, CHART, *options, *image_values(self.images))
        return "ready"

    def make_model(self) -> str:
        """Convert the model from its wheel, once."""
        return f"in {smollm2.model_folder()}"

    def make_data(self) -> str:
        """Write the questions and answers."""
        train, held_out = make_data.write(self.folder / "data")
        return f"{train} conversations, {held_out} more held out"

    def make_claims(self) -> None:
        """Create the namespace and the claims."""
        self.kube.apply(*claims(os.environ.get("STORAGE_CLASS")))

    def put_model(self) -> str:
        """Copy the model to the models volume."""
        return self.pod.put(smollm2.model_folder(), smollm2.MODEL_NAME)

    def put_data(self) -> str:
        """Copy the data to the models volume."""
        return self.pod.put(self.folder / "data", DATA_FOLDER)

    def apply(self) -> str:
        """Apply the manifest; a job of an earlier demo is removed first."""
        self.kube.kubectl("delete", KIND, self.name, "--namespace", self.namespace, "--ignore-not-found")
        self.kube.apply(self.job)
        return f"applied {MANIFEST.relative_to(REPOSITORY)}"

    def follow(self) -> Object:
        """Show the job's progress until it ended."""
        return follow(self.kube, self.name, self.namespace, Screen())

    def clean(self) -> int:
        """Remove the namespace with the volumes, and the operator. The CRD stays, with other people's FineTuneJobs."""
        plan = Plan()
        namespace = f"namespace {self.namespace} removed"
        where = ["--namespace", SYSTEM_NAMESPACE, "--ignore-not-found", "--wait"]
        plan.add(namespace, lambda: self.delete("namespace", self.namespace))
        plan.add("operator removed", lambda: self.kube.helm("uninstall", RELEASE, *where).strip(), after=(namespace,))
        plan.run()
        print("The CRD stays. This removes it and every FineTuneJob: kubectl delete crd finetunejobs.kubetune.io")
        return 0

    def delete(self, kind: str, name: str) -> None:
        """Delete an object, unless it is not there, and wait until it is gone."""
        self.kube.kubectl("delete", kind, name, "--ignore-not-found")

    def fetch(self, ended: Object) -> Path:
        """Copy what the run left from the output volume to this machine."""
        target = self.folder / "results"
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        plan = Plan()
        paths = summary.result_paths(ended)
        plan.add("pod with the volumes", self.pod.ensure)
        plan.add("results copied", lambda: self.pod.get(paths, target), after=("pod with the volumes",))
        plan.run()
        return target


def state_of(job: Object) -> str | None:
    """The job in one word."""
    state: str | None = (job.get("status") or {}).get("state")
    return state


def image_values(images: dict[str, str]) -> list[str]:
    """The chart's values for the images, as helm's options."""
    options = []
    for part, section in (("operator", "image"), ("trainer", "trainerImage")):
        repository, _, tag = images[part].rpartition(":")
        options += [f"--set-string={section}.repository={repository}", f"--set-string={section}.tag={tag}"]
    return options


def claims(storage_class: str | None) -> list[Object]:
    """The namespace and the claims. A named class gives volumes that several nodes can mount."""
    objects: list[Object] = list(yaml.safe_load_all(CLAIMS.read_text()))
    for claim in objects:
        if storage_class and claim["kind"] == "PersistentVolumeClaim":
            claim["spec"] |= {"storageClassName": storage_class, "accessModes": ["ReadWriteMany"]}
    return objects


def read_images(layout: Layout) -> dict[str, str]:
    """The references of the operator's and the trainer's image that were built last."""
    if not layout.images.is_file():
        raise ClusterError(f"{layout.images} is missing: start the demo with `make demo`, which builds the images")
    images: dict[str, str] = json.loads(layout.images.read_text())
    return images


if __name__ == "__main__":
    sys.exit(main())
