"""The command line: what each subcommand prints and its exit code, and the Makefile on top of it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import cluster
import node
import pytest
import start
from layout import HERE, REPOSITORY, Layout, default_layout
from shell import ClusterError


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """An environment in which no cluster exists."""
    kept = {name: value for name, value in os.environ.items() if name not in ("KUBE_CONTEXT", "REGISTRY", "KUBECONFIG")}
    return {**kept, "XDG_STATE_HOME": str(tmp_path / "state"), "XDG_CACHE_HOME": str(tmp_path / "cache")}


def tool(environment: dict[str, str], *argv: str) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, str(HERE / "cluster.py"), *argv]
    return subprocess.run(words, env=environment, capture_output=True, text=True, check=False)


def test_kubeconfig_prints_the_path_and_nothing_else(environment: dict[str, str], tmp_path: Path) -> None:
    done = tool(environment, "kubeconfig")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{tmp_path}/state/kubetune/admin.kubeconfig\n"


def test_make_kubeconfig_prints_the_path_and_nothing_else(environment: dict[str, str], tmp_path: Path) -> None:
    done = subprocess.run(
        ["make", "-C", str(REPOSITORY), "--no-print-directory", "kubeconfig"],
        env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == f"{tmp_path}/state/kubetune/admin.kubeconfig\n"


def test_make_alone_explains_every_target() -> None:
    listed = subprocess.run(["make", "-C", str(REPOSITORY)], capture_output=True, text=True, check=True).stdout
    makefile = (REPOSITORY / "Makefile").read_text()
    targets = [line.split()[1] for line in makefile.splitlines() if line.startswith(".PHONY:")]
    assert len(targets) > 10
    for target in targets:
        assert f"  {target} " in listed


def test_status_without_a_cluster_names_every_component_and_ends_with_1(environment: dict[str, str]) -> None:
    done = tool(environment, "status")
    lines = done.stdout.splitlines()
    assert done.returncode == 1
    names = list(node.components(default_layout()))
    assert [line.split()[0] for line in lines] == [*names, "node", "cluster"]
    assert all("stopped" in line and "not healthy" in line for line in lines[:-2])
    assert lines[-2].split()[1:] == ["not", "ready"]


def test_the_environment_can_be_evaluated_by_a_shell(environment: dict[str, str], tmp_path: Path) -> None:
    script = f'eval "$({sys.executable} {HERE}/cluster.py env)"; echo "$PATH"; echo "$KUBECONFIG"'
    done = subprocess.run(["sh", "-c", script], env=environment, capture_output=True, text=True, check=True)
    path, kubeconfig = done.stdout.splitlines()
    assert path.startswith(f"{tmp_path}/state/kubetune/bin:")
    assert kubeconfig == f"{tmp_path}/state/kubetune/admin.kubeconfig"


def fake_kubectl(folder: Path, environment: dict[str, str]) -> dict[str, str]:
    """Put a kubectl first on PATH that knows one context, `lab`."""
    folder.mkdir()
    kubectl = folder / "kubectl"
    kubectl.write_text(
        '#!/bin/sh\ncase "$*" in *--context=lab*|*--kubeconfig*) echo "apiVersion: v1";;\n'
        "*) echo 'error: context \"'\"${*##*=}\"'\" does not exist' >&2; exit 1;; esac\n"
    )
    kubectl.chmod(0o755)
    return {**environment, "PATH": f"{folder}:{environment['PATH']}"}


def test_an_existing_cluster_is_checked_instead_of_started(environment: dict[str, str], tmp_path: Path) -> None:
    environment = {**fake_kubectl(tmp_path / "bin", environment), "KUBE_CONTEXT": "lab"}
    done = tool(environment, "up")
    assert done.returncode == 0, done.stderr
    assert "context answers ... lab is ready" in done.stderr
    kubeconfig = Path(tool(environment, "kubeconfig").stdout.strip())
    assert kubeconfig == tmp_path / "state/kubetune/external.kubeconfig"
    assert kubeconfig.read_text() == "apiVersion: v1\n"
    assert not (tmp_path / "state/kubetune/run").exists()


def test_a_context_that_does_not_exist_is_told_in_kubectls_words(environment: dict[str, str], tmp_path: Path) -> None:
    environment = {**fake_kubectl(tmp_path / "bin", environment), "KUBE_CONTEXT": "typo"}
    done = tool(environment, "up")
    assert done.returncode == 1
    assert 'context "typo" does not exist' in done.stderr


def test_without_root_the_call_goes_on_through_sudo_with_its_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[str]] = []
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(os, "execv", lambda _, words: calls.append(words))
    monkeypatch.setattr(cluster, "which", lambda _: "/usr/bin/sudo")
    monkeypatch.setattr(sys, "argv", ["cluster.py", "up"])
    monkeypatch.setenv("XDG_STATE_HOME", "/home/me/state")
    cluster.become_root()
    assert calls[0][:2] == ["/usr/bin/sudo", "env"]
    assert "XDG_STATE_HOME=/home/me/state" in calls[0]
    assert calls[0][-3:] == [sys.executable, "cluster.py", "up"]


def test_without_root_and_sudo_the_message_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(cluster, "which", lambda _: None)
    with pytest.raises(ClusterError, match=r"needs root .* run this as root, or install sudo"):
        cluster.become_root()


def test_the_lock_is_free_again_when_its_holder_dies(layout: Layout) -> None:
    hold = f"import sys; sys.path.insert(0, {str(HERE)!r}); import cluster, pathlib, layout, time\n"
    paths = f"layout.Layout(pathlib.Path({str(layout.state)!r}), pathlib.Path({str(layout.cache)!r}))"
    hold += f"with cluster.locked({paths}): print('held', flush=True); time.sleep(60)\n"
    holder = subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with layout.lock.open("a") as handle:
        assert not cluster.try_lock(handle.fileno())
        holder.kill()
        holder.communicate()
        assert cluster.try_lock(handle.fileno())


def test_an_unknown_subcommand_is_refused_with_the_choices(environment: dict[str, str]) -> None:
    done = tool(environment, "upp")
    assert done.returncode == 2
    assert "build-images" in done.stderr


STOPS = {
    "a component that there is not": ({}, "kubelets", "there is no component kubelets: there are registry, etcd, "),
    "another cluster's": ({"KUBE_CONTEXT": "lab"}, "kubelet", "KUBE_CONTEXT names lab, whose components are not ours"),
}


@pytest.mark.parametrize("case", STOPS)
def test_only_an_own_component_is_stopped(environment: dict[str, str], case: str) -> None:
    more, name, words = STOPS[case]
    done = tool({**environment, **more}, "stop", name)
    assert done.returncode == 1
    assert words in done.stderr


@pytest.mark.parametrize(("name", "expected"), [("KUBE_CONTEXT", "lab"), ("OTHER", None)])
def test_an_empty_context_means_the_embedded_cluster(
    monkeypatch: pytest.MonkeyPatch, name: str, expected: str | None
) -> None:
    monkeypatch.setenv("KUBE_CONTEXT", "")  # make exports it empty
    monkeypatch.setenv(name, "lab")
    assert start.external_context() == expected


def test_every_step_of_up_waits_only_for_steps_of_the_plan(layout: Layout) -> None:
    plan = cluster.Plan()
    plan.add("system packages", lambda: None)
    start.add_node(plan, layout)
    assert set(plan.steps) >= {*node.components(layout), "node ready", "cluster names answer"}
    assert plan.steps["kube-apiserver"].after == ("etcd", "cluster binaries")
    assert plan.steps["kubelet"].after == ("sandbox image",)
    named = {name for waits in start.WAITS_FOR.values() for name in waits}
    assert named <= set(plan.steps)


def test_the_tool_needs_nothing_but_python(tmp_path: Path) -> None:
    copied = shutil.copytree(HERE, tmp_path / "tests" / "cluster", ignore=shutil.ignore_patterns("__pycache__"))
    done = subprocess.run(
        ["python3", "-I", "-S", "-c", f"import sys; sys.path.insert(0, {str(copied)!r}); import cluster"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
