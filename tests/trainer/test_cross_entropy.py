"""The chunked loss is plain cross-entropy, with its gradients."""

import pytest
import torch
import torch.nn.functional as F

from kubetune_contract.architecture import HEAD_CHUNK
from kubetune_trainer.cross_entropy import linear_cross_entropy

CHUNKS = {
    "less than one chunk": 5,
    "exactly one chunk": HEAD_CHUNK,
    "one token more than a chunk": HEAD_CHUNK + 1,
    "several chunks": 2 * HEAD_CHUNK + 17,
}


@pytest.mark.parametrize("count", CHUNKS.values(), ids=CHUNKS.keys())
def test_chunked_loss_equals_plain_cross_entropy(count: int) -> None:
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(count, 16, generator=generator, dtype=torch.float32).requires_grad_()
    head = torch.randn(50, 16, generator=generator).requires_grad_()
    targets = torch.randint(50, (count,), generator=generator)
    (linear_cross_entropy([(hidden, head)], targets) / count).backward()
    found = hidden.grad.clone(), head.grad.clone()
    hidden.grad = head.grad = None
    expected = F.cross_entropy(hidden @ head.t(), targets)
    expected.backward()
    torch.testing.assert_close(linear_cross_entropy([(hidden, head)], targets) / count, expected)
    torch.testing.assert_close(found, (hidden.grad, head.grad))


@pytest.mark.parametrize("by_token", [False, True], ids=["the sum", "each token with a weight of its own"])
def test_the_head_may_be_a_sum_of_products(by_token: bool) -> None:
    """As a head with an adapter is: both parts get the gradients that plain autograd gives them."""
    generator = torch.Generator().manual_seed(3)
    count = HEAD_CHUNK + 7
    factors = [
        torch.randn(shape, generator=generator).requires_grad_()
        for shape in ((count, 16), (50, 16), (count, 3), (50, 3))
    ]
    targets = torch.randint(50, (count,), generator=generator)
    weights = torch.rand(count, generator=generator) if by_token else torch.ones(count)
    losses = linear_cross_entropy([(factors[0], factors[1]), (factors[2], factors[3])], targets, by_token=by_token)
    found = torch.autograd.grad(losses @ weights if by_token else losses, factors)
    logits = factors[0] @ factors[1].t() + factors[2] @ factors[3].t()
    expected = F.cross_entropy(logits, targets, reduction="none")
    torch.testing.assert_close(losses, expected if by_token else expected.sum())
    torch.testing.assert_close(found, torch.autograd.grad(expected @ weights, factors), rtol=1e-4, atol=1e-4)


def test_loss_of_extreme_logits_is_finite() -> None:
    hidden = torch.tensor([[1e4, -1e4], [1e-30, 0.0]], requires_grad=True)
    loss = linear_cross_entropy([(hidden, torch.eye(2))], torch.tensor([1, 0]))
    loss.backward()
    torch.testing.assert_close(loss, F.cross_entropy(hidden, torch.tensor([1, 0]), reduction="sum"))
    assert hidden.grad.isfinite().all()


def test_a_frozen_head_and_evaluation_compute_no_gradient_of_the_head() -> None:
    """The head's gradient is as large as the head: it must not be made where nobody asks for it."""
    hidden = torch.randn(4, 8, requires_grad=True)
    head = torch.randn(11, 8)
    with torch.profiler.profile() as profile:
        linear_cross_entropy([(hidden, head)], torch.arange(4)).backward()
        with torch.no_grad():
            linear_cross_entropy([(hidden, head.requires_grad_())], torch.arange(4))
    assert "aten::addmm_" not in {event.key for event in profile.key_averages()}


def test_backward_runs_once() -> None:
    hidden = torch.randn(4, 8, requires_grad=True)
    loss = linear_cross_entropy([(hidden, torch.randn(11, 8))], torch.arange(4))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
