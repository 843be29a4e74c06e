"""The Kubernetes objects of a FineTuneJob: compared as the YAML they stand for, then one thing at a time."""

import json
from pathlib import Path

import pytest
import yaml

from kubetune_contract.config import AdapterConfig, RunConfig
from kubetune_contract.exit_codes import RETRYABLE, USER_ERRORS, ExitCode
from kubetune_contract.staging import StageSource
from kubetune_operator import build, stagers
from kubetune_operator.contents import contents, folder_of
from kubetune_operator.errors import InvalidJob


def stage_job_of(job, settings):
    """The staging Job of the model."""
    return stagers.stage_job(job, contents(job.spec)[0], settings)


BELOW_THE_ROOT = "must be a path below the volume's root: without a leading '/' and without '..'"
HUB = {"volumePath": None, "huggingFace": {"repo": "meta-llama/Llama-3.2-1B"}}


def expected(name):
    return yaml.safe_load((Path(__file__).parent / "expected" / f"{name}.yaml").read_text())


def test_a_worker_job_reads_like_this(job, settings):
    resources = {"requests": {"cpu": 4}, "limits": {"memory": "16Gi"}}
    gang = job(workers={"nodes": 2, "gpusPerNode": 8, "resources": resources})
    assert build.worker_job(gang, 2, settings) == expected("worker_job")


def test_a_staging_job_reads_like_this(job, settings):
    assert stage_job_of(job(), settings) == expected("stage_job")


def test_a_service_reads_like_this(job):
    assert build.service(job()) == expected("service")


def test_the_service_selects_the_workers_of_every_attempt(job, settings):
    selector = build.service(job())["spec"]["selector"]
    for attempt in (1, 2):
        labels = build.worker_job(job(), attempt, settings)["spec"]["template"]["metadata"]["labels"]
        assert selector.items() <= labels.items()


# --- the configuration of the run -------------------------------------------------------------------------------------


def test_the_config_map_holds_the_run_and_the_authority(job):
    one = job(training={"epochs": 3})
    found = build.config_map(one, build.run_config(one), "PEM")
    assert found["metadata"]["name"] == "bot-kubetune"
    assert found["metadata"]["ownerReferences"][0]["controller"] is True
    assert found["data"]["ca.crt"] == "PEM"
    assert RunConfig.model_validate_json(found["data"]["run.json"]) == build.run_config(one)


def test_without_a_progress_endpoint_there_is_no_authority(job):
    assert "ca.crt" not in build.config_map(job(), build.run_config(job()), "")["data"]


def test_a_zero_that_means_off_reaches_the_trainer(job):
    config = build.run_config(job(training={"maxGradientNorm": 0}))
    written = build.config_map(job(), config, "")["data"]["run.json"]
    assert RunConfig.model_validate_json(written).training.max_gradient_norm == 0


def test_paths_are_those_inside_the_containers(job):
    config = build.run_config(job(validation={"volumePath": "data/held-out.jsonl"}))
    assert config.model.path == "/kubetune/models/models/llama"
    assert config.dataset.path == "/kubetune/models/data/train.jsonl"
    assert config.validation is not None
    assert config.validation.path == "/kubetune/models/data/held-out.jsonl"
    assert config.output_dir == "/kubetune/output/bot-0a1b2c3d"


CONFIGS = {
    "the preset's value": ({}, lambda run: run.training.activation_checkpointing, "Full"),
    "a value over the preset's": ({"training": {"epochs": 7}}, lambda run: run.training.epochs, 7),
    "the preset's value beside one that is laid over it": (
        {"training": {"epochs": 7}},
        lambda run: run.training.learning_rate,
        3e-4,
    ),
    "the default where no preset is named": (
        {"preset": None},
        lambda run: run.training.activation_checkpointing,
        "None",
    ),
    "LoRA where nothing else is said": ({"preset": None}, lambda run: run.lora, AdapterConfig()),
    "full fine-tuning drops the preset's adapter": ({"method": "Full"}, lambda run: run.lora, None),
    "an option of the data": (
        {"dataset": {"maxSequenceLength": 512}},
        lambda run: run.dataset.max_sequence_length,
        512,
    ),
    "an option of the held-out data": (
        {"validation": {"volumePath": "v.jsonl", "samples": 3}},
        lambda run: run.validation.samples,
        3,
    ),
    "no held-out data": ({}, lambda run: run.validation, None),
    "an option of the checkpoints": ({"checkpoint": {"keep": 9}}, lambda run: run.checkpoint.keep, 9),
    "an option of the export": ({"export": {"merged": True}}, lambda run: run.export.merged, True),
    "modules replace the preset's, they do not add to them": (
        {"adapter": {"targetModules": ["q_proj"]}},
        lambda run: run.lora.target_modules,
        ["q_proj"],
    ),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_the_run_takes(job, case):
    changes, read, value = CONFIGS[case]
    assert read(build.run_config(job(**changes))) == value


INVALID = {
    "a preset that does not exist": (
        {"preset": "llama3/9B"},
        ["spec.preset: 'llama3/9B' is unknown; the presets are"],
    ),
    "a rate out of bounds": (
        {"training": {"learningRate": 3}},
        ["spec.training.learningRate: input should be less than or equal to 1, but it is 3"],
    ),
    "a slip in a section": (
        {"training": {"lerningRate": 1e-4}},
        ["spec.training.lerningRate: unknown field; did you mean learningRate?"],
    ),
    "accumulation that the preset brings": (
        {"training": {"optimizerInBackward": True, "maxGradientNorm": 0}, "method": "Full"},
        [
            "spec.training: optimizerInBackward needs gradientAccumulationSteps 1, but it is 8: "
            "a gradient that is used at once cannot be added up"
        ],
    ),
    "an adapter without LoRA": (
        {"method": "Full", "adapter": {"rank": 4}},
        ["spec.adapter does not go with method Full: remove adapter, or set method to LoRA"],
    ),
    "a merge without LoRA": (
        {"method": "Full", "export": {"merged": True}},
        ["spec.export.merged does not go with method Full: full fine-tuning writes a whole model anyway"],
    ),
    "data without a file": (
        {"dataset": {"volumePath": None}},
        ["spec.dataset: exactly one of volumePath, huggingFace and s3 is required"],
    ),
    "data outside the volume": (
        {"dataset": {"volumePath": "../train.jsonl"}},
        [f"spec.dataset.volumePath ../train.jsonl {BELOW_THE_ROOT}"],
    ),
    "held-out data outside the volume": (
        {"validation": {"volumePath": "a/../../b"}},
        [f"spec.validation.volumePath a/../../b {BELOW_THE_ROOT}"],
    ),
    "a slip in the name of the file": (
        {"dataset": {"volumePth": "x"}},
        ["spec.dataset.volumePth: unknown field; did you mean volumePath?"],
    ),
    "problems in two sections": (
        {"dataset": {"format": "Alpaka"}, "checkpoint": {"keep": 0}},
        [
            "spec.dataset.format: input should be",
            "spec.checkpoint.keep: input should be greater than or equal to 1, but it is 0",
        ],
    ),
}


@pytest.mark.parametrize("case", INVALID)
def test_a_run_that_cannot_work_is_told_as_in_the_manifest(job, case):
    changes, expected = INVALID[case]
    with pytest.raises(InvalidJob) as caught:
        build.run_config(job(**changes))
    assert len(caught.value.problems) == len(expected)
    for found, wanted in zip(caught.value.problems, expected, strict=True):
        assert found.startswith(wanted)


# --- workers ----------------------------------------------------------------------------------------------------------


def container(manifest):
    return manifest["spec"]["template"]["spec"]["containers"][0]


def variables(manifest):
    return {entry["name"]: entry.get("value", entry.get("valueFrom")) for entry in container(manifest)["env"]}


def test_one_node_meets_itself(job, settings):
    found = variables(build.worker_job(job(workers={"nodes": 1}), 1, settings))
    assert found["PET_MASTER_ADDR"] == "127.0.0.1"
    assert found["PET_NNODES"] == "1"


def test_each_attempt_meets_at_its_own_rank_0(job, settings):
    addresses = [variables(build.worker_job(job(), attempt, settings))["PET_MASTER_ADDR"] for attempt in (1, 2)]
    assert addresses == ["bot-a1-0.bot", "bot-a2-0.bot"]


PROCESSES = {"one on the CPU": (0, "1"), "one for one GPU": (1, "1"), "eight for eight GPUs": (8, "8")}


@pytest.mark.parametrize("case", PROCESSES)
def test_processes_of_a_pod(job, settings, case):
    gpus, processes = PROCESSES[case]
    found = variables(build.worker_job(job(workers={"gpusPerNode": gpus}), 1, settings))
    assert found["PET_NPROC_PER_NODE"] == processes


def cores(side):
    return {"resourceFieldRef": {"resource": f"{side}.cpu", "divisor": "1"}}


THREADS = {
    "as many as the limit": ({"resources": {"limits": {"cpu": 4}}}, cores("limits")),
    "as many as the request where there is no limit": ({"resources": {"requests": {"cpu": "500m"}}}, cores("requests")),
    "the limit goes before the request": (
        {"resources": {"limits": {"cpu": 4}, "requests": {"cpu": 2}}},
        cores("limits"),
    ),
    "left to the trainer where nothing is said": ({}, None),
    "left to the trainer on GPUs": ({"gpusPerNode": 1, "resources": {"limits": {"cpu": 4}}}, None),
}


@pytest.mark.parametrize("case", THREADS)
def test_threads_on_the_cpu(job, settings, case):
    workers, value = THREADS[case]
    assert variables(build.worker_job(job(workers=workers), 1, settings)).get("OMP_NUM_THREADS") == value


RESOURCES = {
    "nothing asked for": ({}, {}),
    "memory": ({"resources": {"limits": {"memory": "8Gi"}}}, {"limits": {"memory": "8Gi"}}),
    "numbers become text, as the API server keeps them": (
        {"resources": {"requests": {"cpu": 2}}},
        {"requests": {"cpu": "2"}},
    ),
    "GPUs": ({"gpusPerNode": 2}, {"limits": {"nvidia.com/gpu": "2"}}),
    "GPUs and memory": (
        {"gpusPerNode": 2, "resources": {"limits": {"memory": "8Gi"}}},
        {"limits": {"memory": "8Gi", "nvidia.com/gpu": "2"}},
    ),
}


@pytest.mark.parametrize("case", RESOURCES)
def test_resources_of_a_worker(job, settings, case):
    workers, resources = RESOURCES[case]
    assert container(build.worker_job(job(workers=workers), 1, settings))["resources"] == resources


def test_a_suspended_job_starts_without_pods(job, settings):
    assert build.worker_job(job(suspend=True), 1, settings)["spec"]["suspend"] is True


def test_without_a_progress_endpoint_workers_report_to_nobody(job, settings):
    silent = settings.model_copy(update={"progress_url": None})
    assert "KUBETUNE_PROGRESS_URL" not in variables(build.worker_job(job(), 1, silent))


@pytest.mark.parametrize("code", list(ExitCode))
def test_the_pod_failure_policy_agrees_with_the_contract(job, settings, code):
    disruption, own = build.worker_job(job(), 1, settings)["spec"]["podFailurePolicy"]["rules"]
    assert disruption["onPodConditions"]  # goes first: an evicted trainer may end with any code
    assert (code in own["onExitCodes"]["values"]) == (code in USER_ERRORS)
    assert not set(own["onExitCodes"]["values"]) & set(RETRYABLE)


def test_two_attempts_differ_in_nothing_but_name_number_address_and_url(job, settings):
    first, second = (json.dumps(build.worker_job(job(), attempt, settings)) for attempt in (1, 2))
    renamed = first.replace("bot-a1", "bot-a2").replace('attempt": "1"', 'attempt": "2"').replace("/bot/1", "/bot/2")
    assert renamed == second


# --- staging ----------------------------------------------------------------------------------------------------------


def asked(manifest):
    command, option, document = container(manifest)["args"]
    assert (command, option) == ("stage", "--source")
    return StageSource.model_validate_json(document)


def test_weights_on_the_volume_are_only_checked(job, settings):
    assert asked(stage_job_of(job(), settings)) == StageSource(path="models/llama")


def test_a_repository_is_downloaded_where_the_run_looks_for_it(job, settings):
    source = {"volumePath": None, "huggingFace": {**HUB["huggingFace"], "revision": "v2", "ignorePatterns": ["*.pth"]}}
    one = job(model=source)
    found = asked(stage_job_of(one, settings))
    assert found == StageSource(
        path=folder_of(one.spec.model), repo="meta-llama/Llama-3.2-1B", revision="v2", ignore_patterns=["*.pth"]
    )
    assert build.run_config(one).model.path == f"/kubetune/models/{found.path}"


def test_the_token_comes_from_the_secret_and_only_into_the_staging_pod(job, settings):
    gated = job(model={**HUB, "huggingFace": {**HUB["huggingFace"], "tokenSecretRef": {"name": "hf", "key": "read"}}})
    assert variables(stage_job_of(gated, settings))["HF_TOKEN"] == {"secretKeyRef": {"name": "hf", "key": "read"}}
    assert "HF_TOKEN" not in variables(build.worker_job(gated, 1, settings))


def test_a_mirror_of_the_hub_is_used_for_downloads_only(job, settings):
    mirrored = settings.model_copy(update={"hub_endpoint": "https://hub.example"})
    assert variables(stage_job_of(job(model=HUB), mirrored))["HF_ENDPOINT"] == "https://hub.example"
    assert "HF_ENDPOINT" not in variables(stage_job_of(job(), mirrored))


def test_a_second_owner_adds_itself_and_nothing_else(job, settings):
    second = job("other", metadata={"uid": "ffffffff-0000-4000-8000-000000000002"})
    adoption = stagers.stage_adoption(second, contents(second.spec)[0])
    assert adoption["metadata"]["name"] == stage_job_of(job(), settings)["metadata"]["name"]
    assert [(ref["name"], "controller" in ref) for ref in adoption["metadata"]["ownerReferences"]] == [("other", False)]
    assert set(adoption) == {"apiVersion", "kind", "metadata"}


# --- both -------------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["worker", "stage"])
def any_job(request, job, settings):
    changed = settings.model_copy(update={"image_pull_policy": "Always", "image_pull_secrets": ["one", "two"]})
    return build.worker_job(job(), 1, changed) if request.param == "worker" else stage_job_of(job(), changed)


def test_pods_take_image_policy_and_secrets_from_the_settings(any_job):
    pod = any_job["spec"]["template"]["spec"]
    assert container(any_job)["imagePullPolicy"] == "Always"
    assert pod["imagePullSecrets"] == [{"name": "one"}, {"name": "two"}]


def test_every_volume_is_mounted_and_every_mount_has_a_volume(any_job):
    volumes = [volume["name"] for volume in any_job["spec"]["template"]["spec"]["volumes"]]
    mounts = [mount["name"] for mount in container(any_job)["volumeMounts"]]
    assert sorted(volumes) == sorted(mounts)


def test_what_a_library_writes_has_a_place(any_job):
    writable = {mount["mountPath"] for mount in container(any_job)["volumeMounts"] if not mount.get("readOnly")}
    for name in ("HOME", "HF_HOME", "MPLCONFIGDIR"):
        assert variables(any_job)[name].startswith("/tmp")
    assert "/tmp" in writable


def test_pods_have_the_labels_of_their_job(any_job):
    labels = any_job["spec"]["template"]["metadata"]["labels"]
    assert any_job["metadata"]["labels"].items() <= labels.items()


def test_models_and_results_may_share_a_claim(job, settings):
    one = job(storage={"output": {"claimName": "models"}})
    volumes = build.worker_job(one, 1, settings)["spec"]["template"]["spec"]["volumes"]
    claims = [volume["persistentVolumeClaim"] for volume in volumes if "persistentVolumeClaim" in volume]
    # No readOnly on the claim itself: one of the two mounts must be writable.
    assert claims == [{"claimName": "models"}, {"claimName": "models"}]


def test_the_spec_is_only_read(body, settings):
    from kubetune_operator import api

    manifest = body(dataset={"volumePath": "data/train.jsonl", "maxSequenceLength": 64}, validation={"volumePath": "v"})
    before = json.dumps(manifest)
    one = api.parse(manifest)
    for _ in range(2):
        build.config_map(one, build.run_config(one), "PEM")
        build.worker_job(one, 1, settings)
    assert json.dumps(manifest) == before
