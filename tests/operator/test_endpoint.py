"""How the operator serves: its certificate, clients that are slow, idle or too many, and its neighbours for probes."""

import asyncio
import contextlib
import ssl

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

from kubetune_operator import endpoint
from kubetune_operator.endpoint import Guard, health_app, keep_certificate_fresh, serve, server_context
from kubetune_operator.metrics import Metrics

DEADLINE = 5.0


# ---------------------------------------------------------------- TLS


@pytest.fixture
async def secure(tmp_path, certificate):
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


async def test_a_renewed_certificate_is_used_for_new_connections(secure, certificate, monkeypatch):
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


# ---------------------------------------------------------------- too slow, too many


async def test_a_client_that_never_ends_its_request_is_cut_off(monkeypatch):
    monkeypatch.setattr(endpoint, "REQUEST_SECONDS", 0.05)
    taken = []

    async def take(request: web.Request) -> web.Response:
        taken.append(await request.read())
        return web.Response()

    app = web.Application()
    app.router.add_post("/", take)
    runner, port = await _served(app)
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 50\r\n\r\n{")
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
