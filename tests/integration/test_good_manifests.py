"""What can work is admitted: every option, every preset, every example. What was started cannot be changed."""

import json
from typing import get_args

import pytest
import yaml
from cluster_tool import REPOSITORY
from tests.integration.manifests import resources

from kubetune_contract.config import TargetModule
from kubetune_contract.presets import preset_names
from kubetune_operator import api, build, changes

HUB = {"repo": "meta-llama/Llama-3.2-1B"}
GATED = {"revision": "v2.1", "ignorePatterns": ["original/*"], "tokenSecretRef": {"name": "hf"}}

BUCKET = {
    "uri": "s3://acme-models/llama/8B v1",
    "endpoint": "https://minio.storage.svc:9000",
    "region": "eu-central-1",
    "ignorePatterns": ["original/*"],
    "credentialsSecretRef": {"name": "bucket"},
}


GOOD = {
    "the smallest": {},
    "a model from the Hub": {"model": {"volumePath": None, "huggingFace": HUB}},
    "a gated model": {"model": {"volumePath": None, "huggingFace": HUB | GATED}},
    "a model in a bucket": {"model": {"volumePath": None, "s3": BUCKET}},
    "data of the Hub and of a public bucket": {
        "dataset": {
            "volumePath": None,
            "huggingFace": {"repo": "acme/chats", "path": "data/train.jsonl", "tokenSecretRef": {"name": "hf"}},
            "mixture": [{"s3": {"uri": "s3://acme-chats"}}, {"volumePath": "more.jsonl"}],
        },
        "validation": {"huggingFace": {"repo": "acme/chats", "split": "test"}},
    },
    "the memory of a GPU": {"workers": {"gpusPerNode": 8, "gpuMemory": "80Gi"}},
    "a path with dots in its names": {"model": {"volumePath": "models/Llama-3.2-1B/v1.0"}},
    "a hidden folder": {"model": {"volumePath": ".cache/llama"}},
    "all data options": {
        "dataset": {
            "format": "Alpaca",
            "columns": {"instruction": "question", "output": "answer"},
            "promptTemplate": {"user": {"prefix": "Q: "}, "assistant": {"prefix": "A: "}},
            "weight": 0.5,
            "trainOn": "Last",
            "maxSequenceLength": 16,
            "packed": True,
            "shuffle": False,
            "maxBadRows": 3,
            "mixture": [{"volumePath": "more.jsonl", "format": "ShareGPT", "weight": 2}],
        }
    },
    "a named template": {"dataset": {"promptTemplate": {"name": "Summarize"}}},
    "preferences": {"dataset": {"format": "Preference"}, "dpo": {"beta": 0.2, "labelSmoothing": 0.1}},
    "a held-out part": {"validation": {"fraction": 0.05, "everySteps": 10}, "checkpoint": {"keepBest": True}},
    "the best checkpoint by a preset's validation, which the API server cannot know": {
        "preset": "llama3/8B_lora",
        "checkpoint": {"keepBest": True},
    },
    "QLoRA": {"method": "QLoRA", "quantization": {"double": False}},
    "QDoRA": {"method": "QDoRA"},
    "held-out data": {"validation": {"volumePath": "v.jsonl", "everySteps": 10, "samples": 64, "sampleTokens": 1}},
    "LoRA by name": {"method": "LoRA", "adapter": {"rank": 1, "alpha": 0.5, "dropout": 0.99}},
    "LoRA on one layer": {"adapter": {"targetModules": ["q_proj"]}},
    "LoRA on all layers": {"adapter": {"targetModules": list(get_args(TargetModule))}},
    "a merged model": {"export": {"merged": True}},
    "full fine-tuning": {"method": "Full"},
    "full fine-tuning without a merge": {"method": "Full", "export": {"merged": False}},
    "full fine-tuning over a LoRA preset": {"method": "Full", "preset": preset_names()[0]},
    "an empty section": {"training": {}},
    "a whole number for a fraction": {"training": {"weightDecay": 0, "learningRate": 1}},
    "a very small learning rate": {"training": {"learningRate": 1e-9}},
    "more warm-up than a preset's steps, which the API server cannot know": {"training": {"warmupSteps": 5000}},
    "few steps with little warm-up": {"training": {"maxSteps": 10, "warmupSteps": 9}},
    "steps without a word on warm-up": {"training": {"maxSteps": 10}},
    "every optimizer option": {
        "training": {"beta1": 0, "beta2": 0.95, "epsilon": 1e-6, "maxGradientNorm": 0.5, "schedule": "Constant"}
    },
    "every memory option": {
        "method": "Full",
        "training": {
            "optimizer": "PagedAdamW8bit",
            "optimizerInBackward": True,
            "gradientAccumulationSteps": 1,
            "maxGradientNorm": 0,
            "masterWeights": "BF16",
            "activationCheckpointing": "Selective",
            "sharding": "Hybrid",
            "compile": True,
        },
    },
    "weights in host memory": {"training": {"cpuOffload": True, "optimizer": "AdamW"}},
    "logs and a profile": {"logging": {"tensorboard": True, "wandbProject": "bot"}, "profiler": {"memory": True}},
    "frequent checkpoints": {"checkpoint": {"everySteps": 1, "keep": 1}},
    "many nodes": {"workers": {"nodes": 1024, "gpusPerNode": 8}},
    "amounts as numbers": resources("requests", "cpu", 4),
    "amounts in thousandths": resources("requests", "cpu", "1500m"),
    "amounts in binary units": resources("limits", "memory", "16Gi"),
    "amounts in decimal units": resources("limits", "memory", "1.5G"),
    "other devices": resources("limits", "rdma/hca", 1),
    "everything of scheduling": {
        "workers": {
            "nodeSelector": {"pool": "h100"},
            "tolerations": [{"operator": "Exists"}, {"key": "a", "effect": "NoExecute", "tolerationSeconds": 0}],
            "affinity": {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": []}}},
            "topologySpreadConstraints": [{"topologyKey": "zone", "minDomains": 2}],
            "priorityClassName": "high",
            "schedulerName": "volcano",
            "runtimeClassName": "nvidia",
            "serviceAccountName": "trainer",
            "imagePullSecrets": ["registry"],
            "labels": {"scheduling.x-k8s.io/pod-group": "gang", "team": ""},
            "annotations": {"kueue.x-k8s.io/podset-required-topology": "rack"},
            "hostNetwork": True,
            "rdma": True,
        },
        "queue": {"name": "research", "priorityClass": "high"},
    },
    "every kind of variable": {
        "workers": {
            "env": [
                {"name": "NCCL_DEBUG", "value": "INFO"},
                {"name": "EMPTY"},
                {"name": "WANDB_API_KEY", "valueFrom": {"secretKeyRef": {"name": "wandb", "key": "key"}}},
                {"name": "PROXY", "valueFrom": {"configMapKeyRef": {"name": "n", "key": "k", "optional": True}}},
            ]
        }
    },
    "every kind of volume": {
        "workers": {
            "volumes": [
                {"name": "a", "configMap": {"name": "ca"}},
                {"name": "b", "secret": {"secretName": "s"}},
                {"name": "c", "persistentVolumeClaim": {"claimName": "c"}},
                {"name": "d", "emptyDir": {}},
                {"name": "e", "ephemeral": {"volumeClaimTemplate": {}}},
                {"name": "f", "csi": {"driver": "d"}},
                {"name": "g", "downwardAPI": {"items": []}},
            ],
            "volumeMounts": [{"name": name, "mountPath": f"/mnt/{name}", "subPath": "a..b/c"} for name in "abcdefg"],
        }
    },
    "another maker's GPUs": {"workers": {"gpusPerNode": 8, "gpuResource": "amd.com/gpu"}},
    "one claim for both": {"storage": {"output": {"claimName": "models"}}},
    "no restart": {"failurePolicy": {"maxRestarts": 0}},
    "a job that waits": {"suspend": True},
}


@pytest.mark.parametrize("case", GOOD)
def test_kubectl_admits(apply, manifest, case):
    answer = apply(manifest("good", **GOOD[case]), "--dry-run=server")
    assert (answer.returncode, answer.stderr) == (0, "")


@pytest.mark.parametrize("name", preset_names())
def test_kubectl_admits_every_preset_by_name(apply, manifest, name):
    answer = apply(manifest("preset", preset=name), "--dry-run=server")
    assert (answer.returncode, answer.stderr) == (0, "")


@pytest.mark.parametrize("name", ["a", "a" * 45, "support-bot-2"])
def test_kubectl_admits_the_name(apply, manifest, name):
    answer = apply(manifest(name), "--dry-run=server")
    assert (answer.returncode, answer.stderr) == (0, "")


EXAMPLES = sorted((REPOSITORY / "examples").rglob("*.yaml"))
EXAMPLES = [path for path in EXAMPLES if path.parent.name != "demo"]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_every_example_is_admitted_and_makes_a_run(apply, namespace, path):
    text = path.read_text()
    own = yaml.safe_load(text)["metadata"].get("namespace")
    here = text.replace(f"namespace: {own}", f"namespace: {namespace}")  # a dry run does not make the one it names
    answer = apply(here, "--dry-run=server", "--output=json")
    assert (answer.returncode, answer.stderr) == (0, "")
    job = api.parse(json.loads(answer.stdout))
    assert build.run_config(job).output_dir.startswith(f"/kubetune/output/{job.name}-")


def test_defaults_of_the_spec_are_filled_in_and_those_of_presets_are_not(apply, manifest, kubectl, namespace):
    assert apply(manifest("filled", preset="llama3/8B_lora", training={"epochs": 2})).returncode == 0
    found = kubectl("get", "ftj", "filled", "--namespace", namespace, "--output=json")
    spec = json.loads(found.stdout)["spec"]
    assert spec["workers"] == {
        "nodes": 1,
        "gpusPerNode": 0,
        "gpuResource": "nvidia.com/gpu",
        "resources": {},
        "hostNetwork": False,
        "rdma": False,
    }
    assert spec["failurePolicy"] == {"maxRestarts": 3}
    assert spec["suspend"] is False
    assert spec["training"] == {"epochs": 2}
    assert spec["dataset"] == {"volumePath": "data/train.jsonl"}
    assert "adapter" not in spec


# --- changes ----------------------------------------------------------------------------------------------------------

CHANGES = {
    "preset": {"preset": "demo/smollm2_lora"},
    "method": {"method": "LoRA"},
    "model": {"model": {"volumePath": "models/other"}},
    "dataset": {"dataset": {"shuffle": False}},
    "validation": {"validation": {"volumePath": "held-out.jsonl"}},
    "adapter": {"adapter": {"rank": 4}},
    "quantization": {"quantization": {"double": False}},
    "dpo": {"dpo": {"beta": 0.2}},
    "training": {"training": {"epochs": 3}},
    "logging": {"logging": {"tensorboard": True}},
    "profiler": {"profiler": {"steps": 2}},
    "checkpoint": {"checkpoint": {"keep": 5}},
    "export": {"export": {"merged": True}},
    "workers.priorityClassName": {"workers": {"priorityClassName": "high"}},
    "queue": {"queue": {"name": "team"}},
    "cleanPodPolicy": {"cleanPodPolicy": "All"},
    "storage": {"storage": {"output": {"claimName": "other"}}},
}


@pytest.fixture(scope="module")
def existing(apply, manifest):
    """A FineTuneJob that is there: sections that are not set can be added or not, that is the question."""
    assert apply(manifest("fixed")).returncode == 0
    return "fixed"


@pytest.mark.parametrize("field", CHANGES)
def test_what_was_started_cannot_be_changed(apply, manifest, existing, field):
    answer = apply(manifest(existing, **CHANGES[field]))
    told = f"spec: Invalid value: spec.{field} cannot be changed: create a new FineTuneJob"
    assert (answer.returncode, answer.stderr.strip()) == (1, f'The FineTuneJob "{existing}" is invalid: {told}')


def test_every_field_that_cannot_be_changed_has_a_case_above():
    fields = {field.alias for field in api.FineTuneJobSpec.model_fields.values()}
    assert fields - set(changes.ALWAYS) == {path.partition(".")[0] for path in CHANGES}


def test_a_section_cannot_be_taken_away(apply, manifest):
    assert apply(manifest("section", training={"epochs": 3})).returncode == 0
    answer = apply(manifest("section"))
    told = "spec: Invalid value: spec.training cannot be changed: create a new FineTuneJob"
    assert answer.stderr.strip() == f'The FineTuneJob "section" is invalid: {told}'


def test_suspend_can_be_changed_and_changed_back(apply, manifest):
    answers = [apply(manifest("paused", suspend=suspend)) for suspend in (False, True, False)]
    assert [answer.stdout.split()[-1] for answer in answers] == ["created", "configured", "configured"]


def test_the_same_manifest_again_changes_nothing(apply, manifest):
    answers = [apply(manifest("same", training={"epochs": 2}, workers={"nodes": 2})) for _ in range(2)]
    assert [answer.stdout.split()[-1] for answer in answers] == ["created", "unchanged"]


# --- what kubectl shows -----------------------------------------------------------------------------------------------

SHOWN = {
    "before the operator has seen it": ({}, []),
    "while it trains": (
        {
            "state": "Running",
            "progress": {"step": 42, "totalSteps": 100, "epoch": 0.42, "percentage": 42, "loss": 1.23456789},
            "display": {"progress": "42%", "loss": "1.235", "eta": "3m10s"},
        },
        ["Running", "42%", "1.235", "3m10s"],
    ),
    "after a failure": ({"state": "Failed", "completionTime": "2030-01-01T00:00:00Z"}, ["Failed"]),
}


@pytest.mark.parametrize("case", SHOWN)
def test_kubectl_get_shows(apply, manifest, kubectl, namespace, case):
    status, cells = SHOWN[case]
    name = f"shown-{list(SHOWN).index(case)}"
    assert apply(manifest(name)).returncode == 0
    where = ["ftj", name, "--namespace", namespace]
    patched = kubectl("patch", *where, "--subresource=status", "--type=merge", "-p", json.dumps({"status": status}))
    assert (patched.returncode, patched.stderr) == (0, "")
    header, row = kubectl("get", *where).stdout.splitlines()
    assert header.split() == ["NAME", "STATE", "PROGRESS", "LOSS", "ETA", "AGE"]
    assert row.split()[1:-1] == cells


def test_kubectl_explain_tells_a_field(kubectl, crd):
    told = kubectl("explain", "ftj.spec.training.learningRate").stdout
    assert "Highest learning rate of the schedule. Default: 0.0003." in told
