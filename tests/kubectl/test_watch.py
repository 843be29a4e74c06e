"""What `watch` shows of recorded jobs: on a terminal, and where it is none."""

import io
import json
from datetime import timedelta

import pytest
from rich.console import Console
from tests.kubectl.conftest import changed, events, listed, pods_of, recorded
from tests.kubectl.terminal import Display

from kubetune_kubectl import live, watch
from kubetune_kubectl.errors import JobGone, NoRights, NoSuchJob, Unreachable
from kubetune_kubectl.follow import Sight
from kubetune_kubectl.losses import Losses

FORBIDDEN = (
    'Error from server (Forbidden): pods is forbidden: User "ann" cannot list resource "pods" in API group "" '
    'in the namespace "kubetune-plugin"\n'
)
FIELD = "--field-selector=metadata.name=lost"
DOWN = "The connection to the server 10.0.0.1:6443 was refused - did you specify the right host or port?\n"


def drawn(sight: Sight, now, losses: Losses | None = None, notes=(), unicode: bool = True) -> list[str]:
    """The block as lines without colours."""
    page = io.StringIO()
    screen = Console(file=page, width=120, color_system=None, highlight=False)
    screen.print(live.block(sight, losses or Losses(), notes, now, unicode))
    return [line.rstrip() for line in page.getvalue().splitlines()]


def sight(job, name: str, trouble: str | None = None) -> Sight:
    return Sight(job(name), pods_of(name), True, trouble)


# ---------------------------------------------------------------- the block


def test_a_running_job_with_everything_that_is_known(job, now):
    losses = Losses()
    for step, loss in enumerate([6.6, 6.1, 5.2, 4.5, 3.9, 3.4], start=5):
        losses.add(step, loss)
    lines = drawn(sight(job, "running"), now, losses)
    assert lines[0] == "kubetune-plugin/lost  Running  1m21s"
    assert lines[1] == "█" + "░" * 39 + "    2%  step 10/400  epoch 1.25"
    assert lines[2].startswith("loss 4.494  █▇▅▃▂▁  from 6.6")
    assert lines[3] == "1,614 tok/s  learning rate 0.000999  ETA 8m45s  peak memory 856 MB"
    assert lines[4].startswith("checkpoint  step 8, ")
    assert lines[5:7] == ["worker 0  Running  on node-0", "worker 1  Running  on node-0"]
    assert lines[7].startswith("Running=True  Running  for ")
    assert lines[8] == "Attempt 1: 2 of 2 workers running."


def test_a_job_that_cannot_be_scheduled_says_why_and_for_how_long(job, now):
    lines = drawn(sight(job, "unschedulable"), now)
    assert lines[0].startswith("kubetune-plugin/too-big  Starting")
    assert "worker 0  Pending" in lines
    assert "Started=False  Unschedulable  for 1m22s" in lines
    assert any("1 Insufficient cpu" in line for line in lines)


def test_a_failed_job_shows_how_its_workers_ended(job, now):
    lines = drawn(sight(job, "failed"), now)
    assert "worker 0  Failed (Error, exit code 65)  on node-0" in lines
    assert "Failed=True  InvalidData  for 57s" in lines


def test_a_later_attempt_is_counted_and_shows_its_own_workers_only(job, now):
    lines = drawn(sight(job, "restarting"), now)
    assert "attempt 2 (1 after crashes, 0 after disruptions)" in lines[0]
    assert not any(line.startswith("worker") for line in lines)


def test_a_finished_job_shows_its_duration_and_no_time_that_is_left(job, now):
    lines = drawn(sight(job, "succeeded"), now + timedelta(days=1))
    assert lines[0] == "kubetune-plugin/two  Succeeded  1m48s"
    assert not any("ETA" in line for line in lines)


def test_a_large_gang_is_counted(job, now):
    pods = [pod for _ in range(5) for pod in pods_of("running")]
    lines = drawn(Sight(job("running"), pods, True, None), now)
    assert "and 2 more workers; 10 of 10 are ready" in lines


def test_a_lost_cluster_and_notes_are_told_below(job, now):
    lines = drawn(sight(job, "running", trouble="connection refused"), now, notes=["losses before now are not shown"])
    assert lines[-2:] == ["losses before now are not shown", "trying again: connection refused"]


def test_a_terminal_without_unicode_gets_none(job, now):
    losses = Losses()
    losses.add(1, 2.0)
    assert all(line.isascii() for line in drawn(sight(job, "running"), now, losses, unicode=False))


PODS = {
    "a pod that is removed": ({"metadata": {"deletionTimestamp": "x"}, "status": {"phase": "Running"}}, "Terminating"),
    "a pod that cannot pull its image": (
        {
            "metadata": {},
            "status": {"containerStatuses": [{"state": {"waiting": {"reason": "ErrImagePull"}}}], "phase": "Pending"},
        },
        "ErrImagePull",
    ),
    "a pod that was killed for memory": (
        {
            "metadata": {},
            "status": {"containerStatuses": [{"state": {"terminated": {"exitCode": 137, "reason": "OOMKilled"}}}]},
        },
        "Failed (OOMKilled, exit code 137)",
    ),
    "a pod that nobody has looked at": ({"metadata": {}}, "Pending"),
}


@pytest.mark.parametrize("case", PODS)
def test_a_pod_in_a_word(case):
    pod, word = PODS[case]
    assert live.pod_word(pod) == word


# ---------------------------------------------------------------- the command


def on_pipe(kubectl, name: str = "lost") -> tuple[int, list[str]]:
    """Exit code and the lines without their time."""
    page = io.StringIO()
    code = watch.run(kubectl, name, page)
    return code, [line.partition(" ")[2] if line[:1].isdigit() else line for line in page.getvalue().splitlines()]


def ending(running, version: str = "99"):
    """The running job, as it ended well."""
    done = recorded("succeeded")["status"]
    return changed(running, version, **done)


def test_a_run_from_its_middle_to_its_end_in_lines(replay, kubectl):
    running = recorded("running")
    later = changed(running, "98", progress={**running["status"]["progress"], "step": 20, "percentage": 5})
    told = events(("ADDED", running), ("MODIFIED", later), ("MODIFIED", ending(running)))
    replay.answer("get", FIELD, "--watch", out=told, hangs=True)
    replay.answer("get", "pods", "--watch", hangs=True)
    replay.answer("get", FIELD, out=listed(running))
    replay.answer("get", "pods", out=listed(*pods_of("running")))
    replay.answer("logs", out="")
    code, lines = on_pipe(kubectl)
    assert code == 0
    assert lines[:2] == [
        "step 10/400  2%  loss 4.494  1,614 tok/s  ETA 8m45s",
        "Running: Attempt 1: 2 of 2 workers running.",
    ]
    assert lines[-7].startswith('Succeeded: The adapter is at two-e5582462/adapter on claim "output".')
    assert lines[-6] == "  adapter: two-e5582462/adapter"
    assert lines[-1] == "  more: kubectl finetune report lost -n kubetune-plugin"


def test_a_failed_job_ends_the_watch_with_1_and_says_where_to_look(replay, kubectl):
    replay.answer("--watch", hangs=True)
    replay.answer("get", "pods", out=listed(*pods_of("failed")))
    replay.answer("get", out=listed(recorded("failed")))
    code, lines = on_pipe(kubectl, "no-answers")
    assert code == 1
    assert lines[0] == "Failed: /kubetune/models/data/missing.jsonl cannot be read: No such file or directory."
    assert lines[-1] == "  more: kubectl finetune logs no-answers -n kubetune-plugin"


def test_a_watch_that_ends_or_breaks_is_taken_up_again(replay, kubectl):
    running = recorded("running")
    replay.answer("get", "pods", "--watch", hangs=True)
    replay.answer("get", "pods", out=listed())
    replay.answer("get", FIELD, "--watch", out=events(("ADDED", running)), times=1)
    replay.answer("get", FIELD, "--watch", err="Unable to connect to the server: unexpected EOF\n", times=1)
    replay.answer("get", FIELD, "--watch", out=events(("MODIFIED", ending(running))), hangs=True)
    replay.answer("get", FIELD, out=listed(running), times=2)
    replay.answer("get", FIELD, err=DOWN, times=2)
    replay.answer("get", FIELD, out=listed(running))
    code, lines = on_pipe(kubectl)
    assert code == 0
    assert "trying again: the cluster does not answer: Unable to connect to the server: unexpected EOF" in lines
    assert len(replay.asked("get", FIELD, "--watch")) == 3


def test_what_happened_while_nobody_watched_is_seen(replay, kubectl):
    running = recorded("running")
    replay.answer("get", "pods", "--watch", hangs=True)
    replay.answer("get", "pods", out=listed())
    replay.answer("get", FIELD, "--watch", out=events(("ADDED", running)), times=1)
    replay.answer("get", FIELD, "--watch", hangs=True)
    replay.answer("get", FIELD, out=listed(running), times=1)
    replay.answer("get", FIELD, out=listed(ending(running)))
    assert on_pipe(kubectl)[0] == 0


@pytest.mark.parametrize(
    ("after", "told"),
    [
        pytest.param(lambda job: [("DELETED", job)], "was deleted while it was Running", id="deleted"),
        pytest.param(
            lambda job: [("DELETED", job), ("ADDED", {**job, "metadata": {**job["metadata"], "uid": "other"}})],
            "was deleted, and another one of the same name was created",
            id="deleted and created again",
        ),
    ],
)
def test_a_job_that_is_deleted_ends_the_watch(replay, kubectl, after, told):
    running = recorded("running")
    replay.answer("get", "pods", "--watch", hangs=True)
    replay.answer("get", "pods", out=listed())
    replay.answer("get", FIELD, "--watch", out=events(("ADDED", running), *after(running)), hangs=True)
    replay.answer("get", FIELD, out=listed(running))
    with pytest.raises(JobGone, match=told):
        on_pipe(kubectl)


def test_without_the_right_to_see_pods_the_job_is_shown_all_the_same(replay, kubectl):
    replay.answer("--watch", hangs=True)
    replay.answer("get", "pods", err=FORBIDDEN)
    replay.answer("get", out=listed(recorded("succeeded")))
    assert on_pipe(kubectl, "two")[0] == 0


STARTS = {
    "a job that is not there": (listed(), "", NoSuchJob),
    "a cluster that does not answer": ("", DOWN, Unreachable),
    "no right to see jobs": ("", FORBIDDEN.replace("pods", "finetunejobs"), NoRights),
}


@pytest.mark.parametrize("case", STARTS)
def test_what_cannot_be_watched_is_said_at_once(replay, kubectl, case):
    out, err, kind = STARTS[case]
    replay.answer("--watch", hangs=True)
    replay.answer("get", "pods", out=listed())
    replay.answer("get", out=out, err=err)
    with pytest.raises(kind):
        on_pipe(kubectl)


class Tty(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def test_on_a_terminal_the_block_is_redrawn_below_the_lines_that_stay(replay, kubectl, monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "110")
    running = recorded("running")
    told = events(("ADDED", running), ("MODIFIED", ending(running)))
    replay.answer("get", FIELD, "--watch", out=told, hangs=True)
    replay.answer("--watch", hangs=True)
    replay.answer("get", "pods", out=listed(*pods_of("running")))
    replay.answer("get", out=listed(running))
    replay.answer("logs", out="[####....]   1%  step 4/400  loss 6.1  1 tok/s (1 labels)  ETA 0:00\n")
    page = Tty()
    assert watch.run(kubectl, "lost", page) == 0
    display = Display()
    display.feed(page.getvalue())
    lines = [line.rstrip() for line in display.plain().splitlines()]
    assert lines[0].endswith("Running: Attempt 1: 2 of 2 workers running.")
    assert sum(line.startswith("kubetune-plugin/lost") for line in lines) == 1  # one block, drawn over itself
    assert any(line.startswith("loss 1.147  ") and line.endswith("from 6.1") for line in lines)
    assert lines[-1] == "  more: kubectl finetune report lost -n kubetune-plugin"
    assert display.cursor_is_shown


def test_without_the_right_to_read_logs_the_sparkline_begins_now_and_it_is_said(replay, kubectl, monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "110")
    replay.answer("--watch", hangs=True)
    replay.answer("get", "pods", out=listed(*pods_of("succeeded")))
    replay.answer("get", out=listed(recorded("succeeded")))
    replay.answer("logs", err=FORBIDDEN.replace('"pods"', '"pods/log"'))
    page = Tty()
    assert watch.run(kubectl, "two", page) == 0
    assert "losses before now are not shown: reading them needs the right to get pods/log" in page.getvalue()


def test_the_object_that_the_server_sends_again_is_no_news(replay, kubectl):
    succeeded = recorded("succeeded")
    replay.answer("get", "pods", "--watch", hangs=True)
    replay.answer("--watch", out=events(("ADDED", succeeded), ("MODIFIED", succeeded)), hangs=True)
    replay.answer("get", "pods", out=listed())
    replay.answer("get", out=listed(succeeded))
    code, lines = on_pipe(kubectl, "two")
    assert code == 0
    assert json.dumps(lines).count("Succeeded: ") == 1
