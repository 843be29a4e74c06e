"""kubectl that stands aside while the API server is struck: what a run does must not fail for the fault of another."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cluster_tool import Layout
from kube import Kube


class Gate:
    """Many may be inside; who closes it waits until they are out, and is alone then."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside = 0
        self._closed = False

    @contextmanager
    def open(self) -> Iterator[None]:
        """Be inside, as one of many."""
        with self._changed:
            self._changed.wait_for(lambda: not self._closed)
            self._inside += 1
        try:
            yield
        finally:
            with self._changed:
                self._inside -= 1
                self._changed.notify_all()

    @contextmanager
    def closed(self) -> Iterator[None]:
        """Be alone."""
        with self._changed:
            self._changed.wait_for(lambda: not self._closed)
            self._closed = True
            self._changed.wait_for(lambda: self._inside == 0)
        try:
            yield
        finally:
            with self._changed:
                self._closed = False
                self._changed.notify_all()


class GatedKube(Kube):
    """A cluster whose API server is killed now and then."""

    def __init__(self, layout: Layout) -> None:
        super().__init__(layout)
        self.gate = Gate()

    def kubectl(self, *argv: str | Path, stdin: str | None = None) -> str:
        """As the base does, inside."""
        with self.gate.open():
            return super().kubectl(*argv, stdin=stdin)

    def get(self, kind: str, name: str, namespace: str) -> dict[str, Any] | None:
        """As the base does, inside."""
        with self.gate.open():
            return super().get(kind, name, namespace)
