"""A real API server, kubectl and helm. Nothing is skipped: without a cluster every test fails and says what to do."""

import json
import uuid
from collections.abc import Callable, Iterator
from functools import cache
from subprocess import CompletedProcess
from typing import Any

import pytest
import yaml
from cluster_tool import REPOSITORY, ClusterError, default_layout, run
from kube import Kube
from tests.integration.chart import CHART, KUBERNETES, Objects

from kubetune_operator import api
from kubetune_operator.names import OPERATOR_LABEL

Object = dict[str, Any]
Command = Callable[..., CompletedProcess[str]]
"""kubectl("get", "ftj", stdin=None): runs it to its end and returns code, stdout and stderr as they are."""

HINT = "the integration tests need the API server of the embedded cluster: run `make cluster-up`"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything in this folder needs the API server."""
    for item in items:
        if item.path.parent == REPOSITORY / "tests" / "integration":
            item.add_marker(pytest.mark.integration)


@pytest.fixture(scope="session")
def kube() -> Kube:
    """The cluster that answers."""
    try:
        found = Kube(default_layout())
    except ClusterError as error:
        told = str(error).partition(":")[0]  # the rest is for the demo
    else:
        answer = run([*found.words(), "get", "--raw=/readyz", "--request-timeout=10s"], check=False)
        if answer.returncode == 0:
            return found
        told = f"{found.config}: {answer.stderr.strip()}"
    pytest.fail(f"{told}\n{HINT}", pytrace=False)


@pytest.fixture(scope="session")
def kubectl(kube: Kube) -> Command:
    """kubectl on the cluster, without a namespace of its own."""

    def command(*words: str, stdin: Object | str | None = None) -> CompletedProcess[str]:
        text = json.dumps(stdin) if isinstance(stdin, dict) else stdin
        return run([*kube.words(), *words], stdin=text, check=False)

    return command


@pytest.fixture(scope="session")
def helm(kube: Kube) -> Command:
    """helm on the cluster, without a namespace of its own."""

    def command(*words: str, stdin: str | None = None) -> CompletedProcess[str]:
        return run([kube.helm_program, "--kubeconfig", kube.config, *words], stdin=stdin, check=False)

    return command


@pytest.fixture(scope="session")
def render(helm: Command) -> Callable[..., Objects]:
    """render(values): what `helm template` makes of them in namespace ops, by kind and name."""

    @cache
    def rendered(values: str) -> Objects:
        words = ["template", "kubetune", str(CHART), "--namespace=ops", KUBERNETES, "--values=-"]
        answer = helm(*words, stdin=values)
        assert answer.returncode == 0, answer.stderr
        objects = [document for document in yaml.safe_load_all(answer.stdout) if document]
        return {(found["kind"], found["metadata"]["name"]): found for found in objects}

    return lambda **values: rendered(json.dumps(values))


@pytest.fixture(scope="session")
def crd(kubectl: Command) -> str:
    """The CustomResourceDefinition of this tree. It stays: deleting it would delete other people's FineTuneJobs."""
    folder = str(REPOSITORY / "crds")
    applied = kubectl("apply", "--server-side", "--force-conflicts", "--field-manager=kubetune-tests", "-f", folder)
    assert applied.returncode == 0, applied.stderr
    name = f"{api.PLURAL}.{api.GROUP}"
    # Not --for=condition: kubectl fails where the object has no conditions yet.
    established = "jsonpath={.status.conditions[?(@.type=='Established')].status}=True"
    ready = kubectl("wait", f"--for={established}", f"crd/{name}", "--timeout=30s")
    assert ready.returncode == 0, ready.stderr
    return name


@pytest.fixture(scope="module")
def namespace(kubectl: Command, request: pytest.FixtureRequest) -> Iterator[str]:
    """A namespace of this module's own, in which Pod Security warns of everything that is not `restricted`."""
    name = f"kubetune-it-{uuid.uuid4().hex[:8]}"
    labels = {"pod-security.kubernetes.io/warn": "restricted", "kubetune.io/test": request.module.__name__[-63:]}
    made: Object = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}}
    assert kubectl("create", "-f", "-", stdin=made).returncode == 0
    yield name
    kubectl("delete", "namespace", name, "--wait=false")


@pytest.fixture(scope="module")
def apply(kubectl: Command, crd: str, namespace: str) -> Command:
    """apply(manifest): `kubectl apply -f` in the module's namespace, as people type it."""

    def command(manifest: Object | str, *options: str) -> CompletedProcess[str]:
        return kubectl("apply", "--namespace", namespace, "-f", "-", *options, stdin=manifest)

    return command


@pytest.fixture(scope="module")
def refused(apply: Command) -> Callable[[Object, list[str]], None]:
    """refused(manifest, lines): asserts that the schema or a rule refuses it, and that kubectl prints these lines."""

    def check(manifest: Object, lines: list[str]) -> None:
        answer = apply(manifest)
        shown = lines[0] if len(lines) == 1 else "\n".join(["", *(f"* {line}" for line in lines)])
        words = f'The FineTuneJob "{manifest["metadata"]["name"]}" is invalid: {shown}'
        assert (answer.returncode, answer.stderr.strip()) == (1, words)

    return check


def merge(base: Object, changes: Object) -> Object:
    """`changes` laid over `base` key by key; None takes a key away."""
    merged = dict(base)
    for key, value in changes.items():
        below = merged.get(key)
        merged[key] = merge(below, value) if isinstance(value, dict) and isinstance(below, dict) else value
    return {key: value for key, value in merged.items() if value is not None}


@pytest.fixture(scope="session")
def manifest() -> Callable[..., Object]:
    """manifest(name, **spec changes): a small valid FineTuneJob with the changes laid over it; None removes a key."""

    def make(name: str = "job", **changes: Any) -> Object:
        spec: Object = {
            "model": {"volumePath": "models/llama"},
            "dataset": {"volumePath": "data/train.jsonl"},
            "storage": {"models": {"claimName": "models"}, "output": {"claimName": "tuned"}},
        }
        return {
            "apiVersion": api.API_VERSION,
            "kind": api.KIND,
            # An operator that the demo has installed leaves other operators' jobs alone.
            "metadata": {"name": name, "labels": {OPERATOR_LABEL: "nobody"}},
            "spec": merge(spec, changes),
        }

    return make
