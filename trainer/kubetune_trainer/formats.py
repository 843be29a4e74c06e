"""Rows of every format to texts, and which characters of them carry the loss.

The loss mask comes from rendered text: the conversation up to an answer (with the generation prompt) must be a prefix
of the whole, so the answer is what follows it.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from itertools import takewhile
from typing import Any, Final, NamedTuple

import jinja2

from kubetune_contract.architecture import ModelError
from kubetune_contract.dataset import Affixes, Columns, PromptTemplate, RowOptions, TemplateName
from kubetune_trainer.rows import Row, RowError
from kubetune_trainer.tokenizer import NO_TEMPLATE, Message, Tokenizer

ROLES: Final = ("system", "user", "assistant")
_SPEAKERS: Final = {"human": "user", "gpt": "assistant"} | {role: role for role in ROLES}
"""Names of ShareGPT's speakers."""

_ALPACA_TASK: Final = "Below is an instruction that describes a task"
_ALPACA_ORDER: Final = "Write a response that appropriately completes the request.\n\n### Instruction:\n"
_ALPACA_CONTEXT: Final = "\n\n### Input:\n"
_ALPACA_ANSWER: Final = "\n\n### Response:\n"

TEMPLATES: Final[dict[TemplateName, PromptTemplate]] = {
    # The texts of the Stanford Alpaca project, on which its models and data sets rely.
    "Alpaca": PromptTemplate(user=Affixes(prefix=f"{_ALPACA_TASK}. {_ALPACA_ORDER}", suffix=_ALPACA_ANSWER)),
    "ChatML": PromptTemplate(
        system=Affixes(prefix="<|im_start|>system\n", suffix="<|im_end|>\n"),
        user=Affixes(prefix="<|im_start|>user\n", suffix="<|im_end|>\n"),
        assistant=Affixes(prefix="<|im_start|>assistant\n", suffix="<|im_end|>"),
    ),
    "GrammarErrorCorrection": PromptTemplate(
        user=Affixes(prefix="Correct this to standard English: ", suffix="\n---\nCorrected: ")
    ),
    "QuestionAnswer": PromptTemplate(user=Affixes(prefix="Question: ", suffix="\n\nAnswer: ")),
    "Summarize": PromptTemplate(user=Affixes(prefix="Summarize this dialogue:\n", suffix="\n---\nSummary:\n")),
}
"""The named templates, with the texts that torchtune documents for them."""


class Rendered(NamedTuple):
    """A text and its (start, stop) characters that carry the loss."""

    text: str
    spans: list[tuple[int, int]]


class Question(NamedTuple):
    """A row up to its last answer."""

    text: str
    """What was asked, for people."""
    rendered: str
    """The prompt as the model sees it."""
    reference: str
    """The answer in the data."""


class Conversation(NamedTuple):
    """Turns with the template's affixes around them."""

    turns: list[Message]
    plain: list[Message]
    """The same without affixes."""


class Formatter:
    """Rows of one dataset to rendered texts: one for each row, two (chosen, rejected) for a preference.

    Raises ModelError where the model has no chat template and no prompt template stands for it.
    """

    def __init__(self, options: RowOptions, train_on: str, tokenizer: Tokenizer) -> None:
        self.options = options
        self.train_on = train_on
        self._tokenizer = tokenizer
        named = options.prompt_template.name if options.prompt_template else None
        self._template = TEMPLATES[named] if named else options.prompt_template
        if not tokenizer.has_template and self._template is None and options.format != "Completion":
            raise ModelError(NO_TEMPLATE)

    @property
    def columns(self) -> set[str]:
        """The columns that are read."""
        return {getattr(self.options.columns, name) for name in COLUMNS[self.options.format]}

    def render(self, row: Row) -> list[Rendered]:
        """The row's texts. Raises RowError for a row that cannot be used."""
        if self.options.format == "Completion":
            text = f"{self._tokenizer.begin}{self._text(row)}{self._tokenizer.end}"
            return [Rendered(text, [(0, len(text))])]
        sides = self._sides(row)
        shared = _common_turns(sides) if len(sides) == 2 else 0
        return [self._render_spans(side.turns, shared) for side in sides]

    def question(self, row: Row) -> Question | None:
        """The row up to its last answer, for the better one of two; None where there is none.

        Of a text without turns the first half asks for the second. Raises RowError for a row that cannot be used.
        """
        if self.options.format == "Completion":
            words = self._text(row).split(" ")
            asked, rest = " ".join(words[: len(words) // 2]), " ".join(words[len(words) // 2 :])
            return Question(asked, self._tokenizer.begin + asked, rest)
        side = self._sides(row)[0]
        answers = [i for i, turn in enumerate(side.turns) if turn["role"] == "assistant" and i > 0]
        if not answers:
            return None
        last = answers[-1]
        prompt = self.render_turns(side.turns[:last], add_generation_prompt=True)
        return Question(side.plain[last - 1]["content"], prompt, side.plain[last]["content"])

    def render_turns(self, turns: Sequence[Message], add_generation_prompt: bool = False) -> str:
        """Turns that have their affixes already, as the model sees them. Raises RowError."""
        if self._tokenizer.has_template:
            try:
                return self._tokenizer.render(turns, add_generation_prompt)
            except jinja2.TemplateError as error:
                raise RowError(f"the model's chat template refuses the conversation: {error}") from error
        ends = {"assistant": self._tokenizer.end}
        parts = [f"{turn['content']}{ends.get(turn['role'], '')}" for turn in turns]
        opening = self._affixes("assistant").prefix if add_generation_prompt else ""
        return self._tokenizer.begin + "".join(parts) + opening

    def _affixes(self, role: str) -> Affixes:
        return getattr(self._template, role, None) or Affixes()

    def _text(self, row: Row) -> str:
        return _cell(row, self.options.columns.text)

    def _sides(self, row: Row) -> list[Conversation]:
        parse = _PARSERS[self.options.format]
        return [self._conversation(turns) for turns in parse(row, self.options.columns)]

    def _conversation(self, turns: list[Message]) -> Conversation:
        plain = [{"role": turn["role"], "content": _joined(turn)} for turn in turns]
        return Conversation([self._wrap(turn) for turn in turns], plain)

    def _wrap(self, turn: Message) -> Message:
        affixes = self._affixes(turn["role"])
        prefix, content = affixes.prefix, _joined(turn)
        if turn.get("input") and self._template is TEMPLATES["Alpaca"]:
            prefix = f"{_ALPACA_TASK}, paired with an input that provides further context. {_ALPACA_ORDER}"
            content = f"{turn['content']}{_ALPACA_CONTEXT}{turn['input']}"
        return {"role": turn["role"], "content": f"{prefix}{content}{affixes.suffix}"}

    def _render_spans(self, turns: list[Message], shared: int) -> Rendered:
        """The rendered conversation; turns before number `shared` carry no loss, unless all tokens do."""
        text = self.render_turns(turns)
        if self.train_on == "All":
            return Rendered(text, [(0, len(text))])
        answers = [i for i, turn in enumerate(turns) if turn["role"] == "assistant" and i >= shared]
        chosen = answers[-1:] if self.train_on == "Last" else answers
        return Rendered(text, [self._answer_span(turns, turn, text) for turn in chosen])

    def _answer_span(self, turns: list[Message], turn: int, text: str) -> tuple[int, int]:
        before = self.render_turns(turns[:turn], add_generation_prompt=True)
        through = text if turn == len(turns) - 1 else self.render_turns(turns[: turn + 1])
        if not (text.startswith(before) and text.startswith(through) and len(before) < len(through)):
            raise RowError(
                f"the model's chat template renders the messages before message {turn + 1} differently once that "
                "answer follows, so the answer's tokens cannot be told apart; train on the last answer or on "
                "everything (dataset.train_on: Last or All), or change the template"
            )
        return len(before), len(through)


# --- rows to turns ---

COLUMNS: Final = {
    "OpenAI": ("messages",),
    "ShareGPT": ("conversations",),
    "Alpaca": ("instruction", "input", "output"),
    "Instruct": ("input", "output"),
    "Completion": ("text",),
    "Preference": ("prompt", "chosen", "rejected"),
}
"""Fields of Columns that a format reads."""


def _openai(row: Row, columns: Columns) -> list[list[Message]]:
    return [_turns(row, columns.messages)]


def _sharegpt(row: Row, columns: Columns) -> list[list[Message]]:
    said = _list(row, columns.conversations, "turn")
    return [[_spoken(turn, number) for number, turn in enumerate(said, start=1)]]


def _alpaca(row: Row, columns: Columns) -> list[list[Message]]:
    asked = {"role": "user", "content": _cell(row, columns.instruction)}
    if row.get(columns.input) not in (None, ""):
        asked["input"] = _cell(row, columns.input)
    return [[asked, {"role": "assistant", "content": _cell(row, columns.output)}]]


def _instruct(row: Row, columns: Columns) -> list[list[Message]]:
    question, answer = _cell(row, columns.input), _cell(row, columns.output)
    return [[{"role": "user", "content": question}, {"role": "assistant", "content": answer}]]


def _preference(row: Row, columns: Columns) -> list[list[Message]]:
    """Chosen and rejected, each from the first turn on."""
    prompt = _said(row, columns.prompt, "user") if row.get(columns.prompt) is not None else []
    sides = [_said(row, name, "assistant") for name in (columns.chosen, columns.rejected)]
    whole = [side if side[: len(prompt)] == prompt else prompt + side for side in sides]
    for name, side in zip((columns.chosen, columns.rejected), whole, strict=True):
        if len(side) < 2:
            raise RowError(f'"{columns.prompt}" is absent, so "{name}" must be a list that begins with the question')
        if side[-1]["role"] != "assistant":
            raise RowError(f'"{name}" must end with a turn of the assistant')
    return whole


_PARSERS: Final[Mapping[str, Callable[[Row, Columns], list[list[Message]]]]] = {
    "OpenAI": _openai,
    "ShareGPT": _sharegpt,
    "Alpaca": _alpaca,
    "Instruct": _instruct,
    "Preference": _preference,
}


def _common_turns(sides: Sequence[Conversation]) -> int:
    """How many turns both sides begin with."""
    pairs = zip(sides[0].turns, sides[1].turns, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _joined(turn: Message) -> str:
    return "\n\n".join(filter(None, (turn["content"], turn.get("input")))) if "input" in turn else turn["content"]


def _said(row: Row, column: str, role: str) -> list[Message]:
    """A text as one turn of `role`, or turns."""
    value = row.get(column)
    is_text = isinstance(value, str) and not value.lstrip().startswith("[{")
    return [{"role": role, "content": _cell(row, column)}] if is_text else _turns(row, column)


def _turns(row: Row, column: str) -> list[Message]:
    said = _list(row, column, "message")
    return [_message(message, number) for number, message in enumerate(said, start=1)]


def _list(row: Row, column: str, item: str) -> list[Any]:
    """A list that is not empty; CSV has it as JSON in a text."""
    value = row.get(column)
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise RowError(f'"{column}" is not JSON ({error})') from error
    if not isinstance(value, list) or not value:
        raise RowError(f'"{column}" must be a list with at least one {item}')
    return value


def _cell(row: Row, column: str) -> str:
    if not isinstance(value := row.get(column), str):
        missing = "is missing" if value is None else "must be a text"
        there = ", ".join(map(str, row)) if value is None else ""
        raise RowError(f'"{column}" {missing}' + (f"; the columns are {there}" if there else ""))
    return value


def _message(message: Any, number: int) -> Message:
    if not isinstance(message, dict):
        raise RowError(f'message {number} must be an object with "role" and "content"')
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise RowError(f"message {number} has the role {role!r}; the roles are {', '.join(ROLES)}")
    if not isinstance(content, str):
        raise RowError(f'message {number}: "content" must be a text')
    return {"role": role, "content": content}


def _spoken(turn: Any, number: int) -> Message:
    if not isinstance(turn, dict):
        raise RowError(f'turn {number} must be an object with "from" and "value"')
    speaker, value = turn.get("from"), turn.get("value")
    role = _SPEAKERS.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        raise RowError(f"turn {number} is from {speaker!r}; the speakers are {', '.join(_SPEAKERS)}")
    if not isinstance(value, str):
        raise RowError(f'turn {number}: "value" must be a text')
    return {"role": role, "content": value}
