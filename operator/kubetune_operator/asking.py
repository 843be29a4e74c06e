"""Children that cannot be created for now: what is told, and when they are asked for again. Pure.

Who holds a name, a quota or a webhook is not watched. So the API server is asked again, ever more seldom.
"""

from datetime import datetime

from kubetune_operator.api import ConditionType
from kubetune_operator.decision import Decision
from kubetune_operator.obstacles import Obstacle
from kubetune_operator.status import find, seconds_of


def conflict(turn: Decision, kind: ConditionType, told: str) -> None:
    """Say which name is taken, and ask for it again later."""
    turn.condition(kind, False, "NameConflict", told, event="Warning")
    ask_again(turn, waiting_since(turn, kind))


def refused(turn: Decision, kind: ConditionType, found: Obstacle) -> None:
    """Say why the API server refuses a child, and ask again later; end the job if only another spec can help."""
    if found.reason == "InvalidConfig":
        turn.fail(found.reason, found.told[0].upper() + found.told[1:])
        return
    turn.blocked(kind, found)
    ask_again(turn, waiting_since(turn, kind))


def ask_again(turn: Decision, since: datetime | None) -> None:
    """Plan again after as long as it has lasted: the wait doubles, within the bounds of a restart's."""
    lasted = (turn.now - since).total_seconds() if since is not None else 0.0
    least, most = turn.settings.restart_backoff_seconds, turn.settings.restart_backoff_max_seconds
    turn.look_again(min(max(lasted, least), most))


def waiting_since(turn: Decision, kind: ConditionType) -> datetime:
    """Since when the pods of that condition are waited for, by the status; now if they were not yet."""
    since, staged = turn.status.waiting_since or seconds_of(turn.now), find(turn.status, "Staged")
    if kind == "Started" and staged is not None:
        since = max(since, staged.last_transition_time)  # the wait for the staging pod was another one
    return since
