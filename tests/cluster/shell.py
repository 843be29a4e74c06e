"""Running commands, polling until something holds, small HTTP reads, files written whole."""

from __future__ import annotations

import os
import shutil
import ssl
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
POLL_SECONDS = 0.1

_running: set[subprocess.Popen[str]] = set()
_running_lock = threading.Lock()


class ClusterError(Exception):
    """What went wrong and what to do, in a sentence that the user reads as it is."""


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return our environment with the system's sbin folders on PATH (a plain user's lacks them)."""
    path = os.environ.get("PATH", "")
    return {**os.environ, "PATH": f"{path}:{SYSTEM_PATH}", **(extra or {})}


def run(
    argv: Sequence[object],
    *,
    log: Path | None = None,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    stdin: str | None = None,
    check: bool = True,
    user: int | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end; its output goes to `log` (added at the end) or is returned.

    Raises ClusterError with the command's last lines when it fails and `check` holds.
    """
    words = [str(word) for word in argv]
    sink = open_log(log) if log else subprocess.PIPE
    process = subprocess.Popen(
        words,
        stdin=subprocess.PIPE if stdin is not None else subprocess.DEVNULL,
        stdout=sink,
        stderr=subprocess.STDOUT if log else subprocess.PIPE,
        cwd=cwd,
        env=environment(env),
        text=True,
        user=user,
    )
    with _running_lock:
        _running.add(process)
    try:
        out, err = process.communicate(stdin)
    finally:
        with _running_lock:
            _running.discard(process)
        if log:
            os.close(sink)
    if check and process.returncode != 0:
        told = tail(log) if log else (err or out or "").strip()
        raise ClusterError(f"`{' '.join(words)}` ended with {process.returncode}:\n{told}")
    return subprocess.CompletedProcess(words, process.returncode, out or "", err or "")


def open_log(path: Path) -> int:
    """Open a log for adding to it, its folder made first; the caller closes the descriptor."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)


def terminate_all() -> None:
    """End the commands that are still running, so that a failed step does not leave a compiler behind."""
    with _running_lock:
        for process in _running:
            process.terminate()


def tail(path: Path, lines: int = 15) -> str:
    """Return the last lines of a log and where the rest is."""
    try:
        text = path.read_text(errors="replace")
    except OSError:
        return f"(no log at {path})"
    return "\n".join([*text.splitlines()[-lines:], f"(whole log: {path})"])


def wait_until(what: str, holds: Callable[[], bool], seconds: float, hint: Callable[[], str] = str) -> None:
    """Poll until `holds()`; after `seconds` raise ClusterError that names `what` and adds `hint()`."""
    deadline = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > deadline:
            raise ClusterError(f"{what}: not so after {seconds:.0f} s\n{hint()}".rstrip())
        time.sleep(POLL_SECONDS)


def http_text(url: str, context: ssl.SSLContext | None = None) -> str | None:
    """Return the body that `url` answers with status 200, or None for anything else; only addresses of this machine."""
    handlers: list[urllib.request.BaseHandler] = [urllib.request.ProxyHandler({})]
    if url.startswith("https:"):
        handlers.append(urllib.request.HTTPSHandler(context=context or unverified()))
    try:
        with urllib.request.build_opener(*handlers).open(url, timeout=3) as answer:
            return str(answer.read().decode(errors="replace")) if answer.status == 200 else None
    except (OSError, urllib.error.URLError, ValueError):
        return None


def unverified() -> ssl.SSLContext:
    """Return a context for health endpoints on loopback whose certificate the component made itself."""
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def write_if_changed(path: Path, text: str, mode: int = 0o644) -> bool:
    """Write a file whole (temporary name, then rename) unless it already says this; return whether it changed."""
    if path.is_file() and path.read_text(errors="replace") == text:
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    temporary.write_text(text)
    temporary.chmod(mode)
    temporary.replace(path)
    return True


def which(name: str) -> str | None:
    """Return the path of a system program; sbin folders count, also for a plain user."""
    return shutil.which(name) or shutil.which(name, path=SYSTEM_PATH)


def caller() -> int | None:
    """Return the id of the user who called us through sudo; None without sudo."""
    return int(os.environ["SUDO_UID"]) if "SUDO_UID" in os.environ else None


def give_to_caller(*paths: Path) -> None:
    """Give files to the user who called us through sudo; without sudo nothing changes."""
    user = caller()
    for path in paths if user is not None else ():
        os.chown(path, user or 0, int(os.environ["SUDO_GID"]))
