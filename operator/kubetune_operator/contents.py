"""What a FineTuneJob reads from the models claim: its model, and the data that are downloaded there. Pure."""

import hashlib
import json
import re
from collections.abc import Iterator
from typing import Any, Final, Literal, NamedTuple, TypeVar

from pydantic import BaseModel, ValidationError

from kubetune_contract.staging import StageSource
from kubetune_operator.api import FineTuneJobSpec
from kubetune_operator.sources import (
    DataPlace,
    DatasetSpec,
    HuggingFaceSource,
    ModelSource,
    S3Source,
    ValidationSpec,
)

S = TypeVar("S", bound=BaseModel)

_SECRETS: Final = ("tokenSecretRef", "credentialsSecretRef")
_LONGEST_NAME: Final = 64
"""Characters of a bucket's folder in the name of ours."""


class Content(NamedTuple):
    """One model or dataset, in a folder of its own on the models claim."""

    kind: Literal["Model", "Dataset"]
    place: ModelSource | DataPlace

    @property
    def path(self) -> str:
        """Its folder, relative to the root of the models claim."""
        return folder_of(self.place)

    @property
    def what(self) -> str:
        """What people call it."""
        if self.place.hugging_face is not None:
            return f"{self.place.hugging_face.repo} ({self.place.hugging_face.revision})"
        return self.place.s3.uri if self.place.s3 is not None else self.path

    @property
    def source(self) -> StageSource:
        """What its staging container is asked to do."""
        hub, bucket = self.place.hugging_face, self.place.s3
        wanted: dict[str, Any] = {"content": self.kind, "path": self.path}
        if hub is not None:
            wanted |= {"repo": hub.repo, "revision": hub.revision, "ignore_patterns": hub.ignore_patterns}
            wanted |= {"file": getattr(hub, "path", None), "split": getattr(hub, "split", None)}
        elif bucket is not None:
            wanted |= {"uri": bucket.uri, "endpoint": bucket.endpoint, "region": bucket.region}
            wanted |= {"ignore_patterns": bucket.ignore_patterns}
        return StageSource.model_validate(wanted)


def contents(spec: FineTuneJobSpec) -> tuple[Content, ...]:
    """Everything that is staged for the job, each once, the model first.

    Data that lie on the volume are not: the workers look at them before anything else. Of a section that cannot be read
    nothing is taken; run_config() tells what is wrong with it.
    """
    found = {"": Content("Model", spec.model)}
    for place in _data(spec):
        if place.volume_path is None:
            content = Content("Dataset", place)
            found.setdefault(content.path, content)
    return tuple(found.values())


def _data(spec: FineTuneJobSpec) -> Iterator[DataPlace]:
    dataset = _read(DatasetSpec, spec.dataset)
    if dataset is not None:
        yield dataset.place()
        yield from (other.place() for other in dataset.mixture)
    validation = _read(ValidationSpec, spec.validation)
    if validation is not None and validation.fraction is None:
        yield validation.place()


def _read(model: type[S], section: dict[str, Any] | None) -> S | None:
    try:
        return None if section is None else model.model_validate(section)
    except ValidationError:
        return None


def folder_of(place: ModelSource | DataPlace) -> str:
    """Folder of the files, relative to the root of the models claim.

    Who downloads does not change what is downloaded: Secrets are no part of its name.
    """
    if place.hugging_face is not None:
        return _hub_folder(place.hugging_face, "" if isinstance(place, ModelSource) else "datasets--")
    if place.s3 is not None:
        return _bucket_folder(place.s3)
    assert place.volume_path is not None, "exactly one place is given"
    return place.volume_path


def _hub_folder(source: HuggingFaceSource, prefix: str) -> str:
    return f"huggingface/{prefix}{source.repo.replace('/', '--')}-{_files_digest(source)}"


def _bucket_folder(source: S3Source) -> str:
    bucket, _, prefix = source.uri.removeprefix("s3://").rstrip("/").partition("/")
    last = re.sub(r"[^A-Za-z0-9._-]", "-", prefix.rpartition("/")[2])[-_LONGEST_NAME:]
    return f"s3/{bucket}--{last}-{_files_digest(source)}"


def _files_digest(source: HuggingFaceSource | S3Source) -> str:
    return digest({key: value for key, value in source.to_dict().items() if key not in _SECRETS})


def digest(document: Any) -> str:
    """A short name for a JSON document."""
    text = json.dumps(document, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:10]
