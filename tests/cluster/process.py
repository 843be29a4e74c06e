"""Long-running components: started detached, found again by a later call, stopped in order.

A pid file is a hint, never the truth: a pid is ours only if it is alive and its command line is the one we started.
Without a (good) pid file the command line itself is searched for, so a start that was killed before it wrote the file
is found too.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from layout import Layout
from shell import POLL_SECONDS, ClusterError, open_log, tail, wait_until

PROC = Path("/proc")
LISTEN = "0A"


@dataclass(frozen=True)
class Component:
    """One program of the cluster.

    `healthy` asks its real health endpoint. `files` are configuration files it reads once: a change restarts it.
    `ports` are checked for a stranger before the start.
    """

    name: str
    argv: tuple[str, ...]
    healthy: Callable[[], bool]
    files: tuple[Path, ...] = ()
    ports: tuple[int, ...] = ()
    start_seconds: float = 60
    environment: dict[str, str] = field(default_factory=dict)

    def digest(self) -> str:
        """Return a digest of the configuration files' content."""
        total = hashlib.sha256()
        for path in self.files:
            total.update(path.read_bytes() if path.is_file() else b"absent")
        return total.hexdigest()


def command_line(pid: int) -> tuple[str, ...] | None:
    """Return a live process's argv; None for no such process or a zombie."""
    try:
        raw = (PROC / str(pid) / "cmdline").read_bytes()
    except OSError:
        return None
    return tuple(word.decode(errors="replace") for word in raw.rstrip(b"\0").split(b"\0")) if raw else None


def alive(pid: int) -> bool:
    """Say whether a process runs, zombies excluded. Unlike `command_line` this also holds in the moment of its exec."""
    reap(pid)
    try:
        state = (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


def processes() -> Iterator[tuple[int, tuple[str, ...]]]:
    """Yield (pid, argv) of every process that has a command line."""
    for entry in PROC.iterdir():
        if entry.name.isdigit() and (argv := command_line(int(entry.name))):
            yield int(entry.name), argv


def find(layout: Layout, component: Component) -> int | None:
    """Return the pid of the running component with exactly its wanted argv, or None."""
    record = read_record(layout, component.name)
    if record and command_line(record[0]) == component.argv:
        return record[0]
    return next((pid for pid, argv in processes() if argv == component.argv), None)


def read_record(layout: Layout, name: str) -> tuple[int, str] | None:
    """Return (pid, digest of configuration) from the pid file; None if it is absent or half-written."""
    try:
        record = json.loads((layout.run / f"{name}.pid").read_text())
        return int(record["pid"]), str(record["digest"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def ensure(layout: Layout, component: Component) -> str:
    """Make the component run with its wanted arguments and configuration, and wait until it is healthy."""
    pid = find(layout, component)
    record = read_record(layout, component.name)
    current = record is not None and record == (pid, component.digest())
    if pid is None or not current:
        for stale in ours(layout, component):
            stop(stale)
        start(layout, component)
    wait_healthy(layout, component)
    return "running already" if pid is not None and current else "started"


def ours(layout: Layout, component: Component) -> list[int]:
    """Return the pids of this component from an earlier `up`, whatever its arguments were."""
    marks = (str(layout.state) + "/", str(layout.cache) + "/")
    return [
        pid
        for pid, argv in processes()
        if program(argv) == program(component.argv) and any(mark in word for word in argv for mark in marks)
    ]


def program(argv: tuple[str, ...]) -> tuple[str, str]:
    """Return what identifies a program: its file's name, and for an interpreter the script's."""
    name = Path(argv[0]).name
    return (name, Path(argv[1]).name) if name.startswith("python") and len(argv) > 1 else (name, "")


def start(layout: Layout, component: Component) -> None:
    """Start a component detached from us, its output in its log, and write its pid file."""
    refuse_taken_ports(component)
    log = layout.log / f"{component.name}.log"
    if log.is_file():
        log.replace(log.with_suffix(".log.1"))
    sink = open_log(log)
    streams = [
        (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
        (os.POSIX_SPAWN_DUP2, sink, 1),
        (os.POSIX_SPAWN_DUP2, sink, 2),
    ]
    try:  # not subprocess: it insists on waiting for its children
        pid = os.posix_spawn(
            component.argv[0], component.argv, component.environment, file_actions=streams, setsid=True
        )
    except OSError as error:
        raise ClusterError(f"{component.name} cannot be started: {error}") from error
    finally:
        os.close(sink)
    layout.run.mkdir(parents=True, exist_ok=True)
    pid_file = layout.run / f"{component.name}.pid"
    temporary = pid_file.with_suffix(".pid.new")
    temporary.write_text(json.dumps({"pid": pid, "digest": component.digest()}))
    temporary.replace(pid_file)


def wait_healthy(layout: Layout, component: Component) -> None:
    """Wait for the health endpoint; a component that dies meanwhile ends the wait with its last lines."""
    log = layout.log / f"{component.name}.log"

    def holds() -> bool:
        if component.healthy():
            return True
        record = read_record(layout, component.name)
        if record is None or not alive(record[0]):
            raise ClusterError(f"{component.name} ended while it was starting:\n{tail(log)}")
        return False

    wait_until(f"{component.name} healthy", holds, component.start_seconds, lambda: tail(log))


def stop(pid: int, seconds: float = 10) -> None:
    """End a process: SIGTERM, then SIGKILL after `seconds`; return when it is gone."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            return
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if not alive(pid):
                return
            time.sleep(POLL_SECONDS)
    raise ClusterError(f"process {pid} does not end, not even by SIGKILL: it hangs in the kernel")


def reap(pid: int) -> None:
    """Collect a child of ours, so that it does not stay as a zombie; strangers' children are left alone."""
    try:
        os.waitpid(pid, os.WNOHANG)
    except ChildProcessError:
        return


def refuse_taken_ports(component: Component) -> None:
    """Raise ClusterError if another program listens on a port that the component needs."""
    for port in component.ports:
        if inode := listening_inode(port):
            raise ClusterError(
                f"{component.name} needs port {port}, which {owner(inode)} holds. "
                "Stop that program (a system service: `systemctl stop NAME`) and run this again."
            )


def listening_inode(port: int) -> str | None:
    """Return the socket inode of a listener on this TCP port, of any address."""
    for table in ("tcp", "tcp6"):
        path = PROC / "net" / table
        for line in path.read_text().splitlines()[1:] if path.exists() else ():
            words = line.split()
            if words[3] == LISTEN and int(words[1].rpartition(":")[2], 16) == port:
                return words[9]
    return None


def owner(inode: str) -> str:
    """Return the name and pid of the process that holds a socket."""
    for pid, argv in processes():
        if f"socket:[{inode}]" in open_files(pid):
            return f"`{Path(argv[0]).name}` (pid {pid})"
    return "another program"


def open_files(pid: int) -> set[str]:
    """Return what a process's descriptors point to; descriptors that close meanwhile are left out."""
    found = set()
    with suppress(OSError):
        for link in (PROC / str(pid) / "fd").iterdir():
            with suppress(OSError):
                found.add(os.readlink(link))
    return found
