"""The launcher: one child process per device of this node, and the exit code that tells why the run ended.

It imports no torch: it starts at once and costs little memory beside the workers. What torchrun does not do and this
does: the first failing rank's own exit code is the launcher's.
"""

import ctypes
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Final

from kubetune_contract.errors import ConfigError
from kubetune_contract.exit_codes import USER_ERRORS, ExitCode, JobError, reason_of
from kubetune_contract.paths import TERMINATION_LOG
from kubetune_contract.progress import TerminationMessage

FAILURE_GRACE: Final = 5.0
"""Seconds for the other ranks to give their own reason after the first one failed."""
SAVED_GRACE: Final = 60.0
"""Seconds for the other ranks to end after the first one has saved and left."""
RESOLVE_DEADLINE: Final = 300.0
"""Seconds until the first node's name must resolve."""
MALLOC_SETTINGS: Final = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "17179869184",
    "MALLOC_TOP_PAD_": "268435456",
}
"""On CPU, glibc keeps large temporaries instead of faulting their pages in again each step (10-20 % of a step)."""
_LOST_PEER: Final = frozenset({int(ExitCode.PEER_LOST), 128 + signal.SIGABRT})
"""NCCL's watchdog aborts a process that has lost a peer."""
_PR_SET_PDEATHSIG: Final = 1


class RendezvousError(JobError):
    """The first node cannot be found. A retry may help."""

    exit_code = ExitCode.PEER_LOST


@dataclass(frozen=True)
class Nodes:
    """Who takes part. Defaults: this machine alone."""

    processes: int = 1
    """Processes on each node."""
    count: int = 1
    rank: int = 0
    """This node's number."""
    address: str = "127.0.0.1"
    """Host of node 0."""
    port: int | None = None
    """Port on node 0; on a single node a free one is taken."""

    @classmethod
    def from_env(cls, environ: Mapping[str, str]) -> "Nodes":
        """Reads torchrun's PET_* variables. Raises ConfigError for a value that is no number in range."""
        problems: list[str] = []

        def number(name: str, default: int, least: int) -> int:
            text = environ.get(name, str(default))
            if not text.isdigit() or int(text) < least:
                problems.append(f"{name} must be a whole number of at least {least}, but it is {text!r}")
                return default
            return int(text)

        nodes = cls(
            processes=number("PET_NPROC_PER_NODE", 1, 1),
            count=number("PET_NNODES", 1, 1),
            rank=number("PET_NODE_RANK", 0, 0),
            address=environ.get("PET_MASTER_ADDR", cls.address),
            port=number("PET_MASTER_PORT", 29500, 1) if "PET_MASTER_PORT" in environ else None,
        )
        problems += nodes.problems()
        if problems:
            raise ConfigError(problems)
        return nodes

    @property
    def world_size(self) -> int:
        """Processes on all nodes."""
        return self.count * self.processes

    def problems(self) -> list[str]:
        """What cannot be in these numbers together."""
        problems = []
        if self.rank >= self.count:
            problems.append(f"node rank {self.rank} does not exist among {self.count} nodes: ranks start at 0")
        if self.count > 1 and self.port is None:
            problems.append(
                "several nodes need the address and port of node 0: "
                "PET_MASTER_ADDR and PET_MASTER_PORT, or --master_addr and --master_port"
            )
        return problems


def worker_command(config: Path) -> list[str]:
    """One process of a run."""
    return [sys.executable, "-m", "kubetune_trainer", "train", "--config", str(config)]


def launch(command: Sequence[str], nodes: Nodes) -> int:
    """Runs `command` once per process of this node and waits. Returns the exit code of the run (module docstring).

    SIGTERM and SIGINT reach the children as SIGTERM: they save and end; a second SIGINT kills them.
    Raises RendezvousError where node 0 does not appear.
    """
    gang = _Gang()
    previous = {signum: signal.signal(signum, gang.forward) for signum in (signal.SIGTERM, signal.SIGINT)}
    try:
        if nodes.count > 1:
            _await_name(nodes.address)
        gang.start([(command, environment) for environment in environments(nodes, os.environ)])
        return gang.wait()
    finally:
        gang.kill()
        for signum, handler in previous.items():
            signal.signal(signum, handler)


def environments(nodes: Nodes, inherited: Mapping[str, str], gpu: bool | None = None) -> list[dict[str, str]]:
    """The variables of each local process. A lone process gets no address: it needs no process group."""
    on_gpu = any(Path("/dev").glob("nvidia[0-9]*")) if gpu is None else gpu
    common = ({} if on_gpu else MALLOC_SETTINGS) | dict(inherited)
    common |= {"WORLD_SIZE": str(nodes.world_size), "LOCAL_WORLD_SIZE": str(nodes.processes)}
    if nodes.world_size > 1:
        common |= {"MASTER_ADDR": nodes.address, "MASTER_PORT": str(nodes.port or _free_port())}
    return [
        common | {"RANK": str(nodes.rank * nodes.processes + local), "LOCAL_RANK": str(local)}
        for local in range(nodes.processes)
    ]


def exit_code(codes: Sequence[int]) -> int:
    """The code that tells most, from the failing ranks' codes in the order they ended.

    A user error wins: the peers of that rank die of a lost connection and may be faster. A lost peer is the weakest.
    """
    weights = [0 if code in USER_ERRORS else 2 if code in _LOST_PEER else 1 for code in codes]
    return min(zip(weights, range(len(codes)), codes, strict=True))[2] if codes else 0


def run(command: Sequence[str], nodes: Nodes) -> int:
    """`launch`, with errors told to people and, where no rank has told it, the reason to the kubelet."""
    try:
        code = launch(command, nodes)
        text = f"a training process ended with exit code {code}"
    except JobError as error:
        code, text = int(error.exit_code), str(error)
        print(f"error: {text}", file=sys.stderr, flush=True)
    _last_word(code, text)
    return code


def _last_word(code: int, text: str) -> None:
    """Tells the kubelet what no rank could: one was killed, or the word that stands there is not the culprit's."""
    log, reason = Path(TERMINATION_LOG), reason_of(code)
    if code and log.exists() and f'"reason":"{reason}"' not in log.read_text():
        log.write_text(TerminationMessage(reason=reason, message=text).fitted().to_json())


class _Gang:
    """The local processes, each the leader of a process group so that what it starts ends with it."""

    def __init__(self) -> None:
        self._children: list[subprocess.Popen[bytes]] = []
        self._started = False
        self._ended: queue.Queue[int] = queue.Queue()
        self._signals: list[int] = []

    def start(self, programs: Sequence[tuple[Sequence[str], Mapping[str, str]]]) -> None:
        """All processes start from this thread: PR_SET_PDEATHSIG is bound to it."""
        for command, environment in programs:
            child = subprocess.Popen(command, env=environment, start_new_session=True, preexec_fn=_die_with_parent)  # noqa: PLW1509 - no thread runs yet
            self._children.append(child)
        self._started = True
        for child in self._children:
            threading.Thread(target=self._watch, args=(child,), daemon=True).start()
        if self._signals:
            self._terminate()

    def wait(self) -> int:
        """Until all have ended, or until a grace after the first failure."""
        failures: list[int] = []
        deadline: float | None = None
        for _ in self._children:
            try:
                code = self._ended.get(timeout=None if deadline is None else max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                break
            if code and deadline is None:
                deadline = time.monotonic() + (SAVED_GRACE if code == ExitCode.SAVED else FAILURE_GRACE)
            failures += [code] if code else []
        return exit_code(failures)

    def forward(self, signum: int, _frame: FrameType | None) -> None:
        """The signal handler."""
        self._signals.append(signum)
        if not self._started and not self._children:
            sys.exit(128 + signum)
        if self._signals.count(signal.SIGINT) > 1:
            self.kill()
        elif self._started:
            self._terminate()

    def kill(self) -> None:
        """Ends what still runs, with everything it has started."""
        for child in self._children:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)

    def _terminate(self) -> None:
        """To the workers alone: they decide about what they have started."""
        for child in self._children:
            child.send_signal(signal.SIGTERM)

    def _watch(self, child: subprocess.Popen[bytes]) -> None:
        code = child.wait()
        self._ended.put(128 - code if code < 0 else code)


def _die_with_parent() -> None:
    """The kernel kills this process when the launcher dies (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _await_name(address: str) -> None:
    """Waits until the name resolves: the headless Service may learn of the pod after it has started."""
    deadline = time.monotonic() + RESOLVE_DEADLINE
    while True:
        try:
            socket.getaddrinfo(address, None)
        except socket.gaierror as error:
            if time.monotonic() > deadline:
                raise RendezvousError(
                    f"the name of node 0, {address}, did not resolve within {RESOLVE_DEADLINE:.0f} seconds: {error}"
                ) from error
            time.sleep(0.5)
        else:
            return


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
