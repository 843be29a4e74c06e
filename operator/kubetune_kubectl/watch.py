"""`kubectl finetune watch NAME`: follow a job until it ends."""

import sys
from datetime import UTC, datetime
from typing import Final, Self, TextIO

from rich.console import Console
from rich.live import Live
from rich.text import Text

from kubetune_kubectl.errors import NoRights, PluginError
from kubetune_kubectl.follow import Sight, follow
from kubetune_kubectl.kubectl import Kubectl
from kubetune_kubectl.live import block, headline, progress_line
from kubetune_kubectl.losses import Losses, history
from kubetune_kubectl.outcome import ending_lines
from kubetune_kubectl.words import COLOURS, console, is_unicode

SUCCEEDED: Final = 0
FAILED: Final = 1


def run(kubectl: Kubectl, name: str, stream: TextIO | None = None) -> int:
    """Show the job until it ended; 0 if it succeeded, 1 if it failed."""
    screen = Screen(kubectl, console(stream or sys.stdout))
    with screen:
        for sight in follow(kubectl, name):
            screen.show(sight, datetime.now(UTC))
            if sight.job.finished:
                break
    for line in ending_lines(sight.job):
        screen.console.print(line)
    return SUCCEEDED if sight.job.succeeded else FAILED


class Screen:
    """A live block on a terminal, plain lines elsewhere. Changes of state stay in either case."""

    def __init__(self, kubectl: Kubectl, screen: Console) -> None:
        self.console = screen
        self._kubectl = kubectl
        self._losses = Losses()
        self._notes: list[str] = []
        self._has_history = False
        self._said: dict[str, str | None] = {}
        self._live = Live(console=screen, auto_refresh=False) if screen.is_terminal else None

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, sight: Sight, now: datetime) -> None:
        """Take a sight."""
        if sight.news:
            self._learn(sight)
        state = headline(sight.job, now)
        if self._live is not None:
            self._say("state", state, COLOURS[sight.job.state], now)
            drawn = block(sight, self._losses, self._notes, now, is_unicode(self.console))
            self._live.update(drawn, refresh=True)
            return
        progress = sight.job.status.progress
        self._say("progress", progress_line(progress) if progress and progress.step else None, "", now)
        again = f"trying again: {sight.trouble}" if sight.trouble else None
        self._say("trouble", again, "red", now)
        self._say("state", state, COLOURS[sight.job.state], now)

    def _learn(self, sight: Sight) -> None:
        progress = sight.job.status.progress
        if progress is not None and progress.step and not self._has_history and sight.pods:
            self._has_history = True
            try:
                for log in history(self._kubectl.within(sight.job.namespace), sight.pods):
                    self._losses.read(log)
            except NoRights:
                self._notes.append("losses before now are not shown: reading them needs the right to get pods/log")
            except PluginError as error:
                self._notes.append(f"losses before now are not shown: {error}")
        self._losses.see(progress)

    def _say(self, about: str, text: str | None, style: str, now: datetime) -> None:
        """A line that stays, if it says something new."""
        if text is not None and text != self._said.get(about):
            clock = now.astimezone().strftime("%H:%M:%S")
            self.console.print(Text.assemble((clock, "dim"), " ", (text, style)))
        self._said[about] = text
