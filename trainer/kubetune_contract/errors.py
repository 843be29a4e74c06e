"""How a wrong configuration is told: all problems at once, each with field, value and the nearest right name."""

import difflib
import re
from collections.abc import Callable, Iterable
from typing import Any

from pydantic import BaseModel, ValidationError

from kubetune_contract.base import snake
from kubetune_contract.exit_codes import ExitCode, JobError

_CAMEL = re.compile(r"\b[a-z]+(?:[A-Z][a-z0-9]*)+\b")
"""A field in the text of a rule."""


class ConfigError(JobError):
    """The configuration cannot work. `problems` has one sentence for each field."""

    exit_code = ExitCode.INVALID_CONFIG

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("; ".join(self.problems))


def explain(error: ValidationError, model: type[BaseModel], spell: Callable[[str], str] = snake) -> list[str]:
    """One sentence for each problem of `model`'s validation.

    `spell` spells the field names: snake for files, to_camel for manifests.
    """
    return [_sentence(problem, model, spell) for problem in error.errors(include_url=False)]


def _sentence(problem: Any, model: type[BaseModel], spell: Callable[[str], str]) -> str:
    names = [str(part) for part in problem["loc"]]
    path = ".".join(name if name.isdigit() else spell(name) for name in names)
    value = problem["input"]
    match problem["type"]:
        case "extra_forbidden":
            return f"{path}: unknown field{_nearest(names, model, spell)}"
        case "missing":
            return f"{path}: a value is required"
        case "value_error":
            prefix = f"{path}: " if path else ""
            return prefix + _CAMEL.sub(lambda word: spell(word[0]), str(problem["ctx"]["error"]))
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
