"""Deadlines: how long a job may be active, may wait for its pods, and may train without a step. Pure.

Every time is counted from the status, so that a restarted operator decides the same. The one exception is in favour of
the job: reports that no operator was there to hear are not held against it.
"""

from datetime import datetime, timedelta
from typing import Final

from kubetune_operator.asking import waiting_since
from kubetune_operator.decision import Decision
from kubetune_operator.diagnosis import Cause, Ending, Manifest, ended, is_decided, is_deleting
from kubetune_operator.status import active_seconds, clock_stopped, counted, find, is_finished, seconds_of
from kubetune_operator.verdicts import end

STALLED: Final = "Stalled"
NO_REPORTS: Final = (
    "failurePolicy.progressDeadlineSeconds needs the operator's progress endpoint, which is switched off"
)


def enforce(turn: Decision) -> None:
    """End what has taken too long. Comes after all other decisions: what has happened beats what is late."""
    if is_finished(turn.status):
        return
    _keep_time(turn)
    _progress(turn)
    if not is_finished(turn.status):
        _startup(turn)
    if not is_finished(turn.status):
        _active(turn)


def _keep_time(turn: Decision) -> None:
    """Start or stop the clock of activeDeadlineSeconds."""
    counts = not turn.job.spec.suspend and not turn.queued
    if counts and turn.status.active_since is None:
        turn.set(active_since=seconds_of(turn.now))
    elif not counts and turn.status.active_since is not None:
        turn.status = clock_stopped(turn.status, turn.now)


def _active(turn: Decision) -> None:
    limit = turn.job.spec.active_deadline_seconds
    if limit is None or turn.status.active_since is None or _is_over(_child(turn)):
        return
    left = limit - active_seconds(turn.status, turn.now)
    if left > 0:
        turn.look_again(left)
        return
    checkpoint = turn.status.checkpoint
    saved = f" Its newest checkpoint is {checkpoint.path}, of step {checkpoint.step}." if checkpoint else ""
    turn.fail(
        "DeadlineExceeded",
        f"The job was active for {counted(limit, 'second')}, as long as spec.activeDeadlineSeconds allows.{saved} "
        "Create it again with a longer deadline, more workers or fewer steps.",
    )


def _startup(turn: Decision) -> None:
    kind, limit = turn.waiting_for, turn.job.spec.failure_policy.startup_deadline_seconds
    if kind is None:
        turn.set(waiting_since=None)
        return
    since = waiting_since(turn, kind)
    turn.set(waiting_since=since)
    if limit is None or not _is_due(turn, since, limit):
        return
    said = find(turn.status, kind)
    assert said is not None, "what is waited for is told in its condition"
    reason = "StartupDeadlineExceeded" if said.reason in ("Staging", "Starting", "Restarting") else said.reason
    who = "The staging pod was" if kind == "Staged" else "The workers were"
    turn.fail(
        reason,
        f"{ended(said.message)} {who} not up after {counted(limit, 'second')}, which is "
        "failurePolicy.startupDeadlineSeconds: everything was freed.",
    )


def _progress(turn: Decision) -> None:
    """A stalled attempt ends as a crash does: what holds it up may be gone in the next one."""
    limit, child = turn.job.spec.failure_policy.progress_deadline_seconds, _child(turn)
    running, progress = find(turn.status, "Running"), turn.status.progress
    if limit is None or running is None or running.status != "True" or turn.settings.progress_url is None:
        return
    if child is None or is_deleting(child) or _is_over(child) or turn.job.spec.suspend or child["spec"].get("suspend"):
        return
    if progress is not None and turn.status.last_step_time is not None and progress.step >= progress.total_steps:
        return  # what follows the last step has no steps
    heard = (running.last_transition_time, turn.status.last_step_time, turn.observed.reports_since)
    if _is_due(turn, max(time for time in heard if time is not None), limit):
        turn.withhold()
        end(turn, Ending(Cause.CRASH, STALLED, _stalled(turn, limit)))


def _stalled(turn: Decision, limit: int) -> str:
    progress = turn.status.progress
    span = f"{counted(limit, 'second')}, which is failurePolicy.progressDeadlineSeconds"
    if progress is not None and turn.status.last_step_time is not None:
        return f"The workers run, but no step was finished after step {progress.step} within {span}"
    return (
        f"The workers run, but no step was reported within {span}. If their logs show steps, they cannot reach the "
        "operator's progress endpoint"
    )


def _is_due(turn: Decision, since: datetime, seconds: int) -> bool:
    due = since + timedelta(seconds=seconds)
    if turn.now < due:
        turn.look_again_at(due)
    return turn.now >= due


def _child(turn: Decision) -> Manifest | None:
    return turn.observed.attempt_jobs.get(turn.attempt)


def _is_over(child: Manifest | None) -> bool:
    return child is not None and is_decided(child)
