"""Where the cases run: the embedded cluster, namespaces of their own, operators as processes beside it."""

import asyncio
import os
import signal
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final
from urllib.request import urlopen

import node
from benchmarks.operator.load import Load
from benchmarks.operator.usage import Sample, Share, between, same_priority, sample
from cluster_tool import default_layout
from kube import Kube
from process import find
from tests.integration.operator.conftest import Operator
from tests.integration.operator.server import Account

FOREIGN: Final = 0.15
"""Cores that others may use while something is measured; a run with more is made again."""
DEFAULTS: Final = {
    "volume_grace_seconds": "15",
    "restart_backoff_seconds": "10",
    "debounce_seconds": "0.5",
    "progress_write_seconds": "10",
}
"""The operator's own defaults, of what the tests set otherwise."""
OURS: Final = ("operator", "API server", "etcd", "controllers", "benchmark")
"""Groups of processes whose processor time the tables show."""


class Field:
    """The cluster, and what the cases have made on it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.layout = default_layout()
        self.kube = Kube(self.layout)
        if self.kube.external:
            sys.exit("KUBE_CONTEXT is set, but only the embedded cluster's processes can be looked at: unset it")
        self.account = Account.of(self.kube.config)
        self.parts = {name: find(self.layout, part) for name, part in node.components(self.layout).items()}
        missing = [name for name, pid in self.parts.items() if pid is None]
        if missing:
            sys.exit(f"the cluster's {', '.join(missing)} does not run: run `make cluster-up`")
        if os.geteuid() == 0:
            same_priority([pid for pid in self.parts.values() if pid])
        self.namespaces: list[str] = []
        self._operators: list[Operator] = []

    def namespace(self) -> str:
        """A new namespace. All go in the end."""
        name = f"kubetune-bench-{uuid.uuid4().hex[:8]}"
        self.kube.kubectl("create", "namespace", name)
        self.namespaces.append(name)
        return name

    def operator(self, namespace: str, config: Path | None = None, **settings: str) -> Operator:
        """An operator for the namespace that is not started; its settings are the defaults."""
        folder = self.folder / f"operator-{len(self._operators)}"
        folder.mkdir()
        made = Operator(config or self.kube.config, namespace, folder, **DEFAULTS, **settings)
        self._operators.append(made)
        return made

    @contextmanager
    def running(self, namespace: str, **settings: str) -> Iterator[Operator]:
        """An operator that leads, until the case is over."""
        operator = self.operator(namespace, None, **settings)
        operator.start()
        try:
            wait_until(operator.leads, "the operator does not lead")
            yield operator
        finally:
            if operator.process is not None:
                operator.stop(signal.SIGKILL)

    def load(self, namespace: str) -> Load:
        """The users and kubelets of a namespace."""
        return Load(self.account, namespace, namespace)

    def look(self, *operators: Operator) -> Sample:
        """A reading of all processors."""
        named = ("kube-apiserver", "etcd", "kube-controller-manager")
        pids = {name: [pid] for name, pid in self.parts.items() if pid is not None}
        others = [pid for name, (pid,) in pids.items() if name not in named]
        return sample(
            {
                "operator": [operator.process.pid for operator in operators if operator.process is not None],
                "API server": pids["kube-apiserver"],
                "etcd": pids["etcd"],
                "controllers": pids["kube-controller-manager"],
                "benchmark": [os.getpid()],
                "rest of the node": others,
            }
        )

    def clean(self) -> None:
        """Remove everything that was made."""
        for operator in self._operators:
            if operator.process is not None:
                operator.stop(signal.SIGKILL)
        for name in self.namespaces:
            self.kube.kubectl("delete", "namespace", name, "--wait=false")
        self.namespaces.clear()


def wait_until(reached: Callable[[], bool], wrong: str, seconds: float = 60.0) -> None:
    """Look again and again, for what has no watch. Raises TimeoutError."""
    deadline = time.monotonic() + seconds
    while not reached():
        if time.monotonic() > deadline:
            raise TimeoutError(wrong)
        time.sleep(0.02)


def calls(operator: Operator) -> Counter[str]:
    """Requests that an operator has made, by verb and resource."""
    with urlopen(f"http://127.0.0.1:{operator.port}/metrics", timeout=5) as answer:
        return calls_in(answer.read().decode())


def calls_in(metrics: str) -> Counter[str]:
    """The same from the text of its metrics."""
    found: Counter[str] = Counter()
    for line in metrics.splitlines():
        if line.startswith("kubetune_api_requests_total{"):
            labels, _, value = line.removeprefix("kubetune_api_requests_total{").rpartition("} ")
            named = dict(part.split("=", 1) for part in labels.split(","))
            verb, resource = (named[name].strip('"') for name in ("verb", "resource"))
            found[f"{verb} {resource}"] += int(float(value))
    return found


async def settled(load: Any, seconds: float = 3.0) -> None:
    """Wait until nothing has happened to the jobs for a while."""
    before = None
    while before != (before := (len(load.sent), len(load.ended), tuple(load.states.values()))):
        await asyncio.sleep(seconds)


def spent(field: Field, before: Sample, *operators: Operator) -> Share:
    """What was used since a reading."""
    return between(before, field.look(*operators))
