"""What a status says, and when it changes."""

from datetime import UTC, datetime, timedelta, timezone

import pytest

from kubetune_contract.progress import CheckpointStatus, Progress, ProgressReport
from kubetune_operator.api import Condition, FineTuneJobStatus
from kubetune_operator.status import (
    MESSAGE_LIMIT,
    clipped,
    clock,
    completed,
    counted,
    find,
    is_finished,
    is_true,
    readable_bytes,
    rewound,
    seconds_of,
    state_of,
    with_checkpoint,
    with_condition,
    with_report,
)

NOON = datetime(2030, 1, 1, 12, 0, tzinfo=UTC)


def made(kind: str, status: str = "True", reason: str = "Why", message: str = "", time: datetime = NOON) -> Condition:
    return Condition(type=kind, status=status, reason=reason, message=message, last_transition_time=time)


def status_of(*conditions: Condition, **fields) -> FineTuneJobStatus:
    return FineTuneJobStatus(conditions=list(conditions), **fields)


def progress(step: int, **fields) -> Progress:
    return Progress(step=step, total_steps=50, epoch=step / 25, percentage=2 * step, **fields)


def checkpoint(step: int, minutes: int = 0) -> CheckpointStatus:
    return CheckpointStatus(step=step, path=f"checkpoints/step-{step}", time=NOON + timedelta(minutes=minutes))


# ---------------------------------------------------------------- conditions


def test_a_new_condition_is_added_at_the_end():
    status = with_condition(status_of(made("Staged")), made("Running"))
    assert [condition.type for condition in status.conditions] == ["Staged", "Running"]


def test_a_condition_keeps_its_place():
    status = with_condition(status_of(made("Staged", "False"), made("Running")), made("Staged"))
    assert [condition.type for condition in status.conditions] == ["Staged", "Running"]


def test_the_transition_time_moves_with_the_status():
    status = with_condition(status_of(made("Staged", "False")), made("Staged", "True", time=NOON + timedelta(hours=1)))
    assert find(status, "Staged").last_transition_time == NOON + timedelta(hours=1)


def test_the_transition_time_does_not_move_with_the_reason():
    later = made("Staged", "False", reason="Other", message="news", time=NOON + timedelta(hours=1))
    found = find(with_condition(status_of(made("Staged", "False")), later), "Staged")
    assert (found.reason, found.message, found.last_transition_time) == ("Other", "news", NOON)


def test_the_given_status_is_left_as_it_was():
    before = status_of(made("Staged", "False"))
    with_condition(before, made("Staged"))
    assert find(before, "Staged").status == "False"


def test_an_absent_condition_is_not_true():
    status = status_of(made("Running", "False"), made("Staged", "Unknown"))
    assert not any(is_true(status, kind) for kind in ("Running", "Staged", "Failed"))
    assert find(status, "Failed") is None


@pytest.mark.parametrize(
    ("conditions", "finished"),
    [
        ([made("Succeeded")], True),
        ([made("Failed")], True),
        ([made("Succeeded", "False")], False),
        ([made("Running")], False),
        ([], False),
    ],
)
def test_finished_is_succeeded_or_failed(conditions, finished):
    assert is_finished(status_of(*conditions)) is finished


STATES = [
    ("nothing is known", status_of(), "Pending"),
    ("staging is at work", status_of(made("Staged", "False")), "Staging"),
    ("the first attempt is about to be created", status_of(made("Staged")), "Starting"),
    ("the first attempt comes up", status_of(made("Staged"), attempt=1, attempt_start_time=NOON), "Starting"),
    ("all workers run", status_of(made("Running"), attempt=1, attempt_start_time=NOON), "Running"),
    ("the next attempt waits", status_of(made("Running", "False"), attempt=2), "Restarting"),
    ("the next attempt comes up", status_of(made("Running", "False"), attempt=2, attempt_start_time=NOON), "Starting"),
    ("suspended while the next attempt waits", status_of(made("Suspended"), attempt=2), "Suspended"),
    ("workers still stop", status_of(made("Running"), made("Suspended", "False"), attempt=1), "Running"),
    ("the end is more telling than all else", status_of(made("Running"), made("Failed")), "Failed"),
    ("success", status_of(made("Succeeded"), attempt=3, attempt_start_time=NOON), "Succeeded"),
    ("failed before staging", status_of(made("Failed")), "Failed"),
]


@pytest.mark.parametrize(("status", "state"), [case[1:] for case in STATES], ids=[case[0] for case in STATES])
def test_the_state_follows_from_the_conditions(status, state):
    assert state_of(status) == state


# ---------------------------------------------------------------- progress


def test_a_first_report_is_taken():
    status = with_report(status_of(), ProgressReport(progress=progress(3), checkpoint=checkpoint(2)))
    assert (status.progress.step, status.checkpoint.step) == (3, 2)


def test_an_older_report_changes_nothing():
    before = status_of(progress=progress(10), checkpoint=checkpoint(10))
    assert with_report(before, ProgressReport(progress=progress(9), checkpoint=checkpoint(5, 5))) is before


def test_a_report_of_the_same_step_is_taken():
    """Its speed and remaining time are news."""
    status = with_report(status_of(progress=progress(10)), ProgressReport(progress=progress(10, tokens_per_second=5.0)))
    assert status.progress.tokens_per_second == 5.0


def test_a_report_without_a_checkpoint_keeps_the_known_one():
    status = with_report(status_of(checkpoint=checkpoint(5)), ProgressReport(progress=progress(7)))
    assert status.checkpoint.step == 5


@pytest.mark.parametrize(
    ("known", "new", "step"),
    [
        (None, checkpoint(5), 5),
        (checkpoint(5), None, 5),
        (checkpoint(5), checkpoint(6, minutes=1), 6),
        (checkpoint(6, minutes=1), checkpoint(5), 6),
        (checkpoint(9), checkpoint(5, minutes=1), 5),
    ],
    ids=["first", "none", "newer", "older", "newer though of an earlier step"],
)
def test_the_checkpoint_that_was_complete_last_is_the_newest(known, new, step):
    assert with_checkpoint(status_of(checkpoint=known), new).checkpoint.step == step


def test_a_gang_that_stands_still_is_where_its_checkpoint_is():
    status = rewound(status_of(progress=progress(23, loss=1.0), checkpoint=checkpoint(20)))
    assert (status.progress.step, status.progress.percentage, status.progress.loss) == (20, 40, None)
    assert status.progress.epoch == pytest.approx(0.8)


def test_a_checkpoint_of_the_very_step_keeps_the_loss_but_no_speed():
    status = rewound(
        status_of(
            progress=progress(20, loss=1.0, tokens_per_second=9.0, estimated_remaining_seconds=3),
            checkpoint=checkpoint(20),
        )
    )
    assert (status.progress.loss, status.progress.tokens_per_second) == (1.0, None)
    assert status.progress.estimated_remaining_seconds is None


def test_rewinding_twice_is_rewinding_once():
    """Else every look at a waiting job would write its status."""
    once = rewound(status_of(progress=progress(23), checkpoint=checkpoint(20)))
    assert rewound(once) == once


def test_a_checkpoint_saved_on_the_way_out_moves_progress_forward():
    status = rewound(status_of(progress=progress(23), checkpoint=checkpoint(25)))
    assert status.progress.step == 25


def test_without_progress_there_is_nothing_to_rewind():
    assert rewound(status_of()) == status_of()


def test_a_run_that_is_over_is_complete():
    done = completed(progress(40, loss=2.0, estimated_remaining_seconds=10), 50, 1.5)
    assert (done.step, done.percentage, done.estimated_remaining_seconds, done.loss) == (50, 100, 0, 1.5)


def test_a_run_that_is_over_without_a_report_is_complete_too():
    done = completed(None, 7, None)
    assert (done.step, done.total_steps, done.percentage, done.loss) == (7, 7, 100, None)


def test_an_unknown_last_loss_keeps_the_known_one():
    assert completed(progress(50, loss=2.0), 50, None).loss == 2.0


# ---------------------------------------------------------------- words


def test_times_are_whole_seconds_in_utc():
    moment = datetime(2030, 1, 1, 14, 0, 1, 999999, tzinfo=timezone(timedelta(hours=2)))
    assert seconds_of(moment) == datetime(2030, 1, 1, 12, 0, 1, tzinfo=UTC)
    assert clock(moment) == "12:00:01 UTC"


def test_a_long_text_keeps_its_start_and_more_of_its_end():
    text = "start " + "x" * 5000 + " the reason"
    short = clipped(text)
    assert len(short) == MESSAGE_LIMIT
    assert short.startswith("start ")
    assert short.endswith(" the reason")
    assert " [...] " in short


def test_a_short_text_is_left_alone():
    assert clipped("  fine  ") == "fine"


@pytest.mark.parametrize(("number", "words"), [(0, "0 workers"), (1, "1 worker"), (2, "2 workers")])
def test_numbers_go_with_their_nouns(number, words):
    assert counted(number, "worker") == words


@pytest.mark.parametrize(
    ("size", "words"),
    [(999, "999 bytes"), (1500, "1.5 kB"), (269_000_000, "269 MB"), (16_100_000_000, "16 GB"), (5e15, "5000 TB")],
)
def test_sizes_are_readable(size, words):
    assert readable_bytes(int(size)) == words
