"""What `kubectl apply` prints for a manifest that cannot work, word by word."""

import re
from typing import get_args

import pytest

from kubetune_contract.base import ContractModel
from kubetune_contract.config import RunConfig, TargetModule, TrainingConfig
from kubetune_contract.dataset import PromptTemplate
from kubetune_contract.presets import preset_names
from kubetune_operator import api, build, changes, podspec, sources, workers
from kubetune_operator.errors import InvalidJob

UNCHECKED = (
    "<nil>: Invalid value: null: some validation rules were not checked because the object was invalid; "
    "correct the existing errors to complete validation"
)
BELOW_THE_ROOT = "must be a path below the volume's root: without a leading '/' and without '..'"
PATH_PATTERN = "^[A-Za-z0-9._-]+(/[A-Za-z0-9._-]+)*$"
LAYERS = ", ".join(f'"{name}"' for name in get_args(TargetModule))
METHODS = '"Full", "LoRA", "DoRA", "QLoRA", "QDoRA"'
FORMATS = '"OpenAI", "ShareGPT", "Alpaca", "Instruct", "Completion", "Preference"'
PRESETS = ", ".join(f'"{name}"' for name in preset_names())


def hub(**changes):
    return {"volumePath": None, "huggingFace": {"repo": "meta-llama/Llama-3.2-1B", **changes}}


def resources(side, name, amount):
    return {"workers": {"resources": {side: {name: amount}}}}


BAD = {
    # --- the model
    "no model": ({"model": None}, ["spec.model: Required value", UNCHECKED]),
    "a model from nowhere": (
        {"model": {"volumePath": None}},
        ["spec.model: Invalid value: model needs exactly one of volumePath, huggingFace and s3"],
    ),
    "a model from two places": (
        {"model": {"huggingFace": {"repo": "meta-llama/Llama-3.2-1B"}}},
        ["spec.model: Invalid value: model needs exactly one of volumePath, huggingFace and s3"],
    ),
    "a model outside the volume": (
        {"model": {"volumePath": "models/../../etc"}},
        [f"spec.model: Invalid value: volumePath models/../../etc {BELOW_THE_ROOT}"],
    ),
    "a model with an absolute path": (
        {"model": {"volumePath": "/models/llama"}},
        [
            'spec.model.volumePath: Invalid value: "/models/llama": '
            f"spec.model.volumePath in body should match '{PATH_PATTERN}'",
            f"spec.model: Invalid value: volumePath /models/llama {BELOW_THE_ROOT}",
        ],
    ),
    "a repository without an owner": (
        {"model": hub(repo="llama")},
        [
            'spec.model.huggingFace.repo: Invalid value: "llama": '
            "spec.model.huggingFace.repo in body should match '^[A-Za-z0-9._-]+/[A-Za-z0-9._-]+$'"
        ],
    ),
    "a token from no Secret": (
        {"model": hub(tokenSecretRef={})},
        ["spec.model.huggingFace.tokenSecretRef.name: Required value", UNCHECKED],
    ),
    # --- presets and method
    "a preset that does not exist": (
        {"preset": "llama3/9B"},
        [f'spec.preset: Unsupported value: "llama3/9B": supported values: {PRESETS}', UNCHECKED],
    ),
    "a method in lower case": (
        {"method": "lora"},
        [f'spec.method: Unsupported value: "lora": supported values: {METHODS}', UNCHECKED],
    ),
    "an adapter without LoRA": (
        {"method": "Full", "adapter": {"rank": 8}},
        ["spec: Invalid value: adapter does not go with method Full: remove adapter, or set method to LoRA"],
    ),
    "a merge without LoRA": (
        {"method": "Full", "export": {"merged": True}},
        [
            "spec: Invalid value: export.merged does not go with method Full: "
            "full fine-tuning writes a whole model anyway"
        ],
    ),
    "quantization of weights that are trained": (
        {"method": "Full", "quantization": {"double": False}},
        ["spec: Invalid value: quantization does not go with method Full: remove quantization, or set method to QLoRA"],
    ),
    # --- data
    "no data": ({"dataset": None}, ["spec.dataset: Required value", UNCHECKED]),
    "data without a file": (
        {"dataset": {"volumePath": None, "shuffle": True}},
        ["spec.dataset: Invalid value: exactly one of volumePath, huggingFace and s3 is required"],
    ),
    "data outside the volume": (
        {"dataset": {"volumePath": "../secrets.jsonl"}},
        [f"spec.dataset: Invalid value: volumePath ../secrets.jsonl {BELOW_THE_ROOT}"],
    ),
    "a format in lower case": (
        {"dataset": {"format": "openai"}},
        [f'spec.dataset.format: Unsupported value: "openai": supported values: {FORMATS}', UNCHECKED],
    ),
    "sequences that hold nothing": (
        {"dataset": {"maxSequenceLength": 8}},
        [
            "spec.dataset.maxSequenceLength: Invalid value: 8: "
            "spec.dataset.maxSequenceLength in body should be greater than or equal to 16"
        ],
    ),
    "held-out data without a file": (
        {"validation": {"samples": 3}},
        ["spec.validation: Invalid value: exactly one of volumePath, huggingFace, s3 and fraction is required"],
    ),
    "more samples than anybody reads": (
        {"validation": {"volumePath": "v.jsonl", "samples": 65}},
        [
            "spec.validation.samples: Invalid value: 65: "
            "spec.validation.samples in body should be less than or equal to 64"
        ],
    ),
    # --- the adapter
    "an adapter without rank": (
        {"adapter": {"rank": 0}},
        ["spec.adapter.rank: Invalid value: 0: spec.adapter.rank in body should be greater than or equal to 1"],
    ),
    "an adapter without weight": (
        {"adapter": {"alpha": 0}},
        ["spec.adapter.alpha: Invalid value: 0: spec.adapter.alpha in body should be greater than 0"],
    ),
    "an adapter that is always dropped": (
        {"adapter": {"dropout": 1}},
        ["spec.adapter.dropout: Invalid value: 1: spec.adapter.dropout in body should be less than 1"],
    ),
    "a layer that does not exist": (
        {"adapter": {"targetModules": ["q_proj", "qkv"]}},
        [f'spec.adapter.targetModules[1]: Unsupported value: "qkv": supported values: {LAYERS}', UNCHECKED],
    ),
    "a layer twice": (
        {"adapter": {"targetModules": ["q_proj", "q_proj"]}},
        ['spec.adapter.targetModules[1]: Duplicate value: "q_proj"'],
    ),
    "no layer": (
        {"adapter": {"targetModules": []}},
        [
            "spec.adapter.targetModules: Invalid value: 0: "
            "spec.adapter.targetModules in body should have at least 1 items"
        ],
    ),
    # --- training
    "no learning": (
        {"training": {"learningRate": 0}},
        ["spec.training.learningRate: Invalid value: 0: spec.training.learningRate in body should be greater than 0"],
    ),
    "a learning rate that is a percentage": (
        {"training": {"learningRate": 2}},
        [
            "spec.training.learningRate: Invalid value: 2: "
            "spec.training.learningRate in body should be less than or equal to 1"
        ],
    ),
    "a learning rate in quotes": (
        {"training": {"learningRate": "2e-4"}},
        [
            'spec.training.learningRate: Invalid value: "string": '
            'spec.training.learningRate in body must be of type number: "string"',
            UNCHECKED,
        ],
    ),
    "half an epoch": (
        {"training": {"epochs": 1.5}},
        [
            'spec.training.epochs: Invalid value: "number": '
            'spec.training.epochs in body must be of type integer: "number"',
            UNCHECKED,
        ],
    ),
    "gradients that are used at once and added up": (
        {"training": {"optimizerInBackward": True, "gradientAccumulationSteps": 4}},
        [
            "spec.training: Invalid value: optimizerInBackward needs gradientAccumulationSteps 1, but it is 4: "
            "a gradient that is used at once cannot be added up"
        ],
    ),
    "a number format that is not offered": (
        {"training": {"precision": "FP16"}},
        ['spec.training.precision: Unsupported value: "FP16": supported values: "Auto", "BF16", "FP32"', UNCHECKED],
    ),
    "a negative seed": (
        {"training": {"seed": -1}},
        ["spec.training.seed: Invalid value: -1: spec.training.seed in body should be greater than or equal to 0"],
    ),
    "a mean that never decays": (
        {"training": {"beta2": 1}},
        ["spec.training.beta2: Invalid value: 1: spec.training.beta2 in body should be less than 1"],
    ),
    # --- checkpoints and export
    "checkpoints of which none is kept": (
        {"checkpoint": {"keep": 0}},
        ["spec.checkpoint.keep: Invalid value: 0: spec.checkpoint.keep in body should be greater than or equal to 1"],
    ),
    "a word for a switch": (
        {"export": {"merged": "yes"}},
        [
            'spec.export.merged: Invalid value: "string": spec.export.merged in body must be of type boolean: "string"',
            UNCHECKED,
        ],
    ),
    # --- workers
    "no worker": (
        {"workers": {"nodes": 0}},
        ["spec.workers.nodes: Invalid value: 0: spec.workers.nodes in body should be greater than or equal to 1"],
    ),
    "less than no GPU": (
        {"workers": {"gpusPerNode": -1}},
        [
            "spec.workers.gpusPerNode: Invalid value: -1: "
            "spec.workers.gpusPerNode in body should be greater than or equal to 0"
        ],
    ),
    "GPUs among the resources": (
        resources("limits", "nvidia.com/gpu", 1),
        ["spec.workers: Invalid value: resources must not name nvidia.com/gpu: set gpusPerNode"],
    ),
    "other GPUs among the resources": (
        {"workers": {"gpuResource": "amd.com/gpu", "resources": {"limits": {"amd.com/gpu": 1}}}},
        ["spec.workers: Invalid value: resources must not name amd.com/gpu: set gpusPerNode"],
    ),
    "a toleration of everything by a slip": (
        {"workers": {"tolerations": [{"effect": "NoSchedule"}]}},
        ["spec.workers.tolerations[0]: Invalid value: a toleration without key needs operator Exists"],
    ),
    "patience with a taint that asks for none": (
        {"workers": {"tolerations": [{"key": "a", "effect": "NoSchedule", "tolerationSeconds": 3}]}},
        ["spec.workers.tolerations[0]: Invalid value: tolerationSeconds needs effect NoExecute"],
    ),
    "domains that are only wished for": (
        {
            "workers": {
                "topologySpreadConstraints": [
                    {"topologyKey": "zone", "whenUnsatisfiable": "ScheduleAnyway", "minDomains": 2}
                ]
            }
        },
        ["spec.workers.topologySpreadConstraints[0]: Invalid value: minDomains needs whenUnsatisfiable DoNotSchedule"],
    ),
    "a variable of the operator's": (
        {"workers": {"env": [{"name": "PET_NNODES", "value": "3"}]}},
        ["spec.workers.env[0]: Invalid value: variable PET_NNODES is set by the operator: take it out"],
    ),
    "a variable with two values": (
        {"workers": {"env": [{"name": "A", "value": "b", "valueFrom": {"secretKeyRef": {"name": "s", "key": "k"}}}]}},
        ["spec.workers.env[0]: Invalid value: a variable has value or valueFrom, not both"],
    ),
    "a volume of the operator's": (
        {"workers": {"volumes": [{"name": "token", "emptyDir": {}}]}},
        ["spec.workers.volumes[0]: Invalid value: volume token is the operator's own: choose another name"],
    ),
    "a volume from two places": (
        {"workers": {"volumes": [{"name": "a", "emptyDir": {}, "secret": {"secretName": "s"}}]}},
        [
            "spec.workers.volumes[0]: Invalid value: a volume needs exactly one source: configMap, secret, "
            "persistentVolumeClaim, emptyDir, ephemeral, csi or downwardAPI"
        ],
    ),
    "a mount of no volume": (
        {"workers": {"volumeMounts": [{"name": "a", "mountPath": "/a"}]}},
        ["spec.workers: Invalid value: every one of volumeMounts must name one of volumes"],
    ),
    "a mount over the operator's own": (
        {
            "workers": {
                "volumes": [{"name": "a", "emptyDir": {}}],
                "volumeMounts": [{"name": "a", "mountPath": "/kubetune/token"}],
            }
        },
        [
            "spec.workers.volumeMounts[0]: Invalid value: mountPath /kubetune/token is taken: "
            "nothing is mounted at or below /kubetune, /tmp, /dev, /proc, /sys"
        ],
    ),
    "a way out of the volume": (
        {
            "workers": {
                "volumes": [{"name": "a", "emptyDir": {}}],
                "volumeMounts": [{"name": "a", "mountPath": "/a", "subPath": "b/../../c"}],
            }
        },
        [
            "spec.workers.volumeMounts[0]: Invalid value: subPath must be a path below the volume's root: "
            "without a leading '/' and without '..'"
        ],
    ),
    "a label of the operator's": (
        {"workers": {"labels": {"kubetune.io/job": "other"}}},
        [
            "spec.workers: Invalid value: labels must not begin with kubetune.io/, batch.kubernetes.io/, job-name, "
            "controller-uid, app.kubernetes.io/managed-by, kueue.x-k8s.io/queue-name, kueue.x-k8s.io/priority-class, "
            "kueue.x-k8s.io/managed: those are set for you"
        ],
    ),
    "a queue without a name": ({"queue": {}}, ["spec.queue.name: Required value", UNCHECKED]),
    "a unit that does not exist": (
        resources("limits", "memory", "16GB"),
        [
            'spec.workers.resources.limits.memory: Invalid value: "16GB": spec.workers.resources.limits.memory '
            r"in body should match '^[0-9]+(\.[0-9]+)?(m|k|Ki|[MGTPE]i?|e[0-9]+)?$'"
        ],
    ),
    "less than no CPU": (
        resources("requests", "cpu", -1),
        [
            "spec.workers.resources.requests.cpu: Invalid value: -1: "
            "spec.workers.resources.requests.cpu in body should be greater than or equal to 0"
        ],
    ),
    # --- the rest
    "no volume": ({"storage": None}, ["spec.storage: Required value", UNCHECKED]),
    "no volume for the results": ({"storage": {"output": None}}, ["spec.storage.output: Required value", UNCHECKED]),
    "a claim that cannot exist": (
        {"storage": {"models": {"claimName": "My Models"}}},
        [
            'spec.storage.models.claimName: Invalid value: "My Models": '
            "spec.storage.models.claimName in body should match '^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$'"
        ],
    ),
    "less than no restart": (
        {"failurePolicy": {"maxRestarts": -1}},
        [
            "spec.failurePolicy.maxRestarts: Invalid value: -1: "
            "spec.failurePolicy.maxRestarts in body should be greater than or equal to 0"
        ],
    ),
}


def refusal(name, lines):
    """What kubectl prints for an object that the schema or a rule refuses."""
    shown = lines[0] if len(lines) == 1 else "\n".join(["", *(f"* {line}" for line in lines)])
    return f'The FineTuneJob "{name}" is invalid: {shown}'


@pytest.mark.parametrize("case", BAD)
def test_kubectl_refuses(apply, manifest, case):
    changes, lines = BAD[case]
    answer = apply(manifest("bad", **changes))
    assert (answer.returncode, answer.stderr.strip()) == (1, refusal("bad", lines))


NAMES = {
    "a name that begins with a digit": (
        "8b-lora",
        [
            "metadata.name: Invalid value: 8b-lora must begin with a letter and hold only a-z, 0-9 and hyphens: "
            "host names are made from it"
        ],
    ),
    "a name with a dot": (
        "my.job",
        [
            "metadata.name: Invalid value: my.job must begin with a letter and hold only a-z, 0-9 and hyphens: "
            "host names are made from it"
        ],
    ),
    "a name that leaves no room for what is made from it": (
        "a" * 46,
        ["metadata.name: Too long: may not be more than 45 bytes", UNCHECKED],
    ),
}


@pytest.mark.parametrize("case", NAMES)
def test_kubectl_refuses_the_name(apply, manifest, case):
    name, lines = NAMES[case]
    answer = apply(manifest(name))
    assert (answer.returncode, answer.stderr.strip()) == (1, refusal(name, lines))


UNKNOWN = {
    "a field that does not exist": ({"replicas": 2}, 'unknown field "spec.replicas"'),
    "a field with a slip": ({"training": {"lerningRate": 1e-4}}, 'unknown field "spec.training.lerningRate"'),
    "a field in snake case": ({"training": {"batch_size": 4}}, 'unknown field "spec.training.batch_size"'),
    "a field in the wrong place": ({"training": {"rank": 8}}, 'unknown field "spec.training.rank"'),
    "a folder of the node": (
        {"workers": {"volumes": [{"name": "root", "hostPath": {"path": "/"}}]}},
        'unknown field "spec.workers.volumes[0].hostPath"',
    ),
    "two slips": (
        {"training": {"lerningRate": 1e-4}, "workers": {"node": 2}},
        'unknown field "spec.training.lerningRate", unknown field "spec.workers.node"',
    ),
}


@pytest.mark.parametrize("case", UNKNOWN)
def test_kubectl_refuses_an_unknown_name(apply, manifest, case):
    changes, problem = UNKNOWN[case]
    answer = apply(manifest("bad", **changes))
    assert answer.returncode == 1
    assert answer.stderr.strip() == (
        'Error from server (BadRequest): error when creating "STDIN": FineTuneJob in version "v1alpha1" '
        f"cannot be handled as a FineTuneJob: strict decoding error: {problem}"
    )


def test_an_unknown_name_is_refused_by_a_server_side_apply_too(apply, manifest):
    answer = apply(manifest("bad", replicas=2), "--server-side")
    assert answer.returncode == 1
    assert answer.stderr.strip().endswith(".spec.replicas: field not declared in schema")


# --- rules ------------------------------------------------------------------------------------------------------------

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
def test_python_and_the_api_server_refuse_a_change_with_the_same_words(apply, manifest, case):
    name = re.sub(r"\W", "-", case).lower()
    before, after = (manifest(name, **made) for made in UPDATES[case])
    assert apply(before).returncode == 0
    answer = apply(after)
    specs = (api.FineTuneJobSpec.model_validate(body["spec"]) for body in (after, before))
    (problem,) = changes.problems(*specs)
    assert (answer.returncode, answer.stderr.strip()) == (1, refusal(name, [f"spec: Invalid value: {problem}"]))


def test_what_may_be_changed_step_by_step(apply, manifest):
    """Each update is about the one before it."""
    gpus = {"workers": {"nodes": 4, "gpusPerNode": 2, "resources": {"limits": {"cpu": "500m"}}}}
    limits = {"activeDeadlineSeconds": 60, "ttlSecondsAfterFinished": 0}
    policy = {"failurePolicy": {"maxRestarts": 0, "startupDeadlineSeconds": 5, "progressDeadlineSeconds": 5}}
    steps = [{}, limits, {}, {**limits, **policy}, {"suspend": True}, {"suspend": True, **gpus}, gpus]
    for changed in steps:
        answer = apply(manifest("free", **changed))
        assert answer.returncode == 0, answer.stderr


BOUNDS = {
    "a job that may never run": ({"activeDeadlineSeconds": 0}, "spec.activeDeadlineSeconds", "1"),
    "a step in no time": (
        {"failurePolicy": {"progressDeadlineSeconds": 0}},
        "spec.failurePolicy.progressDeadlineSeconds",
        "1",
    ),
    "workers in no time": (
        {"failurePolicy": {"startupDeadlineSeconds": 0}},
        "spec.failurePolicy.startupDeadlineSeconds",
        "1",
    ),
}


@pytest.mark.parametrize("case", BOUNDS)
def test_kubectl_refuses_a_deadline_that_is_over_at_once(apply, manifest, case):
    changed, field, least = BOUNDS[case]
    line = f"{field}: Invalid value: 0: {field} in body should be greater than or equal to {least}"
    answer = apply(manifest("bad", **changed))
    assert (answer.returncode, answer.stderr.strip()) == (1, refusal("bad", [line]))


def test_kubectl_refuses_a_clean_up_that_does_not_exist(apply, manifest):
    answer = apply(manifest("bad", cleanPodPolicy="Finished"))
    line = 'spec.cleanPodPolicy: Unsupported value: "Finished": supported values: "Running", "All", "None"'
    assert (answer.returncode, answer.stderr.strip()) == (1, refusal("bad", [line, UNCHECKED]))
