"""The staging phase: shared Jobs put model and data on the models claim, or check what is there. Pure.

Each content has a Job of its own; they work at the same time. One condition tells how far all of them are.
"""

from collections.abc import Sequence
from typing import Final, NamedTuple

from kubetune_contract.staging import StagedData, StagedModel
from kubetune_operator import memory
from kubetune_operator.api import FineTuneJob
from kubetune_operator.asking import conflict, refused
from kubetune_operator.contents import Content, contents
from kubetune_operator.decision import Decision, StageView
from kubetune_operator.diagnosis import (
    Ending,
    Manifest,
    condition,
    ending_by_job,
    ending_condition,
    failed_tries,
    is_deleting,
    is_live,
    is_over,
    is_ready,
    last_word,
    moment,
)
from kubetune_operator.names import stage_name
from kubetune_operator.obstacles import Obstacle
from kubetune_operator.owners import is_owned
from kubetune_operator.queueing import is_held, told
from kubetune_operator.stagers import stage_adoption, stage_job
from kubetune_operator.status import STAGING, counted, find, readable_bytes

STARTING: Final = ": the staging pod is starting"
AFTER_ANOTHER: Final = ", after an earlier staging is removed"
_SHORT_COMMIT: Final = 12


class Step(NamedTuple):
    """Where the staging of one content stands."""

    text: str = ""
    """What is going on, without a full stop."""
    done: bool = False
    created: bool = False
    """Its Job is to be created now."""
    waits: bool = False
    """Its pod is not up."""
    held: bool = False
    """A queue holds its Job back."""
    stopping: bool = False
    """The job is suspended and its pod still runs."""
    tries: str = ""
    """How its Job's earlier pods failed: the Job tries again by itself."""
    obstacle: Obstacle | None = None
    why: Ending | None = None
    """It has failed."""


def is_complete(turn: Decision) -> bool:
    """Whether everything that the job reads is staged."""
    return all(_is_staged(turn, content) for content in contents(turn.job.spec))


def stage(turn: Decision) -> None:
    """Bring the staging one step further."""
    if not turn.job.spec.suspend:
        turn.withdraw("Suspended", "Resumed", "The job goes on.")
    everything = contents(turn.job.spec)
    steps = [_step(turn, content) for content in everything if not _is_staged(turn, content)]
    failed = [step.why for step in steps if step.why is not None]
    if failed:
        why = min(failed, key=lambda ending: ending.cause)
        turn.condition("Staged", False, why.reason, why.told())
        turn.fail(why.reason, why.told())
    elif all(step.done for step in steps):
        relief = "Normal" if turn.said_otherwise("Staged", STAGING) else None
        turn.condition("Staged", True, "Staged", _told(turn), event=relief)
    elif turn.job.spec.suspend:
        _say_suspended(turn, steps)
    else:
        _say(turn, [step for step in steps if not step.done], len(everything))


def release(turn: Decision) -> None:
    """Remove the stage Jobs that are at work for nobody, once this job is over."""
    for view in turn.observed.stages.values():
        if is_owned(view.job, turn.job.uid) and not is_over(view.job) and not view.shared:
            turn.delete(view.job)


def _is_staged(turn: Decision, content: Content) -> bool:
    if content.kind == "Model":
        return turn.status.staged is not None
    return any(data.path == content.path for data in turn.status.staged_data or ())


# ---------------------------------------------------------------- one content


def _step(turn: Decision, content: Content) -> Step:
    view = turn.observed.stages.get(stage_name(turn.job.spec, content))
    if view is None:
        return _start(turn, content)
    stale = is_over(view.job) and not is_owned(view.job, turn.job.uid) and not _ended_while_we_waited(turn, view.job)
    if stale and view.shared:
        # Those who joined it have yet to read what it says: else many jobs start each other's staging over for ever.
        turn.look_again(1)
        return Step(f"{_what(turn.job, content)}{AFTER_ANOTHER}")
    if is_deleting(view.job) or stale:
        return _start_over(turn, content, view.job)
    if condition(view.job, "Complete") is not None:
        return _complete(turn, content, view)
    if ending_condition(view.job) is not None:
        return _failed(turn, content, view)
    return _suspend(turn, view) if turn.job.spec.suspend else _follow(turn, content, view)


def _start(turn: Decision, content: Content) -> Step:
    if turn.job.spec.suspend:
        return Step()
    turn.apply(stage_job(turn.job, content, turn.settings))
    return Step(f"{_what(turn.job, content)}{STARTING}", created=True, waits=True)


def _ended_while_we_waited(turn: Decision, child: Manifest) -> bool:
    """Whether a Job that we had not joined yet ended after we had come: what it says is as new as we need it."""
    waits = find(turn.job.status, "Staged")
    failed = ending_condition(child)
    ended = moment(failed.get("lastTransitionTime") if failed else child.get("status", {}).get("completionTime"))
    return waits is not None and ended is not None and ended >= waits.last_transition_time


def _start_over(turn: Decision, content: Content, child: Manifest) -> Step:
    """A Job that ended before we came says nothing about today's volume: remove it, then create it anew."""
    turn.delete(child)
    turn.look_again(1)
    return Step(f"{_what(turn.job, content)}{AFTER_ANOTHER}")


def _complete(turn: Decision, content: Content, view: StageView) -> Step:
    words = [word for pod in view.pods if (word := last_word(pod)) is not None]
    if content.kind == "Model":
        staged = next((word.staged for word in words if word.staged is not None), None)
        if staged is not None:
            turn.set(staged=staged)
            return Step(done=True)
    else:
        data = next((word.staged_data for word in words if word.staged_data is not None), None)
        if data is not None:
            others = [one for one in turn.status.staged_data or () if one.path != content.path]
            found = data.model_copy(update={"path": content.path})  # where the run looks for it
            turn.set(staged_data=sorted([*others, found], key=lambda one: one.path))
            return Step(done=True)
    if turn.evidence_due(view.job.get("status", {}).get("completionTime")):
        return _start_over(turn, content, view.job)
    return Step(_what(turn.job, content))


def _failed(turn: Decision, content: Content, view: StageView) -> Step:
    pods = list(view.pods)
    kept = [pod for pod in pods if condition(pod, "DisruptionTarget") is None]  # the Job retries evicted ones by itself
    why = turn.ending(view.job, kept or pods)
    if why is None:
        if not turn.evidence_due((ending_condition(view.job) or {}).get("lastTransitionTime")):
            return Step(_what(turn.job, content))
        why = ending_by_job(view.job)
    return Step(why=why)


def _follow(turn: Decision, content: Content, view: StageView) -> Step:
    turn.suspend(view.job, suspended=False)
    if not is_owned(view.job, turn.job.uid) and condition(view.job, "SuccessCriteriaMet") is None:
        # Not any more when its pod has succeeded: each joining makes the Job controller's own last write a conflict.
        turn.apply(stage_adoption(turn.job, content))
    up, what = any(is_ready(pod) for pod in view.pods), _what(turn.job, content)
    lost = turn.lost(list(view.pods))
    if lost is not None:  # the Job waits for that pod to end before it makes another one
        turn.delete(view.job)
        turn.look_again(1)
        return Step(f"{what}, after a pod is given up: {lost.message}", waits=True)
    if is_held(view.job):
        return Step(f"{what}: {told(turn, view.job).rstrip('.')}", held=True)
    problem, text = turn.obstacle(view.job, 1, list(view.pods)), what if up else f"{what}{STARTING}"
    return Step(text, waits=not up, obstacle=problem, tries=failed_tries(view.pods))


def _suspend(turn: Decision, view: StageView) -> Step:
    if view.shared:
        return Step("shared")
    turn.suspend(view.job, suspended=True)
    alive = any(is_live(pod) for pod in view.pods) and turn.lost(list(view.pods)) is None
    return Step("stopped", stopping=alive)


# ---------------------------------------------------------------- all of them


def _say(turn: Decision, steps: Sequence[Step], total: int) -> None:
    if any(step.waits for step in steps):
        turn.waiting_for = "Staged"
    if turn.observed.conflict is not None and any(step.created for step in steps):
        conflict(turn, "Staged", turn.observed.conflict)
        return
    if turn.observed.refused is not None and any(step.created for step in steps):
        refused(turn, "Staged", turn.observed.refused)
        return
    problem = next((step.obstacle for step in steps if step.obstacle is not None), None)
    if problem is not None:
        turn.blocked("Staged", problem)
        return
    first, *others = (step.text for step in steps)
    tries = (step.tries for step in steps)
    text = "; ".join([first, *(text[0].lower() + text[1:] for text in others)])
    there = total - len(steps)
    text = " ".join((f"{text}.", *([f"{there} of {total} are there."] if there else []), *filter(None, tries)))
    if any(step.held for step in steps):
        turn.condition("Staged", False, "WaitingForQuota", text, event="Normal")
    else:
        turn.condition("Staged", False, STAGING, text)


def _say_suspended(turn: Decision, steps: Sequence[Step]) -> None:
    if not any(step.text or step.done for step in steps) and turn.status.staged is None:
        turn.condition("Suspended", True, "Suspended", "Nothing was started yet.", event="Normal")
        return
    stopping = sum(step.stopping for step in steps)
    if stopping:
        pods = "The staging pod is" if stopping == 1 else f"{counted(stopping, 'staging pod')} are"
        turn.condition("Suspended", False, "Suspending", f"{pods} stopping.")
        return
    turn.condition("Suspended", True, "Suspended", "Staging is stopped; it goes on from there.", event="Normal")


def _what(job: FineTuneJob, content: Content) -> str:
    claim = job.spec.storage.models.claim_name
    if content.place.volume_path is not None:
        return f'Checking the model at {content.place.volume_path} on claim "{claim}"'
    data = "the data " if content.kind == "Dataset" else ""
    return f'Downloading {data}{content.what} to claim "{claim}"'


def _told(turn: Decision) -> str:
    claim, model = turn.job.spec.storage.models.claim_name, turn.status.staged
    assert model is not None, "all contents are staged"
    text = (
        f"{model.architecture} with {model.parameters:,} parameters ({_size(model)}) "
        f'is at {model.path} on claim "{claim}".'
    )
    known = {data.path: data for data in turn.status.staged_data or ()}
    for content in contents(turn.job.spec):
        if content.kind == "Dataset":
            text += f" The data {content.what} ({_size(known[content.path])}) are at {content.path}."
    return text + memory.told(turn)


def _size(staged: StagedModel | StagedData) -> str:
    commit = f", commit {staged.revision[:_SHORT_COMMIT]}" if staged.revision else ""
    return f"{readable_bytes(staged.bytes)}{commit}"
