"""Sides are measured in turns, each in its own process, and what others disturbed does not count."""

import os
import subprocess
import sys

import pytest
from benchmarks import harness
from benchmarks.harness import BusyError, Side, SideError, in_turns

TELLER = """
import json, os, sys, time
case = json.load(open(sys.argv[1]))
began = time.monotonic()
with open(case["log"], "a") as log:
    log.write(case["name"] + " ")
if case.get("fails"):
    sys.exit("the model is too big for its folder")
if not case.get("silent"):
    json.dump({"pid": os.getpid(), "waited": began - case["started"], "set": float(os.environ.get("SET", 0))},
        open(sys.argv[2], "w"))
"""


@pytest.fixture
def side(tmp_path):
    def build(name, environment=None, warm_up=None, **case):
        case = {"name": name, "log": str(tmp_path / "log"), **case}
        return Side(name, [sys.executable, "-c", TELLER], case, environment or {}, warm_up)

    return build


@pytest.fixture
def order(tmp_path):
    return lambda: (tmp_path / "log").read_text().split()


@pytest.fixture
def disturbed(monkeypatch):
    """The samples with these numbers, counted from 0, see others who take all that there is."""

    def disturb(*numbers):
        calls = iter(range(10**6))
        quiet = harness.busy_seconds()

        def busy():  # asked before and after each sample
            call = next(calls)
            return quiet + (100.0 if call % 2 and call // 2 in numbers else 0.0)

        monkeypatch.setattr(harness, "busy_seconds", busy)

    return disturb


def test_sides_run_in_turns_each_in_a_fresh_process_after_a_warm_up(side, order, disturbed):
    disturbed()
    found = in_turns([side("a", warm_up={"name": "warm-a"}), side("b", {"SET": "7"}, warm_up={}), side("c")], 2)
    assert order() == ["warm-a", "b", *"abcabc"]
    assert len({*found.values("a", "pid"), *found.values("b", "pid")}) == 4
    assert (found.values("a", "set"), found.values("b", "set")) == ([0, 0], [7, 7])
    assert all(0 < waited < 60 for waited in found.values("a", "waited"))


def test_a_round_that_others_disturbed_is_made_again_by_all_sides(side, order, disturbed):
    disturbed(3)  # b's sample of the second round
    told = []
    found = in_turns([side("a"), side("b")], 2, warm=False, say=told.append)
    assert order() == ["a", "b", "a", "b", "a", "b"]
    assert (found.rejected, len(found.samples["a"]), len(found.samples["b"])) == (1, 2, 2)
    (rejection,) = [line for line in told if "rejected" in line]
    assert "others took more than 6% of the cores beside b (" in rejection
    assert "a (" not in rejection


def test_a_machine_that_is_never_quiet_is_told(side, disturbed):
    disturbed(*range(10))
    with pytest.raises(BusyError, match="3 rounds were disturbed by other programs: stop them, or measure later"):
        in_turns([side("a")], 1, warm=False)


def test_whoever_allows_all_measures_on_a_busy_machine(side, disturbed):
    disturbed(*range(10))
    assert in_turns([side("a")], 1, warm=False, allowed=float("inf")).rejected == 0


def test_other_programs_are_seen_by_the_cpu_time_that_they_take(side):
    command = [sys.executable, "-c", "import time\nend = time.monotonic() + 20\nwhile time.monotonic() < end: pass"]
    busy = [subprocess.Popen(command) for _ in os.sched_getaffinity(0)]
    try:
        foreign = harness.sample(side("a"), side("a").case).foreign
    finally:
        for process in busy:
            process.kill()
            process.wait()
    assert foreign > harness.FOREIGN_SHARE


@pytest.mark.parametrize(
    ("case", "told"),
    [({"fails": True}, "b ended with 1 .*the model is too big for its folder"), ({"silent": True}, "b ended with 0")],
    ids=["it fails", "it has no result"],
)
def test_a_failing_side_is_told_with_its_own_words(side, case, told):
    with pytest.raises(SideError, match=f"(?s){told}"):
        in_turns([side("a"), side("b", **case)], 1)


def test_a_side_that_does_not_end_is_stopped(monkeypatch):
    monkeypatch.setattr(harness, "LIMIT", 0.2)
    sleeper = Side("sleeper", [sys.executable, "-c", "import time; time.sleep(60)"])
    with pytest.raises(SideError, match=r"sleeper was stopped after 0.2 seconds"):
        in_turns([sleeper], 1)


def test_a_figure_is_that_of_the_medians():
    rounds = harness.Rounds(
        {name: [harness.Sample({"s": v}, 1.0, 1.0, 0.0) for v in values] for name, values in SAMPLES.items()}, 0, 0.25
    )
    found = rounds.figure("s", "ours", "theirs", command="measure it", peer_name="peer 1.0")
    assert (rounds.median("ours", "s"), found.ours, found.peer, found.ratio, found.runs) == (2.0, 2.0, 4.0, 0.5, 3)
    assert (found.load, found.command, found.peer_name) == (0.25, "measure it", "peer 1.0")


SAMPLES = {"ours": [1.0, 9.0, 2.0], "theirs": [4.0, 3.0, 5.0]}


def test_the_load_of_others_leaves_out_our_own(monkeypatch):
    monkeypatch.setattr(harness.os, "getloadavg", lambda: (3.0, 0.0, 0.0))
    monkeypatch.setattr(harness.time, "monotonic", lambda: 1000.0)
    load = harness.OthersLoad()
    assert load.now() == 3.0
    load.add(0.0, 1000.0, 2.0)  # two threads until now
    assert load.now() == pytest.approx(1.0, abs=1e-6)
    load.add(0.0, 1000.0, 2.0)
    assert load.now() == 0.0
