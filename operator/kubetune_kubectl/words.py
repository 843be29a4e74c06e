"""Small drawings and phrases that several commands show. Pure."""

from collections.abc import Sequence
from datetime import datetime
from itertools import pairwise
from typing import Any, Final, TextIO

from rich.console import Console
from rich.table import Table
from rich.text import Text

from kubetune_operator.api import State, duration

COLOURS: Final[dict[State, str]] = {
    "Pending": "yellow",
    "Staging": "yellow",
    "Starting": "yellow",
    "Running": "cyan",
    "Suspended": "magenta",
    "Restarting": "yellow",
    "Succeeded": "green",
    "Failed": "red",
}
PIPE_WIDTH: Final = 10_000
"""Columns where nobody looks: a program that reads the output must find every word."""

_BLOCKS: Final = "▁▂▃▄▅▆▇█"
_ASCII_BLOCKS: Final = "_.-=+*#"


def console(stream: TextIO) -> Console:
    """rich on a stream: colours and the width of the terminal there, neither elsewhere."""
    width = None if stream.isatty() else PIPE_WIDTH
    return Console(file=stream, width=width, highlight=False, soft_wrap=not stream.isatty())


def is_unicode(screen: Console) -> bool:
    """Whether block characters can be shown."""
    return screen.encoding.lower().replace("-", "").startswith("utf")


def sparkline(values: Sequence[float], width: int, unicode: bool = True) -> str:
    """The values as a line of blocks, at most `width` of them; each block is the mean of its share."""
    blocks = _BLOCKS if unicode else _ASCII_BLOCKS
    if not values:
        return ""
    count = min(width, len(values))
    edges = [index * len(values) // count for index in range(count + 1)]
    means = [sum(values[start:end]) / (end - start) for start, end in pairwise(edges)]
    low, high = min(means), max(means)
    scale = (len(blocks) - 1) / (high - low) if high > low else 0.0
    return "".join(blocks[round((mean - low) * scale)] for mean in means)


def bar(share: float, width: int, unicode: bool = True) -> str:
    """A bar of `width` characters of which `share` (0 to 1) is full."""
    full, empty = ("█", "░") if unicode else ("#", ".")
    filled = int(width * min(1.0, max(0.0, share)))
    return full * filled + empty * (width - filled)


def columns(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> Table:
    """A table as kubectl prints it; a last column that is too wide ends in an ellipsis."""
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="bold")
    for name in header:
        table.add_column(name, no_wrap=True, overflow="ellipsis")
    for row in rows:
        table.add_row(*(cell if isinstance(cell, Text) else Text(str(cell)) for cell in row))
    return table


def pairs(rows: Sequence[tuple[str, str]]) -> Table:
    """Names and values below each other."""
    table = columns(["", ""], rows)
    table.show_header = False
    table.columns[0].style = "dim"
    table.columns[1].no_wrap = False
    return table


def print_table(screen: Console, table: Table) -> None:
    """Print a table; lines that a program reads do not end in blanks."""
    if screen.is_terminal:
        screen.print(table)
        return
    with screen.capture() as drawn:
        screen.print(table)
    screen.file.write("".join(f"{line.rstrip()}\n" for line in drawn.get().splitlines()))


def state_text(state: State) -> Text:
    """The state in its colour."""
    return Text(state, style=COLOURS[state])


def first_line(text: str) -> str:
    """The text's first line: the rest is a log."""
    return text.strip().partition("\n")[0]


def age(since: datetime, now: datetime) -> str:
    """How long ago, such as `5m10s`."""
    return duration(max(0.0, (now - since).total_seconds()))
