"""The staging phase: one shared Job puts the base model on the models claim, or checks what is there. Pure."""

from typing import Final

from kubetune_contract.staging import StagedModel
from kubetune_operator.api import FineTuneJob
from kubetune_operator.build import stage_adoption, stage_job
from kubetune_operator.decision import Decision
from kubetune_operator.diagnosis import (
    Manifest,
    condition,
    ending_by_job,
    ending_condition,
    is_deleting,
    is_live,
    is_ready,
    last_word,
)
from kubetune_operator.queueing import is_held, told
from kubetune_operator.status import STAGING, readable_bytes

STARTING: Final = ": the staging pod is starting"


def stage(turn: Decision) -> None:
    """Bring the staging one step further."""
    child = turn.observed.stage_job
    if child is None:
        _start(turn)
    elif is_deleting(child) or (_is_over(child) and not owns(turn.job, child)):
        _start_over(turn, child)
    elif condition(child, "Complete") is not None:
        _complete(turn, child)
    elif ending_condition(child) is not None:
        _failed(turn, child)
    else:
        _follow(turn, child)


def release(turn: Decision) -> None:
    """Remove a stage Job that is at work for nobody, once this job is over."""
    child = turn.observed.stage_job
    if child is not None and owns(turn.job, child) and not _is_over(child) and not turn.observed.stage_shared:
        turn.delete(child)


def owns(job: FineTuneJob, child: Manifest) -> bool:
    """Whether the FineTuneJob is an owner of the child."""
    return any(owner["uid"] == job.uid for owner in child["metadata"].get("ownerReferences") or [])


def _is_over(child: Manifest) -> bool:
    return condition(child, "Complete") is not None or condition(child, "Failed") is not None


def _start(turn: Decision) -> None:
    if turn.job.spec.suspend:
        turn.condition("Suspended", True, "Suspended", "Nothing was started yet.", event="Normal")
        return
    turn.withdraw("Suspended", "Resumed", "The job goes on.")
    turn.apply(stage_job(turn.job, turn.settings))
    turn.waiting_for = "Staged"
    if turn.observed.conflict is not None:
        turn.condition("Staged", False, "NameConflict", turn.observed.conflict, event="Warning")
        turn.look_again(turn.settings.restart_backoff_seconds)
        return
    if turn.observed.refused is not None:
        turn.refused("Staged", turn.observed.refused)
        return
    turn.condition("Staged", False, STAGING, f"{_what(turn.job)}{STARTING}.")


def _start_over(turn: Decision, child: Manifest) -> None:
    """A Job that ended before we joined it says nothing about today's volume: remove it, then create it anew."""
    turn.delete(child)
    turn.look_again(1)
    turn.condition("Staged", False, STAGING, f"{_what(turn.job)}, after an earlier staging is removed.")


def _complete(turn: Decision, child: Manifest) -> None:
    words = (last_word(pod) for pod in turn.observed.stage_pods)
    staged = next((word.staged for word in words if word is not None and word.staged is not None), None)
    if staged is not None:
        turn.withdraw("Suspended", "Resumed", "The job goes on.")
        turn.set(staged=staged)
        relief = "Normal" if turn.said_otherwise("Staged", STAGING) else None
        turn.condition("Staged", True, "Staged", _told(staged, turn), event=relief)
        return
    if turn.evidence_due(child.get("status", {}).get("completionTime")):
        _start_over(turn, child)


def _told(staged: StagedModel, turn: Decision) -> str:
    claim = turn.job.spec.storage.models.claim_name
    return (
        f"{staged.architecture} with {staged.parameters:,} parameters ({readable_bytes(staged.bytes)}) "
        f'is at {staged.path} on claim "{claim}".'
    )


def _failed(turn: Decision, child: Manifest) -> None:
    pods = turn.observed.stage_pods
    kept = [pod for pod in pods if condition(pod, "DisruptionTarget") is None]  # the Job retries evicted ones by itself
    why = turn.ending(child, kept or pods)
    if why is None:
        if not turn.evidence_due((ending_condition(child) or {}).get("lastTransitionTime")):
            return
        why = ending_by_job(child)
    turn.condition("Staged", False, why.reason, why.told())
    turn.fail(why.reason, why.told())


def _follow(turn: Decision, child: Manifest) -> None:
    if turn.job.spec.suspend:
        _suspend(turn, child)
        return
    turn.withdraw("Suspended", "Resumed", "The job goes on.")
    turn.suspend(child, suspended=False)
    if not owns(turn.job, child):
        turn.apply(stage_adoption(turn.job))
    if is_held(child):
        turn.condition("Staged", False, "WaitingForQuota", f"{_what(turn.job)}: {told(turn, child)}", event="Normal")
        return
    problem = turn.obstacle(child, 1, turn.observed.stage_pods)
    if not any(is_ready(pod) for pod in turn.observed.stage_pods):
        turn.waiting_for = "Staged"
    if problem is not None:
        turn.blocked("Staged", problem)
    elif any(is_ready(pod) for pod in turn.observed.stage_pods):
        turn.condition("Staged", False, STAGING, f"{_what(turn.job)}.")
    else:
        turn.condition("Staged", False, STAGING, f"{_what(turn.job)}{STARTING}.")


def _suspend(turn: Decision, child: Manifest) -> None:
    if not turn.observed.stage_shared:
        turn.suspend(child, suspended=True)
        if any(is_live(pod) for pod in turn.observed.stage_pods):
            turn.condition("Suspended", False, "Suspending", "The staging pod is stopping.")
            return
    turn.condition("Suspended", True, "Suspended", "Staging is stopped; it goes on from there.", event="Normal")


def _what(job: FineTuneJob) -> str:
    claim, source = job.spec.storage.models.claim_name, job.spec.model
    if source.hugging_face is not None:
        return f'Downloading {source.hugging_face.repo} ({source.hugging_face.revision}) to claim "{claim}"'
    return f'Checking the model at {source.volume_path} on claim "{claim}"'
