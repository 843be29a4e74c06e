"""What is said about a job that is over. Pure."""

from rich.text import Text

from kubetune_kubectl.jobs import Job
from kubetune_operator.api import duration
from kubetune_operator.status import find


def ending_lines(job: Job) -> list[Text]:
    """What follows the first line of why it ended: the last lines of a log, what it left, where to look on."""
    condition = find(job.status, "Succeeded" if job.succeeded else "Failed")
    log = condition.message.strip().splitlines()[1:] if condition else []
    lines = [Text(line) for line in log] + [Text(f"  {name}: {value}") for name, value in result_rows(job)]
    command = "report" if job.succeeded else "logs"
    return [*lines, Text(f"  more: kubectl finetune {command} {job.name} -n {job.namespace}", style="dim")]


def result_rows(job: Job) -> list[tuple[str, str]]:
    """What the run left, each with its name. Paths are on the output volume."""
    status, rows = job.status, []
    result = status.result
    if result is not None:
        paths = {
            "adapter": result.adapter_path,
            "model": result.model_path,
            "merged model": result.merged_path,
            "samples": result.samples_path,
            "loss picture": result.loss_picture_path,
        }
        rows += [(name, path) for name, path in paths.items() if path]
        rows += _losses(result.final_loss, result.initial_validation_loss, result.final_validation_loss)
        rows.append(("trained", f"{result.steps} steps, {result.tokens:,} tokens"))
    elif status.output_path is not None:
        rows.append(("output folder", status.output_path))
    if status.start_time is not None and status.completion_time is not None:
        rows.append(("duration", duration((status.completion_time - status.start_time).total_seconds())))
    return rows


def _losses(final: float | None, before: float | None, after: float | None) -> list[tuple[str, str]]:
    rows = []
    if final is not None:
        rows.append(("last training loss", f"{final:.4g}"))
    if before is not None and after is not None:
        rows.append(("held-out loss", f"{before:.4g} before, {after:.4g} after"))
    return rows
