"""Losses from reports and from logs."""

import pytest
from tests.kubectl.conftest import pods_of

from kubetune_contract.progress import Progress
from kubetune_contract.progress_line import progress_line
from kubetune_kubectl.losses import Losses, history

NO_LOG = 'Error from server (NotFound): pods "x" not found\n'


def progress(step: int, loss: float | None) -> Progress:
    rates = {"tokens_per_second": 100.0, "label_tokens_per_second": 90.0}
    return Progress(step=step, total_steps=100, epoch=0, percentage=step, loss=loss, **rates)


def log(*steps: int) -> str:
    lines = [progress_line(progress(step, 10.0 - step)) for step in steps]
    return "\n".join(["model  /kubetune/models/tiny", *lines, "error: another worker is gone", ""])


def test_a_log_gives_the_losses_before_the_first_report():
    losses = Losses()
    losses.read(log(1, 3, 5))
    losses.see(progress(6, 3.5))
    assert losses.values == [9.0, 7.0, 5.0, 3.5]


def test_a_restart_takes_back_what_is_done_again():
    losses = Losses()
    losses.read(log(1, 3, 5, 7))
    losses.read(log(4))
    assert losses.values == [9.0, 7.0, 6.0]


def test_reports_without_a_loss_and_reports_that_repeat_change_nothing():
    losses = Losses()
    for report in (None, progress(0, None), progress(2, 8.0), progress(2, 8.0)):
        losses.see(report)
    assert losses.values == [8.0]


def test_only_logs_of_rank_0_are_read_oldest_attempt_first(replay, kubectl):
    replay.answer("logs", out=log(1))
    assert history(kubectl, pods_of("running")) == [log(1)]
    [command] = replay.asked("logs")
    assert any(word.startswith("lost-a1-0-") for word in command)


def test_a_pod_that_went_a_moment_ago_has_no_log(replay, kubectl):
    replay.answer("logs", err=NO_LOG)
    assert history(kubectl, pods_of("succeeded")) == []


@pytest.mark.parametrize("name", ["unschedulable"])
def test_a_pod_that_did_not_start_is_not_asked(replay, kubectl, name):
    assert history(kubectl, pods_of(name)) == []
    assert replay.asked("logs") == []
