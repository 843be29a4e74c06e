"""Alive and ready: what is wrong, in words."""

from typing import Any

import pytest

from kubetune_operator.health import Vitals, not_alive, not_ready

WELL: dict[str, Any] = {
    "synced": True,
    "leads": True,
    "answered": 1.0,
    "heard": {"jobs": 30.0, "pods": 2.0},
    "listed": 120.0,
    "resync": 300.0,
    "working": 0.4,
    "waiting": 0.0,
}

ALIVE = [
    ("all is well", {}, None),
    (
        "a deaf watch",
        {"heard": {"jobs": 301.0, "pods": 2.0}},
        "no event of jobs for 300 s, though the API server",
    ),
    ("two deaf watches", {"heard": {"jobs": 400.0, "pods": 400.0}}, "no event of jobs, pods for 300 s"),
    ("silence of a server that is away", {"heard": {"jobs": 900.0, "pods": 900.0}, "answered": 61.0}, None),
    ("a stuck reconcile", {"working": 301.0}, "a reconcile has been under way for 301 s"),
    ("a stuck reconcile while the server is away", {"working": 301.0, "answered": 400.0}, "a reconcile has been"),
    ("caches that are not full yet", {"synced": False}, None),
    ("a late pass", {"listed": 9999.0}, None),
]


@pytest.mark.parametrize(("changes", "says"), [case[1:] for case in ALIVE], ids=[case[0] for case in ALIVE])
def test_alive_with(changes, says):
    found = not_alive(Vitals(**WELL | changes))
    assert found is None if says is None else says in found


READY = [
    ("all is well", {}, None),
    ("caches that are not full", {"synced": False}, "the caches are being filled"),
    ("no pass for two rounds", {"listed": 661.0}, "the last pass over all FineTuneJobs was 661 s ago"),
    ("a late pass", {"listed": 659.0}, None),
    ("a job that no worker takes", {"waiting": 121.0}, "a FineTuneJob has waited 121 s for a worker"),
    ("a standby, which makes no passes", {"leads": False, "listed": float("inf"), "waiting": 0.0}, None),
    ("a standby whose caches are not full", {"leads": False, "synced": False}, "the caches are being filled"),
]


@pytest.mark.parametrize(("changes", "says"), [case[1:] for case in READY], ids=[case[0] for case in READY])
def test_ready_with(changes, says):
    assert not_ready(Vitals(**WELL | changes)) == says
