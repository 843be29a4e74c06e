"""What spec.workers and spec.queue make of the pods: each case is a piece of a manifest and what it becomes."""

import pytest
import yaml

from kubetune_operator import build, podspec, stagers
from kubetune_operator.contents import contents
from kubetune_operator.names import QUEUE_LABEL


def stage_job_of(job, settings):
    """The staging Job of the model."""
    return stagers.stage_job(job, contents(job.spec)[0], settings)


WORKERS = {
    "labels of nodes": ("{nodeSelector: {pool: h100}}", "{nodeSelector: {pool: h100}}"),
    "a taint": (
        "{tolerations: [{key: nvidia.com/gpu, operator: Exists, effect: NoSchedule}]}",
        "{tolerations: [{key: nvidia.com/gpu, operator: Exists, effect: NoSchedule}]}",
    ),
    "a taint by its value, for a while": (
        "{tolerations: [{key: spot, value: 'true', effect: NoExecute, tolerationSeconds: 30}]}",
        "{tolerations: [{key: spot, operator: Equal, value: 'true', effect: NoExecute, tolerationSeconds: 30}]}",
    ),
    "affinity goes through as it stands": (
        """
        affinity:
          podAntiAffinity: {requiredDuringSchedulingIgnoredDuringExecution: [{topologyKey: kubernetes.io/hostname}]}
        """,
        """
        affinity:
          podAntiAffinity: {requiredDuringSchedulingIgnoredDuringExecution: [{topologyKey: kubernetes.io/hostname}]}
        """,
    ),
    "spread counts the pods of this attempt": (
        "{topologySpreadConstraints: [{topologyKey: zone}]}",
        """
        topologySpreadConstraints:
          - topologyKey: zone
            maxSkew: 1
            whenUnsatisfiable: DoNotSchedule
            labelSelector: {matchLabels: {kubetune.io/job: bot, kubetune.io/attempt: '2'}}
        """,
    ),
    "a priority": ("{priorityClassName: high}", "{priorityClassName: high}"),
    "a scheduler": ("{schedulerName: volcano}", "{schedulerName: volcano}"),
    "a runtime": ("{runtimeClassName: nvidia}", "{runtimeClassName: nvidia}"),
    "a service account, whose token stays unmounted": (
        "{serviceAccountName: trainer}",
        "{serviceAccountName: trainer, automountServiceAccountToken: false}",
    ),
    "pull secrets after those of the settings, each once": (
        "{imagePullSecrets: [mine, shared]}",
        "{imagePullSecrets: [{name: shared}, {name: mine}]}",
    ),
    "the nodes' network, with names of the cluster": (
        "{hostNetwork: true}",
        "{hostNetwork: true, dnsPolicy: ClusterFirstWithHostNet}",
    ),
}


@pytest.fixture
def worker(job, settings):
    """worker("{gpusPerNode: 8}"): the worker Job of attempt 2 with that under spec.workers."""

    def make(text="{}", **changes):
        shared = settings.model_copy(update={"image_pull_secrets": ["shared"]})
        return build.worker_job(job(workers=yaml.safe_load(text), **changes), 2, shared)

    return make


def pod(manifest):
    return manifest["spec"]["template"]["spec"]


def container(manifest):
    return pod(manifest)["containers"][0]


@pytest.mark.parametrize("case", WORKERS)
def test_a_worker_pod_has(worker, case):
    given, expected = (yaml.safe_load(text) for text in WORKERS[case])
    assert expected.items() <= pod(worker(WORKERS[case][0])).items()
    assert set(pod(worker(WORKERS[case][0]))) - set(pod(worker())) <= set(expected), given


def test_nothing_of_it_is_there_where_nothing_is_said(worker):
    fields = {"restartPolicy", "automountServiceAccountToken", "enableServiceLinks", "securityContext"}
    fields |= {"imagePullSecrets", "subdomain", "terminationGracePeriodSeconds", "containers", "volumes"}
    assert set(pod(worker())) == fields


CONTAINERS = {
    "another maker's GPUs": (
        "{gpusPerNode: 4, gpuResource: amd.com/gpu}",
        "resources",
        "{limits: {amd.com/gpu: '4'}}",
    ),
    "a slice of a GPU": (
        "{gpusPerNode: 1, gpuResource: nvidia.com/mig-3g.40gb}",
        "resources",
        "{limits: {nvidia.com/mig-3g.40gb: '1'}}",
    ),
    "network cards beside GPUs": (
        "{gpusPerNode: 8, resources: {limits: {rdma/hca: 1, memory: 64Gi}}}",
        "resources",
        "{limits: {rdma/hca: '1', memory: 64Gi, nvidia.com/gpu: '8'}}",
    ),
    "pinned memory": (
        "{rdma: true}",
        "securityContext",
        "{allowPrivilegeEscalation: false, readOnlyRootFilesystem: true, runAsUser: 0, "
        "runAsNonRoot: false, capabilities: {drop: [ALL], add: [IPC_LOCK]}}",
    ),
}


@pytest.mark.parametrize("case", CONTAINERS)
def test_a_worker_container_has(worker, case):
    given, field, expected = CONTAINERS[case]
    assert container(worker(given))[field] == yaml.safe_load(expected)


LISTS = {
    "a variable": (
        "{env: [{name: NCCL_DEBUG, value: INFO}]}",
        "[{name: NCCL_DEBUG, value: INFO}]",
        lambda found: container(found)["env"],
    ),
    "a variable from a Secret": (
        "{env: [{name: WANDB_API_KEY, valueFrom: {secretKeyRef: {name: wandb, key: api-key}}}]}",
        "[{name: WANDB_API_KEY, valueFrom: {secretKeyRef: {name: wandb, key: api-key, optional: false}}}]",
        lambda found: container(found)["env"],
    ),
    "a variable from a ConfigMap": (
        "{env: [{name: PROXY, valueFrom: {configMapKeyRef: {name: net, key: proxy, optional: true}}}]}",
        "[{name: PROXY, valueFrom: {configMapKeyRef: {name: net, key: proxy, optional: true}}}]",
        lambda found: container(found)["env"],
    ),
    "volumes": (
        "{volumes: [{name: certs, configMap: {name: ca}}, {name: fast, emptyDir: {sizeLimit: 1Gi}}]}",
        "[{name: certs, configMap: {name: ca}}, {name: fast, emptyDir: {sizeLimit: 1Gi}}]",
        lambda found: pod(found)["volumes"],
    ),
    "a volume that tells of the pod itself": (
        "{volumes: [{name: me, downwardAPI: {items: []}}]}",
        "[{name: me, downwardAPI: {items: []}}]",
        lambda found: pod(found)["volumes"],
    ),
    "mounts": (
        "{volumes: [{name: certs, configMap: {name: ca}}], volumeMounts: [{name: certs, mountPath: /etc/certs}]}",
        "[{name: certs, mountPath: /etc/certs, readOnly: false}]",
        lambda found: container(found)["volumeMounts"],
    ),
}


@pytest.mark.parametrize("case", LISTS)
def test_what_the_user_adds_goes_first_so_that_its_index_is_the_manifests(worker, case):
    given, expected, read = LISTS[case]
    wanted = yaml.safe_load(expected)
    assert read(worker(given)) == [*wanted, *read(worker())]


def test_threads_that_the_user_chooses_are_set_once(worker):
    cores = "resources: {limits: {cpu: 4}}"
    chosen = container(worker(f"{{{cores}, env: [{{name: OMP_NUM_THREADS, value: '2'}}]}}"))["env"]
    found = [variable for variable in chosen if variable["name"] == "OMP_NUM_THREADS"]
    assert found == [{"name": "OMP_NUM_THREADS", "value": "2"}]


def test_no_variable_and_no_volume_of_ours_can_be_taken(worker):
    threads = {"OMP_NUM_THREADS"}
    names = {variable["name"] for variable in container(worker("{resources: {limits: {cpu: 1}}}"))["env"]}
    assert {name for name in names - threads if not podspec.is_own_variable(name)} == set()
    assert {volume["name"] for volume in pod(worker())["volumes"]} <= set(podspec.OWN_VOLUMES)
    mounts = {mount["mountPath"] for mount in container(worker())["volumeMounts"]}
    assert all(path.startswith(podspec.OWN_MOUNTS) for path in mounts)


# --- labels and annotations -------------------------------------------------------------------------------------------


METADATA = {
    "no sidecar": ("{}", {}, {"sidecar.istio.io/inject": "false"}, {}),
    "a sidecar for whoever wants one": (
        "{labels: {sidecar.istio.io/inject: 'true'}, annotations: {sidecar.istio.io/inject: 'true'}}",
        {"sidecar.istio.io/inject": "true"},
        {"sidecar.istio.io/inject": "true"},
        {"sidecar.istio.io/inject": "true"},
    ),
    "a pod group of the coscheduling plugin": (
        "{labels: {scheduling.x-k8s.io/pod-group: gang}}",
        {"scheduling.x-k8s.io/pod-group": "gang"},
        {},
        {},
    ),
    "Volcano's queue, and the size of the gang on the Job": (
        "{nodes: 4, schedulerName: volcano, annotations: {scheduling.volcano.sh/queue-name: research}}",
        {},
        {"scheduling.volcano.sh/queue-name": "research"},
        {"scheduling.volcano.sh/queue-name": "research", "scheduling.volcano.sh/group-min-member": "4"},
    ),
    "a size that the user chooses": (
        "{nodes: 4, schedulerName: volcano, annotations: {scheduling.volcano.sh/group-min-member: '2'}}",
        {},
        {},
        {"scheduling.volcano.sh/group-min-member": "2"},
    ),
    "Kueue's topology": (
        "{annotations: {kueue.x-k8s.io/podset-required-topology: cloud.example/rack}}",
        {},
        {"kueue.x-k8s.io/podset-required-topology": "cloud.example/rack"},
        {"kueue.x-k8s.io/podset-required-topology": "cloud.example/rack"},
    ),
}


@pytest.mark.parametrize("case", METADATA)
def test_metadata_of_pods_and_job(worker, case):
    given, labels, annotations, of_job = METADATA[case]
    found = worker(given)
    template = found["spec"]["template"]["metadata"]
    assert labels.items() <= template["labels"].items()
    assert annotations.items() <= template["annotations"].items()
    assert of_job.items() <= found["metadata"].get("annotations", {}).items()


def test_the_operators_own_labels_are_on_every_pod(worker):
    labels = worker("{labels: {team: nlp}}")["spec"]["template"]["metadata"]["labels"]
    assert {"kubetune.io/job", "kubetune.io/attempt", "kubetune.io/role", "team"} <= set(labels)


# --- queues and gangs -------------------------------------------------------------------------------------------------


def test_without_a_queue_the_job_starts_at_once(worker):
    assert worker()["spec"]["suspend"] is False
    assert QUEUE_LABEL not in worker()["metadata"]["labels"]


def test_in_a_queue_the_job_waits_for_kueue(worker):
    found = worker(queue={"name": "research", "priorityClass": "high"})
    assert found["spec"]["suspend"] is True
    assert found["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "research"
    assert found["metadata"]["labels"]["kueue.x-k8s.io/priority-class"] == "high"
    labels = found["spec"]["template"]["metadata"]["labels"]
    assert not [label for label in labels if label.startswith("kueue")]  # a pod with them would queue by itself


def test_the_shape_is_what_the_job_controller_schedules_as_a_gang(worker):
    """Kubernetes makes one PodGroup of an Indexed Job of more than one pod in which all of them run at once."""
    spec = worker("{nodes: 8}")["spec"]
    assert spec["completionMode"] == "Indexed"
    assert spec["parallelism"] == spec["completions"] == 8
    assert "schedulingGroup" not in spec["template"]["spec"]


# --- staging ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def stager(job, settings):
    """stager("{nodeSelector: ...}"): the staging Job with that under spec.workers."""
    return lambda text="{}": stage_job_of(job(workers=yaml.safe_load(text)), settings)


FOLLOWED = {
    "labels of nodes": ("{nodeSelector: {pool: h100}}", "{nodeSelector: {pool: h100}}"),
    "taints": ("{tolerations: [{operator: Exists}]}", "{tolerations: [{operator: Exists}]}"),
    "affinity to nodes, but not to pods": (
        "{affinity: {nodeAffinity: {a: 1}, podAffinity: {b: 2}}}",
        "{affinity: {nodeAffinity: {a: 1}}}",
    ),
    "pull secrets": ("{imagePullSecrets: [mine]}", "{imagePullSecrets: [{name: mine}]}"),
    "the service account": ("{serviceAccountName: trainer}", "{serviceAccountName: trainer}"),
}
OF_THE_GANG = """
nodes: 8
gpusPerNode: 8
resources: {limits: {memory: 64Gi}}
affinity: {podAffinity: {b: 2}}
topologySpreadConstraints: [{topologyKey: zone}]
priorityClassName: high
schedulerName: volcano
runtimeClassName: nvidia
labels: {team: nlp}
annotations: {note: x}
env: [{name: NCCL_DEBUG, value: INFO}]
volumes: [{name: fast, emptyDir: {}}]
volumeMounts: [{name: fast, mountPath: /fast}]
hostNetwork: true
rdma: true
"""


@pytest.mark.parametrize("case", FOLLOWED)
def test_the_staging_pod_follows(stager, case):
    given, expected = FOLLOWED[case]
    assert pod(stager(given)) == {**pod(stager()), **yaml.safe_load(expected)}


def test_the_staging_pod_has_nothing_of_what_is_about_the_gang(stager):
    assert stager(OF_THE_GANG) == stager()


def test_a_staging_pod_has_no_sidecar_either(stager):
    template = stager()["spec"]["template"]["metadata"]
    assert (
        template["labels"]["sidecar.istio.io/inject"] == template["annotations"]["sidecar.istio.io/inject"] == "false"
    )


def test_only_what_is_asked_for_leaves_the_restricted_profile(worker):
    security = container(worker(OF_THE_GANG.replace("hostNetwork: true\nrdma: true\n", "")))["securityContext"]
    assert security["capabilities"] == {"drop": ["ALL"]}


def test_a_job_that_runs_as_root_keeps_its_tokens_to_itself(worker):
    """Files of another user in a shared folder would stop whoever comes next."""
    found = {item["name"]: item.get("value") for item in container(worker("{rdma: true}"))["env"]}
    assert found["KUBETUNE_CACHE"] == "/kubetune/output/bot-0a1b2c3d/.tokens"
