"""The demo's data: questions and answers about Kubetune's own API, read from the CRD, so that every answer is true.

Each common field of a FineTuneJob's spec is asked for in several ways. One way of asking is held out for all fields:
after training, the model must answer questions that it has not seen.

    python examples/demo/make_data.py FOLDER      writes FOLDER/train.jsonl and FOLDER/held_out.jsonl
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml

CRD = Path(__file__).resolve().parents[2] / "crds" / "kubetune.io_finetunejobs.yaml"
TRAIN_FILE = "train.jsonl"
HELD_OUT_FILE = "held_out.jsonl"

SYSTEM = "You know Kubetune."
"""A system message of our own: without one the model's chat template adds a longer one to every row."""
PHRASINGS = (
    "What is {path}?",
    "What does {path} do?",
    "What is {path} for?",
    "Explain {path}.",
    "Describe the field {path}.",
    "Tell me about {path}.",
)
HELD_OUT_PHRASING = "What does {path} mean in a FineTuneJob?"
TAUGHT = {
    "": ("preset", "method", "suspend"),
    "model": ("volumePath",),
    "model.huggingFace": ("repo", "revision", "ignorePatterns"),
    "model.huggingFace.tokenSecretRef": ("name", "key"),
    "dataset": ("volumePath", "format", "trainOn", "maxSequenceLength", "shuffle"),
    "validation": ("volumePath", "everySteps", "samples", "sampleTokens"),
    "adapter": ("rank", "alpha", "dropout", "targetModules"),
    "training": (
        *("epochs", "maxSteps", "batchSize", "gradientAccumulationSteps", "learningRate", "schedule", "warmupSteps"),
        *("weightDecay", "beta1", "beta2", "epsilon", "maxGradientNorm", "seed", "precision"),
        *("activationCheckpointing",),
    ),
    "checkpoint": ("everySteps", "keep"),
    "export": ("merged",),
    "workers": ("nodes", "gpusPerNode"),
    "workers.resources": ("requests", "limits"),
    "storage.models": ("claimName",),
    "storage.output": ("claimName",),
    "failurePolicy": ("maxRestarts",),
}
"""Sections and their fields. The demo has a few minutes on two CPU cores: it teaches what every user sets."""
SHOWN_FIRST = ("workers.nodes", "failurePolicy.maxRestarts", "export.merged")
"""The first held-out rows: the run answers them before and after training."""

KINDS = {
    "integer": "An integer",
    "number": "A number",
    "boolean": "Either true or false",
    "string": "A string",
    "array": "A list",
    "object": "A mapping",
}

Schema = dict[str, Any]
Row = dict[str, list[dict[str, str]]]


class Field(NamedTuple):
    """One field of the spec that holds a value."""

    path: str
    """Dotted, from the spec on: `training.epochs`."""
    schema: Schema
    """Its OpenAPI schema."""


def read_spec(crd: Path = CRD) -> Schema:
    """The schema of a FineTuneJob's spec, from the generated CRD."""
    document = yaml.safe_load(crd.read_text())
    schema: Schema = document["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    spec: Schema = schema["properties"]["spec"]
    return spec


def fields(spec: Schema) -> Iterator[Field]:
    """All taught fields of the spec."""
    for section, names in TAUGHT.items():
        below = spec
        for step in filter(None, section.split(".")):
            below = below["properties"][step]
        for name in names:
            yield Field(f"{section}.{name}" if section else name, below["properties"][name])


def answer(schema: Schema) -> str:
    """What a field means and takes: its description, default and kind."""
    description = " ".join(schema["description"].split())
    default = schema.get("default")
    # Fields that a preset may set have no OpenAPI default, their description names it.
    told = "" if default is None or isinstance(default, list | dict) else f" Default: {plain(default)}."
    return f"{description}{told} {kind(schema)}."


def kind(schema: Schema) -> str:
    """The values that a field takes, in words."""
    if "enum" in schema:
        return "One of " + ", ".join(schema["enum"]) if len(schema["enum"]) > 1 else f"Only {schema['enum'][0]}"
    if "enum" in schema.get("items", {}):
        return "A list of " + ", ".join(schema["items"]["enum"])
    return KINDS[schema["type"]] + bounds(schema)


def bounds(schema: Schema) -> str:
    """The bounds of a number, in words; nothing for other kinds."""
    low, high = schema.get("minimum"), schema.get("maximum")
    if low is None:
        return ""
    above = "above" if schema.get("exclusiveMinimum") else "from"
    below = "to below" if schema.get("exclusiveMaximum") else "to"
    if high is not None:
        return f" {above} {plain(low)} {below} {plain(high)}"
    return f" above {plain(low)}" if above == "above" else f" of at least {plain(low)}"


def plain(value: Any) -> str:
    """A value as in a manifest: true, 8, Auto."""
    return value if isinstance(value, str) else json.dumps(value).removesuffix(".0")


def row(phrasing: str, field: Field) -> Row:
    """One conversation in OpenAI's layout."""
    turns = {"system": SYSTEM, "user": phrasing.format(path=field.path), "assistant": answer(field.schema)}
    return {"messages": [{"role": role, "content": content} for role, content in turns.items()]}


def make_rows(spec: Schema) -> tuple[list[Row], list[Row]]:
    """(training rows, held-out rows). The order is fixed; the trainer shuffles."""
    known = sorted(fields(spec), key=lambda field: (shown_rank(field.path), field.path))
    train = [row(phrasing, field) for field in known for phrasing in PHRASINGS]
    return train, [row(HELD_OUT_PHRASING, field) for field in known]


def shown_rank(path: str) -> int:
    """Puts the fields of SHOWN_FIRST in front."""
    return SHOWN_FIRST.index(path) if path in SHOWN_FIRST else len(SHOWN_FIRST)


def write(folder: Path, crd: Path = CRD) -> tuple[int, int]:
    """Write both files; returns how many conversations each has."""
    folder.mkdir(parents=True, exist_ok=True)
    train, held_out = make_rows(read_spec(crd))
    for name, rows in ((TRAIN_FILE, train), (HELD_OUT_FILE, held_out)):
        (folder / name).write_text("".join(json.dumps(one) + "\n" for one in rows))
    return len(train), len(held_out)


def main() -> None:
    """Write the files to the folder that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    train, held_out = write(parser.parse_args().folder)
    print(f"{train} conversations to train on, {held_out} held out")


if __name__ == "__main__":
    main()
