"""Follows a FineTuneJob's status: one live line on a terminal, a line for each change elsewhere."""

import sys
import time
from collections.abc import Callable
from typing import TextIO

from cluster_tool import ClusterError, bar
from kube import Kube, Object

ENDED = ("Succeeded", "Failed")
EXPLAINED_BY = {"Staging": "Staged", "Starting": "Started", "Restarting": "Started"}
"""State -> the condition whose message explains it, where they do not have the same name."""
NO_STEP_YET = "no step yet: pods start, the model is loaded, its held-out loss is measured ..."
LOST_WATCHES = 30
"""Watches in a row that may fail, a second apart: the API server may restart while the job runs on."""


class Screen:
    """Shows the present line. Changes of state, and what the operator says about them, stay on the screen."""

    def __init__(self, out: TextIO = sys.stderr, clock: Callable[[], float] = time.monotonic) -> None:
        self.out = out
        self.clock = clock
        self.begun = clock()
        self.job: Object | None = None
        self.said = ("", "")

    def show(self, job: Object) -> None:
        """Take a new status and show it."""
        self.job = job
        told = headline(job), progress_line(job)
        if told[0] != self.said[0]:
            self.stay(told[0])
        if told[1] != self.said[1] and not self.out.isatty():
            self.stay(told[1] or NO_STEP_YET)
        self.said = told
        self.tick()

    def tick(self) -> None:
        """Draw the live line again; the clock goes on without news."""
        if self.out.isatty() and self.job:
            line = f"[{self.clock() - self.begun:4.0f}s] {progress_line(self.job) or NO_STEP_YET}"
            self.out.write("\r\x1b[K" + line[:99])
            self.out.flush()

    def stay(self, text: str) -> None:
        """Print a line that stays."""
        clear = "\r\x1b[K" if self.out.isatty() else ""
        self.out.write(f"{clear}[{self.clock() - self.begun:4.0f}s] {text}\n")
        self.out.flush()

    def end(self) -> None:
        """Remove the live line."""
        if self.out.isatty():
            self.out.write("\r\x1b[K")
            self.out.flush()


def headline(job: Object) -> str:
    """State and the sentence that explains it."""
    status = job.get("status") or {}
    state = status.get("state") or "Pending"
    kind = EXPLAINED_BY.get(state, state)
    told = next((one["message"] for one in status.get("conditions") or [] if one["type"] == kind), None)
    return f"{state}: {told}" if told else state


def progress_line(job: Object) -> str:
    """The bar, the loss, the speed and the time that is left; empty before the first step."""
    progress = (job.get("status") or {}).get("progress")
    if not progress:
        return ""
    parts = [f"{name} {form(progress[key])}" for key, name, form in SHOWN if progress.get(key) is not None]
    return bar(progress["step"], progress["totalSteps"], [" | ".join(parts)])


def duration(seconds: float) -> str:
    """Seconds as 4m05s."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"


SHOWN: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("loss", "loss", lambda loss: f"{loss:.3f}"),
    ("tokensPerSecond", "tok/s", lambda rate: f"{rate:.0f}"),
    ("estimatedRemainingSeconds", "ETA", duration),
)
"""Field of the progress, its name on the line, how its number is written."""


def follow(kube: Kube, name: str, namespace: str, screen: Screen) -> Object:
    """Show the job's status until it ended; returns it as it ended. Raises ClusterError when it was deleted."""
    lost = 0
    while True:
        try:
            for event in kube.watch("finetunejob", name, namespace):
                if event is None:
                    screen.tick()
                    continue
                lost = 0
                kind, job = event
                if kind == "DELETED":
                    raise Deleted(f"FineTuneJob {name} was deleted")
                screen.show(job)
                if (job.get("status") or {}).get("state") in ENDED:
                    return job
        except ClusterError as error:
            lost += 1
            if isinstance(error, Deleted) or lost > LOST_WATCHES:
                raise
            time.sleep(1)
        finally:
            screen.end()


class Deleted(ClusterError):
    """Somebody deleted the job while it was followed."""
