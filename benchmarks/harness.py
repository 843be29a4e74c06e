"""Sides that are measured in turns: a fresh process for each sample, and rounds that another program disturbed again.

A side is a command. It gets two more arguments, the file of its case (JSON) and the file for its result (a JSON object
of numbers). What it prints is shown only where it fails.
"""

import json
import math
import os
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from benchmarks.figures import Figure, figure

RUNS: Final = 5
FOREIGN_SHARE: Final = 0.06
"""Of the time of the cores that we may use: what others may take of it during a sample."""
REJECTED_PER_RUN: Final = 2
"""Rounds that may be rejected for each that counts, before the machine is called busy."""
LIMIT: Final = 900.0
"""Seconds of one sample."""
STARTED: Final = "started"
"""The case's field with the time at which its process was started, of `time.monotonic`, which all processes share."""
_LINES: Final = 30
"""Of a failed side's output."""


class SideError(RuntimeError):
    """A side failed, or gave no result. The message ends with its last lines."""


class BusyError(RuntimeError):
    """Too many rounds were disturbed."""


@dataclass(frozen=True)
class Side:
    """One of those that are compared."""

    name: str
    command: Sequence[str]
    case: Mapping[str, Any] = field(default_factory=dict)
    """What it is to do."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Beside that of this process."""
    warm_up: Mapping[str, Any] | None = field(default_factory=dict)
    """What the first sample, which is thrown away, has in the case instead; None: it has none, its files are warm."""


@dataclass(frozen=True)
class Sample:
    """What one process measured, and what went on meanwhile."""

    values: Mapping[str, float]
    seconds: float
    """From its start to its end."""
    own: float
    """CPU seconds of the process and its children."""
    foreign: float
    """Share of our cores' time that others took."""


@dataclass(frozen=True)
class Rounds:
    """The samples that count."""

    samples: Mapping[str, Sequence[Sample]]
    """Of each side, in the order of the rounds."""
    rejected: int
    """Rounds that others disturbed."""
    load: float
    """The load average of others when the rounds began."""

    def values(self, side: str, key: str) -> list[float]:
        """What the side's samples say of `key`."""
        return [sample.values[key] for sample in self.samples[side]]

    def median(self, side: str, key: str) -> float:
        """Of `values`."""
        return statistics.median(self.values(side, key))

    def figure(self, key: str, ours: str, peer: str | None = None, *, command: str, peer_name: str = "") -> Figure:
        """The figure of one side's `key`, beside another side's."""
        other = self.values(peer, key) if peer is not None else []
        return figure(self.values(ours, key), other, load=self.load, command=command, peer_name=peer_name)


class OthersLoad:
    """The load average over a minute without what our own samples have put into it.

    The kernel's average forgets with exp(-t/60); a sample that kept n threads running leaves n times what was not
    forgotten of it.
    """

    def __init__(self) -> None:
        self._samples: list[tuple[float, float, float]] = []

    def add(self, start: float, end: float, threads: float) -> None:
        """A sample of ours ran (`time.monotonic`, seconds) and kept `threads` cores busy."""
        self._samples.append((start, end, threads))

    def now(self) -> float:
        """At least 0."""
        now = time.monotonic()
        ours = sum(n * (math.exp((end - now) / 60) - math.exp((start - now) / 60)) for start, end, n in self._samples)
        return max(0.0, os.getloadavg()[0] - ours)


LOAD: Final = OthersLoad()


def in_turns(
    sides: Sequence[Side],
    runs: int = RUNS,
    *,
    warm: bool = True,
    allowed: float = FOREIGN_SHARE,
    say: Callable[[str], None] | None = None,
) -> Rounds:
    """`runs` rounds of one sample of each side, after a warm-up of each.

    A round in which others took more than `allowed` of our cores' time is made again; 1 allows all.

    Raises:
        SideError: a side failed.
        BusyError: more rounds were disturbed than `REJECTED_PER_RUN` for each that is wanted.
    """
    tell = say or (lambda text: print(text, file=sys.stderr, flush=True))
    load = LOAD.now()
    if warm:
        for side in sides:
            if side.warm_up is not None:
                sample(side, {**side.case, **side.warm_up})
    kept: dict[str, list[Sample]] = {side.name: [] for side in sides}
    done = rejected = 0
    while done < runs:
        tell(f"round {done + 1} of {runs}, load of others {LOAD.now():.2f}")
        found = {side.name: sample(side, side.case) for side in sides}
        for name, one in found.items():
            tell(f"  {name:24} {_words(one)}")
        if noisy := [f"{name} ({one.foreign:.0%})" for name, one in found.items() if one.foreign > allowed]:
            rejected += 1
            tell(f"  rejected: others took more than {allowed:.0%} of the cores beside {', '.join(noisy)}")
            if rejected > REJECTED_PER_RUN * runs:
                raise BusyError(f"{rejected} rounds were disturbed by other programs: stop them, or measure later")
            continue
        done += 1
        for name, one in found.items():
            kept[name].append(one)
    return Rounds(kept, rejected, load)


def sample(side: Side, case: Mapping[str, Any]) -> Sample:
    """One fresh process of the side. Raises SideError."""
    with tempfile.TemporaryDirectory(prefix="kubetune-bench-") as name:
        folder = Path(name)
        files = [folder / "case.json", folder / "result.json"]
        log = folder / "log"
        busy, started = busy_seconds(), time.monotonic()
        files[0].write_text(json.dumps({**case, STARTED: started}))
        with log.open("wb") as output:
            child = subprocess.Popen(
                [*side.command, *map(str, files)],
                env={**os.environ, **side.environment},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            own = _await(child)
        ended = time.monotonic()
        foreign = busy_seconds() - busy - own
        if child.returncode or not files[1].exists():
            raise SideError(_failure(side, child.returncode, log))
        values = json.loads(files[1].read_text())
    elapsed = ended - started
    LOAD.add(started, ended, own / elapsed)
    return Sample(values, elapsed, own, max(0.0, foreign) / (elapsed * len(os.sched_getaffinity(0))))


def busy_seconds() -> float:
    """CPU seconds that anyone has taken of the cores that this process may use, and those that a host took from us."""
    cores = {f"cpu{core}" for core in os.sched_getaffinity(0)}
    total = 0
    for line in Path("/proc/stat").read_text().splitlines():
        name, *ticks = line.split()
        if name in cores:  # user nice system idle iowait irq softirq steal; guest is in user already
            total += sum(map(int, ticks[:3])) + sum(map(int, ticks[5:8]))
    return total / os.sysconf("SC_CLK_TCK")


def _await(child: "subprocess.Popen[bytes]") -> float:
    """Until the process has ended, or the limit is over. CPU seconds of it and of all children that it waited for."""
    before = _children_seconds()
    try:
        child.wait(LIMIT)
    except subprocess.TimeoutExpired:
        pass
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    return _children_seconds() - before


def _children_seconds() -> float:
    taken = os.times()
    return taken.children_user + taken.children_system


def _failure(side: Side, code: int, log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines()[-_LINES:]
    why = f"was stopped after {LIMIT:g} seconds" if code == -signal.SIGKILL else f"ended with {code} and no result"
    return f"{side.name} {why}: {shlex.join(side.command)}\n" + "\n".join(lines)


def _words(one: Sample) -> str:
    told = ", ".join(f"{key} {value:,.4g}" for key, value in one.values.items())
    return f"{told} ({one.seconds:.1f} s, others {one.foreign:.0%})"
