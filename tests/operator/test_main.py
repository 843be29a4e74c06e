"""The start: JSON logs, settings from the environment, and what ends the process."""

import asyncio
import json
import logging
import os
import socket
import subprocess
import sys
import time
from typing import Any

import aiohttp
import pytest

from kubetune_contract.progress import Progress, ProgressReport
from kubetune_operator.__main__ import Operator, address_of, identity_of
from kubetune_operator.logs import JsonFormatter


@pytest.fixture
def line():
    """line(record fields): the formatted record, parsed."""

    def make(message: str, *arguments: Any, **fields: Any) -> dict[str, Any]:
        record = logging.LogRecord("kubetune_operator.watch", logging.WARNING, "f.py", 1, message, arguments, None)
        record.__dict__.update(fields)
        return json.loads(JsonFormatter().format(record))

    return make


def test_a_log_line_is_one_json_object(line):
    found = line("watch of %s interrupted\nby a line break", "pods", created=1893499200.25, msecs=250.0)
    assert found == {
        "time": "2030-01-01T12:00:00.250Z",
        "level": "warning",
        "logger": "kubetune_operator.watch",
        "message": "watch of pods interrupted\nby a line break",
    }


def test_a_log_line_has_its_traceback(line):
    try:
        raise ValueError("inner")
    except ValueError:
        found = line("failed", exc_info=sys.exc_info())
    assert "ValueError: inner" in found["error"]


@pytest.fixture
async def operator(settings) -> Operator:
    """An operator that was not started."""
    return Operator(settings)


def test_what_a_program_looks_for_has_a_key_of_its_own(line):
    found = line("team/bot is Failed (OOMKilled)", job="team/bot", attempt=2, duration=61.5, secret="x")
    assert {key: found[key] for key in ("job", "attempt", "duration")} == {
        "job": "team/bot",
        "attempt": 2,
        "duration": 61.5,
    }
    assert "secret" not in found


@pytest.mark.parametrize(("ip", "address"), [("10.0.0.7", "10.0.0.7:8443"), ("fd00::7", "[fd00::7]:8443")])
def test_the_other_replicas_find_the_endpoint(settings, ip, address):
    assert address_of(settings.model_copy(update={"pod_ip": ip})) == address
    assert address_of(settings) is None


def test_a_replica_is_known_by_its_pod_or_by_a_name_that_nobody_else_has(settings):
    assert identity_of(settings.model_copy(update={"pod_name": "kubetune-0"})) == "kubetune-0"
    assert identity_of(settings) != identity_of(settings)


async def test_a_report_is_measured_at_once_and_looked_at_when_it_is_time(operator):
    operator.queue.accepting = True  # as a leader's
    report = ProgressReport(progress=Progress(step=5, total_steps=50, epoch=0.1, percentage=10))
    operator.take_report("team", "bot", 1, "uid", report)
    assert await operator.queue.get() == "team/bot"
    labels = {"namespace": "team", "name": "bot"}
    assert operator.metrics.registry.get_sample_value("kubetune_training_step", labels) == 5
    assert operator.progress.shown("team/bot", 1, time.monotonic()) == report


def clean_environment() -> dict[str, str]:
    """The environment without anything about Kubernetes."""
    return {name: value for name, value in os.environ.items() if not name.startswith("KUBE")}


def test_without_its_settings_the_operator_says_which_are_missing():
    variables = {**clean_environment(), "KUBETUNE_NAMESPACE": "kubetune", "KUBETUNE_WORKERS": "0"}
    command = [sys.executable, "-m", "kubetune_operator"]
    ended = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=60, check=False)
    messages = [json.loads(line)["message"] for line in ended.stderr.splitlines()]
    assert ended.returncode == 2
    assert any("KUBETUNE_TRAINER_IMAGE" in message for message in messages)
    assert any("KUBETUNE_WORKERS" in message for message in messages)


def config_for(server: str) -> str:
    """A kubeconfig without secrets."""
    return json.dumps(
        {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "c",
            "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
            "clusters": [{"name": "c", "cluster": {"server": server}}],
            "users": [{"name": "u", "user": {"token": "t"}}],
        }
    )


@pytest.fixture
def port() -> int:
    """A free port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


async def health_of(port: int, path: str) -> int | None:
    """The answer's code; None if nobody listens."""
    try:
        async with aiohttp.ClientSession() as session, session.get(f"http://127.0.0.1:{port}{path}") as answer:
            return answer.status
    except aiohttp.ClientConnectionError:
        return None


async def test_without_an_api_server_the_operator_waits_alive_and_not_ready(tmp_path, port):
    """An API server that restarts must not take the operator with it. SIGTERM ends it cleanly all the same."""
    (tmp_path / "config").write_text(config_for("http://127.0.0.1:9"))
    chosen = {"NAMESPACE": "kubetune", "TRAINER_IMAGE": "trainer", "METRICS_PORT": str(port)}
    variables = {f"KUBETUNE_{name}": value for name, value in chosen.items()}
    process = subprocess.Popen(
        [sys.executable, "-m", "kubetune_operator"],
        env={**clean_environment(), **variables, "KUBECONFIG": str(tmp_path / "config")},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        async with asyncio.timeout(60):
            while await health_of(port, "/healthz") != 200:
                assert process.poll() is None
                await asyncio.sleep(0.1)
        assert await health_of(port, "/readyz") == 503
        stopped = time.monotonic()
        process.terminate()
        _, logs = await asyncio.to_thread(process.communicate, timeout=30)
    finally:
        process.kill()
    assert process.returncode == 0
    assert all(json.loads(line)["message"] for line in logs.splitlines())
    assert time.monotonic() - stopped < 3, "nothing is waited for"
    assert "no answer from the API server" in logs


async def test_a_part_that_breaks_ends_the_process_with_a_reason(tmp_path, port):
    """The port of the metrics is taken: the operator would be blind, and nobody could see it."""
    (tmp_path / "config").write_text(config_for("http://127.0.0.1:9"))
    with socket.socket() as taken:
        taken.bind(("", port))
        taken.listen()
        chosen = {"NAMESPACE": "kubetune", "TRAINER_IMAGE": "trainer", "METRICS_PORT": str(port)}
        variables = {f"KUBETUNE_{name}": value for name, value in chosen.items()}
        environment = {**clean_environment(), **variables, "KUBECONFIG": str(tmp_path / "config")}
        command = [sys.executable, "-m", "kubetune_operator"]
        ended = await asyncio.to_thread(
            subprocess.run, command, env=environment, capture_output=True, text=True, timeout=60, check=False
        )
    last = json.loads(ended.stderr.splitlines()[-1])
    assert ended.returncode == 1
    assert (last["level"], last["message"]) == ("critical", "the operator cannot go on")
    assert "address already in use" in last["error"]


def test_the_synchronous_client_is_not_in_memory():
    """It would be a quarter of an idle replica."""
    program = (
        "import sys, kubetune_operator.__main__; print(sorted({'requests', 'kubernetes.dynamic'} & {*sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
