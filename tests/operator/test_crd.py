"""The generated CustomResourceDefinition: complete, structural, in step with the models."""

import re
from collections.abc import Iterator
from typing import Any, Literal

import pytest
from pydantic import Field

from kubetune_contract.base import ContractModel, Rule
from kubetune_contract.config import (
    AdapterConfig,
    CheckpointConfig,
    DPOConfig,
    ExportConfig,
    LoggingConfig,
    ProfilerConfig,
    QuantizationConfig,
    RunConfig,
    TrainingConfig,
)
from kubetune_contract.dataset import PromptTemplate
from kubetune_contract.presets import preset_names
from kubetune_operator import api, changes, crd, names, sources, workers

Schema = dict[str, Any]

CRD = crd.custom_resource_definition()
VERSION = CRD["spec"]["versions"][0]
ROOT = VERSION["schema"]["openAPIV3Schema"]
FIELDS = {path: schema for part in ("spec", "status") for path, schema, _ in crd.fields(ROOT["properties"][part], part)}


def nodes(schema: Schema, path: str) -> Iterator[tuple[str, Schema]]:
    """Every schema in the document, those of list items and map values too."""
    yield path, schema
    for name, below in schema.get("properties", {}).items():
        yield from nodes(below, f"{path}.{name}")
    for child in ("items", "additionalProperties"):
        if child in schema:
            yield from nodes(schema[child], f"{path}[]")


NODES = dict(nodes(ROOT, ""))


# --- the document as a whole ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", FIELDS)
def test_every_field_says_what_it_means(path):
    text = FIELDS[path]["description"]
    assert text.endswith(".")
    assert "\n" not in text
    assert text[0].isupper() or text[0].isdigit()


@pytest.mark.parametrize("path", FIELDS)
def test_every_field_is_spelt_in_camel_case(path):
    assert re.fullmatch(r"[a-z][A-Za-z0-9]*", path.rpartition(".")[2])


@pytest.mark.parametrize("path", NODES)
def test_every_node_is_structural(path):
    node = NODES[path]
    assert ("type" in node) != bool(node.get("x-kubernetes-int-or-string"))
    assert not {"$ref", "title", "const", "allOf", "nullable"} & set(node)
    assert not isinstance(node.get("exclusiveMinimum"), int | float) or node["exclusiveMinimum"] is True
    assert node.get("anyOf") in (None, [{"type": "integer"}, {"type": "string"}])


def test_the_names_are_those_that_people_type():
    assert CRD["spec"]["names"] == {
        "kind": "FineTuneJob",
        "listKind": "FineTuneJobList",
        "plural": "finetunejobs",
        "singular": "finetunejob",
        "shortNames": ["ftj"],
        "categories": ["all"],
    }
    assert CRD["metadata"]["name"] == "finetunejobs.kubetune.io"


def test_the_status_has_a_door_of_its_own():
    assert VERSION["subresources"] == {"status": {}}


@pytest.mark.parametrize("column", VERSION["additionalPrinterColumns"], ids=lambda column: column["name"])
def test_every_column_shows_a_field_of_its_type(column):
    path = column["jsonPath"].removeprefix(".")
    if path == "metadata.creationTimestamp":
        assert column["type"] == "date"
    else:
        assert FIELDS[path]["type"] == column["type"]


def test_the_narrow_columns_are_those_of_a_progress_line():
    narrow = [column["name"] for column in VERSION["additionalPrinterColumns"] if not column.get("priority")]
    assert narrow == ["State", "Progress", "Loss", "ETA", "Age"]


def test_a_name_leaves_room_for_what_is_derived_from_it():
    name = ROOT["properties"]["metadata"]["properties"]["name"]
    assert name == {"type": "string", "maxLength": names.MAX_NAME_LENGTH}


# --- fields -----------------------------------------------------------------------------------------------------------

BOUNDS = {
    "spec.workers.nodes": {"type": "integer", "minimum": 1, "maximum": 1024, "default": 1},
    "spec.workers.gpusPerNode": {"type": "integer", "minimum": 0, "maximum": 64, "default": 0},
    "spec.workers": {"default": {}},
    "spec.workers.resources": {"default": {}},
    "spec.workers.resources.limits": {"type": "object", "maxProperties": 32},
    "spec.failurePolicy": {"default": {}},
    "spec.failurePolicy.maxRestarts": {"default": 3},
    "spec.failurePolicy.progressDeadlineSeconds": {"type": "integer", "minimum": 1, "maximum": 1000000000},
    "spec.ttlSecondsAfterFinished": {"type": "integer", "minimum": 0, "maximum": 1000000000},
    "spec.cleanPodPolicy": {"enum": ["Running", "All", "None"], "default": "Running"},
    "spec.suspend": {"type": "boolean", "default": False},
    "spec.preset": {"type": "string", "enum": list(preset_names())},
    "spec.method": {"type": "string", "enum": ["Full", "LoRA", "DoRA", "QLoRA", "QDoRA"]},
    "spec.model.huggingFace.revision": {"default": "main", "maxLength": 256},
    "spec.model.huggingFace.ignorePatterns": {"type": "array", "maxItems": 32},
    "spec.model.huggingFace.tokenSecretRef.key": {"default": "token", "minLength": 1},
    "spec.dataset.format": {
        "type": "string",
        "enum": ["OpenAI", "ShareGPT", "Alpaca", "Instruct", "Completion", "Preference"],
    },
    "spec.training.learningRate": {"type": "number", "minimum": 0, "exclusiveMinimum": True, "maximum": 1},
    "spec.training.beta1": {"minimum": 0, "maximum": 1, "exclusiveMaximum": True},
    "spec.training.maxSteps": {"type": "integer", "minimum": 1},
    "spec.adapter.targetModules": {"type": "array", "minItems": 1, "maxItems": 9, "x-kubernetes-list-type": "set"},
    "status.conditions": {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]},
    "status.startTime": {"type": "string", "format": "date-time"},
    "status.progress.percentage": {"type": "integer", "minimum": 0, "maximum": 100},
}


@pytest.mark.parametrize("path", BOUNDS)
def test_a_bound_of_the_model_stands_in_the_schema(path):
    assert BOUNDS[path].items() <= FIELDS[path].items()


def test_an_amount_is_a_number_or_a_text():
    assert FIELDS["spec.workers.resources.limits"]["additionalProperties"] == {
        "x-kubernetes-int-or-string": True,
        "anyOf": [{"type": "integer"}, {"type": "string"}],
        "minimum": 0,
        "pattern": r"^[0-9]+(\.[0-9]+)?(m|k|Ki|[MGTPE]i?|e[0-9]+)?$",
        "maxLength": 32,
    }


def test_an_optional_list_is_a_list():
    """Its items are merged by their path."""
    found = NODES[".status.stagedData"]
    assert (found["type"], found["items"]["type"]) == ("array", "object")
    assert (found["x-kubernetes-list-type"], found["x-kubernetes-list-map-keys"]) == ("map", ["path"])


REQUIRED = {
    "": ["spec"],
    ".spec": ["model", "dataset", "storage"],
    ".spec.model": [],
    ".spec.model.huggingFace": ["repo"],
    ".spec.model.s3": ["uri"],
    ".spec.model.s3.credentialsSecretRef": ["name"],
    ".spec.dataset": [],
    ".spec.dataset.huggingFace": ["repo"],
    ".spec.dataset.mixture[]": [],
    ".spec.validation": [],
    ".spec.adapter": [],
    ".spec.training": [],
    ".spec.workers": [],
    ".spec.storage": ["models", "output"],
    ".status": [],
    ".status.conditions[]": ["type", "status", "reason", "message", "lastTransitionTime"],
}


@pytest.mark.parametrize("path", REQUIRED)
def test_only_what_has_no_default_is_required(path):
    assert NODES[path].get("required", []) == REQUIRED[path]


OVERRIDES = {
    "spec.dataset": sources.DatasetSpec,
    "spec.validation": sources.ValidationSpec,
    "spec.adapter": AdapterConfig,
    "spec.training": TrainingConfig,
    "spec.checkpoint": CheckpointConfig,
    "spec.export": ExportConfig,
    "spec.quantization": QuantizationConfig,
    "spec.dpo": DPOConfig,
    "spec.logging": LoggingConfig,
    "spec.profiler": ProfilerConfig,
}
OVERRIDDEN = {
    f"{path}.{field.alias}": field for path, model in OVERRIDES.items() for field in model.model_fields.values()
}


@pytest.mark.parametrize("path", OVERRIDDEN)
def test_a_default_that_would_beat_the_preset_is_told_in_words_only(path):
    default = OVERRIDDEN[path].default
    assert "default" not in FIELDS[path]
    if isinstance(default, ContractModel):
        return  # its fields tell their own defaults
    told = re.search(r" Default: (.*)\.$", FIELDS[path]["description"])
    assert bool(told) == (not OVERRIDDEN[path].is_required() and default not in (None, [], {}))


TOLD = {
    "spec.adapter.rank": "Default: 8.",
    "spec.adapter.dropout": "Default: 0.",
    "spec.adapter.targetModules": "Default: q_proj, v_proj, o_proj, gate_proj, up_proj, down_proj.",
    "spec.training.learningRate": "Default: 0.0003.",
    "spec.training.epsilon": "Default: 1e-08.",
    "spec.training.schedule": "Default: Cosine.",
    "spec.training.activationCheckpointing": "Default: None.",
    "spec.dataset.shuffle": "Default: true.",
    "spec.export.merged": "Default: false.",
}


@pytest.mark.parametrize("path", TOLD)
def test_a_default_in_words_reads_well(path):
    assert FIELDS[path]["description"].endswith(f" {TOLD[path]}")


def test_the_status_has_no_defaults():
    assert not [path for path, schema in FIELDS.items() if path.startswith("status.") and "default" in schema]


@pytest.mark.parametrize(
    "path", [path for path, node in NODES.items() if path.startswith(".spec") and node.get("type")]
)
def test_everything_that_a_rule_may_walk_over_has_a_limit(path):
    """CEL's cost is estimated from these; without one the API server refuses the whole definition."""
    node = NODES[path]
    if node["type"] == "array":
        assert "maxItems" in node
    elif node["type"] == "string":
        assert {"maxLength", "enum"} & set(node)
    elif "additionalProperties" in node:
        assert "maxProperties" in node


# --- rules ------------------------------------------------------------------------------------------------------------

PLACES = {
    ".spec": RunConfig,
    ".spec.training": TrainingConfig,
    ".spec.model": sources.ModelSource,
    ".spec.workers": workers.Workers,
    ".spec.dataset": sources.DatasetSpec,
    ".spec.dataset.mixture[]": sources.MixedDatasetSpec,
    ".spec.dataset.promptTemplate": PromptTemplate,
    ".spec.validation": sources.ValidationSpec,
}


@pytest.mark.parametrize("path", PLACES)
def test_every_rule_of_a_model_stands_where_the_model_is(path):
    found = [validation["rule"] for validation in NODES[path]["x-kubernetes-validations"]]
    for rule in PLACES[path].rules:
        assert rule.cel is None or rule.cel in found


def test_a_message_with_values_is_an_expression():
    rule = Rule(cel="self.a < self.b", holds=lambda _: True, message="a {a} must be 50 % of b {b}: lower it")
    assert crd._validation(rule) == {
        "rule": "self.a < self.b",
        "messageExpression": '"a %s must be 50 %% of b %s: lower it".format([self.a, self.b])',
    }


def test_a_message_without_values_stands_as_it_is():
    rule = Rule(cel="has(self.a)", holds=lambda _: True, message='say "a"')
    assert crd._validation(rule) == {"rule": "has(self.a)", "message": 'say "a"'}


def test_every_rule_about_changes_stands_in_the_schema():
    found = [rule for rule in NODES[".spec"]["x-kubernetes-validations"] if "oldSelf" in rule["rule"]]
    assert found == [{"rule": rule.cel, "message": rule.message} for rule in changes.transitions()]


def test_every_field_is_free_to_change_or_has_a_rule():
    ruled = {rule.message.split(" ")[0].removeprefix("spec.").split(".")[0] for rule in changes.transitions()}
    assert sorted([*ruled, *changes.ALWAYS]) == sorted(ROOT["properties"]["spec"]["properties"])


def test_a_field_without_a_docstring_stops_the_generator():
    class Silent(ContractModel):
        """A model."""

        rank: int = 8

    with pytest.raises(ValueError, match=r"Silent\.rank has no docstring"):
        crd.object_schema(Silent, crd.Part.SPEC)


class Sample(ContractModel):
    """Has one field of each kind."""

    word: Literal["One"] = "One"
    """A word."""
    maybe: int | None = Field(default=3, ge=1)
    """A number or nothing."""
    inner: ContractModel | None = None
    """A model."""


PARTS = {
    crd.Part.SPEC: ("A word.", {"default": "One"}),
    crd.Part.OVERRIDES: ("A word. Default: One.", {}),
    crd.Part.STATUS: ("A word.", {}),
}


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.name)
def test_a_default_depends_on_where_the_model_stands(part):
    description, more = PARTS[part]
    word = crd.object_schema(Sample, part)["properties"]["word"]
    assert word == {"description": description, "type": "string", "enum": ["One"], **more}


def test_an_optional_value_is_its_plain_type():
    maybe = crd.object_schema(Sample, crd.Part.STATUS)["properties"]["maybe"]
    assert maybe == {"description": "A number or nothing.", "type": "integer", "minimum": 1}


def test_a_list_that_may_be_absent_is_a_list():
    """The API server refuses every status of a job that has one where the schema says object."""
    schema = crd.object_schema(api.FineTuneJobStatus, crd.Part.STATUS)["properties"]["stagedData"]
    assert (schema["type"], schema["items"]["type"]) == ("array", "object")
    assert schema["x-kubernetes-list-map-keys"] == ["path"]


def test_a_union_of_two_types_is_a_mistake_of_ours():
    with pytest.raises(AssertionError, match="no unions"):
        crd.structural({"anyOf": [{"type": "integer"}, {"type": "array"}]})
