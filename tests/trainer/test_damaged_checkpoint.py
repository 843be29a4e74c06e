"""A checkpoint that has changed on the disk since it was written: the one before it is taken, on every rank."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.trainer.test_checkpoint import make

from kubetune_contract.config import RunConfig
from kubetune_trainer.checkpoint import Checkpointer
from kubetune_trainer.distributed import World


@pytest.fixture
def config(tiny: Path, run_config: Callable[..., RunConfig], tmp_path: Path) -> RunConfig:
    return run_config(tiny, training={"precision": "FP32"}, output_dir=str(tmp_path / "out"))


def flip(file: Path, place: int) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


CHANGES = {
    "the first byte of the tensors": ("__0_0.distcp", 0),
    "a byte among the tensors": ("__0_0.distcp", 1500),
    "the last byte of the tensors": ("__0_0.distcp", -1),
    "the table of tensors": (".metadata", 40),
    "the random state": ("random-0.pt", 900),
    "the manifest's first key": ("manifest.json", 4),
    "a digit of the manifest": ("manifest.json", 11),
    "the end of the manifest": ("manifest.json", -4),
}


@pytest.mark.parametrize("case", CHANGES)
def test_a_checkpoint_in_which_a_bit_has_changed_is_not_resumed_from(
    case: str, config: RunConfig, alone: World
) -> None:
    trained = make(config, alone, steps=1)
    folder = Path(config.output_dir)
    saver = Checkpointer(folder, 2, alone)
    whole, damaged = (folder / saver.save(step, trained.model, trained.optimizer).path for step in (1, 2))
    assert saver.latest() == damaged
    name, place = CHANGES[case]
    flip(damaged / name, place)
    assert saver.latest() == whole
    assert list((folder / "checkpoints").iterdir()) == [whole], "the damaged one is removed"


def _save_twice_and_damage(world: World, config: RunConfig) -> tuple[str | None, str | None]:
    trained = make(config, world, steps=1)
    saver = Checkpointer(Path(config.output_dir), 2, world)
    for step in (1, 2):
        saver.save(step, trained.model, trained.optimizer)
    before = saver.latest()
    if world.is_main:
        flip(Path(config.output_dir, "checkpoints", "step-00000002", "__1_0.distcp"), 1500)
    after = saver.latest()
    return before and before.name, after and after.name


def test_every_rank_finds_the_one_before_where_what_one_of_them_has_written_has_changed(
    config: RunConfig, spawn: Callable[..., list[Any]]
) -> None:
    assert spawn(2, _save_twice_and_damage, config) == [("step-00000002", "step-00000001")] * 2


def test_a_checkpoint_of_a_version_without_checksums_is_resumed_from(config: RunConfig, alone: World) -> None:
    trained = make(config, alone, steps=1)
    folder = Path(config.output_dir)
    saver = Checkpointer(folder, 2, alone)
    path = folder / saver.save(1, trained.model, trained.optimizer).path
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["checksum"], manifest["checksums"]
    (path / "manifest.json").write_text(json.dumps(manifest))
    assert saver.latest() == path


def test_a_held_out_loss_that_comes_later_leaves_the_checkpoint_unchanged(config: RunConfig, alone: World) -> None:
    trained = make(config, alone, steps=1)
    saver = Checkpointer(Path(config.output_dir), 2, alone)
    saved = saver.save(1, trained.model, trained.optimizer)
    saver.measured(1, 0.5)
    assert saver.latest() == Path(config.output_dir) / saved.path
    assert saver.best() == (Path(config.output_dir) / saved.path, 0.5)
