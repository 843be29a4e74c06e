"""Steps run side by side where they may, and are shown with their time."""

from __future__ import annotations

import io
import re
import signal
import threading

import pytest
import shell
import steps
from shell import ClusterError
from steps import Plan, bar, describe


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_a_step_starts_only_when_those_before_it_are_done() -> None:
    order: list[str] = []
    plan = Plan(io.StringIO())
    plan.add("etcd", lambda: order.append("etcd"))
    plan.add("api", lambda: order.append("api"), after=("etcd",))
    plan.add("node", lambda: order.append("node"), after=("api", "etcd"))
    plan.run()
    assert order == ["etcd", "api", "node"]


def test_independent_steps_run_at_the_same_time() -> None:
    both = threading.Barrier(2, timeout=10)
    plan = Plan(io.StringIO())
    plan.add("packages", lambda: str(both.wait()))
    plan.add("compiler", lambda: str(both.wait()))
    plan.run()


def test_a_predecessor_that_is_not_in_the_plan_is_ignored() -> None:
    plan = Plan(io.StringIO())
    plan.add("image", lambda: None, after=("virtual environment",))
    plan.run()
    assert plan.steps["image"].done


def test_a_failure_is_raised_and_nothing_new_starts() -> None:
    out, begun = io.StringIO(), []

    def fail() -> None:
        raise ClusterError("etcd has no disk")

    plan = Plan(out)
    plan.add("etcd", fail)
    plan.add("api", lambda: begun.append("api"), after=("etcd",))
    with pytest.raises(ClusterError, match="etcd has no disk"):
        plan.run()
    assert begun == []
    assert re.search(r"etcd \.\.\. FAILED", out.getvalue())


def test_a_failure_ends_a_command_that_runs_beside_it() -> None:
    ended = threading.Event()

    def long() -> None:
        try:
            shell.run(["sleep", "60"], check=False)
        finally:
            ended.set()

    def fail() -> None:
        shell.wait_until("the command runs", lambda: bool(shell._running), 10)
        raise ClusterError("no")

    plan = Plan(io.StringIO())
    plan.add("compiler", long)
    plan.add("etcd", fail)
    with pytest.raises(ClusterError, match="no"):
        plan.run()
    assert ended.wait(10)


def test_an_interrupt_ends_the_commands_that_run() -> None:
    ended = threading.Event()

    def long() -> None:
        shell.run(["sleep", "60"], check=False)
        ended.set()

    def interrupt() -> None:
        shell.wait_until("the command runs", lambda: bool(shell._running), 10)
        signal.raise_signal(signal.SIGINT)

    plan = Plan(io.StringIO())
    plan.add("compiler", long)
    plan.add("user", interrupt)
    with pytest.raises(KeyboardInterrupt):
        plan.run()
    assert ended.wait(10)


def test_plain_output_has_one_line_per_step_with_time_and_word() -> None:
    out = io.StringIO()
    plan = Plan(out)
    plan.add("packages", lambda: "already there")
    plan.add("etcd", lambda: None, after=("packages",))
    plan.run()
    lines = out.getvalue().splitlines()
    assert re.fullmatch(r"\[   \ds\] packages \.\.\. already there \(\d\.\d s\)", lines[0])
    assert re.fullmatch(r"\[   \ds\] etcd \.\.\. done \(\d\.\d s\)", lines[1])


def test_plain_output_says_every_half_minute_that_a_step_still_runs() -> None:
    now = [0.0]
    out = io.StringIO()
    plan = Plan(out, clock=lambda: now[0])
    plan.add("compiler", lambda: None)
    step = plan.steps["compiler"]
    step.started = step.said = 0.0
    for now[0] in (10.0, 31.0, 45.0, 62.0):
        plan.draw()
    assert out.getvalue().splitlines() == ["[  31s] compiler 31 s ...", "[  62s] compiler 62 s ..."]


def test_a_terminal_gets_a_bar_that_is_removed_before_each_line() -> None:
    out = Terminal()
    plan = Plan(out)
    plan.add("packages", lambda: None)
    plan.run()
    text = out.getvalue()
    assert "\r\x1b[K[........................] 0/1  packages" in text
    assert re.search(r"\r\x1b\[K\[   \ds\] packages \.\.\. done \(\d\.\d s\)\n", text)
    assert text.endswith("\r\x1b[K")


@pytest.mark.parametrize(
    ("done", "total", "filled"), [(0, 4, 0), (1, 4, 6), (4, 4, steps.BAR_WIDTH), (0, 0, 0)], ids=str
)
def test_the_bar_shows_the_share_of_steps_that_are_done(done: int, total: int, filled: int) -> None:
    assert bar(done, total, []).count("#") == filled


def test_the_bar_fits_on_a_line_of_100_columns() -> None:
    assert len(bar(1, 20, ["a step with a long name 100 s"] * 20)) < 100


def test_our_errors_are_shown_as_they_are_and_others_with_their_kind() -> None:
    assert describe(ClusterError("install Go")) == "install Go"
    assert describe(OSError("no space")) == "OSError: no space"
