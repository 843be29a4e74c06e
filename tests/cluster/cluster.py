#!/usr/bin/env python3
"""The embedded cluster: a real one-node Kubernetes on this machine, without Docker.

up            start what is not running, repair what is broken (as often as you like)
down          stop everything and leave nothing behind; volumes of the cluster go too, caches stay
stop NAME     stop one component, such as kube-apiserver; `up` starts it again
status        one line per component; exit code 0 only if all is well
kubeconfig    print the path of the administrator's kubeconfig
env           print shell lines that put kubectl, helm and the kubeconfig in place: eval "$(cluster.py env)"
build-images  build the operator's and the trainer's image, push them to the local registry, print their references
setup         install the system packages and make the virtual environment
venv          make the virtual environment only

KUBE_CONTEXT=NAME uses an existing cluster instead; REGISTRY=HOST/PATH pushes the images there.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import images
import node
import start
import teardown
import toolchain
import venv_setup
from layout import Layout, default_layout
from process import Component, find, stop
from shell import POLL_SECONDS, ClusterError, which
from steps import Plan, describe

LOCK_SECONDS = 3600


def main() -> int:
    """Run one subcommand; a ClusterError is printed as it is and ends with 1."""
    arguments = parser().parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # both end our commands too
    try:
        return int(arguments.run(default_layout(), arguments))
    except (ClusterError, OSError) as error:
        print(f"error: {describe(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted; run the same again and it goes on from here", file=sys.stderr)
        return 130


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, **defaults: object) -> argparse.ArgumentParser:
        made = commands.add_parser(name)
        made.set_defaults(**{"venv": False, "images": False, **defaults})
        return made

    begin = command("up", run=up)
    begin.add_argument("--venv", action="store_true", help="also make the project's virtual environment")
    begin.add_argument("--images", action="store_true", help="also build and push the images")
    end = command("down", run=down)
    end.add_argument("--purge-cache", action="store_true", help="also remove binaries, images and layers")
    command("stop", run=stop_component).add_argument("component", metavar="NAME")
    command("status", run=status)
    command("kubeconfig", run=show_kubeconfig)
    command("env", run=show_environment)
    command("build-images", run=build_images, images=True)
    command("setup", run=set_up, venv=True)
    command("venv", run=make_venv, venv=True)
    return top


def up(layout: Layout, arguments: argparse.Namespace) -> int:
    """Start the cluster, and on request the virtual environment and the images, slow parts side by side."""
    external = start.external_context()
    programs = {} if external else toolchain.NODE_PROGRAMS
    if not external or arguments.images:
        become_root()
    with locked(layout):
        plan = preparations(layout, arguments, programs)
        if external:
            plan.add("context answers", lambda: start.use_context(layout))
        else:
            start.add_node(plan, layout)
        if arguments.images and not external:
            images.add_pull(plan, layout)
        plan.run()
    return 0


def build_images(layout: Layout, arguments: argparse.Namespace) -> int:
    """Build and push both images, start the local registry if they go there, and print their references."""
    become_root()
    with locked(layout):
        plan = preparations(layout, arguments, {})
        images.add_pull(plan, layout)
        plan.run()
    for name, reference in json.loads(layout.images.read_text()).items():
        print(f"{name}={reference}")
    return 0


def set_up(layout: Layout, arguments: argparse.Namespace) -> int:
    """Install all system packages and make the virtual environment."""
    programs = {**toolchain.NODE_PROGRAMS, **toolchain.IMAGE_PROGRAMS}
    if toolchain.missing_packages({**programs, **venv_setup.programs(layout)}):
        become_root()
    with locked(layout):
        preparations(layout, arguments, programs).run()
    return 0


def make_venv(layout: Layout, arguments: argparse.Namespace) -> int:
    """Make the virtual environment; root is needed only where Python came without its venv module."""
    if venv_setup.current():
        return 0
    if toolchain.missing_packages(venv_setup.programs(layout)):
        become_root()
    with locked(layout):
        preparations(layout, arguments, {}).run()
    return 0


def preparations(layout: Layout, arguments: argparse.Namespace, programs: dict[str, str]) -> Plan:
    """Return a plan with the steps that need no cluster."""
    plan = Plan()
    wanted = {**programs, **(toolchain.IMAGE_PROGRAMS if arguments.images else {})}
    wanted |= venv_setup.programs(layout) if arguments.venv else {}
    plan.add("system packages", lambda: toolchain.install_packages(layout, wanted))
    if arguments.venv:
        plan.add("virtual environment", lambda: venv_setup.ensure(layout), after=("system packages",))
    if arguments.images:
        images.add_steps(plan, layout)
    return plan


def down(layout: Layout, arguments: argparse.Namespace) -> int:
    """Stop everything and remove what it left on the machine."""
    become_root()
    with locked(layout):
        plan = Plan()
        teardown.add_steps(plan, layout, purge_cache=arguments.purge_cache)
        plan.run()
    return 0


def stop_component(layout: Layout, arguments: argparse.Namespace) -> int:
    """Stop one component and leave the others alone."""
    if context := start.external_context():
        raise ClusterError(f"KUBE_CONTEXT names {context}, whose components are not ours to stop: unset it")
    components = node.components(layout)
    wanted = components.get(arguments.component)
    if wanted is None:
        raise ClusterError(f"there is no component {arguments.component}: there are {', '.join(components)}")
    become_root()
    with locked(layout):
        if pid := find(layout, wanted):
            stop(pid)
    return 0


def status(layout: Layout, _: argparse.Namespace) -> int:
    """Print one line per component, the node and the names; 0 only if all is well."""
    if start.external_context():
        print(f"{'context':<24} {start.use_context(layout)}")
        return 0
    rows = [component_row(layout, part) for part in node.components(layout).values()]
    for name, pid, healthy in rows:
        print(f"{name:<24} {f'running  pid {pid}' if pid else 'stopped':<22} {'healthy' if healthy else 'not healthy'}")
    well = all(healthy for _, _, healthy in rows)
    checks = {"node": well and start.node_ready(layout), "cluster names": well and start.dns_answers()}
    for name, good in checks.items():
        print(f"{name:<24} {'ready' if good else 'not ready'}")
    return 0 if well and all(checks.values()) else 1


def component_row(layout: Layout, part: Component) -> tuple[str, int | None, bool]:
    """Return a component's name, pid and health."""
    pid = find(layout, part)
    return part.name, pid, pid is not None and part.healthy()


def show_kubeconfig(layout: Layout, _: argparse.Namespace) -> int:
    """Print the path of the kubeconfig to use."""
    print(layout.external_kubeconfig if start.external_context() else layout.admin_kubeconfig)
    return 0


def show_environment(layout: Layout, arguments: argparse.Namespace) -> int:
    """Print shell lines with PATH and KUBECONFIG."""
    print(f"export PATH={shlex.quote(str(layout.bin))}:$PATH")
    print("export KUBECONFIG=", end="")
    return show_kubeconfig(layout, arguments)


def become_root() -> None:
    """Go on as root through sudo, with the caller's environment; the machine's network and mounts need it."""
    if os.geteuid() == 0:
        return
    sudo = which("sudo")
    if not sudo:
        raise ClusterError("the cluster needs root (network, mounts, containers): run this as root, or install sudo")
    kept = [f"{name}={value}" for name, value in os.environ.items() if not name.startswith("SUDO_")]
    os.execv(sudo, [sudo, "env", *kept, sys.executable, *sys.argv])


@contextmanager
def locked(layout: Layout) -> Iterator[None]:
    """Hold the cluster's lock; a second call waits, and says so."""
    layout.lock.parent.mkdir(parents=True, exist_ok=True)
    with layout.lock.open("a") as handle:
        deadline, told = time.monotonic() + LOCK_SECONDS, False
        while not try_lock(handle.fileno()):
            if not told:
                print("another call of this tool is at work; waiting for it ...", file=sys.stderr)
                told = True
            if time.monotonic() > deadline:
                raise ClusterError(f"{layout.lock} was held for {LOCK_SECONDS} s")
            time.sleep(POLL_SECONDS)
        yield


def try_lock(descriptor: int) -> bool:
    """Take the lock if it is free. The kernel frees it when its holder dies, so it is never stale."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
