"""Answers to held-out questions before and after the training, in samples.json."""

import json
from typing import Any

from kubetune_contract.paths import SAMPLES_FILE
from kubetune_trainer.checkpoint import write_file
from kubetune_trainer.distributed import broadcast_object
from kubetune_trainer.formats import Question
from kubetune_trainer.generate import generate
from kubetune_trainer.loop import Run
from kubetune_trainer.tokenizer import Tokenizer


def samples_before(state: Run, tokenizer: Tokenizer, questions: list[Question], start: int) -> list[dict[str, Any]]:
    """The questions with the answers of the untrained model: measured once, read again by later attempts."""
    path = state.reporter.folder / SAMPLES_FILE
    known = broadcast_object(state.world, path.read_text() if state.world.is_main and path.exists() else None)
    if known is not None:
        samples: list[dict[str, Any]] = json.loads(known)
        return samples
    answers = _answers(state, tokenizer, questions) if start == 0 else [None] * len(questions)
    samples = [
        {"prompt": question.text, "reference": question.reference, "before": answer, "after": None}
        for question, answer in zip(questions, answers, strict=True)
    ]
    _write_samples(state, samples)
    return samples


def samples_after(state: Run, tokenizer: Tokenizer, questions: list[Question], samples: list[dict[str, Any]]) -> None:
    """Adds the answers of the trained model."""
    answers = _answers(state, tokenizer, questions)
    _write_samples(state, [sample | {"after": answer} for sample, answer in zip(samples, answers, strict=True)])


def _write_samples(state: Run, samples: list[dict[str, Any]]) -> None:
    if state.world.is_main and samples:
        text = json.dumps(samples, indent=2, ensure_ascii=False)
        write_file(state.reporter.folder / SAMPLES_FILE, text.encode())


def _answers(state: Run, tokenizer: Tokenizer, questions: list[Question]) -> list[str]:
    """Greedy answers; all ranks compute them together."""
    validation = state.config.validation
    if validation is None or not questions:
        return []
    limit, stop_ids = validation.sample_tokens, set(tokenizer.stop_ids)
    prompts = [tokenizer.encode(question.rendered) for question in questions]
    answers = [generate(state.model, prompt, limit, stop_ids, state.world) for prompt in prompts]
    return [tokenizer.decode(answer).strip() for answer in answers]
