"""The Helm chart: what each value does, what is refused, and the certificate that it makes."""

import base64
import datetime
import json
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import yaml
from cluster_tool import REPOSITORY
from cryptography import x509
from cryptography.x509.verification import PolicyBuilder, Store

from kubetune_operator import crd as generated
from kubetune_operator.settings import Settings

Object = dict[str, Any]

CHART = REPOSITORY / "charts" / "kubetune"
SCHEMA = json.loads((CHART / "values.schema.json").read_text())
VALUES = yaml.safe_load((CHART / "values.yaml").read_text())
KUBERNETES = "--kube-version=1.35.0"
DIGEST = "sha256:" + "0" * 64


@pytest.fixture(scope="session")
def render(helm):
    """render(values): what `helm template` makes of them in namespace ops, by kind and name."""

    @cache
    def rendered(values: str) -> dict[tuple[str, str], Object]:
        words = ["template", "kubetune", str(CHART), "--namespace=ops", KUBERNETES, "--values=-"]
        answer = helm(*words, stdin=values)
        assert answer.returncode == 0, answer.stderr
        objects = [document for document in yaml.safe_load_all(answer.stdout) if document]
        return {(found["kind"], found["metadata"]["name"]): found for found in objects}

    return lambda **values: rendered(json.dumps(values))


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


def pod(objects):
    return objects["Deployment", "kubetune"]["spec"]["template"]["spec"]


def container(objects):
    return pod(objects)["containers"][0]


def variables(objects):
    return {entry["name"]: entry.get("value") for entry in container(objects)["env"]}


def crd_of(objects):
    return objects.get(("CustomResourceDefinition", "finetunejobs.kubetune.io"))


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
    "trainerImage.repository": (
        {"trainerImage": {"repository": "registry.example/trainer"}},
        lambda found: variables(found)["KUBETUNE_TRAINER_IMAGE"],
        "registry.example/trainer:0.1.0",
    ),
    "trainerImage.tag": (
        {"trainerImage": {"tag": "2"}},
        lambda found: variables(found)["KUBETUNE_TRAINER_IMAGE"],
        "kubetune-trainer:2",
    ),
    "replicas": (
        {"replicas": 1},
        lambda found: (
            found["Deployment", "kubetune"]["spec"]["replicas"],
            ("PodDisruptionBudget", "kubetune") in found,
        ),
        (1, False),
    ),
    "trainerImage.digest": (
        {"trainerImage": {"digest": DIGEST}},
        lambda found: variables(found)["KUBETUNE_TRAINER_IMAGE"],
        f"kubetune-trainer@{DIGEST}",
    ),
    "trainerImage.pullPolicy": (
        {"trainerImage": {"pullPolicy": "Never"}},
        lambda found: variables(found)["KUBETUNE_IMAGE_PULL_POLICY"],
        "Never",
    ),
    "trainerImage.pullSecrets": (
        {"trainerImage": {"pullSecrets": ["one", "two"]}},
        lambda found: variables(found)["KUBETUNE_IMAGE_PULL_SECRETS"],
        "one,two",
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
    "settings.hubEndpoint": (
        {"settings": {"hubEndpoint": "https://hub.example"}},
        lambda found: variables(found)["KUBETUNE_HUB_ENDPOINT"],
        "https://hub.example",
    ),
    "settings.operatorName": (
        {"settings": {"operatorName": "second"}},
        lambda found: variables(found)["KUBETUNE_OPERATOR_NAME"],
        "second",
    ),
    "settings.logLevel": (
        {"settings": {"logLevel": "DEBUG"}},
        lambda found: variables(found)["KUBETUNE_LOG_LEVEL"],
        "DEBUG",
    ),
    "extraEnv": (
        {"extraEnv": [{"name": "HTTPS_PROXY", "value": "http://proxy"}]},
        lambda found: variables(found)["HTTPS_PROXY"],
        "http://proxy",
    ),
    "crds.enabled": ({"crds": {"enabled": False}}, crd_of, None),
    "crds.keep": ({"crds": {"keep": False}}, annotations, None),
    "rbac.aggregate": (
        {"rbac": {"aggregate": False}},
        lambda found: sorted(name for kind, name in found if kind == "ClusterRole"),
        ["kubetune-ops", "kubetune-ops-tokens"],
    ),
    "settings.allowServiceAccounts": (
        {"settings": {"allowServiceAccounts": ["trainer", "cloud"]}},
        lambda found: variables(found)["KUBETUNE_ALLOW_SERVICE_ACCOUNTS"],
        "trainer,cloud",
    ),
    "settings.allowHostNetwork": (
        {"settings": {"allowHostNetwork": True}},
        lambda found: variables(found)["KUBETUNE_ALLOW_HOST_NETWORK"],
        "true",
    ),
    "settings.allowRdma": (
        {"settings": {"allowRdma": True}},
        lambda found: variables(found)["KUBETUNE_ALLOW_RDMA"],
        "true",
    ),
    "settings.stageQueue": (
        {"settings": {"stageQueue": "small"}},
        lambda found: variables(found)["KUBETUNE_STAGE_QUEUE"],
        "small",
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
    tested = set(RENDERED) | {f"settings.{name}" for name in NUMBERS}
    assert tested == set(LEAVES)


def settings_of(objects):
    """The settings that the operator reads in this Deployment."""
    found = variables(objects)
    filled_in = {"KUBETUNE_NAMESPACE": "ops", "KUBETUNE_POD_NAME": "kubetune-0", "KUBETUNE_POD_IP": "10.0.0.1"}
    assert {name for name, value in found.items() if value is None} == set(filled_in)  # by the kubelet
    return Settings.from_env({**found, **filled_in})


def test_the_operator_reads_every_number_as_it_was_set(render):
    read = settings_of(render(settings=NUMBERS)).model_dump(by_alias=True)
    assert {name: read[name] for name in NUMBERS} == NUMBERS


def test_the_operator_starts_with_the_values_as_they_are(render):
    read = settings_of(render())
    assert read.progress_url == "https://kubetune-progress.ops.svc:8443"
    assert read.watch_namespace is None
    assert read.resync_seconds == Settings.model_fields["resync_seconds"].default


def test_files_and_ports_are_where_the_settings_say(render):
    objects = render()
    read = settings_of(objects)
    (mount,) = [mount for mount in container(objects)["volumeMounts"] if mount["name"] == "tls"]
    for file in (read.ca_file, read.tls_cert_file, read.tls_key_file):
        assert str(file.parent) == mount["mountPath"]
        assert file.name in objects["Secret", "kubetune-progress-tls"]["data"]
    ports = {port["name"]: port["containerPort"] for port in container(objects)["ports"]}
    assert ports == {"progress": read.progress_port, "metrics": read.metrics_port}
    (port,) = objects["Service", "kubetune-progress"]["spec"]["ports"]
    assert read.progress_url.endswith(f":{port['port']}")
    assert (port["targetPort"], container(objects)["livenessProbe"]["httpGet"]["port"]) == ("progress", "metrics")


def test_the_definition_in_the_chart_is_the_generated_one(render):
    found = crd_of(render())
    assert found["spec"] == generated.custom_resource_definition()["spec"]
    assert found["metadata"]["annotations"] == {"helm.sh/resource-policy": "keep"}


def test_two_replicas_share_a_lease_and_are_not_drained_together(render):
    objects = render()
    deployment = objects["Deployment", "kubetune"]["spec"]
    assert (deployment["replicas"], deployment["strategy"]["type"]) == (2, "RollingUpdate")
    budget = objects["PodDisruptionBudget", "kubetune"]["spec"]
    assert (budget["selector"], budget["maxUnavailable"]) == (deployment["selector"], 1)
    (spread,) = pod(objects)["topologySpreadConstraints"]
    assert spread["labelSelector"] == deployment["selector"]
    create, rest = objects["Role", "kubetune-lease"]["rules"]
    assert (create["verbs"], rest["verbs"]) == (["create"], ["get", "watch", "update"])
    assert rest["resourceNames"] == [settings_of(objects).lease_name]
    assert objects["Role", "kubetune-lease"]["metadata"]["namespace"] == "ops"


def test_nothing_is_made_for_prometheus_and_grafana_unless_it_is_asked_for(render):
    kinds = [kind for kind, _ in render()]
    assert "ServiceMonitor" not in kinds
    assert "ConfigMap" not in kinds


def test_a_service_selects_the_operator(render):
    objects = render()
    selector = objects["Service", "kubetune-progress"]["spec"]["selector"]
    template = objects["Deployment", "kubetune"]["spec"]["template"]
    assert selector == objects["Deployment", "kubetune"]["spec"]["selector"]["matchLabels"]
    assert selector.items() <= template["metadata"]["labels"].items()


def test_a_release_of_another_name_says_so_in_its_objects(helm):
    answer = helm("template", "team", str(CHART), "--namespace=ops", KUBERNETES)
    found = {document["metadata"]["name"] for document in yaml.safe_load_all(answer.stdout) if document}
    assert {"team-kubetune", "team-kubetune-progress", "team-kubetune-ops"} <= found


def test_nobody_reads_secrets(render):
    for (kind, _), found in render().items():
        if kind in ("Role", "ClusterRole"):
            resources = [name for rule in found["rules"] for name in rule["resources"]]
            assert "secrets" not in resources
            assert "*" not in resources
            assert all("*" not in rule["verbs"] for rule in found["rules"])


CLUSTER_WIDE = ("ClusterRole", "ClusterRoleBinding", "CustomResourceDefinition")


def test_a_release_for_one_namespace_needs_nothing_outside_it_but_the_definition(render):
    found = render(watchNamespace="team", rbac={"aggregate": False}, networkPolicy={"enabled": True})
    assert [kind for kind, _ in found if kind in CLUSTER_WIDE] == ["CustomResourceDefinition"]
    assert {document["metadata"].get("namespace") for document in found.values()} == {None, "ops", "team"}
    assert variables(found)["KUBETUNE_PROGRESS_AUTH"] == "KeySet"


def test_workers_of_the_watched_namespace_may_report_and_talk_to_each_other(render):
    found = render(watchNamespace="team", networkPolicy={"enabled": True})
    operator, workers = found["NetworkPolicy", "kubetune"], found["NetworkPolicy", "kubetune-ops-workers"]
    peer, replica = operator["spec"]["ingress"][0]["from"]
    assert replica == {"podSelector": operator["spec"]["podSelector"]}
    assert operator["spec"]["egress"][0]["to"] == [replica], "a standby hands reports over to the leader"
    assert peer["podSelector"]["matchLabels"] == {"kubetune.io/role": "worker"}
    assert peer["namespaceSelector"]["matchLabels"] == {"kubernetes.io/metadata.name": "team"}
    assert workers["metadata"]["namespace"] == "team"
    assert workers["spec"]["ingress"] == [{"from": [{"podSelector": {"matchLabels": {"kubetune.io/role": "worker"}}}]}]
    assert "Egress" not in workers["spec"]["policyTypes"]  # hubs, trackers and volumes are anywhere


# --- the certificate --------------------------------------------------------------------------------------------------


def pem(secret, key):
    return x509.load_pem_x509_certificate(base64.b64decode(secret["data"][key]))


HOSTS = ("kubetune-progress.ops.svc", "kubetune-progress.ops.svc.cluster.local")


@pytest.mark.parametrize("host", HOSTS)
def test_a_client_with_the_authority_trusts_the_endpoint(render, host):
    secret = render()["Secret", "kubetune-progress-tls"]
    store = Store([pem(secret, "ca.crt")])
    verifier = PolicyBuilder().store(store).build_server_verifier(x509.DNSName(host))
    assert len(verifier.verify(pem(secret, "tls.crt"), [])) == 2


def test_the_certificate_outlives_the_release(render):
    certificate = pem(render()["Secret", "kubetune-progress-tls"], "tls.crt")
    years = (certificate.not_valid_after_utc - datetime.datetime.now(datetime.UTC)).days / 365
    assert 9 < years < 11


def test_the_authority_s_key_is_thrown_away(render):
    assert set(render()["Secret", "kubetune-progress-tls"]["data"]) == {"ca.crt", "tls.crt", "tls.key"}
