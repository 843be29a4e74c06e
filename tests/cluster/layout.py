"""Where the embedded cluster keeps things, and the fixed numbers its parts must agree on.

Only constants and paths belong here; nothing in this file touches the machine.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent.parent

NODE = "node-0"
BRIDGE = "kubetune0"
CLUSTER_NAME = "kubetune"

POD_SUBNET = "10.244.0.0/24"
POD_CIDR = "10.244.0.0/16"
# The kubelet refuses a loopback node address, so the bridge's own address is the node's.
NODE_ADDRESS = "10.244.0.1"
SERVICE_CIDR = "10.96.0.0/16"
API_SERVICE_ADDRESS = "10.96.0.1"
DNS_ADDRESS = "10.96.0.10"

# Not etcd's usual 2379: a machine that runs its own etcd keeps it.
ETCD_PORT, ETCD_PEER_PORT = 12379, 12380
API_PORT = 6443
CONTROLLER_MANAGER_PORT, SCHEDULER_PORT = 10257, 10259
KUBELET_PORT, KUBELET_HEALTH_PORT = 10250, 10248
PROXY_METRICS_PORT, PROXY_HEALTH_PORT = 10249, 10256
DNS_READY_PORT = 8181
REGISTRY_PORT = 5000
REGISTRY = f"127.0.0.1:{REGISTRY_PORT}"
PAUSE_IMAGE = "localhost/pause:1"


@dataclass(frozen=True)
class Layout:
    """All paths of one cluster: `state` goes away with `down`, `cache` is shared by every clone and stays."""

    state: Path
    cache: Path

    @property
    def admin_kubeconfig(self) -> Path:
        """The administrator's kubeconfig, certificates inside."""
        return self.state / "admin.kubeconfig"

    @property
    def external_kubeconfig(self) -> Path:
        """The kubeconfig written from KUBE_CONTEXT, that one context only."""
        return self.state / "external.kubeconfig"

    @property
    def pki(self) -> Path:
        """Keys and certificates."""
        return self.state / "pki"

    @property
    def run(self) -> Path:
        """One pid file per long-running component."""
        return self.state / "run"

    @property
    def log(self) -> Path:
        """One log per component and per set-up step."""
        return self.state / "log"

    @property
    def bin(self) -> Path:
        """A link to the cached binaries that this cluster runs."""
        return self.state / "bin"

    @property
    def containerd_socket(self) -> Path:
        """Where containerd serves the kubelet."""
        return self.state / "containerd" / "containerd.sock"

    @property
    def containerd_root(self) -> Path:
        """Pulled images and their snapshots; cached, because unpacking torch takes a minute."""
        return self.cache / "containerd"

    @property
    def image_storage(self) -> Path:
        """What buildah has built; its layers are the cache of the next build."""
        return self.cache / "buildah"

    @property
    def images(self) -> Path:
        """The references of the images built last."""
        return self.state / "images.json"

    @property
    def lock(self) -> Path:
        """Held by `up`, `down` and `build-images`; beside the state, because `down` removes that."""
        return self.state.with_name(self.state.name + ".lock")


def default_layout() -> Layout:
    """Return the layout for this user: XDG_STATE_HOME moves the state, XDG_CACHE_HOME the cache."""
    state_home = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    cache_home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Layout(state=state_home.resolve() / "kubetune", cache=cache_home.resolve() / "kubetune")
