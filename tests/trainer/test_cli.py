"""`tune` and the containers' entry point: what they list, refuse and start."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.trainer.conftest import Told

from kubetune_contract.config import RunConfig
from kubetune_contract.presets import preset_names, preset_text
from kubetune_trainer import __main__ as container
from kubetune_trainer import cli, launch

PATHS = ["model.path=m", "dataset.path=d.jsonl", "output_dir=o"]
SINGLE = "lora_finetune_single_device"


# --- overrides ---

OVERRIDES: dict[str, tuple[list[str], Callable[[RunConfig], Any], Any]] = {
    "a value at a depth": (["training.epochs=3"], lambda c: c.training.epochs, 3),
    "1e-4 is a number": (["training.learning_rate=1e-4"], lambda c: c.training.learning_rate, 1e-4),
    "5E+0 is a number": (["adapter.alpha=5E+0"], lambda c: c.adapter and c.adapter.alpha, 5.0),
    "camelCase is understood": (["training.maxSteps=200"], lambda c: c.training.max_steps, 200),
    "a name with a digit": (["training.beta1=0.5"], lambda c: c.training.beta1, 0.5),
    "a list": (
        ["adapter.target_modules=[q_proj, v_proj]"],
        lambda c: c.adapter and c.adapter.target_modules,
        ["q_proj", "v_proj"],
    ),
    "a whole group": (
        ["adapter={rank: 4, targetModules: [q_proj]}"],
        lambda c: c.adapter and (c.adapter.rank, c.adapter.alpha),
        (4, 16),
    ),
    "null": (["training.max_steps=null"], lambda c: c.training.max_steps, None),
    "true": (["export.merged=true"], lambda c: c.export.merged, True),
    "a path with an equals sign": (["output_dir=a=b"], lambda c: c.output_dir, "a=b"),
    "a removed key has its default again": (["~training.learning_rate"], lambda c: c.training.learning_rate, 3e-4),
    "a removed group too": (["~adapter"], lambda c: c.adapter, None),
    "the last one wins": (["training.epochs=3", "training.epochs=4"], lambda c: c.training.epochs, 4),
}


@pytest.mark.parametrize("case", OVERRIDES)
def test_an_override(case: str, started: list[Any]) -> None:
    words, read, expected = OVERRIDES[case]
    assert cli.main(["run", SINGLE, "--config", "llama3/8B_lora", *PATHS, *words]) == 66
    ((config, nodes),) = started
    assert read(config) == expected
    assert nodes == launch.Nodes()


def test_overrides_may_stand_on_both_sides_of_the_configuration(started: list[Any]) -> None:
    cli.main(["run", SINGLE, *PATHS, "--config", "llama3/8B_lora", "training.epochs=2", "training.seed=5"])
    ((config, _),) = started
    assert (config.model.path, config.training.epochs, config.training.seed) == ("m", 2, 5)


def test_torchruns_options_stand_before_the_recipe(started: list[Any]) -> None:
    options = [
        "--nproc_per_node",
        "4",
        "--nnodes=2",
        "--node-rank",
        "1",
        "--master_addr",
        "host",
        "--master_port",
        "29501",
    ]
    cli.main(["run", *options, "lora_finetune_distributed", "--config", "llama3/8B_lora", *PATHS])
    ((_, nodes),) = started
    assert nodes == launch.Nodes(4, 2, 1, "host", 29501)


def test_the_recipe_decides_the_method_where_the_file_does_not(started: list[Any], tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("training: {epochs: 2}\n")
    cli.main(["run", "full_finetune_single_device", "--config", str(tmp_path / "mine.yaml"), *PATHS])
    ((config, _),) = started
    assert (config.method, config.training.epochs) == ("Full", 2)


# --- what cannot work ---

REFUSED: dict[str, tuple[list[str], list[str]]] = {
    "missing paths say which override gives them": (
        ["run", SINGLE, "--config", "demo/smollm2_lora"],
        [
            "model.path: a value is required; give it as model.path=FOLDER",
            "dataset: exactly one of path and repo is required; give it as dataset.path=FILE",
            "output_dir: a value is required; give it as output_dir=FOLDER",
        ],
    ),
    "an unknown recipe": (
        ["run", "lora_finetune_single", "--config", "llama3/8B_lora", *PATHS],
        ["recipe: 'lora_finetune_single' is unknown; did you mean lora_finetune_single_device?"],
    ),
    "an unknown configuration": (
        ["run", SINGLE, "--config", "llama3/8b_lora", *PATHS],
        ["--config: 'llama3/8b_lora' is neither a file nor a configuration; did you mean llama3/8B_lora?"],
    ),
    "a file that is not there": (
        ["run", SINGLE, "--config", "mine.yaml", *PATHS],
        ["--config: there is no file mine.yaml; `tune ls` shows the shipped configurations"],
    ),
    "a single-device recipe on two processes": (
        ["run", "--nproc_per_node", "2", SINGLE, "--config", "llama3/8B_lora", *PATHS],
        [
            "lora_finetune_single_device runs one process, but 2 are asked for: "
            "use lora_finetune_distributed, or leave out the number of processes"
        ],
    ),
    "a recipe of another method": (
        ["run", "full_finetune_distributed", "--config", "llama3/8B_lora", *PATHS],
        [
            "method: full_finetune_distributed trains with Full, but the configuration says LoRA: "
            "use lora_finetune_distributed, or set method=Full"
        ],
    ),
    "several nodes without a meeting point": (
        ["run", "--nnodes", "2", "lora_finetune_distributed", "--config", "llama3/8B_lora", *PATHS],
        [
            "several nodes need the address and port of node 0: "
            "PET_MASTER_ADDR and PET_MASTER_PORT, or --master_addr and --master_port"
        ],
    ),
    "all problems at once": (
        [
            "run",
            "--nproc_per_node=2",
            SINGLE,
            "--config",
            "demo/smollm2_lora",
            "training.epoch=1",
            "adapter.rank=0",
            *PATHS[1:],
        ],
        [
            "lora_finetune_single_device runs one process, but 2 are asked for: "
            "use lora_finetune_distributed, or leave out the number of processes",
            "model.path: a value is required; give it as model.path=FOLDER",
            "adapter.rank: input should be greater than or equal to 1, but it is 0",
            "training.epoch: unknown field; did you mean epochs?",
        ],
    ),
    "words that are no overrides": (
        ["run", SINGLE, "--config", "llama3/8B_lora", "epochs", "=3", "training.epochs=[", "~training.nothing"],
        [
            "epochs: an override is KEY=VALUE, such as training.epochs=3, or ~KEY",
            "=3: an override is KEY=VALUE, such as training.epochs=3, or ~KEY",
            "training.epochs: '[' is not a YAML value",
            "~training.nothing: the configuration does not set training.nothing, so it cannot be removed",
        ],
    ),
    "copying what is not there": (
        ["cp", "nothing", "x.yaml"],
        [
            "--config: 'nothing' is neither a file nor a configuration; `tune ls` shows the configurations",
        ],
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_work_is_told_and_ends_with_64(
    case: str, started: list[Any], told: Told, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments, expected = REFUSED[case]
    assert told(*arguments) == expected
    assert started == []


@pytest.mark.parametrize(
    ("text", "words"), [("a: [", "is not YAML"), ("- a\n- b\n", "must hold keys and values")], ids=["no YAML", "a list"]
)
def test_a_file_that_is_no_configuration(text: str, words: str, tmp_path: Path, told: Told) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    (problem,) = told("validate", str(path))
    assert words in problem


def test_an_unknown_option_is_told_as_such(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["run", SINGLE, "--config", "llama3/8B_lora", "--epochs", "3"])
    assert "unrecognized arguments: --epochs" in capsys.readouterr().err


# --- ls, cp, validate ---


def test_ls_lists_each_recipe_with_its_configurations(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["ls"]) == 0
    recipe, listed = "", {}
    for line in capsys.readouterr().out.splitlines()[1:]:
        recipe = line[:32].strip() or recipe
        listed.setdefault(recipe, []).append(line[32:])
    assert list(listed) == [*cli.RECIPES, *cli.TASKS]
    assert {"demo/smollm2_lora", "llama3/8B_qlora_single_device"} <= set(listed["lora_finetune_single_device"])
    assert {"demo/smollm2_lora", "llama3/70B_lora"} <= set(listed["lora_finetune_distributed"])
    assert all(name in preset_names() for recipe in cli.RECIPES for name in listed[recipe] if name != "-")
    assert listed["generate"] == ["generation"]
    assert not any(name.endswith("_single_device") for name in listed["lora_finetune_distributed"])


def test_cp_copies_and_never_overwrites(tmp_path: Path, told: Told, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "new" / "mine.yaml"
    assert cli.main(["cp", "demo/smollm2_lora", str(target)]) == 0
    assert target.read_text() == preset_text("demo/smollm2_lora")
    capsys.readouterr()
    target.write_text("edited")
    assert told("cp", "demo/smollm2_lora", str(target)) == [f"{target} exists already: choose another file"]
    assert target.read_text() == "edited"


@pytest.mark.parametrize("name", preset_names())
def test_every_shipped_configuration_is_valid_and_says_what_it_still_needs(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["validate", name]) == 0
    needs = "; to run it also needs model.path=FOLDER, dataset.path=FILE, output_dir=FOLDER" if "demo" in name else ""
    assert capsys.readouterr().out == f"{name} is valid{needs}\n"


def test_validate_tells_all_problems_of_a_file(tmp_path: Path, told: Told) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({"model": {"path": "m"}, "training": {"epochs": 0}, "metod": "LoRA"}))
    assert told("validate", str(path), "adapter.rank=2000") == [
        "adapter.rank: input should be less than or equal to 1024, but it is 2000",
        "training.epochs: input should be greater than or equal to 1, but it is 0",
        "metod: unknown field; did you mean method?",
    ]


# --- the containers' entry point ---


def test_launch_reads_the_operators_variables(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, started: list[Any]
) -> None:
    config = {"model": {"path": "m"}, "dataset": {"path": "d"}, "outputDir": "o"}
    (tmp_path / "run.json").write_text(json.dumps(config))
    monkeypatch.setenv("PET_NPROC_PER_NODE", "3")
    assert container.main(["launch", "--config", str(tmp_path / "run.json")]) == 66
    ((seen, nodes),) = started
    assert (seen.model.path, nodes.processes) == ("m", 3)


def test_launch_tells_wrong_variables(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("PET_NNODES", "two")
    assert container.main(["launch", "--config", "run.json"]) == 64
    assert re.fullmatch(r"error: PET_NNODES must be .* but it is 'two'\n", capsys.readouterr().err)


def test_a_worker_refuses_a_configuration_that_is_not_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.json").write_text('{"model": {"path": "m"}, "outputDir": "o"}')
    assert container.main(["train", "--config", str(tmp_path / "run.json")]) == 64
    assert capsys.readouterr().err == "error: dataset: a value is required\n"


def test_staging_gets_its_own_options(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        container.main(["stage", "--help"])
    assert "--source" in capsys.readouterr().out
