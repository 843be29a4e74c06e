"""The loss of a language model, without ever holding all of its logits."""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kubetune_contract.architecture import HEAD_CHUNK

Pair = tuple[Tensor, Tensor]
"""Factors of a product x @ weight.T: x [..., K] and weight [V, K]."""


def sum_products(products: Sequence[Pair]) -> Tensor:
    """The sum of x @ weight.T over the pairs of x [..., K] and weight [V, K]."""
    (x, weight), *others = products
    total = F.linear(x, weight)
    for x, weight in others:
        total = total + F.linear(x, weight)
    return total


def linear_cross_entropy(products: Sequence[Pair], targets: Tensor, *, by_token: bool = False) -> Tensor:
    """Sum of the cross-entropy of logits that are a sum of products, without ever holding all logits.

    `products`: pairs of hidden [N, K] and head [V, K], for hidden @ head.T; a plain head has one pair, an adapter adds
    one. `targets` [N]. Returns a float32 scalar. Gradients are computed chunk by chunk in the forward pass, while the
    logits are there, so that nothing is computed twice (Liger Kernel, Hsu et al. 2024).
    `by_token` returns the loss of each target, [N]. Their later weights are not known yet, so where a head is trained
    the logits are computed again in the backward pass.
    """
    trained = torch.is_grad_enabled() and any(head.requires_grad for _, head in products)
    factors = [(hidden, head if trained else head.detach()) for hidden, head in products]
    operation = _LateLinearCrossEntropy if by_token and trained else _LinearCrossEntropy
    losses: Tensor = operation.apply(targets, *itertools.chain(*factors))  # type: ignore[no-untyped-call]  # torch's
    return losses if by_token else losses.sum()


class _LinearCrossEntropy(torch.autograd.Function):
    """Gradients of the sum in the forward pass; the backward pass only weighs them."""

    @staticmethod
    def forward(ctx: Any, targets: Tensor, *factors: Tensor) -> Tensor:
        losses, gradients = _head_chunks(targets, factors, ctx.needs_input_grad[1:], None)
        ctx.save_for_backward(*gradients)
        return losses

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (weights,) = gradients  # [N]; all the same where a head has a gradient, because then the sum was taken
        found = ctx.saved_tensors
        for of_hidden, of_head in zip(found[::2], found[1::2], strict=True):
            if of_hidden is not None:
                of_hidden.mul_(weights[:, None])
            if of_head is not None and len(weights):
                of_head.mul_(weights[0])
        return None, *found


class _LateLinearCrossEntropy(torch.autograd.Function):
    """Gradients in the backward pass, from logits that are computed again there."""

    @staticmethod
    def forward(ctx: Any, targets: Tensor, *factors: Tensor) -> Tensor:
        ctx.save_for_backward(targets, *factors)
        losses, _ = _head_chunks(targets, factors, [False] * len(factors), None)
        return losses

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        targets, *factors = ctx.saved_tensors
        _, found = _head_chunks(targets, factors, ctx.needs_input_grad[1:], gradients[0])
        return None, *found


def _head_chunks(
    targets: Tensor, factors: Sequence[Tensor], wanted: Sequence[bool], weights: Tensor | None
) -> tuple[Tensor, list[Tensor | None]]:
    """The losses [N], and the wanted gradients of their sum weighed by `weights` [N] (by 1 if there are none)."""
    gradients = [torch.zeros_like(factor) if wants else None for factor, wants in zip(factors, wanted, strict=True)]
    losses = torch.zeros(len(targets), dtype=torch.float32, device=targets.device)
    for start in range(0, len(targets), HEAD_CHUNK):
        rows = slice(start, start + HEAD_CHUNK)
        losses[rows] = _head_chunk(rows, targets[rows], factors, gradients, None if weights is None else weights[rows])
    return losses, gradients


def _head_chunk(
    rows: slice, targets: Tensor, factors: Sequence[Tensor], gradients: Sequence[Tensor | None], weights: Tensor | None
) -> Tensor:
    """The losses [n] of some rows; their gradients are put or added into those of `gradients` that are wanted.

    A function of its own, so that the logits of one chunk are gone before those of the next.
    """
    (hidden, head), *others = pairs = list(zip(factors[::2], factors[1::2], strict=True))
    logits = hidden[rows] @ head.t()
    for hidden, head in others:
        logits.addmm_(hidden[rows], head.t())
    logits = logits.float()
    losses = _cross_entropy_(logits, targets)
    gradient = (logits if weights is None else logits.mul_(weights[:, None])).to(head.dtype)
    for (hidden, head), of_hidden, of_head in zip(pairs, gradients[::2], gradients[1::2], strict=True):
        if of_hidden is not None:
            torch.mm(gradient, head, out=of_hidden[rows])
        if of_head is not None:
            of_head.addmm_(gradient.t(), hidden[rows])
    return losses


def _cross_entropy_(logits: Tensor, targets: Tensor) -> Tensor:
    """The losses [n] of float32 `logits` [n, V], which become their own gradient: softmax minus the target's 1."""
    logits -= logits.amax(dim=-1, keepdim=True)
    rows = torch.arange(len(targets), device=targets.device)
    chosen = logits[rows, targets]
    totals = logits.exp_().sum(dim=-1, keepdim=True)
    logits /= totals
    logits[rows, targets] -= 1
    return totals.log().squeeze(-1) - chosen
