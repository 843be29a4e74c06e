"""What a side of the trainer's benchmark is given, and how it tells what it measured.

Only the standard library, and torch where it is there already: the peers' environments have nothing else in common.
"""

import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, Self

LINEAR: Final = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
"""The layers that get an adapter."""
RANK: Final = 16
ALPHA: Final = 32
RATE: Final = 1e-4
CLIP: Final = 1.0


@dataclass(frozen=True)
class Work:
    """One training run, the same for each side."""

    model: str
    """A folder in Hugging Face's layout."""
    rows: str
    """JSON: lists of `length` token numbers."""
    texts: str
    """The same rows as text, in JSON Lines: {"text": ...}; with `chat` conversations, {"messages": ...}."""
    started: float
    """When the process was started (`time.monotonic`, seconds)."""
    method: Literal["Full", "LoRA", "QLoRA"] = "LoRA"
    precision: Literal["FP32", "BF16"] = "FP32"
    batch: int = 4
    length: int = 512
    """Tokens of each row."""
    steps: int = 2
    chat: bool = False
    """Whether `texts` is read and rendered by either side; `rows` is not used then."""
    recompute: bool = False
    """Whether activations are computed again in the backward pass."""

    @classmethod
    def read(cls, arguments: list[str] | None = None) -> "tuple[Self, Path]":
        """The work, and the file for the result, as the harness names them at the end of the command."""
        case, result = (arguments or sys.argv)[-2:]
        return cls(**json.loads(Path(case).read_text())), Path(result)

    def tokens(self) -> list[list[int]]:
        """The rows of all steps."""
        rows: list[list[int]] = json.loads(Path(self.rows).read_text())
        wanted = self.batch * self.steps
        return [rows[number % len(rows)][: self.length] for number in range(wanted)]


class Probe:
    """Looks at a run from outside; after the last step it writes the result and ends the process.

    What would come then, checkpoints and exports, is measured elsewhere.
    """

    def __init__(self, work: Work, result: Path) -> None:
        self._work, self._result = work, result
        self._resident = 0.0
        self._ends: list[float] = []
        self._busy: list[float] = []
        self._losses: list[float] = []

    def before_model(self) -> None:
        """Called when everything is imported and read but the model."""
        self._resident = _status_mib("VmRSS")

    def step(self, loss: float) -> None:
        """Called when a step is done, with its mean loss."""
        self._losses.append(loss)
        self._ends.append(_now())
        self._busy.append(time.process_time())
        if len(self._ends) == self._work.steps:
            self._result.write_text(json.dumps(self._values()))
            sys.stdout.flush()
            os._exit(0)

    def _values(self) -> dict[str, float]:
        values = {
            "startup": self._ends[0] - self._work.started,
            "resident": self._resident,
            "peak": _peak_mib(),
            "loss": self._losses[0],
        }
        if len(self._ends) > 1:
            values["step"] = _mean_gap(self._ends)
            values["cpu"] = _mean_gap(self._busy)  # seconds of a step, which others on the machine change little
            values["rate"] = self._work.batch * self._work.length / values["step"]
        return values


def _mean_gap(times: list[float]) -> float:
    return (times[-1] - times[0]) / (len(times) - 1)


def _now() -> float:
    """With all that the device was given to do done."""
    if (cuda := _cuda()) is not None:
        cuda.synchronize()
    return time.monotonic()


def _peak_mib() -> float:
    """Of the device's memory where the model is there, else the process's largest resident memory."""
    cuda = _cuda()
    return _status_mib("VmHWM") if cuda is None else float(cuda.max_memory_allocated()) / 2**20


def _cuda() -> Any:
    """torch.cuda where this process uses a GPU."""
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_available() else None


def _status_mib(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) / 1024
