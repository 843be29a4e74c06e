"""The planner: what a FineTuneJob needs next, from what is observed. Pure: no clock, no network, no memory.

Every decision rests on the spec, the status and the children alone, so a restarted operator decides the same.
"""

from collections.abc import Iterable
from datetime import datetime

from kubetune_operator import attempts, cleanup, deadlines, memory, staging
from kubetune_operator.api import FineTuneJob
from kubetune_operator.build import run_config
from kubetune_operator.decision import Decision, Observed, Plan
from kubetune_operator.errors import InvalidJob
from kubetune_operator.permissions import refusals
from kubetune_operator.settings import Settings
from kubetune_operator.status import is_finished

__all__ = ["Observed", "Plan", "plan"]


def plan(job: FineTuneJob, observed: Observed, settings: Settings, now: datetime, ca_pem: str) -> Plan:
    """Decide the next step. A finished job is never touched again, except to remove what it still holds."""
    turn = Decision(job, observed, settings, now)
    if job.deleting:
        return _nothing(job)
    if is_finished(job.status):
        cleanup.clean_up(turn)
        staging.release(turn)
        return turn.plan()
    try:
        run_config(job)
    except InvalidJob as error:
        turn.fail("InvalidConfig", in_one_sentence(error.problems))
        return turn.plan()
    if (
        job.spec.failure_policy.progress_deadline_seconds
        and settings.progress_url is None
        and not job.status.start_time
    ):
        turn.fail(
            "InvalidConfig", f"{deadlines.NO_REPORTS}: remove it, or ask who installed the operator to switch it on"
        )
        return turn.plan()
    refused = [] if job.status.attempt_start_time else list(refusals(job, settings))  # what runs is not asked again
    if refused:
        turn.fail("InvalidConfig", in_one_sentence(refused))
        return turn.plan()
    if not staging.is_complete(turn):
        staging.stage(turn)
    if staging.is_complete(turn):
        memory.check(turn)
        if not is_finished(turn.status):
            attempts.train(turn, ca_pem)
    deadlines.enforce(turn)
    return turn.plan()


def refuse(job: FineTuneJob, problems: Iterable[str], settings: Settings, now: datetime) -> Plan:
    """End a job whose spec cannot even be read."""
    turn = Decision(job, Observed(), settings, now)
    if not is_finished(job.status):
        turn.fail("InvalidConfig", in_one_sentence(problems))
    return turn.plan()


def leave(job: FineTuneJob, problems: Iterable[str], settings: Settings, now: datetime) -> Plan:
    """Let a job alone whose spec is newer than this operator: what runs goes on, and the next version takes over."""
    if job.status.conditions:
        return _nothing(job)
    turn = Decision(job, Observed(), settings, now)
    words = f"The CRD is newer than this operator, which must be upgraded first: {in_one_sentence(problems)}"
    turn.condition("Staged", False, "OperatorOutdated", words, event="Warning")
    return turn.plan()


def _nothing(job: FineTuneJob) -> Plan:
    return Plan(apply=[], suspend=[], delete=[], status=job.status, events=[], requeue_after=None)


def in_one_sentence(problems: Iterable[str]) -> str:
    """All problems of a spec, ready for a condition."""
    return "; ".join(problems)
