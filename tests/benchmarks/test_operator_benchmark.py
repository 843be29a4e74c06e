"""The operator's benchmark reads processor times, counts calls, and tells noise from what it wants."""

import asyncio
import os
import time

import pytest
from benchmarks.harness import BusyError
from benchmarks.operator import kills, throughput, usage
from benchmarks.operator.case import FULL, QUICK, Outcome, percentile, repeat
from benchmarks.operator.field import FOREIGN, calls_in
from benchmarks.operator.peers import PEERS
from benchmarks.operator.usage import Sample, Share

METRICS = """\
# HELP kubetune_api_requests_total Requests to the API server
kubetune_api_requests_total{code="200",resource="finetunejobs/status",verb="patch"} 4.0
kubetune_api_requests_total{code="409",resource="finetunejobs/status",verb="patch"} 1.0
kubetune_api_requests_total{code="201",resource="jobs",verb="create"} 2.0
kubetune_api_requests_created{code="201",resource="jobs",verb="create"} 1.7e+09
kubetune_status_writes_total 4.0
"""


def test_calls_are_counted_by_verb_and_resource_whatever_was_answered():
    assert calls_in(METRICS) == {"patch finetunejobs/status": 5, "create jobs": 2}


def test_what_no_group_has_used_is_foreign():
    before = Sample(10.0, 100.0, {"operator": 5.0, "etcd": 1.0})
    share = usage.between(before, Sample(20.0, 112.0, {"operator": 8.0, "etcd": 2.0}))
    assert (share.seconds, share.cores("operator"), share.foreign) == (10.0, 0.3, 0.8)


def test_a_busy_process_is_seen_as_its_own_group():
    before = usage.sample({"us": [os.getpid()]})
    until = time.process_time() + 0.2
    while time.process_time() < until:
        pass
    share = usage.between(before, usage.sample({"us": [os.getpid()]}))
    assert 0.15 <= share.by["us"] < 2.0
    assert usage.resident_mib(os.getpid()) > 5


@pytest.mark.parametrize(
    ("percent", "value"), [(50, 50), (99, 99), (100, 100), (1, 1), (0, 1)], ids=["half", "p99", "all", "one", "none"]
)
def test_a_percentile_is_one_of_the_values(percent, value):
    assert percentile(list(range(100, 0, -1)), percent) == value


@pytest.mark.parametrize(
    ("waiting", "offered", "grows"),
    [((80, 120, 121, 118), 600, False), ((80, 120, 160, 200), 600, True), ((20, 30, 55, 60), 600, False)],
    ids=["as many as half-way", "ever more", "a few more"],
)
def test_jobs_pile_up_if_many_more_are_under_way_in_the_end_than_half_way(waiting, offered, grows):
    assert throughput.grows(waiting, offered) is grows


def runs_of(*foreign: float):
    """Runs 1, 2, 3 ... in which others use so many cores."""
    made = iter(enumerate(foreign, 1))

    async def once():
        number, cores = next(made)
        return number, Share(1.0, {}, cores)

    return once


def test_a_noisy_run_is_made_again():
    outcome = Outcome()
    found = asyncio.run(repeat("it", FULL, outcome, runs_of(0.0, 2 * FOREIGN, 0.1, 0.05)))
    assert (found, outcome.foreign) == ([1, 3, 4], [0.0, 0.1, 0.05])


def test_a_smoke_takes_noisy_runs():
    assert asyncio.run(repeat("it", QUICK, Outcome(), runs_of(9.0))) == [1]


def test_a_machine_that_is_never_quiet_is_an_error():
    noisy = runs_of(*[1.0] * FULL.most_tries)
    with pytest.raises(BusyError, match="it: others used more than"):
        asyncio.run(repeat("it", FULL, Outcome(), noisy))


def test_the_drill_says_how_many_jobs_are_lost_or_doubled():
    assert kills.wrong_in("900 s, 40 deaths\nlost: 1, doubled: 2\n1 failed\n") == 3
    with pytest.raises(ValueError, match="did not come to its end"):
        kills.wrong_in("1 failed")


def test_every_figure_of_a_peer_names_its_page():
    for row in PEERS.rows:
        assert len(row) == len(PEERS.columns)
        assert "](https://" in row[-1] or row[-1].startswith("the same page"), row
