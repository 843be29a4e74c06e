"""Staging as its container runs it: a process with a source, a claim and a termination log."""

import errno
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from kubetune_contract.exit_codes import ExitCode
from kubetune_contract.paths import COMPLETE_FILE, TERMINATION_LIMIT
from kubetune_contract.staging import StageSource
from kubetune_trainer.stage import LOCK_FILE, _words, main
from kubetune_trainer.transfer import StorageError, storage

from .stage_claim import Claim, flip


def test_a_whole_model_is_described_and_gets_its_manifest(claim: Claim, llama_folder: Callable[..., Path]) -> None:
    folder = llama_folder(shards=2).rename(claim.root / "tiny")
    message = claim.run("tiny")
    files = [file for file in folder.iterdir() if file.name[0] != "."]
    total = sum(file.stat().st_size for file in files)
    assert (claim.code, message.reason) == (0, "Done")
    assert message.message == f"tiny is ready: 44,880 parameters, {total / 1e9:.2f} GB"
    assert message.staged is not None
    assert message.staged.to_dict() == {
        "path": "tiny",
        "architecture": "LlamaForCausalLM",
        "parameters": 44880,
        "bytes": total,
        "sizes": {
            "vocabSize": 97,
            "hiddenSize": 48,
            "intermediateSize": 80,
            "numHiddenLayers": 2,
            "numAttentionHeads": 6,
            "numKeyValueHeads": 2,
            "headDim": 8,
            "tieWordEmbeddings": False,
        },
    }
    manifest = claim.manifest("tiny")
    assert manifest.staged == message.staged
    assert {file.path: file.sha256 for file in manifest.files} == {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files
    }
    assert sorted(file.name for file in folder.glob(".*")) == [COMPLETE_FILE, LOCK_FILE]


def access_times(folder: Path) -> dict[str, int]:
    return {file.name: file.stat().st_atime_ns for file in folder.glob("*.safetensors")}


def test_a_model_that_was_checked_is_not_read_again(claim: Claim, tiny: Path) -> None:
    folder = tiny.rename(claim.root / "tiny")
    first = claim.stage("tiny")
    manifest = (folder / COMPLETE_FILE).stat()
    for file in folder.glob("*.safetensors"):  # access times move only from before the last change, under relatime
        os.utime(file, ns=(0, file.stat().st_mtime_ns))
    before = access_times(folder)
    assert claim.stage("tiny") == first
    assert (folder / COMPLETE_FILE).stat().st_mtime_ns == manifest.st_mtime_ns
    assert access_times(folder) == before
    assert "checked" not in claim.output


def replace_by_older(file: Path) -> None:
    """Another file of the same size and an older time, as rsync -a would put there."""
    flip(file, keep_time=False)
    os.utime(file, ns=(0, 10**18))


CHANGES: dict[str, Callable[[Path], object]] = {
    "a file was replaced by one of the same size and an older time": lambda f: replace_by_older(
        f / "model.safetensors"
    ),
    "a file was written again": lambda f: (f / "config.json").write_bytes((f / "config.json").read_bytes()),
    "a file of the manifest is gone": lambda f: (f / "tokenizer_config.json").unlink(),
    "the manifest is damaged": lambda f: (f / COMPLETE_FILE).write_text('{"version": 1'),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_changed_model_is_checked_again(change: Callable[[Path], object], claim: Claim, tiny: Path) -> None:
    folder = tiny.rename(claim.root / "tiny")
    claim.stage("tiny")
    time.sleep(0.01)  # one tick of the file system's clock
    change(folder)
    assert claim.stage("tiny").reason == "Done"
    assert "checked model.safetensors" in claim.output
    assert {file.path: file.sha256 for file in claim.manifest("tiny").files} == {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir() if file.name[0] != "."
    }


def test_a_renamed_folder_is_checked_again(claim: Claim, tiny: Path) -> None:
    folder = tiny.rename(claim.root / "tiny")
    claim.stage("tiny")
    folder.rename(claim.root / "other")
    message = claim.stage("other")
    assert message.staged is not None
    assert message.staged.path == claim.manifest("other").staged.path == "other"


def gpt2(folder: Path) -> None:
    (folder / "config.json").write_text('{"architectures": ["GPT2LMHeadModel"]}')


BAD: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "a missing folder": (
        "tinny",
        lambda folder: None,
        "the folder {root}/tinny does not exist: {root} has no tinny; did you mean tiny?",
    ),
    "no Llama": (
        "tiny",
        gpt2,
        "config.json: the architecture is GPT2LMHeadModel; supported is LlamaForCausalLM, the text models of Llama 2, "
        "3, 3.1, 3.2, 3.3 and every model of the same form",
    ),
    "a truncated file": (
        "tiny",
        lambda folder: os.truncate(folder / "model.safetensors", 100_000),
        "{root}/tiny/model.safetensors is truncated: its header promises 179,520 bytes of weights, 97,880 are there; "
        "copy or download it again",
    ),
    "no tokenizer": (
        "tiny",
        lambda folder: (folder / "tokenizer.json").unlink(),
        "{root}/tiny has no tokenizer.json; found: config.json, model.safetensors, tokenizer_config.json; give a "
        "folder in Hugging Face layout: config.json, tokenizer.json and safetensors files; or in "
        "Meta's: params.json, tokenizer.model and consolidated.*.pth",
    ),
}


@pytest.mark.parametrize(("path", "damage", "text"), BAD.values(), ids=BAD.keys())
def test_a_model_that_cannot_be_trained_is_refused_with_the_reason(
    path: str, damage: Callable[[Path], object], text: str, claim: Claim, tiny: Path
) -> None:
    folder = tiny.rename(claim.root / "tiny")
    damage(folder)
    message = claim.stage(path)
    assert (claim.code, message.reason) == (ExitCode.INVALID_MODEL, "InvalidModel")
    assert message.message == text.format(root=claim.root)
    assert message.staged is None
    assert not (folder / COMPLETE_FILE).exists()


def test_a_claim_that_cannot_be_written_is_told_with_the_remedy(claim: Claim, tiny: Path) -> None:
    folder = tiny.rename(claim.root / "tiny")
    folder.chmod(0o555)
    # Root may write everywhere, unless this right is taken from it.
    prefix = ("setpriv", "--bounding-set=-dac_override", "--inh-caps=-dac_override") if os.geteuid() == 0 else ()
    message = claim.run("tiny", prefix=prefix)
    assert (claim.code, message.reason) == (ExitCode.OUTPUT_NOT_WRITABLE, "OutputNotWritable")
    assert message.message == (
        f"{folder}/.complete.lock cannot be written: Permission denied; make the models claim writable for user "
        f"{os.geteuid()}: staging writes downloads and .complete"
    )
    folder.chmod(0o755)


STORAGE = {
    "full": (errno.ENOSPC, "enlarge the models claim, or delete models that are no longer used"),
    "over the quota": (errno.EDQUOT, "enlarge the models claim, or delete models that are no longer used"),
    "mounted read-only": (errno.EROFS, f"make the models claim writable for user {os.getuid()}: staging writes"),
}


@pytest.mark.parametrize(("number", "remedy"), STORAGE.values(), ids=STORAGE.keys())
def test_errors_of_the_file_system_have_a_remedy(number: int, remedy: str) -> None:
    with pytest.raises(StorageError, match=remedy), storage(Path("/models/x"), _words(StageSource(path="x"))):
        raise OSError(number, os.strerror(number), "/models/x/file")


def test_other_errors_of_the_file_system_are_not_blamed_on_the_user() -> None:
    with (
        pytest.raises(OSError, match="Input/output error") as caught,
        storage(Path("/models/x"), _words(StageSource(path="x"))),
    ):
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    assert not isinstance(caught.value, StorageError)


def test_a_source_that_is_none_is_a_config_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--source", '{"revisoin": "x"}', "--root", str(tmp_path)]) == ExitCode.INVALID_CONFIG
    assert capsys.readouterr().err == "path: a value is required; revisoin: unknown field; did you mean revision?\n"


def test_a_crash_is_told_and_counts_as_a_crash(claim: Claim, tiny: Path) -> None:
    folder = tiny.rename(claim.root / "tiny")
    (folder / COMPLETE_FILE).mkdir()
    message = claim.stage("tiny")
    assert (claim.code, message.reason) == (ExitCode.CRASH, "Crash")
    assert message.message.startswith("IsADirectoryError: ")
    assert "Traceback" in claim.output


def test_a_killed_staging_leaves_no_manifest_and_the_next_one_works(claim: Claim, tiny: Path) -> None:
    folder = tiny.rename(claim.root / "tiny")
    (folder / f"{COMPLETE_FILE}.partial").write_text('{"version": 1, "mo')
    (folder / LOCK_FILE).touch()
    assert claim.stage("tiny").reason == "Done"
    assert sorted(file.name for file in folder.glob(".*")) == [COMPLETE_FILE, LOCK_FILE]


def test_a_long_message_fits_the_kubelets_limit(claim: Claim, tiny: Path) -> None:
    folder = tiny.rename(claim.root / "tiny")
    (folder / "config.json").write_text(json.dumps({"architectures": ["X" * 10_000]}))
    claim.stage("tiny")
    assert claim.log.stat().st_size <= TERMINATION_LIMIT


def test_a_laptop_has_no_termination_log(claim: Claim, tiny: Path) -> None:
    shutil.move(tiny, claim.root / "tiny")
    claim.log.unlink()
    with pytest.raises(FileNotFoundError, match="termination-log"):
        claim.stage("tiny")
    assert claim.code == 0


def test_a_full_check_that_finds_nothing_is_written_down(claim: Claim, tiny: Path) -> None:
    folder = tiny.rename(claim.root / "tiny")
    claim.stage("tiny")
    os.utime(folder / COMPLETE_FILE, (0, 0))
    assert claim.stage("tiny").reason == "Done"
    assert time.time() - (folder / COMPLETE_FILE).stat().st_mtime < 60


def test_damage_of_files_that_somebody_put_there_is_told(claim: Claim, tiny: Path) -> None:
    folder = tiny.rename(claim.root / "tiny")
    claim.stage("tiny")
    flip(folder / "model.safetensors", keep_time=True)
    message = claim.stage("tiny", trusted_seconds=0)
    assert (claim.code, message.reason) == (ExitCode.INVALID_MODEL, "InvalidModel")
    assert message.message.startswith(f"{folder}/model.safetensors is damaged: its content has changed since 20")
    assert message.message.endswith("copy it again, or `touch` it if the change is meant")
