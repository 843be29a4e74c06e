"""The training phase: one gang of workers at a time, restarted as a whole. Pure."""

from datetime import datetime
from typing import Final

from kubetune_operator.api import WorkersStatus
from kubetune_operator.asking import ask_again, conflict, refused
from kubetune_operator.build import config_map, run_config, service, worker_job
from kubetune_operator.changes import changed, gang
from kubetune_operator.deadlines import NO_REPORTS
from kubetune_operator.decision import Decision, attempt_of
from kubetune_operator.diagnosis import (
    Cause,
    Ending,
    Manifest,
    condition,
    ended,
    ending_condition,
    is_decided,
    is_deleting,
    is_live,
    is_lost,
    is_over,
    is_ready,
    last_word,
)
from kubetune_operator.names import GANG_ANNOTATION, job_name, output_path
from kubetune_operator.queueing import is_held, is_queued, leave, wait
from kubetune_operator.status import (
    counted,
    find,
    is_finished,
    is_true,
    rewound,
    seconds_of,
    with_checkpoint,
    with_report,
)
from kubetune_operator.verdicts import diagnose, end, replace, succeed

STARTING_SECONDS: Final = 10.0
"""Time between two looks at whether the ConfigMap and the Service that starting pods need are still there."""
RESUMED: Final = "The job goes on from its newest checkpoint."


def train(turn: Decision, ca_pem: str) -> None:
    """Bring the training one step further."""
    for pod in (*turn.observed.pods, *turn.observed.gone_pods):
        word = last_word(pod)
        turn.status = with_checkpoint(turn.status, word.checkpoint if word else None)
    child = turn.observed.attempt_jobs.get(turn.attempt)
    if child is None or is_deleting(child):
        if is_true(turn.status, "Suspended"):
            turn.set(attempt_start_time=None)  # nothing ran in it: it is made anew on resumption
        if turn.status.attempt_start_time is not None:
            name = job_name(turn.job.name, turn.attempt)
            end(turn, Ending(Cause.CRASH, "JobDeleted", f"Job {name} was deleted by somebody else"))
        else:
            _wait_or_create(turn, ca_pem, blocked=child is not None)
        return
    over = is_decided(child)
    if turn.job.spec.suspend and is_queued(child) and not over:
        leave(turn)
        return
    _note_start(turn)
    if condition(child, "Complete") is not None:
        succeed(turn, child)
    elif ending_condition(child) is not None:
        diagnose(turn, child)
    elif turn.job.spec.suspend:
        _suspend(turn, child)
    else:
        _follow(turn, child, ca_pem)


def workers_status(turn: Decision) -> WorkersStatus:
    """The worker pods of the present attempt, counted."""
    pods = turn.workers_of(turn.attempt)
    phases = [pod.get("status", {}).get("phase") for pod in pods]
    return WorkersStatus(
        active=sum(is_live(pod) for pod in pods),
        ready=sum(is_ready(pod) for pod in pods),
        succeeded=phases.count("Succeeded"),
        failed=phases.count("Failed"),
    )


def _note_start(turn: Decision) -> None:
    now = seconds_of(turn.now)
    turn.set(
        attempt=turn.attempt,
        attempt_start_time=turn.status.attempt_start_time or now,
        start_time=turn.status.start_time or now,
        next_attempt_time=None,
        output_path=output_path(turn.job),
        workers=workers_status(turn),
    )


# ---------------------------------------------------------------- before an attempt


def _wait_or_create(turn: Decision, ca_pem: str, blocked: bool) -> None:
    turn.set(workers=WorkersStatus())
    turn.status = rewound(turn.status)
    _tidy(turn)
    due = turn.status.next_attempt_time
    waits_for = _still_there(turn)
    if turn.job.spec.suspend:
        _say_suspended(turn, waits_for)
        return
    turn.withdraw("Suspended", "Resumed", RESUMED)
    if due is None or turn.now >= due:
        turn.waiting_for = "Started"
    if turn.observed.conflict is not None:
        conflict(turn, "Started", turn.observed.conflict)
    if turn.observed.refused is not None:
        refused(turn, "Started", turn.observed.refused)
        if is_finished(turn.status):
            return
    if due is not None and turn.now < due:
        turn.look_again_at(due)
    elif waits_for is not None:
        turn.condition("Started", False, "Restarting", f"Attempt {turn.attempt} waits for {waits_for} to end.")
        turn.look_again(1)
    elif blocked:
        words = f"Job {job_name(turn.job.name, turn.attempt)} is being deleted; it is created again once it is gone."
        turn.condition("Started", False, "Starting", words)
    else:
        _create(turn, ca_pem)


def _create(turn: Decision, ca_pem: str) -> None:
    job, attempt = turn.job, turn.attempt
    turn.apply(
        config_map(job, run_config(job), ca_pem),
        service(job),
        worker_job(job, attempt, turn.settings),
    )
    if turn.observed.conflict is None and turn.observed.refused is None:
        # The status is written after the Job is there, so this is no promise.
        _note_start(turn)
        workers = counted(job.spec.workers.nodes, "worker")
        turn.condition("Started", False, "Starting", f"Job {job_name(job.name, attempt)} with {workers} was created.")


def _still_there(turn: Decision) -> str | None:
    """What is left of earlier attempts and may still write to the output volume."""
    now, grace = turn.now, turn.settings.lost_node_grace_seconds
    live = [pod for pod in turn.observed.pods if is_live(pod)]
    ending_pods = [pod for pod in live if not is_lost(pod, now, grace)]
    if ending_pods:
        return counted(len(ending_pods), "worker pod")
    lost = {attempt_of(pod) for pod in live}
    for attempt, child in sorted(turn.observed.attempt_jobs.items()):
        if attempt < turn.attempt and not is_over(child) and attempt not in lost:
            return f"Job {child['metadata']['name']}"
    return None


def _tidy(turn: Decision) -> None:
    """Only the attempt before is kept, for its logs; an earlier one that is still active must not be."""
    for attempt, child in turn.observed.attempt_jobs.items():
        active = not is_decided(child)
        if attempt < turn.attempt - 1 or (attempt < turn.attempt and active):
            turn.delete(child)


# ---------------------------------------------------------------- during an attempt


def _follow(turn: Decision, child: Manifest, ca_pem: str) -> None:
    job = turn.job
    turn.withdraw("Suspended", "Resumed", RESUMED)
    change = changed(job.spec, child["metadata"].get("annotations", {}).get(GANG_ANNOTATION) or gang(job.spec))
    if change is not None:
        replace(turn, change)
        return
    turn.suspend(child, suspended=False)
    turn.apply(config_map(job, run_config(job), ca_pem), service(job))
    if is_held(child):
        wait(turn, child)
        return
    _take_report(turn)
    pods, nodes = turn.workers_of(turn.attempt), job.spec.workers.nodes
    lost = turn.lost(pods)
    if lost is not None:
        turn.withhold()
        end(turn, lost)
        return
    up = sum(is_ready(pod) or pod.get("status", {}).get("phase") == "Succeeded" for pod in pods)
    if is_true(turn.status, "Running") or up >= nodes:
        _say_running(turn, pods)
    else:
        _say_starting(turn, child, pods, up)


def _take_report(turn: Decision) -> None:
    report = turn.observed.progress
    if report is None:
        return
    before, turn.status = turn.status, with_report(turn.status, report)
    if turn.status.last_step_time is None or turn.status.progress != before.progress:
        turn.set(last_step_time=seconds_of(turn.now))


def _say_starting(turn: Decision, child: Manifest, pods: list[Manifest], up: int) -> None:
    count = f"{up} of {counted(turn.job.spec.workers.nodes, 'worker')} run"
    turn.waiting_for = "Started"
    if turn.observed.conflict is not None:
        conflict(turn, "Started", turn.observed.conflict)
        return
    if any(condition(pod, "PodScheduled") is not None and not is_ready(pod) for pod in pods):
        turn.trust(STARTING_SECONDS)
        turn.look_again(STARTING_SECONDS)
    problem = turn.obstacle(child, turn.job.spec.workers.nodes, pods)
    if problem is not None:
        turn.blocked("Started", problem, f"{count}: ")
        return
    turn.condition("Started", False, "Starting", f"{count}s." if turn.job.spec.workers.nodes == 1 else f"{count}.")


def _say_running(turn: Decision, pods: list[Manifest]) -> None:
    nodes, attempt = turn.job.spec.workers.nodes, turn.attempt
    stood = attempt > 1 or find(turn.status, "Suspended") is not None or turn.said_otherwise("Started", "Starting")
    relief = "Normal" if stood else None
    turn.condition("Started", True, "Started", f"All workers of attempt {attempt} came up.")
    evicted = next((pod for pod in pods if condition(pod, "DisruptionTarget") is not None), None)
    if evicted is not None:
        reason, message = turn.disruption(evicted)
        turn.condition("Running", True, reason, message, event="Warning")
        return
    if nodes > 1 and turn.status.last_step_time is None and turn.settings.progress_url is not None:
        # Until the first report the workers may still be looking for each other by the Service's names.
        turn.trust(STARTING_SECONDS)
        turn.look_again(STARTING_SECONDS)
    done = sum(pod.get("status", {}).get("phase") == "Succeeded" for pod in pods)
    running = f"{sum(is_ready(pod) for pod in pods)} of {counted(nodes, 'worker')}"
    message = f"Attempt {attempt}: {running} running" + (f", {done} done." if done else ".")
    if turn.observed.conflict is not None:
        message += f" {ended(turn.observed.conflict)}"
        ask_again(turn, _up_since(turn))
    if turn.job.spec.failure_policy.progress_deadline_seconds and turn.settings.progress_url is None:
        message += f" {NO_REPORTS}."
    turn.condition("Running", True, "Running", message, event=relief)


def _up_since(turn: Decision) -> datetime | None:
    started = find(turn.status, "Started")
    return started.last_transition_time if started is not None else None


def _suspend(turn: Decision, child: Manifest) -> None:
    turn.suspend(child, suspended=True)
    now, grace = turn.now, turn.settings.lost_node_grace_seconds
    live = sum(is_live(pod) and not is_lost(pod, now, grace) for pod in turn.workers_of(turn.attempt))
    if live == 0 and child["spec"].get("suspend"):
        turn.status = rewound(turn.status)
        turn.set(last_step_time=None)
    _say_suspended(turn, counted(live, "worker pod") if live else None)


def _say_suspended(turn: Decision, waits_for: str | None) -> None:
    if waits_for is not None:
        turn.condition("Suspended", False, "Suspending", f"The workers save and stop: {waits_for} still to end.")
        turn.look_again(1)
        return
    at = f"; it goes on from step {turn.status.checkpoint.step}" if turn.status.checkpoint else ""
    turn.condition("Suspended", True, "Suspended", f"No worker is held{at}.", event="Normal")
    turn.withdraw("Running", "Suspended", "The job is suspended.")
    turn.withdraw("Started", "Suspended", "The job is suspended.")
