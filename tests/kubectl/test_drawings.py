"""Sparklines, bars and tables."""

import io
from datetime import timedelta

import pytest
from rich.console import Console

from kubetune_kubectl import words

LINES = {
    "a falling loss": ([8, 7, 6, 5, 4, 3, 2, 1], 8, True, "█▇▆▅▄▃▂▁"),
    "more values than columns are averaged": ([1, 1, 3, 3, 5, 5, 7, 7], 4, True, "▁▃▆█"),
    "fewer values than columns stay as many": ([1, 2], 8, True, "▁█"),
    "a level line": ([2, 2, 2], 8, True, "▁▁▁"),
    "one value": ([2.5], 8, True, "▁"),
    "no value": ([], 8, True, ""),
    "a terminal without Unicode": ([1, 2, 3, 4, 5, 6, 7], 7, False, "_.-=+*#"),
}


@pytest.mark.parametrize("case", LINES)
def test_a_sparkline(case):
    values, width, unicode, drawn = LINES[case]
    assert words.sparkline(values, width, unicode) == drawn


def test_a_long_run_keeps_its_width_and_its_ends():
    drawn = words.sparkline([1000 - step for step in range(1000)], 40)
    assert len(drawn) == 40
    assert (drawn[0], drawn[-1]) == ("█", "▁")


BARS = {"none": (0, "░░░░"), "half": (0.5, "██░░"), "all": (1, "████"), "too much": (1.2, "████"), "less": (-1, "░░░░")}


@pytest.mark.parametrize("case", BARS)
def test_a_bar(case):
    share, drawn = BARS[case]
    assert words.bar(share, 4) == drawn
    assert words.bar(share, 4, unicode=False) == drawn.replace("█", "#").replace("░", ".")


def test_for_a_program_no_word_is_cut_and_no_line_ends_in_blanks():
    page = io.StringIO()
    long = "word " * 100 + "end"
    words.print_table(words.console(page), words.columns(["NAME", "WHY"], [["a", long], ["second", "short"]]))
    assert page.getvalue().splitlines() == ["NAME     WHY", f"a        {long}", "second   short"]


def test_on_a_terminal_a_last_column_that_is_too_wide_ends_in_an_ellipsis():
    page = io.StringIO()
    screen = Console(file=page, width=30, force_terminal=True, color_system=None)
    words.print_table(screen, words.columns(["NAME", "WHY"], [["a", "word " * 20]]))
    line = page.getvalue().splitlines()[1].rstrip()
    assert len(line) <= 30
    assert line.endswith("…")


def test_an_age(now):
    assert words.age(now - timedelta(seconds=190), now) == "3m10s"
    assert words.age(now + timedelta(seconds=2), now) == "0s"  # clocks differ
