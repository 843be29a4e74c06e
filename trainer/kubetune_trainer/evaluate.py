"""The task `evaluate`: held-out loss, perplexity and right answers on one's own data, and public tasks."""

import json
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kubetune_contract.dataset import DatasetConfig
from kubetune_contract.exit_codes import ExitCode
from kubetune_trainer import harness
from kubetune_trainer.cache import cache_folder
from kubetune_trainer.checkpoint import write_file
from kubetune_trainer.data import arrange, describe, load_parts, load_questions
from kubetune_trainer.failures import as_output_error
from kubetune_trainer.formats import Question
from kubetune_trainer.inference import Speaker, load
from kubetune_trainer.loop import measure
from kubetune_trainer.sources import pin
from kubetune_trainer.task_config import EvaluationConfig


def run(config: EvaluationConfig) -> int:
    """Prints the results, and writes them if a file is named. Raises JobError."""
    speaker = load(config.model)
    results: dict[str, Any] = {}
    if config.dataset is not None:
        results |= _on_data(config, config.dataset, speaker)
    if config.harness is not None:
        results["tasks"] = harness.run(config.harness, speaker)
    _tell(results)
    if config.results_file is not None:
        _write(Path(config.results_file), results)
    return ExitCode.DONE


def _on_data(config: EvaluationConfig, options: DatasetConfig, speaker: Speaker) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="kubetune-") as spare:
        parts = load_parts(options, speaker.tokenizer, cache_folder(Path(spare)), pin(options.sources))
        data = arrange(parts, options, packed=False)
        questions = load_questions(parts, config.answers, options, speaker.tokenizer)
        print(f"data        {describe(data, options)}", flush=True)
        loss = measure(speaker.model, speaker.world, data, config.batch_size)
    results: dict[str, Any] = {
        "loss": loss,
        "perplexity": math.exp(loss),
        "label_tokens": int(data.label_counts.sum()),
    }
    if config.answers:
        right = exact_matches(speaker, questions, config.max_new_tokens)
        results |= {"exact_match": right / len(questions) if questions else 0.0, "answers": len(questions)}
    return results


def exact_matches(speaker: Speaker, questions: Sequence[Question], max_new_tokens: int) -> int:
    """How many greedy answers equal the data's, but for blanks around them."""
    answers = (
        speaker.tokenizer.decode(speaker.answer(speaker.tokenizer.encode(one.rendered), max_new_tokens))
        for one in questions
    )
    return sum(answer.strip() == one.reference.strip() for answer, one in zip(answers, questions, strict=True))


def _tell(results: dict[str, Any]) -> None:
    tasks = results.get("tasks", {}).items()
    rows = [(name, value) for name, value in results.items() if name != "tasks"]
    rows += [(f"{task} {metric}", value) for task, metrics in tasks for metric, value in metrics.items()]
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:{width}}  {value:.6g}" if isinstance(value, float) else f"{name:{width}}  {value}")


def _write(file: Path, results: dict[str, Any]) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_file(file, (json.dumps(results, indent=2) + "\n").encode())
    except OSError as error:
        raise as_output_error(error, file) or error from error
