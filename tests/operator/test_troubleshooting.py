"""The page that explains the reasons has a section for each that a person may ask about, and for nothing else."""

import re
from pathlib import Path

import pytest

from kubetune_operator.conditions import reasons

PAGE = Path(__file__).parents[2] / "docs" / "troubleshooting.md"
ALL_IS_WELL = {"Staged", "Started", "Running", "Resumed", "Done"}
"""Reasons of what holds as it should: nobody looks them up."""
SECTIONS = dict(re.findall(r"^### `(\w+)`\n(.*?)(?=^#|\Z)", PAGE.read_text(), flags=re.MULTILINE | re.DOTALL))


def test_every_reason_that_may_be_asked_about_has_a_section():
    assert sorted(set(reasons()) - ALL_IS_WELL - set(SECTIONS)) == []


def test_no_section_is_about_a_reason_that_does_not_exist():
    assert sorted(set(SECTIONS) - set(reasons())) == []


def test_no_reason_has_two_sections():
    headings = re.findall(r"^### `(\w+)`$", PAGE.read_text(), flags=re.MULTILINE)
    assert len(headings) == len(set(headings))


@pytest.mark.parametrize("reason", sorted(SECTIONS))
def test_a_section_says_what_it_means_what_to_do_and_where_to_look(reason):
    marks = re.findall(r"^- \*\*(.+?):\*\*", SECTIONS[reason], flags=re.MULTILINE)
    assert marks in (["Means", "Do", "Look deeper"], ["You see", "Means", "Do", "Look deeper"])
