"""Reports to the operator over real HTTPS; no trouble of theirs reaches the training."""

import io
import json
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
import torch

from kubetune_contract.progress import CheckpointStatus, Progress, ProgressReport
from kubetune_trainer import report
from kubetune_trainer.distributed import World
from kubetune_trainer.report import (
    Poster,
    Reporter,
    Step,
)

DEADLINE = 20.0


def world(rank: int = 0) -> World:
    return World(rank, 2, rank, torch.device("cpu"))


def step(number: int, loss: float = 1.5, tokens: int = 100) -> Step:
    return Step(number, loss, learning_rate=1e-3, gradient_norm=0.5, tokens=tokens, label_tokens=tokens // 4)


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE
    while not holds():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


@contextmanager
def operator(folder: Path, tls: bool = True, status: int = 204) -> Iterator[tuple[str, list[tuple[str, Any]]]]:
    """A server that takes reports: its URL and the (authorization, body) of each request."""
    received: list[tuple[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            received.append((self.headers["Authorization"], json.loads(body)))
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    if tls:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(write_certificate(folder))
        server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"{'https' if tls else 'http'}://127.0.0.1:{server.server_port}/v1/progress/team/job/1", received
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def write_certificate(folder: Path) -> Path:
    """A self-signed certificate for 127.0.0.1 as ca.crt, and with its key as the file that is returned."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "operator")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder(
            name, name, key.public_key(), x509.random_serial_number(), now, now + timedelta(hours=1)
        )
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    public = certificate.public_bytes(serialization.Encoding.PEM)
    plain = serialization.NoEncryption()
    private = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain)
    (folder / "ca.crt").write_bytes(public)
    (folder / "server.pem").write_bytes(private + public)
    return folder / "server.pem"


def at(number: int) -> ProgressReport:
    return ProgressReport(progress=Progress(step=number, total_steps=1000, epoch=0, percentage=0))


@pytest.fixture
def token(tmp_path: Path) -> Path:
    path = tmp_path / "token"
    path.write_text("first\n")
    return path


def test_a_report_arrives_over_tls_with_the_token(tmp_path: Path, token: Path) -> None:
    with operator(tmp_path) as (url, received):
        poster = Poster(url, tmp_path / "ca.crt", token)
        poster.post(at(1))
        until(lambda: bool(received))
        poster.close()
    ((authorization, body),) = received
    assert authorization == "Bearer first"
    assert ProgressReport.model_validate(body) == at(1)


def test_of_many_reports_the_latest_is_sent_and_posting_never_waits(tmp_path: Path, token: Path) -> None:
    with operator(tmp_path, tls=False) as (url, received):
        poster = Poster(url, tmp_path / "ca.crt", token)
        poster.post(at(0))
        until(lambda: bool(received))
        for number in range(1, 500):
            poster.post(at(number))
        poster.close()
    steps = [body["progress"]["step"] for _, body in received]
    assert steps == [0, 499]


def test_a_rotated_token_is_read_again(tmp_path: Path, token: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "POST_SECONDS", 0.0)
    with operator(tmp_path) as (url, received):
        poster = Poster(url, tmp_path / "ca.crt", token)
        poster.post(at(1))
        until(lambda: len(received) == 1)
        token.write_text("second")
        poster.post(at(2))
        poster.close()
    assert [authorization for authorization, _ in received] == ["Bearer first", "Bearer second"]


def test_a_certificate_of_somebody_else_is_refused_and_told_once(tmp_path: Path, token: Path) -> None:
    (tmp_path / "other").mkdir()
    write_certificate(tmp_path / "other")
    stream = io.StringIO()
    with operator(tmp_path) as (url, received):
        poster = Poster(url, tmp_path / "other" / "ca.crt", token)
        reporter = Reporter(tmp_path, world(), 9, 9, poster=poster, stream=stream)
        reporter.begin(0)
        until(lambda: poster._trouble is not None)
        for number in (1, 2, 3):
            reporter.step(step(number))
        poster.close()
    assert received == []
    assert stream.getvalue().count("the operator does not get the progress reports") == 1
    assert "CERTIFICATE_VERIFY_FAILED" in stream.getvalue()


TROUBLES = {
    "nobody listens": ("http://127.0.0.1:1/", "refused"),
    "no host": ("https:///x", "no host"),
    "no token": ("http://127.0.0.1:1/", "No such file"),
}


@pytest.mark.parametrize("case", TROUBLES)
def test_no_trouble_reaches_the_training(case: str, tmp_path: Path, token: Path) -> None:
    url, words = TROUBLES[case]
    write_certificate(tmp_path)
    poster = Poster(url, tmp_path / "ca.crt", tmp_path / "none" if case == "no token" else token)
    poster.post(at(1))
    until(lambda: poster._trouble is not None)
    assert words in str(poster.new_trouble())
    assert poster.new_trouble() is None
    poster.close()


def test_an_operator_that_refuses_is_trouble_too(tmp_path: Path, token: Path) -> None:
    with operator(tmp_path, tls=False, status=403) as (url, _):
        poster = Poster(url, tmp_path / "ca.crt", token)
        poster.post(at(1))
        until(lambda: poster._trouble is not None)
        poster.close()
    assert "403" in str(poster.new_trouble())


def test_the_first_and_the_last_report_and_the_checkpoint_arrive(tmp_path: Path, token: Path) -> None:
    saved = CheckpointStatus(step=2, path="checkpoints/step-00000002", time=datetime.now(UTC))
    with operator(tmp_path) as (url, received):
        poster = Poster(url, tmp_path / "ca.crt", token)
        with Reporter(tmp_path, world(), 3, 3, poster=poster, stream=io.StringIO()) as reporter:
            reporter.begin(0)
            until(lambda: bool(received))
            reporter.step(step(1))
            reporter.step(step(2))
            reporter.checkpoint(saved)
            reporter.step(step(3))
    first, last = ProgressReport.model_validate(received[0][1]), ProgressReport.model_validate(received[-1][1])
    assert (first.progress.step, first.progress.percentage, first.progress.loss) == (0, 0, None)
    assert (last.progress.step, last.progress.percentage, last.progress.loss) == (3, 100, 1.5)
    assert last.progress.estimated_remaining_seconds == 0
    assert last.progress.peak_memory_bytes
    assert last.checkpoint == saved


def test_only_a_worker_in_a_cluster_posts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KUBETUNE_PROGRESS_URL", raising=False)
    assert Poster.from_env() is None
    monkeypatch.setenv("KUBETUNE_PROGRESS_URL", "https://127.0.0.1:1/")
    poster = Poster.from_env()
    assert poster is not None
    poster.close()
