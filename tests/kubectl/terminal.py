"""A terminal for tests and pictures: a program on a pseudo-terminal, and the screen that a person would see."""

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.text import Text

CONTROL = re.compile(r"\x1b\[(\?)?([\d;]*)([A-Za-z])|\r|\n")
FONTS = re.compile(r"@font-face \{.*?\}\s*", re.DOTALL)
STYLE = re.compile(r"\x1b\[[\d;]*m")


class Display:
    """Lines as a person sees them, colours included. Knows the few sequences that rich's live view writes."""

    def __init__(self) -> None:
        self.lines: list[str] = [""]
        self.row = 0
        self.cursor_is_shown = True

    def feed(self, text: str) -> None:
        """Take what a program wrote."""
        end = 0
        for found in CONTROL.finditer(text):
            self.lines[self.row] += text[end : found.start()]
            end = found.end()
            self._obey(found)
        self.lines[self.row] += text[end:]

    def _obey(self, found: re.Match[str]) -> None:
        private, argument, letter = found.groups()
        if found[0] == "\n":
            self.row += 1
            if self.row == len(self.lines):
                self.lines.append("")
        elif letter == "A":
            self.row = max(0, self.row - int(argument or 1))
        elif letter == "K":
            self.lines[self.row] = ""
        elif letter in ("h", "l") and private and argument == "25":
            self.cursor_is_shown = letter == "h"
        elif letter == "m":
            self.lines[self.row] += found[0]
        else:
            assert found[0] == "\r", f"a sequence that this terminal does not know: {found[0]!r}"

    def plain(self) -> str:
        """The screen without its colours."""
        return STYLE.sub("", "\n".join(self.lines))


class Terminal:
    """A program that believes to be on a terminal of so many columns."""

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str], columns: int = 110, folder: Path | None = None
    ) -> None:
        self.display = Display()
        self.columns = columns
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
        variables = {**environment, "TERM": "xterm-256color", "COLORTERM": "truecolor", "PYTHONIOENCODING": "utf-8"}
        self.process = subprocess.Popen(
            command, stdin=slave, stdout=slave, stderr=slave, env=variables, cwd=folder, start_new_session=True
        )
        os.close(slave)

    def until(self, holds: Callable[[Display], bool], seconds: float) -> None:
        """Read until the screen is as it should be; fails when the program or the time ends first."""
        deadline = time.monotonic() + seconds
        while not holds(self.display):
            assert time.monotonic() < deadline, f"it did not get there:\n{self.display.plain()}"
            assert self._read(1.0) or holds(self.display), f"the program ended:\n{self.display.plain()}"

    def end(self, seconds: float) -> int:
        """Read until the program ends; returns its exit code."""
        deadline = time.monotonic() + seconds
        while self._read(1.0):
            assert time.monotonic() < deadline, f"it did not end:\n{self.display.plain()}"
        return self.process.wait(timeout=10)

    def interrupt(self) -> None:
        """Ctrl-C: every process of the terminal gets it."""
        os.killpg(self.process.pid, signal.SIGINT)

    def close(self) -> None:
        """End the program if it runs."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        os.close(self._master)

    def _read(self, seconds: float) -> bool:
        if not select.select([self._master], [], [], seconds)[0]:
            return True
        try:
            chunk = os.read(self._master, 65536)
        except OSError:  # Linux says so when the program has closed its end
            return False
        self.display.feed(chunk.decode(errors="replace"))
        return bool(chunk)


def picture(lines: Sequence[str], title: str, columns: int) -> str:
    """The lines as an SVG of a terminal. No font is fetched from anywhere: the reader's own monospace one will do."""
    with open(os.devnull, "w") as nowhere:
        console = Console(record=True, width=columns, file=nowhere, force_terminal=True)
        for line in lines:
            console.print(Text.from_ansi(line), soft_wrap=True)
    return FONTS.sub("", console.export_svg(title=title, clear=False))
