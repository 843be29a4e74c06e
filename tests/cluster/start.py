"""What `up` does, as steps: prepare the machine, start the components, wait until the node and its names answer."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Callable

import machine
import node
import toolchain
from layout import API_SERVICE_ADDRESS, DNS_ADDRESS, NODE, PAUSE_IMAGE, Layout
from pki import ensure_pki
from process import ensure
from shell import ClusterError, give_to_caller, run, tail, wait_until, which, write_if_changed
from steps import Plan

NODE_SECONDS = 90
DNS_SECONDS = 30
PREPARED = "network and certificates"
# What a component waits for; those that are not named wait for the API server.
WAITS_FOR = {
    "registry": (PREPARED,),
    "etcd": (PREPARED,),
    "containerd": (PREPARED,),
    "kube-apiserver": ("etcd", "cluster binaries"),
    "kubelet": ("sandbox image",),
}


def external_context() -> str | None:
    """Return the context of an existing cluster that the user wants instead, if any."""
    return os.environ.get("KUBE_CONTEXT") or None


def add_node(plan: Plan, layout: Layout) -> None:
    """Add the steps that end with a Ready node; they follow `system packages`, which must be in the plan."""
    names = list(node.components(layout))
    plan.add("cluster binaries", lambda: toolchain.ensure_binaries(layout))
    plan.add(PREPARED, lambda: prepare_machine(layout), after=("system packages",))
    for name in names:
        if name not in plan.steps:  # the registry may be there, as a step of the images
            plan.add(name, starter(layout, name), after=WAITS_FOR.get(name, ("kube-apiserver",)))
        if name == "containerd":
            plan.add("sandbox image", lambda: ensure_pause(layout), after=("containerd", "cluster binaries"))
    plan.add("node ready", lambda: wait_for_node(layout), after=tuple(names))
    plan.add("cluster names answer", lambda: wait_for_names(layout), after=("coredns", "kube-proxy"))


def starter(layout: Layout, name: str) -> Callable[[], str | None]:
    """Return the step that makes a component run; its command line is made then, when the binaries are there."""
    return lambda: ensure(layout, node.components(layout)[name])


def prepare_machine(layout: Layout) -> None:
    """Make certificates, configuration files, the bridge and the DNS address."""
    layout.state.mkdir(parents=True, exist_ok=True)
    ensure_pki(layout)
    node.write_configuration(layout)
    machine.note_sysctls(layout)
    machine.ensure_network()


def ensure_pause(layout: Layout) -> str:
    """Give containerd the sandbox image unless it has it."""
    if PAUSE_IMAGE in (node.ctr(layout, "images", "ls", "-q") or "").split():
        return "already there"
    archive = layout.state / "pause.tar"
    archive.write_bytes(toolchain.pause_archive((layout.bin / "pause").read_bytes()))
    node.ctr(layout, "images", "import", archive)
    return "imported"


def wait_for_node(layout: Layout) -> None:
    """Wait until the node is Ready; what the kubelet says last is the hint when it is not."""
    wait_until("node Ready", lambda: node_ready(layout), NODE_SECONDS, lambda: tail(layout.log / "kubelet.log"))


def node_ready(layout: Layout) -> bool:
    """Say whether the node is Ready."""
    path = "jsonpath={.status.conditions[?(@.type=='Ready')].status}"
    return node.kubectl(layout, "get", "node", NODE, "-o", path, check=False).strip() == "True"


def wait_for_names(layout: Layout) -> None:
    """Wait until the cluster's DNS knows the API service."""
    wait_until("cluster DNS answers", dns_answers, DNS_SECONDS, lambda: tail(layout.log / "coredns.log"))


def dns_answers() -> bool:
    """Ask the cluster's DNS for the API service (RFC 1035, one question of type A) and compare the address."""
    name = b"".join(bytes([len(part)]) + part for part in b"kubernetes.default.svc.cluster.local".split(b"."))
    question = struct.pack(">HHHHHH", 1, 0x0100, 1, 0, 0, 0) + name + b"\0" + struct.pack(">HH", 1, 1)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.settimeout(1)
        try:
            client.sendto(question, (DNS_ADDRESS, 53))
            return client.recv(512).endswith(socket.inet_aton(API_SERVICE_ADDRESS))
        except OSError:
            return False


def use_context(layout: Layout) -> str:
    """Check that KUBE_CONTEXT answers, and write a kubeconfig with that context only."""
    context = external_context() or ""
    kubectl = which("kubectl")
    if not kubectl:
        raise ClusterError("kubectl is not on PATH; KUBE_CONTEXT needs it to read your kubeconfig")
    config = run([kubectl, "config", "view", "--minify", "--flatten", "--raw", f"--context={context}"]).stdout
    write_if_changed(layout.external_kubeconfig, config, mode=0o600)
    give_to_caller(layout.external_kubeconfig)
    run([kubectl, "--kubeconfig", layout.external_kubeconfig, "--request-timeout=15s", "get", "--raw", "/readyz"])
    return f"{context} is ready"
