"""From the command line to a run: configurations by name and path, overrides, torchrun's options, hidden tokens."""

from pathlib import Path
from typing import Any

import pytest
from tests.trainer.conftest import Started, write_llama

from kubetune_contract.config import RunConfig
from kubetune_contract.presets import config_names, preset_text, resolve
from kubetune_trainer import __main__ as container
from kubetune_trainer import cli, launch, torchrun
from kubetune_trainer.advice import warnings
from kubetune_trainer.overrides import select

RUN = ["run", "lora_finetune_distributed", "--config"]


# --- documented commands ---

DOCUMENTED = {
    "run lora_finetune_single_device --config llama3/8B_lora_single_device": ("LoRA", "AdamW", 1),
    "run lora_finetune_single_device --config llama3/8B_qlora_single_device": ("QLoRA", "AdamW", 1),
    "run lora_finetune_single_device --config llama3/8B_dora_single_device": ("DoRA", "AdamW", 1),
    "run lora_finetune_single_device --config llama3/8B_qdora_single_device": ("QDoRA", "AdamW", 1),
    "run full_finetune_single_device --config llama3/8B_full_single_device": ("Full", "PagedAdamW8bit", 1),
    "run --nproc_per_node 4 full_finetune_distributed --config llama3/8B_full": ("Full", "AdamW", 4),
    "run --nproc_per_node 2 lora_finetune_distributed --config llama3/8B_lora": ("LoRA", "AdamW", 2),
    "run --nnodes 1 --nproc_per_node 2 lora_finetune_distributed --config llama3/8B_dora": ("DoRA", "AdamW", 2),
    "run --nproc_per_node 8 lora_finetune_distributed --config recipes/configs/llama3/70B_lora.yaml": (
        "LoRA",
        "AdamW",
        8,
    ),
    "run --nproc_per_node 8 lora_finetune_distributed --config llama3_1/405B_qlora": ("QLoRA", "AdamW", 8),
    "run lora_dpo_single_device --config llama3_1/8B_lora_dpo_single_device": ("LoRA", "AdamW", 1),
    "run --nnodes 1 --nproc_per_node 2 lora_dpo_distributed --config llama3_1/8B_lora_dpo": ("LoRA", "AdamW", 2),
}


@pytest.mark.parametrize("line", DOCUMENTED)
def test_a_documented_command_works_word_for_word(line: str, started: Started) -> None:
    assert cli.main(line.split()) == 66
    ((config, nodes),) = started
    assert (config.method, config.training.optimizer, nodes.world_size) == DOCUMENTED[line]
    name = line.rsplit(maxsplit=1)[-1].removeprefix("recipes/configs/").removesuffix(".yaml")
    assert config == resolve(name, {})


# --- which configuration is meant ---

MEANT = {
    "its name": "llama3/70B_lora",
    "a path in torchtune's tree": "recipes/configs/llama3/70B_lora.yaml",
    "an absolute path": "/home/me/torchtune/recipes/configs/llama3/70B_lora.yaml",
    "the name with a suffix": "llama3/70B_lora.yaml",
    "the other suffix": "./llama3/70B_lora.yml",
    "a path without a suffix": "configs/llama3/70B_lora",
}


@pytest.mark.parametrize("case", MEANT)
def test_a_path_that_ends_in_the_name_of_a_shipped_configuration_finds_it_and_says_so(
    case: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = MEANT[case]
    assert select(path, []).shipped == "llama3/70B_lora"
    note = f"note: there is no file {path}: taking the shipped configuration llama3/70B_lora\n"
    assert capsys.readouterr().err == ("" if case == "its name" else note)


def test_a_file_that_exists_is_taken_whatever_it_is_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "llama3").mkdir()
    (tmp_path / "llama3" / "70B_lora.yaml").write_text("method: DoRA\n")
    selection = select("llama3/70B_lora.yaml", [])
    assert (selection.shipped, selection.values) == (None, {"method": "DoRA"})
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("path", ["my_llama3/70B_lora.yaml", "70B_lora.yaml", "xllama3/8B_lora"])
def test_a_part_of_a_name_is_not_enough(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["validate", path]) == 64
    assert capsys.readouterr().err.startswith("error: this cannot work:\n  --config: ")


# --- what overrides do to the rest ---

LAID_OVER: dict[str, tuple[list[str], dict[str, Any]]] = {
    "other data forget the preset's": (["dataset.path=d"], {"dataset": {"path": "d"}}),
    "a format is that of the other data": (
        ["dataset.path=d", "dataset.format=ShareGPT"],
        {"dataset": {"path": "d", "format": "ShareGPT"}},
    ),
    "another repository too": (["dataset.repo=a/b", "dataset.split=x"], {"dataset": {"repo": "a/b", "split": "x"}}),
    "an option keeps the preset's data": (["dataset.packed=true"], {"dataset": {"packed": True}}),
    "a method drops what does not go with it": (["method=Full"], {"method": "Full"}),
    "what was set is removed": (["training.epochs=3", "~training.epochs"], {}),
    "what was removed is set": (["~training.epochs", "training.epochs=3"], {"training": {"epochs": 3}}),
    "a group that is set as a whole is laid over": (["training={epochs: 3}"], {"training": {"epochs": 3}}),
}


@pytest.mark.parametrize("case", LAID_OVER)
def test_an_override(case: str, started: Started) -> None:
    words, expected = LAID_OVER[case]
    recipe = "full_finetune_distributed" if "method=Full" in words else "lora_finetune_distributed"
    assert cli.main(["run", recipe, "--config", "llama3/8B_lora", *words]) == 66
    ((config, _),) = started
    assert config == resolve("llama3/8B_lora", expected)


def test_a_copied_configuration_is_overridden_like_the_shipped_one(started: Started, tmp_path: Path) -> None:
    copy = str(tmp_path / "mine.yaml")
    assert cli.main(["cp", "llama3/8B_lora", copy]) == 0
    assert cli.main([*RUN, copy, "dataset.path=d.jsonl"]) == 66
    ((config, _),) = started
    assert config == resolve("llama3/8B_lora", {"dataset": {"path": "d.jsonl"}})


# --- cat, cp ---


@pytest.mark.parametrize("name", config_names())
def test_cat_prints_the_file(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["cat", name]) == 0
    assert capsys.readouterr().out == preset_text(name)


@pytest.mark.parametrize("command", [["cat"], ["cp"]])
def test_a_recipe_has_no_code_to_show(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*command, "lora_finetune_distributed", *(["x.py"] if command == ["cp"] else [])]) == 64
    assert capsys.readouterr().err.splitlines()[1:] == [
        "  lora_finetune_distributed is a recipe: a name without code of its own; `tune ls` shows its configurations"
    ]


# --- preview ---


def test_preview_shows_the_first_rows_and_what_is_learnt(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_llama(tmp_path / "m")
    (tmp_path / "d.jsonl").write_text(
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n' * 3
    )
    words = [f"model.path={tmp_path / 'm'}", f"dataset.path={tmp_path / 'd.jsonl'}"]
    assert cli.main(["preview", "--config", "demo/smollm2_lora", *words, "--rows", "2"]) == 0
    told = capsys.readouterr().out
    assert told.count("carry the loss\nu:a</s>\u27e6a:b</s>\u27e7") == 2


# --- torchrun's options ---

TORCHRUN: dict[str, tuple[list[str], launch.Nodes]] = {
    "none": ([], launch.Nodes()),
    "processes": (["--nproc_per_node", "2"], launch.Nodes(2)),
    "processes with hyphens": (["--nproc-per-node=2"], launch.Nodes(2)),
    "standalone": (["--standalone", "--nproc_per_node", "2"], launch.Nodes(2)),
    "a free port, as torchtune documents it": (
        ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", "--nproc_per_node", "4"],
        launch.Nodes(4, address="localhost"),
    ),
    "several machines": (
        ["--nnodes", "2", "--node_rank", "1", "--master_addr", "h", "--master_port", "29500"],
        launch.Nodes(1, 2, 1, "h", 29500),
    ),
    "several machines by an endpoint": (
        ["--nnodes", "2", "--node_rank=1", "--rdzv_endpoint", "h:29500", "--rdzv_id", "7"],
        launch.Nodes(1, 2, 1, "h", 29500),
    ),
}


@pytest.mark.parametrize("case", TORCHRUN)
def test_torchruns_options(case: str, started: Started) -> None:
    words, expected = TORCHRUN[case]
    assert cli.main(["run", *words, *RUN[1:], "llama3/8B_lora"]) == 66
    assert started[0][1] == expected


def test_one_process_for_each_gpu(started: Started, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchrun, "gpus", lambda: 3)
    for word in ("gpu", "auto"):
        cli.main(["run", "--nproc_per_node", word, *RUN[1:], "llama3/8B_lora"])
    monkeypatch.setattr(torchrun, "gpus", lambda: 0)
    cli.main(["run", "--nproc_per_node", "auto", *RUN[1:], "llama3/8B_lora"])
    assert [nodes.processes for _, nodes in started] == [3, 3, 1]


CONTRADICTIONS = {
    "no number": (
        ["--nproc_per_node", "two"],
        "--nproc_per_node: 'two' is neither a number of processes nor auto or gpu",
    ),
    "none": (["--nproc_per_node", "0"], "--nproc_per_node: '0' is neither a number of processes nor auto or gpu"),
    "standalone on two": (
        ["--standalone", "--nnodes", "2"],
        "--standalone is for one machine, but --nnodes is 2: leave one of them out",
    ),
    "unnumbered machines": (
        ["--nnodes", "2", "--rdzv_backend", "c10d", "--rdzv_endpoint", "h:1"],
        "--rdzv_backend c10d: machines are not numbered here: leave it out and give --node_rank",
    ),
    "an endpoint without a port": (
        ["--nnodes", "2", "--rdzv_endpoint", "h:port"],
        "--rdzv_endpoint: 'h:port' is not HOST:PORT",
    ),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_options_that_cannot_work(case: str, started: Started, capsys: pytest.CaptureFixture[str]) -> None:
    words, told = CONTRADICTIONS[case]
    assert cli.main(["run", *words, *RUN[1:], "llama3/8B_lora"]) == 64
    assert capsys.readouterr().err.splitlines()[1:] == [f"  {told}"]
    assert started == []


# --- tokens ---

TOKEN = "hf_AbCdEfGhIjKlMnOp"


@pytest.mark.parametrize(
    "words",
    [
        [*RUN, "llama3/8B_lora", f"hf_token={TOKEN}"],
        [*RUN, "llama3/8B_lora", f"training.epochs={TOKEN}"],
        [*RUN, "llama3/8B_lora", TOKEN],
        [*RUN, "llama3/8B_lora", "training.seed=a-token-of-another-shape"],
    ],
    ids=["a key", "a value", "a word", "the one of the environment"],
)
def test_a_token_is_not_told_back(
    words: list[str], started: Started, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "a-token-of-another-shape")
    assert cli.main(words) == 64
    told = capsys.readouterr()
    assert TOKEN not in told.out + told.err
    assert "another-shape" not in told.out + told.err
    assert started == []


def test_an_unknown_option_with_a_token_is_told_without_it(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main([*RUN, "llama3/8B_lora", "--hf-token", TOKEN])
    told = capsys.readouterr().err
    assert "--hf-token" in told
    assert TOKEN not in told


# --- base weights under a chat format ---


def folder(root: Path, name: str, **files: str) -> Path:
    made = root / name
    made.mkdir(parents=True)
    for file, text in files.items():
        (made / file.replace("__", ".")).write_text(text)
    return made


MODELS: dict[str, tuple[str, dict[str, str], dict[str, Any], bool]] = {
    "base weights": ("Meta-Llama-3-8B", {}, {}, True),
    "base weights with settings": ("base", {"tokenizer_config__json": '{"bos_token": "<s>"}'}, {}, True),
    "settings that cannot be read": ("base", {"tokenizer_config__json": "{"}, {}, True),
    "a QLoRA adapter on them": ("base", {}, {"method": "QLoRA"}, True),
    "preferences on them": ("base", {}, {"dataset": {"path": "d", "format": "Preference"}}, True),
    "a chat among plain texts": (
        "base",
        {},
        {"dataset": {"path": "d", "format": "Completion", "mixture": [{"path": "e"}]}},
        True,
    ),
    "Instruct by name": ("Meta-Llama-3-8B-Instruct", {}, {}, False),
    "Meta's files of an Instruct model": ("Llama-3.2-1B-Instruct/original", {}, {}, False),
    "Meta's files of a base model": ("Llama-3.2-1B/original", {}, {}, True),
    "a chat template": ("mine", {"tokenizer_config__json": '{"chat_template": "{{ messages }}"}'}, {}, False),
    "a chat template of its own": ("mine", {"chat_template__jinja": "{{ messages }}"}, {}, False),
    "full fine-tuning": ("base", {}, {"method": "Full"}, False),
    "plain texts": ("base", {}, {"dataset": {"path": "d", "format": "Completion"}}, False),
    "embeddings that are trained": ("base", {}, {"adapter": {"target_modules": ["q_proj", "embed_tokens"]}}, False),
}


@pytest.mark.parametrize("case", MODELS)
def test_base_weights_under_a_chat_format_are_warned_of(case: str, tmp_path: Path) -> None:
    name, files, values, warned = MODELS[case]
    path = str(folder(tmp_path, name, **files))
    config = resolve(None, {"dataset": {"path": "d"}, "output_dir": "o", "model": {"path": path}, **values})
    assert len(warnings(config)) == warned


def test_a_model_that_is_not_there_is_not_judged() -> None:
    assert warnings(resolve("llama3/8B_lora", {"model": {"path": "/nowhere/base"}})) == []


WARNING = (
    "warning: {path} looks like base weights: it has no chat template, and its name does not say Instruct. The "
    "special tokens of a chat have untrained embeddings there, and LoRA does not train embeddings: take the Instruct "
    "weights, add embed_tokens and lm_head to adapter.target_modules, or set dataset.format to Completion\n"
)


def test_the_warning_is_told_before_a_run_and_by_validate(
    tmp_path: Path, started: Started, capsys: pytest.CaptureFixture[str]
) -> None:
    path = folder(tmp_path, "base")
    for command in (RUN, ["validate"]):
        cli.main([*command, "llama3/8B_lora", f"model.path={path}"])
        assert capsys.readouterr().err == WARNING.format(path=path)


def test_a_container_tells_it_too(
    tmp_path: Path, started: Started, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config: RunConfig = resolve("llama3/8B_lora", {"model": {"path": str(folder(tmp_path, "base"))}})
    (tmp_path / "run.json").write_text(config.to_json())
    assert container.main(["launch", "--config", str(tmp_path / "run.json")]) == 66
    assert capsys.readouterr().err == WARNING.format(path=tmp_path / "base")
    monkeypatch.setenv("PET_NNODES", "2")
    monkeypatch.setenv("PET_NODE_RANK", "1")
    monkeypatch.setenv("PET_MASTER_PORT", "1")
    container.main(["launch", "--config", str(tmp_path / "run.json")])
    assert capsys.readouterr().err == ""
