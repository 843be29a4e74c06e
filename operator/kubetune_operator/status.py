"""What a FineTuneJob's status says: conditions, the state that follows from them, and words for people. Pure."""

from datetime import UTC, datetime
from typing import Final

from kubetune_contract.progress import CheckpointStatus, Progress, ProgressReport
from kubetune_operator.api import Condition, ConditionType, FineTuneJobStatus, State

MESSAGE_LIMIT: Final = 2000
"""Characters of a condition's message: enough for the last lines of a log, short enough for `kubectl describe`."""

STAGING: Final = "Staging"
"""Reason of Staged=False while the staging Job is at work or waits for its pod."""


def find(status: FineTuneJobStatus, kind: ConditionType) -> Condition | None:
    """The condition of that type, if the status has it."""
    return next((condition for condition in status.conditions if condition.type == kind), None)


def is_true(status: FineTuneJobStatus, kind: ConditionType) -> bool:
    """Whether the condition is there and True."""
    condition = find(status, kind)
    return condition is not None and condition.status == "True"


def is_finished(status: FineTuneJobStatus) -> bool:
    """Whether the job is over for good."""
    return is_true(status, "Succeeded") or is_true(status, "Failed")


def with_condition(status: FineTuneJobStatus, new: Condition) -> FineTuneJobStatus:
    """The status with the condition added or replaced; its transition time moves only if its status does."""
    old = find(status, new.type)
    if old is None:
        return status.model_copy(update={"conditions": [*status.conditions, new]})
    if old.status == new.status:
        new = new.model_copy(update={"last_transition_time": old.last_transition_time})
    conditions = [new if condition.type == new.type else condition for condition in status.conditions]
    return status.model_copy(update={"conditions": conditions})


def state_of(status: FineTuneJobStatus) -> State:
    """The conditions in one word, most telling first."""
    decided: tuple[tuple[ConditionType, State], ...] = (
        ("Failed", "Failed"),
        ("Succeeded", "Succeeded"),
        ("Suspended", "Suspended"),
        ("Running", "Running"),
    )
    for kind, state in decided:
        if is_true(status, kind):
            return state
    if status.attempt_start_time is None and status.attempt > 1:
        return "Restarting"
    if status.attempt > 0 or is_true(status, "Staged"):
        return "Starting"
    return "Staging" if find(status, "Staged") is not None else "Pending"


def with_report(status: FineTuneJobStatus, report: ProgressReport) -> FineTuneJobStatus:
    """The status with a trainer's report of the present attempt; an older one than we know changes nothing."""
    known = status.progress.step if status.progress else 0
    if report.progress.step < known:
        return status
    return with_checkpoint(status.model_copy(update={"progress": report.progress}), report.checkpoint)


def with_checkpoint(status: FineTuneJobStatus, checkpoint: CheckpointStatus | None) -> FineTuneJobStatus:
    """The status with the checkpoint, unless it knows a newer one."""
    if checkpoint is None or (status.checkpoint is not None and status.checkpoint.time >= checkpoint.time):
        return status
    return status.model_copy(update={"checkpoint": checkpoint})


def rewound(status: FineTuneJobStatus) -> FineTuneJobStatus:
    """The status of a gang that stands still: what is not in the newest checkpoint is not done."""
    if status.progress is None:
        return status
    step = status.checkpoint.step if status.checkpoint else 0
    return status.model_copy(update={"progress": _at_step(status.progress, step)})


def completed(progress: Progress | None, steps: int, loss: float | None) -> Progress:
    """The progress of a run that is over, after so many steps and with that last loss."""
    known = progress or Progress(step=steps, total_steps=steps, epoch=0, percentage=100)
    final = {"step": max(steps, known.step), "percentage": 100, "estimated_remaining_seconds": 0}
    return known.model_copy(update={**final, "loss": known.loss if loss is None else loss})


def _at_step(progress: Progress, step: int) -> Progress:
    if progress.step == step:
        return progress.model_copy(update={"tokens_per_second": None, "estimated_remaining_seconds": None})
    share = step / progress.total_steps if progress.total_steps else 0.0
    return Progress(
        step=step,
        total_steps=progress.total_steps,
        epoch=round(progress.epoch * step / progress.step, 4) if progress.step else 0.0,
        percentage=int(100 * share),
        updated_time=progress.updated_time,
    )


def active_seconds(status: FineTuneJobStatus, now: datetime) -> float:
    """Seconds that count for activeDeadlineSeconds until now."""
    running = (now - status.active_since).total_seconds() if status.active_since else 0.0
    return status.active_seconds + max(0.0, running)


def clock_stopped(status: FineTuneJobStatus, now: datetime) -> FineTuneJobStatus:
    """The status of a job whose time does not count from now on."""
    return status.model_copy(update={"active_seconds": int(active_seconds(status, now)), "active_since": None})


def seconds_of(moment: datetime) -> datetime:
    """The moment as Kubernetes writes it: UTC, whole seconds."""
    return moment.astimezone(UTC).replace(microsecond=0)


def clock(moment: datetime) -> str:
    """The time of day for a sentence, such as `10:02:40 UTC`."""
    return moment.astimezone(UTC).strftime("%H:%M:%S UTC")


def clipped(text: str) -> str:
    """The text, its middle left out where it is too long: the end says why, the start says what."""
    text = text.strip()
    if len(text) <= MESSAGE_LIMIT:
        return text
    head = MESSAGE_LIMIT // 4
    return f"{text[:head]} [...] {text[head + 7 - MESSAGE_LIMIT :]}"


def counted(number: int, noun: str) -> str:
    """The number with its noun, such as `1 worker` and `2 workers`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def readable_bytes(size: int) -> str:
    """A size for people, such as `269 MB`."""
    value, units = float(size), ["bytes", "kB", "MB", "GB", "TB"]
    while value >= 1000 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{value:.0f} {units[0]}" if value >= 10 or units[0] == "bytes" else f"{value:.1f} {units[0]}"
