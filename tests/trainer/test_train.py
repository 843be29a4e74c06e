"""A whole run in one process: what it leaves, what it says, and how it ends when something is wrong."""

import errno
import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from kubetune_contract.config import RunConfig
from kubetune_contract.exit_codes import ExitCode
from kubetune_contract.presets import merge
from kubetune_contract.progress import Result, TerminationMessage
from kubetune_trainer import loop, report, train
from kubetune_trainer.data import DataError
from kubetune_trainer.distributed import World
from kubetune_trainer.report import read_metrics


@pytest.fixture
def last_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], TerminationMessage]:
    """Reads the termination message as the kubelet would."""
    log = tmp_path / "termination-log"
    log.touch()
    monkeypatch.setattr(report, "TERMINATION_LOG", str(log))
    return lambda: TerminationMessage.model_validate_json(log.read_text())


@pytest.fixture(autouse=True)
def sigterm() -> Iterator[None]:
    """train.main() takes SIGTERM for itself; afterwards it is pytest's again."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def changed(config: RunConfig, **overrides: Any) -> RunConfig:
    return RunConfig.model_validate(merge(config.model_dump(), overrides))


def short(config: RunConfig, **overrides: Any) -> RunConfig:
    return changed(config, **({"training": {"max_steps": 3}} | overrides))


def files(folder: Path) -> list[str]:
    return sorted(
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file() and "checkpoints" not in path.parts
    )


# --- what a run leaves ---


def test_a_lora_run_leaves_adapter_merged_model_samples_picture_and_result(
    training_run: RunConfig, last_word: Callable[[], TerminationMessage]
) -> None:
    config = short(training_run, export={"merged": True})
    assert train.main(config) == 0
    folder = Path(config.output_dir)
    assert files(folder) == [
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        "config.yaml",
        "identity.json",
        "loss.png",
        "merged/config.json",
        "merged/model.safetensors",
        "merged/tokenizer.json",
        "merged/tokenizer_config.json",
        "metrics.jsonl",
        "result.json",
        "samples.json",
    ]
    result = Result.model_validate_json((folder / "result.json").read_text())
    lines = read_metrics(folder / "metrics.jsonl")
    assert result == Result(
        adapter_path="adapter",
        merged_path="merged",
        samples_path="samples.json",
        loss_picture_path="loss.png",
        final_loss=lines[-2]["loss"],
        initial_validation_loss=lines[0]["validation_loss"],
        final_validation_loss=lines[-1]["validation_loss"],
        steps=3,
        tokens=sum(line.get("tokens", 0) for line in lines),
    )
    message = last_word()
    assert (message.reason, message.result) == ("Done", result)
    assert message.message.startswith("trained 3 steps, training loss ")
    assert RunConfig.model_validate(yaml.safe_load((folder / "config.yaml").read_text())) == config


def test_a_full_run_leaves_a_model(training_run: RunConfig, alone: World) -> None:
    config = short(training_run.model_copy(update={"adapter": None, "validation": None}), method="Full")
    result = train.run(config, alone, train.StopFlag())
    folder = Path(config.output_dir)
    assert (result.model_path, result.adapter_path, result.samples_path) == ("model", None, None)
    assert (result.initial_validation_loss, result.final_validation_loss) == (None, None)
    assert (folder / "model" / "model.safetensors").exists()
    assert not (folder / "samples.json").exists()


def test_training_lowers_the_loss_and_changes_the_answers(training_run: RunConfig, alone: World) -> None:
    result = train.run(changed(training_run, training={"epochs": 8, "learning_rate": 0.02}), alone, train.StopFlag())
    assert result.initial_validation_loss is not None
    assert result.final_validation_loss is not None
    assert result.final_validation_loss < 0.7 * result.initial_validation_loss
    samples = json.loads(Path(training_run.output_dir, "samples.json").read_text())
    assert [(sample["prompt"], sample["reference"]) for sample in samples] == [("6+6?", "12."), ("7+0?", "7.")]
    assert all(isinstance(sample["before"], str) and sample["before"] != sample["after"] for sample in samples)


def test_the_best_checkpoint_is_exported_and_its_loss_is_the_results(
    training_run: RunConfig, alone: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a level rate, what is best after step 4 is what a run of 4 steps leaves."""
    training = {"schedule": "Constant", "warmup_steps": 1}
    four = short(training_run, training=training | {"max_steps": 4}, output_dir=str(tmp_path / "four"))
    eight = short(
        training_run,
        training=training | {"max_steps": 8},
        validation={"every_steps": 2},
        checkpoint={"keep_best": True},
    )
    train.run(four, alone, train.StopFlag())
    losses = iter([9.0, 3.0, 1.0, 2.0, 4.0])  # before the first step, then after every second
    monkeypatch.setattr(loop, "mean_loss", lambda run, data: next(losses))
    assert train.run(eight, alone, train.StopFlag()).final_validation_loss == 1.0
    expected, exported = (
        Path(config.output_dir, "adapter", "adapter_model.safetensors").read_bytes() for config in (four, eight)
    )
    assert exported == expected


def test_the_first_lines_say_what_will_happen(
    training_run: RunConfig, alone: World, capsys: pytest.CaptureFixture[str]
) -> None:
    config = short(training_run, dataset={"max_sequence_length": 16}, training={"max_steps": 3, "warmup_steps": 2})
    train.run(config, alone, train.StopFlag())
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    said = {words[0]: words[1] for words in lines[:11]}
    assert list(said)[:9] == [
        "model",
        "data",
        "validation",
        "processes",
        "steps",
        "note",
        "output",
        "method",
        "trainable",
    ]
    assert said["model"] == config.model.path
    assert said["data"].startswith(f"{config.dataset.path}: 48 conversations; ")
    assert "carry the loss" in said["data"]
    assert said["processes"] == "1 on cpu"
    assert said["steps"] == "3 in batches of 4 (1 epoch of 12 steps, cut by training.max_steps)"
    assert said["note"] == "training.warmup_steps is 1 instead of 2: the run has only 3 steps"
    assert said["method"].startswith("LoRA, rank 4, alpha 8, on q_proj, k_proj")
    assert said["precision"] == "fp32, as training.precision says"


def test_rows_that_are_cut_or_left_out_are_told(
    training_run: RunConfig, alone: World, capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path(training_run.dataset.path)
    extra = [{"role": "user", "content": "x" * 99}, {"role": "assistant", "content": "y"}]
    path.write_text(path.read_text() + json.dumps({"messages": extra}) + "\n")
    train.run(short(training_run), alone, train.StopFlag())
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("data")]
    assert "; 1 cut to 64 tokens (dataset.max_sequence_length)" in line
    assert line.endswith("; 1 left out, because nothing in them carries the loss")


# --- again ---


def test_a_finished_run_ends_at_once_with_the_same_result(
    training_run: RunConfig, last_word: Callable[[], TerminationMessage], capsys: pytest.CaptureFixture[str]
) -> None:
    config = short(training_run)
    train.main(config)
    first, folder = last_word(), Path(config.output_dir)
    stamps = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.name != "config.yaml"}
    capsys.readouterr()
    assert train.main(config) == 0
    assert capsys.readouterr().out == f"this run has finished already, its results are in {folder}\n"
    assert last_word() == first
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.name != "config.yaml"} == stamps


OTHER_RUNS: dict[str, tuple[dict[str, Any], str]] = {
    "a seed": ({"training": {"max_steps": 3, "seed": 7}}, "training.seed was 42, now 7"),
    "a rank": ({"adapter": {"rank": 2}}, "adapter.rank was 4, now 2"),
    "a method": ({"method": "Full", "adapter": None}, "method was LoRA, now Full"),
    "a cut": ({"dataset": {"max_sequence_length": 32}}, "dataset.max_sequence_length was 64, now 32"),
}


@pytest.mark.parametrize("case", OTHER_RUNS)
def test_a_folder_of_a_run_with_other_settings_is_refused(
    case: str, training_run: RunConfig, last_word: Callable[[], TerminationMessage]
) -> None:
    overrides, difference = OTHER_RUNS[case]
    assert train.main(short(training_run)) == 0
    assert train.main(short(training_run, **overrides)) == ExitCode.INVALID_CONFIG
    assert last_word().reason == "InvalidConfig"
    assert difference in last_word().message


def test_a_folder_of_a_run_on_other_data_is_refused(
    training_run: RunConfig, last_word: Callable[[], TerminationMessage]
) -> None:
    assert train.main(short(training_run)) == 0
    path = Path(training_run.dataset.path)
    path.write_text(path.read_text().replace("1.", "2."))
    assert train.main(short(training_run)) == ExitCode.INVALID_CONFIG
    assert "dataset.path was " in last_word().message


def test_the_same_settings_with_more_memory_thrift_are_the_same_run(training_run: RunConfig) -> None:
    config = short(training_run)
    train.main(config)
    assert train.main(short(training_run, training={"max_steps": 3, "activation_checkpointing": "Full"})) == 0


# --- what is wrong ---


def no_model(config: RunConfig) -> RunConfig:
    return changed(config, model={"path": f"{config.model.path}-x"})


def no_data(config: RunConfig) -> RunConfig:
    return changed(config, dataset={"path": "none.jsonl"})


def no_answers(config: RunConfig) -> RunConfig:
    Path(config.dataset.path).write_text('{"messages": [{"role": "user", "content": "?"}]}\n')
    return config


def bad_held_out_row(config: RunConfig) -> RunConfig:
    assert config.validation is not None
    Path(config.validation.path).write_text("{}\n")
    return config


def no_folder(config: RunConfig) -> RunConfig:
    Path(config.output_dir).write_text("a file")
    return config


def no_template(config: RunConfig) -> RunConfig:
    Path(config.model.path, "tokenizer_config.json").write_text("{}")
    return config


def broken_weights(config: RunConfig) -> RunConfig:
    from safetensors.torch import load_file, save_file

    path = Path(config.model.path, "model.safetensors")
    weights = load_file(path)
    weights["model.norm.weight"].fill_(float("nan"))
    save_file(weights, path)
    return changed(config, validation=None)


WRONG: dict[str, tuple[Callable[[RunConfig], RunConfig], int, str]] = {
    "no model": (no_model, 66, "did you mean model?"),
    "no chat template": (no_template, 66, "has no chat template"),
    "no data": (no_data, 65, "none.jsonl cannot be read: No such file or directory"),
    "data without answers": (no_answers, 65, "so there is nothing to learn: add answers"),
    "a bad held-out row": (bad_held_out_row, 65, 'held-out.jsonl: line 1: "messages" must be a list'),
    "an output folder that cannot be": (no_folder, 68, "out cannot be written: "),
    "weights that are no numbers": (broken_weights, 70, "step 1 has loss nan"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_told_and_ends_with_its_code(
    case: str,
    training_run: RunConfig,
    last_word: Callable[[], TerminationMessage],
    capsys: pytest.CaptureFixture[str],
) -> None:
    spoil, code, words = WRONG[case]
    config = spoil(training_run)
    assert train.main(config) == code
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1, "a sentence, no traceback"
    assert words in error
    assert last_word().reason == ExitCode(code).reason
    assert last_word().message in error


def test_a_run_that_fails_before_its_first_checkpoint_can_be_mended(training_run: RunConfig) -> None:
    path = Path(training_run.dataset.path)
    rows = path.read_text()
    no_answers(training_run)
    assert train.main(short(training_run)) == 65
    path.write_text(rows)
    assert train.main(short(training_run)) == 0


FAILURES: dict[str, tuple[Exception, int, str]] = {
    "an error of ours": (DataError("line 3"), 65, "line 3"),
    "a full disk": (
        OSError(errno.ENOSPC, "No space left on device", "/out/x"),
        71,
        "/out/x cannot be written: No space left on device; free some space",
    ),
    "a peer that is gone": (
        RuntimeError("[gloo] Connection closed by peer [10.0.0.1]:29500"),
        81,
        "another worker is gone, its own log says why: [gloo] Connection closed by peer",
    ),
    "a peer that NCCL has lost": (
        RuntimeError("ncclRemoteError: A call failed possibly due to a network error or a remote process exiting"),
        81,
        "another worker is gone",
    ),
    "a folder that may not be written": (
        OSError(errno.EROFS, "Read-only file system", "/out/x"),
        68,
        "/out/x cannot be written: Read-only file system",
    ),
    "too little device memory": (
        torch.OutOfMemoryError("tried to allocate 2 GiB. If reserved but unallocated memory is large"),
        72,
        "the device's memory is too small: tried to allocate 2 GiB: set training.activation_checkpointing to Full, or ",
    ),
    "too little memory for a library": (RuntimeError("CUDA error: out of memory"), 72, "out of memory: set training."),
    "too little host memory": (MemoryError(), 72, "the device's memory is too small: MemoryError: set training."),
    "a bug": (KeyError("x"), 1, "KeyError: 'x'"),
}


@pytest.mark.parametrize("case", FAILURES)
def test_any_error_becomes_a_code_and_a_sentence(
    case: str,
    training_run: RunConfig,
    last_word: Callable[[], TerminationMessage],
    capsys: pytest.CaptureFixture[str],
) -> None:
    error, code, words = FAILURES[case]
    assert train._tell_failure(error, training_run) == code
    assert words in last_word().message
    assert last_word().reason == ExitCode(code).reason
    assert (last_word().log is not None) == (code == 1)
    assert ("Traceback" in capsys.readouterr().err or code == 1) == (code == 1)


# --- what it imports ---


def test_the_trainer_needs_no_model_library_and_starts_lean() -> None:
    """transformers and peft are the tests' peers; matplotlib, the hub's client and sharding wait for their use."""
    unwanted = (
        "transformers",
        "peft",
        "matplotlib",
        "huggingface_hub",
        "torch.distributed.checkpoint.state_dict_saver",
        "torch.distributed.tensor",
    )
    code = f"import sys, kubetune_trainer.train; sys.exit(', '.join(set({unwanted}) & set(sys.modules)) or 0)"
    done = subprocess.run([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
