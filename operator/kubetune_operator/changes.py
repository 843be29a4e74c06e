"""What of a FineTuneJob's spec may be changed once it exists: written once, judged by the API server and by Python."""

import json
from collections.abc import Callable, Iterator
from typing import Any, Final, NamedTuple

from pydantic import BaseModel

from kubetune_operator.api import FineTuneJobSpec

ALWAYS: Final = ("suspend", "activeDeadlineSeconds", "ttlSecondsAfterFinished", "failurePolicy")
"""Fields that may be changed at any time."""
WHILE_SUSPENDED: Final = ("workers.nodes", "workers.gpusPerNode", "workers.resources")
"""Fields that may be changed while spec.suspend is true, and together with it. They take effect on resumption."""


class Transition(NamedTuple):
    """A rule about an update."""

    cel: str
    """CEL over the `self` and `oldSelf` of the spec."""
    holds: Callable[[FineTuneJobSpec, FineTuneJobSpec], bool]
    """The same rule over the new and the old spec."""
    message: str
    """Which field it is about, and what to do instead."""


def transitions() -> Iterator[Transition]:
    """The rules, one for each field that cannot be changed freely."""
    for name, field in FineTuneJobSpec.model_fields.items():
        path = field.alias or name
        if path in ALWAYS:
            continue
        if any(other.startswith(f"{path}.") for other in WHILE_SUSPENDED):
            assert isinstance(field.annotation, type), f"{name} is optional: its fields need a guard of their own"
            yield from _below(name, path, field.annotation)
        else:
            yield _fixed(path, (name,))


def problems(new: FineTuneJobSpec, old: FineTuneJobSpec) -> list[str]:
    """What the API server says against the update; empty if it may be made."""
    return [rule.message for rule in transitions() if not rule.holds(new, old)]


def gang(spec: FineTuneJobSpec) -> str:
    """What a worker Job takes from the fields that may change under it, as JSON.

    Nothing else: a new version of the operator, or a new setting, is no reason to stop workers.
    """
    kept = {path.removeprefix("workers.") for path in WHILE_SUSPENDED}
    return json.dumps({name: value for name, value in spec.workers.to_dict().items() if name in kept}, sort_keys=True)


def changed(spec: FineTuneJobSpec, known: str) -> str | None:
    """How the workers differ from those of an earlier gang(), in a sentence; None if they do not."""
    before, after = json.loads(known), json.loads(gang(spec))
    if before == after:
        return None
    processes = [max(1, of["gpusPerNode"]) * of["nodes"] for of in (before, after)]
    if processes[0] == processes[1]:
        return "The workers have changed (workers.resources, nodes or gpusPerNode)"
    return (
        f"The workers have changed from {processes[0]} to {processes[1]} processes, which see the same batches but "
        "draw dropout anew and round sums in another order"
    )


def _below(name: str, path: str, model: type[BaseModel]) -> Iterator[Transition]:
    for below, field in model.model_fields.items():
        inner = f"{path}.{field.alias or below}"
        yield (_while_suspended if inner in WHILE_SUSPENDED else _fixed)(inner, (name, below))


def _fixed(path: str, names: tuple[str, ...]) -> Transition:
    return Transition(_same(path), _equal(names), f"spec.{path} cannot be changed: create a new FineTuneJob")


def _while_suspended(path: str, names: tuple[str, ...]) -> Transition:
    equal = _equal(names)
    return Transition(
        cel=f"self.suspend || oldSelf.suspend || ({_same(path)})",
        holds=lambda new, old: new.suspend or old.suspend or equal(new, old),
        message=f"spec.{path} can only be changed while the job is suspended: set spec.suspend to true as well",
    )


def _same(path: str) -> str:
    """Equality alone would let an optional field be added or taken away."""
    new, old = f"self.{path}", f"oldSelf.{path}"
    return f"has({new}) == has({old}) && (!has({new}) || {new} == {old})"


def _equal(names: tuple[str, ...]) -> Callable[[FineTuneJobSpec, FineTuneJobSpec], bool]:
    def value(spec: Any) -> Any:
        for name in names:
            spec = getattr(spec, name)
        return spec

    return lambda new, old: bool(value(new) == value(old))
