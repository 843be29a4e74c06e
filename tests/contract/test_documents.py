"""What crosses the wall: exit codes, progress, the termination message."""

import json
from datetime import UTC, datetime
from pathlib import PurePosixPath

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from kubetune_contract import paths
from kubetune_contract.exit_codes import RETRYABLE, USER_ERRORS, ExitCode, JobError, reason_of
from kubetune_contract.progress import CheckpointStatus, Progress, ProgressReport, Result, TerminationMessage
from kubetune_contract.staging import StagedModel

USER = {
    "INVALID_CONFIG",
    "INVALID_DATA",
    "INVALID_MODEL",
    "DOES_NOT_FIT",
    "OUTPUT_NOT_WRITABLE",
    "SOURCE_DENIED",
    "NON_FINITE_LOSS",
    "OUT_OF_MEMORY",
    "STORAGE_FULL",
}
RETRY = {"SAVED", "PEER_LOST", "SOURCE_UNAVAILABLE"}


@pytest.mark.parametrize("code", ExitCode)
def test_every_code_lies_in_the_range_of_its_meaning(code: ExitCode) -> None:
    assert (code in USER_ERRORS) == (code.name in USER)
    assert (code in RETRYABLE) == (code.name in RETRY)


def test_the_ranges_avoid_the_codes_of_shells_and_signals() -> None:
    taken = {0, 1, 2, 126, 127, *range(128, 160)}
    assert taken.isdisjoint(USER_ERRORS)
    assert taken.isdisjoint(RETRYABLE)
    assert set(USER_ERRORS).isdisjoint(RETRYABLE)


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (0, "Done"),
        (65, "InvalidData"),
        (68, "OutputNotWritable"),
        (80, "Saved"),
        (1, "Crash"),
        (137, "Crash"),
        (77, "Crash"),
    ],
)
def test_a_code_has_a_reason(code: int, reason: str) -> None:
    assert reason_of(code) == reason
    TerminationMessage(reason=reason_of(code), message="")


def test_an_error_without_a_code_is_a_crash() -> None:
    assert JobError("?").exit_code == ExitCode.CRASH


def test_progress_crosses_in_camel_case_without_gaps() -> None:
    report = ProgressReport(
        progress=Progress(step=3, total_steps=10, epoch=0.5, percentage=30, loss=1.5),
        checkpoint=CheckpointStatus(step=2, path="checkpoints/step-00000002", time=datetime(2025, 1, 2, tzinfo=UTC)),
    )
    assert json.loads(report.to_json()) == {
        "progress": {"step": 3, "totalSteps": 10, "epoch": 0.5, "percentage": 30, "loss": 1.5},
        "checkpoint": {"step": 2, "path": "checkpoints/step-00000002", "time": "2025-01-02T00:00:00Z"},
    }
    assert ProgressReport.model_validate_json(report.to_json()) == report


@pytest.mark.parametrize("field", [{"step": -1}, {"percentage": 101}, {"loss": float("nan")}, {"unknown": 1}])
def test_nonsense_is_no_progress(field: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        Progress.model_validate({"step": 1, "totalSteps": 2, "epoch": 0, "percentage": 50} | field)


def test_a_short_message_is_left_alone() -> None:
    message = TerminationMessage(reason="Done", message="trained", result=Result(steps=1, tokens=2))
    assert message.fitted() is message


def test_a_log_gives_way_to_the_message_and_keeps_its_end() -> None:
    log = "\n".join(f"line {number}" for number in range(1000))
    fitted = TerminationMessage(reason="Crash", message="boom", log=log).fitted()
    assert fitted.message == "boom"
    assert fitted.log is not None
    assert log.endswith("\n" + fitted.log)
    assert len(fitted.log) > 2000
    assert TerminationMessage(reason="Crash", message="x" * 5000, log=log).fitted().log is None


@given(st.text(max_size=6000), st.none() | st.text(max_size=6000))
def test_a_message_always_fits_the_kubelet(text: str, log: str | None) -> None:
    message = TerminationMessage(
        reason="InvalidModel",
        message=text,
        log=log,
        staged=StagedModel(path="p" * 200, architecture="LlamaForCausalLM", parameters=1, bytes=1),
        result=Result(adapter_path="adapter", steps=1, tokens=2),
    )
    fitted = message.fitted()
    assert len(fitted.to_json().encode()) <= paths.TERMINATION_LIMIT
    assert TerminationMessage.model_validate_json(fitted.to_json()) == fitted
    assert fitted.message == text or text.startswith(fitted.message.removesuffix("..."))


def test_paths_in_containers_do_not_lie_in_each_other() -> None:
    mounts = [
        PurePosixPath(mount)
        for mount in (paths.MODELS_MOUNT, paths.OUTPUT_MOUNT, paths.CONFIG_MOUNT, paths.TOKEN_MOUNT)
    ]
    assert not any(one != other and one.is_relative_to(other) for one in mounts for other in mounts)
