"""Whether this replica is alive and ready, from what its parts know. Pure; what is wrong is said for people."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

DEAF_SECONDS: Final = 300.0
"""A watch hears a bookmark every minute, and is opened anew after two minutes of silence. After five it is deaf."""
ANSWER_SECONDS: Final = 60.0
"""The server answers if it did so within this time: a leader asks it every two seconds, a standby hears as often."""
STUCK_SECONDS: Final = 300.0
"""A reconcile makes a handful of requests, and each ends after 30 s."""
WAIT_SECONDS: Final = 120.0
"""The longest that a FineTuneJob whose turn it is may wait for a worker."""


@dataclass(frozen=True)
class Vitals:
    """Signs of life, in seconds before now."""

    synced: bool
    """All caches are complete, and FineTuneJobs are watched."""
    leads: bool
    """This replica reconciles."""
    answered: float
    """Last answer of the API server."""
    heard: Mapping[str, float]
    """Last event or bookmark of each watch, by resource."""
    listed: float
    """Last complete pass over all FineTuneJobs; of a leader that has made none, since it leads."""
    resync: float
    """Between two such passes, by the settings."""
    working: float
    """Since the slowest reconcile under way began; 0 if there is none."""
    waiting: float
    """How long the first FineTuneJob in the queue has waited; 0 if there is none."""


def not_alive(found: Vitals) -> str | None:
    """Why the process should be started anew; None if it should not. A server that is away is no reason."""
    if found.working > STUCK_SECONDS:
        return f"a reconcile has been under way for {found.working:.0f} s"
    if found.answered > ANSWER_SECONDS:
        return None
    deaf = [name for name, seconds in found.heard.items() if seconds > DEAF_SECONDS]
    return f"no event of {', '.join(deaf)} for {DEAF_SECONDS:.0f} s, though the API server answers" if deaf else None


def not_ready(found: Vitals) -> str | None:
    """Why this replica does not do its work; None if it does. That of a standby is to have its caches full."""
    if not found.synced:
        return "the caches are being filled"
    if found.leads and found.listed > 2 * found.resync + ANSWER_SECONDS:
        return f"the last pass over all FineTuneJobs was {found.listed:.0f} s ago"
    if found.leads and found.waiting > WAIT_SECONDS:
        return f"a FineTuneJob has waited {found.waiting:.0f} s for a worker"
    return None
