"""What is kept of the drills from run to run."""

from pathlib import Path

from tests.drills.drill import Act, Drill, Seen
from tests.drills.ledger import Ledger
from tests.drills.runner import Report, Row


def drill(done: str = "killed") -> Drill:
    return Drill("one", "a case", (Act(done, Seen("Failed", "Failed", "Crash")),))


def report(problem: str = "") -> Report:
    seen = drill()
    return Report(seen, [Row(seen, seen.acts[0], "Failed", "Crash", "said", 1.5)], problem)


def test_what_was_seen_is_there_in_the_next_run(tmp_path: Path):
    file = tmp_path / "drills.json"
    Ledger(file).take(report())
    assert Ledger(file).reports([drill()]) == [report()]


def test_a_drill_that_failed_has_no_rows_any_more(tmp_path: Path):
    ledger = Ledger(tmp_path / "drills.json")
    ledger.take(report())
    ledger.take(report("it did not come"))
    assert ledger.reports([drill()]) == [Report(drill())]


def test_rows_of_a_drill_that_has_changed_are_not_told(tmp_path: Path):
    ledger = Ledger(tmp_path / "drills.json")
    ledger.take(report())
    assert ledger.reports([drill("stopped")]) == [Report(drill("stopped"))]
