"""Who used the processors, and how much memory: read from /proc, so that a noisy run is seen as one."""

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, NamedTuple

TICKS: Final = os.sysconf("SC_CLK_TCK")
PAGE: Final = os.sysconf("SC_PAGE_SIZE")
PROC: Final = Path("/proc")
BUSY: Final = (0, 1, 2, 5, 6, 7)
"""Columns of /proc/stat: user, nice, system, irq, softirq, steal. A guest's time is in the first two."""


class Sample(NamedTuple):
    """One reading."""

    time: float
    """time.monotonic()."""
    busy: float
    """Seconds of all processors together since the machine started."""
    by: dict[str, float]
    """Seconds of each group of processes."""


class Share(NamedTuple):
    """What happened between two readings."""

    seconds: float
    by: dict[str, float]
    """Processor seconds of each group."""
    foreign: float
    """Cores that nobody of the groups had."""

    def cores(self, group: str) -> float:
        """Cores that the group had in the middle."""
        return self.by[group] / self.seconds


def sample(groups: Mapping[str, Sequence[int]]) -> Sample:
    """Read the processors' time of groups of processes, by their pids; our own children that ended are counted."""
    columns = (PROC / "stat").read_text().split("\n", 1)[0].split()[1:]
    busy = sum(int(columns[place]) for place in BUSY) / TICKS
    return Sample(time.monotonic(), busy, {name: sum(map(seconds_of, pids)) for name, pids in groups.items()})


def between(before: Sample, after: Sample) -> Share:
    """What was used from one reading to the next. A group has to have the same processes in both."""
    seconds = after.time - before.time
    by = {name: after.by[name] - before.by[name] for name in before.by}
    return Share(seconds, by, max(0.0, (after.busy - before.busy - sum(by.values())) / seconds))


def seconds_of(pid: int) -> float:
    """Processor seconds of a process and, if it is this one, of its children that have ended."""
    fields = (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    last = 15 if pid == os.getpid() else 13
    return sum(int(field) for field in fields[11:last]) / TICKS


def resident_mib(pid: int) -> float:
    """Resident memory of a process, in MiB."""
    return int((PROC / str(pid) / "statm").read_text().split()[1]) * PAGE / 2**20


def same_priority(pids: Sequence[int]) -> None:
    """Give every thread of the processes this one's priority: otherwise the figures tell of priorities."""
    own = os.getpriority(os.PRIO_PROCESS, 0)
    for pid in pids:
        for task in (PROC / str(pid) / "task").iterdir():
            os.setpriority(os.PRIO_PROCESS, int(task.name), own)
