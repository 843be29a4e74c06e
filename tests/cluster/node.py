"""The node's components: their configuration files, command lines and health checks.

The order in `components` is the order of the start; `down` stops in reverse.
"""

from __future__ import annotations

import json
import shutil
import socket
import ssl
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from layout import (
    API_PORT,
    BRIDGE,
    CLUSTER_NAME,
    CONTROLLER_MANAGER_PORT,
    DNS_ADDRESS,
    DNS_READY_PORT,
    ETCD_PEER_PORT,
    ETCD_PORT,
    HERE,
    KUBELET_HEALTH_PORT,
    KUBELET_PORT,
    NODE,
    NODE_ADDRESS,
    PAUSE_IMAGE,
    POD_CIDR,
    POD_SUBNET,
    PROXY_HEALTH_PORT,
    PROXY_METRICS_PORT,
    REGISTRY,
    REGISTRY_PORT,
    SCHEDULER_PORT,
    SERVICE_CIDR,
    Layout,
)
from process import Component, command_line
from shell import SYSTEM_PATH, ClusterError, http_text, run, which, write_if_changed

CNI_PLUGINS = Path("/usr/lib/cni")


def write_configuration(layout: Layout) -> None:
    """Write every component's configuration file; unchanged files are left alone."""
    state = layout.state
    write_if_changed(state / "containerd.toml", containerd_config(layout))
    write_if_changed(state / "cni" / "10-bridge.conflist", json.dumps(cni_config(layout), indent=1))
    write_if_changed(state / "resolv.conf", "nameserver 127.0.0.1\n")
    write_if_changed(state / "kubelet.yaml", kubelet_config(layout))
    write_if_changed(state / "Corefile", corefile(layout))
    write_if_changed(state / "registry.yaml", registry_config(layout))
    write_if_changed(state / "volumes.py", (HERE / "volumes.py").read_text())


def containerd_config(layout: Layout) -> str:
    """Return containerd's configuration; nothing of it lies in the system's own containerd folders."""
    folder = layout.state / "containerd"
    return f"""version = 2
root = "{layout.containerd_root}"
state = "{folder}/state"
[grpc]
  address = "{layout.containerd_socket}"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{PAUSE_IMAGE}"
  # Without CAP_SYS_RESOURCE runc cannot lower oom_score_adj: "can't get final child's PID from pipe: EOF".
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "overlayfs"
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
      SystemdCgroup = false
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "{CNI_PLUGINS}"
    conf_dir = "{layout.state}/cni"
[plugins."io.containerd.internal.v1.opt"]
  path = "{folder}/opt"
"""


def cni_config(layout: Layout) -> dict[str, object]:
    """Return the pod network: one bridge, addresses from one range, no way out of this machine."""
    addresses = {
        "type": "host-local",
        "ranges": [[{"subnet": POD_SUBNET}]],
        "routes": [{"dst": "0.0.0.0/0"}],
        "dataDir": f"{layout.state}/cni-data",
    }
    bridge = {"type": "bridge", "bridge": BRIDGE, "isGateway": True, "ipMasq": False, "hairpinMode": True}
    ports = {"type": "portmap", "capabilities": {"portMappings": True}}
    return {"cniVersion": "0.4.0", "name": CLUSTER_NAME, "plugins": [{**bridge, "ipam": addresses}, ports]}


def kubelet_config(layout: Layout) -> str:
    """Return the kubelet's configuration."""
    return f"""apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
address: {NODE_ADDRESS}
failCgroupV1: false
cgroupDriver: cgroupfs
containerRuntimeEndpoint: unix://{layout.containerd_socket}
authentication:
  anonymous: {{enabled: false}}
  webhook: {{enabled: true}}
  x509: {{clientCAFile: {layout.pki}/ca.crt}}
authorization: {{mode: Webhook}}
clusterDNS: [{DNS_ADDRESS}]
clusterDomain: cluster.local
resolvConf: {layout.state}/resolv.conf
failSwapOn: false
serializeImagePulls: false
imageGCHighThresholdPercent: 100
evictionHard: {{nodefs.available: "1%", imagefs.available: "1%", memory.available: 200Mi}}
volumePluginDir: {layout.state}/kubelet/plugins
podLogsDir: {layout.state}/podlogs
registerNode: true
"""


def corefile(layout: Layout) -> str:
    """Return CoreDNS's configuration: the cluster's names only, nothing is asked outside."""
    return f""".:53 {{
  bind {DNS_ADDRESS}
  errors
  ready {DNS_ADDRESS}:{DNS_READY_PORT}
  kubernetes cluster.local in-addr.arpa ip6.arpa {{
    kubeconfig {layout.admin_kubeconfig}
    pods insecure
    ttl 5
  }}
  cache 2
}}
"""


def registry_config(layout: Layout) -> str:
    """Return the image registry's configuration; its blobs are cached outside the state."""
    return f"""version: 0.1
log: {{level: warn, accesslog: {{disabled: true}}}}
storage:
  filesystem: {{rootdirectory: {layout.cache}/registry}}
  delete: {{enabled: true}}
  maintenance: {{uploadpurging: {{enabled: true, age: 1h, interval: 24h, dryrun: false}}}}
http: {{addr: "{REGISTRY}"}}
"""


def components(layout: Layout) -> dict[str, Component]:
    """Return every component by name, in the order of the start."""
    made = [
        registry(layout), etcd(layout), api_server(layout), controller_manager(layout), scheduler(layout),
        containerd(layout), kubelet(layout), proxy(layout), coredns(layout), volumes(layout),
    ]  # fmt: skip
    return {component.name: component for component in made}


def system_program(name: str) -> str:
    """Return the path of a program that a Debian package brings; its bare name before it is installed."""
    return which(name) or name


def clean_environment() -> dict[str, str]:
    """Return what components see of our environment: no proxy, no KUBECONFIG, no locale."""
    return {"PATH": SYSTEM_PATH, "HOME": "/root"}


def answers(url: str, expected: str = "") -> Callable[[], bool]:
    """Return a check that `url` answers 200 with `expected` in the body."""

    def check() -> bool:
        body = http_text(url)
        return body is not None and expected in body

    return check


def component(
    name: str, argv: Sequence[object], healthy: Callable[[], bool], *, files: tuple[Path, ...], ports: tuple[int, ...]
) -> Component:
    """Return a component with the environment that all of them share."""
    words = tuple(str(word) for word in argv)
    return Component(name, words, healthy, files=files, ports=ports, environment=clean_environment())


def binary(layout: Layout, name: str) -> Path:
    """Return the real path of a built binary, so that a rebuilt one restarts its component."""
    return (layout.bin / name).resolve()


def registry(layout: Layout) -> Component:
    """Return the image registry that the kubelet pulls from."""
    config = layout.state / "registry.yaml"
    argv = [system_program("docker-registry"), "serve", config]
    return component("registry", argv, answers(f"http://{REGISTRY}/v2/"), files=(config,), ports=(REGISTRY_PORT,))


def etcd(layout: Layout) -> Component:
    """Return etcd without fsync: its data are worth nothing after a crash of the whole machine."""
    url = f"http://127.0.0.1:{ETCD_PORT}"
    peer = f"http://127.0.0.1:{ETCD_PEER_PORT}"
    argv = [
        system_program("etcd"), "--data-dir", layout.state / "etcd", "--unsafe-no-fsync",
        f"--listen-client-urls={url}", f"--advertise-client-urls={url}", f"--listen-peer-urls={peer}",
        f"--initial-advertise-peer-urls={peer}", f"--initial-cluster=default={peer}",
    ]  # fmt: skip
    healthy = answers(f"{url}/health", '"true"')
    return component("etcd", argv, healthy, files=(), ports=(ETCD_PORT, ETCD_PEER_PORT))


def api_server(layout: Layout) -> Component:
    """Return the API server; the kubelet is reached by address, since its name is in no DNS."""
    pki = layout.pki
    argv = [
        binary(layout, "kube-apiserver"), f"--etcd-servers=http://127.0.0.1:{ETCD_PORT}",
        f"--service-cluster-ip-range={SERVICE_CIDR}", "--authorization-mode=Node,RBAC",
        "--enable-admission-plugins=NodeRestriction", "--allow-privileged=true", f"--secure-port={API_PORT}",
        "--bind-address=0.0.0.0", f"--advertise-address={NODE_ADDRESS}", "--endpoint-reconciler-type=lease",
        f"--client-ca-file={pki}/ca.crt", f"--tls-cert-file={pki}/apiserver.crt",
        f"--tls-private-key-file={pki}/apiserver.key", "--service-account-issuer=https://kubernetes.default.svc",
        f"--service-account-key-file={pki}/sa.key", f"--service-account-signing-key-file={pki}/sa.key",
        "--kubelet-preferred-address-types=InternalIP", f"--kubelet-client-certificate={pki}/admin.crt",
        f"--kubelet-client-key={pki}/admin.key",
    ]  # fmt: skip
    return component("kube-apiserver", argv, lambda: api_ready(layout), files=(pki / "ca.crt",), ports=(API_PORT,))


def api_ready(layout: Layout) -> bool:
    """Say whether the API server answers /readyz to our own certificate (a stranger's server would not)."""
    try:
        context = ssl.create_default_context(cafile=str(layout.pki / "ca.crt"))
        context.load_cert_chain(layout.pki / "admin.crt", layout.pki / "admin.key")
    except OSError:
        return False
    return http_text(f"https://127.0.0.1:{API_PORT}/readyz", context) == "ok"


def controller_manager(layout: Layout) -> Component:
    """Return the controller manager."""
    config, pki = layout.state / "controller-manager.kubeconfig", layout.pki
    argv = [
        binary(layout, "kube-controller-manager"), f"--kubeconfig={config}", "--bind-address=127.0.0.1",
        f"--service-account-private-key-file={pki}/sa.key", f"--root-ca-file={pki}/ca.crt",
        "--use-service-account-credentials=true", "--leader-elect=false", "--kube-api-qps=100", "--kube-api-burst=200",
        "--allocate-node-cidrs=true", f"--cluster-cidr={POD_CIDR}", "--node-cidr-mask-size=24",
        f"--cluster-signing-cert-file={pki}/ca.crt", f"--cluster-signing-key-file={pki}/ca.key",
    ]  # fmt: skip
    healthy = answers(f"https://127.0.0.1:{CONTROLLER_MANAGER_PORT}/healthz", "ok")
    return component("kube-controller-manager", argv, healthy, files=(config,), ports=(CONTROLLER_MANAGER_PORT,))


def scheduler(layout: Layout) -> Component:
    """Return the scheduler."""
    config = layout.state / "scheduler.kubeconfig"
    argv = [
        binary(layout, "kube-scheduler"),
        f"--kubeconfig={config}",
        "--bind-address=127.0.0.1",
        "--leader-elect=false",
    ]
    healthy = answers(f"https://127.0.0.1:{SCHEDULER_PORT}/healthz", "ok")
    return component("kube-scheduler", argv, healthy, files=(config,), ports=(SCHEDULER_PORT,))


def containerd(layout: Layout) -> Component:
    """Return a containerd of our own, beside one that the machine may run."""
    config = layout.state / "containerd.toml"
    argv = [system_program("containerd"), "-c", config]
    return component("containerd", argv, lambda: containerd_answers(layout), files=(config,), ports=())


def containerd_answers(layout: Layout) -> bool:
    """Say whether containerd serves its socket; the connect comes first, since ctr waits ten seconds for a dead one."""
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(layout.containerd_socket))
        except OSError:
            return False
    return ctr(layout, "version", check=False) is not None


def ctr(layout: Layout, *argv: str | Path, check: bool = True) -> str | None:
    """Run containerd's own client in the kubelet's namespace; None if it failed and `check` is off."""
    done = run(["ctr", "-a", layout.containerd_socket, "-n", "k8s.io", *argv], check=check)
    return done.stdout if done.returncode == 0 else None


def kubelet(layout: Layout) -> Component:
    """Return the kubelet of the one node."""
    config, kubeconfig = layout.state / "kubelet.yaml", layout.state / "kubelet.kubeconfig"
    argv = [
        binary(layout, "kubelet"), f"--config={config}", f"--kubeconfig={kubeconfig}",
        f"--root-dir={layout.state}/kubelet", f"--hostname-override={NODE}", f"--cert-dir={layout.state}/kubelet-certs",
        f"--node-ip={NODE_ADDRESS}", "--v=2",
    ]  # fmt: skip
    healthy = answers(f"http://127.0.0.1:{KUBELET_HEALTH_PORT}/healthz", "ok")
    return component("kubelet", argv, healthy, files=(config, kubeconfig), ports=(KUBELET_PORT, KUBELET_HEALTH_PORT))


def proxy(layout: Layout) -> Component:
    """Return kube-proxy.

    It masquerades all service traffic: pods share one bridge, so the answer of a pod to its neighbour would bypass the
    address translation where br_netfilter is not loaded.
    """
    config = layout.state / "proxy.kubeconfig"
    argv = [
        binary(layout, "kube-proxy"), f"--kubeconfig={config}", f"--hostname-override={NODE}", "--proxy-mode=iptables",
        f"--cluster-cidr={POD_CIDR}", "--masquerade-all", "--conntrack-max-per-core=0",
        "--conntrack-tcp-timeout-established=0", "--conntrack-tcp-timeout-close-wait=0",
        f"--healthz-bind-address=127.0.0.1:{PROXY_HEALTH_PORT}",
        f"--metrics-bind-address=127.0.0.1:{PROXY_METRICS_PORT}",
    ]  # fmt: skip
    healthy = answers(f"http://127.0.0.1:{PROXY_HEALTH_PORT}/healthz")
    return component("kube-proxy", argv, healthy, files=(config,), ports=(PROXY_HEALTH_PORT, PROXY_METRICS_PORT))


def coredns(layout: Layout) -> Component:
    """Return CoreDNS on the cluster's DNS address, which is an address of this machine's loopback."""
    config = layout.state / "Corefile"
    argv = [binary(layout, "coredns"), "-conf", config]
    healthy = answers(f"http://{DNS_ADDRESS}:{DNS_READY_PORT}/ready", "OK")
    return component("coredns", argv, healthy, files=(config, layout.admin_kubeconfig), ports=(DNS_READY_PORT,))


def volumes(layout: Layout) -> Component:
    """Return the provisioner that gives every claim a folder of this machine."""
    script = layout.state / "volumes.py"
    argv = [Path(sys.executable).resolve(), script, layout.state]
    return component("volumes", argv, lambda: volumes_ready(layout), files=(script, layout.admin_kubeconfig), ports=())


def volumes_ready(layout: Layout) -> bool:
    """Say whether the process that runs now has said that it is ready (an earlier one's word does not count)."""
    try:
        pid = int((layout.run / "volumes.ready").read_text())
    except (OSError, ValueError):
        return False
    return str(layout.state / "volumes.py") in (command_line(pid) or ())


def kubectl(layout: Layout, *argv: str | Path, stdin: str | None = None, check: bool = True) -> str:
    """Run kubectl as the administrator and return what it printed."""
    program = layout.bin / "kubectl"
    if not program.exists() and not shutil.which("kubectl"):
        raise ClusterError("kubectl is missing: run `make cluster-up`")
    words = [program if program.exists() else "kubectl", "--kubeconfig", layout.admin_kubeconfig, *argv]
    return run(words, stdin=stdin, check=check).stdout
