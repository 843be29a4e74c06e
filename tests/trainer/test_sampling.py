"""What may be drawn is what transformers would draw from; the seed decides what is drawn."""

from pathlib import Path
from typing import Any

import pytest
import torch

from kubetune_contract.errors import ConfigError, validated
from kubetune_trainer.answer import run
from kubetune_trainer.generate import Sampling, filter_logits, greedy, sampler
from kubetune_trainer.task_config import GenerationConfig

CPU = torch.device("cpu")
SETTINGS = {
    "temperature alone": Sampling(0.6),
    "one token": Sampling(1.0, top_k=1),
    "the best ten": Sampling(1.0, top_k=10),
    "more than there are": Sampling(1.3, top_k=10_000),
    "half of the probability": Sampling(1.0, top_p=0.5),
    "almost all of it": Sampling(0.9, top_p=0.999),
    "almost nothing": Sampling(1.0, top_p=1e-6),
    "everything": Sampling(2.0, top_p=1.0),
    "all three": Sampling(0.7, top_k=30, top_p=0.8),
    "torchtune's": Sampling(0.6, top_k=300),
}


@pytest.mark.parametrize("sampling", SETTINGS.values(), ids=SETTINGS.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16 with ties"])
def test_the_filtered_logits_are_those_of_transformers(sampling: Sampling, dtype: torch.dtype) -> None:
    from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    theirs: Any = LogitsProcessorList([TemperatureLogitsWarper(sampling.temperature)])
    if sampling.top_k is not None:
        theirs.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p is not None:
        theirs.append(TopPLogitsWarper(sampling.top_p))
    generator = torch.Generator().manual_seed(5)
    for scale in (0.1, 1.0, 5.0):
        logits = (scale * torch.randn(997, generator=generator)).to(dtype)
        expected = theirs(torch.zeros((1, 1), dtype=torch.int64), logits.float()[None])[0]
        assert torch.equal(filter_logits(logits, sampling), expected)


def test_tokens_are_drawn_as_often_as_they_are_probable() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -9.0])
    choose = sampler(Sampling(0.5, top_k=3), 1, CPU)
    counts = torch.bincount(torch.tensor([choose(logits) for _ in range(4000)]), minlength=4) / 4000
    expected = torch.tensor([4.0, 2.0, 0.0, -torch.inf]).softmax(0)
    torch.testing.assert_close(counts, expected, rtol=0, atol=0.02)  # 2.7 standard deviations of 0.0074


def test_temperature_0_is_greedy() -> None:
    assert sampler(Sampling(0.0, top_k=5), 1, CPU) is greedy


# --- the task ---------------------------------------------------------------------------------------------------------


def settings(folder: Path, **changes: Any) -> GenerationConfig:
    values = {"model": {"path": str(folder), "precision": "FP32"}, "prompt": {"user": "2+3?"}, "max_new_tokens": 12}
    return validated(GenerationConfig, values | changes)


def answer(capsys: pytest.CaptureFixture[str], config: GenerationConfig) -> str:
    assert run(config) == 0
    captured = capsys.readouterr()
    assert "tokens/s" in captured.err
    return captured.out


def test_the_seed_decides_the_answer(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hot = {"temperature": 1.5, "top_k": None}
    first, again, other = (answer(capsys, settings(tiny, seed=seed, **hot)) for seed in (1, 1, 2))
    assert first == again != other
    cold = [answer(capsys, settings(tiny, seed=seed, temperature=0)) for seed in (1, 2)]
    assert cold[0] == cold[1]


def test_a_question_is_put_in_chat_format_and_a_text_is_not(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The template of the tiny model writes `role:content</s>`, with one letter of the role."""
    chat = answer(capsys, settings(tiny, temperature=0, prompt={"user": "2+3?", "system": "Sum."}))
    assert chat == answer(capsys, settings(tiny, temperature=0, prompt={"text": "s:Sum.</s>u:2+3?</s>"}))
    assert chat != answer(capsys, settings(tiny, temperature=0, prompt={"text": "2+3?"}))


def test_smollm2_answers_a_question(smollm2: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompt = {"user": "What is the capital of France?"}
    assert answer(capsys, settings(smollm2, temperature=0, prompt=prompt)) == "The capital of France is Paris.\n"


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no prompt": ({"prompt": {}}, "exactly one of prompt.user"),
    "two prompts": ({"prompt": {"user": "a", "text": "b"}}, "exactly one of prompt.user"),
    "a system turn before a text": ({"prompt": {"system": "a", "text": "b"}}, "prompt.system goes with prompt.user"),
    "a misspelt key": ({"temprature": 1}, "temprature: unknown field; did you mean temperature"),
    "a temperature below 0": ({"temperature": -1}, "temperature: .*greater than or equal to 0"),
    "top_p above 1": ({"top_p": 1.5}, "top_p: .*less than or equal to 1"),
    "merging nothing": ({"model": {"path": "x", "merged": True}}, "merged needs an adapter_path"),
    "merging into 4 bits": (
        {"model": {"path": "x", "adapter_path": "y", "merged": True, "quantization": {}}},
        "merged does not go with quantization",
    ),
    "too long": ({"max_new_tokens": 600}, "the prompt has .* tokens; 600 more .*512 positions.*set max_new_tokens to"),
    "a prompt without room": ({"prompt": {"text": "a" * 600}}, "max_new_tokens: the prompt has 600 .*shorten"),
}


@pytest.mark.parametrize(("changes", "message"), WRONG.values(), ids=WRONG.keys())
def test_what_cannot_work_is_told(changes: dict[str, Any], message: str, tiny: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        run(settings(tiny, **changes))


def test_every_task_has_its_configurations(tiny: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from kubetune_contract.presets import config_names, preset_names, read_preset
    from kubetune_trainer.tasks import TASKS

    for task in TASKS.values():
        for name in task.configs:
            validated(task.model, read_preset(name))
            assert name in config_names()
            assert name not in preset_names()


def test_tune_runs_it(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from kubetune_trainer.cli import main

    overrides = [f"model.path={tiny}", "max_new_tokens=3", "prompt.user=2+3?", "model.precision=FP32"]
    assert main(["run", "generate", "--config", "generation", *overrides]) == 0
    assert "tokens/s" in capsys.readouterr().err
