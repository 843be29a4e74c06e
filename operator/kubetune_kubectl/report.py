"""`kubectl finetune report NAME`: the loss picture, the metrics and the samples of a run, here and in a few lines."""

import json
import sys
from datetime import datetime
from pathlib import Path, PurePosixPath
from statistics import median
from typing import Any, Final, NamedTuple, Self, TextIO

from rich.text import Text

from kubetune_contract.paths import CONFIG_FILE, LOSS_PICTURE, METRICS_FILE, RESULT_FILE, SAMPLES_FILE
from kubetune_kubectl import jobs
from kubetune_kubectl.errors import NothingThere
from kubetune_kubectl.follow import attempt_of
from kubetune_kubectl.jobs import Job
from kubetune_kubectl.kubectl import Kubectl
from kubetune_kubectl.outcome import result_rows
from kubetune_kubectl.volume import Image, reader
from kubetune_kubectl.words import console, is_unicode, pairs, print_table, sparkline, state_text
from kubetune_operator.api import duration
from kubetune_operator.diagnosis import index_of
from kubetune_operator.names import JOB_LABEL, ROLE_LABEL, WORKER
from kubetune_operator.pods import USER

FILES: Final = (METRICS_FILE, LOSS_PICTURE, SAMPLES_FILE, RESULT_FILE, CONFIG_FILE)
SPARKLINE_WIDTH: Final = 60
_SECURITY: Final = {"runAsUser": USER, "runAsGroup": USER, "fsGroup": USER, "fsGroupChangePolicy": "OnRootMismatch"}
"""As the workers have it: whoever wrote the files can read them."""


class Summary(NamedTuple):
    """What the metrics of a run say. Losses are in nats per label token."""

    steps: int
    losses: list[float]
    """Training loss of each step."""
    validation: list[float]
    """Held-out losses in the order of their steps."""
    tokens: int
    tokens_per_second: float | None
    """Median over the steps."""
    seconds: float | None
    """From the first line to the last, pauses included."""

    @classmethod
    def of(cls, lines: list[dict[str, Any]]) -> Self:
        """From the lines of metrics.jsonl."""
        steps = [line for line in lines if "loss" in line]
        speeds = [line["tokens_per_second"] for line in steps if line.get("tokens_per_second") is not None]
        times = [datetime.fromisoformat(line["time"]) for line in lines if "time" in line]
        return cls(
            steps=max((line["step"] for line in steps), default=0),
            losses=[line["loss"] for line in steps],
            validation=[line["validation_loss"] for line in lines if "validation_loss" in line],
            tokens=sum(line.get("tokens", 0) for line in steps),
            tokens_per_second=median(speeds) if speeds else None,
            seconds=(max(times) - min(times)).total_seconds() if times else None,
        )

    def rows(self) -> list[tuple[str, str]]:
        """Name and value, for people."""
        rows = [("steps", f"{self.steps}, {self.tokens:,} tokens")]
        if self.losses:
            rows.append(("training loss", f"{self.losses[0]:.4g} at first, {self.losses[-1]:.4g} at last"))
        if self.validation:
            rows.append(("held-out loss", ", then ".join(f"{loss:.4g}" for loss in self.validation)))
        if self.tokens_per_second is not None:
            rows.append(("speed", f"{self.tokens_per_second:,.0f} tok/s (median)"))
        if self.seconds is not None:
            rows.append(("training time", duration(self.seconds)))
        return rows

    def document(self) -> dict[str, Any]:
        """The same for programs, in the words of the status."""
        return {
            "steps": self.steps,
            "tokens": self.tokens,
            "initialLoss": self.losses[0] if self.losses else None,
            "finalLoss": self.losses[-1] if self.losses else None,
            "validationLosses": self.validation,
            "tokensPerSecond": self.tokens_per_second,
            "seconds": self.seconds,
        }


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a metrics file: the last one of a running job may be half written."""
    whole = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("}\n")]
    return [json.loads(line) for line in whole]


def run(
    kubectl: Kubectl,
    name: str,
    *,
    output: Path | None = None,
    image: str | None = None,
    timeout: float,
    as_json: bool = False,
    stream: TextIO | None = None,
) -> int:
    """Fetch the files to a folder, and say what they say. 0 if there were any."""
    job = jobs.get(kubectl, name)
    kubectl = kubectl.within(job.namespace)
    folder = job.status.output_path
    if folder is None:
        raise NothingThere(f"FineTuneJob {name} is {job.state} and has no output folder yet: no attempt has started")
    target = output or Path(PurePosixPath(folder).name)
    with reader(kubectl, job, image_of(kubectl, job, image), timeout, _say) as pod:
        found = pod.fetch(folder, FILES, target)
    metrics = target / METRICS_FILE
    if not found:
        claim = job.spec["storage"]["output"]["claimName"]
        raise NothingThere(f'{folder} on claim "{claim}" holds none of {", ".join(FILES)} yet: no step is done')
    summary = Summary.of(read_metrics(metrics) if metrics in found else [])
    if as_json:
        print(json.dumps(_document(job, summary, found), indent=2), file=stream or sys.stdout)
    else:
        _show(job, summary, found, target, stream)
    return 0


def image_of(kubectl: Kubectl, job: Job, image: str | None) -> Image:
    """What the report pod takes over from the newest worker pod, or Job. Raises NothingThere where neither is left."""
    selector = f"--selector={JOB_LABEL}={job.name},{ROLE_LABEL}={WORKER}"
    pods = sorted(kubectl.items("pods", selector), key=lambda pod: (-attempt_of(pod), index_of(pod)))
    children = sorted(kubectl.items("jobs.batch", selector), key=lambda child: -attempt_of(child))
    if pods:
        found = Image.of(pods[0]["spec"], pods[0]["spec"].get("nodeName"))
    elif children:
        found = Image.of(children[0]["spec"]["template"]["spec"], None)
    elif image is not None:
        return Image(image, None, [], [], _SECURITY, None)
    else:
        raise NothingThere(
            f"the Jobs of FineTuneJob {job.name} are gone, so its image is not known: "
            "give --image with the trainer's image, or any that has python"
        )
    return found if image is None else found._replace(image=image)


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def _document(job: Job, summary: Summary, found: list[Path]) -> dict[str, Any]:
    return {
        "namespace": job.namespace,
        "name": job.name,
        "state": job.state,
        "outputPath": job.status.output_path,
        "files": [str(path) for path in found],
        "summary": summary.document(),
    }


def _show(job: Job, summary: Summary, found: list[Path], target: Path, stream: TextIO | None) -> None:
    screen = console(stream or sys.stdout)
    screen.print(Text.assemble((f"{job.namespace}/{job.name}  ", "bold"), state_text(job.state)))
    if summary.losses:
        screen.print(Text(sparkline(summary.losses, SPARKLINE_WIDTH, is_unicode(screen)), style="cyan"))
    told = summary.rows()
    shown = {name for name, _ in told}
    on_volume = [row for row in result_rows(job) if row[0] not in shown | {"trained", "last training loss"}]
    print_table(screen, pairs([*told, *on_volume]))
    screen.print(Text(f"fetched to {target}: {', '.join(path.name for path in found)}"))
    if LOSS_PICTURE not in {path.name for path in found}:
        screen.print(Text(f"{LOSS_PICTURE} is drawn when the run ends", style="dim"))
