"""Conversations for the benchmarks: drawn from a seed, as long as real ones, of English that every Python brings along.

Tokens of a conversation are log-normal, as those of published chat data are: many short ones, few long ones. The texts
are passages of Python's own documentation (`pydoc_data.topics`), so that a tokenizer has real words to do.
"""

import json
import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from pydoc_data import topics
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from benchmarks.trainer import inputs

SIGMA: Final = 0.9
"""Of the logarithm of a length."""
SHORTEST: Final = 16
_TOKENS_PER_WORD: Final = 1.75
"""Of SmolLM2's tokenizer on these texts."""
_TEMPLATE_TOKENS: Final = 40
"""What the default system message and the marks of two turns take."""
_QUESTION: Final = 0.3
"""Share of an exchange's words that the user has."""

TEMPLATE: Final = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""SmolLM2's, with the marks by which transformers finds the answers: both sides then learn the same tokens."""


def draw_lengths(count: int, median: float, longest: int, seed: int = 0) -> npt.NDArray[np.int32]:
    """Tokens of `count` conversations."""
    drawn = np.random.RandomState(seed).lognormal(np.log(median), SIGMA, count)
    return np.clip(np.rint(drawn), SHORTEST, longest).astype(np.int32)


def like(epoch: npt.NDArray[np.int32], count: int, batch: int = 8) -> npt.NDArray[np.int32]:
    """The part of an epoch, of many drawn ones, whose mean and whose padding in batches are most like the whole's."""
    state = np.random.RandomState(0)

    def padded(lengths: npt.NDArray[np.int32]) -> float:
        return float(lengths[: len(lengths) // batch * batch].reshape(-1, batch).max(axis=1).mean() / lengths.mean())

    def apart(part: npt.NDArray[np.int32]) -> float:
        return abs(padded(part) / padded(epoch) - 1) + abs(float(part.mean() / epoch.mean()) - 1)

    return min((state.permutation(epoch)[:count] for _ in range(1_000)), key=apart)


def conversations(lengths: npt.NDArray[np.int32], seed: int = 0) -> Iterator[dict[str, Any]]:
    """Rows in the format OpenAI of about these many tokens each: one to three exchanges."""
    state = np.random.RandomState(seed)
    for length in lengths.tolist():
        exchanges = 1 + int(state.randint(3)) * (length > 200)
        words = max(2 * exchanges, int((length - _TEMPLATE_TOKENS) / _TOKENS_PER_WORD)) // exchanges
        asked = max(1, round(_QUESTION * words))
        yield {
            "messages": [
                {"role": role, "content": _passage(state, count)}
                for _ in range(exchanges)
                for role, count in (("user", asked), ("assistant", words - asked))
            ]
        }


def write(file: Path, lengths: npt.NDArray[np.int32], seed: int = 0) -> Path:
    """The conversations as JSON Lines."""
    with file.open("w") as stream:
        stream.writelines(json.dumps(row) + "\n" for row in conversations(lengths, seed))
    return file


def marked(model: str, folder: Path) -> Path:
    """A copy of one of the inputs' models, whose template marks the answers."""
    shutil.copytree(inputs.model(model), folder, dirs_exist_ok=True)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def _passage(state: np.random.RandomState, count: int) -> str:
    words = _words()
    start = int(state.randint(len(words) - count))
    return " ".join(words[start : start + count])


@cache
def _words() -> list[str]:
    return [word for _, text in sorted(topics.topics.items()) for word in text.split() if word[0].isalnum()]
