"""What `down` does, as steps: stop the programs, then take back what they changed on the machine."""

from __future__ import annotations

import shutil
from pathlib import Path

import machine
import node
from layout import Layout
from process import Component, ours, stop
from steps import Plan


def add_steps(plan: Plan, layout: Layout, *, purge_cache: bool) -> None:
    """Add all steps. Each is fine with a cluster that is half there or not there.

    The kubelet stops first, or it would restart what is being removed; containerd stops last, because it removes.
    """
    parts = node.components(layout)
    spaces = machine.our_namespaces(layout)  # read now: ending the containers removes the traces
    others = [part for name, part in parts.items() if name not in ("kubelet", "containerd")]
    plan.add("kubelet stopped", lambda: stop_all(layout, [parts["kubelet"]]))
    plan.add("containers removed", lambda: remove_containers(layout), after=("kubelet stopped",))
    plan.add("components stopped", lambda: stop_all(layout, others), after=("kubelet stopped",))
    runtime = ("containers removed", "components stopped")
    plan.add("containerd stopped", lambda: stop_all(layout, [parts["containerd"]]), after=runtime)
    plan.add("network removed", lambda: remove_networking(spaces), after=("containerd stopped",))
    plan.add("state removed", lambda: remove_state(layout), after=("network removed",))
    if purge_cache:
        plan.add("cache removed", lambda: remove_tree(layout.cache), after=("state removed",))


def stop_all(layout: Layout, parts: list[Component]) -> str | None:
    """Stop components in reverse order of the start, whatever their arguments were."""
    found = [pid for part in reversed(parts) for pid in ours(layout, part)]
    for pid in found:
        stop(pid)
    return None if found else "not running"


def remove_containers(layout: Layout) -> None:
    """End all pods and remove their containers from containerd's books; the images stay."""
    if node.containerd_answers(layout):
        for name in (node.ctr(layout, "containers", "ls", "-q") or "").split():
            node.ctr(layout, "tasks", "rm", "--force", name, check=False)
            node.ctr(layout, "containers", "rm", name, check=False)
    machine.stop_containers(layout)


def remove_networking(spaces: set[Path]) -> None:
    """Remove the pods' network namespaces, the bridge, the DNS address and the packet rules."""
    machine.remove_namespaces(spaces)
    machine.remove_network()
    machine.remove_rules()


def remove_state(layout: Layout) -> None:
    """Unmount, restore the kernel's settings, and delete the state."""
    machine.unmount(layout)
    machine.remove_groups()
    machine.restore_sysctls(layout)
    machine.remove_kubelet_files(layout)
    remove_tree(layout.state)
    remove_tree(machine.IMAGE_RUN)


def remove_tree(folder: Path) -> None:
    """Delete a folder if it is there; an error is an error, because `down` promises that nothing stays."""
    if folder.exists():
        shutil.rmtree(folder)
