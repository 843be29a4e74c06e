"""What `watch` shows: lines that stay for each change of state, and a block with bar, losses, rates and pods. Pure."""

from collections.abc import Sequence
from datetime import datetime
from typing import Final

from rich.console import Group, RenderableType
from rich.text import Text

from kubetune_contract.progress import Progress
from kubetune_kubectl.follow import Sight, attempt_of
from kubetune_kubectl.jobs import Job, explanation, why
from kubetune_kubectl.kubectl import Object
from kubetune_kubectl.losses import Losses
from kubetune_kubectl.words import COLOURS, age, bar, first_line, sparkline, state_text
from kubetune_operator.api import duration
from kubetune_operator.diagnosis import ended_container, index_of, is_deleting, is_ready
from kubetune_operator.status import readable_bytes

BAR_WIDTH: Final = 40
PODS_SHOWN: Final = 8
"""More workers are counted, not listed."""
_POD_COLOURS: Final = {"Running": "cyan", "Succeeded": "green", "Failed": "red"}


def headline(job: Job, now: datetime) -> str:
    """State and reason in a line, such as `Running: Attempt 1: 2 of 2 workers running.`"""
    told = first_line(why(job, now))
    return f"{job.state}: {told}" if told else job.state


def progress_line(progress: Progress) -> str:
    """The progress in a line for logs, such as `step 20/90  22%  loss 1.584  76 tok/s  ETA 7m35s`."""
    parts = [f"step {progress.step}/{progress.total_steps}", f"{progress.percentage}%"]
    if progress.loss is not None:
        parts.append(f"loss {progress.loss:.4g}")
    return "  ".join([*parts, *rates(progress)])


def rates(progress: Progress) -> list[str]:
    """Speed and time that is left, as far as they are known."""
    parts = []
    if progress.tokens_per_second is not None:
        parts.append(f"{progress.tokens_per_second:,.0f} tok/s")
    if progress.estimated_remaining_seconds is not None and progress.step < progress.total_steps:
        parts.append(f"ETA {duration(progress.estimated_remaining_seconds)}")
    return parts


def block(sight: Sight, losses: Losses, notes: Sequence[str], now: datetime, unicode: bool = True) -> RenderableType:
    """The live block."""
    job = sight.job
    lines = [_title(job, now)]
    if job.status.progress is not None:
        lines += _progress(job.status.progress, losses, unicode)
    if job.status.checkpoint is not None:
        checkpoint = job.status.checkpoint
        lines.append(Text(f"checkpoint  step {checkpoint.step}, {age(checkpoint.time, now)} ago"))
    lines += _pods(job, sight.pods)
    condition = explanation(job, now)
    if condition is not None:
        since = age(condition.last_transition_time, now)
        told = f"{condition.type}={condition.status}  {condition.reason}  for {since}"
        lines.append(Text(told, style="dim"))
    lines.append(Text(first_line(why(job, now)), style=COLOURS[job.state]))
    lines += [Text(note, style="yellow") for note in notes]
    if sight.trouble:
        lines.append(Text(f"trying again: {sight.trouble}", style="bold red"))
    return Group(*lines)


def _title(job: Job, now: datetime) -> Text:
    title = Text.assemble((f"{job.namespace}/{job.name}  ", "bold"), state_text(job.state))
    until = job.status.completion_time or now
    if job.status.start_time is not None:
        title.append(f"  {age(job.status.start_time, until)}")
    if job.status.attempt > 1:
        title.append(f"  attempt {job.status.attempt}", style="yellow")
        title.append(f" ({job.status.restarts} after crashes, {job.status.disruptions} after disruptions)", style="dim")
    return title


def _progress(progress: Progress, losses: Losses, unicode: bool) -> list[Text]:
    drawn = bar(progress.step / progress.total_steps if progress.total_steps else 0.0, BAR_WIDTH, unicode)
    steps = f"  {progress.percentage:3}%  step {progress.step}/{progress.total_steps}  epoch {progress.epoch:.2f}"
    lines = [Text.assemble((drawn, "green"), steps)]
    values = losses.values
    if progress.loss is not None or values:
        last = progress.loss if progress.loss is not None else values[-1]
        line = Text(f"loss {last:.4g}  ").append(sparkline(values, BAR_WIDTH, unicode), style="cyan")
        lines.append(line.append(f"  from {values[0]:.4g}" if len(values) > 1 else "", style="dim"))
    measures = rates(progress)
    if progress.learning_rate is not None:
        measures.insert(1, f"learning rate {progress.learning_rate:.3g}")
    if progress.peak_memory_bytes is not None:
        measures.append(f"peak memory {readable_bytes(progress.peak_memory_bytes)}")
    return [*lines, Text("  ".join(measures))] if measures else lines


def _pods(job: Job, pods: Sequence[Object]) -> list[Text]:
    present = [pod for pod in pods if attempt_of(pod) == job.status.attempt]
    lines = [_pod(pod) for pod in present[:PODS_SHOWN]]
    if len(present) > PODS_SHOWN:
        ready = sum(is_ready(pod) for pod in present)
        lines.append(Text(f"and {len(present) - PODS_SHOWN} more workers; {ready} of {len(present)} are ready"))
    return lines


def _pod(pod: Object) -> Text:
    word = pod_word(pod)
    line = Text(f"worker {index_of(pod)}  ").append(word, style=_POD_COLOURS.get(word, "yellow"))
    return line.append(f"  on {pod['spec']['nodeName']}" if "nodeName" in pod.get("spec", {}) else "", style="dim")


def pod_word(pod: Object) -> str:
    """The pod in a word, as kubectl would say it."""
    if is_deleting(pod):
        return "Terminating"
    ended = ended_container(pod)
    if ended is not None and ended.get("exitCode"):
        return f"Failed ({ended.get('reason') or 'Error'}, exit code {ended['exitCode']})"
    for container in pod.get("status", {}).get("containerStatuses") or []:
        reason = container.get("state", {}).get("waiting", {}).get("reason")
        if reason:
            return str(reason)
    return str(pod.get("status", {}).get("phase", "Pending"))
