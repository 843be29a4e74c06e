"""After the end: what still runs is stopped, the rest goes as the spec says. Pure.

Whatever the policy, no worker of an ended job runs on: it would hold its GPUs for a result that nobody takes.
"""

from datetime import timedelta

from kubetune_operator.attempts import workers_status
from kubetune_operator.decision import Decision
from kubetune_operator.diagnosis import Manifest, is_decided
from kubetune_operator.names import config_map_name, service_name
from kubetune_operator.status import seconds_of


def clean_up(turn: Decision) -> None:
    """Free what the ended job holds, then delete it when its time has come."""
    if turn.status.workers is not None and turn.status.workers.active:
        turn.set(workers=workers_status(turn))
    for child in turn.observed.attempt_jobs.values():
        if not is_decided(child):
            _stop(turn, child)
    if turn.job.spec.clean_pod_policy == "All" and turn.status.clean_up_time is None:
        _remove_all(turn)
    _expire(turn)


def _stop(turn: Decision, child: Manifest) -> None:
    """A suspended Job is deleted under every policy: it holds nothing, but whoever resumes it would start workers."""
    if turn.job.spec.clean_pod_policy == "None" and not child["spec"].get("suspend"):
        turn.stop(child)
    else:
        turn.delete(child)


def _remove_all(turn: Decision) -> None:
    for child in turn.observed.attempt_jobs.values():
        if is_decided(child):
            turn.delete(child)
    turn.remove("ConfigMap", config_map_name(turn.job.name))
    turn.remove("Service", service_name(turn.job.name))
    turn.set(clean_up_time=seconds_of(turn.now))


def _expire(turn: Decision) -> None:
    seconds, ended = turn.job.spec.ttl_seconds_after_finished, turn.status.completion_time
    if seconds is None or ended is None:
        return
    due = ended + timedelta(seconds=seconds)
    if turn.now < due:
        turn.look_again_at(due)
    else:
        turn.delete_job()
