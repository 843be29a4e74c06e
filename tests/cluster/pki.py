"""The cluster's certificate authority, certificates and kubeconfigs, made with openssl."""

from __future__ import annotations

import base64
import shutil
from pathlib import Path

from layout import API_PORT, API_SERVICE_ADDRESS, CLUSTER_NAME, NODE, NODE_ADDRESS, Layout
from shell import give_to_caller, run, write_if_changed

DAYS = "3650"
API_NAMES = (
    f"IP:127.0.0.1,IP:{API_SERVICE_ADDRESS},IP:{NODE_ADDRESS},"
    "DNS:localhost,DNS:kubernetes,DNS:kubernetes.default,DNS:kubernetes.default.svc"
)
# name: (subject, alternative names); the subject is what RBAC knows the client as.
CERTIFICATES = {
    "apiserver": ("/CN=kube-apiserver", API_NAMES),
    "admin": ("/O=system:masters/CN=admin", ""),
    "kubelet": (f"/O=system:nodes/CN=system:node:{NODE}", f"DNS:{NODE},IP:{NODE_ADDRESS}"),
    "controller-manager": ("/CN=system:kube-controller-manager", ""),
    "scheduler": ("/CN=system:kube-scheduler", ""),
    "proxy": ("/CN=system:kube-proxy", ""),
}
CLIENTS = [name for name in CERTIFICATES if name != "apiserver"]


def ensure_pki(layout: Layout) -> None:
    """Make all keys and certificates, or none: a folder that is there was finished, because the rename comes last."""
    if not layout.pki.is_dir():
        draft = layout.pki.with_name("pki.new")
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True, mode=0o700)
        make_authority(draft)
        for name, (subject, names) in CERTIFICATES.items():
            make_certificate(draft, name, subject, names)
        draft.rename(layout.pki)
    for name in CLIENTS:
        write_if_changed(layout.state / f"{name}.kubeconfig", kubeconfig(layout, name), mode=0o600)
    give_to_caller(layout.admin_kubeconfig)


def make_authority(folder: Path) -> None:
    """Make the certificate authority and the key that signs service-account tokens."""
    key, certificate = folder / "ca.key", folder / "ca.crt"
    new = ("-newkey", "rsa:2048", "-nodes", "-subj", f"/CN={CLUSTER_NAME}-ca")
    run(["openssl", "req", "-x509", "-days", DAYS, *new, "-keyout", key, "-out", certificate])
    run(["openssl", "genrsa", "-out", folder / "sa.key", "2048"])


def make_certificate(folder: Path, name: str, subject: str, names: str) -> None:
    """Make one key and a certificate for it that serves as server's and as client's."""
    key, request, certificate = (folder / f"{name}.{end}" for end in ("key", "csr", "crt"))
    extensions = folder / f"{name}.ext"
    extensions.write_text("extendedKeyUsage=serverAuth,clientAuth\n" + (f"subjectAltName={names}\n" if names else ""))
    run(["openssl", "req", "-newkey", "rsa:2048", "-nodes", "-subj", subject, "-keyout", key, "-out", request])
    signer = ("-CA", folder / "ca.crt", "-CAkey", folder / "ca.key", "-CAcreateserial")
    run(
        ["openssl", "x509", "-req", *signer, "-days", DAYS, "-extfile", extensions, "-in", request, "-out", certificate]
    )


def kubeconfig(layout: Layout, name: str) -> str:
    """Return a kubeconfig with the certificates inside, so that the file works wherever it is copied."""
    data = {
        key: base64.b64encode((layout.pki / path).read_bytes()).decode()
        for key, path in {"ca": "ca.crt", "certificate": f"{name}.crt", "key": f"{name}.key"}.items()
    }
    return f"""apiVersion: v1
kind: Config
clusters:
- name: {CLUSTER_NAME}
  cluster: {{server: "https://127.0.0.1:{API_PORT}", certificate-authority-data: {data["ca"]}}}
users:
- name: {name}
  user: {{client-certificate-data: {data["certificate"]}, client-key-data: {data["key"]}}}
contexts:
- name: {CLUSTER_NAME}
  context: {{cluster: {CLUSTER_NAME}, user: {name}}}
current-context: {CLUSTER_NAME}
"""
