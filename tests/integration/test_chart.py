"""The Helm chart: what it makes with the values as they are, who may do what, and the certificate."""

import base64
import datetime

import pytest
import yaml
from cryptography import x509
from cryptography.x509.verification import PolicyBuilder, Store
from tests.integration.chart import CHART, KUBERNETES, container, crd_of, pod, settings_of, variables

from kubetune_operator import crd as generated
from kubetune_operator.settings import Settings


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
