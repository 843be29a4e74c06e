"""The optimizer and the schedule; transformers' schedules are the oracle after warm-up."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kubetune_contract.config import TrainingConfig
from kubetune_contract.errors import ConfigError
from kubetune_trainer.optim import (
    InBackward,
    check_optimizer,
    effective_warmup,
    learning_rate,
    make_optimizer,
    set_learning_rate,
)


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


# --- eight bits ---


def run_steps(training: TrainingConfig, steps: int = 3) -> tuple[list[torch.Tensor], torch.optim.Optimizer]:
    params = [torch.nn.Parameter(torch.linspace(-1, 1, 8192).view(64, 128)), torch.nn.Parameter(torch.ones(7))]
    optimizer = make_optimizer(params, training)
    for step in range(steps):
        set_learning_rate(optimizer, 0.01)
        sum(((param * (step + 1)) ** 2).sum() for param in params).backward()  # type: ignore[union-attr]
        optimizer.step()
        optimizer.zero_grad()
        assert all(param.grad is None for param in params)
    return [param.detach() for param in params], optimizer


def test_eight_bit_state_follows_adamw_and_takes_a_quarter() -> None:
    """bitsandbytes runs on a CPU too, slowly: the run refuses it there, the arithmetic can be tested."""
    pytest.importorskip("bitsandbytes")
    plain, _ = run_steps(TrainingConfig(weight_decay=0.1))
    found, optimizer = run_steps(TrainingConfig(weight_decay=0.1, optimizer="AdamW8bit"))
    for one, other in zip(found, plain, strict=True):
        # A step is at most the rate, 0.01; the state's 8 bits leave some per cent of three of them.
        torch.testing.assert_close(one, other, rtol=0, atol=3e-3)
    large, small = optimizer.state.values()
    assert large["state1"].dtype == torch.uint8
    assert small["state1"].dtype == torch.float32
    assert large["step"] == 3


REFUSED = {
    "on a CPU": ("cpu", True, "training.optimizer AdamW8bit runs on GPUs only, and this is a cpu: set it to AdamW"),
    "without the package": ("cuda", False, "needs the package bitsandbytes: install kubetune"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_eight_bits_that_cannot_be_are_refused(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    device, installed, words = REFUSED[case]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name if installed else None)
    check_optimizer(TrainingConfig(), torch.device(device))
    with pytest.raises(ConfigError, match=words):
        check_optimizer(TrainingConfig(optimizer="AdamW8bit"), torch.device(device))


# --- in the backward pass ---

IN_BACKWARD = {"optimizer_in_backward": True, "gradient_accumulation_steps": 1, "max_gradient_norm": 0}


def train_chain(**options: Any) -> tuple[list[torch.Tensor], int, list[float]]:
    """Five layers, three steps. Returns the weights, the most gradients held at once, and the gradients' norms."""
    torch.manual_seed(0)
    layers = [torch.nn.Linear(6, 6) for _ in range(5)]
    model = torch.nn.Sequential(*layers)
    params = list(model.parameters())
    optimizer = make_optimizer(params, TrainingConfig(**({"max_gradient_norm": 0} | options)))
    most, norms = 0, []

    def count(*_: Any) -> None:
        nonlocal most
        most = max(most, sum(param.grad is not None for param in params))

    for param in params:
        param.register_post_accumulate_grad_hook(count)
    for _ in range(3):
        set_learning_rate(optimizer, 0.01)
        model(torch.ones(2, 6)).square().sum().backward()
        held = [param.grad for param in params if param.grad is not None]
        norms.append(
            optimizer.take_norm() if isinstance(optimizer, InBackward) else torch.nn.utils.get_total_norm(held).item()
        )
        optimizer.step()
        optimizer.zero_grad()
    return [param.detach() for param in params], most, norms


@pytest.mark.parametrize("optimizer", ["AdamW", "AdamW8bit"])
def test_updates_in_the_backward_pass_are_the_same_and_hold_no_gradient(optimizer: str) -> None:
    if optimizer != "AdamW":
        pytest.importorskip("bitsandbytes")
    expected, at_once, norms = train_chain(optimizer=optimizer)
    found, never, found_norms = train_chain(optimizer=optimizer, **IN_BACKWARD)
    assert (at_once, never) == (10, 0)
    assert found_norms == pytest.approx(norms, rel=1e-6)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
