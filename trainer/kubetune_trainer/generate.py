"""Greedy text generation, to see what a model has learnt. Serving is done elsewhere."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch
from torch.distributed.fsdp import FSDPModule

from kubetune_trainer.distributed import World, all_sum, broadcast_object
from kubetune_trainer.model import KeyValueCache, Llama


def generate(
    model: Llama, tokens: list[int], max_new_tokens: int, stop_ids: Collection[int], world: World
) -> list[int]:
    """The most probable continuation of `tokens`, without its stop token; at most `max_new_tokens` long.

    All ranks must call it alike. Each follows rank 0's choice, so that a tie cannot set them apart.
    """
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), gathered(model, world):
            return _continue(model, tokens, max_new_tokens, stop_ids, world)
    finally:
        model.train(training)


def _continue(
    model: Llama, tokens: list[int], max_new_tokens: int, stop_ids: Collection[int], world: World
) -> list[int]:
    cache = KeyValueCache(len(tokens) + max_new_tokens)
    answer: list[int] = []
    fresh = tokens
    while len(answer) < max_new_tokens:
        logits = model(torch.tensor([fresh], device=world.device), cache=cache)
        token = broadcast_object(world, int(logits[0, -1].argmax()))
        if token in stop_ids:
            break
        answer.append(token)
        fresh = [token]
    return answer


@contextmanager
def gathered(model: Llama, world: World) -> Iterator[None]:
    """Inside, a sharded block stays whole after its first forward pass: one gather per answer, not one per token.

    Where the whole model is more than half of any rank's free device memory, nothing changes. All ranks call it alike.
    """
    sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]
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
