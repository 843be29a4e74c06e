"""The two images: built with buildah, pushed to a registry, skipped when nothing that goes in has changed."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import node
from layout import REGISTRY, REPOSITORY, Layout
from machine import IMAGE_RUN
from process import ensure
from shell import run, which, write_if_changed
from steps import Plan

SUITE = "bookworm"
BASE_PACKAGES = "python3,ca-certificates"
NOT_NEEDED = ("var/cache/apt", "var/lib/apt/lists", "usr/share/doc", "usr/share/man", "usr/share/locale")
CODE = {
    "operator": ("trainer/kubetune_contract", "operator/kubetune_operator"),
    "trainer": ("trainer/kubetune_contract", "trainer/kubetune_trainer"),
}


@dataclass(frozen=True)
class Source:
    """A copy of what goes into the images, so that an edit during a build cannot end under the wrong tag."""

    folder: Path

    def dockerfile(self, kind: str) -> Path:
        """Return an image's Dockerfile."""
        return self.folder / "images" / f"{kind}.Dockerfile"

    def requirements(self, kind: str) -> list[str]:
        """Return the dependencies that pyproject.toml names for an image; the extra has the image's name."""
        project = tomllib.loads((self.folder / "pyproject.toml").read_text())["project"]
        return [*project["dependencies"], *project["optional-dependencies"][kind]]

    def code_files(self, kind: str) -> Iterator[Path]:
        """Yield the files of the packages that an image copies, in a fixed order."""
        for package in CODE[kind]:
            yield from (path for path in sorted((self.folder / package).rglob("*")) if path.is_file())

    def tag(self, kind: str) -> str:
        """Return a digest of the Dockerfile, the dependencies, the code and the base image's recipe."""
        total = hashlib.sha256(base_tag().encode())
        for part in (self.dockerfile(kind).read_bytes(), "\n".join(self.requirements(kind)).encode()):
            total.update(hashlib.sha256(part).digest())
        for path in self.code_files(kind):
            name = str(path.relative_to(self.folder))
            total.update(f"{name}\0".encode() + hashlib.sha256(path.read_bytes()).digest())
        return total.hexdigest()[:16]


def take_source(layout: Layout, repository: Path = REPOSITORY) -> Source:
    """Copy what goes into the images to a folder of the state, without bytecode."""
    folder = layout.state / "image-source"
    shutil.rmtree(folder, ignore_errors=True)
    for name in sorted({"images", *(package for packages in CODE.values() for package in packages)}):
        shutil.copytree(repository / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy2(repository / "pyproject.toml", folder)
    return Source(folder)


def references(source: Source) -> dict[str, str]:
    """Return the full reference of each image, its tag a digest of what goes in."""
    home = os.environ.get("REGISTRY") or REGISTRY
    return {kind: f"{home}/kubetune-{kind}:{source.tag(kind)}" for kind in CODE}


def add_steps(plan: Plan, layout: Layout) -> None:
    """Add the steps that end with both images pushed; they follow the virtual environment, which fills uv's cache."""
    source = take_source(layout)
    wanted = references(source)
    if not os.environ.get("REGISTRY"):
        plan.add("registry", lambda: ensure_registry(layout), after=("system packages",))
    plan.add("base image", lambda: ensure_base(layout, wanted), after=("system packages", "registry"))
    for kind in CODE:
        plan.add(f"{kind} image", builder(layout, source, kind), after=("base image", "virtual environment"))
    plan.add("image references", lambda: note(layout, wanted), after=tuple(f"{kind} image" for kind in CODE))


def add_pull(plan: Plan, layout: Layout) -> None:
    """Add the step that gives the node the images; the first pod would else wait for torch's layer to be unpacked."""
    if not os.environ.get("REGISTRY"):
        plan.add("images on the node", lambda: pull(layout), after=("image references", "containerd"))
    before = ("image references", "images on the node")
    plan.add("old images removed", lambda: remove_old(layout), after=before)


def pull(layout: Layout) -> str:
    """Pull the images into the node's containerd, if it runs."""
    if not node.containerd_answers(layout):
        return "no node runs"
    there = (node.ctr(layout, "images", "ls", "-q") or "").split()
    missing = [name for name in json.loads(layout.images.read_text()).values() if name not in there]
    for reference in missing:
        node.ctr(layout, "images", "pull", "--plain-http", "--snapshotter", "overlayfs", reference)
    return "pulled" if missing else "already there"


def remove_old(layout: Layout) -> str:
    """Remove earlier versions here and on the node: another torch takes 5 GB in each. Shared layers stay."""
    wanted = json.loads(layout.images.read_text()).values()
    kept = {base_image(), *(f"localhost/{name.rpartition('/')[2]}" for name in wanted)}
    built = buildah(layout, "images", "--format", "{{.Name}}:{{.Tag}}").split()
    old = [name for name in built if name.startswith("localhost/kubetune-") and name not in kept]
    for name in old:
        buildah(layout, "rmi", name)
    stale = old_on_node(layout, set(wanted)) if node.containerd_answers(layout) else []
    for name in stale:
        node.ctr(layout, "images", "rm", name)
    return f"{len(old)} here, {len(stale)} on the node"


def old_on_node(layout: Layout, wanted: set[str]) -> list[str]:
    """Return the node's references to earlier versions that no container uses.

    The kubelet's side of containerd keeps a second reference by digest for each image, which would hold the layers.
    """
    used = {word for line in (node.ctr(layout, "containers", "ls") or "").splitlines() for word in line.split()}
    lines = [line.split() for line in (node.ctr(layout, "images", "ls") or "").splitlines()[1:]]
    return superseded({words[0]: words[2] for words in lines}, wanted | used)


def superseded(digests: dict[str, str], kept: set[str]) -> list[str]:
    """Return the references to drop, given each reference's digest: ours that are not kept, and ids of nothing kept."""
    ours = [name for name in digests if "/kubetune-" in name and name not in kept]
    needed = {digest for name, digest in digests.items() if name not in ours and not name.startswith("sha256:")}
    ours = [name for name in ours if "@" not in name or digests[name] not in needed]
    return [*ours, *(name for name in digests if name.startswith("sha256:") and digests[name] not in needed)]


def builder(layout: Layout, source: Source, kind: str) -> Callable[[], str | None]:
    """Return the step that builds and pushes one image."""
    return lambda: ensure_image(layout, source, kind)


def ensure_registry(layout: Layout) -> str:
    """Start the local registry; it may run while the node does not."""
    write_if_changed(layout.state / "registry.yaml", node.registry_config(layout))
    return ensure(layout, node.registry(layout))


def note(layout: Layout, wanted: dict[str, str]) -> str:
    """Write the references where tests and the demo read them."""
    write_if_changed(layout.images, json.dumps(wanted, indent=2) + "\n")
    return f"in {layout.images}"


def buildah(layout: Layout, *argv: object, log: Path | None = None, cwd: Path | None = None) -> str:
    """Run buildah on a storage of our own, so that the cache can be removed whole."""
    storage = ["--root", layout.image_storage, "--runroot", IMAGE_RUN, "--storage-driver", "overlay"]
    return run(["buildah", *storage, *argv], log=log, cwd=cwd).stdout


def has_image(layout: Layout, name: str) -> bool:
    """Say whether our storage has an image."""
    return bool(buildah(layout, "images", "--quiet", "--filter", f"reference={name}").strip())


def base_tag() -> str:
    """Return the tag of the base image: a digest of how it is made."""
    recipe = "|".join((SUITE, BASE_PACKAGES, *NOT_NEEDED, platform.machine()))
    return hashlib.sha256(recipe.encode()).hexdigest()[:16]


def base_image() -> str:
    """Return the name of the base image."""
    return f"localhost/kubetune-base:{base_tag()}"


def ensure_base(layout: Layout, wanted: dict[str, str]) -> str:
    """Make a Debian with Python from packages, unless it is cached or both images are pushed already."""
    if all(pushed(reference) for reference in wanted.values()):
        return "not needed"
    buildah(layout, "rm", "--all")  # the containers and mounts of builds that were killed
    if has_image(layout, base_image()):
        return "already there"
    folder, log = layout.cache / "base", layout.log / "base-image.log"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    root = folder / "root"
    run(["debootstrap", "--variant=minbase", f"--include={BASE_PACKAGES}", SUITE, root, *mirror()], log=log)
    for name in NOT_NEEDED:
        shutil.rmtree(root / name, ignore_errors=True)
    # `mkdir` again: apt inside the build wants its list folder.
    (root / "var/lib/apt/lists/partial").mkdir(parents=True)
    run(["tar", "--create", "--file", folder / "root.tar", "--directory", root, "."])
    (folder / "Dockerfile").write_text("FROM scratch\nADD root.tar /\n")
    buildah(layout, "bud", "--tag", base_image(), folder, log=log)
    shutil.rmtree(folder)
    return "made"


def mirror() -> list[str]:
    """Return the mirror that this machine's apt uses for the suite, if it uses one; else debootstrap's own choice."""
    listed = run(["apt-get", "indextargets", "--format", "$(SITE) $(CODENAME)", "Created-By: Packages"], check=False)
    sites = [line.split()[0] for line in listed.stdout.splitlines() if line.split()[1:] == [SUITE]]
    return sites[:1]


def ensure_image(layout: Layout, source: Source, kind: str) -> str:
    """Build an image and push it, unless the registry has it; unchanged layers come from buildah's cache."""
    reference = references(source)[kind]
    if pushed(reference):
        return "already pushed"
    log = layout.log / f"{kind}-image.log"
    name = f"localhost/kubetune-{kind}:{reference.rpartition(':')[2]}"
    arguments = [*build_arguments(), "--file", source.dockerfile(kind), "--tag", name, source.folder]
    buildah(layout, "bud", "--isolation", "chroot", "--network", "host", "--layers", *arguments, log=log)
    # zstd at its lowest level: torch's layer takes 96 s on two cores, gzip several minutes.
    fast = ["--compression-format", "zstd", "--compression-level", "1"]
    buildah(layout, "push", *fast, verification(reference), name, f"docker://{reference}", log=log)
    return "built and pushed"


def build_arguments() -> list[str]:
    """Return arguments that give the build this machine's base image, uv cache and certificates."""
    cache = Path(run(["uv", "cache", "dir"]).stdout.strip()) if which("uv") else Path.home() / ".cache" / "uv"
    cache.mkdir(parents=True, exist_ok=True)
    arguments = ["--build-arg", f"BASE_IMAGE={base_image()}"]
    arguments += ["--volume", f"{cache}:/host-uv-cache", "--build-arg", "UV_CACHE_DIR=/host-uv-cache"]
    if bundle := os.environ.get("SSL_CERT_FILE"):
        arguments += ["--volume", f"{bundle}:{bundle}:ro", "--build-arg", f"SSL_CERT_FILE={bundle}"]
    return arguments


def pushed(reference: str) -> bool:
    """Say whether the registry has an image."""
    found = run(["skopeo", "inspect", "--raw", verification(reference), f"docker://{reference}"], check=False)
    return found.returncode == 0


def verification(reference: str) -> str:
    """Return the flag for plain HTTP, which only a registry on loopback gets."""
    loopback = re.match(r"(127\.|localhost[:/])", reference) is not None
    return f"--tls-verify={'false' if loopback else 'true'}"
