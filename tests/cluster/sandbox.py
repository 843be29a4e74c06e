"""A machine within the machine for tests of the whole cluster: own network, processes, mounts and control groups.

A second cluster runs in it beside a developer's one, and `down` can be tested without taking that away. Processes in it
see only themselves, its loopback has all ports free, and when its first process ends the kernel ends all others.
Needs root and control groups of version 1 (a second kubelet on version 2 needs the groups delegated).
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from layout import HERE
from shell import SYSTEM_PATH, wait_until

CGROUPS = Path("/sys/fs/cgroup")
OWN_FOLDERS = ("/run", "/var/lib/cni", "/var/lib/kubelet", "/var/log/containers")
COMMON_OPTIONS = {"rw", "ro", "relatime", "nosuid", "nodev", "noexec"}
PARTS = ("--mount", "--net", "--pid", "--cgroup")


class Sandbox:
    """A running sandbox; commands in it have `home` as their home."""

    def __init__(self, home: Path, first: int, group: str) -> None:
        self.home, self.first, self.group = home, first, group
        self.environment = {
            "HOME": str(home),
            "PATH": f"{os.environ['PATH']}:{SYSTEM_PATH}",
            "KUBECONFIG": str(home / ".local/state/kubetune/admin.kubeconfig"),
        }

    def start(self, *argv: object) -> subprocess.Popen[str]:
        """Start a command in the sandbox, in a process group of its own."""
        words = ["nsenter", "--wdns=/", "--target", str(self.first), *PARTS, *(str(word) for word in argv)]
        return subprocess.Popen(
            words,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            preexec_fn=lambda: join(self.group),  # noqa: PLW1509 - no threads here, and nsenter does not join groups
        )

    def run(self, *argv: object, seconds: float = 120) -> tuple[int, str]:
        """Run a command to its end and return (exit code, what it printed)."""
        process = self.start(*argv)
        out, _ = process.communicate(timeout=seconds)
        return process.returncode, out

    def tool(self, *argv: object) -> tuple[int, str]:
        """Run the cluster tool."""
        return self.run(sys.executable, HERE / "cluster.py", *argv)


def hierarchies() -> list[Path]:
    """Return the mounted control group hierarchies (version 1, and the unified one beside them)."""
    lines = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    return [
        Path(words[1]) for words in lines if words[2] in ("cgroup", "cgroup2") and words[1].startswith(f"{CGROUPS}/")
    ]


def join(group: str) -> None:
    """Move this process into a control group of that name, made if it is not there, in every hierarchy."""
    for top in hierarchies():
        folder = top / group
        folder.mkdir(exist_ok=True)
        for name in ("cpuset.cpus", "cpuset.mems"):  # a new group of version 1 has none, and then takes no process
            if (top / name).exists() and not (folder / name).read_text().strip():
                (folder / name).write_text((top / name).read_text())
        (folder / "cgroup.procs").write_text(str(os.getpid()))


@contextmanager
def sandbox(home: Path, binaries: Path) -> Iterator[Sandbox]:
    """Give a sandbox with the cluster's binaries in its cache; at the end nothing of it stays."""
    group = f"kubetune-sandbox-{os.getpid()}"
    cache = home / ".cache" / "kubetune"
    cache.mkdir(parents=True)
    (cache / "bin").symlink_to(binaries)
    ready = home / "ready"
    inner = [sys.executable, __file__, str(ready)]
    outer = subprocess.Popen(
        # A killed test run takes its sandbox with it.
        ["setpriv", "--pdeathsig", "KILL", "unshare", *PARTS, "--fork", "--mount-proc", "--kill-child", *inner],
        preexec_fn=lambda: join(group),  # noqa: PLW1509 - as above
        stdin=subprocess.DEVNULL,
    )
    try:
        wait_until("the sandbox is ready", lambda: ready.exists() or outer.poll() is not None, 20)
        children = Path(f"/proc/{outer.pid}/task/{outer.pid}/children").read_text().split()
        yield Sandbox(home, int(children[0]), group)
    finally:
        outer.kill()  # it ignores SIGTERM; its death kills the sandbox's first process
        outer.wait(timeout=20)
        wait_until("the sandbox's control groups are gone", lambda: remove_groups(group), 20)
        shutil.rmtree(home, ignore_errors=True)


def remove_groups(group: str) -> bool:
    """Remove the sandbox's control groups, innermost first; say whether all are gone."""
    for top in hierarchies():
        for folder, _, _ in os.walk(top / group, topdown=False):
            with suppress(OSError):
                os.rmdir(folder)
    return not any((top / group).exists() for top in hierarchies())


def become_first_process(ready: str) -> None:
    """Make the sandbox's own folders, then collect ended processes for ever."""
    mount("--make-rprivate", "/")
    groups = [(path, *mount_words(path)) for path in hierarchies()]
    mount("-t", "sysfs", "sysfs", "/sys")
    mount("-t", "tmpfs", "tmpfs", str(CGROUPS))
    for path, kind, options in groups:
        path.mkdir()
        mount("-t", kind, *(["-o", options] if options else []), "cgroup", str(path))
    for folder in OWN_FOLDERS:
        Path(folder).mkdir(parents=True, exist_ok=True)
        mount("-t", "tmpfs", "tmpfs", folder)
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])
    Path(ready).touch()
    while True:
        signal.sigwait([signal.SIGCHLD])
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


def mount_words(path: Path) -> tuple[str, str]:
    """Return the type and the own options of a control group's mount."""
    words = next(line.split() for line in Path("/proc/mounts").read_text().splitlines() if line.split()[1] == str(path))
    return words[2], ",".join(it for it in words[3].split(",") if it not in COMMON_OPTIONS)


def mount(*words: str) -> None:
    """Mount something; a failure ends the sandbox."""
    subprocess.run(["mount", *words], check=True)


if __name__ == "__main__":
    become_first_process(*sys.argv[1:])
