"""Pods reach each other and the API server through service addresses, under a strict cluster's security settings."""

from __future__ import annotations

import json
import subprocess
import uuid
from collections.abc import Iterator

import pytest
from layout import default_layout
from start import external_context

LAYOUT = default_layout()
pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(
        external_context() is not None, reason="KUBE_CONTEXT: another cluster's network is not ours to test"
    ),
]

ASK = """
import socket, time, urllib.request
for _ in range(100):  # kube-proxy writes its rules up to a second after the pod is Ready
    try:
        print(urllib.request.urlopen('http://front', timeout=5).status)
        break
    except OSError:
        time.sleep(0.2)
socket.create_connection((socket.gethostbyname('kubernetes.default'), 443), 5)
try:
    socket.gethostbyname('example.org')
except OSError:
    print('no way out')
"""
PODS = """
apiVersion: v1
kind: Service
metadata: {{name: front}}
spec: {{selector: {{app: web}}, ports: [{{port: 80, targetPort: 8080}}]}}
---
apiVersion: v1
kind: Pod
metadata: {{name: web, labels: {{app: web}}}}
spec:
  terminationGracePeriodSeconds: 0
  automountServiceAccountToken: false
  securityContext: {{runAsNonRoot: true, seccompProfile: {{type: RuntimeDefault}}}}
  containers:
  - name: main
    image: {image}
    command: [python, -m, http.server, --directory, /opt, "8080"]
    readinessProbe: {{httpGet: {{port: 8080}}, periodSeconds: 1}}
    securityContext: {{readOnlyRootFilesystem: true, allowPrivilegeEscalation: false, capabilities: {{drop: [ALL]}}}}
"""


def kubectl(namespace: str, *argv: str, stdin: str | None = None) -> str:
    words = [str(LAYOUT.bin / "kubectl"), "--kubeconfig", str(LAYOUT.admin_kubeconfig), "--namespace", namespace, *argv]
    done = subprocess.run(words, input=stdin, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def namespace() -> Iterator[str]:
    name = f"network-{uuid.uuid4().hex[:8]}"
    kubectl(name, "create", "namespace", name)
    yield name
    kubectl(name, "delete", "namespace", name, "--wait=false")


def test_a_pod_reaches_itself_and_the_api_server_through_services_but_nothing_outside(namespace: str) -> None:
    image = json.loads(LAYOUT.images.read_text())["operator"]
    kubectl(namespace, "apply", "--filename", "-", stdin=PODS.format(image=image))
    kubectl(namespace, "wait", "--for=condition=Ready", "pod/web", "--timeout=120s")
    assert kubectl(namespace, "exec", "web", "--", "python", "-c", ASK).split("\n")[:2] == ["200", "no way out"]
    assert kubectl(namespace, "exec", "web", "--", "id").startswith("uid=65532(kubetune) gid=65532(kubetune)")
    assert "GET / HTTP" in kubectl(namespace, "logs", "web")
