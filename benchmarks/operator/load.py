"""The users and the kubelets: FineTuneJobs are submitted at a rate, their pods' status is played, all is noted.

One event loop over one API server. A worker comes up as soon as its pod is seen, and ends well as soon as its
FineTuneJob is seen to be Running, so every state of a job's life is written; `hold` keeps the workers running.
"""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Coroutine
from typing import Any, Final, Self

import aiohttp
from tests.integration.operator.conftest import DONE, STAGED
from tests.integration.operator.kubelet import now
from tests.integration.operator.server import Account

from kubetune_operator import api
from kubetune_operator.names import ATTEMPT_LABEL, JOB_LABEL, OPERATOR_LABEL, ROLE_LABEL, STAGE

Object = dict[str, Any]
SECONDS: Final = 120.0
"""In which something must happen that is waited for."""
STAGE_SECONDS: Final = 1.0
"""How long a staging pod works: no real one is faster."""
MERGE: Final = "application/merge-patch+json"


class Api:
    """Requests to an API server."""

    def __init__(self, account: Account) -> None:
        connector = aiohttp.TCPConnector(ssl=account.context, limit=0)
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=30)
        base = f"https://{account.host}:{account.port}"
        self._session = aiohttp.ClientSession(base, connector=connector, timeout=timeout, read_bufsize=1 << 22)

    async def request(self, method: str, path: str, body: Object | None = None) -> Object:
        """One request and its answer. Raises aiohttp.ClientResponseError."""
        headers = {"Content-Type": MERGE if method == "PATCH" else "application/json"}
        async with self._session.request(method, path, json=body, headers=headers) as answer:
            if answer.status >= 400:
                told = await answer.text()
                raise aiohttp.ClientResponseError(
                    answer.request_info, (), status=answer.status, message=f"{method} {path}: {told[:500]}"
                )
            return dict(json.loads(await answer.read()))

    async def watch(self, path: str, selector: str = "") -> AsyncIterator[tuple[str, Object]]:
        """What there is and what happens to it."""
        query = f"labelSelector={selector}&" if selector else ""
        listed = await self.request("GET", f"{path}?{query}")
        for item in listed["items"]:
            yield "ADDED", item
        version = listed["metadata"]["resourceVersion"]
        while True:
            url = f"{path}?{query}watch=1&resourceVersion={version}&timeoutSeconds=600"
            async with self._session.get(url) as answer:
                answer.raise_for_status()
                async for line in answer.content:
                    event = json.loads(line)
                    if event["type"] == "ERROR":
                        raise RuntimeError(f"the watch of {path} broke: {event['object']}")
                    version = event["object"]["metadata"]["resourceVersion"]
                    yield event["type"], event["object"]

    async def close(self) -> None:
        """Close the connections."""
        await self._session.close()


class Load:
    """FineTuneJobs of one namespace. Times are time.monotonic()'s."""

    def __init__(self, account: Account, namespace: str, operator: str) -> None:
        """`operator` is the name of the one that handles them."""
        self._account = account
        self.namespace = namespace
        self._operator = operator
        self.hold = False
        """Whether workers keep running."""
        self.sent: dict[str, float] = {}
        """When the request that creates a job was sent, by the job's name."""
        self.child: dict[str, float] = {}
        """When a watch first showed a Job of a job: its own one, or a staging Job that it has joined."""
        self.states: dict[str, str] = {}
        """The last state of a job that a watch showed."""
        self.ended: dict[str, float] = {}
        """When a watch showed that a job has Succeeded."""
        self.pods: dict[str, Object] = {}
        """The worker pod of each job: all have one."""
        self._changed = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._count = 0

    async def __aenter__(self) -> Self:
        self.api = Api(self._account)
        self._broken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        for part in (self._watch_jobs(), self._watch_pods(), self._watch_finetunejobs()):
            self.spawn(part)
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if not self._broken.done():
            self._broken.cancel()
        await self.api.close()

    # ------------------------------------------------------------ the users' part

    def path(self, kind: str) -> str:
        """The collection of a kind in the namespace."""
        base = {"pods": "/api/v1", "jobs": "/apis/batch/v1"}.get(kind, f"/apis/{api.GROUP}/{api.VERSION}")
        return f"{base}/namespaces/{self.namespace}/{kind}"

    async def submit(self) -> str:
        """Create one more FineTuneJob; its name."""
        self._count += 1
        name = f"job-{self._count}"
        self.sent[name] = time.monotonic()
        await self.api.request("POST", self.path(api.PLURAL), manifest(name, self._operator))
        return name

    async def submit_at(self, rate: float, count: int) -> None:
        """Create so many FineTuneJobs, at so many a second, however long the answers take."""
        begun, tasks = time.monotonic(), []
        for number in range(count):
            await asyncio.sleep(max(0.0, begun + number / rate - time.monotonic()))
            tasks.append(asyncio.create_task(self.submit()))
        await asyncio.gather(*tasks)

    async def keep_going(self, in_flight: int, seconds: float) -> None:
        """For so long, create a FineTuneJob for each that has ended, so that as many are under way."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            missing = in_flight - len(self.sent) + len(self.ended)
            await asyncio.gather(*(self.submit() for _ in range(missing)))
            await self._news(1.0)

    async def until(self, reached: Any, seconds: float = SECONDS) -> None:
        """Wait until a function of the notes says so. Raises TimeoutError."""
        deadline = time.monotonic() + seconds
        while not reached():
            if time.monotonic() > deadline:
                states = [state for name, state in self.states.items() if name not in self.ended]
                raise TimeoutError(
                    f"{len(self.sent)} jobs, {len(self.child)} have a Job, {len(self.ended)} ended; the others are "
                    f"{ {state: states.count(state) for state in set(states)} }"
                )
            await self._news(1.0)

    async def all_ended(self, seconds: float = SECONDS) -> None:
        """Wait until every job has Succeeded."""
        await self.until(lambda: len(self.ended) == len(self.sent), seconds)

    async def _news(self, seconds: float) -> None:
        """Wait for something to happen, but not longer. Raises what broke a part of this."""
        self._changed.clear()
        waiting = asyncio.ensure_future(self._changed.wait())
        either: set[asyncio.Future[Any]] = {waiting, self._broken}
        await asyncio.wait(either, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        if self._broken.done():
            self._broken.result()

    # ------------------------------------------------------------ what is seen

    def spawn(self, part: Coroutine[Any, Any, None]) -> None:
        """Let a part run; an error of it is raised where something is waited for."""
        task = asyncio.create_task(part)
        self._tasks.add(task)
        task.add_done_callback(self._over)

    def _over(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None and not self._broken.done():
            self._broken.set_exception(error)

    async def _watch_jobs(self) -> None:
        async for kind, job in self.api.watch(self.path("jobs"), ROLE_LABEL):
            seen = time.monotonic()
            for owner in job["metadata"].get("ownerReferences") or [] if kind != "DELETED" else []:
                self.child.setdefault(owner["name"], seen)
            self._changed.set()

    async def _watch_finetunejobs(self) -> None:
        async for _, body in self.api.watch(self.path(api.PLURAL)):
            name, state = body["metadata"]["name"], body.get("status", {}).get("state", "")
            if self.states.get(name) == state:
                continue
            self.states[name] = state
            if state == "Succeeded":
                self.ended.setdefault(name, time.monotonic())
            elif state == "Running" and not self.hold:
                self.spawn(self._end(self.pods[name], DONE))
            elif state == "Failed":
                raise RuntimeError(f"{name} has failed: {body['status']['conditions']}")
            self._changed.set()

    async def _watch_pods(self) -> None:
        async for kind, pod in self.api.watch(self.path("pods"), ROLE_LABEL):
            if kind != "ADDED" or pod["status"]["phase"] != "Pending":
                continue
            labels = pod["metadata"]["labels"]
            if labels[ROLE_LABEL] == STAGE:
                self.spawn(self._stage(pod))
            else:
                assert labels[ATTEMPT_LABEL] == "1", f"{pod['metadata']['name']} is of another attempt"
                self.pods[labels[JOB_LABEL]] = pod
                self.spawn(self._run(pod))

    async def _stage(self, pod: Object) -> None:
        await self._run(pod)
        await asyncio.sleep(STAGE_SECONDS)
        await self._end(pod, STAGED)

    async def _run(self, pod: Object) -> None:
        await self._play(pod, "Running", {"running": {"startedAt": now()}}, ready=True)

    async def _end(self, pod: Object, message: str) -> None:
        state = {"exitCode": 0, "reason": "Completed", "message": message, "finishedAt": now()}
        await self._play(pod, "Succeeded", {"terminated": state})

    async def _play(self, pod: Object, phase: str, state: Object, ready: bool = False) -> None:
        container = {"name": "main", "image": "i", "imageID": "", "ready": ready, "restartCount": 0, "state": state}
        conditions = [{"type": "PodScheduled", "status": "True"}, {"type": "Ready", "status": str(ready)}]
        status = {"phase": phase, "conditions": conditions, "containerStatuses": [container]}
        await self.api.request("PATCH", f"{self.path('pods')}/{pod['metadata']['name']}/status", {"status": status})


def manifest(name: str, operator: str) -> Object:
    """A FineTuneJob of one worker. Nobody schedules its pods: what a scheduler costs is no part of the figures."""
    return {
        "apiVersion": api.API_VERSION,
        "kind": api.KIND,
        "metadata": {"name": name, "labels": {OPERATOR_LABEL: operator}},
        "spec": {
            "preset": "llama3/8B_lora",
            "model": {"volumePath": "models/llama"},
            "dataset": {"volumePath": "data/train.jsonl"},
            "workers": {"nodes": 1, "schedulerName": "nobody"},
            "storage": {"models": {"claimName": "models"}, "output": {"claimName": "tuned"}},
        },
    }
