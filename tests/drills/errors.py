"""Drills: what only a person can repair. The job ends at once, holds nothing, and says what to change."""

from typing import Any

from tests.drills.drill import Act, Drill, Refused, Seen, submit
from tests.drills.steps import counted, nothing_held, patch, state

TOPIC = "What a person must change"


def ends(name: str, case: str, done: str, reason: str, *words: str, **more: Any) -> Drill:
    """A drill in which a job fails for good after it was submitted."""
    return Drill(
        name=name,
        case=case,
        acts=(Act(done, Seen("Failed", "Failed", reason, words, holds=True), seconds=240),),
        after=(nothing_held, counted(restarts=0, disruptions=0)),
        topic=TOPIC,
        **more,
    )


def refused(name: str, case: str, done: str, *words: str, **more: Any) -> Drill:
    """A drill in which the API server does not take the manifest."""
    return Drill(name, case, (Act(done, Refused(words), seconds=10),), topic=TOPIC, trains=False, **more)


DRILLS = (
    refused(
        "unknown-field",
        "a field that does not exist",
        "`training.epoch: 3`",
        'unknown field "spec.training.epoch"',
        spec={"training": {"epoch": 3}},
    ),
    refused(
        "out-of-range",
        "a value out of range",
        "`workers.nodes: 0`",
        "spec.workers.nodes",
        "greater than or equal to 1",
        spec={"workers": {"nodes": 0}},
    ),
    ends(
        "bad-config",
        "values that cannot go together once the preset is laid under them",
        "`preset: llama3/8B_full` with an adapter",
        "InvalidConfig",
        "adapter",
        spec={"preset": "llama3/8B_full", "method": None, "adapter": {"rank": 8}},
        trains=False,
    ),
    ends(
        "not-allowed",
        "something that an administrator must allow",
        "`workers.hostNetwork: true`, which the operator's settings do not allow",
        "InvalidConfig",
        "spec.workers.hostNetwork",
        "KUBETUNE_ALLOW_HOST_NETWORK",
        spec={"workers": {"hostNetwork": True}},
        operator="missing-image",
        trains=False,
    ),
    ends(
        "no-folder",
        "the model folder is missing",
        "`model.volumePath: nowhere`",
        "InvalidModel",
        "nowhere",
        spec={"model": {"volumePath": "nowhere"}},
        trains=False,
    ),
    ends(
        "no-config-json",
        "a model folder without config.json",
        "`config.json` deleted",
        "InvalidModel",
        "config.json",
        model="bare",
        trains=False,
    ),
    ends(
        "wrong-architecture",
        "a model that is no Llama",
        "a `config.json` of BERT",
        "InvalidModel",
        "BertForMaskedLM",
        "LlamaForCausalLM",
        model="bert",
        trains=False,
    ),
    ends(
        "truncated-weights",
        "a safetensors file that is cut off",
        "its last 1,000 bytes cut off",
        "InvalidModel",
        "model.safetensors",
        model="cut",
        trains=False,
    ),
    ends(
        "no-tokenizer",
        "a model without a tokenizer",
        "`tokenizer.json` deleted",
        "InvalidModel",
        "tokenizer",
        model="mute",
    ),
    ends(
        "no-data",
        "the dataset is missing",
        "`dataset.volumePath: data/missing.jsonl`",
        "InvalidData",
        "data/missing.jsonl",
        spec={"dataset": {"volumePath": "data/missing.jsonl"}},
    ),
    ends(
        "broken-data",
        "a line of the dataset is no JSON",
        "line 4 cut off in its middle",
        "InvalidData",
        "data/broken.jsonl",
        "line 4",
        spec={"dataset": {"volumePath": "data/broken.jsonl"}},
    ),
    ends(
        "other-format",
        "rows of another format than the dataset says",
        "instructions where conversations should be",
        "InvalidData",
        "data/other.jsonl",
        spec={"dataset": {"volumePath": "data/other.jsonl", "format": "OpenAI"}},
    ),
    ends(
        "no-labels",
        "no row has a token to learn",
        "a dataset of questions without answers",
        "InvalidData",
        "no assistant message",
        spec={"dataset": {"volumePath": "data/questions.jsonl"}},
    ),
    ends(
        "non-finite-loss",
        "the loss is not finite",
        "a weight of the base model overwritten with NaN",
        "NonFiniteLoss",
        "loss",
        model="nan",
    ),
    Drill(
        "immutable",
        "a run's spec is changed while it runs",
        (
            Act(
                "`training.maxSteps` changed",
                Refused(("spec",)),
                (submit, state("Staging"), patch(training={"maxSteps": 7})),
                seconds=10,
            ),
        ),
        topic=TOPIC,
        trains=False,
    ),
)
