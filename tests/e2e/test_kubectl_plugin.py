"""`kubectl finetune` on the real node, by a person who has no more than the role of its page."""

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from cluster_tool import run
from tests.kubectl import program
from tests.kubectl.terminal import Display, Terminal, picture

from kubetune_kubectl.kubectl import Kubectl

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]
PICTURES = os.environ.get("KUBETUNE_PICTURES")
"""A folder, such as docs/images, that takes the picture of the recorded terminal."""
STEPS = 40
DEADLINE = 480.0


@pytest.fixture(scope="module")
def environment(bench: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The plugin on PATH, and the person in KUBECONFIG."""

    def kubectl(*words: str, stdin: Any = None) -> "subprocess.CompletedProcess[str]":
        return run([*bench.kube.words(), *words], stdin=json.dumps(stdin) if stdin else None, check=False)

    folder = tmp_path_factory.mktemp("ann")
    config = program.account(kubectl, bench.kube.config, bench.namespace, "ann", program.ROLE, folder)
    return program.environment(tmp_path_factory.mktemp("bin"), bench.kube.kubectl_program, config)


@pytest.fixture(scope="module")
def finetune(bench: Any, environment: dict[str, str]) -> Any:
    """finetune("report", name): runs it to its end."""

    def command(*words: str) -> "subprocess.CompletedProcess[str]":
        argv = ["kubectl", "finetune", *words, "--namespace", bench.namespace]
        return subprocess.run(argv, env=environment, capture_output=True, text=True, check=False, timeout=DEADLINE)

    return command


@pytest.fixture(scope="module")
def watched(
    bench: Any, environment: dict[str, str], finetune: Any, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Any]]:
    """A run that was submitted and watched on a terminal, with a report in its middle."""
    folder = tmp_path_factory.mktemp("run")
    file = folder / "support-bot.yaml"
    file.write_text(
        yaml.safe_dump(bench.manifest("support-bot", validation={"fraction": 0.1}, checkpoint={"everySteps": 8}))
    )
    words = ["kubectl", "finetune", "submit", file.name, "--watch", "--namespace", bench.namespace]
    terminal = Terminal(words, environment, folder=folder)
    try:
        terminal.until(lambda screen: step_of(screen) >= STEPS // 2, DEADLINE)
        middle = list(terminal.display.lines)
        during = finetune("report", "support-bot", "--output", str(folder / "during"))
        code = terminal.end(DEADLINE)
        yield {"middle": middle, "during": during, "code": code, "end": terminal.display, "folder": folder}
    finally:
        terminal.close()


def step_of(screen: Display) -> int:
    """The step that the live block shows."""
    found = screen.plain().partition("  step ")[2].partition("/")[0]
    return int(found or 0)


def report_pods(bench: Any) -> list[str]:
    """The report pods that are there and are not going."""
    selector = ["--selector", "app.kubernetes.io/name=kubetune-report", "--namespace", bench.namespace]
    pods = json.loads(bench.kube.kubectl("get", "pods", *selector, "--output", "json"))["items"]
    return [pod["metadata"]["name"] for pod in pods if "deletionTimestamp" not in pod["metadata"]]


def wait_for_report_pod(bench: Any) -> None:
    """Watch until one is created."""
    watch = Kubectl(kubeconfig=str(bench.kube.config), namespace=bench.namespace).watch(
        "pods", "--selector=app.kubernetes.io/name=kubetune-report"
    )
    try:
        while (events := watch.read()) is not None:
            if any("deletionTimestamp" not in event.object["metadata"] for event in events if event.type == "ADDED"):
                return
    finally:
        watch.close()
    raise AssertionError("the watch ended")


def test_the_terminal_shows_bar_losses_rates_and_pods(bench, watched):
    screen = Display()
    screen.lines = watched["middle"]
    shown = screen.plain()
    assert f"{bench.namespace}/support-bot  Running" in shown
    assert f"/{STEPS}  epoch " in shown
    assert "█" in shown
    assert {*"▁▂▃▄▅▆▇█"} & {*next(line for line in shown.splitlines() if line.startswith("loss "))}
    assert " tok/s  learning rate " in shown
    assert "  ETA " in shown
    assert "checkpoint  step " in shown
    assert "worker 0  Running  on " in shown
    assert "worker 1  Running  on " in shown
    if PICTURES:
        prompt = "\x1b[1m$\x1b[0m kubectl finetune submit support-bot.yaml --watch"
        drawn = picture([prompt, *watched["middle"]], "kubectl finetune", columns=110)
        Path(PICTURES).mkdir(parents=True, exist_ok=True)
        (Path(PICTURES) / "kubectl-finetune-watch.svg").write_text(drawn)


def test_the_watch_ends_with_the_job_and_says_what_it_left(bench, watched):
    assert watched["code"] == 0
    shown = watched["end"].plain()
    assert "Succeeded: The adapter is at support-bot-" in shown
    assert f"trained: {STEPS} steps, " in shown
    assert f"more: kubectl finetune report support-bot -n {bench.namespace}" in shown
    assert watched["end"].cursor_is_shown


def test_a_running_job_can_be_reported_on(watched):
    during = watched["during"]
    assert during.returncode == 0, during.stderr
    assert "Running" in during.stdout.splitlines()[0]
    lines = (watched["folder"] / "during" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) > STEPS // 4


def test_the_report_of_a_finished_job_has_picture_metrics_and_figures(bench, watched, finetune, tmp_path):
    done = finetune("report", "support-bot", "--output", str(tmp_path), "-o", "json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    steps = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in steps if "loss" in line] == list(range(1, STEPS + 1))
    assert told["state"] == "Succeeded"
    assert told["summary"]["steps"] == STEPS
    assert told["summary"]["finalLoss"] < told["summary"]["initialLoss"]
    assert len(told["summary"]["validationLosses"]) == 2
    assert report_pods(bench) == []


def test_an_interrupted_report_leaves_no_pod(bench, watched, environment, tmp_path):
    argv = ["kubectl", "finetune", "report", "support-bot", "--namespace", bench.namespace, "--output", str(tmp_path)]
    terminal = Terminal(argv, environment)
    try:
        wait_for_report_pod(bench)
        terminal.interrupt()
        assert terminal.end(DEADLINE) == 130
    finally:
        terminal.close()
    assert report_pods(bench) == []


def test_the_log_of_rank_0_is_shown(watched, finetune):
    done = finetune("logs", "support-bot")
    assert f"trained {STEPS} steps" in done.stdout
    assert done.stderr.startswith("# worker 0 of attempt 1 (pod support-bot-a1-0-")


def test_status_tells_the_end_to_people_and_to_scripts(watched, finetune):
    done = finetune("status", "support-bot")
    assert done.returncode == 0
    assert "adapter" in done.stdout
