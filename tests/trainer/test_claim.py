"""One folder is for one run."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kubetune_contract.exit_codes import ExitCode
from kubetune_trainer import claim as claims
from kubetune_trainer.checkpoint import write_file
from kubetune_trainer.claim import OtherRunError, claim, differences, digest_files
from kubetune_trainer.failures import OutputError

RUN = {"method": "LoRA", "training": {"seed": 1, "epochs": 2}}
OTHER = {"method": "LoRA", "training": {"seed": 2, "epochs": 3}}


def finish(folder: Path) -> None:
    write_file(folder / "result.json", b"{}")


def complete_checkpoint(folder: Path) -> None:
    path = folder / "checkpoints" / "step-00000001"
    path.mkdir(parents=True)
    (path / "manifest.json").write_text(json.dumps({"step": 1, "world_size": 1, "files": {}}))


def test_the_first_start_fixes_values_for_all_later_ones(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "out"
    assert claim(folder, RUN, lambda: {"started": "monday"}) == {"started": "monday"}
    complete_checkpoint(folder)
    assert claim(folder, RUN, lambda: {"started": "tuesday"}) == {"started": "monday"}


@pytest.mark.parametrize("reach", [finish, complete_checkpoint])
def test_a_folder_with_results_of_other_settings_is_refused(reach: Callable[[Path], None], tmp_path: Path) -> None:
    claim(tmp_path, RUN, lambda: {})
    reach(tmp_path)
    with pytest.raises(OtherRunError) as caught:
        claim(tmp_path, OTHER, lambda: {})
    assert caught.value.exit_code == ExitCode.INVALID_CONFIG
    assert str(caught.value) == (
        f"{tmp_path} belongs to a run with other settings: training.epochs was 2, now 3; training.seed was 1, now 2. "
        "Choose another output_dir, take the settings back, or remove that folder"
    )


def test_a_folder_in_which_nothing_was_reached_is_taken_over(tmp_path: Path) -> None:
    claim(tmp_path, RUN, lambda: {"started": "monday"})
    for name in ("metrics.jsonl", "samples.json"):
        (tmp_path / name).write_text("of the other run")
    assert claim(tmp_path, OTHER, lambda: {"started": "tuesday"}) == {"started": "tuesday"}
    assert not (tmp_path / "metrics.jsonl").exists()
    assert not (tmp_path / "samples.json").exists()


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="file/out cannot be written: Not a directory"):
        claim(tmp_path / "file" / "out", RUN, lambda: {})


DIFFERENCES: dict[str, tuple[Any, Any, list[str]]] = {
    "none": ({"a": {"b": [1]}}, {"a": {"b": [1]}}, []),
    "a leaf": ({"a": {"b": 1}}, {"a": {"b": 2}}, ["a.b was 1, now 2"]),
    "a list as a whole": ({"a": [1, 2]}, {"a": [2]}, ["a was [1, 2], now [2]"]),
    "a key that is new": ({}, {"a": 1}, ["a was None, now 1"]),
    "a group that is gone": ({"a": {"b": 1}}, {"a": None}, ["a was {'b': 1}, now None"]),
}


@pytest.mark.parametrize("case", DIFFERENCES)
def test_differences(case: str) -> None:
    old, new, expected = DIFFERENCES[case]
    assert differences(old, new) == expected


def test_a_digest_tells_models_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "_DIGEST_EDGE", 4)
    (tmp_path / "a").write_bytes(b"head-middle-tail")
    (tmp_path / "b").write_bytes(b"b")
    first = digest_files(tmp_path, ["a", "b"])
    assert digest_files(tmp_path, ["b", "a"]) == first
    seen = {first}
    for content in (b"Head-middle-tail", b"head-middle-taiL", b"head-middle--tail", b""):
        (tmp_path / "a").write_bytes(content)
        seen.add(digest_files(tmp_path, ["a", "b"]))
    assert len(seen) == 5


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    write_file(tmp_path / "x", b"one")
    write_file(tmp_path / "x", b"two")
    assert (tmp_path / "x").read_bytes() == b"two"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
