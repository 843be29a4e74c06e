"""Greedy generation equals transformers'."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kubetune_contract.config import RunConfig
from kubetune_trainer.distributed import World
from kubetune_trainer.generate import generate
from kubetune_trainer.hub import WeightReader
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


def answer(world: World, config: RunConfig) -> list[int]:
    return generate(build(config, WeightReader(config.model.path), world), PROMPT, 12, {96}, world)


def test_two_ranks_give_the_answer_of_one(
    tiny: Path, run_config: Configure, spawn: Callable[..., list[Any]], alone: World
) -> None:
    config = run_config(tiny, method="Full")
    expected = answer(alone, config)
    assert spawn(2, answer, config) == [expected, expected]
