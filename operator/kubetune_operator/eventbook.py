"""Events that were read because a plan asked for them: each object's only now and then, and ever more seldom.

A watch would bring every Event of the cluster. What is asked for here is rare, and a blocked job stays so for long.
"""

import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Final

from kubetune_operator.diagnosis import Events, Inquiry, Manifest
from kubetune_operator.errors import OperatorError

FIRST_SECONDS: Final = 5.0
"""Between the first and the second reading of one object's Events; then twice as long each time."""
LONGEST_SECONDS: Final = 60.0

Read = Callable[[str, Inquiry], Awaitable[list[Manifest]]]
"""read(namespace, inquiry): the Events of that object."""

log = logging.getLogger(__name__)


@dataclass
class _Page:
    events: Sequence[Manifest]
    pause: float
    due: float


class EventBook:
    """What was read for each FineTuneJob, by its key. What a plan no longer asks for is forgotten."""

    def __init__(self, read: Read, clock: Callable[[], float] = time.monotonic) -> None:
        self._read = read
        self._clock = clock
        self._pages: dict[str, dict[Inquiry, _Page]] = {}

    def known(self, key: str) -> Events:
        """The Events that were read for that FineTuneJob."""
        return {inquiry: page.events for inquiry, page in self._pages.get(key, {}).items()}

    async def read(self, key: str, asked: Sequence[Inquiry]) -> bool:
        """Read what is due; whether that brought something new. An answer that fails leaves what was known."""
        if not asked:
            self.forget(key)
            return False
        pages = self._pages.setdefault(key, {})
        for inquiry in [inquiry for inquiry in pages if inquiry not in asked]:
            del pages[inquiry]
        news = False
        for inquiry in asked:
            page = pages.get(inquiry)
            if page is None or page.due <= self._clock():
                news |= await self._turn(key, pages, inquiry)
        return news

    async def _turn(self, key: str, pages: dict[Inquiry, _Page], inquiry: Inquiry) -> bool:
        before = pages.get(inquiry)
        known = before.events if before else ()
        pause = min(2 * before.pause, LONGEST_SECONDS) if before else FIRST_SECONDS
        try:
            events: Sequence[Manifest] = await self._read(key.partition("/")[0], inquiry)
        except OperatorError as error:
            log.warning("%s: cannot read the Events of %s %s: %s", key, inquiry.kind, inquiry.name, error)
            events = known
        pages[inquiry] = _Page(events, pause, self._clock() + pause)
        return list(events) != list(known)

    def due(self, key: str) -> float | None:
        """Seconds until something should be read again for that FineTuneJob."""
        times = [page.due for page in self._pages.get(key, {}).values()]
        return max(0.05, min(times) - self._clock()) if times else None

    def forget(self, key: str) -> None:
        """Drop what was read for a FineTuneJob."""
        self._pages.pop(key, None)
