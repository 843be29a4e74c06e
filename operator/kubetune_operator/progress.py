"""The endpoint to which trainers report, and what they last said.

A report is taken from a worker pod of the very attempt that it is about, and from nobody else.
"""

import logging
import ssl
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

import aiohttp
from aiohttp import web
from pydantic import ValidationError

from kubetune_contract.errors import explain
from kubetune_contract.paths import PROGRESS_PATH
from kubetune_contract.progress import ProgressReport
from kubetune_operator.errors import OperatorError
from kubetune_operator.names import ATTEMPT_LABEL, JOB_LABEL, ROLE_LABEL, WORKER

BODY_LIMIT: Final = 64 * 1024
"""Bytes of one report."""
RELAY_SECONDS: Final = 4.0
"""In which the leader must answer another replica; a trainer waits for 5 s."""
MEMORY_SIZE: Final = 10000
"""Pods and addresses whose reports are counted. More of them are all forgotten."""
FORWARDED: Final = "X-Kubetune-Forwarded"
"""Header of a report that another replica hands over: it is handed over once at most."""
OUTCOMES: Final = {
    204: "taken",
    401: "unauthenticated",
    403: "forbidden",
    413: "too_large",
    429: "throttled",
    503: "unavailable",
}
"""How requests went, by the code of the answer; every other code is `invalid`."""

log = logging.getLogger(__name__)


class Identity(Protocol):
    """The pod that a token was made for."""

    @property
    def namespace(self) -> str: ...  # noqa: D102
    @property
    def pod(self) -> str: ...  # noqa: D102
    @property
    def uid(self) -> str: ...  # noqa: D102


@dataclass
class _Slot:
    attempt: int
    pod_uid: str
    latest: ProgressReport
    shown: ProgressReport
    shown_at: float


class ProgressStore:
    """The reports of all jobs, in memory. What is shown changes at most once in `interval` seconds per job.

    Times are any clock's seconds that only go forward.
    """

    def __init__(self, interval: float) -> None:
        self._interval = interval
        self._slots: dict[str, _Slot] = {}

    def put(self, key: str, attempt: int, pod_uid: str, report: ProgressReport, now: float) -> float | None:
        """Take a report. Returns in how many seconds the job should be looked at; None if it tells nothing new."""
        slot = self._slots.get(key)
        if slot is None or (slot.attempt, slot.pod_uid) != (attempt, pod_uid):
            if slot is not None and slot.attempt > attempt:
                return None
            self._slots[key] = _Slot(attempt, pod_uid, report, report, now)
            return 0.0
        if report.progress.step < slot.latest.progress.step:
            return None
        slot.latest = report
        done = report.progress.step >= report.progress.total_steps
        wait = 0.0 if done else max(0.0, slot.shown_at + self._interval - now)
        if wait == 0.0:
            slot.shown, slot.shown_at = report, now
        return wait

    def shown(self, key: str, attempt: int, now: float) -> ProgressReport | None:
        """The report of that attempt to show now."""
        slot = self._slots.get(key)
        if slot is None or slot.attempt != attempt:
            return None
        if now >= slot.shown_at + self._interval and slot.shown is not slot.latest:
            slot.shown, slot.shown_at = slot.latest, now
        return slot.shown

    def forget(self, key: str) -> None:
        """The job is over or gone."""
        self._slots.pop(key, None)


def may_report(pod: dict[str, Any] | None, identity: Identity, name: str, attempt: int) -> bool:
    """Whether the cached pod is the token's pod and works on that attempt of that job."""
    if pod is None or pod["metadata"]["uid"] != identity.uid:
        return False
    labels = pod["metadata"].get("labels", {})
    wanted = {ROLE_LABEL: WORKER, JOB_LABEL: name, ATTEMPT_LABEL: str(attempt)}
    return all(labels.get(label) == value for label, value in wanted.items())


class Limiter:
    """How often somebody may do something: `rate` times a second, `burst` times at once. Times only go forward."""

    def __init__(self, rate: float, burst: int) -> None:
        self._rate = rate
        self._burst = burst
        self._left: dict[str, tuple[float, float]] = {}

    def allows(self, who: str, now: float) -> bool:
        """Whether it may be done once more now."""
        return self._now(who, now) >= 1.0

    def count(self, who: str, now: float) -> None:
        """It was done."""
        left = self._now(who, now) - 1.0
        if len(self._left) >= MEMORY_SIZE:
            self._left.clear()
        self._left[who] = (max(0.0, left), now)

    def _now(self, who: str, now: float) -> float:
        left, then = self._left.get(who, (float(self._burst), now))
        return min(float(self._burst), left + (now - then) * self._rate)


class Relay:
    """Hands reports over to the replica that leads, over the same TLS as a worker would."""

    def __init__(self, leader: Callable[[], str | None], ca_file: Path, host: str) -> None:
        """`leader` says host:port of another replica that leads; its certificate must be for `host`."""
        self._leader = leader
        self._ca_file = ca_file
        self._host = host
        self._session: aiohttp.ClientSession | None = None

    async def __call__(self, path: str, token: str, body: bytes) -> web.Response:
        """The leader's answer, or 503."""
        address = self._leader()
        if address is None:
            return _unavailable("no replica leads at the moment")
        headers = {"Authorization": f"Bearer {token}", FORWARDED: "true"}
        try:
            async with self._open().post(
                f"https://{address}{path}", data=body, headers=headers, server_hostname=self._host
            ) as answer:
                return web.Response(status=answer.status, text=await answer.text())
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            log.warning("cannot hand a report over to the leader at %s: %s", address, str(error) or "no answer")
            await self._close()  # the authority's file may have been renewed
            return _unavailable("the leader cannot be reached now")

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            trust = ssl.create_default_context(cafile=str(self._ca_file))
            timeout = aiohttp.ClientTimeout(total=RELAY_SECONDS)
            self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=trust), timeout=timeout)
        return self._session

    async def _close(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            await session.close()


class ProgressServer:
    """The HTTP side of the store. Every replica checks reports; the leader takes them, another one hands them over."""

    def __init__(
        self,
        authenticate: Callable[[str], Awaitable[Identity | None]],
        pod_of: Callable[[str, str], dict[str, Any] | None],
        take: Callable[[str, str, int, str, ProgressReport], None],
        *,
        relay: Callable[[str, str, bytes], Awaitable[web.Response]] | None = None,
        leads: Callable[[], bool] = lambda: True,
        told: Callable[[str], None] = lambda _: None,
    ) -> None:
        """`take` gets namespace, name, attempt, the pod's uid and the report; `told` how each request went."""
        self._authenticate = authenticate
        self._pod_of = pod_of
        self._take = take
        self._relay = relay
        self._leads = leads
        self._told = told
        self._wrong = Limiter(rate=0.2, burst=20)
        self._pods = Limiter(rate=1.0, burst=10)

    def app(self) -> web.Application:
        """The application behind TLS."""
        app = web.Application(client_max_size=BODY_LIMIT)
        app.router.add_post(PROGRESS_PATH.replace("{attempt}", r"{attempt:\d{1,9}}"), self._report)
        return app

    async def _report(self, request: web.Request) -> web.Response:
        try:
            answer = await self._answer(request)
        except web.HTTPException as error:
            self._told(OUTCOMES.get(error.status, "invalid"))
            raise
        self._told(OUTCOMES.get(answer.status, "invalid"))
        return answer

    async def _answer(self, request: web.Request) -> web.Response:
        namespace, name, attempt = (request.match_info[part] for part in ("namespace", "name", "attempt"))
        now, client = time.monotonic(), request.remote or ""
        if not self._wrong.allows(client, now):
            return _too_often("too many wrong tokens from this address")
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        try:
            identity = await self._authenticate(token) if scheme == "Bearer" and token else None
        except OperatorError as error:
            log.warning("cannot check a token: %s", error)
            return _unavailable("the API server cannot check the token now; try again")
        if identity is None:
            self._wrong.count(client, now)
            return web.Response(status=401, text="a token of the pod for the progress audience is required")
        pod = self._pod_of(identity.namespace, identity.pod)
        if identity.namespace != namespace or not may_report(pod, identity, name, int(attempt)):
            return web.Response(
                status=403, text=f"pod {identity.namespace}/{identity.pod} does not work on this attempt"
            )
        if not self._pods.allows(identity.uid, now):
            return _too_often("a pod may report once a second")
        self._pods.count(identity.uid, now)
        return await self._accept(request, token, identity)

    async def _accept(self, request: web.Request, token: str, identity: Identity) -> web.Response:
        body = await request.read()
        try:
            report = ProgressReport.model_validate_json(body)
        except ValidationError as error:
            return web.Response(status=400, text="; ".join(explain(error, ProgressReport)))
        if self._leads():
            found = request.match_info
            self._take(found["namespace"], found["name"], int(found["attempt"]), identity.uid, report)
            return web.Response(status=204)
        if self._relay is None or FORWARDED in request.headers:
            return _unavailable("this replica does not lead")
        return await self._relay(request.path, token, body)


def _unavailable(text: str) -> web.Response:
    return web.Response(status=503, text=text, headers={"Retry-After": "2"})


def _too_often(text: str) -> web.Response:
    return web.Response(status=429, text=text, headers={"Retry-After": "2"})
