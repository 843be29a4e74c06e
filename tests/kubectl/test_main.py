"""The command line: flags, exit codes, and how fast it starts."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from tests.kubectl.conftest import listed, recorded

from kubetune_kubectl.__main__ import main


def run(*words: str) -> "subprocess.CompletedProcess[str]":
    """The plugin as a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "kubetune_kubectl", *words], capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("words", [("-n", "team", "status"), ("status", "-n", "team"), ("status", "--namespace=team")])
def test_the_flags_of_the_cluster_stand_before_or_behind_the_command(replay, words):
    replay.answer("get", out=listed())
    assert main([*words, "--context=prod"]) == 0
    assert {"--namespace=team", "--context=prod"} <= {*replay.asked("get")[0]}


def test_an_error_is_told_in_a_line_and_ends_with_2(replay, capsys):
    replay.answer("get", "nope", err='Error from server (NotFound): finetunejobs.kubetune.io "nope" not found\n')
    replay.answer("get", "--all-namespaces", out=listed())
    replay.answer("get", out=listed(recorded("running")))
    assert main(["status", "nope", "-n", "team"]) == 2
    assert capsys.readouterr().err == "error: there is no FineTuneJob nope in namespace team; there are lost\n"


def test_a_name_and_all_namespaces_exclude_each_other(capsys):
    with pytest.raises(SystemExit) as raised:
        main(["status", "bot", "-A"])
    assert raised.value.code == 2
    assert "exclude each other" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["submit", "status", "watch", "logs", "suspend", "resume", "report"])
def test_every_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit) as raised:
        main([command, "--help"])
    assert raised.value.code == 0
    assert f"usage: kubectl finetune {command}" in capsys.readouterr().out


def test_help_names_the_exit_codes(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "1  the job has failed" in capsys.readouterr().out


def test_help_loads_neither_the_models_nor_rich():
    script = (
        "import sys, kubetune_kubectl.__main__; print([m for m in sys.modules if m in ('pydantic', 'rich', 'yaml')])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_status_takes_less_than_a_second_of_computing(replay):
    replay.answer("get", out=listed(recorded("running")))
    before = os.times()
    assert run("status").returncode == 0
    after = os.times()
    spent = after.children_user + after.children_system - before.children_user - before.children_system
    assert spent < 2.0, spent  # 0.7 s on the machine where it was written; a slow one may take longer


def test_a_reader_that_has_seen_enough_is_no_error(replay, tmp_path):
    replay.answer("get", out=json.dumps({"items": [{**recorded("running"), "padding": "x" * 300_000}]}))
    command = f"{sys.executable} -m kubetune_kubectl status -o json 2>{tmp_path}/err | head -1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode == 128 + signal.SIGPIPE
    assert (tmp_path / "err").read_text() == ""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_watch_that_is_ended_leaves_no_kubectl_behind(replay, number, code):
    replay.answer("--watch", hangs=True)
    replay.answer("get", "pods", out=listed())
    replay.answer("get", out=listed(recorded("running")))
    process = subprocess.Popen(
        [sys.executable, "-m", "kubetune_kubectl", "watch", "lost"], stdout=subprocess.PIPE, start_new_session=True
    )
    assert process.stdout is not None
    assert b"step 10/400" in process.stdout.readline()
    os.kill(process.pid, number)
    assert process.wait(timeout=20) == code
    deadline = time.monotonic() + 20
    while subprocess.run(["pgrep", "-s", str(process.pid)], capture_output=True, check=False).stdout:
        assert time.monotonic() < deadline, "kubectl still runs"
        time.sleep(0.05)
    process.stdout.close()
