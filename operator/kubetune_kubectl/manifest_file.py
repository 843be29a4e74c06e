"""The FineTuneJob in a file, with what the command line sets in it. Pure, but for reading the file."""

import difflib
import secrets
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, TextIO

import yaml

from kubetune_contract import yaml_text
from kubetune_kubectl.errors import InvalidManifest
from kubetune_kubectl.kubectl import Object
from kubetune_operator.api import API_VERSION, KIND

STDIN: Final = "-"
_ROOTS: Final = ("spec", "metadata")
_SUFFIX_LETTERS: Final = "bcdfghjklmnpqrstvwxz2456789"
"""As the API server's own: no vowels, so that no words come out."""
_SUFFIX_LENGTH: Final = 5


def read(source: str, stdin: TextIO | None = None) -> Object:
    """The one FineTuneJob of a file, or of standard input where the source is `-`. Raises InvalidManifest."""
    try:
        text = (stdin or sys.stdin).read() if source == STDIN else Path(source).read_text()
        found = yaml_text.documents(text)
    except (OSError, UnicodeDecodeError) as error:
        reason = (error.strerror or error) if isinstance(error, OSError) else "it is not text"
        raise InvalidManifest(source, [f"it cannot be read: {reason}"]) from error
    except yaml.YAMLError as error:
        raise InvalidManifest(source, [f"it is not YAML: {' '.join(str(error).split())}"]) from error
    if len(found) != 1:
        count = f"it holds {len(found)} documents" if found else "it is empty"
        raise InvalidManifest(source, [f"{count}: give one FineTuneJob (`kubectl apply -f` takes any number)"])
    problem = _about_kind(found[0])
    if problem:
        raise InvalidManifest(source, [problem])
    body: Object = found[0]
    return body


def _about_kind(body: Any) -> str | None:
    if not isinstance(body, dict):
        return f"it holds {body!r}, not a FineTuneJob"
    if body.get("kind") != KIND:
        return f"kind: it is {body.get('kind')!r}, but submit takes a {KIND} (`kubectl apply -f` takes any kind)"
    if body.get("apiVersion") != API_VERSION:
        return f"apiVersion: it is {body.get('apiVersion')!r}, but it must be {API_VERSION}"
    return next(
        (f"{part}: it must hold keys and values" for part in _ROOTS if not isinstance(body.setdefault(part, {}), dict)),
        None,
    )


def set_values(body: Object, settings: Sequence[str]) -> list[str]:
    """Set each KEY=VALUE in the manifest; returns what is wrong with them."""
    return [problem for setting in settings if (problem := _set(body, setting)) is not None]


def _set(body: Object, setting: str) -> str | None:
    path, equals, text = setting.partition("=")
    if not equals or not path:
        return f"--set {setting}: give KEY=VALUE, such as training.epochs=3 or metadata.name=second"
    try:
        value = yaml_text.parse(text)
    except yaml.YAMLError:
        return f"--set {path}: {text!r} is not a YAML value"
    parts = path.split(".")
    if parts[0] not in _ROOTS:
        parts.insert(0, "spec")
    return _put(body, parts, value, path)


def _put(body: Any, parts: list[str], value: Any, path: str) -> str | None:
    place = body
    for part, below in zip(parts, [*parts[1:], None], strict=True):
        key: Any = part
        if isinstance(place, list):
            if not part.isdigit() or int(part) >= len(place):
                return f"--set {path}: {part!r} is no place in a list of {len(place)}"
            key = int(part)
        elif not isinstance(place, dict):
            return f"--set {path}: there is a value, {place!r}, where {part} should be below it"
        if below is None:
            _assign(place, key, value)
        else:
            place = place[key] if isinstance(place, list) else place.setdefault(key, {})
    return None


def _assign(place: Any, key: Any, value: Any) -> None:
    """null takes a key away, as in a merge patch."""
    if value is None and isinstance(place, dict):
        place.pop(key, None)
    else:
        place[key] = value


def settle_name(body: Object) -> str | None:
    """The name that was made from metadata.generateName; None where the manifest has a name of its own.

    The API server makes such names on a create only, and a server-side apply must name its object.
    """
    metadata = body["metadata"]
    prefix = metadata.pop("generateName", None)
    if prefix is None or "name" in metadata:
        return None
    name = str(prefix) + "".join(secrets.choice(_SUFFIX_LETTERS) for _ in range(_SUFFIX_LENGTH))
    metadata["name"] = name
    return name


def nearest(word: str, words: Sequence[str]) -> str:
    """The end of a sentence about an unknown word."""
    near = difflib.get_close_matches(word, words, n=1)
    return f"did you mean {near[0]}?" if near else f"the fields here are {', '.join(words)}"
