"""The progress endpoint: who may report what, what is shown when, and how two replicas share the work."""

from typing import NamedTuple

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

from kubetune_contract.paths import PROGRESS_PATH
from kubetune_contract.progress import Progress, ProgressReport
from kubetune_operator.endpoint import serve, server_context
from kubetune_operator.errors import Unreachable
from kubetune_operator.progress import BODY_LIMIT, FORWARDED, Limiter, ProgressServer, ProgressStore, Relay, may_report

DEADLINE = 5.0


class Pod(NamedTuple):
    """The pod of a token."""

    namespace: str = "team"
    pod: str = "bot-a1-0-x0"
    uid: str = "bot-a1-0-uid"


def report(step: int = 1, total: int = 50) -> ProgressReport:
    return ProgressReport(progress=Progress(step=step, total_steps=total, epoch=0, percentage=step))


# ---------------------------------------------------------------- the store


@pytest.fixture
def store() -> ProgressStore:
    return ProgressStore(interval=10)


def test_the_first_report_is_shown_at_once(store):
    assert store.put("team/bot", 1, "pod", report(1), now=100) == 0
    assert store.shown("team/bot", 1, now=100).progress.step == 1


def test_a_further_report_is_shown_when_the_interval_is_over(store):
    """Else each status write would lead to the next: its event looks at the job again."""
    store.put("team/bot", 1, "pod", report(1), now=100)
    assert store.put("team/bot", 1, "pod", report(2), now=102) == 8
    assert store.shown("team/bot", 1, now=109.9).progress.step == 1
    assert store.shown("team/bot", 1, now=110).progress.step == 2


def test_the_newest_of_several_reports_is_shown(store):
    store.put("team/bot", 1, "pod", report(1), now=100)
    for step in (2, 3, 4):
        store.put("team/bot", 1, "pod", report(step), now=100 + step)
    assert store.shown("team/bot", 1, now=111).progress.step == 4
    assert store.put("team/bot", 1, "pod", report(5), now=112) == 9


def test_the_last_report_is_shown_at_once(store):
    store.put("team/bot", 1, "pod", report(1), now=100)
    assert store.put("team/bot", 1, "pod", report(50), now=101) == 0
    assert store.shown("team/bot", 1, now=101).progress.step == 50


def test_a_report_that_overtook_another_stays(store):
    store.put("team/bot", 1, "pod", report(5), now=100)
    assert store.put("team/bot", 1, "pod", report(4), now=101) is None
    assert store.shown("team/bot", 1, now=120).progress.step == 5


def test_another_attempt_starts_anew(store):
    store.put("team/bot", 1, "pod", report(40), now=100)
    assert store.put("team/bot", 2, "pod-2", report(20), now=101) == 0
    assert store.shown("team/bot", 1, now=120) is None
    assert store.shown("team/bot", 2, now=120).progress.step == 20


def test_a_resumed_pod_of_the_same_attempt_starts_anew(store):
    """After a suspension training goes on from the checkpoint, which may be behind."""
    store.put("team/bot", 1, "pod", report(40), now=100)
    assert store.put("team/bot", 1, "pod-2", report(20), now=101) == 0
    assert store.shown("team/bot", 1, now=101).progress.step == 20


def test_a_straggler_of_an_earlier_attempt_is_not_taken(store):
    store.put("team/bot", 2, "pod-2", report(20), now=100)
    assert store.put("team/bot", 1, "pod", report(45), now=101) is None
    assert store.shown("team/bot", 2, now=120).progress.step == 20


def test_jobs_do_not_mix(store):
    store.put("team/bot", 1, "pod", report(1), now=100)
    store.put("else/bot", 1, "pod", report(2), now=100)
    assert store.shown("team/bot", 1, now=100).progress.step == 1


def test_a_forgotten_job_shows_nothing(store):
    store.put("team/bot", 1, "pod", report(1), now=100)
    store.forget("team/bot")
    store.forget("team/never")
    assert store.shown("team/bot", 1, now=100) is None


# ---------------------------------------------------------------- who may report


@pytest.fixture
def worker(job, attempt_job, pod):
    """A worker pod of attempt 1 of job `bot`."""
    return pod(attempt_job(job(), 1))


def test_a_worker_may_report_on_its_own_attempt(worker):
    assert may_report(worker, Pod(), "bot", 1)


@pytest.mark.parametrize(
    ("identity", "name", "attempt"),
    [
        (Pod(uid="a namesake's"), "bot", 1),
        (Pod(), "other", 1),
        (Pod(), "bot", 2),
    ],
    ids=["a pod of that name that is gone", "another job", "another attempt"],
)
def test_a_worker_may_not_report_on(worker, identity, name, attempt):
    assert not may_report(worker, identity, name, attempt)


def test_a_pod_that_is_not_known_may_not_report():
    assert not may_report(None, Pod(), "bot", 1)


def test_a_staging_pod_may_not_report(job, stage_job, pod):
    stager = pod(stage_job(job()))
    stager["metadata"]["labels"] |= {"kubetune.io/job": "bot", "kubetune.io/attempt": "1"}
    assert not may_report(stager, Pod(uid=stager["metadata"]["uid"]), "bot", 1)


# ---------------------------------------------------------------- over HTTP


@pytest.fixture
async def server(worker):
    """The endpoint without TLS, with one worker; what it took is in `taken`, tokens are in `tokens`."""
    tokens: dict[str, Pod] = {"good": Pod(), "other": Pod(namespace="else")}
    taken = []

    async def authenticate(token: str) -> Pod | None:
        if token == "unlucky":
            raise Unreachable("the API server is restarting")
        return tokens.get(token)

    def pod_of(namespace: str, name: str):
        return worker if (namespace, name) == ("team", worker["metadata"]["name"]) else None

    app = ProgressServer(authenticate, pod_of, lambda *arguments: taken.append(arguments)).app()
    async with TestClient(TestServer(app)) as client:
        client.taken = taken
        yield client


async def post(server, path="/v1/progress/team/bot/1", token: str | None = "good", data: str | None = None):
    headers = {"Authorization": f"Bearer {token}"} if token is not None else {}
    answer = await server.post(path, data=report().to_json() if data is None else data, headers=headers)
    return answer.status, await answer.text()


def test_the_path_is_the_contracts():
    assert PROGRESS_PATH.format(namespace="team", name="bot", attempt=1) == "/v1/progress/team/bot/1"


async def test_a_report_of_the_jobs_own_worker_is_taken(server):
    assert await post(server) == (204, "")
    assert server.taken == [("team", "bot", 1, "bot-a1-0-uid", report())]


REFUSED = [
    ("no token", {"token": None}, 401, "a token of the pod"),
    ("an empty token", {"token": ""}, 401, "a token of the pod"),
    ("an unknown token", {"token": "guess"}, 401, "a token of the pod"),
    ("another job", {"path": "/v1/progress/team/other/1"}, 403, "does not work on this attempt"),
    ("another attempt", {"path": "/v1/progress/team/bot/2"}, 403, "does not work on this attempt"),
    ("another namespace", {"path": "/v1/progress/else/bot/1"}, 403, "does not work on this attempt"),
    ("a pod of another namespace", {"token": "other"}, 403, "pod else/bot-a1-0-x0 does not"),
    ("no attempt", {"path": "/v1/progress/team/bot/x"}, 404, ""),
    ("an attempt beyond all numbers", {"path": "/v1/progress/team/bot/12345678901"}, 404, ""),
    ("no JSON", {"data": "step 5"}, 400, ""),
    (
        "an unknown field",
        {"data": '{"progress": {"step": 1, "stp": 2}}'},
        400,
        "stp: unknown field; did you mean step?",
    ),
    ("a negative step", {"data": '{"progress": {"step": -1}}'}, 400, "step"),
    ("far too much", {"data": "x" * (BODY_LIMIT + 1)}, 413, ""),
    ("a time at which nobody can check", {"token": "unlucky"}, 503, "try again"),
]


@pytest.mark.parametrize(("arguments", "status", "says"), [case[1:] for case in REFUSED], ids=[c[0] for c in REFUSED])
async def test_what_is_refused(server, arguments, status, says):
    answer = await post(server, **arguments)
    assert answer[0] == status
    assert says in answer[1]
    assert server.taken == []


async def test_another_scheme_is_refused(server):
    answer = await server.post("/v1/progress/team/bot/1", data="{}", headers={"Authorization": "Basic good"})
    assert answer.status == 401


async def test_reports_can_only_be_posted(server):
    assert (await server.get("/v1/progress/team/bot/1")).status == 405


# ---------------------------------------------------------------- too often


def test_a_limit_fills_up_with_time():
    limiter = Limiter(rate=0.5, burst=2)
    for allowed in (True, True, False):
        assert limiter.allows("pod", now=100) is allowed
        limiter.count("pod", now=100)
    assert not limiter.allows("pod", now=101.9)
    assert limiter.allows("pod", now=102)
    assert limiter.allows("another", now=100)
    for _ in range(9):
        limiter.count("pod", now=102)
    assert limiter.allows("pod", now=104), "what was refused is not owed"


def test_a_limit_does_not_fill_the_memory(monkeypatch):
    monkeypatch.setattr("kubetune_operator.progress.MEMORY_SIZE", 3)
    limiter = Limiter(rate=1, burst=1)
    for number in range(20):
        limiter.count(str(number), now=100)
    assert len(limiter._left) <= 3


async def test_a_pod_that_reports_all_the_time_is_slowed_down(server):
    answers = [(await post(server))[0] for _ in range(12)]
    assert answers == [204] * 10 + [429] * 2
    assert len(server.taken) == 10


async def test_who_guesses_tokens_is_not_listened_to(server):
    answers = [(await post(server, token=f"guess {number}"))[0] for number in range(22)]
    assert answers == [401] * 20 + [429] * 2
    assert (await post(server))[0] == 429


# ---------------------------------------------------------------- two replicas


@pytest.fixture
async def replicas(worker, certificate, tmp_path):
    """(standby, leader's taken reports, what the standby is told): two endpoints, the leader behind TLS."""
    files = certificate(tmp_path)
    taken: list[object] = []
    outcomes: list[str] = []

    async def authenticate(token: str) -> Pod | None:
        return Pod() if token == "good" else None

    def app(**options) -> web.Application:
        return ProgressServer(authenticate, lambda *_: worker, lambda *found: taken.append(found), **options).app()

    runner = await serve(app(), 0, server_context(*files))
    port = next(address[1] for address in runner.addresses if len(address) == 2)
    state = {"address": f"127.0.0.1:{port}"}
    relay = Relay(lambda: state["address"], files[0], "localhost")
    standby = app(relay=relay, leads=lambda: False, told=outcomes.append)
    async with TestClient(TestServer(standby)) as client:
        client.taken, client.outcomes, client.state, client.files = taken, outcomes, state, files
        yield client
    await relay._close()
    await runner.cleanup()


async def test_a_standby_hands_a_report_over_to_the_leader(replicas):
    assert await post(replicas) == (204, "")
    assert replicas.taken == [("team", "bot", 1, "bot-a1-0-uid", report())]
    assert replicas.outcomes == ["taken"]


async def test_a_standby_refuses_by_itself_what_the_leader_would(replicas):
    assert (await post(replicas, token="guess"))[0] == 401
    assert (await post(replicas, path="/v1/progress/team/other/1"))[0] == 403
    assert (await post(replicas, data="x"))[0] == 400
    assert (replicas.taken, replicas.outcomes) == ([], ["unauthenticated", "forbidden", "invalid"])


async def test_while_nobody_leads_a_report_is_put_off(replicas):
    replicas.state["address"] = None
    assert await post(replicas) == (503, "no replica leads at the moment")


async def test_a_leader_that_has_just_died_is_told_as_such(replicas):
    replicas.state["address"] = "127.0.0.1:9"
    assert await post(replicas) == (503, "the leader cannot be reached now")


async def test_a_report_is_handed_over_once_at_most(replicas):
    headers = {"Authorization": "Bearer good", FORWARDED: "true"}
    answer = await replicas.post("/v1/progress/team/bot/1", data=report().to_json(), headers=headers)
    assert (answer.status, await answer.text()) == (503, "this replica does not lead")


async def test_tokens_are_not_given_to_somebody_with_another_certificate(replicas, certificate, tmp_path):
    """The address stands in the Lease; whoever could write there must not get the workers' tokens."""
    (tmp_path / "other").mkdir()
    impostor = await serve(web.Application(), 0, server_context(*certificate(tmp_path / "other", "elsewhere")))
    port = next(address[1] for address in impostor.addresses if len(address) == 2)
    replicas.state["address"] = f"127.0.0.1:{port}"
    assert (await post(replicas))[0] == 503
    await impostor.cleanup()
