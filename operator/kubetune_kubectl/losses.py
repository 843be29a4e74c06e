"""The losses of a run, step by step: from reports as they come, and from the progress lines of rank 0's log.

The log, and not metrics.jsonl: it takes no more than the right to read logs, and no process beside the training.
"""

from collections.abc import Iterable
from typing import Final

from kubetune_contract.progress import Progress
from kubetune_contract.progress_line import loss_in_line
from kubetune_kubectl.errors import NotFound
from kubetune_kubectl.kubectl import Kubectl, Object
from kubetune_operator.diagnosis import index_of
from kubetune_operator.names import CONTAINER

LOG_LINES: Final = 20_000
"""Last lines of a log that are read; at a line each five seconds a day has 17,280."""


class Losses:
    """Loss by step, in nats per label token. A restart takes back the steps that are done again."""

    def __init__(self) -> None:
        self._of: dict[int, float] = {}

    def add(self, step: int, loss: float) -> None:
        """A step's loss. Later steps, if any are known, were lost with the worker that did them."""
        for later in [known for known in self._of if known > step]:
            del self._of[later]
        self._of[step] = loss

    def see(self, progress: Progress | None) -> None:
        """Take what a report says."""
        if progress is not None and progress.loss is not None:
            self.add(progress.step, progress.loss)

    def read(self, log: str) -> None:
        """Take the progress lines of a log."""
        for line in log.splitlines():
            found = loss_in_line(line)
            if found is not None:
                self.add(*found)

    @property
    def values(self) -> list[float]:
        """The losses in the order of their steps."""
        return [self._of[step] for step in sorted(self._of)]


def history(kubectl: Kubectl, pods: Iterable[Object]) -> list[str]:
    """The logs of rank 0 of all attempts, oldest first. Raises NoRights, or Unreachable."""
    logs = []
    for pod in pods:
        if index_of(pod) != 0 or not has_started(pod):
            continue
        try:
            logs.append(kubectl.run("logs", pod["metadata"]["name"], f"--container={CONTAINER}", f"--tail={LOG_LINES}"))
        except NotFound:
            continue  # it was deleted a moment ago
    return logs


def has_started(pod: Object) -> bool:
    """Whether the pod's container has, or had, something to say."""
    states = pod.get("status", {}).get("containerStatuses") or []
    return any("running" in one.get("state", {}) or "terminated" in one.get("state", {}) for one in states)
