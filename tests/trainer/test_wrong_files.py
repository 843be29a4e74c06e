"""What `tune` says about files that are missing or damaged, word by word, before anything starts."""

from collections.abc import Callable
from pathlib import Path

import pytest
from tests.trainer.conftest import Told, write_llama

Made = Callable[[Path], None]


def lacks(name: str) -> Made:
    return lambda root: (root / "model" / name).unlink()


def damaged(name: str) -> Made:
    return lambda root: (root / "model" / name).write_text("{")  # type: ignore[return-value]


def nothing(_: Path) -> None:
    """Everything is there."""


REMEDY = (
    "give a folder in Hugging Face layout: config.json, tokenizer.json and safetensors files; "
    "or in Meta's: params.json, tokenizer.model and consolidated.*.pth"
)
SETTINGS = "tokenizer_config.json"
MISSING: dict[str, tuple[Made, list[str], list[str]]] = {
    "no such configuration": (
        nothing,
        ["mine.yaml"],
        ["--config: there is no file mine.yaml; `tune ls` shows the shipped configurations"],
    ),
    "no such configuration, by name": (
        nothing,
        ["llama3/8B_lroa"],
        ["--config: 'llama3/8B_lroa' is neither a file nor a configuration; did you mean llama3/8B_lora?"],
    ),
    "a folder for a configuration": (
        nothing,
        ["model"],
        ["--config: 'model' is neither a file nor a configuration; `tune ls` shows the configurations"],
    ),
    "no model": (
        nothing,
        ["run.yaml", "model.path=modle"],
        ["model.path: the folder modle does not exist: . has no modle; did you mean model?"],
    ),
    "a path that ends early": (
        nothing,
        ["run.yaml", "model.path=models/llama"],
        ["model.path: the folder models/llama does not exist: . has no models; did you mean model?"],
    ),
    "no config.json": (
        lacks("config.json"),
        ["run.yaml"],
        [f"model.path: model has no config.json; found: model.safetensors, tokenizer.json, {SETTINGS}; {REMEDY}"],
    ),
    "no tokenizer": (
        lacks("tokenizer.json"),
        ["run.yaml"],
        [f"model.path: model has no tokenizer.json; found: config.json, model.safetensors, {SETTINGS}; {REMEDY}"],
    ),
    "no weights": (
        lacks("model.safetensors"),
        ["run.yaml"],
        [
            "model.path: model has no model.safetensors and no model.safetensors.index.json; "
            "give the safetensors files too"
        ],
    ),
    "a damaged config.json": (
        damaged("config.json"),
        ["run.yaml"],
        [
            "model.path: model/config.json cannot be read: Expecting property name enclosed in double quotes: "
            "line 1 column 2 (char 1)"
        ],
    ),
    "no data": (
        nothing,
        ["run.yaml", "dataset.path=dat.jsonl"],
        ["dataset.path: dat.jsonl does not exist: . has no dat.jsonl; did you mean data.jsonl?"],
    ),
    "no held-out data": (
        nothing,
        ["run.yaml", "validation.path=elsewhere/v.jsonl"],
        [
            "validation.path: elsewhere/v.jsonl does not exist: . has no elsewhere; "
            "there are: data.jsonl, model, run.yaml"
        ],
    ),
    "several at once": (
        lacks("tokenizer.json"),
        ["run.yaml", "dataset.path=a.jsonl", "dataset.mixture=[{path: b.jsonl}]"],
        [
            f"model.path: model has no tokenizer.json; found: config.json, model.safetensors, {SETTINGS}; {REMEDY}",
            "dataset.path: a.jsonl does not exist: . has no a.jsonl; did you mean data.jsonl?",
            "dataset.mixture.0.path: b.jsonl does not exist: . has no b.jsonl; did you mean data.jsonl?",
        ],
    ),
}


@pytest.mark.parametrize("case", MISSING)
def test_a_missing_file_is_told_before_anything_starts(
    case: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    told: Told,
) -> None:
    prepare, words, expected = MISSING[case]
    monkeypatch.chdir(tmp_path)
    write_llama(tmp_path / "model")
    (tmp_path / "data.jsonl").write_text("{}\n")
    (tmp_path / "run.yaml").write_text("model: {path: model}\ndataset: {path: data.jsonl}\noutput_dir: out\n")
    prepare(tmp_path)
    assert told("run", "lora_finetune_single_device", "--config", *words) == expected
    assert not (tmp_path / "out").exists()
