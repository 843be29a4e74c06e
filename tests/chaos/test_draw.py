"""What a seed draws, the page, and the hands that damage files: all that needs no node."""

import random
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from threading import Event

import pytest
from tests.chaos import host, page
from tests.chaos.catalogue import FAULTS
from tests.chaos.fault import Run, draw
from tests.chaos.gate import Gate
from tests.chaos.run import PAGE, undisturbed
from tests.drills.runner import Report, Row
from tests.drills.steps import then


def test_every_kind_has_a_name_and_a_case_of_its_own():
    assert len({fault.name for fault in FAULTS}) == len({fault.case for fault in FAULTS}) == len(FAULTS)


def test_a_seed_draws_the_same_runs_again_and_another_seed_others():
    first, again, other = ([run.drill.acts[0].done for run in draw(FAULTS, 60, seed, then)] for seed in (7, 7, 8))
    assert first == again
    assert first != other


def test_each_kind_is_drawn_as_often_as_the_others_to_within_one():
    counts = Counter(run.fault for run in draw(FAULTS, 200, 3, then))
    assert set(counts) == set(FAULTS)
    assert max(counts.values()) - min(counts.values()) <= 1


def test_names_are_those_that_a_job_may_have_and_occur_once():
    names = [run.drill.name for run in draw(FAULTS, 200, 3, then)]
    assert len(set(names)) == 200
    assert all(len(name) <= 45 for name in names)


def test_each_run_that_must_succeed_has_an_undisturbed_one_to_be_compared_with():
    runs = draw(FAULTS, 200, 3, then)
    assert {run.drill.name for run in undisturbed(runs)} == {run.like for run in runs if page.compares(run)}


# ---------------------------------------------------------------- the page

SUCCEEDS, FAILS = (
    next(run for run in draw(FAULTS, 40, 1, then) if page.compares(run) is word) for word in (True, False)
)


def report(run: Run, problem: str = "") -> Report:
    row = Row(run.drill, run.drill.acts[0], "Succeeded", "Done", "said", 12.4)
    return Report(run.drill, [row], problem)


CASES = {
    "the same weights": (SUCCEEDS, "", {SUCCEEDS.drill.name: "a", SUCCEEDS.like: "a"}, ""),
    "other weights": (SUCCEEDS, "", {SUCCEEDS.drill.name: "b", SUCCEEDS.like: "a"}, "its weights are b"),
    "no undisturbed run": (SUCCEEDS, "", {SUCCEEDS.drill.name: "b"}, "no weights of calm-"),
    "a wrong end": (SUCCEEDS, "it failed", {}, "it failed"),
    "a run that must fail has no weights": (FAILS, "", {}, ""),
}


@pytest.mark.parametrize("case", CASES)
def test_a_run_is_judged(case):
    run, problem, digests, words = CASES[case]
    (outcome,) = page.outcomes([run], [report(run, problem)], digests)
    assert bool(outcome.problem) is bool(words)
    assert words in outcome.problem


TOLD = page.Told(7, 40, date(2026, 1, 2), 600, [])


def test_the_page_counts_what_survived_and_names_what_was_lost():
    runs = [SUCCEEDS, SUCCEEDS]
    outcomes = page.outcomes(
        runs, [report(SUCCEEDS, "it | failed"), report(SUCCEEDS)], {SUCCEEDS.drill.name: "a", SUCCEEDS.like: "a"}
    )
    text = page.page(TOLD, outcomes)
    assert "2026-01-02, 40 faults, seed 7, 10 minutes. Again: `make chaos FAULTS=40 SEED=7`" in text
    assert f"| {SUCCEEDS.drill.case} | {SUCCEEDS.fault.must} | 2 | 1 | 1 | 12 |\n" in text
    assert f"| {SUCCEEDS.drill.name} |" in text
    assert "it \\| failed |" in text


def test_the_page_says_what_was_left_behind():
    assert "no ConfigMap of theirs was left" in page.page(TOLD, [])
    left = page.Told(7, 40, date(2026, 1, 2), 600, ["pod-a"])
    assert "**Left behind:** pod-a." in page.page(left, [])


def test_the_committed_page_tells_every_kind():
    """`make chaos` writes it."""
    text = PAGE.read_text()
    assert [fault.case for fault in FAULTS if f"| {fault.case} | {fault.must} |" not in text] == []


# ---------------------------------------------------------------- hands


def test_a_flip_changes_one_bit(tmp_path):
    file = tmp_path / "file"
    file.write_bytes(bytes(100))
    host.flip(file, random.Random(1))
    content = file.read_bytes()
    assert len(content) == 100
    assert sum(byte.bit_count() for byte in content) == 1


def test_a_cut_leaves_the_beginning(tmp_path):
    file = tmp_path / "file"
    file.write_bytes(bytes(range(100)))
    host.cut(file, random.Random(1))
    assert 0 <= file.stat().st_size < 100
    assert bytes(range(100)).startswith(file.read_bytes())


def test_who_closes_the_gate_is_alone():
    gate, order = Gate(), []
    inside, leave = Event(), Event()

    def visitor():
        with gate.open():
            inside.set()
            leave.wait(10)
            order.append("visitor leaves")

    def striker():
        with gate.closed():
            order.append("alone")

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(visitor)
        assert inside.wait(10)
        second = pool.submit(striker)
        leave.set()
        first.result(10)
        second.result(10)
    assert order == ["visitor leaves", "alone"]
    with gate.open():
        pass
