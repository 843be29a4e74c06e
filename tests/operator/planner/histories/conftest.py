"""A model of the Job controller and the kubelet as far as the planner sees them, and an operator that dies."""

import copy
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from kubetune_contract.progress import CheckpointStatus, ProgressReport, TerminationMessage
from kubetune_operator import api
from kubetune_operator.decision import StageView
from kubetune_operator.diagnosis import condition, ending_condition, is_live
from kubetune_operator.names import QUEUE_LABEL
from kubetune_operator.plan import Observed, plan
from kubetune_operator.settings import Settings

Object = dict[str, Any]

SETTINGS = Settings(trainer_image="trainer", namespace="kubetune", restart_backoff_seconds=10)
START = datetime(2030, 1, 1, tzinfo=UTC)
OLD = CheckpointStatus(step=0, path="step-0", time=START)
SAVED = TerminationMessage(reason="Saved", message="saved", checkpoint=OLD).to_json()
"""The last word of a worker that knows of no newer checkpoint than the first."""


def stamp(moment: datetime) -> str:
    """As the API server writes times."""
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")


class Cluster:
    """The truth: the FineTuneJob, Jobs and pods, and what their controllers do."""

    def __init__(self, nodes: int, **spec: Any) -> None:
        self.now = START
        self.is_deleted = False
        """Whether the FineTuneJob was deleted. The collector takes its children."""
        self.others: set[str] = set()
        """ConfigMaps and Services, as kind/name."""
        self.jobs: dict[str, Object] = {}
        self.pods: dict[str, Object] = {}
        self.lost: set[str] = set()
        self.serial = 0
        self.created: list[str] = []
        self.body: Object = {
            "metadata": {"namespace": "team", "name": "bot", "uid": "u" * 36, "generation": 1, "resourceVersion": "1"},
            "spec": {
                "preset": "llama3/8B_lora",
                "model": {"volumePath": "m"},
                "dataset": {"volumePath": "d"},
                "workers": {"nodes": nodes},
                "storage": {"models": {"claimName": "m"}, "output": {"claimName": "o"}},
                **spec,
            },
        }

    def version(self) -> str:
        self.serial += 1
        return str(self.serial)

    # ---------------------------------------------------------------- writes

    def write_status(self, version: str, status: Object) -> bool:
        """Refused if somebody else wrote first."""
        if self.body["metadata"]["resourceVersion"] != version:
            return False
        self.body["status"] = copy.deepcopy(status)
        self.body["metadata"]["resourceVersion"] = self.version()
        return True

    def change(self, **spec: Any) -> None:
        """A person edits the spec."""
        self.body["spec"] |= spec
        self.body["metadata"]["generation"] += 1
        self.body["metadata"]["resourceVersion"] = self.version()

    def delete_body(self, version: str | None) -> None:
        """Delete the FineTuneJob, if it is still of that version."""
        if version == self.body["metadata"]["resourceVersion"]:
            self.is_deleted = True
            self.others.clear()
            for name in list(self.jobs):
                self.delete_job(name)

    def queued(self) -> list[Object]:
        """Jobs that a queue may suspend and resume: those that are not over."""
        jobs = [job for job in self.jobs.values() if QUEUE_LABEL in job["metadata"]["labels"]]
        return [job for job in jobs if not condition(job, "Complete") and not ending_condition(job)]

    def keep(self, manifest: Object) -> None:
        self.others.add(f"{manifest['kind']}/{manifest['metadata']['name']}")

    def create(self, manifest: Object) -> None:
        name = manifest["metadata"]["name"]
        if manifest["metadata"]["labels"]["kubetune.io/role"] == "worker":
            kinds = {other.partition("/")[0] for other in self.others}
            assert kinds == {"ConfigMap", "Service"}, f"{name} has no {kinds}: its pods could not start"
        if name not in self.jobs and "spec" in manifest:
            job = copy.deepcopy(manifest)
            job["metadata"] |= {"uid": f"{name}-{self.version()}", "creationTimestamp": stamp(self.now)}
            self.jobs[name] = {**job, "status": {"conditions": []}}
            self.created.append(name)

    def delete_job(self, name: str) -> None:
        job = self.jobs.pop(name)
        for pod in self.pods_of(job):
            self.ask(pod)

    # ---------------------------------------------------------------- pods

    def pods_of(self, job: Object) -> list[Object]:
        uid = job["metadata"]["uid"]
        return [pod for pod in self.pods.values() if pod["metadata"]["ownerReferences"][0]["uid"] == uid]

    def ask(self, pod: Object, grace: int = 30) -> None:
        """Ask for a pod's deletion."""
        if "deletionTimestamp" not in pod["metadata"]:
            due = stamp(self.now + timedelta(seconds=grace))
            pod["metadata"] |= {"deletionTimestamp": due, "deletionGracePeriodSeconds": grace}

    def end(self, pod: Object, code: int, message: str = "") -> None:
        """A container ends."""
        state = {"exitCode": code, "reason": "Error", "message": message, "finishedAt": stamp(self.now)}
        pod["status"] |= {"phase": "Failed" if code else "Succeeded"}
        pod["status"]["conditions"] = [item for item in pod["status"]["conditions"] if item["type"] != "Ready"]
        pod["status"]["containerStatuses"] = [{"state": {"terminated": state}}]

    def run(self, pod: Object) -> None:
        """A pod comes up."""
        pod["status"]["phase"] = "Running"
        pod["status"]["conditions"].append({"type": "Ready", "status": "True"})

    # ---------------------------------------------------------------- controllers

    def settle(self) -> None:
        """One round of the Job controller, the kubelet and the garbage collector."""
        for job in self.jobs.values():
            self._control(job)
        uids = {job["metadata"]["uid"] for job in self.jobs.values()}
        for name, pod in list(self.pods.items()):
            deleting = "deletionTimestamp" in pod["metadata"]
            if deleting and is_live(pod) and name not in self.lost:
                self.end(pod, 80, SAVED)
            elif deleting and not is_live(pod):
                del self.pods[name]
            elif pod["metadata"]["ownerReferences"][0]["uid"] not in uids:
                self.ask(pod)

    def _control(self, job: Object) -> None:
        conditions, pods = job["status"]["conditions"], self.pods_of(job)
        if condition(job, "Failed") or condition(job, "Complete"):
            return
        if ending_condition(job):
            for pod in pods:
                if is_live(pod):
                    self.ask(pod)
            if not any(is_live(pod) for pod in pods):
                conditions.append(self._condition("Failed", ending_condition(job)))
        elif job["spec"].get("activeDeadlineSeconds") == 1:
            conditions.append(self._condition("FailureTarget", {"reason": "DeadlineExceeded", "message": "active"}))
        elif job["spec"].get("suspend"):
            for pod in pods:
                self.ask(pod)
        elif failed := [pod for pod in pods if pod["status"]["phase"] == "Failed"]:
            disrupted = any(condition(pod, "DisruptionTarget") for pod in failed)
            words = "pod has condition DisruptionTarget matching" if disrupted else "backoff limit"
            conditions.append(self._condition("FailureTarget", {"reason": "PodFailurePolicy", "message": words}))
        else:
            self._fill(job, pods)

    def _fill(self, job: Object, pods: list[Object]) -> None:
        wanted = job["spec"].get("completions", 1)
        done = sum(pod["status"]["phase"] == "Succeeded" for pod in pods)
        if done == wanted:
            job["status"]["conditions"].append(self._condition("Complete", {}))
            job["status"]["completionTime"] = stamp(self.now)
            return
        there = {pod["metadata"]["labels"].get("batch.kubernetes.io/job-completion-index", "0") for pod in pods}
        for index in range(wanted):
            if str(index) not in there:
                self._add(job, index)

    def _add(self, job: Object, index: int) -> None:
        name = f"{job['metadata']['name']}-{index}-{self.version()}"
        labels = dict(job["spec"]["template"]["metadata"]["labels"])
        if job["spec"].get("completionMode") == "Indexed":
            labels["batch.kubernetes.io/job-completion-index"] = str(index)
        owner = {"uid": job["metadata"]["uid"], "controller": True, "kind": "Job", "name": job["metadata"]["name"]}
        self.pods[name] = {
            "metadata": {
                "name": name,
                "namespace": "team",
                "uid": name,
                "labels": labels,
                "creationTimestamp": stamp(self.now),
                "ownerReferences": [owner],
            },
            "spec": {"containers": [{}]},
            "status": {"phase": "Pending", "conditions": []},
        }

    def _condition(self, kind: str, like: Object | None) -> Object:
        words = {"reason": (like or {}).get("reason", ""), "message": (like or {}).get("message", "")}
        return {"type": kind, "status": "True", "lastTransitionTime": stamp(self.now), **words}


class Operator:
    """Carries out plans on a cluster, from caches that lag. Everything it remembers is lost when it dies."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.jobs = copy.deepcopy(cluster.jobs)
        self.pods = copy.deepcopy(cluster.pods)
        self.body = copy.deepcopy(cluster.body)

    def look(self, jobs: bool = True, pods: bool = True, body: bool = True) -> None:
        """Let caches catch up; each has a watch of its own."""
        if jobs:
            self.jobs = copy.deepcopy(self.cluster.jobs)
        if pods:
            self.pods = copy.deepcopy(self.cluster.pods)
        if body:
            self.body = copy.deepcopy(self.cluster.body)

    def reconcile(self, report: ProgressReport | None, writes: int) -> None:
        """Plan, then make so many of the plan's writes."""
        if self.cluster.is_deleted:
            return
        cluster, job = self.cluster, api.parse(self.body)
        if job.status.attempt_start_time is not None and f"bot-a{job.status.attempt}" not in self.jobs:
            self.look(pods=False, body=False)  # absence is asked for once more before it means anything
        decided = plan(job, self._observed(report), SETTINGS, cluster.now, "")
        steps = []
        creates = [manifest for manifest in decided.apply if manifest["kind"] == "Job"]
        if creates and cluster.body["metadata"]["resourceVersion"] != self.body["metadata"]["resourceVersion"]:
            self.look(jobs=False, pods=False)
            return
        for manifest in decided.apply:
            write = cluster.create if manifest["kind"] == "Job" else cluster.keep
            steps.append(lambda write=write, manifest=manifest: write(manifest))
        steps += [lambda item=item: self._suspend(item) for item in decided.suspend]
        steps += [lambda item=item: self._stop(item) for item in decided.stop]
        steps += [lambda item=item: cluster.others.discard(f"{item.kind}/{item.name}") for item in decided.remove]
        steps += [lambda item=item: self._delete(item) for item in decided.delete]
        if decided.status != job.status:
            steps.append(lambda: self._write(decided.status))
        for step in steps[:writes]:
            step()

    def _observed(self, report: ProgressReport | None) -> Observed:
        roles = {name: job["metadata"]["labels"]["kubetune.io/role"] for name, job in self.jobs.items()}
        stage = next((job for name, job in self.jobs.items() if roles[name] == "stage"), None)
        workers = [job for name, job in self.jobs.items() if roles[name] == "worker"]
        pods = list(self.pods.values())
        stage_pods = [pod for pod in pods if pod["metadata"]["labels"]["kubetune.io/role"] == "stage"]
        return Observed(
            stages={} if stage is None else {stage["metadata"]["name"]: StageView(stage, stage_pods)},
            attempt_jobs={int(job["metadata"]["labels"]["kubetune.io/attempt"]): job for job in workers},
            pods=[pod for pod in pods if pod["metadata"]["labels"]["kubetune.io/role"] == "worker"],
            progress=report,
        )

    def _suspend(self, item: Any) -> None:
        job = self.cluster.jobs.get(item.name)
        if job is not None and job["metadata"]["uid"] == item.uid:
            job["spec"]["suspend"] = item.suspended

    def _stop(self, item: Any) -> None:
        job = self.cluster.jobs.get(item.name)
        if job is not None and job["metadata"]["uid"] == item.uid:
            job["spec"]["activeDeadlineSeconds"] = 1

    def _delete(self, item: Any) -> None:
        if item.kind == api.KIND:
            self.cluster.delete_body(self.body["metadata"]["resourceVersion"])
            return
        job = self.cluster.jobs.get(item.name)
        if job is not None and job["metadata"]["uid"] == item.uid:
            self.cluster.delete_job(item.name)

    def _write(self, status: api.FineTuneJobStatus) -> None:
        if self.cluster.write_status(self.body["metadata"]["resourceVersion"], status.to_dict()):
            self.body = copy.deepcopy(self.cluster.body)


@pytest.fixture
def model() -> tuple[type[Cluster], type[Operator]]:
    """The two classes, for a machine that makes them anew in every history."""
    return Cluster, Operator
