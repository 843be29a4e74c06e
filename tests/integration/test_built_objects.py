"""The objects that the operator builds, judged by the API server: admitted without a warning, and owned rightly."""

import json

import pytest

from kubetune_operator import api, build, names, stagers
from kubetune_operator.contents import contents
from kubetune_operator.settings import Settings


def stage_job_of(job, settings):
    """The staging Job of the model."""
    return stagers.stage_job(job, contents(job.spec)[0], settings)


SETTINGS = Settings(trainer_image="registry.example/trainer:1", namespace="ops")
HUB = {"volumePath": None, "huggingFace": {"repo": "meta-llama/Llama-3.2-1B", "tokenSecretRef": {"name": "hf"}}}

JOBS = {
    "one worker on the CPU": {},
    "many workers with GPUs": {"workers": {"nodes": 64, "gpusPerNode": 8}},
    "workers with cores": {"workers": {"resources": {"requests": {"cpu": "500m"}, "limits": {"cpu": 2}}}},
    "a download": {"model": HUB},
    "one claim for both": {"storage": {"output": {"claimName": "models"}}},
    "a suspended job": {"suspend": True},
    "everything of scheduling": {
        "workers": {
            "nodes": 2,
            "gpusPerNode": 8,
            "gpuResource": "amd.com/gpu",
            "resources": {"limits": {"rdma/hca": 1}},
            "nodeSelector": {"pool": "gpu"},
            "affinity": {
                "nodeAffinity": {
                    "requiredDuringSchedulingIgnoredDuringExecution": {
                        "nodeSelectorTerms": [{"matchExpressions": [{"key": "pool", "operator": "Exists"}]}]
                    }
                }
            },
            "tolerations": [{"key": "spot", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 30}],
            "topologySpreadConstraints": [{"topologyKey": "zone", "minDomains": 2}],
            "priorityClassName": "high",
            "schedulerName": "volcano",
            "runtimeClassName": "nvidia",
            "serviceAccountName": "trainer",
            "imagePullSecrets": ["registry"],
            "labels": {"team": "nlp"},
            "annotations": {"scheduling.volcano.sh/queue-name": "research"},
            "env": [
                {"name": "NCCL_DEBUG", "value": "INFO"},
                {"name": "WANDB_API_KEY", "valueFrom": {"secretKeyRef": {"name": "wandb", "key": "key"}}},
            ],
            "volumes": [
                {"name": "ca", "configMap": {"name": "ca"}},
                {"name": "more", "persistentVolumeClaim": {"claimName": "more"}},
                {"name": "fast", "emptyDir": {"sizeLimit": "1Gi"}},
            ],
            "volumeMounts": [
                {"name": "ca", "mountPath": "/etc/ca", "readOnly": True},
                {"name": "more", "mountPath": "/more", "subPath": "data"},
                {"name": "fast", "mountPath": "/fast"},
            ],
        },
        "queue": {"name": "research", "priorityClass": "high"},
    },
    "every section": {
        "preset": "llama3/8B_lora",
        "adapter": {"rank": 16},
        "validation": {"volumePath": "v.jsonl"},
        "training": {"epochs": 2},
    },
}


@pytest.fixture
def typed(manifest, namespace):
    """typed(name, uid, **spec changes): the FineTuneJob as the operator reads it."""

    def make(name="job", uid="0a1b2c3d-0000-4000-8000-000000000001", **changes):
        body = manifest(name, **changes)
        body["metadata"] |= {"namespace": namespace, "uid": uid}
        return api.parse(body)

    return make


@pytest.mark.parametrize("case", JOBS)
def test_the_api_server_admits_what_is_built_and_warns_of_nothing(kubectl, typed, case):
    job = typed(**JOBS[case])
    objects = [
        stage_job_of(job, SETTINGS),
        build.config_map(job, build.run_config(job), "PEM"),
        build.service(job),
        build.worker_job(job, 1, SETTINGS),
    ]
    stream = "\n---\n".join(map(json.dumps, objects))
    answer = kubectl("create", "--dry-run=server", "--validate=strict", "-f", "-", "--output=name", stdin=stream)
    # Pod Security's `restricted` profile would warn on stderr here.
    assert (answer.returncode, answer.stderr) == (0, "")
    assert len(answer.stdout.split()) == len(objects)


@pytest.fixture(scope="module")
def restricted(kubectl, namespace):
    """The namespace enforces `restricted` from here on: the API server refuses pods, where it only warned of Jobs."""
    level = "pod-security.kubernetes.io/enforce=restricted"
    assert kubectl("label", "namespace", namespace, level, "--overwrite").returncode == 0
    return namespace


def pod_of(job):
    template = job["spec"]["template"]
    metadata = {**template["metadata"], "name": "one", "namespace": job["metadata"]["namespace"]}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]}


PRIVILEGED = {
    "the nodes' network": ({"hostNetwork": True}, "host namespaces (hostNetwork=true)"),
    "pinned memory": ({"rdma": True}, 'unrestricted capabilities (container "main" must not include "IPC_LOCK"'),
}


@pytest.mark.parametrize("case", ["one worker on the CPU", "a download", "one claim for both", "every section"])
def test_pods_are_admitted_where_restricted_is_enforced(kubectl, restricted, typed, case):
    job = typed(**JOBS[case])
    for made in (stage_job_of(job, SETTINGS), build.worker_job(job, 1, SETTINGS)):
        answer = kubectl("create", "--dry-run=server", "-f", "-", stdin=pod_of(made))
        assert (answer.returncode, answer.stderr) == (0, "")


@pytest.mark.parametrize("case", PRIVILEGED)
def test_only_what_an_administrator_must_allow_is_refused_there(kubectl, restricted, typed, case):
    workers, words = PRIVILEGED[case]
    answer = kubectl(
        "create", "--dry-run=server", "-f", "-", stdin=pod_of(build.worker_job(typed(workers=workers), 1, SETTINGS))
    )
    assert answer.returncode == 1
    assert words in answer.stderr


def test_the_longest_name_makes_names_that_fit(kubectl, typed):
    job = typed("a" * names.MAX_NAME_LENGTH, workers={"nodes": 1024})
    objects = [
        build.service(job),
        build.config_map(job, build.run_config(job), ""),
        build.worker_job(job, 9999, SETTINGS),
    ]
    stream = "\n---\n".join(map(json.dumps, objects))
    answer = kubectl("create", "--dry-run=server", "-f", "-", "--output=name", stdin=stream)
    assert (answer.returncode, answer.stderr) == (0, "")


@pytest.fixture
def shared(kubectl, apply, manifest, namespace, typed):
    """Two FineTuneJobs that need the same weights, and a command that applies under the manager of one of them."""

    def existing(name):
        assert apply(manifest(name)).returncode == 0
        path = ["get", "ftj", name, "--namespace", namespace, "--output=jsonpath={.metadata.uid}"]
        # Not the weights of the manifest: an operator that runs in this cluster may stage those.
        return typed(name, kubectl(*path).stdout, model={"volumePath": "models/shared"})

    def under(job, document):
        manager = names.stage_manager(job)
        return kubectl("apply", "--server-side", "--field-manager", manager, "-f", "-", stdin=document)

    return existing("first"), existing("second"), under


def idle(document):
    """The Job without pods: only its owners matter here."""
    return {**document, "spec": {**document["spec"], "suspend": True}}


def test_owners_of_a_staging_job_add_up_and_it_goes_with_the_last(kubectl, namespace, shared):
    first, second, under = shared
    assert under(first, idle(stage_job_of(first, SETTINGS))).returncode == 0
    assert under(second, stagers.stage_adoption(second, contents(second.spec)[0])).returncode == 0
    name = names.stage_name(first.spec, contents(first.spec)[0])
    found = json.loads(kubectl("get", "job", name, "--namespace", namespace, "--output=json").stdout)
    assert sorted(owner["name"] for owner in found["metadata"]["ownerReferences"]) == ["first", "second"]
    assert found["spec"]["template"]["spec"]["containers"][0]["image"] == SETTINGS.trainer_image
    for job in (first, second):
        assert kubectl("get", "job", name, "--namespace", namespace).returncode == 0
        assert kubectl("delete", "ftj", job.name, "--namespace", namespace).returncode == 0
    gone = kubectl("wait", "--for=delete", f"job/{name}", "--namespace", namespace, "--timeout=60s")
    assert gone.returncode == 0, gone.stderr


def test_an_adoption_does_not_bring_back_a_job_that_is_gone(kubectl, namespace, shared):
    first, _, under = shared
    answer = under(first, stagers.stage_adoption(first, contents(first.spec)[0]))
    assert answer.returncode == 1
    assert "spec.template" in answer.stderr
    name = names.stage_name(first.spec, contents(first.spec)[0])
    assert kubectl("get", "job", name, "--namespace", namespace).returncode == 1
