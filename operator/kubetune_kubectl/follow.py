"""One job and its worker pods, kept up to date by lists and watches that are renewed whenever they end."""

import selectors
import time
from collections.abc import Callable, Generator, Iterable
from contextlib import ExitStack
from typing import Final, NamedTuple

from kubetune_kubectl import jobs
from kubetune_kubectl.errors import JobGone, NoRights, Unreachable
from kubetune_kubectl.jobs import Job
from kubetune_kubectl.kubectl import Kubectl, Object, Watch
from kubetune_operator.diagnosis import index_of
from kubetune_operator.names import ATTEMPT_LABEL, JOB_LABEL

TICK_SECONDS: Final = 0.5
"""Longest time between two sights, for clocks that go on without news."""
RETRY_SECONDS: Final = (0.5, 1.0, 2.0, 5.0)
"""Waits between tries to get a connection back; the last one repeats."""
LOST_SECONDS: Final = 600.0
"""After so long without an answer somebody should be told."""


class Sight(NamedTuple):
    """The job as it was last seen."""

    job: Job
    pods: list[Object]
    """Worker pods of all attempts, in order; empty for those who may not see pods."""
    news: bool
    """Whether something changed since the sight before."""
    trouble: str | None
    """Why the cluster cannot be seen now; None while all is well."""


class Stream:
    """The objects of one kind and selector."""

    def __init__(self, kubectl: Kubectl, kind: str, selector: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.objects: dict[str, Object] = {}
        self.trouble: str | None = None
        self.denied: str | None = None
        """Why there will never be any: the caller may not see them."""
        self._kubectl = kubectl
        self._what = (kind, selector)
        self._clock = clock
        self._watch: Watch | None = None
        self._tries = 0
        self._lost_at: float | None = None
        self._due = clock()

    @property
    def watch(self) -> Watch | None:
        """The running watch, to be selected on."""
        return self._watch

    def ensure(self) -> bool:
        """Connect if it is time to; says whether objects changed. Raises Unreachable when it was lost for too long."""
        if self._watch is not None or self.denied or self._clock() < self._due:
            return False
        try:
            found = {item["metadata"]["name"]: item for item in self._kubectl.items(*self._what)}
            self._watch = self._kubectl.watch(*self._what)
        except NoRights as error:
            self.denied = str(error)
            return False
        except Unreachable as error:
            self._lose(str(error))
            return False
        changed, self.objects = _versions(found) != _versions(self.objects), found
        self.trouble, self._lost_at, self._tries = None, None, 0
        return changed

    def read(self) -> bool:
        """Take what has arrived; says whether objects changed."""
        assert self._watch is not None
        try:
            events = self._watch.read()
        except Unreachable as error:
            self.close()
            self._lose(str(error))
            return False
        if events is None:  # the server ends every watch some time
            self._watch = None
            return False
        changes = [self._take(event.type, event.object) for event in events]
        return any(changes)

    def close(self) -> None:
        """End the watch."""
        if self._watch is not None:
            self._watch.close()
            self._watch = None

    def _take(self, kind: str, item: Object) -> bool:
        name, before = item["metadata"]["name"], dict(self.objects)
        self.objects.pop(name, None)
        if kind != "DELETED":
            self.objects[name] = item
        return _versions(before) != _versions(self.objects)

    def _lose(self, why: str) -> None:
        now = self._clock()
        self._lost_at = now if self._lost_at is None else self._lost_at
        if now - self._lost_at > LOST_SECONDS:
            raise Unreachable(f"no answer for {LOST_SECONDS / 60:.0f} minutes: {why}")
        self.trouble = why
        self._due = now + RETRY_SECONDS[min(self._tries, len(RETRY_SECONDS) - 1)]
        self._tries += 1


def follow(kubectl: Kubectl, name: str) -> Generator[Sight]:
    """The job and its pods, at each change and each tick, until the caller has seen enough.

    Raises NoSuchJob at the start, JobGone when it is deleted, Unreachable when the cluster is lost for too long.
    """
    # By selectors: of one named object kubectl drops what happens between its read and its watch.
    stream = Stream(kubectl, jobs.RESOURCE, f"--field-selector=metadata.name={name}")
    pods = Stream(kubectl, "pods", f"--selector={JOB_LABEL}={name},{ATTEMPT_LABEL}")
    seen: Job | None = None
    news = True
    with ExitStack() as stack:
        for one in (stream, pods):
            stack.callback(one.close)
        while True:
            changes = [one.ensure() for one in (stream, pods)]
            news |= any(changes)
            if stream.denied:
                raise NoRights(stream.denied)
            if seen is None and stream.trouble:
                raise Unreachable(stream.trouble)
            seen = _present(kubectl, name, stream, seen)
            yield Sight(seen, in_order(pods.objects.values()), news, stream.trouble or pods.trouble)
            news = _wait(stream, pods)


def in_order(pods: Iterable[Object]) -> list[Object]:
    """Worker pods by attempt and rank."""
    return sorted(pods, key=lambda pod: (attempt_of(pod), index_of(pod)))


def attempt_of(pod: Object) -> int:
    """The attempt that a worker pod belongs to; 0 where it belongs to none."""
    return int(pod["metadata"].get("labels", {}).get(ATTEMPT_LABEL, 0))


def _present(kubectl: Kubectl, name: str, stream: Stream, seen: Job | None) -> Job:
    body = stream.objects.get(name)
    if body is None:
        if seen is None:
            raise jobs.missing(kubectl, name)
        raise JobGone(f"FineTuneJob {name} was deleted while it was {seen.state}")
    job = jobs.read(body)
    if seen is not None and job.uid != seen.uid:
        raise JobGone(f"FineTuneJob {name} was deleted, and another one of the same name was created: watch again")
    return job


def _wait(*streams: Stream) -> bool:
    """Until something arrived or a tick is over; says whether it was news."""
    with selectors.DefaultSelector() as selector:
        for stream in streams:
            if stream.watch is not None:
                selector.register(stream.watch, selectors.EVENT_READ, stream)
        ready = selector.select(TICK_SECONDS)
    changes = [key.data.read() for key, _ in ready]
    return any(changes)


def _versions(objects: dict[str, Object]) -> dict[str, tuple[str, str]]:
    return {name: (item["metadata"]["uid"], item["metadata"]["resourceVersion"]) for name, item in objects.items()}
