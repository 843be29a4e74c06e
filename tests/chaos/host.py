"""Hands on the embedded node itself: the processes of a pod, its network, a folder of its own, a component's death.

All of it needs root on the machine of the cluster.
"""

import os
import random
import shutil
import signal
import time
from contextlib import suppress
from pathlib import Path

import machine
import node
import process
from cluster_tool import ClusterError, Layout, run
from shell import wait_until

FOLDERS = Path("/run/kubetune-chaos")
"""Where volumes of their own are mounted."""


def own_folder(name: str) -> Path:
    """The folder of a run's own volume."""
    return FOLDERS / name


def processes_of(layout: Layout, uid: str) -> list[int]:
    """The processes of a pod without the one that holds its namespaces."""
    found = set()
    for group in machine.pod_groups(layout):
        if group.name == f"pod{uid}":
            for listing in group.rglob("cgroup.procs"):
                with suppress(OSError):
                    found |= {int(word) for word in listing.read_text().split()}
    words = {pid: process.command_line(pid) for pid in found}
    return sorted(pid for pid, line in words.items() if line and Path(line[0]).name != "pause")


def kill_container(layout: Layout, uid: str) -> None:
    """SIGKILL to all processes of a pod, its first one too, as a node that runs out of memory does."""
    found = processes_of(layout, uid)
    if not found:
        raise ClusterError(f"pod {uid} has no process")
    for pid in found:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def in_network(layout: Layout, uid: str, *argv: str) -> None:
    """Run a program of this machine in the network namespace of a pod."""
    pid = processes_of(layout, uid)[0]
    run(["nsenter", f"--net=/proc/{pid}/ns/net", *argv])


def kill_component(layout: Layout, name: str, seconds: float) -> None:
    """SIGKILL to a component of the cluster, which then stays away for so long."""
    pid = process.find(layout, node.components(layout)[name])
    if pid is None:
        raise ClusterError(f"{name} does not run")
    os.kill(pid, signal.SIGKILL)
    wait_until(f"{name} is gone", lambda: not process.alive(pid), 10)
    time.sleep(seconds)


def mount_own(name: str, megabytes: int) -> Path:
    """A file system of its own for one run, which any user may write."""
    folder = own_folder(name)
    folder.mkdir(parents=True, exist_ok=True)
    run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m,mode=0777", "chaos", folder])
    return folder


def unmount_own(name: str) -> None:
    """Remove it; what still holds it keeps it until it ends."""
    folder = own_folder(name)
    run(["umount", "--lazy", folder], check=False)
    with suppress(OSError):
        folder.rmdir()


def unmount_all() -> None:
    """Remove all of them."""
    for point in machine.mounts_under(FOLDERS):
        run(["umount", "--lazy", point], check=False)
    shutil.rmtree(FOLDERS, ignore_errors=True)


def fill(folder: Path, rest: int) -> None:
    """Take all space of a file system but so many bytes, rounded to its blocks."""
    room = os.statvfs(folder)
    taken = room.f_bavail * room.f_frsize - rest
    with (folder / "filler").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(1, taken))


def flip(file: Path, chance: random.Random) -> None:
    """Change one bit of a file; its size stays."""
    content = bytearray(file.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    file.write_bytes(content)


def cut(file: Path, chance: random.Random) -> None:
    """Cut a file off at any byte."""
    os.truncate(file, chance.randrange(file.stat().st_size))
