"""A queue of keys: each waits at most once, never two workers have the same, new objects go first."""

import asyncio
import random
from collections import deque
from typing import Final

FIRST_RETRY_SECONDS: Final = 0.2
LONGEST_RETRY_SECONDS: Final = 30.0


class WorkQueue:
    """Keys to reconcile. All methods but get() return at once and belong to one event loop.

    A key that was finished less than `debounce_seconds` ago waits until they are over, so that a burst of changes is
    one piece of work; an urgent key does not wait.
    """

    def __init__(self, debounce_seconds: float) -> None:
        self._debounce = debounce_seconds
        self._urgent: deque[str] = deque()
        self._ready: deque[str] = deque()
        self._queued: dict[str, float] = {}
        self._active: dict[str, float] = {}
        self._again: dict[str, bool] = {}
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._finished: dict[str, float] = {}
        self._failures: dict[str, int] = {}
        self._available = asyncio.Semaphore(0)
        self.accepting = True
        """False where nothing is reconciled: a standby, or an operator that stops. Keys are then not remembered."""

    def __len__(self) -> int:
        return len(self._queued)

    @property
    def busy(self) -> int:
        """Keys that workers have."""
        return len(self._active)

    @property
    def working(self) -> float:
        """Seconds since the slowest work under way began; 0 if there is none."""
        now = self._now()
        return now - min(self._active.values(), default=now)

    @property
    def waiting(self) -> float:
        """Seconds for which the first key has waited for a worker; 0 if none waits."""
        now = self._now()
        return now - min(self._queued.values(), default=now)

    def close(self) -> None:
        """Take no more keys and give none out; workers finish what they have."""
        self.accepting = False
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()
        self._urgent.clear()
        self._ready.clear()
        self._queued.clear()
        self._again.clear()
        self._available = asyncio.Semaphore(0)  # workers that wait on the old one wait for ever

    def add(self, key: str, urgent: bool = False) -> None:
        """Ask for the key soon; one that a worker has is given out again afterwards."""
        if not self.accepting:
            return
        if key in self._active:
            self._again[key] = self._again.get(key, False) or urgent
        elif urgent:
            self._enqueue(key, urgent=True)
        elif key not in self._queued:
            rest = self._finished.get(key, float("-inf")) + self._debounce - self._now()
            self.add_later(key, rest) if rest > 0 else self._enqueue(key, urgent=False)

    def add_later(self, key: str, seconds: float) -> None:
        """Ask for the key after so many seconds, unless it comes up sooner."""
        if key in self._queued or not self.accepting:
            return
        due = self._now() + seconds
        timer = self._timers.get(key)
        if timer is not None:
            if timer.when() <= due:
                return
            timer.cancel()
        self._timers[key] = asyncio.get_running_loop().call_at(due, self._fire, key)

    async def get(self) -> str:
        """The next key. The caller has it alone until it calls done()."""
        await self._available.acquire()
        key = (self._urgent or self._ready).popleft()
        self._queued.pop(key)
        self._active[key] = self._now()
        self._stop_timer(key)
        return key

    def done(self, key: str, again_after: float | None = None) -> None:
        """The key was worked on; `again_after` seconds from now it comes up again."""
        self._failures.pop(key, None)
        self._release(key)
        if again_after is not None:
            self.add_later(key, again_after)

    def failed(self, key: str, at_least: float = 0.0) -> float:
        """The work failed: the key comes up again after a growing, jittered wait, whose seconds are returned."""
        failures = self._failures[key] = self._failures.get(key, 0) + 1
        longest = min(LONGEST_RETRY_SECONDS, FIRST_RETRY_SECONDS * 2.0 ** min(failures - 1, 16))
        wait = at_least + longest * random.uniform(0.5, 1.0)  # noqa: S311 - jitter
        self._again.pop(key, None)
        self._release(key)
        self.add_later(key, wait)
        return wait

    def forget(self, key: str) -> None:
        """The object is gone: drop what is remembered of the key."""
        self._failures.pop(key, None)
        self._finished.pop(key, None)
        self._stop_timer(key)

    def _release(self, key: str) -> None:
        self._active.pop(key, None)
        self._finished[key] = self._now()
        if key in self._again:
            self.add(key, urgent=self._again.pop(key))

    def _enqueue(self, key: str, urgent: bool) -> None:
        self._stop_timer(key)
        if key in self._queued:
            if urgent and key in self._ready:
                self._ready.remove(key)
                self._urgent.append(key)
            return
        self._queued[key] = self._now()
        (self._urgent if urgent else self._ready).append(key)
        self._available.release()

    def _fire(self, key: str) -> None:
        self._timers.pop(key, None)
        if key in self._active:
            self._again.setdefault(key, False)
        else:
            self._enqueue(key, urgent=False)

    def _stop_timer(self, key: str) -> None:
        timer = self._timers.pop(key, None)
        if timer is not None:
            timer.cancel()

    def _now(self) -> float:
        return asyncio.get_running_loop().time()
