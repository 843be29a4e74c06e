"""Which changes of a status may wait, to be written together with the next one that matters.

A gang of a hundred workers comes up and ends in a hundred little steps: each written at once would be a hundred writes
that nobody reads.
"""

import time
from collections.abc import Callable

from kubetune_operator.api import FineTuneJobStatus


def is_small(before: FineTuneJobStatus, after: FineTuneJobStatus) -> bool:
    """Whether nothing but counts of workers and wordings differs: no condition's status or reason, and no fact."""
    return _without_details(before) == _without_details(after)


def _without_details(status: FineTuneJobStatus) -> FineTuneJobStatus:
    plain = {"message": "", "observed_generation": None}
    conditions = [condition.model_copy(update=plain) for condition in status.conditions]
    return status.model_copy(update={"conditions": conditions, "workers": None})


class Gathering:
    """Since when each FineTuneJob, by its key, has small news that was not written."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        """`seconds` is how long small news may wait."""
        self._seconds = seconds
        self._clock = clock
        self._since: dict[str, float] = {}

    def wait(self, key: str, before: FineTuneJobStatus, after: FineTuneJobStatus) -> float:
        """Seconds that the change may still wait; 0 if there is none, or if it is to be written now."""
        if before != after and is_small(before, after):
            now = self._clock()
            left = self._since.setdefault(key, now) + self._seconds - now
            if left > 0:
                return left
        self.forget(key)
        return 0.0

    def forget(self, key: str) -> None:
        """The FineTuneJob is gone, or has no news."""
        self._since.pop(key, None)
