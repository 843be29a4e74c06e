import json
import re
from pathlib import Path
from typing import get_args

import make_data
import pytest
import run
import smollm2
import yaml

from kubetune_operator import api, build

SPEC = make_data.read_spec()
FIELDS = {field.path: field.schema for field in make_data.fields(SPEC)}
TRAIN, HELD_OUT = make_data.make_rows(SPEC)


def question(row):
    return row["messages"][1]["content"]


def reply(row):
    return row["messages"][2]["content"]


def asked_field(row):
    """The longest path that the question names: `training.seed` is not `seed`."""
    return max((path for path in FIELDS if re.search(rf"(?<![\w.]){re.escape(path)}\b", question(row))), key=len)


def declared_default(path):
    """The default as the pydantic models declare it: a source of its own beside the CRD."""
    models, field = [api.FineTuneJobSpec], None
    for name in path.split("."):
        model = next(kind for kind in models if hasattr(kind, "model_fields"))
        field = next(field for field in model.model_fields.values() if field.alias == name)
        marks = [mark.model for mark in field.metadata if isinstance(mark, api.Overrides)]
        models = [*marks, field.annotation, *get_args(field.annotation)]
    return None if field.is_required() else field.default


def test_there_are_at_least_300_conversations():
    assert len(TRAIN) + len(HELD_OUT) >= 300
    assert len(HELD_OUT) == len(FIELDS)


def test_a_taught_field_holds_a_value():
    assert [path for path, schema in FIELDS.items() if "properties" in schema] == []


def test_every_field_is_asked_for_in_each_phrasing_and_once_held_out():
    asked = [asked_field(row) for row in TRAIN]
    assert {path: asked.count(path) for path in FIELDS} == dict.fromkeys(FIELDS, len(make_data.PHRASINGS))
    assert sorted(map(asked_field, HELD_OUT)) == sorted(FIELDS)


def test_no_held_out_question_is_trained_on():
    assert not set(map(question, TRAIN)) & set(map(question, HELD_OUT))
    assert len(set(map(question, TRAIN))) == len(TRAIN)
    assert make_data.HELD_OUT_PHRASING not in make_data.PHRASINGS


def test_held_out_answers_are_the_trained_ones():
    trained = {asked_field(row): reply(row) for row in TRAIN}
    assert {asked_field(row): reply(row) for row in HELD_OUT} == trained


def test_two_runs_write_the_same_bytes(tmp_path):
    counts = [make_data.write(tmp_path / name) for name in ("one", "two")]
    assert counts == [(len(TRAIN), len(HELD_OUT))] * 2
    for name in (make_data.TRAIN_FILE, make_data.HELD_OUT_FILE):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_the_shown_questions_are_the_first_that_are_held_out():
    assert tuple(map(asked_field, HELD_OUT[:3])) == make_data.SHOWN_FIRST


@pytest.mark.parametrize("row", HELD_OUT, ids=question)
def test_an_answer_says_only_what_the_schema_says(row):
    schema = FIELDS[asked_field(row)]
    description = " ".join(schema["description"].split())
    assert reply(row).startswith(description)
    rest = reply(row).removeprefix(description)
    known = {make_data.plain(schema[key]) for key in ("default", "minimum", "maximum") if key in schema}
    choices = {str(choice) for choice in schema.get("enum", []) + schema.get("items", {}).get("enum", [])}
    numbers = set(re.findall(r"(?<![\w/])-?\d[\d.e-]*(?<!\.)", rest))
    assert numbers <= known
    assert all(choice in rest for choice in choices)


@pytest.mark.parametrize("row", HELD_OUT, ids=question)
def test_an_answer_tells_the_default_that_the_models_declare(row):
    told = re.search(r" Default: (.+?)\.(?: |$)", reply(row))
    declared = declared_default(asked_field(row))
    if declared in (None, [], {}):
        assert told is None
    else:
        assert told is not None
        values = declared if isinstance(declared, list) else [declared]
        assert told[1].split(", ") == [make_data.plain(value) for value in values]


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        ({"type": "integer", "minimum": 1, "maximum": 9, "default": 2}, "Text. Default: 2. An integer from 1 to 9."),
        ({"type": "integer", "minimum": 0}, "Text. An integer of at least 0."),
        ({"type": "number", "minimum": 0, "exclusiveMinimum": True}, "Text. A number above 0."),
        (
            {"type": "number", "minimum": 0, "maximum": 1, "exclusiveMaximum": True},
            "Text. A number from 0 to below 1.",
        ),
        ({"type": "number", "default": 1.0}, "Text. Default: 1. A number."),
        ({"type": "boolean", "default": False}, "Text. Default: false. Either true or false."),
        ({"type": "string", "enum": ["A", "B"], "default": "A"}, "Text. Default: A. One of A, B."),
        ({"type": "string", "enum": ["A"]}, "Text. Only A."),
        ({"type": "array", "items": {"type": "string", "enum": ["A", "B"]}}, "Text. A list of A, B."),
        ({"type": "array", "items": {"type": "string"}, "default": []}, "Text. A list."),
        ({"type": "object", "additionalProperties": {"type": "string"}}, "Text. A mapping."),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_answers_in_words(schema, expected):
    assert make_data.answer({"description": "Text.", **schema}) == expected


def test_rows_are_openai_conversations(tmp_path):
    make_data.write(tmp_path)
    for line in (tmp_path / make_data.TRAIN_FILE).read_text().splitlines():
        roles = [message["role"] for message in json.loads(line)["messages"]]
        assert roles == ["system", "user", "assistant"]


def test_the_manifest_names_what_the_demo_puts_on_the_volumes():
    body = yaml.safe_load(Path(run.MANIFEST).read_text())
    spec = body["spec"]
    assert spec["model"]["volumePath"] == smollm2.MODEL_NAME
    assert spec["dataset"]["volumePath"] == f"{run.DATA_FOLDER}/{make_data.TRAIN_FILE}"
    assert spec["validation"]["volumePath"] == f"{run.DATA_FOLDER}/{make_data.HELD_OUT_FILE}"
    assert spec["validation"]["samples"] == len(make_data.SHOWN_FIRST)
    names = {claim["metadata"]["name"] for claim in run.claims(None) if claim["kind"] == "PersistentVolumeClaim"}
    assert {volume["claimName"] for volume in spec["storage"].values()} == names


def test_the_manifest_resolves_to_a_complete_run():
    body = yaml.safe_load(Path(run.MANIFEST).read_text())
    config = build.run_config(api.parse({**body, "metadata": {**body["metadata"], "uid": "u"}}))
    assert config.method == "LoRA"
    assert config.validation is not None


def test_a_named_storage_class_gives_volumes_for_several_nodes():
    before = [claim["spec"] for claim in run.claims(None) if claim["kind"] == "PersistentVolumeClaim"]
    after = [claim["spec"] for claim in run.claims("nfs") if claim["kind"] == "PersistentVolumeClaim"]
    assert [spec["accessModes"] for spec in before] == [["ReadWriteOnce"]] * 2
    assert [(spec["storageClassName"], spec["accessModes"]) for spec in after] == [("nfs", ["ReadWriteMany"])] * 2
