"""Rules between fields, and what may be changed: Python and the API server say the same."""

import re

import pytest
from tests.integration.manifests import hub, resources

from kubetune_contract.base import ContractModel
from kubetune_contract.config import RunConfig, TrainingConfig
from kubetune_contract.dataset import PromptTemplate
from kubetune_operator import api, build, changes, podspec, sources, workers
from kubetune_operator.errors import InvalidJob

MODELS: tuple[type[ContractModel], ...] = (
    RunConfig,
    TrainingConfig,
    PromptTemplate,
    sources.ModelSource,
    sources.HuggingFaceData,
    sources.DatasetSpec,
    sources.MixedDatasetSpec,
    sources.ValidationSpec,
    workers.Workers,
    podspec.Toleration,
    podspec.TopologySpread,
    podspec.ValueFrom,
    podspec.EnvVar,
    podspec.Volume,
    podspec.VolumeMount,
)
AT_ONCE = {"optimizerInBackward": True, "gradientAccumulationSteps": 1, "maxGradientNorm": 0}
BROKEN = {
    "adapter does not go with method": {"method": "Full", "adapter": {"rank": 8}},
    "export.merged does not go with method": {"method": "Full", "export": {"merged": True}},
    "quantization does not go with method": {"method": "LoRA", "quantization": {"double": False}},
    "dpo goes with data of the format": {"dpo": {"beta": 0.2}, "dataset": {"format": "OpenAI"}},
    "the format Preference does not go": {"method": "Full", "dataset": {"format": "Preference"}},
    "training.optimizerInBackward goes with": {"method": "LoRA", "training": AT_ONCE},
    "adapter.targetModules must not name embed_tokens": {"method": "DoRA", "adapter": {"targetModules": ["lm_head"]}},
    "checkpoint.keepBest needs": {"checkpoint": {"keepBest": True}},
    "optimizerInBackward needs gradient": {
        "method": "Full",
        "training": {**AT_ONCE, "gradientAccumulationSteps": 2},
    },
    "optimizerInBackward needs maxGradientNorm": {"method": "Full", "training": {**AT_ONCE, "maxGradientNorm": 0.5}},
    "cpuOffload goes with": {"training": {"cpuOffload": True, "optimizer": "AdamW8bit"}},
    "packed does not go": {"dataset": {"packed": True, "format": "Preference"}},
    "the format Preference cannot be mixed": {
        "dataset": {"mixture": [{"volumePath": "pairs.jsonl", "format": "Preference"}]}
    },
    "promptTemplate needs": {"dataset": {"promptTemplate": {"name": "ChatML", "user": {"prefix": "Q: "}}}},
    "exactly one of volumePath, huggingFace, s3 and fraction": {
        "validation": {"volumePath": "v.jsonl", "fraction": 0.1}
    },
    "exactly one of volumePath, huggingFace and s3 is": {"dataset": {"s3": {"uri": "s3://data/chats"}}},
    "path and split": {"dataset": hub(path="train.jsonl", split="train")},
    "path ": {"dataset": hub(path="../train.jsonl")},
    "gpuMemory is about GPUs": {"workers": {"gpuMemory": "80Gi"}},
    "model needs exactly one": {"model": {"volumePath": None}},
    "volumePath": {"dataset": {"volumePath": "a/./b"}},
    "resources must not name": resources("requests", "nvidia.com/gpu", "2"),
    "every one of volumeMounts": {"workers": {"volumeMounts": [{"name": "a", "mountPath": "/a"}]}},
    "labels must not begin": {"workers": {"labels": {"batch.kubernetes.io/job-name": "a"}}},
    "annotations must not begin": {"workers": {"annotations": {"kubetune.io/gang": "a"}}},
    "a toleration without key": {"workers": {"tolerations": [{"value": "a"}]}},
    "value does not go with operator Exists": {
        "workers": {"tolerations": [{"key": "a", "operator": "Exists", "value": "b"}]}
    },
    "tolerationSeconds needs": {"workers": {"tolerations": [{"key": "a", "tolerationSeconds": 1}]}},
    "minDomains needs": {
        "workers": {
            "topologySpreadConstraints": [{"topologyKey": "z", "minDomains": 2, "whenUnsatisfiable": "ScheduleAnyway"}]
        }
    },
    "valueFrom needs exactly one": {"workers": {"env": [{"name": "A", "valueFrom": {}}]}},
    "a variable has value or valueFrom": {
        "workers": {"env": [{"name": "A", "value": "", "valueFrom": {"secretKeyRef": {"name": "s", "key": "k"}}}]}
    },
    "variable ": {"workers": {"env": [{"name": "HOME", "value": "/root"}]}},
    "volume ": {"workers": {"volumes": [{"name": "shm", "emptyDir": {}}]}},
    "a volume needs exactly one source": {"workers": {"volumes": [{"name": "a"}]}},
    "mountPath ": {
        "workers": {
            "volumes": [{"name": "a", "emptyDir": {}}],
            "volumeMounts": [{"name": "a", "mountPath": "/dev/shm"}],
        }
    },
    "subPath must be a path": {
        "workers": {
            "volumes": [{"name": "a", "emptyDir": {}}],
            "volumeMounts": [{"name": "a", "mountPath": "/a", "subPath": "/b"}],
        }
    },
}


def test_every_rule_with_cel_has_a_case_above():
    messages = {rule.message for model in MODELS for rule in model.rules if rule.cel is not None}
    assert len(messages) == len(BROKEN)
    for start in BROKEN:
        assert any(message.startswith(start) for message in messages), start


@pytest.mark.parametrize("start", BROKEN)
def test_python_and_the_api_server_refuse_with_the_same_words(apply, manifest, start):
    wrong = manifest("rule", **BROKEN[start])
    told = apply(wrong).stderr.strip()
    with pytest.raises(InvalidJob) as caught:
        build.run_config(api.parse({**wrong, "metadata": {"name": "rule", "namespace": "team", "uid": "0a1b2c3d"}}))
    (problem,) = caught.value.problems
    words = problem[problem.index(start) :]
    assert told == f'The FineTuneJob "rule" is invalid: {told.split(": ")[1]}: Invalid value: {words}'


# --- changes ----------------------------------------------------------------------------------------------------------

UPDATES = {
    "the preset": ({}, {"preset": "llama3/8B_lora"}),
    "a section that goes": ({"training": {"epochs": 2}}, {}),
    "an affinity in Kubernetes own words": (
        {"workers": {"affinity": {"nodeAffinity": {"a": [1]}}}},
        {"workers": {"affinity": {"nodeAffinity": {"a": [2]}}}},
    ),
    "a volume in Kubernetes own words": (
        {"workers": {"volumes": [{"name": "a", "emptyDir": {}}]}},
        {"workers": {"volumes": [{"name": "a", "emptyDir": {"medium": "Memory"}}]}},
    ),
    "the queue": ({}, {"queue": {"name": "research"}}),
    "the clean-up": ({}, {"cleanPodPolicy": "All"}),
    "the nodes of a job that runs": ({}, {"workers": {"nodes": 4}}),
    "the resources of a job that runs": (
        {"workers": {"resources": {"limits": {"cpu": 1}}}},
        {"workers": {"resources": {"limits": {"cpu": 2}}}},
    ),
    "the GPUs of a job that runs": ({}, {"workers": {"gpusPerNode": 1}}),
    "the nodes of a job that was resumed before": ({"suspend": False}, {"suspend": False, "workers": {"nodes": 2}}),
}


@pytest.mark.parametrize("case", UPDATES)
def test_python_and_the_api_server_refuse_a_change_with_the_same_words(apply, refused, manifest, case):
    name = re.sub(r"\W", "-", case).lower()
    before, after = (manifest(name, **made) for made in UPDATES[case])
    assert apply(before).returncode == 0
    specs = (api.FineTuneJobSpec.model_validate(body["spec"]) for body in (after, before))
    (problem,) = changes.problems(*specs)
    refused(after, [f"spec: Invalid value: {problem}"])


def test_what_may_be_changed_step_by_step(apply, manifest):
    """Each update is about the one before it."""
    gpus = {"workers": {"nodes": 4, "gpusPerNode": 2, "resources": {"limits": {"cpu": "500m"}}}}
    limits = {"activeDeadlineSeconds": 60, "ttlSecondsAfterFinished": 0}
    policy = {"failurePolicy": {"maxRestarts": 0, "startupDeadlineSeconds": 5, "progressDeadlineSeconds": 5}}
    steps = [{}, limits, {}, {**limits, **policy}, {"suspend": True}, {"suspend": True, **gpus}, gpus]
    for changed in steps:
        answer = apply(manifest("free", **changed))
        assert answer.returncode == 0, answer.stderr
