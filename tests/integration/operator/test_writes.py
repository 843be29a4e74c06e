"""What a job's life costs the API server, and that an idle operator costs it nothing."""

import os
import time
from collections import Counter
from typing import Any

import pytest
from tests.integration.operator.conftest import DONE, STAGED
from tests.integration.operator.kubelet import Kubelet
from tests.integration.operator.server import Account

pytestmark = pytest.mark.integration
Object = dict[str, Any]

MOST_WRITES = 9
"""Of a job of two workers, from its creation to its end, without progress reports: four children, four statuses and
the event of its end."""

JOBS = int(os.environ.get("KUBETUNE_IDLE_JOBS", "8"))
IDLE_SECONDS = float(os.environ.get("KUBETUNE_IDLE_SECONDS", "6"))
RESYNC_SECONDS = 2
"""The default is 300: an idle operator looks far less often."""
SETTLE_SECONDS = 3.0
"""Without a write before the time begins to count."""
FATES = [("done", "Succeeded"), ("user", "Failed"), ("run", "Running"), ("suspended", "Suspended")]
"""What the workers do, and the state in which the job stays."""


def test_a_job_costs_nine_writes_from_apply_to_its_end(drill):
    drill = drill(proxied=True, debounce_seconds="0.5", progress_write_seconds="10")
    pods = drill.running()
    drill.ends(pods[0], 0, drill.done)
    drill.ends(pods[1], 0)
    drill.until_state("job", "Succeeded")
    drill.watch("events", drill.every, reached=lambda found: "Succeeded" in {one["reason"] for one in found.values()})
    counted = drill.proxy.counted()
    assert counted.total() <= MOST_WRITES, counted
    assert counted["patch finetunejobs/status"] <= 4, counted
    assert counted["create events"] == 1, counted
    assert all(call.code < 400 for call in drill.proxy.writes())


def test_when_nothing_changes_nothing_is_written(drill, kube):
    """Jobs that wait for a node, run, are suspended or have ended, looked at again and again by full resyncs."""
    drill = drill(proxied=True, resync_seconds=str(RESYNC_SECONDS))
    fates = {f"idle-{number}": FATES[number % len(FATES)] for number in range(JOBS)}
    account = Account.of(kube.config)
    kubelet = Kubelet(account, drill.namespace, {name: [fate] for name, (fate, _) in fates.items()}, DONE, STAGED)
    kubelet.start()
    try:
        for name, (fate, _) in fates.items():
            drill.submit(name, suspend=fate == "suspended")
        wanted = {name: state for name, (_, state) in fates.items()}
        drill.watch("finetunejobs", drill.every, lambda found: _states(found) == wanted, 60 + 3 * JOBS)
        before = _settled(drill.proxy)
        time.sleep(IDLE_SECONDS)  # what is shown is that time alone brings no write
        written = drill.proxy.counted() - before
    finally:
        kubelet.stop()
    print(f"{JOBS} jobs, {IDLE_SECONDS:.0f} s, resync every {RESYNC_SECONDS} s: {written.total()} writes")
    assert written.total() == 0, written


def _states(found: dict[str, Object]) -> dict[str, Any]:
    return {name: body.get("status", {}).get("state") for name, body in found.items()}


def _settled(proxy: Any) -> Counter[str]:
    """The writes so far, once there was none for a while."""
    while True:
        before = proxy.counted()
        time.sleep(SETTLE_SECONDS)
        if proxy.counted() == before:
            return Counter(before)
