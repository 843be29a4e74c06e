"""The optimizer and the learning-rate schedule, both plain functions of the configuration."""

import math
from collections.abc import Iterable

import torch

from kubetune_contract.config import TrainingConfig


def make_optimizer(params: Iterable[torch.nn.Parameter], training: TrainingConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019) over the trainable parameters: fused on CUDA, foreach elsewhere."""
    trainable = list(params)
    on_cuda = trainable[0].device.type == "cuda"
    return torch.optim.AdamW(
        trainable,
        lr=training.learning_rate,
        betas=(training.beta1, training.beta2),
        eps=training.epsilon,
        weight_decay=training.weight_decay,
        fused=on_cuda,
        foreach=not on_cuda,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Every parameter group follows the schedule."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def effective_warmup(total: int, training: TrainingConfig) -> tuple[int, str | None]:
    """Warm-up steps of a run of `total` steps, and what to tell the user where they differ from the configuration."""
    if total >= 2 * training.warmup_steps:
        return training.warmup_steps, None
    steps = total // 2
    return steps, f"training.warmup_steps is {steps} instead of {training.warmup_steps}: the run has only {total} steps"


def learning_rate(step: int, total: int, training: TrainingConfig) -> float:
    """The rate of a step, counted from 0.

    Warm-up is linear and ends at the full rate with its last step; no step is lost to a rate of 0. After it the course
    is that of transformers' get_cosine_, get_linear_ and get_constant_schedule_with_warmup.
    """
    warmup, _ = effective_warmup(total, training)
    if step < warmup:
        return training.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    match training.schedule:
        case "Cosine":
            return training.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))
        case "Linear":
            return training.learning_rate * (1 - progress)
        case "Constant":
            return training.learning_rate
