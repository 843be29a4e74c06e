"""Text generation, to see what a model has learnt. Serving is done elsewhere."""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from kubetune_trainer.distributed import World, all_sum, broadcast_object, sharded_modules
from kubetune_trainer.model import KeyValueCache, Llama

Choose = Callable[[Tensor], int]
"""The next token, from the logits [V] of all tokens."""


class Sampling(NamedTuple):
    """What is drawn from. The steps follow each other as in transformers."""

    temperature: float
    """Logits are divided by it; 0: the most probable token."""
    top_k: int | None = None
    """So many of the most probable tokens stay."""
    top_p: float | None = None
    """The most probable tokens stay that together reach this probability (Holtzman et al. 2020)."""


def greedy(logits: Tensor) -> int:
    """The most probable token."""
    return int(logits.argmax())


def sampler(sampling: Sampling, seed: int, device: torch.device) -> Choose:
    """Draws tokens; the same seed draws the same from the same logits."""
    if sampling.temperature == 0:
        return greedy
    generator = torch.Generator(device).manual_seed(seed)

    def draw(logits: Tensor) -> int:
        probabilities = filter_logits(logits, sampling).softmax(dim=-1)
        return int(torch.multinomial(probabilities, 1, generator=generator))

    return draw


def filter_logits(logits: Tensor, sampling: Sampling) -> Tensor:
    """float32 logits [V] at the temperature, -inf for every token that cannot be drawn."""
    logits = logits.float() / sampling.temperature
    if sampling.top_k is not None:
        least = logits.topk(min(sampling.top_k, len(logits))).values[-1]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if sampling.top_p is not None and sampling.top_p < 1:
        ascending, order = logits.sort()
        superfluous = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - sampling.top_p
        superfluous[-1] = False  # the most probable token stays whatever its probability
        logits = logits.index_fill(0, order[superfluous], -torch.inf)
    return logits


def generate(
    model: Llama,
    tokens: list[int],
    max_new_tokens: int,
    stop_ids: Collection[int],
    world: World,
    *,
    choose: Choose = greedy,
    is_done: Callable[[list[int]], bool] | None = None,
) -> list[int]:
    """A continuation of `tokens` without its stop token: `max_new_tokens` long at most, shorter if it `is_done`.

    All ranks must call it alike. Each follows rank 0's choice, so that a tie cannot set them apart.
    """
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), gathered(model, world):
            cache = KeyValueCache(len(tokens) + max_new_tokens)
            answer: list[int] = []
            fresh = tokens
            while len(answer) < max_new_tokens and not (is_done and is_done(answer)):
                logits = model(torch.tensor([fresh], device=world.device), cache=cache)
                token = broadcast_object(world, choose(logits[0, -1]))
                if token in stop_ids:
                    break
                answer.append(token)
                fresh = [token]
            return answer
    finally:
        model.train(training)


@contextmanager
def gathered(model: Llama, world: World) -> Iterator[None]:
    """Inside, a sharded block stays whole after its first forward pass: one gather per answer, not one per token.

    Where the whole model is more than half of any rank's free device memory, nothing changes. All ranks call it alike.
    """
    sharded = sharded_modules(model)
    (too_large,) = all_sum(world, float(not _fits(model, world)))
    if not sharded or too_large:
        yield
        return
    for module in sharded:
        module.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for number, module in enumerate(sharded):
            module.reshard()
            # FSDP's own default: the root, which comes first, is needed first in the backward pass too and stays whole.
            module.set_reshard_after_forward(number > 0, recurse=False)


def _fits(model: Llama, world: World) -> bool:
    """On the CPU the weights are small beside the activations of training; on a GPU the driver knows what is free."""
    if world.device.type != "cuda":
        return True
    free, _ = torch.cuda.mem_get_info(world.device)
    return 2 * sum(parameter.numel() * parameter.element_size() for parameter in model.parameters()) <= free
