"""The progress line in a worker's log: how the trainer writes it, and how others read it back."""

import re
from typing import Final

from kubetune_contract.progress import Progress

BAR_WIDTH: Final = 24
_WRITTEN: Final = re.compile(r"^\[[#.]+\] +(\d+)%  step (\d+)/(\d+)  loss (\S+)  (\d+) tok/s \((\d+) labels\)  ETA ")


def progress_line(progress: Progress) -> str:
    """Bar, steps, loss, rates, time left. For a finished step: loss and rates are there.

    `[######......]  50%  step 5/10  loss 1.2345  980 tok/s (310 labels)  ETA 0:12`
    """
    filled = BAR_WIDTH * progress.percentage // 100
    bar = "#" * filled + "." * (BAR_WIDTH - filled)
    minutes, seconds = divmod(progress.estimated_remaining_seconds or 0, 60)
    eta = f"{minutes // 60}:{minutes % 60:02}:{seconds:02}" if minutes >= 60 else f"{minutes}:{seconds:02}"
    return (
        f"[{bar}] {progress.percentage:3}%  step {progress.step}/{progress.total_steps}  loss {progress.loss:.4f}  "
        f"{progress.tokens_per_second:.0f} tok/s ({progress.label_tokens_per_second:.0f} labels)  ETA {eta}"
    )


def loss_in_line(line: str) -> tuple[int, float] | None:
    """Step and loss (nats per label token) of a progress line; None for any other line of a log."""
    found = _WRITTEN.match(line)
    if found is None:
        return None
    try:
        return int(found[2]), float(found[4])
    except ValueError:
        return None
