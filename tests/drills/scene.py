"""Where a drill takes place: its namespace, its FineTuneJob, and the hands and eyes of the person who drills."""

import json
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from cluster_tool import ClusterError
from kube import Kube
from tests.drills.drill import Drill, Object, condition_of
from tests.drills.watch import Key, TooLate

from kubetune_operator.names import ATTEMPT_LABEL, JOB_LABEL, OPERATOR_LABEL, ROLE_LABEL, STAGE

if TYPE_CHECKING:
    from tests.drills.site import Site

INDEX_LABEL = "batch.kubernetes.io/job-completion-index"
PATIENCE = 180.0
"""Seconds to wait for what leads up to a drill, on two busy cores with other drills beside it."""


class Scene:
    """One drill's share of the site."""

    def __init__(self, site: "Site", drill: Drill) -> None:
        self.site = site
        self.kube: Kube = site.kube
        self.drill = drill
        self.name = drill.name
        self.namespace = site.namespace(drill.place)
        self.refusal = ""
        self.notes: dict[str, Any] = {}
        """What a step leaves for a later one."""
        self.undo: list[Callable[[], object]] = []
        """Runs when the drill is over, last first."""

    # ------------------------------------------------------------ hands

    def kubectl(self, *words: str, stdin: Object | None = None) -> str:
        """Run kubectl in the drill's namespace."""
        text = None if stdin is None else json.dumps(stdin)
        return self.kube.kubectl("--namespace", self.namespace, *words, stdin=text)

    def manifest(self) -> Object:
        """The drill's FineTuneJob."""
        return {
            "apiVersion": "kubetune.io/v1alpha1",
            "kind": "FineTuneJob",
            "metadata": {
                "name": self.name,
                "namespace": self.namespace,
                "labels": {OPERATOR_LABEL: self.site.operator(self.drill.operator)},
            },
            "spec": self.site.spec(self.drill),
        }

    def submit(self) -> None:
        """Apply it; a refusal is kept, because it may be what the drill is about."""
        self.try_to("apply", "--filename", "-", stdin=self.manifest())

    def try_to(self, *words: str, stdin: Object | None = None) -> None:
        """Run kubectl and keep its refusal."""
        try:
            self.kubectl(*words, stdin=stdin)
        except ClusterError as error:
            self.refusal = str(error)

    def patch(self, spec: Object) -> None:
        """Change fields of the spec; a refusal is kept."""
        self.try_to("patch", "finetunejob", self.name, "--type=merge", "--patch", json.dumps({"spec": spec}))

    def delete(self) -> None:
        """Delete the FineTuneJob, if it is still there."""
        self.kubectl("delete", "finetunejob", self.name, "--ignore-not-found", "--wait=false")

    def make(self, manifest: Object) -> None:
        """Create an object that is not the job's, and see to it that it goes afterwards."""
        metadata = manifest["metadata"]
        metadata.setdefault("namespace", self.namespace)
        self.kube.apply(manifest)
        kind = f"{manifest['kind']}/{metadata['name']}".lower()
        words = ["delete", kind, "--namespace", metadata["namespace"], "--ignore-not-found", "--wait=false"]
        self.undo.append(lambda: self.kube.kubectl(*words))

    # ------------------------------------------------------------ eyes

    @property
    def key(self) -> Key:
        """Of the FineTuneJob."""
        return self.namespace, self.name

    def job(self) -> Object:
        """The FineTuneJob as it is now; {} if there is none."""
        return self.site.jobs_of_users.get(self.key) or {}

    def status(self) -> Object:
        """Its status."""
        return self.job().get("status") or {}

    def until(self, reached: Callable[[Object], bool], what: str, seconds: float = PATIENCE) -> Object:
        """Wait until the status is as it should be."""

        def look(found: Any) -> Object | None:
            status = (found.get(self.key) or {}).get("status") or {}
            return status if reached(status) else None

        try:
            return self.site.jobs_of_users.until(look, seconds, what)
        except TooLate as error:
            raise TooLate(f"{error}; it says {self.told()}") from None

    def until_pods(self, reached: Callable[[list[Object]], bool], what: str, seconds: float = PATIENCE) -> list[Object]:
        """Wait until the worker pods are as they should be."""
        return self.site.pods.until(lambda found: _if(reached, self._mine(found.values())), seconds, what)

    def until_stage_pods(self, reached: Callable[[list[Object]], bool], what: str) -> list[Object]:
        """Wait until the staging pods are as they should be."""
        self.until_stage_job()
        return self.site.pods.until(lambda found: _if(reached, self._stagers(found.values())), PATIENCE, what)

    def pods(self) -> list[Object]:
        """The worker pods, by index."""
        return self.site.pods.until(lambda found: self._mine(found.values()), PATIENCE, "pods")

    def worker(self, index: int = 0) -> str:
        """Name of a worker pod of the present attempt."""
        attempt = str(max(1, self.status().get("attempt", 1)))
        for pod in self.pods():
            labels = pod["metadata"]["labels"]
            if labels.get(INDEX_LABEL) == str(index) and labels[ATTEMPT_LABEL] == attempt:
                return str(pod["metadata"]["name"])
        raise AssertionError(f"worker {index} of attempt {attempt} has no pod")

    def stage_jobs(self) -> list[str]:
        """Names of the staging Jobs that the job owns."""
        return self.site.child_jobs.until(lambda found: self._stage_jobs(found.values()), PATIENCE, "staging Jobs")

    def until_stage_job(self) -> str:
        """Wait for the staging Job."""
        look = lambda jobs: self._stage_jobs(jobs.values()) or None  # noqa: E731
        return self.site.child_jobs.until(look, PATIENCE, "staging Job")[0]

    def children(self) -> list[str]:
        """The Jobs, Pods, Services and ConfigMaps that are the job's, and its staging Jobs."""
        kinds = "jobs,pods,services,configmaps"
        own = self.kubectl("get", kinds, f"--selector={JOB_LABEL}={self.name}", "--output=name").split()
        return [*own, *(f"staging.job/{name}" for name in self.stage_jobs())]

    def told(self) -> str:
        """All that the operator says, for the message of a drill that failed."""
        status = self.status()
        conditions = status.get("conditions") or []
        lines = [f"{one['type']}={one['status']} {one['reason']}: {one['message']}" for one in conditions]
        return "\n    ".join([str(status.get("state")), *lines])

    def owned(self, items: Iterable[Object]) -> list[Object]:
        """The FineTuneJob itself, its Jobs and their pods."""
        here = [item for item in items if item["metadata"]["namespace"] == self.namespace]
        itself = [item for item in here if item["kind"] == "FineTuneJob" and item["metadata"]["name"] == self.name]
        return [*itself, *self._mine(here), *(job for job in here if job["kind"] == "Job" and self._owns(job))]

    def _mine(self, pods: Iterable[Object]) -> list[Object]:
        mine = [pod for pod in pods if pod["metadata"]["namespace"] == self.namespace]
        mine = [pod for pod in mine if pod["metadata"]["labels"].get(JOB_LABEL) == self.name]
        return sorted(mine, key=lambda pod: (pod["metadata"]["labels"].get(INDEX_LABEL, ""), pod["metadata"]["name"]))

    def _stage_jobs(self, jobs: Iterable[Object]) -> list[str]:
        mine = [job for job in jobs if job["metadata"]["namespace"] == self.namespace]
        mine = [job for job in mine if job["metadata"]["labels"].get(ROLE_LABEL) == STAGE]
        return [job["metadata"]["name"] for job in mine if self._owns(job)]

    def _owns(self, child: Object) -> bool:
        """By name: what an owner that is gone has left counts too."""
        return any(owner["name"] == self.name for owner in child["metadata"].get("ownerReferences") or [])

    def _stagers(self, pods: Iterable[Object]) -> list[Object]:
        names = self.stage_jobs()
        mine = [pod for pod in pods if pod["metadata"]["namespace"] == self.namespace]
        return [pod for pod in mine if pod["metadata"]["labels"].get("batch.kubernetes.io/job-name") in names]


def _if(reached: Callable[[list[Object]], bool], found: list[Object]) -> list[Object] | None:
    return found if reached(found) else None


def active(pods: list[Object]) -> list[Object]:
    """Those that are pending or running."""
    return [pod for pod in pods if pod["status"].get("phase") not in ("Succeeded", "Failed")]


def is_ready(pod: Object) -> bool:
    """Whether the pod's container runs."""
    return condition_of(pod["status"], "Ready").get("status") == "True"
