"""Two replicas as two processes on a real API server: one leads, the other takes over, and nothing happens twice."""

import datetime as dt
import json
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.integration.operator.server import free_port

from kubetune_contract.paths import TOKEN_AUDIENCE
from kubetune_contract.progress import Progress, ProgressReport

pytestmark = pytest.mark.integration
Object = dict[str, Any]
KILLED_SECONDS = 20.0
"""From SIGKILL of the leader to the next leader. Its Lease runs out after 15 s."""
STOPPED_SECONDS = 2.0
"""From SIGTERM of the leader to the next leader."""


class Pair:
    """A drill whose operator has a second replica."""

    def __init__(self, drill: Any, second: Any) -> None:
        self.drill = drill
        self.replicas = [drill.operator, second]

    def holder(self) -> str:
        lease = json.loads(self.drill.kubectl("get", "lease", "kubetune", "-o", "json"))
        return str(lease["spec"].get("holderIdentity") or "")

    def leading(self, replica: Any, seconds: float) -> None:
        """Wait until the replica says that it leads."""
        deadline = time.monotonic() + seconds
        while not replica.leads():
            assert time.monotonic() < deadline, replica.log.read_text()
            time.sleep(0.05)


@pytest.fixture
def pair(drill: Callable[..., Any], tmp_path: Path) -> Iterator[Callable[..., Pair]]:
    """pair(settings of both, of the second): a leader, and a standby that is ready."""
    seconds: list[Any] = []

    def make(both: dict[str, str], second: dict[str, str]) -> Pair:
        first = drill(pod_name="replica-0", pod_ip="127.0.0.1", **both)
        (tmp_path / "second").mkdir()
        names = {"pod_name": "replica-1", "pod_ip": "127.0.0.1"}
        seconds.append(first.replica(tmp_path / "second", **{**both, **names, **second}))
        made = Pair(first, seconds[0])
        made.leading(first.operator, 30)
        seconds[0].start()
        assert not seconds[0].leads()
        assert made.holder() == "replica-0"
        return made

    yield make
    for replica in seconds:
        if replica.process is not None:
            replica.stop(signal.SIGKILL)


def attempts(drill: Any) -> list[str]:
    found = json.loads(drill.kubectl("get", "jobs", "-l", "kubetune.io/role=worker", "-o", "json"))
    return sorted(item["metadata"]["name"] for item in found["items"])


def token_of(drill: Any, pod: Object) -> str:
    bound = ["--bound-object-kind=Pod", f"--bound-object-name={pod['metadata']['name']}"]
    return drill.kubectl("create", "token", "default", f"--audience={TOKEN_AUDIENCE}", *bound).strip()


def report(step: int) -> ProgressReport:
    now = dt.datetime.now(dt.UTC)
    return ProgressReport(
        progress=Progress(step=step, total_steps=50, epoch=0.2, percentage=2 * step, loss=1.25, updated_time=now)
    )


def test_a_killed_leader_is_followed_and_reports_reach_whoever_leads(pair, tls, post, record_property):
    """One long story, as each takeover costs 15 s: progress through the standby, SIGKILL, a restart, a clean stop."""
    port = str(free_port())
    pair = pair(tls, {"progress_port": port})
    drill, (first, second) = pair.drill, pair.replicas
    through_standby = {**tls, "progress_url": f"https://localhost:{port}"}
    pods = drill.running()
    path, token = f"/v1/progress/{drill.namespace}/job/1", token_of(drill, pods[0])

    # The Service may pick the standby: the report reaches the status all the same.
    assert post(through_standby, path, token, report(7)) == 204
    drill.until("job", lambda status: status.get("progress", {}).get("step") == 7)
    assert second.metric('kubetune_progress_reports_total{outcome="taken"}') == 1

    # SIGKILL of the leader, and a worker crashes while nobody leads.
    first.stop(signal.SIGKILL)
    killed = time.monotonic()
    drill.ends(pods[1], 1)
    assert post(through_standby, path, token, report(8)) == 503
    pair.leading(second, KILLED_SECONDS)
    took = time.monotonic() - killed
    record_property("takeover after SIGKILL, seconds", round(took, 2))
    print(f"takeover after SIGKILL: {took:.2f} s")
    assert took < KILLED_SECONDS
    status = drill.until("job", lambda found: found.get("restarts") == 1 and found.get("attempt") == 2)
    assert status["disruptions"] == 0
    drill.runs(*drill.workers(attempt=2))
    drill.until_state("job", "Running")
    assert attempts(drill) == ["job-a2"] or attempts(drill) == ["job-a1", "job-a2"]

    # The first comes back as a standby; a clean stop of the leader hands over at once.
    first.start()
    assert not first.leads()
    stopping = threading.Thread(target=second.stop)
    stopped = time.monotonic()
    stopping.start()
    pair.leading(first, 5)
    took = time.monotonic() - stopped
    stopping.join()
    ended = time.monotonic() - stopped
    print(f"takeover after SIGTERM: {took:.2f} s, process ended after {ended:.2f} s")
    assert took < STOPPED_SECONDS
    assert ended < STOPPED_SECONDS
    for pod in drill.workers(attempt=2):
        drill.ends(pod, 0, drill.done)
    status = drill.until_state("job", "Succeeded")
    assert (status["attempt"], status["restarts"]) == (2, 1)
    assert "job-a3" not in attempts(drill)


def test_a_leader_that_slept_too_long_writes_nothing_and_ends(pair):
    """As on a node that was frozen: its Lease is another's when it wakes up."""
    pair = pair({}, {})
    drill, (first, second) = pair.drill, pair.replicas
    first.process.send_signal(signal.SIGSTOP)
    slept = time.monotonic()
    drill.submit()  # which the sleeper has not seen, but will find in its sockets
    pair.leading(second, KILLED_SECONDS)
    print(f"takeover after SIGSTOP: {time.monotonic() - slept:.2f} s")
    drill.stage()
    first.process.send_signal(signal.SIGCONT)
    assert first.process.wait(timeout=5) == 1
    first.process = None
    lines = [json.loads(line) for line in first.log.read_text().splitlines()]
    last = [line for line in lines if line["level"] == "critical"]
    assert [line["message"].partition(":")[0] for line in last] == ["this replica leads no more, and ends"]
    drill.runs(*drill.workers())
    drill.until_state("job", "Running")
    assert attempts(drill) == ["job-a1"]
    first.log.write_text("")  # the fixture takes what is critical for a fault
