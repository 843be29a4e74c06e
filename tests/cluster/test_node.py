"""Configuration files that their programs can read, and certificates that verify."""

from __future__ import annotations

import base64
import http.server
import os
import subprocess
import threading
import tomllib
from collections.abc import Iterator
from pathlib import Path

import node
import pki
import pytest
import yaml
from layout import DNS_ADDRESS, NODE_ADDRESS, PAUSE_IMAGE, Layout
from shell import http_text, which, write_if_changed


@pytest.fixture(scope="module")
def certified(tmp_path_factory: pytest.TempPathFactory) -> Layout:
    """A layout whose certificates were made once for this file: keys take a second each."""
    if which("openssl") is None:
        pytest.skip("needs openssl, which `make setup` installs")
    folder = tmp_path_factory.mktemp("certified")
    layout = Layout(state=folder / "kubetune", cache=folder / "cache" / "kubetune")
    layout.state.mkdir()
    pki.ensure_pki(layout)
    return layout


def openssl(*words: object) -> str:
    return subprocess.run(["openssl", *map(str, words)], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("name", pki.CERTIFICATES)
def test_every_certificate_verifies_and_says_who_it_is(certified: Layout, name: str) -> None:
    path = certified.pki / f"{name}.crt"
    assert openssl("verify", "-CAfile", certified.pki / "ca.crt", path).endswith("OK\n")
    subject = openssl("x509", "-in", path, "-noout", "-subject", "-nameopt", "compat").strip()
    assert subject.endswith(pki.CERTIFICATES[name][0])


def test_the_api_server_is_certified_for_every_name_it_is_called_by(certified: Layout) -> None:
    names = openssl("x509", "-in", certified.pki / "apiserver.crt", "-noout", "-ext", "subjectAltName")
    for name in ("127.0.0.1", "10.96.0.1", NODE_ADDRESS, "DNS:kubernetes.default.svc", "DNS:localhost"):
        assert name in names


def test_a_kubeconfig_works_wherever_it_is_copied(certified: Layout) -> None:
    config = yaml.safe_load(certified.admin_kubeconfig.read_text())
    user, cluster = config["users"][0]["user"], config["clusters"][0]["cluster"]
    assert base64.b64decode(user["client-certificate-data"]) == (certified.pki / "admin.crt").read_bytes()
    assert base64.b64decode(cluster["certificate-authority-data"]) == (certified.pki / "ca.crt").read_bytes()
    assert str(certified.state) not in certified.admin_kubeconfig.read_text()
    assert config["current-context"] == config["contexts"][0]["name"]


def test_keys_are_for_their_owner_only(certified: Layout) -> None:
    assert certified.pki.stat().st_mode & 0o077 == 0
    assert certified.admin_kubeconfig.stat().st_mode & 0o077 == 0


def test_certificates_stay_when_they_are_whole(certified: Layout) -> None:
    before = (certified.pki / "admin.crt").read_bytes()
    pki.ensure_pki(certified)
    assert (certified.pki / "admin.crt").read_bytes() == before


@pytest.mark.usefixtures("certified")  # it skips without openssl
def test_half_made_certificates_are_made_again(layout: Layout) -> None:
    draft = layout.state / "pki.new"
    draft.mkdir(parents=True)
    (draft / "ca.crt").write_text("half")
    pki.ensure_pki(layout)
    assert openssl("verify", "-CAfile", layout.pki / "ca.crt", layout.pki / "kubelet.crt").endswith("OK\n")
    assert not draft.exists()


def test_a_lost_kubeconfig_comes_back(certified: Layout) -> None:
    certified.admin_kubeconfig.unlink()
    pki.ensure_pki(certified)
    assert certified.admin_kubeconfig.exists()


def test_containerds_configuration_keeps_out_of_the_systems_folders(layout: Layout) -> None:
    config = tomllib.loads(node.containerd_config(layout))
    cri = config["plugins"]["io.containerd.grpc.v1.cri"]
    assert cri["sandbox_image"] == PAUSE_IMAGE
    assert cri["restrict_oom_score_adj"] is True
    paths = [config["root"], config["state"], config["grpc"]["address"], cri["cni"]["conf_dir"]]
    assert all(path.startswith((str(layout.state), str(layout.cache))) for path in paths)


def test_the_kubelet_accepts_both_versions_of_control_groups_and_our_dns(layout: Layout) -> None:
    config = yaml.safe_load(node.kubelet_config(layout))
    assert config["failCgroupV1"] is False
    assert config["clusterDNS"] == [DNS_ADDRESS]
    assert config["authentication"]["anonymous"] == {"enabled": False}


def test_pods_have_no_way_out_of_this_machine(layout: Layout) -> None:
    bridge = node.cni_config(layout)["plugins"][0]  # type: ignore[index]
    assert bridge["ipMasq"] is False
    assert "forward" not in node.corefile(layout)


def test_the_registry_listens_on_loopback_and_stores_in_the_cache(layout: Layout) -> None:
    config = yaml.safe_load(node.registry_config(layout))
    assert config["http"]["addr"].startswith("127.0.0.1:")
    assert config["storage"]["filesystem"]["rootdirectory"] == f"{layout.cache}/registry"


def test_writing_configuration_again_changes_nothing(layout: Layout) -> None:
    node.write_configuration(layout)
    files = {path: path.stat().st_mtime_ns for path in layout.state.rglob("*") if path.is_file()}
    node.write_configuration(layout)
    assert files == {path: path.stat().st_mtime_ns for path in layout.state.rglob("*") if path.is_file()}


def test_no_two_components_share_a_port_or_a_program(layout: Layout) -> None:
    parts = list(node.components(layout).values())
    ports = [port for part in parts for port in part.ports]
    assert len(ports) == len(set(ports))
    assert len({part.argv[0:2] for part in parts}) == len(parts)


def test_every_component_names_a_folder_of_this_cluster_so_that_down_finds_it(layout: Layout) -> None:
    for part in node.components(layout).values():
        assert any(f"{layout.state}/" in word or f"{layout.cache}/" in word for word in part.argv), part.name


def test_components_do_not_see_the_callers_proxies(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", "http://proxy.example:3128")
    for part in node.components(layout).values():
        assert set(part.environment) == {"PATH", "HOME"}


class Health(http.server.BaseHTTPRequestHandler):
    """Answers /healthz with ok and everything else with 503."""

    def do_GET(self) -> None:
        good = self.path == "/healthz"
        self.send_response(200 if good else 503)
        self.end_headers()
        self.wfile.write(b"ok" if good else b"etcd failed")

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def health() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Health) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_health_is_what_the_endpoint_says(health: str) -> None:
    assert node.answers(f"{health}/healthz", "ok")()
    assert not node.answers(f"{health}/healthz", "something else")()
    assert not node.answers(f"{health}/readyz")()
    assert http_text("http://127.0.0.1:1/healthz") is None


def test_containerd_without_a_socket_is_not_healthy_at_once(layout: Layout) -> None:
    assert not node.containerd_answers(layout)


def test_the_word_of_an_earlier_volumes_process_does_not_count(layout: Layout) -> None:
    layout.run.mkdir(parents=True)
    assert not node.volumes_ready(layout)
    (layout.run / "volumes.ready").write_text(str(os.getpid()))
    assert not node.volumes_ready(layout)


def test_a_file_is_written_whole_and_only_when_it_changes(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "config"
    assert write_if_changed(path, "one", mode=0o600)
    assert not write_if_changed(path, "one")
    assert path.stat().st_mode & 0o777 == 0o600
    assert write_if_changed(path, "two")
    assert [it.name for it in path.parent.iterdir()] == ["config"]


def test_system_programs_are_found_without_sbin_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/usr/bin")
    found = which("ldconfig")  # lives in sbin on every Debian
    assert found is not None
    assert "/sbin/" in found
