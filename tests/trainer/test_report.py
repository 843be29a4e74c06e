"""What a run tells: lines, metrics, picture, reports over real HTTPS, the last word."""

import io
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch

from kubetune_contract.progress import Result, TerminationMessage
from kubetune_trainer import report
from kubetune_trainer.distributed import World
from kubetune_trainer.report import (
    Metrics,
    Reporter,
    Step,
    draw_losses,
    peak_memory,
    read_metrics,
    write_termination,
)

DEADLINE = 20.0


def world(rank: int = 0) -> World:
    return World(rank, 2, rank, torch.device("cpu"))


def step(number: int, loss: float = 1.5, tokens: int = 100) -> Step:
    return Step(number, loss, learning_rate=1e-3, gradient_norm=0.5, tokens=tokens, label_tokens=tokens // 4)


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE
    while not holds():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


# --- lines ---


def test_on_a_terminal_one_line_is_rewritten_until_the_end(tmp_path: Path) -> None:
    stream = Terminal()
    reporter = Reporter(tmp_path, world(), 3, 3, stream=stream)
    reporter.begin(0)
    for number in (1, 2, 3):
        reporter.step(step(number))
    shown = stream.getvalue()
    assert shown.count("\r\x1b[2K[") == 3
    assert shown.count("\n") == 1
    assert shown.endswith("ETA 0:00\n")


def test_elsewhere_a_line_comes_every_few_seconds_and_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([100.0 + n for n in range(1000)])
    now = [0.0]
    monkeypatch.setattr(report.time, "monotonic", lambda: now[0])
    stream = io.StringIO()
    reporter = Reporter(tmp_path, world(), 100, 100, stream=stream)
    now[0] = next(clock)
    reporter.begin(0)
    for number in range(1, 101):
        now[0] += 1.0
        reporter.step(step(number))
    lines = stream.getvalue().splitlines()
    assert len(lines) == 20 + 1  # one in 5 seconds, and the last step
    assert "step 1/100" in lines[0]
    assert "step 100/100" in lines[-1]
    assert "100 tok/s (25 labels)  ETA 1:39" in lines[0]


def test_other_ranks_are_silent(tmp_path: Path) -> None:
    stream = io.StringIO()
    with Reporter(tmp_path, world(rank=1), 1, 1, stream=stream) as reporter:
        reporter.rewind(0)
        reporter.begin(0)
        reporter.step(step(1))
        reporter.validation(1, 2.0)
        reporter.say("hello")
        reporter.draw()
    assert stream.getvalue() == ""
    assert list(tmp_path.iterdir()) == []


# --- metrics ---


def test_each_step_and_each_validation_is_a_line(tmp_path: Path) -> None:
    reporter = Reporter(tmp_path, world(), 4, 2, stream=io.StringIO())
    reporter.validation(0, 3.0)
    reporter.begin(0)
    reporter.step(step(1, loss=2.5))
    first, second = read_metrics(tmp_path / "metrics.jsonl")
    assert first.items() >= {"step": 0, "validation_loss": 3.0}.items()
    assert (
        second.items()
        >= {"step": 1, "epoch": 0.5, "loss": 2.5, "learning_rate": 1e-3, "gradient_norm": 0.5, "tokens": 100}.items()
    )
    assert datetime.fromisoformat(second["time"]).tzinfo == UTC
    assert reporter.metrics.validation_loss(0) == 3.0
    assert reporter.metrics.validation_loss(1) is None
    assert reporter.metrics.last_loss() == 2.5


def test_steps_that_will_be_done_again_are_dropped(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path / "metrics.jsonl")
    metrics.append({"step": 0, "validation_loss": 3.0})
    for number in (1, 2, 3):
        metrics.append({"step": number, "loss": 1.0})
    with metrics.path.open("a") as file:
        file.write('{"step": 4, "lo')  # torn by a kill
    assert [line["step"] for line in metrics.lines()] == [0, 1, 2, 3]
    metrics.rewind(2)
    metrics.append({"step": 3, "loss": 1.0})
    assert [line["step"] for line in metrics.lines()] == [0, 1, 2, 3]


def test_a_run_without_metrics_can_be_rewound(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path / "metrics.jsonl")
    metrics.rewind(0)
    metrics.flush()
    assert metrics.lines() == []
    assert metrics.last_loss() is None


# --- picture ---


def write_losses(path: Path) -> None:
    metrics = Metrics(path)
    metrics.append({"step": 0, "validation_loss": 3.0})
    for number in (1, 2, 3):
        metrics.append({"step": number, "loss": 3.0 / number})
    metrics.append({"step": 3, "validation_loss": 1.2})


def test_the_picture_shows_both_losses_with_labelled_axes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    figures: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k))[1])
    write_losses(tmp_path / "metrics.jsonl")
    draw_losses(tmp_path / "metrics.jsonl", tmp_path / "loss.png")
    (axes,) = figures[0].axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("optimizer step", "loss (nats per label token)")
    lines = {str(line.get_label()): line.get_xydata() for line in axes.get_lines()}
    assert lines["training"].tolist() == [[1, 3], [2, 1.5], [3, 1]]
    assert lines["validation"].tolist() == [[0, 3], [3, 1.2]]
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["loss.png", "metrics.jsonl"]


def test_without_a_step_there_is_no_picture(tmp_path: Path) -> None:
    Metrics(tmp_path / "metrics.jsonl").append({"step": 0, "validation_loss": 3.0})
    draw_losses(tmp_path / "metrics.jsonl", tmp_path / "loss.png")
    assert not (tmp_path / "loss.png").exists()


def test_a_run_that_fails_leaves_a_picture_of_what_there_is(tmp_path: Path) -> None:
    def fail() -> None:
        with Reporter(tmp_path, world(), 2, 2, stream=io.StringIO()) as reporter:
            reporter.begin(0)
            reporter.step(step(1))
            raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        fail()
    assert (tmp_path / "loss.png").exists()


# --- the last word ---


def test_the_last_word_is_written_where_the_kubelet_waits_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "termination-log"
    monkeypatch.setattr(report, "TERMINATION_LOG", str(log))
    message = TerminationMessage(reason="Done", message="x" * 9000, result=Result(steps=1, tokens=2))
    write_termination(message)
    assert not log.exists(), "outside a container there is no such file"
    log.touch()
    write_termination(message)
    assert len(log.read_bytes()) <= 4096
    assert TerminationMessage.model_validate_json(log.read_text()).result == message.result


def test_a_rank_that_lost_a_peer_leaves_what_the_peer_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "termination-log"
    log.touch()
    monkeypatch.setattr(report, "TERMINATION_LOG", str(log))
    for reason, kept in (
        ("PeerLost", "PeerLost"),
        ("Crash", "Crash"),
        ("PeerLost", "Crash"),
        ("InvalidData", "InvalidData"),
    ):
        write_termination(TerminationMessage(reason=reason, message=""))
        assert TerminationMessage.model_validate_json(log.read_text()).reason == kept


def test_peak_memory_is_in_bytes() -> None:
    assert 50e6 < peak_memory(torch.device("cpu")) < 100e9
