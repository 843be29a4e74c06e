"""What a job's life costs the API server, and that an idle operator costs it nothing."""

from typing import Any

import pytest

pytestmark = pytest.mark.integration
Object = dict[str, Any]

MOST_WRITES = 9
"""Of a job of two workers, from its creation to its end, without progress reports: four children, four statuses and
the event of its end."""


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
