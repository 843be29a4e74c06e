"""The progress line of a worker's log, written and read back."""

from typing import Any

import pytest

from kubetune_contract.progress import Progress
from kubetune_contract.progress_line import loss_in_line, progress_line

LINES: dict[str, tuple[dict[str, Any], str]] = {
    "half way": (
        {
            "step": 5,
            "total_steps": 10,
            "percentage": 50,
            "loss": 1.23456,
            "tokens_per_second": 980.4,
            "label_tokens_per_second": 310.2,
            "estimated_remaining_seconds": 12,
        },
        "[############............]  50%  step 5/10  loss 1.2346  980 tok/s (310 labels)  ETA 0:12",
    ),
    "hours to go": (
        {
            "step": 1,
            "total_steps": 999,
            "percentage": 0,
            "loss": 11,
            "tokens_per_second": 3,
            "label_tokens_per_second": 1,
            "estimated_remaining_seconds": 7325,
        },
        "[........................]   0%  step 1/999  loss 11.0000  3 tok/s (1 labels)  ETA 2:02:05",
    ),
    "done": (
        {
            "step": 9,
            "total_steps": 9,
            "percentage": 100,
            "loss": 0,
            "tokens_per_second": 1,
            "label_tokens_per_second": 1,
            "estimated_remaining_seconds": 0,
        },
        "[########################] 100%  step 9/9  loss 0.0000  1 tok/s (1 labels)  ETA 0:00",
    ),
}


@pytest.mark.parametrize("case", LINES)
def test_the_progress_line(case: str) -> None:
    values, expected = LINES[case]
    assert progress_line(Progress(epoch=0, **values)) == expected


@pytest.mark.parametrize("case", LINES)
def test_step_and_loss_are_read_back_to_the_written_digits(case: str) -> None:
    values, line = LINES[case]
    assert loss_in_line(line) == (values["step"], pytest.approx(values["loss"], abs=5e-5))


OTHERS = {
    "a line of something else": "validation loss after step 3: 1.2345",
    "a line that was cut": "[####....................]  16%  step 5/3",
    "a loss that is no number": "[####....................]  16%  step 5/30  loss -.  1 tok/s (1 labels)  ETA 0:00",
    "nothing": "",
}


@pytest.mark.parametrize("case", OTHERS)
def test_other_lines_tell_no_loss(case: str) -> None:
    assert loss_in_line(OTHERS[case]) is None
