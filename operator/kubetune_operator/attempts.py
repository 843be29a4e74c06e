"""The training phase: one gang of workers at a time, restarted as a whole. Pure.

The end of an attempt is written down before the next one is created. Whatever the operator was doing when it died, its
successor finds either the old attempt with its verdict still to be given, or the next attempt's number.
"""

from typing import Final

from kubetune_contract.paths import ADAPTER_DIR, MODEL_DIR
from kubetune_contract.progress import Result
from kubetune_operator.api import WorkersStatus
from kubetune_operator.build import config_map, run_config, service, worker_job
from kubetune_operator.decision import Decision
from kubetune_operator.diagnosis import (
    Cause,
    Ending,
    Manifest,
    condition,
    ending,
    ending_by_job,
    ending_condition,
    index_of,
    is_deleting,
    is_live,
    is_lost,
    is_ready,
    last_word,
)
from kubetune_operator.names import ATTEMPT_LABEL, job_name, output_path
from kubetune_operator.status import (
    clock,
    completed,
    counted,
    is_true,
    rewound,
    seconds_of,
    with_checkpoint,
    with_report,
)

RESUMED: Final = "The job goes on from its newest checkpoint."


def train(turn: Decision, ca_pem: str) -> None:
    """Bring the training one step further."""
    for pod in (*turn.observed.pods, *turn.observed.gone_pods):
        word = last_word(pod)
        turn.status = with_checkpoint(turn.status, word.checkpoint if word else None)
    child = turn.observed.attempt_jobs.get(present(turn))
    if child is None or is_deleting(child):
        if turn.status.attempt_start_time is not None:
            name = job_name(turn.job.name, present(turn))
            _ended(turn, Ending(Cause.CRASH, "JobDeleted", f"Job {name} was deleted by somebody else"))
        else:
            _wait_or_create(turn, ca_pem, blocked=child is not None)
        return
    _note_start(turn)
    if condition(child, "Complete") is not None:
        _succeeded(turn, child)
    elif ending_condition(child) is not None:
        _diagnose(turn, child)
    elif turn.job.spec.suspend:
        _suspend(turn, child)
    else:
        _follow(turn, child, ca_pem)


def release(turn: Decision) -> None:
    """Remove the worker Jobs that still hold or may create pods, once the job is over."""
    if turn.status.workers is not None and turn.status.workers.active:
        turn.set(workers=_counts(_pods(turn, present(turn))))
    for child in turn.observed.attempt_jobs.values():
        if condition(child, "Complete") is None and ending_condition(child) is None:
            turn.delete(child)


def present(turn: Decision) -> int:
    """The number of the present attempt."""
    return max(1, turn.status.attempt)


def _pods(turn: Decision, attempt: int) -> list[Manifest]:
    return [pod for pod in turn.observed.pods if _attempt_of(pod) == attempt]


def _attempt_of(pod: Manifest) -> int:
    return int(pod["metadata"].get("labels", {}).get(ATTEMPT_LABEL, 0))


def _note_start(turn: Decision) -> None:
    now = seconds_of(turn.now)
    turn.set(
        attempt=present(turn),
        attempt_start_time=turn.status.attempt_start_time or now,
        start_time=turn.status.start_time or now,
        next_attempt_time=None,
        output_path=output_path(turn.job),
        workers=_counts(_pods(turn, present(turn))),
    )


def _counts(pods: list[Manifest]) -> WorkersStatus:
    phases = [pod.get("status", {}).get("phase") for pod in pods]
    return WorkersStatus(
        active=sum(is_live(pod) for pod in pods),
        ready=sum(is_ready(pod) for pod in pods),
        succeeded=phases.count("Succeeded"),
        failed=phases.count("Failed"),
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
    if turn.observed.conflict is not None:
        turn.condition("Started", False, "NameConflict", turn.observed.conflict, event="Warning")
        turn.look_again(turn.settings.restart_backoff_seconds)
    if turn.observed.refused is not None:
        turn.refused("Started", turn.observed.refused)
    if due is not None and turn.now < due:
        turn.look_again_at(due)
    elif waits_for is not None:
        turn.condition("Started", False, "Restarting", f"Attempt {present(turn)} waits for {waits_for} to end.")
        turn.look_again(1)
    elif not blocked:
        _create(turn, ca_pem)


def _create(turn: Decision, ca_pem: str) -> None:
    job, attempt = turn.job, present(turn)
    turn.apply(
        config_map(job, run_config(job), ca_pem),
        service(job),
        worker_job(job, attempt, turn.settings),
    )
    if turn.observed.conflict is None and turn.observed.refused is None:
        workers = counted(job.spec.workers.nodes, "worker")
        message = f"Job {job_name(job.name, attempt)} with {workers} is being created."
        turn.condition("Started", False, "Starting", message, event="Normal")


def _still_there(turn: Decision) -> str | None:
    """What is left of earlier attempts and may still write to the output volume."""
    now, grace = turn.now, turn.settings.lost_node_grace_seconds
    live = [pod for pod in turn.observed.pods if is_live(pod)]
    ending_pods = [pod for pod in live if not is_lost(pod, now, grace)]
    if ending_pods:
        return counted(len(ending_pods), "worker pod")
    lost = {_attempt_of(pod) for pod in live}
    for attempt, child in sorted(turn.observed.attempt_jobs.items()):
        over = condition(child, "Failed") is not None or condition(child, "Complete") is not None
        if attempt < present(turn) and not over and attempt not in lost:
            return f"Job {child['metadata']['name']}"
    return None


def _tidy(turn: Decision) -> None:
    """Only the attempt before is kept, for its logs; an earlier one that is still active must not be."""
    for attempt, child in turn.observed.attempt_jobs.items():
        active = condition(child, "Complete") is None and ending_condition(child) is None
        if attempt < present(turn) - 1 or (attempt < present(turn) and active):
            turn.delete(child)


# ---------------------------------------------------------------- during an attempt


def _follow(turn: Decision, child: Manifest, ca_pem: str) -> None:
    job = turn.job
    turn.suspend(child, suspended=False)
    turn.withdraw("Suspended", "Resumed", RESUMED)
    turn.apply(config_map(job, run_config(job), ca_pem))
    if turn.observed.progress is not None:
        turn.status = with_report(turn.status, turn.observed.progress)
    pods, nodes = _pods(turn, present(turn)), job.spec.workers.nodes
    up = sum(is_ready(pod) or pod.get("status", {}).get("phase") == "Succeeded" for pod in pods)
    if is_true(turn.status, "Running") or up >= nodes:
        _say_running(turn, pods)
    else:
        _say_starting(turn, child, pods, up)


def _say_starting(turn: Decision, child: Manifest, pods: list[Manifest], up: int) -> None:
    count = f"{up} of {counted(turn.job.spec.workers.nodes, 'worker')} run"
    problem = turn.obstacle(child, turn.job.spec.workers.nodes, pods)
    if problem is not None:
        turn.blocked("Started", problem, f"{count}: ")
        return
    turn.condition("Started", False, "Starting", f"{count}s." if turn.job.spec.workers.nodes == 1 else f"{count}.")


def _say_running(turn: Decision, pods: list[Manifest]) -> None:
    nodes, attempt = turn.job.spec.workers.nodes, present(turn)
    turn.condition("Started", True, "Started", f"All workers of attempt {attempt} came up.")
    evicted = next((pod for pod in pods if condition(pod, "DisruptionTarget") is not None), None)
    if evicted is not None:
        words = condition(evicted, "DisruptionTarget") or {}
        message = f"Worker {index_of(evicted)} is being evicted ({words.get('reason')}): {words.get('message')}"
        turn.condition("Running", True, "Disruption", message, event="Warning")
        return
    done = sum(pod.get("status", {}).get("phase") == "Succeeded" for pod in pods)
    running = f"{sum(is_ready(pod) for pod in pods)} of {counted(nodes, 'worker')}"
    message = f"Attempt {attempt}: {running} running" + (f", {done} done." if done else ".")
    turn.condition("Running", True, "Running", message, event="Normal")


def _suspend(turn: Decision, child: Manifest) -> None:
    turn.suspend(child, suspended=True)
    live = sum(is_live(pod) for pod in _pods(turn, present(turn)))
    if live == 0 and child["spec"].get("suspend"):
        turn.status = rewound(turn.status)
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


# ---------------------------------------------------------------- after an attempt


def _diagnose(turn: Decision, child: Manifest) -> None:
    attempt = present(turn)
    gone = [pod for pod in turn.observed.gone_pods if _attempt_of(pod) == attempt]
    why = ending(child, [*_pods(turn, attempt), *gone])
    if why is None:
        if not turn.evidence_due((ending_condition(child) or {}).get("lastTransitionTime")):
            _say_ending(turn, "The workers are ending.")
            return
        why = ending_by_job(child)
    if why.cause in (Cause.USER_ERROR, Cause.DISRUPTION) or _all_ended(turn, attempt):
        _ended(turn, why)
        return
    # A peer's last words may still tell more, and nothing can start before all have ended.
    turn.look_again(1)
    _say_ending(turn, why.told("The other workers are ending."))


def _say_ending(turn: Decision, message: str) -> None:
    if is_true(turn.status, "Running"):
        turn.condition("Running", True, "Ending", message)


def _all_ended(turn: Decision, attempt: int) -> bool:
    now, grace = turn.now, turn.settings.lost_node_grace_seconds
    return not any(is_live(pod) and not is_lost(pod, now, grace) for pod in _pods(turn, attempt))


def _ended(turn: Decision, why: Ending) -> None:
    """Give the verdict: over for good, or written down as lost so that the next attempt may come."""
    status, limit = turn.status, turn.job.spec.failure_policy.max_restarts
    disrupted = why.cause is Cause.DISRUPTION
    if why.cause is Cause.USER_ERROR:
        turn.fail(why.reason, why.told())
    elif not disrupted and status.restarts >= limit:
        turn.fail(why.reason, why.told(f"No restart is left: failurePolicy.maxRestarts is {limit}."))
    else:
        _restart(turn, why, disrupted)


def _restart(turn: Decision, why: Ending, disrupted: bool) -> None:
    before, limit = turn.status, turn.job.spec.failure_policy.max_restarts
    due = turn.in_seconds(_backoff(turn, 0 if disrupted else before.restarts))
    turn.set(
        attempt=present(turn) + 1,
        attempt_start_time=None,
        next_attempt_time=due,
        restarts=before.restarts + (not disrupted),
        disruptions=before.disruptions + disrupted,
        workers=WorkersStatus(),
    )
    turn.status = rewound(turn.status)
    checkpoint = turn.status.checkpoint
    origin = f"from the checkpoint of step {checkpoint.step}" if checkpoint else "from the beginning"
    count = "an eviction is not counted" if disrupted else f"restart {before.restarts + 1} of {limit}"
    words = why.told(f"Attempt {turn.status.attempt} starts {origin} at {clock(due)} ({count}).")
    turn.withdraw("Running", why.reason, why.told())
    turn.condition("Started", False, "Restarting", words, event="Warning")
    turn.look_again_at(due)


def _backoff(turn: Decision, crashes: int) -> float:
    settings = turn.settings
    return float(min(settings.restart_backoff_seconds * 2.0 ** min(crashes, 32), settings.restart_backoff_max_seconds))


def _succeeded(turn: Decision, child: Manifest) -> None:
    words = [last_word(pod) for pod in sorted(_pods(turn, present(turn)), key=index_of)]
    result = next((word.result for word in words if word is not None and word.result is not None), None)
    if result is None and not turn.evidence_due(child.get("status", {}).get("completionTime")):
        return
    if turn.observed.progress is not None:
        turn.status = with_report(turn.status, turn.observed.progress)
    folder = output_path(turn.job)
    if result is None:
        below = MODEL_DIR if run_config(turn.job).lora is None else ADAPTER_DIR
        turn.set(progress=completed(turn.status.progress, 0, None))
        turn.succeed(f"{_where(turn, f'{folder}/{below}')} The workers left no report of their losses.")
        return
    result = _below(folder, result)
    turn.set(result=result, progress=completed(turn.status.progress, result.steps, result.final_loss))
    turn.succeed(_told(turn, result))


def _below(folder: str, result: Result) -> Result:
    """The result with its paths as they are on the output volume."""
    paths = {name: value for name, value in result if name.endswith("_path") and value is not None}
    return result.model_copy(update={name: f"{folder}/{value}" for name, value in paths.items()})


def _told(turn: Decision, result: Result) -> str:
    told = _where(turn, result.adapter_path or result.model_path or output_path(turn.job))
    if result.initial_validation_loss is not None and result.final_validation_loss is not None:
        told += f" Held-out loss {result.initial_validation_loss:.3f} before, {result.final_validation_loss:.3f} after."
    if result.final_loss is not None:
        told += f" Training loss {result.final_loss:.3f} after {counted(result.steps, 'step')}."
    return told


def _where(turn: Decision, path: str) -> str:
    what = "trained model" if run_config(turn.job).lora is None else "adapter"
    return f'The {what} is at {path} on claim "{turn.job.spec.storage.output.claim_name}".'
