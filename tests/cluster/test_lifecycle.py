"""The whole cluster's life in a sandbox: up, repair after every kind of death, two at once, down without a trace."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from layout import BRIDGE, DNS_ADDRESS, PAUSE_IMAGE, default_layout
from machine import CGROUPS
from sandbox import Sandbox, sandbox
from shell import environment, wait_until
from toolchain import NODE_PROGRAMS, content_key, missing_packages

MADE = (default_layout().cache / "bin" / content_key()).is_dir() and not missing_packages(NODE_PROGRAMS)
pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(os.geteuid() != 0, reason="namespaces and mounts need root"),
    pytest.mark.skipif((CGROUPS / "cgroup.controllers").exists(), reason="the sandbox needs control groups version 1"),
    pytest.mark.skipif(not MADE, reason="needs what `make cluster-up` installs and builds"),
    pytest.mark.timeout(240),
]

POD = f"""
apiVersion: v1
kind: PersistentVolumeClaim
metadata: {{name: claim}}
spec: {{accessModes: [ReadWriteMany], resources: {{requests: {{storage: 1Gi}}}}}}
---
apiVersion: v1
kind: Pod
metadata: {{name: pod}}
spec:
  terminationGracePeriodSeconds: 1
  containers:
  - name: main
    image: {PAUSE_IMAGE}
    imagePullPolicy: Never
    volumeMounts: [{{name: data, mountPath: /data}}]
  volumes: [{{name: data, persistentVolumeClaim: {{claimName: claim}}}}]
"""


@pytest.fixture(scope="module")
def machine() -> Iterator[Sandbox]:
    """A sandbox; its home is short, because a socket's path has at most 107 bytes."""
    home = Path(tempfile.mkdtemp(prefix="kt", dir="/tmp"))
    with sandbox(home, default_layout().cache / "bin") as made:
        yield made


@pytest.fixture
def fresh(machine: Sandbox) -> Sandbox:
    """The sandbox without a cluster."""
    code, out = machine.tool("down")
    assert code == 0, out
    return machine


@pytest.fixture
def running(machine: Sandbox) -> Sandbox:
    """The sandbox with a healthy cluster; one that an earlier test left is used on."""
    up(machine)
    return machine


def state(machine: Sandbox) -> Path:
    return machine.home / ".local/state/kubetune"


def kubectl(machine: Sandbox, *argv: object) -> str:
    code, out = machine.run(state(machine) / "bin" / "kubectl", *argv)
    assert code == 0, out
    return out


def start_pod(machine: Sandbox) -> str:
    """Start a pod with a volume and return its uid."""
    manifest = machine.home / "pod.yaml"
    manifest.write_text(POD)
    kubectl(machine, "apply", "-f", manifest)
    kubectl(machine, "wait", "--for=condition=Ready", "pod/pod", "--timeout=60s")
    return kubectl(machine, "get", "pod", "pod", "-o", "jsonpath={.metadata.uid}")


def pids(machine: Sandbox) -> dict[str, str]:
    """Return each component's pid as `status` prints it."""
    _, out = machine.tool("status")
    return {line.split()[0]: line.split()[3] for line in out.splitlines() if " pid " in line}


def up(machine: Sandbox) -> str:
    code, out = machine.tool("up")
    assert code == 0, out
    return out


def leftovers(machine: Sandbox) -> dict[str, str]:
    """Return what is still on the machine that a cluster had put there."""
    questions = {
        "processes": ["sh", "-c", "pgrep -a . | grep -vE '^(1|[0-9]+ (sh|pgrep|grep)) '"],
        "mounts": [
            "grep",
            "-E",
            f"{machine.home}/.local|{machine.home}/.cache/kubetune/(containerd|buildah)",
            "/proc/mounts",
        ],
        "bridge": ["ip", "-oneline", "link", "show", "type", "bridge"],
        "veth": ["ip", "-oneline", "link", "show", "type", "veth"],
        "addresses": ["sh", "-c", f"ip -oneline address | grep -E '{BRIDGE}|{DNS_ADDRESS}'"],
        "rules": ["sh", "-c", "iptables-save; ip6tables-save"],
        "namespaces": ["ls", "-A", "/run/netns"],
        "groups": ["find", str(CGROUPS), "-name", "kubepods*"],
        "network records": ["find", "/var/lib/cni", "-type", "f"],
        "log links": ["ls", "-A", "/var/log/containers"],
        "kubelet": ["find", "/var/lib/kubelet", "-mindepth", "1"],
        "state": ["ls", "-A", state(machine)],
    }
    answers = {name: machine.run(*question)[1] for name, question in questions.items()}
    answers["rules"] = "\n".join(line for line in answers["rules"].splitlines() if "KUBE" in line or "CNI" in line)
    absent = ("cannot access", "No such file")
    return {name: out for name, out in answers.items() if out.strip() and not any(word in out for word in absent)}


def test_the_sandbox_does_not_touch_the_machine_outside(machine: Sandbox) -> None:
    links = ["ip", "-oneline", "link"]
    outside = subprocess.run(links, env=environment(), capture_output=True, text=True, check=True).stdout
    inside = machine.run(*links)[1]
    assert inside.count("\n") == 1
    assert inside != outside


def test_down_is_fine_when_there_is_nothing(fresh: Sandbox) -> None:
    assert fresh.tool("down")[0] == 0
    assert leftovers(fresh) == {}


def test_a_taken_port_is_named_with_the_program_that_holds_it(fresh: Sandbox) -> None:
    serve = (
        "import socket, time; s = socket.create_server(('127.0.0.1', 6443)); print('ready', flush=True); time.sleep(60)"
    )
    stranger = fresh.start("python3", "-c", serve)
    assert stranger.stdout is not None
    assert stranger.stdout.readline() == "ready\n"
    code, out = fresh.tool("up")
    fresh.run("pkill", "-f", "create_server")
    stranger.communicate()
    assert code == 1
    assert "kube-apiserver needs port 6443, which `python3" in out
    assert "Stop that program" in out


# A half-made certificate, a container runtime or an API server without what follows, a kubelet without its node.
@pytest.mark.parametrize("moment", ["pki.new", "run/containerd.pid", "run/kube-apiserver.pid", "kubelet/pods"])
def test_up_goes_on_after_an_up_that_was_killed(fresh: Sandbox, moment: str) -> None:
    first = fresh.start("python3", Path(__file__).with_name("cluster.py"), "up")
    wait_until(f"{moment} is there", (state(fresh) / moment).exists, 60)
    os.killpg(first.pid, signal.SIGKILL)
    fresh.run("pkill", "-KILL", "-f", "cluster.py up")
    first.communicate()
    up(fresh)
    assert fresh.tool("status")[0] == 0


def test_two_ups_at_once_make_one_cluster(fresh: Sandbox) -> None:
    tool = Path(__file__).with_name("cluster.py")
    both = [fresh.start("python3", tool, "up") for _ in range(2)]
    outputs = [process.communicate(timeout=120)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert any("another call of this tool is at work" in out for out in outputs)
    assert fresh.tool("status")[0] == 0
    assert fresh.run("pgrep", "-c", "-x", "kubelet")[1].strip() == "1"


def test_a_second_up_restarts_nothing(running: Sandbox) -> None:
    first = pids(running)
    assert len(first) == 10
    up(running)
    assert pids(running) == first


def test_a_stopped_component_is_started_again_by_up_and_the_others_are_left_alone(running: Sandbox) -> None:
    first = pids(running)
    code, out = running.tool("stop", "kube-apiserver")
    assert code == 0, out
    assert set(first) - set(pids(running)) == {"kube-apiserver"}
    up(running)
    second = pids(running)
    assert {name for name, pid in second.items() if first[name] != pid} == {"kube-apiserver"}


def test_kubectl_is_the_version_of_the_servers(running: Sandbox) -> None:
    versions = [line.split()[-1] for line in kubectl(running, "version").splitlines() if "Kustomize" not in line]
    assert len(versions) == 2
    assert len(set(versions)) == 1
    assert versions[0].startswith("v1.")


def test_a_deleted_claim_takes_its_folder_with_it(running: Sandbox) -> None:
    start_pod(running)
    volumes = state(running) / "volumes"
    assert len(list(volumes.iterdir())) == 1
    kubectl(running, "delete", "pod/pod", "pvc/claim", "--timeout=60s")
    wait_until("the folder is gone", lambda: not list(volumes.iterdir()), 20)
    wait_until("the volume is gone", lambda: kubectl(running, "get", "pv", "-o", "name") == "", 20)


def test_up_repairs_a_cluster_whose_processes_were_all_killed(running: Sandbox) -> None:
    uid = start_pod(running)
    kill_everything(running)
    assert running.tool("status")[0] == 1
    up(running)
    assert running.tool("status")[0] == 0
    kubectl(running, "wait", "--for=condition=Ready", "pod/pod", "--timeout=60s")
    assert kubectl(running, "get", "pod", "pod", "-o", "jsonpath={.metadata.uid}") == uid


def test_down_leaves_nothing_behind_even_with_a_running_pod(running: Sandbox) -> None:
    start_pod(running)
    expected = {"processes", "mounts", "bridge", "veth", "rules", "namespaces", "groups", "network records"}
    assert expected <= set(leftovers(running))
    code, out = running.tool("down")
    assert code == 0, out
    assert leftovers(running) == {}


def test_down_after_every_process_was_killed_leaves_nothing_behind(running: Sandbox) -> None:
    start_pod(running)
    kill_everything(running)
    code, out = running.tool("down")
    assert code == 0, out
    assert leftovers(running) == {}


def kill_everything(machine: Sandbox) -> None:
    """Kill all processes but the sandbox's first, as the end of a session does; mounts and rules stay."""
    machine.run("pkill", "-KILL", "-f", "kubetune|pause")
    wait_until("all are dead", lambda: machine.run("pgrep", "-f", "kubetune|pause")[0] == 1, 10)
