"""What a fresh Debian machine lacks: system packages, the cluster's binaries, the sandbox image."""

from __future__ import annotations

import hashlib
import io
import json
import platform
import re
import shutil
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from layout import HERE, PAUSE_IMAGE, Layout
from shell import ClusterError, caller, give_to_caller, run, which

# A program (or file) that must be there: the Debian package that brings it. Asked by program, not by package: on a
# machine with Docker's own containerd, apt would remove that to install Debian's.
NODE_PROGRAMS = {
    "containerd": "containerd",
    "runc": "runc",
    "/usr/lib/cni/bridge": "containernetworking-plugins",
    "iptables": "iptables",
    "conntrack": "conntrack",
    "socat": "socat",
    "ethtool": "ethtool",
    "ip": "iproute2",
    "mount": "mount",
    "openssl": "openssl",
    "etcd": "etcd-server",
    "docker-registry": "docker-registry",
}
IMAGE_PROGRAMS = {
    "buildah": "buildah",
    "debootstrap": "debootstrap",
    "skopeo": "skopeo",
    "docker-registry": "docker-registry",
}
# Their packages start a system service of the same name, which would hold our ports.
SERVICES = {"containerd": "containerd", "etcd-server": "etcd", "docker-registry": "docker-registry"}
POLICY = Path("/usr/sbin/policy-rc.d")

KUBERNETES = "k8s.io/kubernetes"
SOURCES = ("go.mod", "go.sum", "coredns/main.go", "pause/main.go")
GO_PACKAGES = {
    "kube-apiserver": f"{KUBERNETES}/cmd/kube-apiserver",
    "kube-controller-manager": f"{KUBERNETES}/cmd/kube-controller-manager",
    "kube-scheduler": f"{KUBERNETES}/cmd/kube-scheduler",
    "kubelet": f"{KUBERNETES}/cmd/kubelet",
    "kube-proxy": f"{KUBERNETES}/cmd/kube-proxy",
    "kubectl": f"{KUBERNETES}/cmd/kubectl",
    "helm": "helm.sh/helm/v3/cmd/helm",
    "coredns": "./coredns",
    "pause": "./pause",
}


def missing_packages(programs: dict[str, str]) -> list[str]:
    """Return the packages whose program is not on this machine."""
    there = {name: Path(name).exists() if name.startswith("/") else which(name) is not None for name in programs}
    return sorted({package for name, package in programs.items() if not there[name]})


def install_packages(layout: Layout, programs: dict[str, str]) -> str:
    """Install what is missing with apt; raises ClusterError on a system without apt."""
    missing = missing_packages(programs)
    if not missing:
        return "already there"
    if not which("apt-get"):
        raise ClusterError(f"these programs' packages are missing and there is no apt-get here: {' '.join(missing)}")
    log = layout.log / "packages.log"
    options = ["-q", "-y", "-o", "DPkg::Lock::Timeout=300"]
    quiet = {"DEBIAN_FRONTEND": "noninteractive"}
    run(["apt-get", *options, "update"], log=log, env=quiet)
    with services_held_back(missing):
        run(["apt-get", *options, "install", "--no-install-recommends", *missing], log=log, env=quiet)
    return f"installed {' '.join(missing)}"


@contextmanager
def services_held_back(packages: list[str]) -> Iterator[None]:
    """Keep apt from starting the services of these packages, now (policy-rc.d) and at the next boot (disable)."""
    mine = not POLICY.exists()
    if mine:
        POLICY.write_text("#!/bin/sh\nexit 101\n")
        POLICY.chmod(0o755)
    try:
        yield
    finally:
        if mine:
            POLICY.unlink(missing_ok=True)
    services = [SERVICES[package] for package in packages if package in SERVICES]
    if services and which("systemctl"):
        run(["systemctl", "disable", *services], check=False)


def content_key() -> str:
    """Return the key under which the binaries are cached: what they are built from, and for which processor."""
    total = hashlib.sha256(platform.machine().encode())
    for name in SOURCES:
        total.update((HERE / name).read_bytes())
    total.update(" ".join(GO_PACKAGES.values()).encode())
    return total.hexdigest()[:16]


def ensure_binaries(layout: Layout) -> str:
    """Build the cluster's binaries unless this content is cached, and link them as the state's `bin`.

    A build goes to a draft folder that is renamed when it is whole, so a killed build is never taken for a good one.
    """
    home = layout.cache / "bin" / content_key()
    word = "already there"
    if not home.is_dir():
        draft = home.with_suffix(".new")
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        go_build(layout, draft)
        draft.rename(home)
        word = "built"
    link(layout.bin, home)
    return word


def go_build(layout: Layout, target: Path) -> None:
    """Compile everything into `target`: minutes with an empty Go cache, seconds with a full one."""
    go = find_go()
    log = layout.log / "go-build.log"
    flags = f"-s -w {version_flags((HERE / 'go.mod').read_text())}"
    give_to_caller(target)
    # Without -buildvcs=false Go runs git for a version stamp, and a machine may have none.
    argv = [go, "build", "-buildvcs=false", "-o", f"{target}/", "-ldflags", flags, *GO_PACKAGES.values()]
    run(argv, cwd=HERE, log=log, env={"CGO_ENABLED": "0"}, user=caller())


def find_go() -> str:
    """Return Go's path, or say what to install."""
    go = shutil.which("go") or shutil.which("go", path="/usr/local/go/bin")
    if go is None:
        raise ClusterError("Go is not on PATH. The cluster's programs are built from source: install Go 1.25 or newer.")
    match = re.search(r"go(\d+)\.(\d+)", run([go, "version"]).stdout)
    found = (int(match[1]), int(match[2])) if match else (0, 0)
    if found < (1, 21):  # from 1.21 on, Go fetches the toolchain that go.mod asks for, or says that it may not
        raise ClusterError(f"{go} is Go {found[0]}.{found[1]}: install Go 1.25 or newer, or put it first on PATH.")
    return go


def version_flags(go_mod: str) -> str:
    """Return linker flags with Kubernetes' version from go.mod; without them every part calls itself v0.0.0."""
    match = re.search(rf"^\s*{re.escape(KUBERNETES)} v(\d+)\.(\d+)(\S*)", go_mod, re.MULTILINE)
    if not match:
        raise ClusterError(f"go.mod names no version of {KUBERNETES}")
    major, minor, rest = match.groups()
    values = {"gitVersion": f"v{major}.{minor}{rest}", "gitMajor": major, "gitMinor": minor}
    packages = ("k8s.io/component-base/version", "k8s.io/client-go/pkg/version")
    return " ".join(f"-X {package}.{name}={value}" for package in packages for name, value in values.items())


def link(path: Path, target: Path) -> None:
    """Make `path` a symbolic link to `target`, in one move."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.new")
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(target)
    fresh.replace(path)


def pause_archive(binary: bytes) -> bytes:
    """Return the sandbox image as a `docker save` archive: one static program in one layer."""
    layer = tar({"pause": (binary, 0o755)})
    architecture = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
    config = {
        "architecture": architecture,
        "os": "linux",
        "config": {"Entrypoint": ["/pause"], "User": "65535:65535"},
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(layer).hexdigest()}"]},
    }
    manifest = [{"Config": "config.json", "RepoTags": [PAUSE_IMAGE], "Layers": ["layer.tar"]}]
    files = {
        "layer.tar": layer,
        "config.json": json.dumps(config).encode(),
        "manifest.json": json.dumps(manifest).encode(),
    }
    return tar({name: (data, 0o644) for name, data in files.items()})


def tar(files: dict[str, tuple[bytes, int]]) -> bytes:
    """Return a tar archive of (content, mode) by name."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, (data, mode) in files.items():
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(data), mode
            archive.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()
