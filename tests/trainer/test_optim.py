"""The optimizer and the schedule; transformers' schedules are the oracle after warm-up."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kubetune_contract.config import TrainingConfig
from kubetune_trainer.optim import effective_warmup, learning_rate, make_optimizer, set_learning_rate


def rates(total: int, **options: Any) -> list[float]:
    training = TrainingConfig(learning_rate=1.0, **options)
    return [learning_rate(step, total, training) for step in range(total)]


COURSES: dict[str, tuple[int, dict[str, Any], list[float]]] = {
    "warm-up reaches the rate with its last step": (
        6,
        {"schedule": "Constant", "warmup_steps": 3},
        [1 / 3, 2 / 3, 1, 1, 1, 1],
    ),
    "a line down to nearly 0": (4, {"schedule": "Linear", "warmup_steps": 0}, [1, 0.75, 0.5, 0.25]),
    "half a cosine": (4, {"schedule": "Cosine", "warmup_steps": 0}, [1, 0.853553, 0.5, 0.146447]),
    "a run shorter than twice the warm-up warms up for half its steps": (
        4,
        {"schedule": "Linear", "warmup_steps": 100},
        [0.5, 1, 1, 0.5],
    ),
    "a single step has the full rate": (1, {"schedule": "Cosine", "warmup_steps": 100}, [1]),
}


@pytest.mark.parametrize("case", COURSES)
def test_the_course_of_the_learning_rate(case: str) -> None:
    total, options, expected = COURSES[case]
    assert rates(total, **options) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("schedule", ["Cosine", "Linear", "Constant"])
def test_after_warm_up_the_course_is_transformers(schedule: str) -> None:
    from transformers import get_scheduler

    names = {"Constant": "constant_with_warmup"}
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    oracle = get_scheduler(names.get(schedule, schedule.lower()), optimizer, num_warmup_steps=4, num_training_steps=20)
    theirs = []
    for _ in range(20):
        theirs.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        oracle.step()
    # Both are evaluated in float64: the last bits of cos and of the division may differ.
    assert rates(20, schedule=schedule, warmup_steps=4)[4:] == pytest.approx(theirs[4:], abs=1e-12)


@given(
    total=st.integers(1, 500),
    warmup=st.integers(0, 400),
    schedule=st.sampled_from(["Cosine", "Linear", "Constant"]),
)
def test_no_step_is_lost_to_a_rate_of_zero(total: int, warmup: int, schedule: str) -> None:
    course = rates(total, warmup_steps=warmup, schedule=schedule)
    assert all(0 < rate <= 1 for rate in course)
    assert max(course) == 1
    peak = course.index(1)
    assert course[:peak] == sorted(course[:peak])
    assert course[peak:] == sorted(course[peak:], reverse=True)


def test_a_shortened_warm_up_is_told() -> None:
    assert effective_warmup(200, TrainingConfig(warmup_steps=100)) == (100, None)
    assert effective_warmup(30, TrainingConfig(warmup_steps=100)) == (
        15,
        "training.warmup_steps is 15 instead of 100: the run has only 30 steps",
    )


def test_the_optimizer_is_adamw_with_the_configured_values() -> None:
    training = TrainingConfig(learning_rate=1e-3, weight_decay=0.1, beta1=0.8, beta2=0.9, epsilon=1e-6)
    optimizer = make_optimizer([torch.nn.Parameter(torch.ones(3))], training)
    (group,) = optimizer.param_groups
    assert isinstance(optimizer, torch.optim.AdamW)
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (1e-3, (0.8, 0.9), 1e-6, 0.1)
    assert group["foreach"], "one call for all tensors on CPU"


def test_one_step_follows_the_paper() -> None:
    """Loshchilov and Hutter 2019, algorithm 2, first step: m/(1-b1) = g, sqrt(v/(1-b2)) = |g|."""
    param = torch.nn.Parameter(torch.tensor([2.0, -3.0]))
    optimizer = make_optimizer([param], TrainingConfig(learning_rate=0.5, weight_decay=0.1))
    set_learning_rate(optimizer, 0.25)
    param.grad = torch.tensor([4.0, -0.5])
    optimizer.step()
    # float32 rounding of a few operations on numbers near 2
    torch.testing.assert_close(
        param.detach(), torch.tensor([2 * (1 - 0.025) - 0.25, -3 * (1 - 0.025) + 0.25]), rtol=1e-6, atol=0
    )
