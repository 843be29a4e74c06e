"""A release of the chart on a real API server: install, what the operator may do, upgrade, uninstall."""

import json
import uuid

import pytest
from cluster_tool import REPOSITORY

CHART = str(REPOSITORY / "charts" / "kubetune")
NOWHERE = ["--set-string", "nodeSelector.kubetune-test=nowhere"]
"""No pod of these releases is meant to run: there may be no kubelet, and the image may not exist."""


@pytest.fixture(scope="module")
def ownership(kubectl, crd):
    """What helm wrote on the definition before these tests: other releases of this cluster need it back."""

    def marks():
        metadata = json.loads(kubectl("get", "crd", crd, "--output=json").stdout)["metadata"]
        return {key: metadata.get(key, {}) for key in ("annotations", "labels")}

    before = marks()
    yield
    back = {key: dict.fromkeys(now) | before[key] for key, now in marks().items()}
    kubectl("patch", "crd", crd, "--type=merge", "--patch", json.dumps({"metadata": back}))


@pytest.fixture(scope="module")
def release(helm, kubectl, namespace, ownership):
    """An installed release of a name and a namespace of its own. Nothing waits for its pod: there may be no kubelet."""
    name = f"kubetune-{uuid.uuid4().hex[:6]}"
    installed = helm("install", name, CHART, "--namespace", namespace, "--take-ownership", *NOWHERE)
    assert installed.returncode == 0, installed.stderr
    assert "would violate PodSecurity" not in installed.stderr
    yield name
    helm("uninstall", name, "--namespace", namespace, "--ignore-not-found")


def objects_of(kubectl, release, namespace):
    """Every object of the release, in whatever namespace, as kind/name."""
    kinds = (
        "serviceaccounts,secrets,services,deployments,roles,rolebindings,clusterroles,clusterrolebindings,"
        "customresourcedefinitions,poddisruptionbudgets"
    )
    label = f"app.kubernetes.io/instance={release}"
    found = kubectl("get", kinds, "--all-namespaces", "--selector", label, "--output=name")
    return sorted(line.replace(release, "R").replace(namespace, "N") for line in found.stdout.split())


RELEASED = [
    "clusterrole.rbac.authorization.k8s.io/R-N",
    "clusterrole.rbac.authorization.k8s.io/R-N-admin",
    "clusterrole.rbac.authorization.k8s.io/R-N-edit",
    "clusterrole.rbac.authorization.k8s.io/R-N-tokens",
    "clusterrole.rbac.authorization.k8s.io/R-N-view",
    "clusterrolebinding.rbac.authorization.k8s.io/R-N",
    "clusterrolebinding.rbac.authorization.k8s.io/R-N-tokens",
    "customresourcedefinition.apiextensions.k8s.io/finetunejobs.kubetune.io",
    "deployment.apps/R",
    "poddisruptionbudget.policy/R",
    "role.rbac.authorization.k8s.io/R-lease",
    "rolebinding.rbac.authorization.k8s.io/R-lease",
    "secret/R-progress-tls",
    "service/R-metrics",
    "service/R-progress",
    "serviceaccount/R",
]


def test_an_installed_release_has_these_objects(kubectl, release, namespace):
    assert objects_of(kubectl, release, namespace) == RELEASED


ALLOWED = [
    *[(verb, "finetunejobs.kubetune.io") for verb in ("get", "list", "watch", "delete")],
    ("patch", "finetunejobs.kubetune.io/status"),
    *[(verb, "jobs.batch") for verb in ("get", "list", "watch", "create", "patch", "delete")],
    *[(verb, "pods") for verb in ("list", "watch")],
    *[(verb, kind) for kind in ("services", "configmaps") for verb in ("get", "create", "patch", "delete")],
    *[(verb, "events") for verb in ("list", "create", "patch")],
    ("create", "tokenreviews.authentication.k8s.io"),
]
DENIED = [
    *[(verb, "secrets") for verb in ("get", "list", "watch", "create")],
    *[(verb, "finetunejobs.kubetune.io") for verb in ("create", "update", "patch", "deletecollection")],
    *[(verb, "pods") for verb in ("create", "delete", "patch")],
    ("create", "pods/exec"),
    ("list", "configmaps"),
    ("list", "services"),
    ("get", "nodes"),
    ("get", "persistentvolumeclaims"),
    ("create", "serviceaccounts/token"),
    ("impersonate", "users"),
    ("create", "clusterrolebindings.rbac.authorization.k8s.io"),
    ("patch", "customresourcedefinitions.apiextensions.k8s.io"),
]


def reviews(subject, pairs, namespace, name):
    """One SubjectAccessReview for each verb and resource, as a List that one request creates."""
    return [
        {
            "apiVersion": "authorization.k8s.io/v1",
            "kind": "SubjectAccessReview",
            "spec": {
                "user": subject,
                "resourceAttributes": {"namespace": namespace, "name": name, "verb": verb, **split(resource)},
            },
        }
        for verb, resource in pairs
    ]


def split(resource):
    kind, _, sub = resource.partition("/")
    name, _, group = kind.partition(".")
    return {"resource": name, "group": group, **({"subresource": sub} if sub else {})}


def may(kubectl, subject, pairs, namespace="team", name=""):
    """Which of the pairs the subject may do."""
    documents = "\n---\n".join(json.dumps(review) for review in reviews(subject, pairs, namespace, name))
    answer = kubectl("create", "-f", "-", '--output=jsonpath={.status.allowed}{"\\n"}', stdin=documents)
    assert answer.returncode == 0, answer.stderr
    verdicts = answer.stdout.split()
    assert len(verdicts) == len(pairs)
    return [pair for pair, verdict in zip(pairs, verdicts, strict=True) if verdict == "true"]


def test_the_operator_may_do_what_it_does_and_no_more(kubectl, release, namespace):
    subject = f"system:serviceaccount:{namespace}:{release}"
    assert may(kubectl, subject, ALLOWED + DENIED) == ALLOWED


LEASE = [(verb, "leases.coordination.k8s.io") for verb in ("create", "get", "watch", "update")]


def test_it_holds_one_lease_in_its_own_namespace_and_sees_no_other(kubectl, release, namespace):
    subject = f"system:serviceaccount:{namespace}:{release}"
    assert may(kubectl, subject, LEASE, namespace, release) == LEASE
    assert may(kubectl, subject, LEASE, namespace, "other") == LEASE[:1]
    assert may(kubectl, subject, LEASE, "team", release) == []


def test_in_one_namespace_it_may_do_nothing_in_another(kubectl, helm, crd, namespace):
    name = f"kubetune-{uuid.uuid4().hex[:6]}"
    options = [*NOWHERE, "--set", f"watchNamespace={namespace},crds.enabled=false,rbac.aggregate=false"]
    assert helm("install", name, CHART, "--namespace", namespace, *options).returncode == 0
    subject = f"system:serviceaccount:{namespace}:{name}"
    assert may(kubectl, subject, ALLOWED) == []
    assert helm("uninstall", name, "--namespace", namespace).returncode == 0
    assert objects_of(kubectl, name, namespace) == []


def rights(text):
    """The lines of `kubectl auth can-i --list` that are about resources, without their widths."""
    lines = (" ".join(line.split()) for line in text.splitlines())
    return {line for line in lines if line and not line.startswith(("[", "$", "Resources"))}


def documented(mode):
    page = (REPOSITORY / "docs" / "rbac.md").read_text()
    return rights(page.split(f"<!-- can-i: {mode} -->\n```\n")[1].split("```")[0])


def granted(kubectl, namespace, name):
    words = ["--as", f"system:serviceaccount:{namespace}:{name}", "--namespace", namespace]
    listed = kubectl("auth", "can-i", "--list", *words).stdout
    return rights(listed.replace(f"[{name}]", "[kubetune]"))


def test_the_page_shows_what_the_operator_may_do(kubectl, release, namespace):
    assert granted(kubectl, namespace, release) == documented("cluster")


def test_the_page_shows_what_it_may_do_in_one_namespace(kubectl, helm, crd, namespace):
    name = f"kubetune-{uuid.uuid4().hex[:6]}"
    options = [*NOWHERE, "--set", f"watchNamespace={namespace},crds.enabled=false,rbac.aggregate=false"]
    assert helm("install", name, CHART, "--namespace", namespace, *options).returncode == 0
    assert granted(kubectl, namespace, name) == documented("namespace")
    assert helm("uninstall", name, "--namespace", namespace).returncode == 0


def test_an_upgrade_keeps_the_certificate_and_changes_the_rest(kubectl, helm, release, namespace):
    secret = ["get", "secret", f"{release}-progress-tls", "--namespace", namespace, "--output=jsonpath={.data}"]
    before = kubectl(*secret).stdout
    options = ["--reuse-values", "--set", "settings.logLevel=DEBUG"]
    upgraded = helm("upgrade", release, CHART, "--namespace", namespace, *options)
    assert upgraded.returncode == 0, upgraded.stderr
    assert kubectl(*secret).stdout == before
    path = "--output=jsonpath={.spec.template.spec.containers[0].env[?(@.name=='KUBETUNE_LOG_LEVEL')].value}"
    assert kubectl("get", "deployment", release, "--namespace", namespace, path).stdout == "DEBUG"


def test_the_notes_say_how_to_go_on(helm, release, namespace):
    notes = helm("get", "notes", release, "--namespace", namespace).stdout
    assert "handles FineTuneJobs in all namespaces" in notes
    assert f"kubectl -n {namespace} rollout status deployment/{release}" in notes


def test_uninstalling_leaves_the_definition_with_all_jobs_and_nothing_else(
    kubectl, helm, release, namespace, apply, manifest
):
    assert apply(manifest("survivor")).returncode == 0
    answer = helm("uninstall", release, "--namespace", namespace, "--wait")
    assert answer.returncode == 0, answer.stderr
    left = objects_of(kubectl, release, namespace)
    assert left == ["customresourcedefinition.apiextensions.k8s.io/finetunejobs.kubetune.io"]
    assert kubectl("get", "ftj", "survivor", "--namespace", namespace).returncode == 0
