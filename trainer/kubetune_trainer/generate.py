"""Greedy text generation, to see what a model has learnt. Serving is done elsewhere."""

from collections.abc import Collection

import torch

from kubetune_trainer.distributed import World, broadcast_object
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
        with torch.no_grad():
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
