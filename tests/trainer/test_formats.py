"""Rows of every format to texts and the parts of them that are learnt, inside a chat template and without one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kubetune_contract.architecture import ModelError
from kubetune_contract.dataset import RowOptions
from kubetune_trainer.formats import Formatter, Question
from kubetune_trainer.rows import RowError
from kubetune_trainer.tokenizer import Tokenizer

NextFolder = Callable[..., Path]

SHORT = """\
{% for m in messages %}{{ '<' + m.role[0] + '>' + m.content + '<|eot_id|>' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<a>' }}{% endif %}"""
"""A chat template that is easy to read in tests."""


@pytest.fixture(scope="module")
def chat(chat_folder: NextFolder) -> Tokenizer:
    return Tokenizer.from_folder(chat_folder(SHORT))


@pytest.fixture(scope="module")
def base(chat_folder: NextFolder) -> Tokenizer:
    """A model without a chat template, which wants <s> before a text and writes </s> after it."""
    from tokenizers import Tokenizer as Backend
    from tokenizers.processors import TemplateProcessing

    folder = chat_folder(None, eos_token="</s>")
    backend = Backend.from_file(str(folder / "tokenizer.json"))
    backend.post_processor = TemplateProcessing("<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))])
    backend.save(str(folder / "tokenizer.json"))
    return Tokenizer.from_folder(folder)


def marked(formatter: Formatter, row: dict[str, Any]) -> list[str]:
    """The row's texts with what is learnt in brackets."""
    texts = []
    for side in formatter.render(row):
        text = side.text
        for start, stop in reversed(side.spans):
            text = f"{text[:start]}[{text[start:stop]}]{text[stop:]}"
        texts.append(text)
    return texts


TURNS = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
MORE = [*TURNS, {"role": "user", "content": "R"}, {"role": "assistant", "content": "B"}]
SPOKEN = [{"from": "system", "value": "S"}, {"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]
ALPACA = {"instruction": "Add.", "input": "1, 2", "output": "3"}

Case = tuple[dict[str, Any], dict[str, Any], list[str]]

CHAT: dict[str, Case] = {
    "OpenAI": ({}, {"messages": MORE}, ["<u>Q<|eot_id|><a>[A<|eot_id|>]<u>R<|eot_id|><a>[B<|eot_id|>]"]),
    "OpenAI in a cell of CSV": ({}, {"messages": '[{"role": "user", "content": "Q"}]'}, ["<u>Q<|eot_id|>"]),
    "ShareGPT": (
        {"format": "ShareGPT"},
        {"conversations": SPOKEN},
        ["<s>S<|eot_id|><u>Q<|eot_id|><a>[A<|eot_id|>]"],
    ),
    "Alpaca with an input": ({"format": "Alpaca"}, ALPACA, ["<u>Add.\n\n1, 2<|eot_id|><a>[3<|eot_id|>]"]),
    "Alpaca without one": ({"format": "Alpaca"}, ALPACA | {"input": ""}, ["<u>Add.<|eot_id|><a>[3<|eot_id|>]"]),
    "Alpaca in its own words": (
        {"format": "Alpaca", "prompt_template": {"name": "Alpaca"}},
        ALPACA,
        [
            "<u>Below is an instruction that describes a task, paired with an input that provides further context. "
            "Write a response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n1, 2"
            "\n\n### Response:\n<|eot_id|><a>[3<|eot_id|>]"
        ],
    ),
    "Alpaca in its own words without an input": (
        {"format": "Alpaca", "prompt_template": {"name": "Alpaca"}},
        ALPACA | {"input": None},
        [
            "<u>Below is an instruction that describes a task. Write a response that appropriately completes the "
            "request.\n\n### Instruction:\nAdd.\n\n### Response:\n<|eot_id|><a>[3<|eot_id|>]"
        ],
    ),
    "Instruct with other columns": (
        {"format": "Instruct", "columns": {"input": "article", "output": "highlights"}},
        {"article": "Q", "highlights": "A"},
        ["<u>Q<|eot_id|><a>[A<|eot_id|>]"],
    ),
    "affixes of one's own": (
        {"format": "Instruct", "prompt_template": {"user": {"prefix": "(", "suffix": ")"}}},
        {"input": "Q", "output": "A"},
        ["<u>(Q)<|eot_id|><a>[A<|eot_id|>]"],
    ),
    "Summarize": (
        {"format": "Instruct", "prompt_template": {"name": "Summarize"}},
        {"input": "Q", "output": "A"},
        ["<u>Summarize this dialogue:\nQ\n---\nSummary:\n<|eot_id|><a>[A<|eot_id|>]"],
    ),
    "GrammarErrorCorrection": (
        {"format": "Instruct", "prompt_template": {"name": "GrammarErrorCorrection"}},
        {"input": "Q", "output": "A"},
        ["<u>Correct this to standard English: Q\n---\nCorrected: <|eot_id|><a>[A<|eot_id|>]"],
    ),
    "Completion takes no chat template": ({"format": "Completion"}, {"text": "Once"}, ["[Once<|im_end|>]"]),
    "a preference of texts": (
        {"format": "Preference"},
        {"prompt": "Q", "chosen": "A", "rejected": "B"},
        ["<u>Q<|eot_id|><a>[A<|eot_id|>]", "<u>Q<|eot_id|><a>[B<|eot_id|>]"],
    ),
    "a preference of whole conversations, learnt where they part": (
        {"format": "Preference"},
        {"chosen": MORE, "rejected": [*MORE[:3], {"role": "assistant", "content": "C"}]},
        [
            "<u>Q<|eot_id|><a>A<|eot_id|><u>R<|eot_id|><a>[B<|eot_id|>]",
            "<u>Q<|eot_id|><a>A<|eot_id|><u>R<|eot_id|><a>[C<|eot_id|>]",
        ],
    ),
    "a preference whose answers repeat the prompt": (
        {"format": "Preference", "columns": {"prompt": "question"}},
        {"question": "Q", "chosen": TURNS, "rejected": [TURNS[0], {"role": "assistant", "content": "B"}]},
        ["<u>Q<|eot_id|><a>[A<|eot_id|>]", "<u>Q<|eot_id|><a>[B<|eot_id|>]"],
    ),
    "a preference with turns as prompt": (
        {"format": "Preference"},
        {"prompt": MORE[:3], "chosen": "B", "rejected": [{"role": "assistant", "content": "C"}]},
        [
            "<u>Q<|eot_id|><a>A<|eot_id|><u>R<|eot_id|><a>[B<|eot_id|>]",
            "<u>Q<|eot_id|><a>A<|eot_id|><u>R<|eot_id|><a>[C<|eot_id|>]",
        ],
    ),
    "a preference between equal answers teaches nothing": (
        {"format": "Preference"},
        {"prompt": "Q", "chosen": "A", "rejected": "A"},
        ["<u>Q<|eot_id|><a>A<|eot_id|>", "<u>Q<|eot_id|><a>A<|eot_id|>"],
    ),
}


@pytest.mark.parametrize("case", CHAT)
def test_rows_inside_a_chat_template(case: str, chat: Tokenizer) -> None:
    options, row, expected = CHAT[case]
    assert marked(Formatter(RowOptions.model_validate(options), "Assistant", chat), row) == expected


ALONE: dict[str, Case] = {
    "ChatML": (
        {"prompt_template": {"name": "ChatML"}},
        {"messages": [{"role": "system", "content": "S"}, *TURNS]},
        ["<s><|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n[A<|im_end|></s>]"],
    ),
    "a question and its answer": (
        {"format": "Instruct", "prompt_template": {"name": "QuestionAnswer"}},
        {"input": "Q", "output": "A"},
        ["<s>Question: Q\n\nAnswer: [A</s>]"],
    ),
    "every answer is learnt with its end": (
        {"prompt_template": {"user": {"prefix": "U:"}, "assistant": {"prefix": " A:"}}},
        {"messages": MORE},
        ["<s>U:Q A:[A</s>]U:R A:[B</s>]"],
    ),
    "Completion": ({"format": "Completion"}, {"text": "Once"}, ["[<s>Once</s>]"]),
}


@pytest.mark.parametrize("case", ALONE)
def test_affixes_alone_make_up_the_text_where_the_model_has_no_template(case: str, base: Tokenizer) -> None:
    options, row, expected = ALONE[case]
    assert marked(Formatter(RowOptions.model_validate(options), "Assistant", base), row) == expected


@pytest.mark.parametrize(
    ("train_on", "expected"),
    [
        ("Last", "<u>Q<|eot_id|><a>A<|eot_id|><u>R<|eot_id|><a>[B<|eot_id|>]"),
        ("All", "[<u>Q<|eot_id|><a>A<|eot_id|><u>R<|eot_id|><a>B<|eot_id|>]"),
    ],
)
def test_what_carries_the_loss_can_be_chosen(train_on: str, expected: str, chat: Tokenizer) -> None:
    assert marked(Formatter(RowOptions(), train_on, chat), {"messages": MORE}) == [expected]


def test_a_model_without_template_needs_affixes(base: Tokenizer) -> None:
    with pytest.raises(ModelError, match=r"has no chat template .* or set dataset\.prompt_template"):
        Formatter(RowOptions(), "Assistant", base)


BAD: dict[str, tuple[str, dict[str, Any], str]] = {
    "ShareGPT with a strange speaker": (
        "ShareGPT",
        {"conversations": [{"from": "bing", "value": "?"}]},
        "turn 1 is from 'bing'; the speakers are human, gpt, system, user, assistant",
    ),
    "ShareGPT without speakers": (
        "ShareGPT",
        {"conversations": ["hi"]},
        'turn 1 must be an object with "from" and "value"',
    ),
    "ShareGPT without a value": ("ShareGPT", {"conversations": [{"from": "gpt"}]}, 'turn 1: "value" must be a text'),
    "ShareGPT without turns": ("ShareGPT", {}, '"conversations" must be a list with at least one turn'),
    "Alpaca without an output": (
        "Alpaca",
        {"instruction": "a", "answer": "b"},
        '"output" is missing; the columns are instruction, answer',
    ),
    "Alpaca with a number as input": (
        "Alpaca",
        {"instruction": "a", "input": 7, "output": "b"},
        '"input" must be a text',
    ),
    "Instruct without columns": ("Instruct", {}, '"input" is missing'),
    "Completion of a list": ("Completion", {"text": ["a"]}, '"text" must be a text'),
    "a preference without a rejected answer": (
        "Preference",
        {"prompt": "a", "chosen": "b"},
        '"rejected" must be a list with at least one message',
    ),
    "a preference without a question": (
        "Preference",
        {"chosen": "a", "rejected": "b"},
        '"prompt" is absent, so "chosen" must be a list that begins with the question',
    ),
    "a preference that ends with the user": (
        "Preference",
        {"prompt": "q", "chosen": [{"role": "user", "content": "x"}], "rejected": "b"},
        '"chosen" must end with a turn of the assistant',
    ),
    "turns in a text that are no JSON": ("OpenAI", {"messages": "[{"}, '"messages" is not JSON ('),
}


@pytest.mark.parametrize("case", BAD)
def test_a_row_that_is_not_of_its_format_is_told(case: str, chat: Tokenizer) -> None:
    form, row, words = BAD[case]
    with pytest.raises(RowError) as caught:
        Formatter(RowOptions.model_validate({"format": form}), "Assistant", chat).render(row)
    assert str(caught.value).startswith(words)


QUESTIONS: dict[str, tuple[dict[str, Any], dict[str, Any], Question | None]] = {
    "a conversation up to its last answer": (
        {},
        {"messages": MORE},
        Question("R", "<u>Q<|eot_id|><a>A<|eot_id|><u>R<|eot_id|><a>", "B"),
    ),
    "no answer": ({}, {"messages": TURNS[:1]}, None),
    "people read the question without affixes": (
        {"format": "Instruct", "prompt_template": {"name": "QuestionAnswer"}},
        {"input": "Q", "output": "A"},
        Question("Q", "<u>Question: Q\n\nAnswer: <|eot_id|><a>", "A"),
    ),
    "the better answer is the reference": (
        {"format": "Preference"},
        {"prompt": "Q", "chosen": "A", "rejected": "B"},
        Question("Q", "<u>Q<|eot_id|><a>", "A"),
    ),
    "half of a text asks for the other": (
        {"format": "Completion"},
        {"text": "to be or not"},
        Question("to be", "to be", "or not"),
    ),
}


@pytest.mark.parametrize("case", QUESTIONS)
def test_questions_for_samples(case: str, chat: Tokenizer) -> None:
    options, row, expected = QUESTIONS[case]
    assert Formatter(RowOptions.model_validate(options), "Assistant", chat).question(row) == expected
