"""A plan of steps: independent ones run side by side, each is shown with its time, a bar on a terminal."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TextIO

from shell import ClusterError, terminate_all

REDRAW_SECONDS = 0.2
STILL_RUNNING_SECONDS = 30.0
BAR_WIDTH = 24
Detail = Callable[[], str | None]


@dataclass
class Step:
    """One named piece of work and where it stands."""

    name: str
    work: Callable[[], str | None]
    after: tuple[str, ...] = ()
    started: float | None = None
    seconds: float | None = None
    error: BaseException | None = None
    said: float = 0.0

    @property
    def running(self) -> bool:
        """Started and not ended."""
        return self.started is not None and self.seconds is None

    @property
    def done(self) -> bool:
        """Ended well."""
        return self.seconds is not None and self.error is None


class Plan:
    """Steps and what each waits for. A step returns a word for its line (`already there`) or None."""

    def __init__(self, out: TextIO = sys.stderr, clock: Callable[[], float] = time.monotonic) -> None:
        self.out = out
        self.clock = clock
        self.steps: dict[str, Step] = {}
        self.condition = threading.Condition()
        self.begun = clock()

    def add(self, name: str, work: Callable[[], str | None], *, after: tuple[str, ...] = ()) -> None:
        """Add a step that starts when those named in `after` are done; names that are not in the plan are ignored."""
        self.steps[name] = Step(name, work, tuple(other for other in after if other in self.steps))

    def run(self) -> None:
        """Run all steps; raise the first failure after showing it, or the interrupt that came from outside.

        Either way the commands that run at that moment are ended: a compiler must not go on without us.
        """
        try:
            with self.condition:
                self.run_to_end()
        except BaseException:
            terminate_all()
            raise
        finally:
            self.clear_bar()

    def run_to_end(self) -> None:
        """Start steps as they may start until all are done; raise the first failure."""
        while not all(step.done for step in self.steps.values()):
            if failed := next((step for step in self.steps.values() if step.error), None):
                raise failed.error or AssertionError
            for step in self.startable():
                self.launch(step)
            self.draw()
            self.condition.wait(REDRAW_SECONDS)

    def startable(self) -> list[Step]:
        """Return the steps that have not begun and whose predecessors are done."""
        return [
            step
            for step in self.steps.values()
            if step.started is None and all(self.steps[name].done for name in step.after)
        ]

    def launch(self, step: Step) -> None:
        """Start a step in a thread of its own; a daemon, so that a failure elsewhere can end the program."""
        step.started = step.said = self.clock()
        threading.Thread(target=self.perform, args=(step,), daemon=True).start()

    def perform(self, step: Step) -> None:
        """Do a step's work and record how it ended."""
        word, error = None, None
        try:
            word = step.work()
        except BaseException as caught:  # noqa: BLE001 - handed to the thread that called `run`
            error = caught
        with self.condition:
            step.error = error
            step.seconds = self.clock() - (step.started or 0.0)
            self.line(f"{step.name} ... {'FAILED' if error else word or 'done'} ({step.seconds:.1f} s)")
            self.condition.notify()

    def line(self, text: str) -> None:
        """Print a line that stays, with the time since the plan began."""
        self.clear_bar()
        self.out.write(f"[{self.clock() - self.begun:4.0f}s] {text}\n")
        self.out.flush()

    def draw(self) -> None:
        """Show what runs now: a bar on a terminal, else one line per long step every half minute."""
        running = [step for step in self.steps.values() if step.running]
        if self.out.isatty():
            done = sum(step.done for step in self.steps.values())
            self.out.write("\r\x1b[K" + bar(done, len(self.steps), [self.told(step) for step in running]))
            self.out.flush()
            return
        for step in running:
            if self.clock() - step.said >= STILL_RUNNING_SECONDS:
                step.said = self.clock()
                self.line(f"{self.told(step)} ...")

    def told(self, step: Step) -> str:
        """Return a running step's name and its seconds."""
        return f"{step.name} {self.clock() - (step.started or 0.0):.0f} s"

    def clear_bar(self) -> None:
        """Remove the bar before something else is printed."""
        if self.out.isatty():
            self.out.write("\r\x1b[K")


def bar(done: int, total: int, running: list[str]) -> str:
    """Return the progress line; its length stays under 100 columns, or a terminal would wrap it at each redraw."""
    filled = BAR_WIDTH * done // max(total, 1)
    text = f"[{'#' * filled}{'.' * (BAR_WIDTH - filled)}] {done}/{total}  {' | '.join(running)}"
    return text[:99]


def describe(error: BaseException) -> str:
    """Return what the user reads about a failure: our own errors as they are, others with their kind."""
    return str(error) if isinstance(error, ClusterError) else f"{type(error).__name__}: {error}"
