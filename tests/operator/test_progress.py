"""The progress endpoint: who may report what, what is shown when, and its neighbours for health and metrics."""

import asyncio
import contextlib
import datetime as dt
import ssl
from typing import NamedTuple

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from kubetune_contract.paths import PROGRESS_PATH
from kubetune_contract.progress import Progress, ProgressReport
from kubetune_operator import endpoint
from kubetune_operator.endpoint import Guard, health_app, keep_certificate_fresh, serve, server_context
from kubetune_operator.errors import Unreachable
from kubetune_operator.metrics import Metrics
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


# ---------------------------------------------------------------- too often, too slow, too many


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


async def test_a_client_that_never_ends_its_report_is_cut_off(worker, monkeypatch):
    monkeypatch.setattr(endpoint, "REQUEST_SECONDS", 0.05)
    taken = []

    async def authenticate(_: str) -> Pod:
        return Pod()

    server = ProgressServer(authenticate, lambda *_: worker, lambda *arguments: taken.append(arguments))
    runner, port = await _served(server.app())
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = "POST /v1/progress/team/bot/1 HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer t\r\nContent-Length: 50\r\n\r\n{"
    writer.write(head.encode())
    async with asyncio.timeout(DEADLINE):
        assert (await reader.readline()).startswith(b"HTTP/1.1 408")
    writer.close()
    await runner.cleanup()
    assert taken == []


async def _served(app: web.Application):
    runner = await serve(app, 0)
    return runner, next(address[1] for address in runner.addresses if len(address) == 2)


async def test_a_connection_on_which_nothing_comes_is_closed(monkeypatch):
    monkeypatch.setattr(endpoint, "IDLE_SECONDS", 0.1)
    app = web.Application()
    runner, port = await _served(app)
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    async with asyncio.timeout(DEADLINE):
        with contextlib.suppress(ConnectionError):
            assert await reader.read() == b""
    writer.close()
    await runner.cleanup()


class Idle:
    """A connection as the guard sees it."""

    def __init__(self) -> None:
        self.closed = False
        self.transport = self

    def abort(self) -> None:
        self.closed = True


def test_of_too_many_connections_the_oldest_idle_ones_are_closed(monkeypatch):
    monkeypatch.setattr(endpoint, "MOST_CONNECTIONS", 2)
    guard, connections = Guard(), [Idle() for _ in range(2)]
    guard.close_idle(connections, now=100)
    connections += [Idle(), Idle()]
    guard._busy.add(connections[0])
    guard.close_idle(connections, now=101)
    assert [found.closed for found in connections] == [False, True, True, False]


# ---------------------------------------------------------------- two replicas


@pytest.fixture
async def replicas(worker, tmp_path):
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


async def test_tokens_are_not_given_to_somebody_with_another_certificate(replicas, tmp_path):
    """The address stands in the Lease; whoever could write there must not get the workers' tokens."""
    (tmp_path / "other").mkdir()
    impostor = await serve(web.Application(), 0, server_context(*certificate(tmp_path / "other", "elsewhere")))
    port = next(address[1] for address in impostor.addresses if len(address) == 2)
    replicas.state["address"] = f"127.0.0.1:{port}"
    assert (await post(replicas))[0] == 503
    await impostor.cleanup()


# ---------------------------------------------------------------- TLS


def certificate(folder, name: str = "localhost", serial: int = 1):
    """A self-signed certificate in two files."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    start = dt.datetime.now(dt.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(serial)
        .not_valid_before(start - dt.timedelta(minutes=1))
        .not_valid_after(start + dt.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    (folder / "tls.crt").write_bytes(made.public_bytes(pem))
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (folder / "tls.key").write_bytes(private)
    return folder / "tls.crt", folder / "tls.key"


@pytest.fixture
async def secure(tmp_path):
    """serve() with TLS on a free port: (port, certificate file, key file, context)."""
    files = certificate(tmp_path)
    context = server_context(*files)
    app = web.Application()
    app.router.add_get("/", _hello)
    runner = await serve(app, 0, context)
    # Port 0 is another free port for IPv4 than for IPv6; only the first has addresses of two parts.
    port = next(address[1] for address in runner.addresses if len(address) == 2)
    yield port, *files, context
    await runner.cleanup()


async def _hello(_: web.Request) -> web.Response:
    return web.Response(text="hello")


async def get(port: int, trusted) -> str:
    context = ssl.create_default_context(cafile=trusted)
    async with aiohttp.ClientSession() as session, session.get(f"https://localhost:{port}/", ssl=context) as answer:
        return await answer.text()


async def test_the_endpoint_shows_the_mounted_certificate(secure):
    port, file, *_ = secure
    assert await get(port, file) == "hello"


async def test_the_endpoint_speaks_no_old_tls(secure):
    *_, context = secure
    assert context.minimum_version == ssl.TLSVersion.TLSv1_2


async def test_a_renewed_certificate_is_used_for_new_connections(secure, monkeypatch):
    """Secrets are renewed in place: a restart for it would cut running trainings off."""
    port, file, key, context = secure
    monkeypatch.setattr(endpoint, "RELOAD_SECONDS", 0.01)
    task = asyncio.create_task(keep_certificate_fresh(context, file, key))
    await asyncio.sleep(0)
    certificate(file.parent, serial=2)
    async with asyncio.timeout(DEADLINE):
        while True:
            try:
                assert await get(port, file) == "hello"
                break
            except aiohttp.ClientConnectorCertificateError:
                await asyncio.sleep(0.01)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_a_broken_renewal_keeps_the_old_certificate(secure, monkeypatch, caplog, tmp_path_factory):
    port, file, key, context = secure
    trusted = tmp_path_factory.mktemp("old") / "ca.crt"
    trusted.write_bytes(file.read_bytes())
    monkeypatch.setattr(endpoint, "RELOAD_SECONDS", 0.01)
    task = asyncio.create_task(keep_certificate_fresh(context, file, key))
    await asyncio.sleep(0)
    file.write_text("half a file")
    async with asyncio.timeout(DEADLINE):
        while "cannot load the renewed certificate" not in caplog.text:
            await asyncio.sleep(0.01)
    assert await get(port, trusted) == "hello"
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


# ---------------------------------------------------------------- health and metrics


@pytest.fixture
async def health():
    """The health endpoint; `wrong` decides."""
    wrong = {"alive": None, "ready": "the caches are being filled"}
    metrics = Metrics()
    app = health_app(metrics, lambda: wrong["alive"], lambda: wrong["ready"])
    async with TestClient(TestServer(app)) as client:
        client.wrong, client.metrics = wrong, metrics
        yield client


async def test_the_operator_is_alive_before_it_is_ready(health):
    assert (await health.get("/healthz")).status == 200
    refused = await health.get("/readyz")
    assert (refused.status, await refused.text()) == (503, "the caches are being filled")
    health.wrong["ready"] = None
    assert (await health.get("/readyz")).status == 200


async def test_an_operator_that_should_be_started_anew_says_why(health):
    health.wrong["alive"] = "a reconcile has been under way for 400 s"
    refused = await health.get("/healthz")
    assert (refused.status, await refused.text()) == (503, "a reconcile has been under way for 400 s")


async def test_metrics_are_served_as_text(health):
    health.metrics.count_jobs([("Running", "Running")])
    answer = await health.get("/metrics")
    assert answer.headers["Content-Type"].startswith("text/plain")
    assert 'kubetune_jobs{reason="Running",state="Running"} 1.0' in await answer.text()
