"""What `kubectl apply` prints for a manifest that cannot work, word by word. Workers have a module of their own."""

from typing import get_args

import pytest
from tests.integration.manifests import UNCHECKED, hub

from kubetune_contract.config import TargetModule
from kubetune_contract.presets import preset_names

BELOW_THE_ROOT = "must be a path below the volume's root: without a leading '/' and without '..'"
PATH_PATTERN = "^[A-Za-z0-9._-]+(/[A-Za-z0-9._-]+)*$"
LAYERS = ", ".join(f'"{name}"' for name in get_args(TargetModule))
METHODS = '"Full", "LoRA", "DoRA", "QLoRA", "QDoRA"'
FORMATS = '"OpenAI", "ShareGPT", "Alpaca", "Instruct", "Completion", "Preference"'
PRESETS = ", ".join(f'"{name}"' for name in preset_names())

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
    # --- the rest
    "a queue without a name": ({"queue": {}}, ["spec.queue.name: Required value", UNCHECKED]),
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


@pytest.mark.parametrize("case", BAD)
def test_kubectl_refuses(refused, manifest, case):
    changes, lines = BAD[case]
    refused(manifest("bad", **changes), lines)


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
def test_kubectl_refuses_the_name(refused, manifest, case):
    name, lines = NAMES[case]
    refused(manifest(name), lines)


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
def test_kubectl_refuses_a_deadline_that_is_over_at_once(refused, manifest, case):
    changed, field, least = BOUNDS[case]
    line = f"{field}: Invalid value: 0: {field} in body should be greater than or equal to {least}"
    refused(manifest("bad", **changed), [line])


def test_kubectl_refuses_a_clean_up_that_does_not_exist(refused, manifest):
    line = 'spec.cleanPodPolicy: Unsupported value: "Finished": supported values: "Running", "All", "None"'
    refused(manifest("bad", cleanPodPolicy="Finished"), [line, UNCHECKED])
