"""The optimizer and the learning-rate schedule, both plain functions of the configuration."""

import importlib.util
import math
from collections.abc import Callable, Iterable
from typing import Any, Final

import torch
from torch import nn

from kubetune_contract.config import TrainingConfig
from kubetune_contract.errors import ConfigError
from kubetune_trainer.distributed import local_rows, whole_value

_EIGHT_BIT: Final = ("AdamW8bit", "PagedAdamW8bit")
"""bitsandbytes' optimizers, as it names them itself."""


def check_optimizer(training: TrainingConfig, device: torch.device) -> None:
    """Raises ConfigError where the optimizer cannot run; before any weight is loaded."""
    if training.optimizer not in _EIGHT_BIT:
        return
    if device.type != "cuda":
        raise ConfigError(
            [f"training.optimizer {training.optimizer} runs on GPUs only, and this is a {device.type}: set it to AdamW"]
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            [
                f"training.optimizer {training.optimizer} needs the package bitsandbytes: "
                "install kubetune[trainer], or set it to AdamW"
            ]
        )


def make_optimizer(params: Iterable[nn.Parameter], training: TrainingConfig) -> torch.optim.Optimizer:
    """AdamW over the trainable parameters, with its state in 8 bits and at work in the backward pass if so wished."""
    trainable = list(params)
    make = RowsOptimizer if training.optimizer in _EIGHT_BIT else _adamw
    return InBackward(trainable, training, make) if training.optimizer_in_backward else make(trainable, training)


def _adamw(params: list[nn.Parameter], training: TrainingConfig) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter 2019): fused on CUDA, foreach elsewhere."""
    on_cuda = params[0].device.type == "cuda"
    return torch.optim.AdamW(params, **_settings(training), fused=on_cuda, foreach=not on_cuda)


def _settings(training: TrainingConfig) -> dict[str, Any]:
    return {
        "lr": training.learning_rate,
        "betas": (training.beta1, training.beta2),
        "eps": training.epsilon,
        "weight_decay": training.weight_decay,
    }


class RowsOptimizer(torch.optim.Optimizer):
    """bitsandbytes' AdamW with 8-bit state (Dettmers et al. 2022), over the rows that this process stores.

    Its kernels know no sharded tensors. A block of 256 values that share a scale may lie across rows, so the state of
    a sharded parameter belongs to this number of processes.
    """

    by_rank = True
    """The state cannot be cut anew for another number of processes."""

    def __init__(self, params: list[nn.Parameter], training: TrainingConfig) -> None:
        import bitsandbytes.optim

        super().__init__(params, _settings(training))
        self._rows = {param: nn.Parameter(local_rows(param)[0]) for param in params}
        stored = [rows for rows in self._rows.values() if rows.numel()]  # a small parameter may leave a rank without
        kind = getattr(bitsandbytes.optim, training.optimizer)
        self._inner: torch.optim.Optimizer = kind(stored or [nn.Parameter(torch.zeros(1))], **_settings(training))
        self.state = {param: self._inner.state[rows] for param, rows in self._rows.items()}  # type: ignore[assignment]

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step on every parameter that has a gradient."""
        assert closure is None
        (group,), (inner,) = self.param_groups, self._inner.param_groups
        inner["lr"] = group["lr"]
        for param, rows in self._rows.items():
            rows.grad = None if param.grad is None or not rows.numel() else local_rows(param.grad)[0]
        self._inner.step()

    def zero_grad(self, set_to_none: bool = True) -> None:  # noqa: ARG002 - torch's signature
        """Drop the gradients."""
        for param, rows in self._rows.items():
            param.grad = rows.grad = None


class InBackward(torch.optim.Optimizer):
    """Updates each parameter as soon as its gradient is complete and drops the gradient: never are two of them held."""

    def __init__(
        self,
        params: list[nn.Parameter],
        training: TrainingConfig,
        make: Callable[[list[nn.Parameter], TrainingConfig], torch.optim.Optimizer],
    ) -> None:
        super().__init__(params, {})
        self._parts = {param: make([param], training) for param in params}
        self.param_groups = [group for part in self._parts.values() for group in part.param_groups]
        self.state = {param: part.state[param] for param, part in self._parts.items()}  # type: ignore[assignment]
        self.by_rank = any(getattr(part, "by_rank", False) for part in self._parts.values())
        self._norms: list[torch.Tensor] = []
        for param in params:
            param.register_post_accumulate_grad_hook(self._update)  # type: ignore[no-untyped-call]

    def _update(self, param: torch.Tensor) -> None:
        assert param.grad is not None
        self._norms.append(torch.linalg.vector_norm(param.grad))
        part = self._parts[param]  # type: ignore[index] # only parameters have this hook
        part.step()
        part.zero_grad()

    def take_norm(self) -> float:
        """The L2 norm of all gradients since the last call. All ranks must call it."""
        norms, self._norms = self._norms, []
        return whole_value(torch.linalg.vector_norm(torch.stack(norms)))

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step on every parameter that still has a gradient; in training none has."""
        assert closure is None
        for param, part in self._parts.items():
            if param.grad is not None:
                part.step()
                part.zero_grad()


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
