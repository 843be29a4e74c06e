"""The operator under the account that the chart gives it, in one namespace that enforces `restricted`.

The release is installed by somebody who may do nothing outside that namespace, as a team does on a shared cluster.
"""

import base64
import json
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from cluster_tool import REPOSITORY
from kube import Kube

from kubetune_contract.paths import TOKEN_AUDIENCE
from kubetune_contract.progress import Progress, ProgressReport

pytestmark = pytest.mark.integration
CHART = str(REPOSITORY / "charts" / "kubetune")
ADMIN = f"kubetune-admin-{uuid.uuid4().hex[:8]}"
"""A person who is admin of the test's namespace and nobody elsewhere."""
RELEASE = "kubetune"
REPORT = ProgressReport(progress=Progress(step=5, total_steps=50, epoch=0.1, percentage=10, loss=1.5))


@pytest.fixture(scope="module")
def aggregated(kube: Kube, helm: Any) -> Iterator[None]:
    """What a release for the whole cluster, or its administrator, once adds to the roles view, edit and admin."""
    rendered = helm("template", ADMIN, CHART, "--kube-version=1.35.0", "--show-only=templates/rbac.yaml")
    assert rendered.returncode == 0, rendered.stderr
    roles = [role for role in yaml.safe_load_all(rendered.stdout) if "aggregate" in json.dumps(role["metadata"])]
    assert len(roles) == 3
    kube.kubectl("apply", "-f", "-", stdin="\n---\n".join(map(json.dumps, roles)))
    yield
    kube.kubectl("delete", "clusterroles", *[role["metadata"]["name"] for role in roles])


@pytest.fixture
def login(kube: Kube, helm: Any, aggregated: None, tmp_path: Path) -> Callable[[str], Path]:
    """login(namespace): install the chart there as its admin; the kubeconfig of the operator's account."""

    def install(namespace: str) -> Path:
        kube.kubectl("label", "namespace", namespace, "pod-security.kubernetes.io/enforce=restricted")
        bind = ["create", "rolebinding", "admin", "--clusterrole=admin", f"--user={ADMIN}"]
        kube.kubectl(*bind, "--namespace", namespace)
        until_allowed(kube, namespace)
        values = f"watchNamespace={namespace},crds.enabled=false,rbac.aggregate=false,networkPolicy.enabled=true"
        words = ["install", RELEASE, CHART, "--namespace", namespace, "--set", values, "--kube-as-user", ADMIN]
        installed = helm(*words, "--set-string", "nodeSelector.kubetune-test=nowhere")
        assert installed.returncode == 0, installed.stderr
        token = kube.kubectl("create", "token", RELEASE, "--namespace", namespace, "--duration=1h").strip()
        return kubeconfig(kube, token, tmp_path / "account.kubeconfig")

    return install


def until_allowed(kube: Kube, namespace: str) -> None:
    """The roles are put together within a second or so; there is nothing to watch for a right."""
    deadline = time.monotonic() + 30
    question = ["patch", "finetunejobs.kubetune.io", "--subresource=status", "--as", ADMIN, "--namespace", namespace]
    while "yes" not in kube.kubectl("auth", "can-i", *question, "--quiet=false"):
        assert time.monotonic() < deadline
        time.sleep(0.2)


def kubeconfig(kube: Kube, token: str, path: Path) -> Path:
    """The cluster of the tests' kubeconfig, with another account."""
    known = yaml.safe_load(Path(kube.config).read_text())
    cluster = known["clusters"][0]["cluster"]
    if "certificate-authority" in cluster:
        pem = Path(cluster.pop("certificate-authority")).read_bytes()
        cluster["certificate-authority-data"] = base64.b64encode(pem).decode()
    path.write_text(
        json.dumps(
            {
                "apiVersion": "v1",
                "kind": "Config",
                "clusters": [{"name": "here", "cluster": cluster}],
                "users": [{"name": "operator", "user": {"token": token}}],
                "contexts": [{"name": "here", "context": {"cluster": "here", "user": "operator"}}],
                "current-context": "here",
            }
        )
    )
    return path


def test_a_job_lives_its_whole_life_under_rights_of_one_namespace(drill, login, tls, post):
    drill = drill(login=login, progress_auth="KeySet", **tls)
    pods = drill.running("mine")
    bound = ["--bound-object-kind=Pod", f"--bound-object-name={pods[0]['metadata']['name']}"]
    token = drill.kubectl("create", "token", "default", f"--audience={TOKEN_AUDIENCE}", *bound).strip()
    path = f"/v1/progress/{drill.namespace}/mine/1"
    assert post(tls, path, token, REPORT) == 204
    drill.until("mine", lambda status: status.get("progress", {}).get("step") == 5)
    drill.ends(pods[0], 0, drill.done)
    drill.ends(pods[1], 0)
    drill.until_state("mine", "Succeeded")
    events = drill.kubectl("get", "events", "--field-selector=involvedObject.kind=FineTuneJob", "-o", "name")
    assert events  # it may post them


def rights(kube: Kube, account: str, namespace: str) -> set[str]:
    """What `kubectl auth can-i --list` prints, without its columns' widths."""
    words = ["auth", "can-i", "--list", "--no-headers", "--as", account, "--namespace", namespace]
    return {" ".join(line.split()) for line in kube.kubectl(*words).splitlines()}


def test_its_account_may_do_nothing_outside_and_reads_no_secret(drill, login, kube):
    namespace = drill(login=login).namespace
    account = f"system:serviceaccount:{namespace}:{RELEASE}"
    everybody = rights(kube, "system:serviceaccount:nowhere:nobody", "default")
    assert rights(kube, account, "default") == everybody
    own = rights(kube, account, namespace) - everybody
    assert "finetunejobs.kubetune.io/status [] [] [patch]" in own
    assert not [line for line in own if line.startswith("secrets") or "*" in line]
