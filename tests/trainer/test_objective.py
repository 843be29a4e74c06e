"""What a step minimises, held against TRL and against the formula."""

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from kubetune_contract.config import AdapterConfig, DPOConfig
from kubetune_trainer.hub import WeightReader, load_weights
from kubetune_trainer.model import IGNORE, Llama
from kubetune_trainer.objective import preference
from kubetune_trainer.peft import add_lora, init_adapter, trainable

ADAPTER = AdapterConfig(rank=4, alpha=12, target_modules=["q_proj", "v_proj", "down_proj"])
CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-6}
"""float32 with sums over tokens in another order."""
ROWS = [
    {"prompt": "Q: capital of Peru? A:", "chosen": " Lima.", "rejected": " Rome, I think"},
    {"prompt": "Q: 1 + 1? A:", "chosen": " It is 2", "rejected": " 3"},
    {"prompt": "Q:", "chosen": " yes", "rejected": " no, never"},
]


@pytest.fixture
def ours(tiny: Path) -> Llama:
    reader = WeightReader(tiny)
    model = Llama(reader.config())
    add_lora(model, ADAPTER)
    load_weights(model, reader)
    init_adapter(model, seed=1)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def trl_trainer(folder: Path, model: Llama, options: DPOConfig, output: Path) -> Any:
    """TRL's trainer with our adapter's weights."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of their own dependencies
        import trl
        from datasets import Dataset

        settings = trl.DPOConfig(
            output_dir=str(output),
            report_to=[],
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            beta=options.beta,
            per_device_train_batch_size=len(ROWS),
            disable_tqdm=True,
        )
        lora = LoraConfig(
            r=ADAPTER.rank, lora_alpha=ADAPTER.alpha, target_modules=ADAPTER.target_modules, task_type="CAUSAL_LM"
        )
        trainer = trl.DPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
            args=settings,
            train_dataset=Dataset.from_list(ROWS),
            processing_class=PreTrainedTokenizerFast.from_pretrained(folder, pad_token="<pad>"),
            peft_config=lora,
        )
    with torch.no_grad():
        for name, parameter in trl_parameters(trainer).items():
            parameter.copy_(trainable(model)[name])
    return trainer


def trl_parameters(trainer: Any) -> dict[str, torch.nn.Parameter]:
    named = trainer.model.named_parameters()
    return {n.removeprefix("base_model.model.").replace(".default", ""): p for n, p in named if p.requires_grad}


def ragged(batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, list[int]]:
    """TRL's batch (all chosen rows, then all rejected, padded) as ours: chosen, rejected, chosen, ..."""
    pairs = len(batch["input_ids"]) // 2
    ids, labels = [], []
    for row in (row for pair in range(pairs) for row in (pair, pair + pairs)):
        real = batch["attention_mask"][row].bool()
        tokens = batch["input_ids"][row][real]
        answer = batch["completion_mask"][row][real].bool()
        ids.append(tokens[:-1])
        labels.append(torch.where(answer, tokens, IGNORE)[1:])
    return torch.cat(ids)[None], torch.cat(labels)[None], [len(one) for one in ids]


def test_the_preference_loss_and_its_gradients_equal_trl(ours: Llama, tiny: Path, tmp_path: Path) -> None:
    options = DPOConfig(beta=0.3)
    trainer = trl_trainer(tiny, ours, options, tmp_path)
    batch = next(iter(trainer.get_train_dataloader()))
    theirs = trainer._compute_loss(trainer.model, batch, return_outputs=False)
    theirs.backward()

    loss, *measures = preference(ours, *ragged(batch), options).unbind()
    (loss / len(ROWS)).backward()
    torch.testing.assert_close(loss / len(ROWS), theirs, **CLOSE)
    for name, parameter in trl_parameters(trainer).items():
        torch.testing.assert_close(trainable(ours)[name].grad, parameter.grad, msg=name, **CLOSE)
    metrics = {key: values[-1] for key, values in trainer._metrics["train"].items()}
    named = zip(["chosen", "rejected", "accuracies"], measures, strict=True)
    found = {key: (value / len(ROWS)).item() for key, value in named}
    assert found == {key: pytest.approx(metrics[f"rewards/{key}"], rel=1e-4) for key in found}


def documents(*texts: tuple[int, int]) -> tuple[Tensor, Tensor, list[int]]:
    """Documents of so many tokens, of which so many at the end carry the loss."""
    generator = torch.Generator().manual_seed(11)
    ids = [torch.randint(97, (length,), generator=generator) for length, _ in texts]
    labels = [
        torch.where(torch.arange(n) >= n - answer, ids[i].roll(-1), IGNORE) for i, (n, answer) in enumerate(texts)
    ]
    return torch.cat(ids)[None], torch.cat(labels)[None], [length for length, _ in texts]


def test_a_model_that_is_its_reference_is_undecided(tiny: Path) -> None:
    reader = WeightReader(tiny)
    model = Llama(reader.config())
    add_lora(model, ADAPTER)
    load_weights(model, reader)
    init_adapter(model, seed=1)  # B is zero
    loss, chosen, rejected, accuracy = preference(model, *documents((9, 3), (7, 2)), DPOConfig()).tolist()
    assert loss == pytest.approx(math.log(2), abs=1e-6)
    assert (chosen, rejected, accuracy) == (0, 0, 0)


def test_smoothing_takes_a_part_of_each_pair_the_wrong_way_round(ours: Llama) -> None:
    """log sigmoid(-x) = log sigmoid(x) - x. (TRL's sigmoid loss knows no smoothing; torchtune's is this one.)"""
    pair = documents((9, 3), (7, 2))
    plain, chosen, rejected, _ = preference(ours, *pair, DPOConfig(beta=0.3)).tolist()
    smoothed = preference(ours, *pair, DPOConfig(beta=0.3, label_smoothing=0.1)).tolist()[0]
    assert smoothed == pytest.approx(plain + 0.1 * (chosen - rejected), rel=1e-5)


def test_pairs_add_up(ours: Llama) -> None:
    """Sums over micro-batches are those of the whole, and a rank without a row adds nothing."""
    sizes, options = [(9, 3), (7, 2), (5, 5), (12, 4)], DPOConfig(beta=0.5)
    ids, labels, lengths = documents(*sizes)
    together = preference(ours, ids, labels, lengths, options)
    first, second = (
        preference(ours, ids[:, part], labels[:, part], lengths[pair : pair + 2], options)
        for part, pair in ((slice(0, 16), 0), (slice(16, 33), 2))
    )
    nothing = preference(ours, *documents((1, 0), (1, 0)), options)
    assert nothing.tolist() == [0, 0, 0, 0]
    torch.testing.assert_close(first + second + nothing, together, **CLOSE)
