"""The launcher with real processes: whose exit code it ends with, and that nothing outlives it."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from kubetune_contract.errors import ConfigError
from kubetune_contract.progress import TerminationMessage
from kubetune_trainer import launch
from kubetune_trainer.launch import Nodes

DEADLINE = 30.0
KILL_SELF = "import os, signal; os.kill(os.getpid(), signal.{})"
WAIT = """
import os, sys, time
from pathlib import Path
def wait_for(holds):
    end = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.01)
def gone(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
rank = int(os.environ["RANK"])
here = Path(sys.argv[1])
"""


def python(code: str, *arguments: object) -> list[str]:
    return [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE
    while not holds():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


def alive(pid: int) -> bool:
    """Zombies do not count: nobody in this test's process tree has to reap orphans."""
    stat = Path(f"/proc/{pid}/stat")
    try:
        return stat.read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def start_launcher(command: list[str], processes: int = 1) -> "subprocess.Popen[str]":
    code = """
    import json, sys
    from kubetune_trainer import launch
    sys.exit(launch.run(json.loads(sys.argv[1]), launch.Nodes(int(sys.argv[2]))))
    """
    return subprocess.Popen(python(code, json.dumps(command), processes), stderr=subprocess.PIPE, text=True)


CODES = {
    "success": ("", 0),
    "an uncaught error": ("raise SystemExit(1)", 1),
    "a user error": ("raise SystemExit(66)", 66),
    "saved on SIGTERM": ("raise SystemExit(80)", 80),
    "exit code 143": ("raise SystemExit(143)", 143),
    "death by SIGTERM": (KILL_SELF.format("SIGTERM"), 143),
    "death by SIGKILL": (KILL_SELF.format("SIGKILL"), 137),
}


@pytest.mark.parametrize("case", CODES)
def test_the_code_of_a_lone_process_is_the_launchers(case: str) -> None:
    code, expected = CODES[case]
    assert launch.launch(python(code), Nodes()) == expected


RACES = {
    "a user error wins over a peer's crash that came first": (1, 66, 66),
    "a user error wins over a lost peer that came first": (81, 66, 66),
    "a kill wins over the peer that noticed it first": (81, 137, 137),
    "saved wins over a peer that was left behind": (80, 81, 80),
    "of two crashes the first counts": (3, 4, 3),
    "a crash wins over success": (0, 5, 5),
}


@pytest.mark.parametrize("case", RACES)
def test_of_two_ranks_the_one_that_tells_most_counts(case: str, tmp_path: Path) -> None:
    first, second, expected = RACES[case]
    code = f"""{WAIT}
if rank == 0:
    (here / "new").write_text(str(os.getpid()))
    (here / "new").rename(here / "pid")
    os._exit({first})
wait_for((here / "pid").exists)
wait_for(lambda: gone(int((here / "pid").read_text())))
os._exit({second})
"""
    assert launch.launch(python(code, tmp_path), Nodes(2)) == expected


ORDERS: dict[str, tuple[list[int], int]] = {
    "nothing failed": ([], 0),
    "only one": ([137], 137),
    "user errors in order": ([65, 66], 65),
    "user error last": ([1, 137, 81, 64], 64),
    "lost peers only": ([81, 81], 81),
    "a crash behind lost peers": ([81, 81, 1], 1),
    "a crash behind what NCCL's watchdog aborted": ([134, 81, 1], 1),
    "only what the watchdog aborted": ([134, 81], 134),
}


@pytest.mark.parametrize("case", ORDERS)
def test_exit_code(case: str) -> None:
    codes, expected = ORDERS[case]
    assert launch.exit_code(codes) == expected


def test_a_rank_that_hangs_after_another_failed_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "FAILURE_GRACE", 0.1)
    code = f"""{WAIT}
if rank == 1:
    (here / "pid").write_text(str(os.getpid()))
    time.sleep(600)
wait_for((here / "pid").exists)
sys.exit(7)
"""
    assert launch.launch(python(code, tmp_path), Nodes(2)) == 7
    until(lambda: not alive(int((tmp_path / "pid").read_text())))


def test_sigterm_reaches_every_rank_and_its_answer_is_the_exit_code(tmp_path: Path) -> None:
    code = f"""{WAIT}
import signal
signal.signal(signal.SIGTERM, lambda *_: ((here / f"got-{{rank}}").touch(), sys.exit(80)))
(here / f"ready-{{rank}}").touch()
time.sleep(600)
"""
    launcher = start_launcher(python(code, tmp_path), processes=2)
    until(lambda: {"ready-0", "ready-1"} <= set(os.listdir(tmp_path)))
    launcher.send_signal(signal.SIGTERM)
    _, errors = launcher.communicate(timeout=DEADLINE)
    assert launcher.returncode == 80, errors
    assert {"got-0", "got-1"} <= set(os.listdir(tmp_path))


def test_a_second_interrupt_kills(tmp_path: Path) -> None:
    code = f"""{WAIT}
import signal
signal.signal(signal.SIGTERM, lambda *_: (here / "asked").touch())
(here / "ready").touch()
while True:
    time.sleep(600)
"""
    launcher = start_launcher(python(code, tmp_path))
    until((tmp_path / "ready").exists)
    launcher.send_signal(signal.SIGINT)
    until((tmp_path / "asked").exists)
    launcher.send_signal(signal.SIGINT)
    launcher.communicate(timeout=DEADLINE)
    assert launcher.returncode == 137


@pytest.mark.parametrize("code", [0, 3])
def test_what_a_worker_started_ends_with_it(code: int, tmp_path: Path) -> None:
    script = f"""{WAIT}
import subprocess
(here / "pid").write_text(str(subprocess.Popen(["sleep", "600"]).pid))
sys.exit({code})
"""
    assert launch.launch(python(script, tmp_path), Nodes()) == code
    until(lambda: not alive(int((tmp_path / "pid").read_text())))


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux")
def test_workers_die_with_a_killed_launcher(tmp_path: Path) -> None:
    code = f"""{WAIT}
(here / "new").write_text(str(os.getpid()))
(here / "new").rename(here / "pid")
time.sleep(600)
"""
    launcher = start_launcher(python(code, tmp_path))
    until((tmp_path / "pid").exists)
    worker = int((tmp_path / "pid").read_text())
    launcher.kill()
    launcher.communicate(timeout=DEADLINE)
    until(lambda: not alive(worker))


def test_ranks_are_counted_over_all_nodes() -> None:
    first, second = launch.environments(
        Nodes(processes=2, count=3, rank=1, address="job-a1-0.job", port=29500), {}, gpu=False
    )
    assert [(env["RANK"], env["LOCAL_RANK"]) for env in (first, second)] == [("2", "0"), ("3", "1")]
    shared = {"WORLD_SIZE": "6", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "job-a1-0.job", "MASTER_PORT": "29500"}
    assert shared.items() <= first.items()
    assert shared.items() <= second.items()


def test_a_lone_process_gets_no_address() -> None:
    (only,) = launch.environments(Nodes(), {}, gpu=False)
    assert "MASTER_ADDR" not in only
    assert only["WORLD_SIZE"] == "1"


def test_ranks_of_one_machine_share_a_free_port() -> None:
    first, second = launch.environments(Nodes(2), {}, gpu=False)
    assert first["MASTER_ADDR"] == "127.0.0.1"
    assert first["MASTER_PORT"] == second["MASTER_PORT"]


def test_cpu_workers_keep_their_memory_unless_the_user_says_otherwise() -> None:
    (cpu,) = launch.environments(Nodes(), {"MALLOC_TOP_PAD_": "1"}, gpu=False)
    (gpu,) = launch.environments(Nodes(), {}, gpu=True)
    assert (cpu["MALLOC_MMAP_MAX_"], cpu["MALLOC_TOP_PAD_"]) == ("0", "1")
    assert "MALLOC_MMAP_MAX_" not in gpu


WRONG_NODES = {
    "a word for a number": (
        {"PET_NPROC_PER_NODE": "gpu"},
        ["PET_NPROC_PER_NODE must be a whole number of at least 1, but it is 'gpu'"],
    ),
    "a rank that does not exist": (
        {"PET_NNODES": "2", "PET_NODE_RANK": "2", "PET_MASTER_PORT": "29500"},
        ["node rank 2 does not exist among 2 nodes: ranks start at 0"],
    ),
    "no meeting point": (
        {"PET_NNODES": "2"},
        [
            "several nodes need the address and port of node 0: "
            "PET_MASTER_ADDR and PET_MASTER_PORT, or --master_addr and --master_port"
        ],
    ),
    "two at once": (
        {"PET_NNODES": "0", "PET_NPROC_PER_NODE": "-1"},
        [
            "PET_NPROC_PER_NODE must be a whole number of at least 1, but it is '-1'",
            "PET_NNODES must be a whole number of at least 1, but it is '0'",
        ],
    ),
}


@pytest.mark.parametrize("case", WRONG_NODES)
def test_wrong_variables_are_told(case: str) -> None:
    environ, expected = WRONG_NODES[case]
    with pytest.raises(ConfigError) as caught:
        Nodes.from_env(environ)
    assert list(caught.value.problems) == expected


def test_the_operators_variables_are_understood() -> None:
    environ = {
        "PET_NNODES": "2",
        "PET_NODE_RANK": "1",
        "PET_NPROC_PER_NODE": "4",
        "PET_MASTER_ADDR": "demo-a1-0.demo",
        "PET_MASTER_PORT": "29500",
    }
    assert Nodes.from_env(environ) == Nodes(4, 2, 1, "demo-a1-0.demo", 29500)
    assert Nodes.from_env({}) == Nodes()


def test_a_first_node_that_never_appears_is_a_lost_peer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(launch, "RESOLVE_DEADLINE", 0.0)
    nodes = Nodes(count=2, address="no-such-name.invalid", port=29500)
    assert launch.run(python(""), nodes) == 81
    assert "the name of node 0, no-such-name.invalid, did not resolve" in capsys.readouterr().err


def test_a_rank_that_could_not_speak_gets_a_last_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "termination-log"
    log.touch()
    monkeypatch.setattr(launch, "TERMINATION_LOG", str(log))
    assert launch.run(python(KILL_SELF.format("SIGKILL")), Nodes()) == 137
    assert json.loads(log.read_text()) == {
        "reason": "Crash",
        "message": "a training process ended with exit code 137",
    }


def test_the_workers_own_last_word_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "termination-log"
    mine = TerminationMessage(reason="InvalidData", message="line 3").to_json()
    log.write_text(mine)
    monkeypatch.setattr(launch, "TERMINATION_LOG", str(log))
    launch.run(python("raise SystemExit(65)"), Nodes())
    assert log.read_text() == mine
    launch.run(python("raise SystemExit(1)"), Nodes())
    assert '"reason":"Crash"' in log.read_text(), "a peer's word does not stand for the culprit"


@pytest.mark.parametrize("module", ["launch", "cli", "__main__"])
def test_torch_is_not_imported(module: str) -> None:
    code = f"import sys; import kubetune_trainer.{module}; sys.exit('torch' in sys.modules)"
    subprocess.run(python(code), check=True)
