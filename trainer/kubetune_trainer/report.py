"""What a run tells: progress line, metrics.jsonl, loss picture, reports to the operator, the container's last word.

Only rank 0 speaks; on the other ranks every method does nothing.
"""

import json
import os
import resource
import ssl
import sys
import threading
import time
import urllib.request
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Self, TextIO

import torch

from kubetune_contract.exit_codes import ExitCode
from kubetune_contract.paths import (
    CA_FILE,
    CONFIG_MOUNT,
    LOSS_PICTURE,
    METRICS_FILE,
    PROGRESS_URL_ENV,
    TERMINATION_LOG,
    TOKEN_FILE,
    TOKEN_MOUNT,
)
from kubetune_contract.progress import CheckpointStatus, Progress, ProgressReport, TerminationMessage
from kubetune_contract.progress_line import progress_line
from kubetune_trainer.distributed import World
from kubetune_trainer.loggers import Logger

PLAIN_SECONDS: Final = 5.0
"""Seconds between plain progress lines."""
POST_SECONDS: Final = 2.0
"""Least seconds between reports to the operator."""
POST_TIMEOUT: Final = 5.0
_WINDOW_STEPS: Final = 20
"""Rates are means over so many steps."""


@dataclass(frozen=True)
class Step:
    """One finished optimizer step, all ranks together."""

    number: int
    """Optimizer steps done, with this one."""
    loss: float
    """Mean cross-entropy per label token, in nats."""
    learning_rate: float
    gradient_norm: float
    """L2 norm before clipping."""
    tokens: int
    """All tokens."""
    label_tokens: int
    """Those of them that carry the loss."""
    measures: Mapping[str, float] = field(default_factory=dict)
    """What else is measured, by name."""


class Reporter:
    """Reports of one run; `folder` is its output folder."""

    def __init__(
        self,
        folder: Path,
        world: World,
        total_steps: int,
        steps_per_epoch: int,
        *,
        poster: "Poster | None" = None,
        loggers: Sequence[Logger] = (),
        stream: TextIO | None = None,
    ) -> None:
        self._speaks = world.is_main
        self._device = world.device
        self._stream = stream or sys.stdout
        self._on_terminal = self._stream.isatty()
        self._total = total_steps
        self._steps_per_epoch = steps_per_epoch
        self._poster = poster
        self._loggers = loggers
        self._checkpoint: CheckpointStatus | None = None
        self._marks: deque[tuple[float, int, int, int]] = deque(maxlen=_WINDOW_STEPS + 1)
        self._tokens = self._label_tokens = 0
        self._last_line = 0.0
        self.folder = folder
        self.metrics = Metrics(folder / METRICS_FILE)

    def say(self, text: str) -> None:
        """A line for people."""
        if self._speaks:
            clear = "\r\x1b[2K" if self._on_terminal else ""
            print(f"{clear}{text}", file=self._stream, flush=True)

    def rewind(self, step: int) -> None:
        """The run goes on after `step` steps: metrics past it are dropped."""
        if self._speaks:
            self.metrics.rewind(step)
        for logger in self._loggers:
            logger.begin(step)

    def begin(self, step: int) -> None:
        """The loop starts after `step` steps: the clocks start and the operator hears of it."""
        if self._speaks:
            self._marks.append((time.monotonic(), step, 0, 0))
            self._post(self._position(step))

    def step(self, step: Step) -> None:
        """A step is done."""
        if not self._speaks:
            return
        self._tokens += step.tokens
        self._label_tokens += step.label_tokens
        self._marks.append((time.monotonic(), step.number, self._tokens, self._label_tokens))
        progress = self._progress(step)
        self._record(
            step.number,
            {
                "epoch": progress.epoch,
                "loss": step.loss,
                "learning_rate": step.learning_rate,
                "gradient_norm": step.gradient_norm,
                "tokens": step.tokens,
                "label_tokens": step.label_tokens,
                **step.measures,
                "tokens_per_second": progress.tokens_per_second,
                "label_tokens_per_second": progress.label_tokens_per_second,
            },
        )
        self._show(progress)
        self._post(progress)

    def validation(self, step: int, loss: float) -> None:
        """The held-out loss after `step` steps, in nats per label token."""
        if self._speaks:
            self._record(step, {"validation_loss": loss})
            self.say(f"validation loss after step {step}: {loss:.4f}")

    def checkpoint(self, status: CheckpointStatus) -> None:
        """A checkpoint is complete; the next report tells the operator."""
        self._checkpoint = status

    def flush(self) -> None:
        """Brings the metrics to the disk."""
        if self._speaks:
            self.metrics.flush()

    def draw(self) -> None:
        """Writes the loss picture and brings the metrics to the disk."""
        self.flush()
        if self._speaks:
            draw_losses(self.metrics.path, self.folder / LOSS_PICTURE)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Draws what there is of a run that ends early, and gives the last report a moment to arrive."""
        if kind is not None:
            with suppress(OSError):
                self.draw()
        for logger in self._loggers:
            logger.close()
        if self._poster:
            self._poster.close()

    def _record(self, step: int, values: dict[str, Any]) -> None:
        self.metrics.append({"step": step} | values | {"time": _now().isoformat(timespec="milliseconds")})
        for logger in self._loggers:
            logger.log(step, values)

    def _progress(self, step: Step) -> Progress:
        start, first_step, first_tokens, first_labels = self._marks[0]
        now, last_step, last_tokens, last_labels = self._marks[-1]
        seconds = max(now - start, 1e-9)
        measured = {
            "loss": step.loss,
            "learning_rate": step.learning_rate,
            "tokens_per_second": round((last_tokens - first_tokens) / seconds, 1),
            "label_tokens_per_second": round((last_labels - first_labels) / seconds, 1),
            "gradient_norm": step.gradient_norm,
            "peak_memory_bytes": peak_memory(self._device),
            "estimated_remaining_seconds": round((self._total - step.number) * seconds / (last_step - first_step)),
        }
        return self._position(step.number).model_copy(update=measured)

    def _position(self, step: int) -> Progress:
        epoch = round(step / self._steps_per_epoch, 4)
        return Progress(
            step=step, total_steps=self._total, epoch=epoch, percentage=100 * step // self._total, updated_time=_now()
        )

    def _show(self, progress: Progress) -> None:
        line = progress_line(progress)
        if self._on_terminal:
            print(f"\r\x1b[2K{line}", end="\n" if progress.step == self._total else "", file=self._stream, flush=True)
        elif time.monotonic() - self._last_line >= PLAIN_SECONDS or progress.step == self._total:
            self._last_line = time.monotonic()
            self.say(line)

    def _post(self, progress: Progress) -> None:
        if self._poster:
            self._poster.post(ProgressReport(progress=progress, checkpoint=self._checkpoint))
            if trouble := self._poster.new_trouble():
                self.say(f"the operator does not get the progress reports ({trouble}); the training goes on")


def peak_memory(device: torch.device) -> int:
    """Peak bytes of this process: device memory on CUDA, resident memory elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _now() -> datetime:
    return datetime.now(UTC)


class Metrics:
    """metrics.jsonl: a line per step with `loss`, per validation with `validation_loss`; `step` counts steps done."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, line: dict[str, Any]) -> None:
        """Adds a line; a killed process keeps it, a lost machine only after flush."""
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def flush(self) -> None:
        """Brings the file to the disk."""
        if self.path.exists():
            with self.path.open("rb") as file:
                os.fsync(file.fileno())

    def lines(self) -> list[dict[str, Any]]:
        """All whole lines; a line torn by a kill is left out."""
        return read_metrics(self.path)

    def validation_loss(self, step: int) -> float | None:
        """The held-out loss measured after `step` steps."""
        return next(
            (line["validation_loss"] for line in self.lines() if line["step"] == step and "validation_loss" in line),
            None,
        )

    def last_loss(self) -> float | None:
        """The training loss of the last step."""
        return next((line["loss"] for line in reversed(self.lines()) if "loss" in line), None)

    def rewind(self, step: int) -> None:
        """Drops what lies past `step` and a torn last line: those steps will be done again."""
        if not self.path.exists():
            return
        kept = "".join(json.dumps(line) + "\n" for line in self.lines() if line["step"] <= step)
        scratch = self.path.with_name(self.path.name + ".tmp")
        scratch.write_text(kept)
        scratch.replace(self.path)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a metrics file; none where there is no file."""
    if not path.exists():
        return []
    whole = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("}\n")]
    return [json.loads(line) for line in whole]


def draw_losses(metrics: Path, picture: Path) -> None:
    """Training loss as a line, validation loss as points, over optimizer steps. No picture where there is no step."""
    lines = read_metrics(metrics)
    training = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    if not training:
        return
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    axes.plot(*zip(*training, strict=True), color="#1f77b4", linewidth=1.2, label="training")
    if validation := [(line["step"], line["validation_loss"]) for line in lines if "validation_loss" in line]:
        axes.plot(
            *zip(*validation, strict=True), color="#d62728", marker="o", linestyle="--", linewidth=1, label="validation"
        )
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss (nats per label token)")
    axes.grid(alpha=0.3)
    axes.legend()
    scratch = picture.with_name(f".{picture.name}")
    figure.savefig(scratch, format="png")
    scratch.replace(picture)


class Poster:
    """Posts reports to the operator from its own thread. The latest wins; nothing here delays or fails the training."""

    def __init__(
        self, url: str, ca_file: Path = Path(CONFIG_MOUNT, CA_FILE), token_file: Path = Path(TOKEN_MOUNT, TOKEN_FILE)
    ) -> None:
        self._url = url
        self._ca_file = ca_file
        self._token_file = token_file
        self._changed = threading.Condition()
        self._latest: ProgressReport | None = None
        self._closing = False
        self._trouble: str | None = None
        self._told = False
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)
        self._thread.start()

    @classmethod
    def from_env(cls) -> "Poster | None":
        """The poster of a worker in a cluster; None elsewhere."""
        url = os.environ.get(PROGRESS_URL_ENV)
        return cls(url) if url else None

    def post(self, report: ProgressReport) -> None:
        """Hands a report over; returns at once."""
        with self._changed:
            self._latest = report
            self._changed.notify()

    def new_trouble(self) -> str | None:
        """Why reports fail, the first time that it is asked after a failure."""
        if self._trouble is None or self._told:
            return None
        self._told = True
        return self._trouble

    def close(self) -> None:
        """Sends what is waiting; gives up after a few seconds."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(2 * POST_TIMEOUT)

    def _run(self) -> None:
        next_time = 0.0
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._latest is not None or self._closing)
                self._changed.wait_for(lambda: self._closing, timeout=max(0.0, next_time - time.monotonic()))
                report, self._latest = self._latest, None
            if report is None:
                return
            next_time = time.monotonic() + POST_SECONDS
            try:
                self._send(report)
            except (
                OSError,
                ValueError,
            ) as error:  # URLError, timeouts and a missing file are OSErrors; a broken CA file or URL is a ValueError
                self._trouble = str(error)

    def _send(self, report: ProgressReport) -> None:
        """The CA and the token are read each time: both are rotated while the run goes on."""
        headers = {
            "Content-Type": "application/json",
            "Authorization": f"Bearer {self._token_file.read_text().strip()}",
        }
        request = urllib.request.Request(self._url, report.to_json().encode(), headers, method="POST")  # noqa: S310 - the operator's URL
        handlers: list[urllib.request.BaseHandler] = [
            urllib.request.ProxyHandler({})
        ]  # the operator is inside the cluster
        if self._url.startswith("https:"):
            handlers.append(urllib.request.HTTPSHandler(context=ssl.create_default_context(cafile=str(self._ca_file))))
        with urllib.request.build_opener(*handlers).open(request, timeout=POST_TIMEOUT):
            pass


def write_termination(message: TerminationMessage) -> None:
    """The container's last word, where the kubelet has made the file for it.

    The ranks of a pod share the file. A rank that has lost a peer knows least: it leaves what another one wrote.
    """
    log = Path(TERMINATION_LOG)
    if log.exists() and not (message.reason == ExitCode.PEER_LOST.reason and log.stat().st_size):
        log.write_text(message.fitted().to_json())
