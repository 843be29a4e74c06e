"""What is wrong with a manifest, all at once and before the API server is asked. Pure.

The judges are the operator's own: what passes here is refused by neither the CRD's schema nor the operator.
"""

import re
from copy import deepcopy
from typing import Any, Final

from pydantic import BaseModel, ValidationError
from pydantic.alias_generators import to_camel

from kubetune_contract.base import snake
from kubetune_kubectl.jobs import model_in
from kubetune_kubectl.kubectl import Object
from kubetune_kubectl.manifest_file import nearest
from kubetune_operator.api import FineTuneJob, FineTuneJobSpec, Overrides, parse
from kubetune_operator.build import run_config
from kubetune_operator.errors import InvalidJob
from kubetune_operator.names import MAX_NAME_LENGTH, NAME_PATTERN, NAME_RULE

_PARTS: Final = ("apiVersion", "kind", "metadata", "spec")
_PLACEHOLDERS: Final[dict[str, Any]] = {
    "model": {"volumePath": "-"},
    "dataset": {"volumePath": "-"},
    "storage": {"models": {"claimName": "x"}, "output": {"claimName": "x"}},
}
"""Stand for what is missing or wrong, so that the rest is judged too."""


def problems_of(body: Object) -> list[str]:
    """One sentence for each problem, spelt as in the manifest."""
    found = [*_about_parts(body), *_about_name(body["metadata"])]
    found += _misspelt(FineTuneJobSpec, body["spec"], "spec")
    return list(dict.fromkeys([*found, *_about_spec(body)]))


def _about_parts(body: Object) -> list[str]:
    unknown = [key for key in body if key not in (*_PARTS, "status")]
    return [f"{key}: unknown field; {nearest(str(key), _PARTS)}" for key in unknown]


def _about_name(metadata: Object) -> list[str]:
    name = metadata.get("name")
    if name is None:
        return ["metadata.name: a value is required; --set metadata.name=NAME gives one"]
    if not isinstance(name, str):
        return [f"metadata.name: it must be text, but it is {name!r}: put it in quotes"]
    if len(name) > MAX_NAME_LENGTH:
        return [f"metadata.name: {name} has {len(name)} characters; at most {MAX_NAME_LENGTH} are allowed"]
    return [] if re.match(NAME_PATTERN, name) else [f"metadata.name: {name} {NAME_RULE}"]


def _misspelt(model: type[BaseModel], document: Any, path: str) -> list[str]:
    """Fields in snake_case: our models take them, as in files of `tune`, but the API server does not."""
    if isinstance(document, list):
        return [text for index, item in enumerate(document) for text in _misspelt(model, item, f"{path}.{index}")]
    if not isinstance(document, dict):
        return []
    found = []
    for key, value in document.items():
        field = model.model_fields.get(snake(str(key)))
        if field is None:
            continue
        if key != field.alias:
            found.append(f"{path}.{key}: unknown field; did you mean {field.alias}?")
        marked = next((mark.model for mark in field.metadata if isinstance(mark, Overrides)), None)
        below = marked or model_in(field.annotation)
        found += _misspelt(below, value, f"{path}.{key}") if below else []
    return found


def _about_spec(body: Object) -> list[str]:
    metadata = {"name": "-", "namespace": "-", "uid": "-" * 8}
    spec = deepcopy(body["spec"])
    found: list[str] = []
    try:
        job = parse({"metadata": metadata, "spec": spec})
    except InvalidJob as error:
        found += error.problems
        job = _repaired(metadata, spec, error)
    try:
        run_config(job)
    except InvalidJob as error:
        found += error.problems
    return found


def _repaired(metadata: Object, spec: Object, error: InvalidJob) -> FineTuneJob:
    """The job with placeholders for the fields of its spec that are wrong."""
    assert isinstance(error.__cause__, ValidationError), "parse says why"
    wrong = {to_camel(snake(str(problem["loc"][0]))) for problem in error.__cause__.errors() if problem["loc"]}
    kept = {key: value for key, value in spec.items() if to_camel(snake(str(key))) not in wrong}
    return parse({"metadata": metadata, "spec": {**_PLACEHOLDERS, **kept}})
