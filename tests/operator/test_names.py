"""Names follow from the FineTuneJob alone, fit Kubernetes' limits and do not collide."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kubetune_operator import names
from kubetune_operator.api import FineTuneJobSpec
from kubetune_operator.contents import contents, folder_of
from kubetune_operator.sources import HuggingFaceSource, ModelSource, SecretKey

HUB = HuggingFaceSource(repo="meta-llama/Meta-Llama-3-8B")
DNS_LABEL = re.compile(r"^[a-z]([-a-z0-9]{0,61}[a-z0-9])?$")


def volume(path):
    return ModelSource(volume_path=path)


def hub(**changes):
    return ModelSource(hugging_face=HUB.model_copy(update=changes))


def test_objects_are_named_after_the_job():
    assert names.job_name("bot", 3) == "bot-a3"
    assert names.service_name("bot") == "bot"
    assert names.config_map_name("bot") == "bot-kubetune"
    assert names.leader_host("bot", 3) == "bot-a3-0.bot"


def test_labels_say_job_attempt_and_role():
    assert names.worker_labels("bot", 2) == {
        "app.kubernetes.io/managed-by": "kubetune",
        "kubetune.io/job": "bot",
        "kubetune.io/attempt": "2",
        "kubetune.io/role": "worker",
    }


def test_a_shared_staging_job_names_no_single_owner_in_its_labels():
    assert names.stage_labels() == {"app.kubernetes.io/managed-by": "kubetune", "kubetune.io/role": "stage"}


@given(st.from_regex(r"[a-z][-a-z0-9]{0,43}[a-z0-9]", fullmatch=True), st.integers(1, 99999), st.integers(0, 1023))
def test_the_longest_host_name_still_is_a_label(name, attempt, index):
    assert DNS_LABEL.match(f"{names.job_name(name, attempt)}-{index}")
    assert len(names.config_map_name(name)) <= 63


def stage(source, claim="models", **workers):
    spec = {
        "model": source.to_dict(),
        "dataset": {"volumePath": "data/train.jsonl"},
        "storage": {"models": {"claimName": claim}, "output": {"claimName": "tuned"}},
        "workers": workers,
    }
    read = FineTuneJobSpec.model_validate(spec)
    return names.stage_name(read, contents(read)[0])


SAME = {
    "the same folder": (volume("models/a"), volume("models/a")),
    "the same repository": (hub(), hub()),
    "a revision that is the default": (hub(revision="main"), hub()),
}
DIFFERENT = {
    "another folder": (volume("models/a"), volume("models/b")),
    "another repository": (hub(), hub(repo="meta-llama/Llama-3.2-1B")),
    "another revision": (hub(), hub(revision="v2")),
    "other files": (hub(), hub(ignore_patterns=["original/*"])),
    "another token": (hub(), hub(token_secret_ref=SecretKey(name="hf"))),
    "another key of the token's Secret": (
        hub(token_secret_ref=SecretKey(name="hf")),
        hub(token_secret_ref=SecretKey(name="hf", key="other")),
    ),
    "a folder that is named like a repository": (volume("meta-llama/Meta-Llama-3-8B"), hub()),
}


@pytest.mark.parametrize("case", SAME)
def test_jobs_that_need_the_same_share_one_staging_job(case):
    one, other = SAME[case]
    assert stage(one, "models") == stage(other, "models")


@pytest.mark.parametrize("case", DIFFERENT)
def test_jobs_that_need_something_else_have_their_own(case):
    one, other = DIFFERENT[case]
    assert stage(one, "models") != stage(other, "models")


def test_the_same_weights_on_another_claim_are_another_staging_job():
    assert stage(hub(), "models") != stage(hub(), "models-2")


PLACES = {
    "a label of nodes": {"nodeSelector": {"pool": "gpu"}},
    "a taint": {"tolerations": [{"operator": "Exists"}]},
    "affinity to nodes": {"affinity": {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {}}}},
    "a service account": {"serviceAccountName": "trainer"},
    "a pull secret": {"imagePullSecrets": ["registry"]},
}


@pytest.mark.parametrize("case", PLACES)
def test_a_job_does_not_wait_for_nodes_that_only_another_asks_for(case):
    assert stage(hub(), **PLACES[case]) != stage(hub())
    assert stage(hub(), **PLACES[case]) == stage(hub(), **PLACES[case])


GANG = {
    "GPUs": {"gpusPerNode": 8},
    "spread": {"topologySpreadConstraints": [{"topologyKey": "zone"}]},
    "affinity to pods": {"affinity": {"podAffinity": {"x": 1}}},
    "a scheduler": {"schedulerName": "volcano"},
}


@pytest.mark.parametrize("case", GANG)
def test_what_is_about_the_gang_alone_does_not_keep_jobs_from_sharing(case):
    assert stage(hub(), **GANG[case]) == stage(hub())


def test_the_staging_job_has_a_name_that_does_not_change_between_versions():
    assert stage(volume("models/llama"), "models") == "kubetune-stage-291294c129"


def test_each_owner_of_a_staging_job_is_its_own_field_manager(job):
    one, other = job(), job(metadata={"uid": "0a1b2c3d-0000-4000-8000-000000000002"})
    assert names.stage_manager(one) == "kubetune-0a1b2c3d-0000-4000-8000-000000000001"
    assert names.stage_manager(one) != names.stage_manager(other)
    assert len(names.stage_manager(one)) <= 128


def test_weights_that_are_there_stay_where_they_are(job):
    assert folder_of(job().spec.model) == "models/llama"


def test_a_download_has_a_folder_that_says_what_it_is(job):
    spec = job(model={"volumePath": None, "huggingFace": {"repo": "meta-llama/Llama-3.2-1B"}}).spec
    assert re.fullmatch(r"huggingface/meta-llama--Llama-3.2-1B-[0-9a-f]{10}", folder_of(spec.model))


def test_who_downloads_does_not_change_the_folder(job):
    source = {"repo": "meta-llama/Llama-3.2-1B"}
    plain = job(model={"volumePath": None, "huggingFace": source})
    token = job(model={"volumePath": None, "huggingFace": source | {"tokenSecretRef": {"name": "hf"}}})
    assert folder_of(plain.spec.model) == folder_of(token.spec.model)


@pytest.mark.parametrize("change", [{"revision": "v2"}, {"ignorePatterns": ["*.bin"]}, {"repo": "meta-llama/other"}])
def test_other_files_have_another_folder(job, change):
    source = {"repo": "meta-llama/Llama-3.2-1B"}
    one = job(model={"volumePath": None, "huggingFace": source})
    other = job(model={"volumePath": None, "huggingFace": source | change})
    assert folder_of(one.spec.model) != folder_of(other.spec.model)


def test_a_new_job_of_the_same_name_writes_into_a_new_folder(job):
    first, second = job(), job(metadata={"uid": "ffffffff-0000-4000-8000-000000000002"})
    assert names.output_path(first) == "bot-0a1b2c3d"
    assert names.output_path(second) == "bot-ffffffff"
