"""The end of an attempt: why it ended, and whether another one follows. Pure.

The end of an attempt is written down before the next one is created. Whatever the operator was doing when it died, its
successor finds either the old attempt with its verdict still to be given, or the next attempt's number.
"""

from kubetune_contract.paths import ADAPTER_DIR, MODEL_DIR
from kubetune_contract.progress import Result
from kubetune_operator.api import WorkersStatus
from kubetune_operator.build import run_config
from kubetune_operator.decision import Decision, attempt_of
from kubetune_operator.diagnosis import (
    Cause,
    Ending,
    Manifest,
    ending_by_job,
    ending_condition,
    index_of,
    is_live,
    is_lost,
    last_word,
)
from kubetune_operator.names import output_path
from kubetune_operator.status import clock, completed, counted, is_true, rewound, with_report


def diagnose(turn: Decision, child: Manifest) -> None:
    """Give the verdict on an attempt whose Job fails, as soon as its pods have told enough."""
    attempt = turn.attempt
    gone = [pod for pod in turn.observed.gone_pods if attempt_of(pod) == attempt]
    why = turn.ending(child, [*turn.workers_of(attempt), *gone])
    if why is None:
        if not turn.evidence_due((ending_condition(child) or {}).get("lastTransitionTime")):
            _say_ending(turn, "The workers are ending.")
            return
        why = ending_by_job(child)
    if why.cause in (Cause.USER_ERROR, Cause.DISRUPTION) or _all_ended(turn, attempt):
        end(turn, why)
        return
    # A peer's last words may still tell more, and nothing can start before all have ended.
    turn.look_again(1)
    _say_ending(turn, why.told("The other workers are ending."))


def _say_ending(turn: Decision, message: str) -> None:
    if is_true(turn.status, "Running"):
        turn.condition("Running", True, "Ending", message)


def _all_ended(turn: Decision, attempt: int) -> bool:
    now, grace = turn.now, turn.settings.lost_node_grace_seconds
    return not any(is_live(pod) and not is_lost(pod, now, grace) for pod in turn.workers_of(attempt))


def end(turn: Decision, why: Ending) -> None:
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
    turn.set(restarts=before.restarts + (not disrupted), disruptions=before.disruptions + disrupted)
    origin = next_attempt(turn)
    turn.set(next_attempt_time=due)
    count = "a disruption is not counted" if disrupted else f"restart {before.restarts + 1} of {limit}"
    words = why.told(f"Attempt {turn.status.attempt} starts {origin} at {clock(due)} ({count}).")
    turn.withdraw("Running", why.reason, why.told())
    turn.condition("Started", False, "Restarting", words, event="Warning")
    turn.look_again_at(due)


def replace(turn: Decision, change: str) -> None:
    """Let the next attempt take over from one whose Job no longer fits the spec. Nobody failed: nothing is counted."""
    origin = next_attempt(turn)
    words = f"{change}: attempt {turn.attempt} goes on {origin}."
    turn.withdraw("Running", "WorkersChanged", words)
    turn.condition("Started", False, "WorkersChanged", words, event="Normal")


def next_attempt(turn: Decision) -> str:
    """Write down that the next attempt is to come; where it starts, in words."""
    turn.set(
        attempt=turn.attempt + 1,
        attempt_start_time=None,
        next_attempt_time=None,
        last_step_time=None,
        workers=WorkersStatus(),
    )
    turn.status = rewound(turn.status)
    checkpoint = turn.status.checkpoint
    return f"from the checkpoint of step {checkpoint.step}" if checkpoint else "from the beginning"


def _backoff(turn: Decision, crashes: int) -> float:
    settings = turn.settings
    return float(min(settings.restart_backoff_seconds * 2.0 ** min(crashes, 32), settings.restart_backoff_max_seconds))


def succeed(turn: Decision, child: Manifest) -> None:
    """Take in the result of an attempt whose Job is complete."""
    words = [last_word(pod) for pod in sorted(turn.workers_of(turn.attempt), key=index_of)]
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
