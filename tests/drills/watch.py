"""What happens to all objects of a kind, from one `kubectl get --watch`; threads wait for what they should become.

One process for all drills: a watch of its own for each would cost more than the drills.
"""

import json
import subprocess
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from subprocess import PIPE
from typing import Any, NamedTuple, TypeVar

from kube import Kube, events

Object = dict[str, Any]
Key = tuple[str, str]
"""Namespace and name."""
T = TypeVar("T")


class Sight(NamedTuple):
    """An object at a moment of time.monotonic(); None once it is gone."""

    at: float
    object: Object | None


class TooLate(AssertionError):
    """What was waited for did not come."""


def key_of(item: Object) -> Key:
    """Namespace and name of an object."""
    return item["metadata"].get("namespace", ""), item["metadata"]["name"]


class Watch:
    """All objects of a kind that a selector picks, in all namespaces, and what they were before."""

    def __init__(self, kube: Kube, kind: str, *selector: str) -> None:
        self._words = [*kube.words(), "get", kind, "--all-namespaces", "--output=json", *selector]
        self._changed = threading.Condition()
        self._history: dict[Key, list[Sight]] = defaultdict(list)
        self._now: dict[Key, Object] = {}
        self._process: subprocess.Popen[bytes] | None = None
        self._stopped = False
        self._list()
        threading.Thread(target=self._follow, daemon=True).start()

    def stop(self) -> None:
        """End the watch."""
        self._stopped = True
        if self._process is not None:
            self._process.terminate()

    def get(self, key: Key) -> Object | None:
        """The object as it is now."""
        with self._changed:
            return self._now.get(key)

    def ask(self, look: Callable[[Mapping[Key, Object]], T | None]) -> T | None:
        """What `look` finds in what is there now."""
        with self._changed:
            return look(self._now)

    def until(self, look: Callable[[Mapping[Key, Object]], T | None], seconds: float, what: str) -> T:
        """Wait until `look` finds something in what is there now."""
        deadline = time.monotonic() + seconds
        with self._changed:
            while (found := look(self._now)) is None:
                if not self._changed.wait(deadline - time.monotonic()):
                    raise TooLate(f"{what}: not within {seconds:.0f} s")
            return found

    def seen(
        self, key: Key, reached: Callable[[Object | None], bool], since: float, seconds: float, anew: bool = False
    ) -> Sight | None:
        """The first sight of an object at or after `since` that is as it should be; None when the time is over.

        Whatever was there for a moment only is found too. What held at `since` counts unless it must come `anew`.
        """
        deadline = time.monotonic() + seconds
        looked = 0
        with self._changed:
            while True:
                sights = self._history[key]
                before = sum(sight.at <= since for sight in sights)
                # What held at `since` is the last sight before it.
                first = before if anew else max(0, before - 1)
                for sight in sights[max(first, looked) :]:
                    if reached(sight.object):
                        return Sight(max(sight.at, since), sight.object)
                looked = len(sights)
                if not sights and reached(None):
                    return Sight(time.monotonic(), None)
                if not self._changed.wait(deadline - time.monotonic()):
                    return None

    def _list(self) -> None:
        done = subprocess.run(self._words, stdout=PIPE, check=True)
        items = {key_of(item): item for item in json.loads(done.stdout)["items"]}
        with self._changed:
            for key in set(self._now) - set(items):
                self._take("DELETED", self._now[key])
            for item in items.values():
                self._take("ADDED", item)
            self._changed.notify_all()

    def _follow(self) -> None:
        while not self._stopped:
            words = [*self._words, "--watch", "--output-watch-events"]
            with subprocess.Popen(words, stdout=PIPE, stderr=subprocess.DEVNULL) as process:
                self._process = process
                assert process.stdout is not None
                for event in events(process.stdout):
                    if event is not None:
                        with self._changed:
                            self._take(*event)
                            self._changed.notify_all()
            if not self._stopped:
                self._catch_up()

    def _catch_up(self) -> None:
        """The server ended the watch: what happened since is found by a list."""
        try:
            self._list()
        except subprocess.CalledProcessError:
            time.sleep(0.5)  # the server is away; the next watch tells

    def _take(self, kind: str, item: Object) -> None:
        key = key_of(item)
        known = self._now.get(key)
        if kind == "DELETED":
            self._now.pop(key, None)
            self._history[key].append(Sight(time.monotonic(), None))
        elif known is None or known["metadata"]["resourceVersion"] != item["metadata"]["resourceVersion"]:
            self._now[key] = item
            self._history[key].append(Sight(time.monotonic(), item))
