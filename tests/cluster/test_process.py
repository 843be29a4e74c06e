"""Components are recognised by what runs, not by what a file says."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import process
import pytest
from layout import Layout
from process import Component
from shell import ClusterError, wait_until

SLEEP = "import signal, sys, time\nprint('begun', flush=True)\n{more}\ntime.sleep(60)"


@pytest.fixture
def started() -> Iterator[list[int]]:
    """Pids that the test started; they are ended after it."""
    pids: list[int] = []
    yield pids
    for pid in pids:
        process.stop(pid, seconds=5)


def sleeper(layout: Layout, *, name: str = "sleeper", more: str = "", mark: str = "a", **options: object) -> Component:
    """A component that writes `begun` to its log and then sleeps; healthy once it has begun."""
    script = layout.state / f"{name}.py"
    script.parent.mkdir(parents=True, exist_ok=True)
    script.write_text(SLEEP.format(more=more))
    log = layout.log / f"{name}.log"

    def healthy() -> bool:
        return log.is_file() and "begun" in log.read_text()

    argv = (str(Path(sys.executable).resolve()), str(script), mark)
    return Component(name, argv, healthy, start_seconds=10, **options)  # type: ignore[arg-type]


def ensure(layout: Layout, component: Component, started: list[int]) -> tuple[str, int]:
    word = process.ensure(layout, component)
    pid = process.find(layout, component)
    assert pid is not None
    started.append(pid)
    return word, pid


def test_a_running_component_is_left_alone(layout: Layout, started: list[int]) -> None:
    component = sleeper(layout)
    assert ensure(layout, component, started)[0] == "started"
    first = started[0]
    assert ensure(layout, component, started) == ("running already", first)


def test_a_pid_file_that_names_a_stranger_is_not_believed(layout: Layout, started: list[int]) -> None:
    component = sleeper(layout)
    layout.run.mkdir(parents=True)
    (layout.run / "sleeper.pid").write_text(json.dumps({"pid": os.getpid(), "digest": component.digest()}))
    assert process.find(layout, component) is None
    _, pid = ensure(layout, component, started)
    assert pid != os.getpid()


@pytest.mark.parametrize("text", ["", "{", '{"pid": 1}', '{"pid": "x", "digest": ""}', "[]", "17"])
def test_a_half_written_pid_file_counts_as_none(layout: Layout, text: str) -> None:
    layout.run.mkdir(parents=True)
    (layout.run / "sleeper.pid").write_text(text)
    assert process.read_record(layout, "sleeper") is None


def test_a_component_without_its_pid_file_is_found_by_its_command_line(layout: Layout, started: list[int]) -> None:
    component = sleeper(layout)
    _, pid = ensure(layout, component, started)
    (layout.run / "sleeper.pid").unlink()
    assert process.find(layout, component) == pid


def test_a_component_without_its_pid_file_is_restarted_because_its_configuration_is_unknown(
    layout: Layout, started: list[int]
) -> None:
    component = sleeper(layout)
    _, first = ensure(layout, component, started)
    (layout.run / "sleeper.pid").unlink()
    word, second = ensure(layout, component, started)
    assert (word, process.alive(first)) == ("started", False)
    assert second != first


def test_other_arguments_replace_the_running_process(layout: Layout, started: list[int]) -> None:
    _, first = ensure(layout, sleeper(layout, mark="a"), started)
    _, second = ensure(layout, sleeper(layout, mark="b"), started)
    assert not process.alive(first)
    assert process.alive(second)


def test_a_changed_configuration_file_restarts_the_component(layout: Layout, started: list[int]) -> None:
    config = layout.state / "config"
    component = sleeper(layout, files=(config,))
    config.write_text("one")
    _, first = ensure(layout, component, started)
    config.write_text("two")
    word, second = ensure(layout, component, started)
    assert (word, process.alive(first)) == ("started", False)
    assert second != first


def test_the_process_of_another_cluster_is_not_ours(layout: Layout, started: list[int], tmp_path: Path) -> None:
    _, pid = ensure(layout, sleeper(layout), started)
    other = Layout(state=tmp_path / "other" / "kubetune", cache=tmp_path / "other-cache" / "kubetune")
    assert process.ours(layout, sleeper(layout)) == [pid]
    assert process.ours(other, sleeper(layout)) == []


def test_a_component_that_dies_at_once_is_reported_with_its_last_lines(layout: Layout) -> None:
    component = sleeper(layout, more="sys.exit('no licence')")
    component = Component(component.name, component.argv, lambda: False, start_seconds=20)
    with pytest.raises(ClusterError, match=r"sleeper ended while it was starting:\n(?s:.)*no licence"):
        process.ensure(layout, component)


def test_a_component_that_never_gets_healthy_is_reported_with_its_log(layout: Layout, started: list[int]) -> None:
    component = sleeper(layout)
    component = Component(component.name, component.argv, lambda: False, start_seconds=0.5)
    with pytest.raises(ClusterError, match=r"sleeper healthy: not so after 0 s|sleeper healthy: not so after 1 s"):
        process.ensure(layout, component)
    started.append(process.find(layout, component) or 0)


def test_a_program_that_is_not_there_is_reported_by_name(layout: Layout) -> None:
    layout.state.mkdir(parents=True)
    with pytest.raises(ClusterError, match=r"ghost cannot be started: .*No such file"):
        process.ensure(layout, Component("ghost", (str(layout.state / "ghost"),), lambda: True))


def test_a_process_that_ignores_sigterm_is_killed(layout: Layout) -> None:
    component = sleeper(layout, more="signal.signal(signal.SIGTERM, signal.SIG_IGN)\nprint('deaf', flush=True)")
    process.ensure(layout, component)
    pid = process.find(layout, component)
    assert pid is not None
    wait_until("deaf", lambda: "deaf" in (layout.log / "sleeper.log").read_text(), 10)
    process.stop(pid, seconds=0.3)
    assert not process.alive(pid)


def test_stopping_a_process_that_is_gone_is_fine() -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    process.stop(gone.pid)


def test_a_zombie_is_not_alive() -> None:
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(writing)
        os.read(reading, 1)
        os._exit(0)
    os.close(reading)
    assert process.alive(child)
    os.close(writing)
    wait_until("the child has ended", lambda: not process.alive(child), 5)
    with pytest.raises(ChildProcessError):  # `alive` has collected it
        os.waitpid(child, 0)


def test_the_log_of_the_run_before_is_kept(layout: Layout, started: list[int]) -> None:
    component = sleeper(layout)
    _, first = ensure(layout, component, started)
    os.kill(first, signal.SIGKILL)
    wait_until("it is dead", lambda: not process.alive(first), 5)
    ensure(layout, component, started)
    assert (layout.log / "sleeper.log.1").read_text() == "begun\n"


def test_a_port_that_a_stranger_holds_is_named_with_the_stranger(layout: Layout) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        component = sleeper(layout, ports=(port,))
        with pytest.raises(ClusterError) as caught:
            process.ensure(layout, component)
    told = str(caught.value)
    assert f"sleeper needs port {port}" in told
    assert f"(pid {os.getpid()})" in told
    assert process.find(layout, component) is None


def test_a_listener_is_found_on_either_family() -> None:
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as server:
        assert process.listening_inode(server.getsockname()[1]) == str(os.fstat(server.fileno()).st_ino)


def test_an_interpreter_is_told_apart_by_its_script() -> None:
    first, second = ("/usr/bin/python3", "/s/volumes.py", "x"), ("/opt/python3.11", "/elsewhere/volumes.py")
    assert process.program(first)[1] == process.program(second)[1] == "volumes.py"
    assert process.program(("/usr/bin/etcd", "--name")) == ("etcd", "")
