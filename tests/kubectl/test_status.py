"""`status` of one job and of many, suspend and resume."""

import json

import pytest
from tests.kubectl.conftest import changed, events, listed, recorded

from kubetune_kubectl import jobs, status, suspend
from kubetune_kubectl.errors import NotPossible
from kubetune_operator.api import MemoryEstimate

NAMES = ("running", "unschedulable", "suspended", "failed", "succeeded")
CODES = {"succeeded": 0, "failed": 1, "running": 3, "unschedulable": 3, "restarting": 3, "suspended": 4}


@pytest.mark.parametrize("name", CODES)
def test_the_exit_code_says_the_state(replay, kubectl, page, name):
    replay.answer("get", out=json.dumps(recorded(name)))
    assert status.run_one(kubectl, "x", as_json=False, stream=page) == CODES[name]


def test_the_table_has_the_columns_of_kubectl_get_and_the_reason(replay, kubectl, page):
    replay.answer("get", out=listed(*map(recorded, NAMES)))
    assert status.run_all(kubectl, everywhere=False, as_json=False, stream=page) == 0
    lines = page.getvalue().splitlines()
    assert lines[0].split() == ["NAME", "STATE", "PROGRESS", "LOSS", "ETA", "RESTARTS", "AGE", "WHY"]
    assert lines[1].split()[:6] == ["lost", "Running", "2%", "4.494", "8m45s", "0"]
    assert lines[1].endswith("Attempt 1: 2 of 2 workers running.")
    assert "1 Insufficient cpu" in lines[2]
    assert lines[3].endswith("No worker is held; it goes on from step 52.")
    assert lines[4].endswith("data/missing.jsonl cannot be read: No such file or directory.")


def test_the_table_of_all_namespaces_begins_with_them(replay, kubectl, page):
    replay.answer("get", "--all-namespaces", out=listed(recorded("running")))
    status.run_all(kubectl, everywhere=True, as_json=False, stream=page)
    lines = page.getvalue().splitlines()
    assert lines[0].startswith("NAMESPACE")
    assert lines[1].startswith("kubetune-plugin   lost")


def test_no_job_is_said_on_standard_error(replay, kubectl, page, capsys):
    replay.answer("get", out=listed())
    assert status.run_all(kubectl, everywhere=False, as_json=False, stream=page) == 0
    assert page.getvalue() == ""
    assert capsys.readouterr().err == "There is no FineTuneJob in namespace kubetune-plugin.\n"


def test_json_is_what_the_server_said(replay, kubectl, page):
    replay.answer("get", "lost", out=json.dumps(recorded("running")))
    assert status.run_one(kubectl, "lost", as_json=True, stream=page) == 3
    assert json.loads(page.getvalue()) == recorded("running")


def test_json_of_all_is_a_list(replay, kubectl, page):
    replay.answer("get", out=listed(recorded("running")))
    status.run_all(kubectl, everywhere=False, as_json=True, stream=page)
    assert json.loads(page.getvalue())["items"] == [recorded("running")]


def shown(replay, kubectl, page, name: str) -> list[str]:
    replay.answer("get", out=json.dumps(recorded(name)))
    status.run_one(kubectl, "x", as_json=False, stream=page)
    return page.getvalue().splitlines()


def test_all_that_is_known_of_a_finished_job(replay, kubectl, page):
    lines = shown(replay, kubectl, page, "succeeded")
    assert lines[0] == "kubetune-plugin/two  Succeeded"
    assert [line.split()[0] for line in lines[4:8]] == ["Staged", "Started", "Running", "Succeeded"]
    facts = {line[:18].strip(): line[18:].strip() for line in lines[9:]}
    assert facts["attempt"] == "1  (restarts: 0 after crashes, 0 after disruptions)"
    assert facts["workers"] == "2 wanted: 0 ready, 0 active, 0 failed, 2 succeeded"
    assert facts["progress"] == "step 60/60  100%  loss 1.147  1,122 tok/s"
    assert facts["adapter"] == "two-e5582462/adapter"
    assert facts["loss picture"] == "two-e5582462/loss.png"
    assert facts["trained"] == "60 steps, 130,674 tokens"
    assert facts["duration"] == "1m48s"
    assert facts["checkpoint"].endswith("two-e5582462/checkpoints/step-00000056")


def test_what_staging_found_is_shown(replay, kubectl, page):
    body = recorded("running")
    body["status"]["stagedData"] = [{"path": "s3/data", "files": 2, "bytes": 5_200_000}]
    parts = dict.fromkeys((field.alias for field in MemoryEstimate.model_fields.values()), 1)
    body["status"]["estimate"] = {**parts, "device": "GPU", "bytes": 21_000_000_000, "available": 80_000_000_000}
    replay.answer("get", out=json.dumps(body))
    status.run_one(kubectl, "x", as_json=False, stream=page)
    lines = [" ".join(line.split()) for line in page.getvalue().splitlines()]
    assert "data s3/data: 5.2 MB" in lines
    assert "memory estimate 21 GB of 80 GB for each GPU" in lines


def test_a_job_that_waits_for_its_next_attempt_says_when_it_comes(replay, kubectl, page):
    lines = shown(replay, kubectl, page, "restarting")
    assert any(line.split() == ["next", "attempt", "at", "15:12:04", "UTC"] for line in lines)
    assert any("(restarts: 1 after crashes, 0 after disruptions)" in line for line in lines)


def test_a_failed_job_tells_the_reason_first(replay, kubectl, page):
    lines = shown(replay, kubectl, page, "failed")
    assert lines[:2] == [
        "kubetune-plugin/no-answers  Failed",
        "/kubetune/models/data/missing.jsonl cannot be read: No such file or directory.",
    ]


# ---------------------------------------------------------------- suspend and resume


def test_suspending_patches_the_spec_once(replay, kubectl, capsys):
    replay.answer("get", out=json.dumps(recorded("running")))
    replay.answer("patch", out=json.dumps(recorded("running")))
    assert suspend.run(kubectl, "lost", suspended=True, wait=False) == 0
    [patch] = replay.asked("patch")
    assert '--patch={"spec": {"suspend": true}}' in patch
    assert capsys.readouterr().err == "FineTuneJob lost will be suspended.\n"


@pytest.mark.parametrize(
    ("name", "suspended", "told"),
    [("suspended", True, "was suspended already"), ("running", False, "was resumed already")],
)
def test_what_is_so_already_is_not_written(replay, kubectl, capsys, name, suspended, told):
    replay.answer("get", out=json.dumps(recorded(name)))
    assert suspend.run(kubectl, "lost", suspended=suspended, wait=False) == 0
    assert replay.asked("patch") == []
    assert capsys.readouterr().err == f"FineTuneJob lost {told}.\n"


@pytest.mark.parametrize("name", ["succeeded", "failed"])
def test_a_job_that_is_over_cannot_be_suspended(replay, kubectl, name):
    replay.answer("get", out=json.dumps(recorded(name)))
    with pytest.raises(NotPossible, match=rf"has {name}: it can no longer be suspended"):
        suspend.run(kubectl, "x", suspended=True, wait=False)


def waited(replay, kubectl, page, before: str, *after, suspended: bool) -> int:
    body = recorded(before)
    replay.answer("get", "lost", out=json.dumps(body))
    replay.answer("patch", out=json.dumps(body))
    replay.answer("get", "pods", "--watch", hangs=True)
    replay.answer("--watch", out=events(*(("MODIFIED", one) for one in after)), hangs=True)
    replay.answer("get", "pods", out=listed())
    replay.answer("get", out=listed(body))
    return suspend.run(kubectl, "lost", suspended=suspended, wait=True, as_json=True, stream=page)


def test_wait_returns_when_no_worker_is_left(replay, kubectl, page, capsys):
    assert waited(replay, kubectl, page, "running", recorded("suspended"), suspended=True) == 0
    assert jobs.read(json.loads(page.getvalue())).state == "Suspended"
    assert capsys.readouterr().err.splitlines()[-1] == "Suspended: No worker is held; it goes on from step 52."


def test_wait_returns_when_the_workers_run_again(replay, kubectl, page):
    assert waited(replay, kubectl, page, "suspended", recorded("running"), suspended=False) == 0
    assert jobs.read(json.loads(page.getvalue())).state == "Running"


@pytest.mark.parametrize(("name", "code"), [("failed", 1), ("succeeded", 0)])
def test_wait_ends_with_a_job_that_ends_meanwhile(replay, kubectl, page, name, code):
    ended = changed(recorded("running"), "99", **recorded(name)["status"])
    assert waited(replay, kubectl, page, "running", ended, suspended=True) == code
