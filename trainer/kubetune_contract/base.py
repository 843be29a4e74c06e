"""The base of all contract models: closed, immutable, camelCase outside, snake_case inside, rules beside the fields."""

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, model_validator
from pydantic.alias_generators import to_camel, to_snake


def snake(name: str) -> str:
    """A field's name in snake_case, from either spelling. (pydantic alone makes beta_1 of beta1.)"""
    return name if name == name.lower() else to_snake(name)


class BrokenRules(ValueError):
    """Rules between fields that do not hold."""

    def __init__(self, messages: list[str]) -> None:
        self.messages = messages
        super().__init__("; ".join(messages))


class Rule(NamedTuple):
    """A cross-field rule, written once for both judges: CEL for the API server, Python for everything else."""

    cel: str | None
    """CEL over `self` with camelCase names. Optional fields are guarded by has(): an override need not name both sides.
    None where the schema itself already says it."""
    holds: Callable[[Any], bool]
    """The same rule over a complete model."""
    message: str
    """What must be true and what to change. Names fields in camelCase; `{field}` stands for the field's value."""

    def tell(self, model: "ContractModel") -> str:
        """The message about this model."""
        return self.message.format_map(model.model_dump(by_alias=True))


class ContractModel(BaseModel):
    """A closed model: an unknown key is an error, every field has its meaning under it."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        alias_generator=to_camel,
        populate_by_name=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
    )
    rules: ClassVar[tuple[Rule, ...]] = ()

    @model_validator(mode="after")
    def _keep_rules(self) -> Self:
        broken = [rule.tell(self) for rule in self.rules if not rule.holds(self)]
        if broken:
            raise BrokenRules(broken)
        return self

    def to_json(self, indent: int | None = None) -> str:
        """The document as it crosses the wall: camelCase, fields without a value left out."""
        return self.model_dump_json(by_alias=True, exclude_none=True, indent=indent)

    def to_dict(self) -> dict[str, Any]:
        """The document as JSON values: camelCase, fields without a value left out."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)
