"""A kubelet's part for many pods at once: every gang comes up, and meets the fate that is written for its attempt."""

import datetime as dt
import heapq
import itertools
import queue
import random
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from tests.integration.operator.server import Account, Api, Refused

from kubetune_contract.progress import TerminationMessage

Object = dict[str, Any]
INDEX = "batch.kubernetes.io/job-completion-index"
INVALID = TerminationMessage(reason="InvalidData", message="data/train.jsonl, line 3: no assistant turn").to_json()


class Kubelet:
    """Watches the pods of a namespace and writes their status, in threads of its own."""

    def __init__(self, account: Account, namespace: str, fates: dict[str, list[str]], done: str, staged: str) -> None:
        """`fates` names, for each FineTuneJob, what becomes of attempt 1, 2 ...; `done` and `staged` are last words."""
        self.account = account
        self.namespace = namespace
        self.fates = fates
        self.words = {"done": done, "staged": staged}
        self.random = random.Random(1)
        self.pause = 1.0
        """Longest wait, in seconds, before anything that a pod does."""
        self.problems: list[str] = []
        self._news: queue.Queue[tuple[str, Object]] = queue.Queue()
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._number = itertools.count()
        self._seen: set[str] = set()
        self._gangs: dict[tuple[str, int], dict[str, Object]] = defaultdict(dict)
        self._stopped = threading.Event()
        self._threads = [threading.Thread(target=part, daemon=True) for part in (self._watch, self._act)]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._stopped.set()
        for thread in self._threads:
            thread.join(30)

    def _watch(self) -> None:
        api = Api(self.account)
        path = f"/api/v1/namespaces/{self.namespace}/pods"
        for event in api.watch(path, self._stopped.is_set, "kubetune.io/role"):
            self._news.put(event)
        api.close()

    def _act(self) -> None:
        self.api = Api(self.account)
        while not self._stopped.is_set():
            wait = self._due[0][0] - time.monotonic() if self._due else 0.5
            try:
                kind, pod = self._news.get(timeout=max(0.001, min(wait, 0.5)))
                if kind in ("ADDED", "MODIFIED"):
                    self._take(pod)
            except queue.Empty:
                pass
            while self._due and self._due[0][0] <= time.monotonic():
                heapq.heappop(self._due)[2]()
        self.api.close()

    def _later(self, action: Callable[[], None]) -> None:
        due = time.monotonic() + self.random.uniform(0, self.pause)
        heapq.heappush(self._due, (due, next(self._number), action))

    def _take(self, pod: Object) -> None:
        metadata = pod["metadata"]
        if metadata["uid"] not in self._seen and "deletionTimestamp" not in metadata:
            self._seen.add(metadata["uid"])
            self._later(lambda: self._come_up(pod))

    def _come_up(self, pod: Object) -> None:
        labels = pod["metadata"]["labels"]
        if labels["kubetune.io/role"] == "stage":
            self.end(pod, 0, self.words["staged"])
            return
        self.play(pod, "Running", {"running": {"startedAt": now()}}, ready=True)
        job, attempt = labels["kubetune.io/job"], int(labels["kubetune.io/attempt"])
        gang = self._gangs[(job, attempt)]
        gang[labels[INDEX]] = pod
        if len(gang) == nodes_of(pod):
            self._later(lambda: self._meet_fate(job, attempt, gang))

    def _meet_fate(self, job: str, attempt: int, gang: dict[str, Object]) -> None:
        fates = self.fates[job]
        if attempt > len(fates):
            self.problems.append(f"{job} has an attempt {attempt} after {fates}")
            return
        pod = gang[self.random.choice(sorted(gang))]
        match fates[attempt - 1]:
            case "done":
                for index, other in sorted(gang.items()):
                    self.end(other, 0, self.words["done"] if index == "0" else "")
            case "crash":
                self.end(pod, 1, "RuntimeError: boom")
            case "user":
                self.end(pod, 65, INVALID)
            case "delete":
                self._send("DELETE", pod, "")
            case "evict":
                body = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": pod["metadata"]["name"]}}
                self._send("POST", pod, "/eviction", body)
            case "run":
                pass

    def end(self, pod: Object, code: int, message: str) -> None:
        state = {"exitCode": code, "reason": "Error" if code else "Completed", "message": message, "finishedAt": now()}
        self.play(pod, "Failed" if code else "Succeeded", {"terminated": state})

    def play(self, pod: Object, phase: str, state: Object, ready: bool = False) -> None:
        container = {"name": "main", "image": "i", "imageID": "", "ready": ready, "restartCount": 0, "state": state}
        conditions = [{"type": "Ready", "status": str(ready)}]
        status = {"phase": phase, "conditions": conditions, "containerStatuses": [container]}
        # The uid: a pod of the name that came later is another one.
        self._send("PATCH", pod, "/status", {"metadata": {"uid": pod["metadata"]["uid"]}, "status": status})

    def _send(self, method: str, pod: Object, part: str, body: Object | None = None) -> None:
        path = f"/api/v1/namespaces/{self.namespace}/pods/{pod['metadata']['name']}{part}"
        try:
            self.api.request(method, path, body)
        except Refused as error:
            if error.status not in (404, 409):  # it went in the meantime, as pods do
                self.problems.append(f"{method} {path}: {error}")


class Witness:
    """Watches the worker Jobs of a namespace: no attempt twice, and never two alive."""

    def __init__(self, account: Account, namespace: str) -> None:
        self.account = account
        self.namespace = namespace
        self.problems: list[str] = []
        self.uids: dict[str, set[str]] = defaultdict(set)
        """Of all Jobs there ever were, by name."""
        self._alive: dict[str, set[str]] = defaultdict(set)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join(30)

    def _watch(self) -> None:
        api = Api(self.account)
        path = f"/apis/batch/v1/namespaces/{self.namespace}/jobs"
        for kind, job in api.watch(path, self._stopped.is_set, "kubetune.io/role"):
            if kind != "TICK":
                self._take(kind, job)
        api.close()

    def _take(self, kind: str, job: Object) -> None:
        metadata = job["metadata"]
        self.uids[metadata["name"]].add(metadata["uid"])
        owner = metadata["labels"].get("kubetune.io/job")
        if owner is None:
            return  # a staging Job is made again for those who come when it is over
        if len(self.uids[metadata["name"]]) > 1:
            self.problems.append(f"Job {metadata['name']} was made twice")
        over = {item["type"] for item in job.get("status", {}).get("conditions") or [] if item["status"] == "True"}
        ended = kind == "DELETED" or "deletionTimestamp" in metadata or over & {"Complete", "Failed", "FailureTarget"}
        (self._alive[owner].discard if ended else self._alive[owner].add)(metadata["name"])
        if len(self._alive[owner]) > 1:
            self.problems.append(f"{sorted(self._alive[owner])} are alive together")


def nodes_of(pod: Object) -> int:
    """The size of a worker pod's gang."""
    variables = {item["name"]: item.get("value") for item in pod["spec"]["containers"][0]["env"]}
    return int(variables["PET_NNODES"])


def now() -> str:
    return dt.datetime.now(dt.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
