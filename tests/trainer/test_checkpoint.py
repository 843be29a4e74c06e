"""Checkpoints: the same bits back at any number of ranks, complete or absent, and one folder for one run."""

import errno
import json
import shutil
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException

from kubetune_contract.config import RunConfig
from kubetune_contract.exit_codes import ExitCode
from kubetune_trainer import checkpoint
from kubetune_trainer.checkpoint import (
    Checkpointer,
    WorldSizeError,
    is_complete,
    status_of,
)
from kubetune_trainer.distributed import World, full_tensor, local_rows
from kubetune_trainer.failures import as_output_error
from kubetune_trainer.hub import WeightReader
from kubetune_trainer.model import Llama
from kubetune_trainer.optim import make_optimizer
from kubetune_trainer.parallel import build
from kubetune_trainer.peft import trainable


class Trained(NamedTuple):
    model: Llama
    optimizer: torch.optim.Optimizer


def make(config: RunConfig, world: World, steps: int = 0) -> Trained:
    """A model after some steps on a fixed batch, all ranks with the same rows."""
    model = build(config, WeightReader(config.model.path), world)
    optimizer = make_optimizer(trainable(model).values(), config.training)
    generator = torch.Generator().manual_seed(5)
    for _ in range(steps):
        tokens = torch.randint(3, 97, (2, 9), generator=generator)
        model(tokens[:, :-1], tokens[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return Trained(model, optimizer)


def contents(trained: Trained, world: World) -> dict[str, torch.Tensor]:
    """Everything that a checkpoint must bring back, as whole tensors (on rank 0)."""
    found: dict[str, Any] = {}
    for name, param in trainable(trained.model).items():
        found[name] = full_tensor(param, world)
        for key, value in trained.optimizer.state[param].items():
            found[f"{name}.{key}"] = full_tensor(value, world)
    return {name: tensor.clone() for name, tensor in found.items() if tensor is not None}


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


@pytest.fixture
def config(tiny: Path, run_config: Callable[..., RunConfig], tmp_path: Path) -> RunConfig:
    training = {"precision": "FP32", "learning_rate": 0.01, "weight_decay": 0.5}
    return run_config(tiny, training=training, output_dir=str(tmp_path / "out"))


@pytest.fixture
def full_config(tiny: Path, run_config: Callable[..., RunConfig], tmp_path: Path) -> RunConfig:
    training = {"precision": "FP32", "learning_rate": 0.01}
    return run_config(tiny, method="Full", training=training, output_dir=str(tmp_path / "out"))


# --- the same bits ---


def test_weights_optimizer_and_random_state_come_back(config: RunConfig, alone: World) -> None:
    trained = make(config, alone, steps=3)
    expected = contents(trained, alone)
    saver = Checkpointer(Path(config.output_dir), 2, alone)
    torch.manual_seed(7)
    status = saver.save(3, trained.model, trained.optimizer)
    drawn = torch.rand(4)
    fresh = make(config, alone)
    torch.manual_seed(8)
    path = saver.latest()
    assert path == Path(config.output_dir) / status.path
    assert saver.load(path, fresh.model, fresh.optimizer) == (3, None)
    assert_same(contents(fresh, alone), expected)
    assert torch.equal(torch.rand(4), drawn)
    assert (status.step, status.path) == (3, "checkpoints/step-00000003")
    assert status_of(path, Path(config.output_dir)).step == 3


def test_a_loaded_optimizer_goes_on_as_the_saved_one(config: RunConfig, alone: World) -> None:
    """Also the configured learning rate and weight decay survive the step that creates the optimizer's tensors."""
    trained = make(config, alone, steps=2)
    saver = Checkpointer(Path(config.output_dir), 2, alone)
    path = Path(config.output_dir) / saver.save(2, trained.model, trained.optimizer).path
    fresh = make(config, alone)
    saver.load(path, fresh.model, fresh.optimizer)
    for one in (trained, fresh):
        tokens = torch.arange(3, 20)[None]
        one.model(tokens[:, :-1], tokens[:, 1:]).backward()
        one.optimizer.step()
    assert_same(contents(fresh, alone), contents(trained, alone))


def test_frozen_weights_are_not_saved(config: RunConfig, alone: World) -> None:
    trained = make(config, alone, steps=1)
    Checkpointer(Path(config.output_dir), 2, alone).save(1, trained.model, trained.optimizer)
    adapter = sum(param.numel() * 4 for param in trainable(trained.model).values())
    files = Path(config.output_dir, "checkpoints").rglob("*.distcp")
    # The adapter and AdamW's two moments, and a little around each tensor.
    assert 3 * adapter < sum(file.stat().st_size for file in files) < 3 * adapter + 200_000


def _save(world: World, config: RunConfig) -> dict[str, torch.Tensor]:
    trained = make(config, world, steps=2)
    Checkpointer(Path(config.output_dir), 2, world).save(2, trained.model, trained.optimizer)
    return contents(trained, world)


def _load(world: World, config: RunConfig) -> tuple[dict[str, torch.Tensor], str | None, list[float]]:
    fresh = make(config, world)
    loader = Checkpointer(Path(config.output_dir), 2, world)
    path = loader.latest()
    assert path is not None
    step, note = loader.load(path, fresh.model, fresh.optimizer)
    assert step == 2
    return contents(fresh, world), note, torch.rand(3).tolist()


@pytest.mark.parametrize("method", ["LoRA", "Full"])
def test_another_number_of_ranks_gets_the_same_bits_and_says_so(
    method: str, config: RunConfig, full_config: RunConfig, alone: World, spawn: Callable[..., list[Any]]
) -> None:
    chosen = config if method == "LoRA" else full_config
    saved_by_two = spawn(2, _save, chosen)[0]
    for loaded, note, _ in (_load(alone, chosen), spawn(3, _load, chosen)[0]):
        assert_same(loaded, saved_by_two)
        assert note is not None
        assert note.startswith("the checkpoint was saved by 2 processes and goes on with ")
    shutil.rmtree(chosen.output_dir)
    saved_by_one = _save(alone, chosen)
    loaded, note, _ = spawn(2, _load, chosen)[0]
    assert_same(loaded, saved_by_one)
    assert note is not None


def _save_after_validation(world: World, config: RunConfig) -> dict[str, torch.Tensor]:
    trained = make(config, world, steps=2)
    expected = contents(trained, world)
    with torch.no_grad():
        trained.model(torch.arange(3, 20)[None])
    Checkpointer(Path(config.output_dir), 2, world).save(2, trained.model, trained.optimizer)
    return expected


def test_a_forward_pass_before_the_save_changes_nothing(
    full_config: RunConfig, spawn: Callable[..., list[Any]]
) -> None:
    expected = spawn(2, _save_after_validation, full_config)[0]
    loaded, _, _ = spawn(2, _load, full_config)[0]
    assert_same(loaded, expected)


def _save_and_draw(world: World, config: RunConfig) -> list[float]:
    torch.manual_seed(100 + world.rank)
    _save(world, config)
    return torch.rand(3).tolist()


def test_every_rank_gets_its_own_random_state_back(config: RunConfig, spawn: Callable[..., list[Any]]) -> None:
    drawn = spawn(2, _save_and_draw, config)
    assert drawn[0] != drawn[1]
    assert [again for _, _, again in spawn(2, _load, config)] == drawn


# --- while training goes on ---


def _save_meanwhile(world: World, config: RunConfig) -> dict[str, torch.Tensor]:
    """Saves step 2, changes everything while it is written, and leaves."""
    trained = make(config, world, steps=2)
    expected = contents(trained, world)
    with Checkpointer(Path(config.output_dir), 2, world, asynchronous=True) as saver:
        saver.save(2, trained.model, trained.optimizer)
        with torch.no_grad():
            for param in trainable(trained.model).values():
                param.add_(1)
                for value in trained.optimizer.state[param].values():
                    value.add_(1)
        full_tensor(param, world)  # collectives of the training meet those of the save
    return expected


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_checkpoint_written_meanwhile_has_the_bits_of_its_step(
    ranks: int, config: RunConfig, spawn: Callable[..., list[Any]]
) -> None:
    expected = spawn(ranks, _save_meanwhile, config)[0]
    loaded, note, _ = spawn(ranks, _load, config)[0]
    assert_same(loaded, expected)
    assert note is None


def test_a_save_in_flight_is_finished_before_the_next_and_its_error_is_told(
    config: RunConfig, alone: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = make(config, alone, steps=1)
    saver = Checkpointer(Path(config.output_dir), 2, alone, asynchronous=True)
    slow, written = threading.Event(), []
    write = Checkpointer._write

    def late(self: Checkpointer, *arguments: Any) -> None:
        slow.wait(20)
        write(self, *arguments)
        written.append(arguments[-1]["step"])

    monkeypatch.setattr(Checkpointer, "_write", late)
    saver.save(1, trained.model, trained.optimizer)
    assert saver.newest is None
    assert not any(map(is_complete, Path(config.output_dir, "checkpoints").iterdir())), "complete or absent"
    threading.Timer(0.05, slow.set).start()
    saver.finish()
    assert written == [1]

    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Checkpointer, "_write", refuse)
    saver.save(2, trained.model, trained.optimizer)
    with pytest.raises(OSError, match="No space left"):
        saver.save(3, trained.model, trained.optimizer)


# --- eight bits ---


def _save_eight_bits(world: World, config: RunConfig) -> dict[str, torch.Tensor]:
    trained = make(config, world, steps=2)
    Checkpointer(Path(config.output_dir), 2, world).save(2, trained.model, trained.optimizer)
    return rows_and_state(trained)


def _load_eight_bits(world: World, config: RunConfig) -> dict[str, torch.Tensor]:
    fresh = make(config, world)
    loader = Checkpointer(Path(config.output_dir), 2, world)
    loader.load(Path(config.output_dir, "checkpoints", "step-00000002"), fresh.model, fresh.optimizer)
    return rows_and_state(fresh)


def rows_and_state(trained: Trained) -> dict[str, torch.Tensor]:
    """Everything that this process stores."""
    found = {}
    for name, param in trainable(trained.model).items():
        found[name] = local_rows(param)[0].clone()
        state = trained.optimizer.state[param]
        found |= {f"{name}.{key}": torch.as_tensor(value).clone() for key, value in state.items()}
    return found


def test_the_state_of_eight_bits_comes_back_to_the_same_number_of_ranks_only(
    full_config: RunConfig, alone: World, spawn: Callable[..., list[Any]]
) -> None:
    pytest.importorskip("bitsandbytes")
    training = full_config.training.model_copy(update={"optimizer": "AdamW8bit"})
    config = full_config.model_copy(update={"training": training})
    for saved, loaded in zip(spawn(2, _save_eight_bits, config), spawn(2, _load_eight_bits, config), strict=True):
        assert_same(loaded, saved)
    with pytest.raises(WorldSizeError, match=r"was saved by 2 processes.*start 2 processes, or remove that checkpoint"):
        _load_eight_bits(alone, config)


# --- complete or absent ---


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


DAMAGES: dict[str, Callable[[Path], object]] = {
    "killed before the manifest": lambda path: (path / "manifest.json").unlink(),
    "a manifest that is cut": lambda path: cut(path / "manifest.json"),
    "an empty manifest": lambda path: (path / "manifest.json").write_text("{}"),
    "tensors that are cut": lambda path: cut(path / "__0_0.distcp"),
    "tensors that are gone": lambda path: (path / "__0_0.distcp").unlink(),
    "no table of tensors": lambda path: (path / ".metadata").unlink(),
    "no random state": lambda path: (path / "random-0.pt").unlink(),
    "killed before the name": lambda path: path.rename(path.with_name(f".partial-{path.name}")),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_a_checkpoint_that_is_not_whole_does_not_exist(case: str, config: RunConfig, alone: World) -> None:
    trained = make(config, alone, steps=1)
    folder = Path(config.output_dir)
    saver = Checkpointer(folder, 2, alone)
    whole, damaged = (folder / saver.save(step, trained.model, trained.optimizer).path for step in (1, 2))
    assert is_complete(damaged)
    DAMAGES[case](damaged)
    assert not is_complete(damaged)
    assert saver.latest() == whole
    assert list((folder / "checkpoints").iterdir()) == [whole], "what is left of it is removed"


def test_without_checkpoints_there_is_no_latest(config: RunConfig, alone: World) -> None:
    assert Checkpointer(Path(config.output_dir), 2, alone).latest() is None


def test_only_the_newest_are_kept(config: RunConfig, alone: World) -> None:
    trained = make(config, alone, steps=1)
    saver = Checkpointer(Path(config.output_dir), 2, alone)
    for step in (9, 10, 100):
        saver.save(step, trained.model, trained.optimizer)
    names = sorted(path.name for path in Path(config.output_dir, "checkpoints").iterdir())
    assert names == ["step-00000010", "step-00000100"]


def test_a_save_goes_over_what_a_killed_one_left(config: RunConfig, alone: World) -> None:
    trained = make(config, alone, steps=1)
    rest = Path(config.output_dir, "checkpoints", ".partial-step-00000001")
    rest.mkdir(parents=True)
    (rest / "rubbish").touch()
    saver = Checkpointer(Path(config.output_dir), 2, alone)
    status = saver.save(1, trained.model, trained.optimizer)
    manifest = json.loads((Path(config.output_dir) / status.path / "manifest.json").read_text())
    assert "rubbish" not in manifest["files"]
    assert not rest.exists()


# --- errors of the disk ---

DISK_ERRORS = {
    "no rights": (errno.EACCES, True),
    "read-only": (errno.EROFS, True),
    "full": (errno.ENOSPC, True),
    "over quota": (errno.EDQUOT, True),
    "a broken device": (errno.EIO, False),
    "a file that is missing": (errno.ENOENT, False),
}


@pytest.mark.parametrize("case", DISK_ERRORS)
def test_what_the_user_can_change_about_the_disk_is_a_user_error(case: str) -> None:
    number, theirs = DISK_ERRORS[case]
    found = as_output_error(OSError(number, "the reason", "/out/file"), Path("/out"))
    assert (found is not None) == theirs
    if found:
        full = number in (errno.ENOSPC, errno.EDQUOT)
        assert found.exit_code == (ExitCode.STORAGE_FULL if full else ExitCode.OUTPUT_NOT_WRITABLE)
        assert str(found).startswith("/out/file cannot be written: the reason; ")
        assert ("checkpoint.keep" in str(found)) == full


RUST = {
    "full": ("Error while serializing: I/O error: No space left on device (os error 28)", ExitCode.STORAGE_FULL),
    "read-only": (
        "Error while serializing: Read-only file system (os error 30)",
        ExitCode.OUTPUT_NOT_WRITABLE,
    ),
    "missing": ("No such file or directory (os error 2)", None),
}


@pytest.mark.parametrize("case", RUST)
def test_the_disks_errors_come_out_of_safetensors_words(case: str) -> None:
    """Its SafetensorError is no OSError."""
    words, code = RUST[case]
    found = as_output_error(SafetensorError(words), Path("/out"))
    assert (found.exit_code if found else None) == code
    if found:
        assert str(found).startswith("/out cannot be written: ")


def test_other_errors_are_not_the_disks() -> None:
    assert as_output_error(ValueError("x"), Path("/out")) is None


def test_the_cause_comes_out_of_torchs_checkpoint_exception() -> None:
    cause = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(OSError, match="No space left"), checkpoint._plain_failures():
        raise CheckpointException("write", {1: (cause, traceback.StackSummary())})
