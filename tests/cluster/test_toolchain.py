"""What a fresh machine lacks is told, built once, and never half."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from pathlib import Path

import pytest
import toolchain
from layout import HERE, PAUSE_IMAGE, Layout
from shell import ClusterError


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of what the binaries are built from."""
    folder = tmp_path / "sources"
    for name in toolchain.SOURCES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes((HERE / name).read_bytes())
    monkeypatch.setattr(toolchain, "HERE", folder)
    return folder


def test_a_second_clone_has_the_same_key(sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copied = toolchain.content_key()
    monkeypatch.setattr(toolchain, "HERE", HERE)
    assert toolchain.content_key() == copied


@pytest.mark.parametrize("name", toolchain.SOURCES)
def test_every_source_changes_the_key(sources: Path, name: str) -> None:
    before = toolchain.content_key()
    (sources / name).write_text((sources / name).read_text() + "// changed\n")
    assert toolchain.content_key() != before


@pytest.mark.usefixtures("sources")
def test_the_key_depends_on_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    before = toolchain.content_key()
    monkeypatch.setattr(toolchain.platform, "machine", lambda: "riscv64")
    assert toolchain.content_key() != before


def test_binaries_are_built_once_and_linked(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    builds: list[Path] = []

    def build(_: Layout, target: Path) -> None:
        builds.append(target)
        (target / "helm").touch()

    monkeypatch.setattr(toolchain, "go_build", build)
    assert toolchain.ensure_binaries(layout) == "built"
    assert toolchain.ensure_binaries(layout) == "already there"
    assert len(builds) == 1
    assert (layout.bin / "helm").resolve() == layout.cache / "bin" / toolchain.content_key() / "helm"


def test_a_build_that_was_cut_off_is_not_taken_for_a_good_one(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    def cut_off(_: Layout, target: Path) -> None:
        (target / "kubelet").write_text("half")
        raise KeyboardInterrupt

    def build(_: Layout, target: Path) -> None:
        assert list(target.iterdir()) == []
        (target / "kubelet").write_text("whole")

    monkeypatch.setattr(toolchain, "go_build", cut_off)
    with pytest.raises(KeyboardInterrupt):
        toolchain.ensure_binaries(layout)
    assert not layout.bin.exists()
    monkeypatch.setattr(toolchain, "go_build", build)
    toolchain.ensure_binaries(layout)
    assert (layout.bin / "kubelet").read_text() == "whole"


def test_another_version_moves_the_link(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        toolchain.link(tmp_path / "bin", tmp_path / name)
    assert (tmp_path / "bin").resolve() == tmp_path / "two"


def test_packages_are_asked_for_by_the_program_they_bring() -> None:
    programs = {
        "sh": "dash",
        "no-such-program": "one",
        "/no/such/file": "two",
        "/proc/version": "three",
        "nor-this": "one",
    }
    assert toolchain.missing_packages(programs) == ["one", "two"]


def test_missing_packages_on_a_system_without_apt_are_named(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolchain, "which", lambda _: None)
    with pytest.raises(ClusterError, match=r"missing and there is no apt-get here: buildah skopeo"):
        toolchain.install_packages(layout, {"buildah": "buildah", "skopeo": "skopeo"})


def test_nothing_is_installed_when_all_is_there(layout: Layout) -> None:
    assert toolchain.install_packages(layout, {"sh": "dash"}) == "already there"


def test_services_are_held_back_only_while_apt_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = tmp_path / "policy-rc.d"
    monkeypatch.setattr(toolchain, "POLICY", policy)
    with toolchain.services_held_back([]):
        assert policy.read_text() == "#!/bin/sh\nexit 101\n"
        assert policy.stat().st_mode & 0o111
    assert not policy.exists()


def test_a_policy_of_the_machine_itself_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = tmp_path / "policy-rc.d"
    policy.write_text("its own")
    monkeypatch.setattr(toolchain, "POLICY", policy)
    with toolchain.services_held_back([]):
        assert policy.read_text() == "its own"
    assert policy.read_text() == "its own"


def fake_go(folder: Path, answer: str) -> Path:
    """Put a program named go in a folder that answers `go version`."""
    go = folder / "go"
    go.write_text(f"#!/bin/sh\necho '{answer}'\n")
    go.chmod(0o755)
    return go


@pytest.mark.parametrize("version", ["go1.21.0", "go1.25.3", "go1.26.8"])
def test_a_go_that_can_fetch_its_toolchain_will_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    go = fake_go(tmp_path, f"go version {version} linux/amd64")
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert toolchain.find_go() == str(go)


def test_an_old_go_is_refused_by_its_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_go(tmp_path, "go version go1.19.8 linux/amd64")  # Debian 12's own
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(ClusterError, match=r"is Go 1\.19: install Go 1\.25 or newer"):
        toolchain.find_go()


def test_without_go_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolchain.shutil, "which", lambda *_, **__: None)
    with pytest.raises(ClusterError, match=r"Go is not on PATH.*install Go 1\.25 or newer"):
        toolchain.find_go()


def test_the_version_in_go_mod_is_the_one_that_the_programs_report() -> None:
    flags = toolchain.version_flags("require (\n\tk8s.io/kubernetes v1.35.4\n)\n")
    assert "-X k8s.io/component-base/version.gitVersion=v1.35.4" in flags
    assert "-X k8s.io/client-go/pkg/version.gitMinor=35" in flags


def test_a_go_mod_without_kubernetes_is_refused() -> None:
    with pytest.raises(ClusterError, match=r"go\.mod names no version of k8s\.io/kubernetes"):
        toolchain.version_flags("module x\n")


def test_every_built_package_is_a_tool_of_the_module_or_ours() -> None:
    go_mod = (HERE / "go.mod").read_text()
    for package in toolchain.GO_PACKAGES.values():
        assert package.startswith("./") or f"\t{package}\n" in go_mod


def test_the_sandbox_image_is_one_layer_whose_digest_matches() -> None:
    archive = toolchain.pause_archive(b"program")
    with tarfile.open(fileobj=io.BytesIO(archive)) as outer:
        files = {name: outer.extractfile(name).read() for name in outer.getnames()}  # type: ignore[union-attr]
    manifest, config = json.loads(files["manifest.json"])[0], json.loads(files["config.json"])
    assert manifest["RepoTags"] == [PAUSE_IMAGE]
    assert config["rootfs"]["diff_ids"] == [f"sha256:{hashlib.sha256(files['layer.tar']).hexdigest()}"]
    with tarfile.open(fileobj=io.BytesIO(files["layer.tar"])) as layer:
        member = layer.getmember("pause")
        assert member.mode == 0o755
        assert layer.extractfile(member).read() == b"program"  # type: ignore[union-attr]
