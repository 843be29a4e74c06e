"""The Helm chart's values: each is described, is checked, and does what it says."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from tests.integration.chart import CHART, KUBERNETES, container, crd_of, pod, settings_of, variables

Object = dict[str, Any]

SCHEMA = json.loads((CHART / "values.schema.json").read_text())
VALUES = yaml.safe_load((CHART / "values.yaml").read_text())
DIGEST = "sha256:" + "0" * 64


# --- schema -----------------------------------------------------------------------------------------------------------


def resolved(node: Object) -> Object:
    """A node of the schema with what it refers to."""
    named = SCHEMA["$defs"][node["$ref"].rpartition("/")[2]] if "$ref" in node else {}
    return {**named, **node}


def leaves(node: Object, path: str = "") -> Iterator[tuple[str, Object]]:
    """Every value that can be set."""
    for name, below in node.get("properties", {}).items():
        where, full = f"{path}.{name}".lstrip("."), resolved(below)
        if "properties" in full:
            yield from leaves(full, where)
        else:
            yield where, full


LEAVES = dict(leaves(SCHEMA))


@pytest.mark.parametrize("path", LEAVES)
def test_every_value_says_what_it_means(path):
    assert LEAVES[path]["description"].endswith(".")


def groups(node: Object, path: str = "values") -> Iterator[tuple[str, Object]]:
    yield path, node
    for name, below in node.get("properties", {}).items():
        if "properties" in below:
            yield from groups(below, f"{path}.{name}")


@pytest.mark.parametrize("path", [path for path, _ in groups(SCHEMA)])
def test_every_group_of_values_is_closed(path):
    assert dict(groups(SCHEMA))[path]["additionalProperties"] is False


def shown(values: Object, node: Object, path: str = "") -> Iterator[str]:
    """The paths of all values in values.yaml, as deep as the schema names them."""
    for name, value in values.items():
        below = resolved(node["properties"].get(name, {}))
        where = f"{path}.{name}".lstrip(".")
        if "properties" in below:
            yield from shown(value, below, where)
        else:
            yield where


def test_values_yaml_shows_every_value_but_those_that_the_operator_has_defaults_for():
    found = set(shown(VALUES, SCHEMA))
    missing = {path for path in LEAVES if path not in found and not path.startswith("settings.")}
    assert missing == {"global"}
    assert found <= set(LEAVES)


REFUSED = {
    "a value that does not exist": ({"size": 2}, "additional properties 'size' not allowed"),
    "more replicas than make sense": ({"replicas": 9}, "maximum: got 9, want 5"),
    "a slip in a group": ({"image": {"repo": "x"}}, "additional properties 'repo' not allowed"),
    "a setting that does not exist": ({"settings": {"resync": 3}}, "additional properties 'resync' not allowed"),
    "a setting out of bounds": ({"settings": {"resyncSeconds": 0}}, "exclusiveMinimum: got 0, want 0"),
    "a level that does not exist": (
        {"settings": {"logLevel": "LOUD"}},
        "value must be one of 'DEBUG', 'INFO', 'WARNING', 'ERROR'",
    ),
    "a word for a switch": ({"crds": {"enabled": "yes"}}, "got string, want boolean"),
    "a tag in the repository": ({"image": {"repository": "kubetune-operator:1"}}, "does not match pattern"),
    "a short digest": ({"trainerImage": {"digest": "sha256:123"}}, "does not match pattern"),
    "a policy that does not exist": (
        {"image": {"pullPolicy": "Sometimes"}},
        "value must be one of 'Always', 'IfNotPresent', 'Never'",
    ),
    "one Secret where a list is meant": ({"imagePullSecrets": "one"}, "got string, want array"),
    "a namespace that cannot exist": ({"watchNamespace": "My Team"}, "does not match pattern"),
    "a variable without a name": ({"extraEnv": [{"value": "x"}]}, "missing property 'name'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_helm_refuses(helm, case):
    values, problem = REFUSED[case]
    answer = helm("template", "kubetune", str(CHART), KUBERNETES, "--values=-", stdin=json.dumps(values))
    assert answer.returncode == 1
    assert problem in answer.stderr


LINTED = {
    "as it is": {},
    "one namespace": {"watchNamespace": "team"},
    "nothing optional": {"crds": {"enabled": False}, "rbac": {"aggregate": False}, "resources": {}},
}


@pytest.mark.parametrize("case", LINTED)
def test_helm_lint_is_content(helm, case):
    answer = helm("lint", "--strict", str(CHART), KUBERNETES, "--values=-", stdin=json.dumps(LINTED[case]))
    assert answer.returncode == 0, answer.stdout


# --- what each value does ---------------------------------------------------------------------------------------------


def annotations(objects):
    return crd_of(objects)["metadata"].get("annotations")


RENDERED = {
    "global": ({"global": {"registry": "x"}}, lambda found: container(found)["image"], "kubetune-operator:0.1.0"),
    "image.repository": (
        {"image": {"repository": "127.0.0.1:5000/team/operator"}},
        lambda found: container(found)["image"],
        "127.0.0.1:5000/team/operator:0.1.0",
    ),
    "image.tag": ({"image": {"tag": "2"}}, lambda found: container(found)["image"], "kubetune-operator:2"),
    "image.digest": (
        {"image": {"tag": "2", "digest": DIGEST}},
        lambda found: container(found)["image"],
        f"kubetune-operator@{DIGEST}",
    ),
    "image.pullPolicy": (
        {"image": {"pullPolicy": "Always"}},
        lambda found: container(found)["imagePullPolicy"],
        "Always",
    ),
    "replicas": (
        {"replicas": 1},
        lambda found: (
            found["Deployment", "kubetune"]["spec"]["replicas"],
            ("PodDisruptionBudget", "kubetune") in found,
        ),
        (1, False),
    ),
    "imagePullSecrets": (
        {"imagePullSecrets": ["one", "two"]},
        lambda found: pod(found)["imagePullSecrets"],
        [{"name": "one"}, {"name": "two"}],
    ),
    "watchNamespace": (
        {"watchNamespace": "team"},
        lambda found: (
            variables(found)["KUBETUNE_WATCH_NAMESPACE"],
            found["Role", "kubetune-ops"]["metadata"]["namespace"],
            found["RoleBinding", "kubetune-ops"]["metadata"]["namespace"],
            ("ClusterRole", "kubetune-ops") in found,
        ),
        ("team", "team", "team", False),
    ),
    "crds.enabled": ({"crds": {"enabled": False}}, crd_of, None),
    "crds.keep": ({"crds": {"keep": False}}, annotations, None),
    "rbac.aggregate": (
        {"rbac": {"aggregate": False}},
        lambda found: sorted(name for kind, name in found if kind == "ClusterRole"),
        ["kubetune-ops", "kubetune-ops-tokens"],
    ),
    "progress.auth": (
        {"progress": {"auth": "KeySet"}},
        lambda found: (
            variables(found)["KUBETUNE_PROGRESS_AUTH"],
            [name for kind, name in found if name.endswith("-tokens")],
        ),
        ("KeySet", []),
    ),
    "networkPolicy.enabled": (
        {"networkPolicy": {"enabled": True}},
        lambda found: [name for kind, name in found if kind == "NetworkPolicy"],
        ["kubetune"],
    ),
    "networkPolicy.metricsFrom": (
        {"networkPolicy": {"enabled": True, "metricsFrom": [{"namespaceSelector": {"matchLabels": {"a": "b"}}}]}},
        lambda found: found["NetworkPolicy", "kubetune"]["spec"]["ingress"][1]["from"],
        [{"namespaceSelector": {"matchLabels": {"a": "b"}}}],
    ),
    "networkPolicy.apiServerPorts": (
        {"networkPolicy": {"enabled": True, "apiServerPorts": [8443]}},
        lambda found: found["NetworkPolicy", "kubetune"]["spec"]["egress"][1:],
        [{"ports": [{"port": 8443, "protocol": "TCP"}]}],
    ),
    "networkPolicy.workerNamespaces": (
        {"networkPolicy": {"enabled": True, "workerNamespaces": ["team"]}},
        lambda found: found["NetworkPolicy", "kubetune-ops-workers"]["metadata"]["namespace"],
        "team",
    ),
    "progress.existingSecret": (
        {"progress": {"existingSecret": "mine"}},
        lambda found: (
            pod(found)["volumes"][0]["secret"]["secretName"],
            [kind for kind, _ in found if kind == "Secret"],
        ),
        ("mine", []),
    ),
    "metrics.serviceMonitor.enabled": (
        {"metrics": {"serviceMonitor": {"enabled": True}}},
        lambda found: (
            found["ServiceMonitor", "kubetune"]["spec"]["selector"]["matchLabels"].items()
            <= found["Service", "kubetune-metrics"]["metadata"]["labels"].items(),
            found["ServiceMonitor", "kubetune"]["spec"]["endpoints"][0]["port"],
            found["Service", "kubetune-metrics"]["spec"]["ports"][0]["name"],
        ),
        (True, "metrics", "metrics"),
    ),
    "metrics.serviceMonitor.labels": (
        {"metrics": {"serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}}}},
        lambda found: found["ServiceMonitor", "kubetune"]["metadata"]["labels"]["release"],
        "prometheus",
    ),
    "metrics.serviceMonitor.interval": (
        {"metrics": {"serviceMonitor": {"enabled": True, "interval": "5s"}}},
        lambda found: found["ServiceMonitor", "kubetune"]["spec"]["endpoints"][0]["interval"],
        "5s",
    ),
    "metrics.dashboard.enabled": (
        {"metrics": {"dashboard": {"enabled": True}}},
        lambda found: json.loads(found["ConfigMap", "kubetune-dashboard"]["data"]["kubetune.json"])["uid"],
        "kubetune",
    ),
    "metrics.dashboard.labels": (
        {"metrics": {"dashboard": {"enabled": True, "labels": {"dashboards": "yes"}}}},
        lambda found: (
            {"grafana_dashboard": "1", "dashboards": "yes"}.items()
            <= found["ConfigMap", "kubetune-dashboard"]["metadata"]["labels"].items()
        ),
        True,
    ),
    "resources": (
        {"resources": {"limits": {"memory": "1Gi"}}},
        lambda found: container(found)["resources"]["limits"],
        {"memory": "1Gi"},
    ),
    "nodeSelector": (
        {"nodeSelector": {"pool": "system"}},
        lambda found: pod(found)["nodeSelector"],
        {"pool": "system"},
    ),
    "tolerations": (
        {"tolerations": [{"operator": "Exists"}]},
        lambda found: pod(found)["tolerations"],
        [{"operator": "Exists"}],
    ),
    "affinity": (
        {"affinity": {"podAffinity": {}}},
        lambda found: pod(found)["affinity"],
        {"podAffinity": {}},
    ),
}


@pytest.mark.parametrize("value", RENDERED)
def test_this_value_does_what_it_says(render, value):
    values, read, expected = RENDERED[value]
    assert read(render(**values)) == expected


VARIABLES = {
    "trainerImage.repository": (
        {"trainerImage": {"repository": "registry.example/trainer"}},
        "KUBETUNE_TRAINER_IMAGE",
        "registry.example/trainer:0.1.0",
    ),
    "trainerImage.tag": ({"trainerImage": {"tag": "2"}}, "KUBETUNE_TRAINER_IMAGE", "kubetune-trainer:2"),
    "trainerImage.digest": (
        {"trainerImage": {"digest": DIGEST}},
        "KUBETUNE_TRAINER_IMAGE",
        f"kubetune-trainer@{DIGEST}",
    ),
    "trainerImage.pullPolicy": ({"trainerImage": {"pullPolicy": "Never"}}, "KUBETUNE_IMAGE_PULL_POLICY", "Never"),
    "trainerImage.pullSecrets": (
        {"trainerImage": {"pullSecrets": ["one", "two"]}},
        "KUBETUNE_IMAGE_PULL_SECRETS",
        "one,two",
    ),
    "settings.hubEndpoint": (
        {"settings": {"hubEndpoint": "https://hub.example"}},
        "KUBETUNE_HUB_ENDPOINT",
        "https://hub.example",
    ),
    "settings.operatorName": ({"settings": {"operatorName": "second"}}, "KUBETUNE_OPERATOR_NAME", "second"),
    "settings.logLevel": ({"settings": {"logLevel": "DEBUG"}}, "KUBETUNE_LOG_LEVEL", "DEBUG"),
    "extraEnv": ({"extraEnv": [{"name": "HTTPS_PROXY", "value": "http://proxy"}]}, "HTTPS_PROXY", "http://proxy"),
    "settings.allowServiceAccounts": (
        {"settings": {"allowServiceAccounts": ["trainer", "cloud"]}},
        "KUBETUNE_ALLOW_SERVICE_ACCOUNTS",
        "trainer,cloud",
    ),
    "settings.allowHostNetwork": ({"settings": {"allowHostNetwork": True}}, "KUBETUNE_ALLOW_HOST_NETWORK", "true"),
    "settings.allowRdma": ({"settings": {"allowRdma": True}}, "KUBETUNE_ALLOW_RDMA", "true"),
    "settings.stageQueue": ({"settings": {"stageQueue": "small"}}, "KUBETUNE_STAGE_QUEUE", "small"),
}


@pytest.mark.parametrize("value", VARIABLES)
def test_this_value_becomes_a_variable_of_the_operator(render, value):
    values, name, expected = VARIABLES[value]
    assert variables(render(**values))[name] == expected


NUMBERS = {
    "resyncSeconds": 30,
    "restartBackoffSeconds": 0,
    "restartBackoffMaxSeconds": 12.5,
    "volumeGraceSeconds": 1,
    "lostNodeGraceSeconds": 90,
    "progressWriteSeconds": 2,
    "debounceSeconds": 0.25,
    "stagedTrustSeconds": 60,
    "workers": 4,
}


def test_every_value_has_a_case():
    tested = set(RENDERED) | set(VARIABLES) | {f"settings.{name}" for name in NUMBERS}
    assert tested == set(LEAVES)


def test_the_operator_reads_every_number_as_it_was_set(render):
    read = settings_of(render(settings=NUMBERS)).model_dump(by_alias=True)
    assert {name: read[name] for name in NUMBERS} == NUMBERS
