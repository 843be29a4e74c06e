"""The drills as a list, and the page that is written from what was seen."""

from collections import Counter

import pytest
from tests.drills import table
from tests.drills.catalogue import DRILLS
from tests.drills.drill import Act, Drill, Refused, Seen
from tests.drills.run import PAGE
from tests.drills.runner import Report, Row


def test_every_drill_has_a_name_of_its_own_that_a_job_may_have():
    names = Counter(drill.name for drill in DRILLS)
    assert [name for name, count in names.items() if count > 1] == []
    assert all(len(name) <= 45 for name in names)


def test_the_page_tells_every_drill():
    """`make drills` writes it."""
    page = PAGE.read_text()
    missing = [drill.name for drill in DRILLS if f"| {table.escaped(drill.case)} |" not in page]
    assert missing == []


def row(message: str, *, refused: bool = False) -> Row:
    seen = Refused(()) if refused else Seen("Failed", "Failed", "Crash")
    act = Act("`kill | wait`", seen)
    drill = Drill("one", "a case", (act,))
    state, reason = ("", "") if refused else ("Failed", "Crash")
    return Row(drill, act, state, reason, message, 1.26)


LINES = {
    "what differs from run to run is left out": (
        row("Attempt 2 starts at 10:02:40 UTC; see bot-1a2b3c4d/adapter and pod bot-a1-0-x7z2p\nLast lines"),
        "Attempt 2 starts at *time*; see bot-*uid*/adapter and pod bot-a1-0-*pod* Last lines",
    ),
    "an image is named without its registry": (
        row("cannot pull image 127.0.0.1:5000/kubetune-trainer:x"),
        "cannot pull image *registry*/kubetune-trainer:x",
    ),
    "a long message is cut at a word": (row("word " * 100), f"{'word ' * 34}..."),
    "a refusal begins with the server's words": (
        row("`kubectl apply --filename -` ended with 1:\nError from server: no", refused=True),
        "Error from server: no",
    ),
}


@pytest.mark.parametrize("case", LINES)
def test_a_line_of_the_table(case):
    seen, message = LINES[case]
    told = table.line((seen.drill.case, seen))
    word = "refused" if seen.state == "" else "Failed, Crash"
    assert told == f"| a case | `kill \\| wait` | {word} | {message} | 1.3 |\n"


def test_a_case_stands_once_however_many_acts_it_has():
    act = row("said").act
    drill = Drill("one", "a case", (act, act))
    seen = Row(drill, act, "Failed", "Crash", "said", 1.0)
    page = table.page([Report(drill, [seen, seen])])
    assert page.count("| a case |") == 1
    assert page.count("`kill \\| wait`") == 2


def test_a_drill_that_was_not_as_it_must_be_says_so():
    page = table.page([Report(row("said").drill)])
    assert f"| a case | `kill \\| wait` | {table.UNSEEN} |  |  |" in page
