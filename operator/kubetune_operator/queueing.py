"""Jobs in a queue of Kueue: it alone suspends and resumes them, by the quota of their queue. Pure.

Whoever else resumes a Job that is not admitted sees it suspended again, and the other way round. So the operator never
touches `suspend` of a queued Job. To suspend a FineTuneJob its Job is deleted, which gives its quota back, and the next
attempt queues anew on resumption. Kueue's own switch (`active` of its Workload) would need rights on Kueue's objects.
"""

import hashlib
from collections.abc import Sequence

from kubetune_operator.decision import Decision
from kubetune_operator.diagnosis import Inquiry, Manifest, ended, is_live
from kubetune_operator.names import QUEUE_LABEL
from kubetune_operator.status import counted, rewound
from kubetune_operator.verdicts import next_attempt


def is_queued(child: Manifest) -> bool:
    """Whether the Job belongs to a queue."""
    return QUEUE_LABEL in child["metadata"].get("labels", {})


def is_held(child: Manifest) -> bool:
    """Whether the Job waits for quota."""
    return is_queued(child) and bool(child["spec"].get("suspend"))


def told(turn: Decision, child: Manifest) -> str:
    """What the Job waits for, in Kueue's words where it has said any."""
    about, turn.queued = _workload(child), True
    turn.inquire(about)
    name, queue = child["metadata"]["name"], child["metadata"]["labels"][QUEUE_LABEL]
    words = _pending(turn.observed.events.get(about, ()))
    if words is None:
        words = (
            "Kueue has not admitted it yet. If it stays so, see whether Kueue runs and the LocalQueue exists: "
            f"kubectl -n {turn.job.namespace} describe localqueue {queue}"
        )
    return f'Job {name} waits for quota in queue "{queue}": {ended(words)}'


def wait(turn: Decision, child: Manifest) -> None:
    """Say that the workers wait for quota, or that Kueue takes them back for somebody else."""
    live = sum(is_live(pod) for pod in turn.workers_of(turn.attempt))
    if live:
        words = f"Kueue takes the quota back: the workers save and stop, {counted(live, 'worker pod')} still to end."
        turn.withdraw("Running", "WaitingForQuota", words)
        turn.look_again(1)
    else:
        words = told(turn, child)
        turn.status = rewound(turn.status)
        turn.set(last_step_time=None)
        turn.withdraw("Running", "WaitingForQuota", "The workers wait for quota.")
    turn.condition("Started", False, "WaitingForQuota", words, event="Normal")


def leave(turn: Decision) -> None:
    """Give the quota back. What is written down first is that this attempt is over; then its Job is deleted."""
    next_attempt(turn)
    turn.condition("Suspended", False, "Suspending", "The workers save and stop, and leave their queue.")
    turn.look_again(1)


def _workload(child: Manifest) -> Inquiry:
    """Kueue's object for the Job, whose Events say what it waits for. Kueue makes its name from these parts."""
    name, uid = child["metadata"]["name"], child["metadata"]["uid"]
    digest = hashlib.sha1(f"Job\nbatch\n{name}\n{uid}".encode(), usedforsecurity=False).hexdigest()
    return Inquiry("Workload", f"job-{name}-{digest[:5]}")


def _pending(events: Sequence[Manifest]) -> str | None:
    waiting = [event for event in events if event.get("reason") in ("Pending", "Preempted", "Evicted", "Inadmissible")]
    newest = max(waiting, key=_time_of, default=None)
    return None if newest is None else newest.get("message")


def _time_of(event: Manifest) -> str:
    times = (event.get("lastTimestamp"), event.get("eventTime"), event["metadata"].get("creationTimestamp"))
    return max((str(time) for time in times if time), default="")
