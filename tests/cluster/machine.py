"""What the cluster changes on the machine itself, and taking all of it back.

Everything here recognises its own things by the state folder, by names or by pod ids, so that a Docker, containerd or
Kubernetes that the machine runs besides is left alone.
"""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from layout import BRIDGE, CLUSTER_NAME, DNS_ADDRESS, NODE_ADDRESS, POD_SUBNET, Layout
from process import PROC, alive, processes
from shell import ClusterError, run, wait_until, which

# The kubelet and kube-proxy set these; `up` notes the values it found, `down` restores them.
SYSCTLS = (
    "net/ipv4/ip_forward", "net/ipv4/conf/all/route_localnet", "vm/overcommit_memory", "vm/panic_on_oom",
    "kernel/panic", "kernel/panic_on_oops", "kernel/keys/root_maxkeys", "kernel/keys/root_maxbytes",
)  # fmt: skip
CHAIN = re.compile(r"^(KUBE|CNI)-")
NETWORK_RESULTS = Path("/var/lib/cni/results")
NETWORK_NAMESPACES = Path("/run/netns")
CONTAINER_LOGS = Path("/var/log/containers")
DEVICE_PLUGINS = Path("/var/lib/kubelet/device-plugins")
CGROUPS = Path("/sys/fs/cgroup")
SHIM = "containerd-shim"
# buildah's mounts and locks; on a file system that a reboot empties, or stale mount counts would stay.
IMAGE_RUN = Path("/run/kubetune-buildah")


def note_sysctls(layout: Layout) -> None:
    """Write down the kernel settings as they were before the first start."""
    record = layout.state / "sysctls.json"
    if not record.exists():
        found = {name: (PROC / "sys" / name).read_text().strip() for name in SYSCTLS if (PROC / "sys" / name).exists()}
        record.write_text(json.dumps(found))
    (PROC / "sys" / SYSCTLS[0]).write_text("1")


def restore_sysctls(layout: Layout) -> None:
    """Give the kernel settings their old values; a setting that this machine does not let us write is left."""
    record = layout.state / "sysctls.json"
    for name, value in (json.loads(record.read_text()) if record.exists() else {}).items():
        with suppress(OSError):
            (PROC / "sys" / name).write_text(value)


def ensure_network() -> None:
    """Make the pods' bridge and put the DNS address on loopback; both may be there already."""
    if run(["ip", "link", "show", BRIDGE], check=False).returncode != 0:
        run(["ip", "link", "add", BRIDGE, "type", "bridge"])
    prefix = POD_SUBNET.rpartition("/")[2]
    run(["ip", "address", "replace", f"{NODE_ADDRESS}/{prefix}", "dev", BRIDGE])
    run(["ip", "link", "set", BRIDGE, "up"])
    run(["ip", "address", "replace", f"{DNS_ADDRESS}/32", "dev", "lo"])


def remove_network() -> None:
    """Remove the bridge and the DNS address."""
    if which("ip"):
        run(["ip", "link", "delete", BRIDGE], check=False)
        run(["ip", "address", "delete", f"{DNS_ADDRESS}/32", "dev", "lo"], check=False)


def stop_containers(layout: Layout) -> None:
    """End every process of our pods and the shims that hold them; pods get no grace here."""

    def gone() -> bool:
        left = {*pod_processes(layout), *shims(layout)}
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return not any(alive(pid) for pid in left)

    wait_until("the pods' processes are gone", gone, 15)


def shims(layout: Layout) -> list[int]:
    """Return the shims that belong to our containerd."""
    socket = str(layout.containerd_socket)
    return [pid for pid, argv in processes() if Path(argv[0]).name.startswith(SHIM) and socket in argv]


def pod_processes(layout: Layout) -> set[int]:
    """Return the processes in the control groups of our pods, found by the pods' ids."""
    found: set[int] = set()
    for group in pod_groups(layout):
        for listing in group.rglob("cgroup.procs"):
            with suppress(OSError):
                found |= {int(word) for word in listing.read_text().split()}
    return found


def pod_groups(layout: Layout) -> list[Path]:
    """Return the control groups of our pods in every hierarchy (one in version 2, many in version 1)."""
    folder = layout.state / "kubelet" / "pods"
    names = {f"pod{entry.name}" for entry in folder.iterdir()} if folder.is_dir() else set()
    return [group for top in kubepods() for group in top.rglob("pod*") if group.name in names]


def kubepods() -> list[Path]:
    """Return the kubelet's top control group in every hierarchy."""
    return [*CGROUPS.glob("kubepods"), *CGROUPS.glob("*/kubepods")]


def remove_groups() -> None:
    """Remove the kubelet's control groups that are empty; one that holds another kubelet's pods stays by itself."""
    for top in kubepods():
        for folder, _, _ in os.walk(top, topdown=False):
            with suppress(OSError):
                os.rmdir(folder)


def our_namespaces(layout: Layout) -> set[Path]:
    """Return our pods' network namespaces, from the network plugin's records and the sandboxes' specifications."""
    paths: set[Path] = set()
    for record in NETWORK_RESULTS.glob(f"{CLUSTER_NAME}-*"):
        with suppress(OSError, ValueError):
            paths.add(Path(json.loads(record.read_text()).get("netns", "")))
    for spec in (layout.state / "containerd" / "state").glob("io.containerd.runtime.v2.task/*/*/config.json"):
        with suppress(OSError, ValueError, KeyError):
            namespaces = json.loads(spec.read_text())["linux"]["namespaces"]
            paths |= {Path(it["path"]) for it in namespaces if it["type"] == "network" and "path" in it}
    real = NETWORK_NAMESPACES.resolve()
    return {path for path in paths if path.parent.resolve() == real and path.name.startswith("cni-")}


def remove_namespaces(paths: Iterable[Path]) -> None:
    """Unmount and remove network namespaces and the network plugins' records; the virtual cables go with them."""
    covered = [path for path in paths if not _unmounted(path)]
    if covered:  # pods that start at once: one is mounted, then another's start binds the folder on itself, over it
        run(["umount", "--lazy", NETWORK_NAMESPACES], check=False)
        for path in covered:
            _unmounted(path)
    for record in NETWORK_RESULTS.glob(f"{CLUSTER_NAME}-*"):
        container = record.name.removeprefix(f"{CLUSTER_NAME}-").rpartition("-")[0]
        for path in (record, *NETWORK_RESULTS.glob(f"cni-loopback-{container}-*")):
            path.unlink(missing_ok=True)


def _unmounted(path: Path) -> bool:
    """Unmount and remove a network namespace; False if another mount covers it."""
    run(["umount", "--lazy", path], check=False)
    with suppress(OSError):
        path.unlink(missing_ok=True)
    return not path.exists()


def mounts_under(*folders: Path) -> list[str]:
    """Return the mount points below these folders, deepest first."""
    lines = (PROC / "mounts").read_text().splitlines()
    points = [line.split()[1].replace("\\040", " ") for line in lines]
    return sorted((it for it in points if any(it.startswith(f"{folder}/") for folder in folders)), reverse=True)


def unmount(layout: Layout) -> None:
    """Unmount all of ours; raises ClusterError if something stays, because what follows deletes folders."""
    folders = (layout.state, layout.containerd_root, layout.image_storage)

    def gone() -> bool:
        for point in mounts_under(*folders):
            run(["umount", point], check=False)
        return not mounts_under(*folders)

    try:
        wait_until("our mounts are gone", gone, 10)
    except ClusterError:
        for point in mounts_under(*folders):
            run(["umount", "--lazy", point], check=False)
        if left := mounts_under(*folders):
            raise ClusterError(f"these cannot be unmounted, so nothing was deleted: {', '.join(left)}") from None


def remove_rules() -> None:
    """Remove every rule and chain of kube-proxy, the kubelet and the network plugins, in one move per table."""
    for family in ("iptables", "ip6tables"):
        if not which(f"{family}-save"):
            continue
        for script in removals(run([f"{family}-save"], check=False).stdout):
            run([f"{family}-restore", "--noflush"], stdin=script)


def removals(saved: str) -> Iterator[str]:
    """Yield, for each table of an `iptables-save`, the `iptables-restore` script that removes our rules and chains."""
    for table in re.findall(r"^\*.*?^COMMIT$", saved, re.MULTILINE | re.DOTALL):
        lines = table.splitlines()
        chains = [line[1:].split()[0] for line in lines if line.startswith(":") and CHAIN.match(line[1:])]
        jumps = [line for line in lines if line.startswith("-A") and calls_ours(line) and not CHAIN.match(line[3:])]
        if chains or jumps:
            script = [lines[0], *(f"-D{line[2:]}" for line in jumps)]
            script += [f"-F {chain}" for chain in chains] + [f"-X {chain}" for chain in chains]
            yield "\n".join([*script, "COMMIT", ""])


def calls_ours(rule: str) -> bool:
    """Say whether a rule jumps to one of our chains."""
    target = re.search(r" -[jg] (\S+)", rule)
    return bool(target and CHAIN.match(target[1]))


def remove_kubelet_files(layout: Layout) -> None:
    """Remove what the kubelet puts in folders of the machine whatever its configuration: links to logs, a socket."""
    for path in CONTAINER_LOGS.glob("*.log"):
        if path.is_symlink() and str(path.readlink()).startswith(f"{layout.state}/"):
            path.unlink(missing_ok=True)
    (DEVICE_PLUGINS / "kubelet.sock").unlink(missing_ok=True)
    for folder in (DEVICE_PLUGINS, DEVICE_PLUGINS.parent, NETWORK_RESULTS, NETWORK_RESULTS.parent):
        with suppress(OSError):
            folder.rmdir()
