"""Our training is transformers' (and peft's): the same losses from the same weights, rows, optimizer, schedule."""

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kubetune_contract.config import RunConfig
from kubetune_contract.presets import merge
from kubetune_trainer import train
from kubetune_trainer.cache import cache_folder
from kubetune_trainer.data import load_data
from kubetune_trainer.distributed import World
from kubetune_trainer.hub import WeightReader
from kubetune_trainer.loop import StopFlag
from kubetune_trainer.model import IGNORE
from kubetune_trainer.parallel import build
from kubetune_trainer.peft import peft_name, trainable
from kubetune_trainer.report import read_metrics
from kubetune_trainer.sampling import Sampler
from kubetune_trainer.tokenizer import Tokenizer

METHODS = {"LoRA": 1e-4, "DoRA": 1e-4, "QLoRA": 1e-2, "Full": 1e-4}
"""The project's bars. float32 rounding alone, fed back through 50 optimizer steps, reaches some 1e-5; bitsandbytes may
multiply packed weights in an order of its own."""
RANKS_BAR = 1e-5
"""The project's bar: ranks add the same numbers in another order."""
SHAPE = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}


def arithmetic(count: int) -> list[dict[str, Any]]:
    """Conversations of one to three turns, so that rows differ in length and in label tokens."""
    numbers = random.Random(3)
    rows = []
    for _ in range(count):
        messages = []
        for _ in range(numbers.randint(1, 3)):
            a, b = numbers.randint(0, 99), numbers.randint(0, 9999)
            messages += [
                {"role": "user", "content": f"{a} plus {b}?"},
                {"role": "assistant", "content": f"It is {a + b}."},
            ]
        rows.append({"messages": messages})
    return rows


@pytest.fixture
def parity_run(llama_folder: Callable[..., Path], training_run: RunConfig) -> RunConfig:
    """50 steps over 80 conversations in batches of 4, cut into unequal passes."""
    path = Path(training_run.dataset.path)
    path.write_text("".join(json.dumps(row) + "\n" for row in arithmetic(80)))
    changes = {
        "model": {"path": str(llama_folder(**SHAPE))},
        "adapter": {"rank": 8, "alpha": 16, "dropout": 0.0},
        "dataset": {"max_sequence_length": 128},
        "validation": None,
        "training": {"epochs": 3, "max_steps": 50, "learning_rate": 2e-3, "warmup_steps": 0, "weight_decay": 0.1},
        "checkpoint": {"every_steps": 1000},
    }
    return RunConfig.model_validate(merge(training_run.model_dump(), changes))


def ours(config: RunConfig, world: World) -> list[float]:
    train.run(config, world, StopFlag())
    lines = read_metrics(Path(config.output_dir, "metrics.jsonl"))
    return [line["loss"] for line in lines if "loss" in line]


def theirs(config: RunConfig, world: World) -> list[float]:
    """transformers' model and loss, peft's adapter with our first values, torch's AdamW, transformers' schedule."""
    from transformers import AutoModelForCausalLM, get_scheduler

    model = AutoModelForCausalLM.from_pretrained(config.model.path, dtype=torch.float32, **in_four_bits(config))
    if config.lora:
        model = with_peft(model, config, world)
    model.train()
    training = config.training
    params = [param for param in model.parameters() if param.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=training.learning_rate, weight_decay=training.weight_decay)
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=0, num_training_steps=steps_of(config))
    losses = []
    for input_ids, labels in batches(config):
        mask = input_ids >= 0
        # Labels are shifted by the model, and its mean is over all label tokens of the batch.
        loss = model(input_ids=input_ids.clamp(min=0), attention_mask=mask.long(), labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, training.max_gradient_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def in_four_bits(config: RunConfig) -> dict[str, Any]:
    from transformers import BitsAndBytesConfig

    if config.quantized is None:
        return {}
    options = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=config.quantized.double,
        bnb_4bit_compute_dtype=torch.float32,
    )
    return {"quantization_config": options, "device_map": "cpu"}


def with_peft(model: Any, config: RunConfig, world: World) -> Any:
    from peft import LoraConfig, get_peft_model

    lora = config.lora
    assert lora is not None
    options = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        target_modules=list(lora.target_modules),
        task_type="CAUSAL_LM",
        use_dora=config.has_magnitude,
    )
    wrapped = get_peft_model(model, options)
    first = {
        f"{peft_name(name).removesuffix('.weight')}.default.weight": param.detach()
        for name, param in trainable(build(config, WeightReader(config.model.path), world)).items()
    }
    loaded = wrapped.load_state_dict(first, strict=False)
    assert not loaded.unexpected_keys
    return wrapped


def steps_of(config: RunConfig) -> int:
    assert config.training.max_steps is not None
    return config.training.max_steps


def batches(config: RunConfig) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The rows of each step as one padded batch for transformers: -1 where there is padding, labels in place."""
    tokenizer = Tokenizer.from_folder(Path(config.model.path))
    data = load_data(config, tokenizer, cache_folder(Path(config.output_dir)), {}).training
    training = config.training
    rows = training.batch_size * training.gradient_accumulation_steps
    sampler = Sampler(data.lengths, rows, training.batch_size, training.seed, config.dataset.shuffle)
    found = []
    for step in range(steps_of(config)):
        samples = [sample for row in sampler.rows(step) for sample in data.samples(row)]
        # A sample has no room for the last target, which is a label only: transformers finds labels in the input.
        ids = [torch.tensor([*sample.input_ids, sample.labels[-1]]) for sample in samples]
        labels = [torch.tensor([IGNORE, *sample.labels]) for sample in samples]
        pad = torch.nn.utils.rnn.pad_sequence
        found.append(
            (pad(ids, batch_first=True, padding_value=-1), pad(labels, batch_first=True, padding_value=IGNORE))
        )
    return found


def assert_close(
    one: list[float], other: list[float], bar: float, what: str, report: Callable[[str, object], None]
) -> None:
    largest = max(abs(a - b) for a, b in zip(one, other, strict=True))
    report(what, largest)
    print(f"{what}: {len(one)} steps, loss {one[0]:.4f} -> {one[-1]:.4f}, largest difference {largest:.2e}")
    assert largest <= bar


def by_method(config: RunConfig, method: str) -> RunConfig:
    return config.model_copy(update={"method": method, "adapter": None if method == "Full" else config.adapter})


@pytest.mark.parametrize("method", METHODS)
def test_fifty_steps_have_the_losses_of_transformers(
    method: str, parity_run: RunConfig, alone: World, record_property: Callable[[str, object], None]
) -> None:
    config = by_method(parity_run, method)
    mine = ours(config, alone)
    assert len(mine) == 50
    assert mine[-1] < 0.7 * mine[0], "something must have been learnt, or equality says little"
    assert_close(mine, theirs(config, alone), METHODS[method], f"{method} against transformers", record_property)


def _ours_as_rank(world: World, config: RunConfig) -> list[float]:
    return ours(config, world)


@pytest.mark.parametrize(("method", "ranks"), [*((method, 2) for method in METHODS), ("LoRA", 4), ("QLoRA", 4)])
def test_ranks_have_the_losses_of_one(
    method: str,
    ranks: int,
    parity_run: RunConfig,
    alone: World,
    spawn: Callable[..., list[Any]],
    record_property: Callable[[str, object], None],
) -> None:
    config = by_method(parity_run, method)
    single = ours(config, alone)
    training = config.training
    rows = training.batch_size * training.gradient_accumulation_steps // ranks
    split = training.model_copy(update={"batch_size": rows, "gradient_accumulation_steps": 1})
    folder = f"{config.output_dir}-split"
    several = spawn(ranks, _ours_as_rank, config.model_copy(update={"training": split, "output_dir": folder}))[0]
    assert_close(single, several, RANKS_BAR, f"{method}, {ranks} ranks against one", record_property)


def test_a_real_model_has_the_losses_of_peft(
    smollm2: Path, parity_run: RunConfig, alone: World, record_property: Callable[[str, object], None]
) -> None:
    """SmolLM2-135M for a few steps: real weights, a real tokenizer and its template."""
    changes = {
        "model": {"path": str(smollm2)},
        "training": {"max_steps": 4, "batch_size": 1, "gradient_accumulation_steps": 2, "learning_rate": 1e-3},
    }
    config = RunConfig.model_validate(merge(parity_run.model_dump(), changes))
    threads = torch.get_num_threads()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    try:
        mine, other = ours(config, alone), theirs(config, alone)
    finally:
        torch.set_num_threads(threads)
    assert_close(mine, other, METHODS["LoRA"], "SmolLM2 against peft", record_property)
