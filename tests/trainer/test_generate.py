"""Greedy generation equals transformers'."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.profiler import profile

from kubetune_contract.config import RunConfig
from kubetune_trainer.distributed import World, local_rows
from kubetune_trainer.generate import generate
from kubetune_trainer.hub import WeightReader
from kubetune_trainer.model import Llama
from kubetune_trainer.parallel import build

Configure = Callable[..., RunConfig]

PROMPT = [5, 17, 3, 88, 41]


def test_smollm2_answers_as_it_does_in_transformers(smollm2: Path, run_config: Configure, alone: World) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=True)["input_ids"]
    model = build(run_config(smollm2), WeightReader(smollm2), alone)
    answer = generate(model, prompt, 40, {tokenizer.eos_token_id}, alone)
    assert tokenizer.decode(answer) == "The capital of France is Paris."
    oracle = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    ids = torch.tensor([prompt])
    expected = oracle.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False)
    assert [*answer, tokenizer.eos_token_id] == expected[0, len(prompt) :].tolist()


def greedy(model: Any, count: int) -> list[int]:
    """Generation without a cache: the whole sequence through the model for each token."""
    tokens = list(PROMPT)
    with torch.no_grad():
        for _ in range(count):
            tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    return tokens[len(PROMPT) :]


def test_the_cache_changes_no_choice(tiny: Path, run_config: Configure, alone: World) -> None:
    model = build(run_config(tiny), WeightReader(tiny), alone).eval()
    assert generate(model, PROMPT, 30, (), alone) == greedy(model, 30)


def test_it_ends_before_a_stop_token(tiny: Path, run_config: Configure, alone: World) -> None:
    model = build(run_config(tiny), WeightReader(tiny), alone)
    free = generate(model, PROMPT, 12, (), alone)
    assert len(free) == 12
    stop = free[4]
    assert generate(model, PROMPT, 12, {stop, 96}, alone) == free[: free.index(stop)]


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluating"])
def test_the_mode_is_as_before_and_dropout_is_off(
    training: bool, tiny: Path, run_config: Configure, alone: World
) -> None:
    adapter = {"rank": 4, "dropout": 0.9}
    model = build(run_config(tiny, adapter=adapter), WeightReader(tiny), alone).train(training)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(1))
    answers = [generate(model, PROMPT, 10, (), alone) for _ in range(3)]
    assert answers[0] == answers[1] == answers[2]
    assert model.training is training


def gradients(model: Llama) -> list[Tensor]:
    ids = torch.tensor([PROMPT])
    model.zero_grad()
    model(ids, ids).backward()
    return [local_rows(p.grad)[0].clone() for p in model.parameters() if p.grad is not None]


def answer(world: World, config: RunConfig) -> dict[str, Any]:
    """An answer between two training steps, and how often it gathered weights."""
    model = build(config, WeightReader(config.model.path), world)
    before = gradients(model)
    with profile() as events:
        tokens = generate(model, PROMPT, 12, {96}, world)
    again = gradients(model)
    return {
        "tokens": tokens,
        "gathers": sum(event.count for event in events.key_averages() if event.key == "c10d::_allgather_base_"),
        "same gradients": all(torch.equal(one, other) for one, other in zip(before, again, strict=True)),
        "sharded": {type(parameter) for parameter in model.parameters()} == {DTensor},
    }


@pytest.mark.parametrize("method", ["LoRA", "Full"])
def test_two_ranks_give_the_answer_of_one_and_go_on_training(
    method: str, tiny: Path, run_config: Configure, spawn: Callable[..., list[Any]], alone: World
) -> None:
    config = run_config(tiny, method=method)
    expected = answer(alone, config)
    assert expected["same gradients"]
    for rank in spawn(2, answer, config):
        assert rank["tokens"] == expected["tokens"]
        assert rank["gathers"] == 3  # two blocks and the rest, once each, not once for each of 12 tokens
        assert rank["same gradients"]
        assert rank["sharded"]
