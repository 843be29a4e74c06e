"""`tune manifest`: the operator accepts what is printed and makes the same run of it."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from kubetune_contract.config import RunConfig
from kubetune_contract.presets import preset_names, read_preset, resolve
from kubetune_operator import api, build
from kubetune_trainer import cli
from kubetune_trainer.manifest import Placement, job_name, manifest

PATHS = ["model.path=models/m", "dataset.path=data/d.jsonl", "output_dir=o"]


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert cli.main(["manifest", *arguments]) == 0
    document: dict[str, Any] = yaml.safe_load(capsys.readouterr().out)
    return document


def run_of(document: dict[str, Any]) -> dict[str, Any]:
    """The run that the operator makes of it, without the paths that only a cluster knows."""
    metadata = {**document["metadata"], "namespace": "team", "uid": "0a1b2c3d"}
    return placed(build.run_config(api.parse({**document, "metadata": metadata})))


def placed(config: RunConfig) -> dict[str, Any]:
    values = config.to_dict()
    for data in (values["dataset"], values.get("validation", {}), *values["dataset"]["mixture"]):
        for place in ("path", "repo", "revision", "split"):
            data.pop(place, None)
    return {key: value for key, value in values.items() if key not in ("model", "outputDir")}


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_is_named_and_makes_the_same_run(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = PATHS if name.startswith("demo/") else []
    document = printed(capsys, "--config", name, *words)
    given = {"model": {"path": "m"}, "dataset": {"path": "d"}, "output_dir": "o"} if words else {}
    assert document["spec"]["preset"] == name
    assert run_of(document) == placed(resolve(name, given))


OVERRIDES: dict[str, tuple[list[str], dict[str, Any]]] = {
    "nothing": ([], {"dataset": {"volumePath": "data/d.jsonl"}}),
    "a value": (["training.epochs=3"], {"training": {"epochs": 3}}),
    "the preset's value again": (["training.batch_size=2"], {}),
    "a value that only the preset has otherwise": (["dataset.train_on=Assistant"], {}),
    "a list": (["adapter.target_modules=[q_proj]"], {"adapter": {"targetModules": ["q_proj"]}}),
    "another method": (["method=DoRA"], {"method": "DoRA"}),
    "a method that drops the adapter": (["method=Full"], {"method": "Full"}),
    "held-out data": (["validation.path=v.jsonl"], {"validation": {"volumePath": "v.jsonl"}}),
    "a held-out part": (["validation.fraction=0.1"], {"validation": {"fraction": 0.1}}),
    "further data": (
        ["dataset.mixture=[{path: e.jsonl, format: ShareGPT, weight: 2}]"],
        {
            "dataset": {
                "volumePath": "data/d.jsonl",
                "mixture": [
                    {
                        "volumePath": "e.jsonl",
                        "format": "ShareGPT",
                        "columns": {
                            "messages": "messages",
                            "conversations": "conversations",
                            "instruction": "instruction",
                            "input": "input",
                            "output": "output",
                            "text": "text",
                            "prompt": "prompt",
                            "chosen": "chosen",
                            "rejected": "rejected",
                        },
                        "weight": 2.0,
                    }
                ],
            }
        },
    ),
    "a section of its own": (["profiler={steps: 2}"], {"profiler": {"startStep": 5, "steps": 2, "memory": False}}),
}


@pytest.mark.parametrize("case", OVERRIDES)
def test_only_what_differs_from_the_preset_is_said(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    words, expected = OVERRIDES[case]
    document = printed(capsys, "--config", "llama3/8B_lora", *PATHS, *words)
    spec = document["spec"]
    fixed = {"preset": "llama3/8B_lora", "model": {"volumePath": "models/m"}, "dataset": {"volumePath": "data/d.jsonl"}}
    found = {key: value for key, value in spec.items() if key not in ("workers", "storage")}
    assert found == fixed | expected
    assert run_of(document)


def test_a_preset_s_value_that_was_taken_away_leaves_the_preset_out(capsys: pytest.CaptureFixture[str]) -> None:
    document = printed(capsys, "--config", "demo/smollm2_lora", *PATHS, "~training.max_steps")
    assert "preset" not in document["spec"]
    values = read_preset("demo/smollm2_lora")
    del values["training"]["max_steps"]
    wanted = resolve(
        None, values | {"model": {"path": "m"}, "dataset": {**values["dataset"], "path": "d"}, "output_dir": "o"}
    )
    assert run_of(document) == placed(wanted)


def test_a_file_of_ones_own_is_said_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "My_run.yaml").write_text("method: QDoRA\nmodel: {path: m}\ndataset: {path: d, packed: true}\n")
    document = printed(capsys, "--config", str(tmp_path / "My_run.yaml"))
    assert document["metadata"] == {"name": "my-run"}
    assert {key: document["spec"][key] for key in ("method", "model", "dataset")} == {
        "method": "QDoRA",
        "model": {"volumePath": "m"},
        "dataset": {"volumePath": "d", "packed": True},
    }
    assert run_of(document)["method"] == "QDoRA"


def test_the_options_say_where_it_runs(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--name", "bot", "--models-claim", "in", "--output-claim", "out", "--nodes", "2", "--gpus-per-node", "8"]
    document = printed(capsys, "--config", "llama3/70B_lora", *options)
    assert document["metadata"] == {"name": "bot"}
    assert document["spec"]["workers"] == {"nodes": 2, "gpusPerNode": 8}
    assert document["spec"]["storage"] == {"models": {"claimName": "in"}, "output": {"claimName": "out"}}


def test_comments_say_what_must_lie_on_the_claim(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["manifest", "--config", "llama3/8B_lora"]) == 0
    assert capsys.readouterr().out.splitlines()[:3] == [
        "# On the claim models:",
        "#   yahma/alpaca-cleaned: the files of the dataset yahma/alpaca-cleaned (revision main, split train)",
        "#   Meta-Llama-3-8B-Instruct: /tmp/Meta-Llama-3-8B-Instruct",
    ]


def test_a_path_that_no_volume_can_have_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["manifest", "--config", "llama3/8B_lora", "dataset.path=/data/my file.jsonl"]) == 64
    assert capsys.readouterr().err.splitlines()[1:] == [
        "  /data/my file.jsonl cannot be a path on a volume: use letters, digits, '.', '_', '-' and '/'"
    ]


def test_two_files_that_would_have_one_place_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["dataset.path=/a/d.jsonl", "validation.path=/b/d.jsonl"]
    assert cli.main(["manifest", "--config", "llama3/8B_lora", *words]) == 64
    assert capsys.readouterr().err.splitlines()[1:] == [
        "  /b/d.jsonl and /a/d.jsonl would both be d.jsonl on the volume: give paths relative to its root"
    ]


NAMES = {
    "llama3/8B_lora": "llama3-8b-lora",
    "llama3_1/405B_qlora": "llama3-1-405b-qlora",
    "8B.yaml": "tune-8b",
    "My_Config.yml": "my-config",
    "a" * 44 + "-b.yaml": "a" * 44,
}


@pytest.mark.parametrize("config", NAMES)
def test_the_job_s_name_comes_from_the_configuration(config: str) -> None:
    assert job_name(config) == NAMES[config]


def test_a_name_is_checked_as_the_api_server_would(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["manifest", "--config", "llama3/8B_lora", "--name", "My_Job"]) == 64
    assert capsys.readouterr().err.splitlines()[1:] == [
        "  --name: 'My_Job' must begin with a letter, hold only a-z, 0-9 and hyphens, and have at most 45 characters"
    ]


def test_two_prints_are_the_same() -> None:
    config = resolve("llama3/8B_lora", {})
    texts = [manifest(config, "llama3/8B_lora", Placement("a")) for _ in range(2)]
    assert texts[0] == texts[1]
