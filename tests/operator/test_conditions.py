"""The table of conditions holds what the planner can say, and nothing else."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from kubetune_contract.exit_codes import ExitCode
from kubetune_operator import conditions, disruptions, obstacles

MODULES = sorted(Path(conditions.__file__).parent.glob("*.py"))
SETTERS = {"condition": 2, "withdraw": 1, "fail": 0, "Ending": 1, "Obstacle": 0}
"""Which argument of which call is a condition's reason."""
EXIT_REASONS = {code.reason for code in ExitCode} - {ExitCode.DONE.reason}

PASSED_ON = {"reason", "found.reason", "why.reason"}
"""A reason that another call named before. Whatever stands here is named by a literal, or below."""
CHOSEN = {
    ("staging", "STAGING"): {"Staging"},
    ("deadlines", "STALLED"): {"Stalled"},
    ("deadlines", "reason"): {"StartupDeadlineExceeded"},
    ("diagnosis", "reason_of(int(code[1]))"): EXIT_REASONS,
    ("diagnosis", "word.reason"): EXIT_REASONS,
    ("diagnosis", "reason"): {disruptions.OTHER, *(reason for _, _, reason, _ in disruptions.TABLE)},
    ("diagnosis", "reason if reason == 'DeadlineExceeded' else ExitCode.CRASH.reason"): {"DeadlineExceeded", "Crash"},
    ("obstacles", "reason"): {"Unschedulable", "SchedulingGated", "SchedulerError", *obstacles.CREATE_REASONS},
    ("obstacles", "f'{kind}Missing'"): {"SecretMissing", "ConfigMapMissing"},
}
"""Reasons that follow from something: the module, the expression, and all that it can be."""


def calls() -> Iterator[tuple[str, str, ast.expr]]:
    """Every call that names a reason: module, function, and the expression."""
    for module in MODULES:
        for node in ast.walk(ast.parse(module.read_text())):
            if not isinstance(node, ast.Call):
                continue
            function = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            on_turn = not isinstance(node.func, ast.Attribute) or ast.unparse(node.func.value) in ("turn", "self")
            if function in SETTERS and on_turn and len(node.args) > SETTERS[function]:
                yield module.stem, function, node.args[SETTERS[function]]


def said() -> set[str]:
    """Every reason that the planner's code can name."""
    found: set[str] = set()
    for module, _, expression in calls():
        if isinstance(expression, ast.Constant):
            found.add(expression.value)
        found |= CHOSEN.get((module, ast.unparse(expression)), set())
    return found


def test_every_reason_in_the_code_is_a_word_or_is_explained_here():
    unknown = [
        f"{module}: {ast.unparse(expression)}"
        for module, _, expression in calls()
        if not isinstance(expression, ast.Constant)
        and ast.unparse(expression) not in PASSED_ON
        and (module, ast.unparse(expression)) not in CHOSEN
    ]
    assert unknown == []


def test_what_is_explained_here_is_in_the_code():
    expressions = {(module, ast.unparse(expression)) for module, _, expression in calls()}
    assert [key for key in CHOSEN if key not in expressions] == []


def test_every_reason_that_the_planner_can_name_is_in_the_table():
    assert sorted(said() - set(conditions.reasons())) == []


def test_no_reason_is_in_the_table_that_the_planner_cannot_name():
    assert sorted(set(conditions.reasons()) - said()) == []


def test_every_exit_code_has_its_place():
    named = {item.name for item in (*conditions.FAULTS, *conditions.CRASHES)}
    assert named >= EXIT_REASONS


def test_every_condition_has_both_statuses_that_it_can_have():
    """Failed=False is never said: what has not failed needs no denial."""
    found = {(section.condition, section.status) for section in conditions.TABLE}
    kinds = ("Staged", "Started", "Running", "Suspended", "Succeeded")
    assert found == {(kind, status) for kind in kinds for status in ("True", "False")} | {("Failed", "True")}
    assert len(found) == len(conditions.TABLE)


@pytest.mark.parametrize("section", conditions.TABLE, ids=lambda section: f"{section.condition} {section.status}")
def test_a_section_names_each_reason_once(section):
    names = [item.name for item in section.reasons]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("reason", sorted(set(conditions.reasons())))
def test_a_reason_is_told_in_sentences(reason):
    items = {item for section in conditions.TABLE for item in section.reasons if item.name == reason}
    for item in items:
        assert item.when.endswith(".")
        assert item.remedy == "" or item.remedy.endswith(".")


def test_the_page_has_every_reason():
    page = conditions.page()
    assert [reason for reason in conditions.reasons() if f"| `{reason}` |" not in page] == []


def test_a_reason_is_known_with_its_condition_only():
    assert conditions.is_known("Started", "False", "Unschedulable")
    assert conditions.is_known("Failed", "True", "DoesNotFit")
    assert not conditions.is_known("Started", "True", "Unschedulable")
    assert not conditions.is_known("Started", "False", "Sunspots")
