"""How a wrong configuration is told: all problems at once, each with field, value and the nearest right name."""

import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import deepcopy
from itertools import takewhile
from typing import Any, Final, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic.alias_generators import to_camel

from kubetune_contract.base import BrokenRules, snake
from kubetune_contract.exit_codes import ExitCode, JobError

_CAMEL = re.compile(r"\b[a-z]+(?:[A-Z][a-z0-9]*)+\b")
"""A field in the text of a rule that is spelt otherwise in files."""
_FIELD: Final = re.compile(r"(?<![\w/.-])[a-z_]+(?:\.[a-z0-9_]+)+(?![\w/])")
"""What may be a field of a file, with the sections that it is in."""
_WORD: Final = re.compile(r"[A-Za-z0-9]+")
_ROUNDS: Final = 8
"""How often defaults are put in for what is wrong: more than configurations are deep."""

M = TypeVar("M", bound=BaseModel)


class ConfigError(JobError):
    """The configuration cannot work. `problems` has one sentence for each field."""

    exit_code = ExitCode.INVALID_CONFIG

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("; ".join(self.problems))


def validated(model: type[M], values: Mapping[str, Any], spell: Callable[[str], str] = snake) -> M:
    """`values` as a `model`. Raises ConfigError with all problems: those of fields, then those between fields."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        found = explain(error, model, spell)
        hidden = [_about_rule(*problem, spell) for problem in _hidden(error, model, values)]
        raise ConfigError(dict.fromkeys([*found, *hidden])) from error


def _hidden(
    error: ValidationError, model: type[BaseModel], values: Mapping[str, Any]
) -> Iterator[tuple[list[str], str]]:
    """The places and messages of broken rules that pydantic does not look at as long as something below them is wrong.

    They show once what is wrong has its default. A rule that names one of the wrong fields is left out: it may hold
    once the field is right.
    """
    names: set[str] = set()
    repaired = deepcopy(dict(values))
    for _ in range(_ROUNDS):
        wrong = [problem for problem in error.errors(include_url=False) if problem["loc"]]
        for problem in wrong:
            name = to_camel(snake(_repair(repaired, problem)))
            names |= {name} if problem["type"] != "missing" else set()
        try:
            model.model_validate(repaired)
        except ValidationError as left:
            error = left
        else:
            return
        for problem in error.errors(include_url=False):
            for message in _messages(problem):
                if not names & set(_WORD.findall(message.partition(": ")[0])):
                    yield [str(part) for part in problem["loc"]], message
        if not wrong:
            return


def _repair(values: Any, problem: Any) -> str:
    """Takes the wrong field out of `values`, or puts something in for one that is missing. Returns its name."""
    names: Iterable[str] = takewhile(lambda part: isinstance(part, str), problem["loc"])
    *above, name = names
    for part in above:
        values = next((below for key, below in values.items() if snake(str(key)) == snake(part)), {})
    for key in [key for key in values if snake(str(key)) == snake(name)]:
        del values[key]
    if problem["type"] == "missing":
        values[name] = "-" if above else {"path": "-"} if name in ("model", "dataset") else "-"
    return name


def explain(error: ValidationError, model: type[BaseModel], spell: Callable[[str], str] = snake) -> list[str]:
    """One sentence for each problem of `model`'s validation.

    `spell` spells the field names: snake for files, to_camel for manifests.
    """
    return [sentence for problem in error.errors(include_url=False) for sentence in _sentences(problem, model, spell)]


def _sentences(problem: Any, model: type[BaseModel], spell: Callable[[str], str]) -> list[str]:
    names = [str(part) for part in problem["loc"]]
    if messages := _messages(problem):
        return [_about_rule(names, message, spell) for message in messages]
    return [_about_field(names, problem, model, spell)]


def _messages(problem: Any) -> list[str]:
    """The messages of the rules that are broken; none where it is about a field's value."""
    if problem["type"] != "value_error":
        return []
    cause = problem["ctx"]["error"]
    return cause.messages if isinstance(cause, BrokenRules) else [str(cause)]


def _about_rule(names: list[str], message: str, spell: Callable[[str], str]) -> str:
    prefix = f"{_path(names, spell)}: " if names else ""
    return prefix + in_words_of(message, spell)


def in_words_of(message: str, spell: Callable[[str], str]) -> str:
    """A rule's message with its fields spelt as the reader spells them."""
    return _CAMEL.sub(lambda word: spell(word[0]), message)


def as_in_manifests(text: str, model: type[BaseModel]) -> str:
    """The text with `model`'s fields spelt as in a manifest: dataset.train_on becomes dataset.trainOn."""

    def respell(found: re.Match[str]) -> str:
        *above, name = found[0].split(".")
        owner = _model_at(above, model)
        if owner is None or name not in owner.model_fields:
            return found[0]
        return _path([*above, "volume_path" if name == "path" else name], to_camel)

    return _FIELD.sub(respell, text)


def _path(names: list[str], spell: Callable[[str], str]) -> str:
    return ".".join(name if name.isdigit() else spell(name) for name in names)


def _about_field(names: list[str], problem: Any, model: type[BaseModel], spell: Callable[[str], str]) -> str:
    path = _path(names, spell)
    value = problem["input"]
    match problem["type"]:
        case "extra_forbidden":
            return f"{path}: unknown field{_nearest(names, model, spell)}"
        case "missing":
            return f"{path}: a value is required"
        case _:
            return f"{path}: {problem['msg'][0].lower()}{problem['msg'][1:]}, but it is {value!r}"


def _nearest(names: list[str], model: type[BaseModel], spell: Callable[[str], str]) -> str:
    fields = [spell(name) for name in (_model_at(names[:-1], model) or model).model_fields]
    near = difflib.get_close_matches(spell(names[-1]), fields, n=1)
    return f"; did you mean {near[0]}?" if near else f"; the fields here are {', '.join(fields)}"


def _model_at(names: list[str], model: type[BaseModel]) -> type[BaseModel] | None:
    for name in names:
        field = model.model_fields.get(snake(name))
        candidates = [field.annotation, *getattr(field.annotation, "__args__", ())] if field else []
        inner = next((kind for kind in candidates if isinstance(kind, type) and issubclass(kind, BaseModel)), None)
        if inner is None:
            return None
        model = inner
    return model
