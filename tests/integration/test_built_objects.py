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
