"""Where models and data come from, as a person writes it."""

from typing import Annotated, ClassVar, Final

from pydantic import Field

from kubetune_contract.base import ContractModel, Rule, snake
from kubetune_contract.dataset import (
    MIXTURE_RULE,
    VOLUME_PATH_RULE,
    DatasetOptions,
    RowOptions,
    ValidationOptions,
    VolumePath,
    stays_inside,
)

DnsName = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$", max_length=253)]
Patterns = list[Annotated[str, Field(min_length=1, max_length=256)]]


class SecretKey(ContractModel):
    """One key of a Secret in the job's namespace."""

    name: DnsName
    """Name of the Secret."""
    key: str = Field(default="token", min_length=1, max_length=253, pattern=r"^[-._a-zA-Z0-9]+$")
    """Key in the Secret."""


class HuggingFaceSource(ContractModel):
    """A model repository of the Hugging Face Hub."""

    repo: str = Field(pattern=r"^[A-Za-z0-9._-]+/[A-Za-z0-9._-]+$", max_length=256)
    """Repository, as owner/name."""
    revision: str = Field(default="main", pattern=r"^[A-Za-z0-9._/-]+$", max_length=256)
    """Branch, tag or commit. A branch is looked up when its files first come to the volume, and not again."""
    ignore_patterns: Patterns = Field(default=[], max_length=32)
    """Files that are not downloaded, as shell patterns."""
    token_secret_ref: SecretKey | None = None
    """Access token for gated or private repositories."""


class HuggingFaceData(HuggingFaceSource):
    """A dataset repository of the Hugging Face Hub."""

    path: VolumePath | None = None
    """File or folder in the repository. Without it, all data files of the split are taken."""
    split: str | None = Field(default=None, min_length=1, max_length=256)
    """Split whose files are taken: those with its name in their path. Without path and split: train."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            cel="!has(self.path) || !self.path.split('/').exists(step, step in ['', '.', '..'])",
            holds=lambda source: source.path is None or stays_inside(source.path),
            message="path {path} must be a path below the repository's root: without a leading '/' and without '..'",
        ),
        Rule(
            cel="!has(self.path) || !has(self.split)",
            holds=lambda source: source.path is None or source.split is None,
            message="path and split exclude each other: path says which files are taken",
        ),
    )


class SecretName(ContractModel):
    """A Secret in the job's namespace."""

    name: DnsName
    """Name of the Secret."""


class S3Source(ContractModel):
    """A folder of a bucket that speaks S3."""

    uri: str = Field(pattern=r"^s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/[^/\r\n]+)*/?$", max_length=1024)
    """What to download, as s3://bucket/prefix: all objects below the prefix, or the one object of that name."""
    endpoint: str | None = Field(default=None, pattern=r"^https?://[A-Za-z0-9.-]+(:[0-9]+)?/?$", max_length=256)
    """Base URL of a service other than Amazon's, such as `https://minio.storage.svc:9000`."""
    region: str = Field(default="us-east-1", pattern=r"^[a-z0-9-]+$", max_length=64)
    """Region of the bucket; other services than Amazon's mostly take any."""
    ignore_patterns: Patterns = Field(default=[], max_length=32)
    """Objects that are not downloaded, as shell patterns over what follows the prefix."""
    credentials_secret_ref: SecretName | None = None
    """Secret with the keys AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, and AWS_SESSION_TOKEN for temporary
    credentials. Without it, the bucket must be public."""


def _places(fields: str, message: str, *others: str) -> Rule:
    """Exactly one of the places, and of the other fields, is given."""
    names = ["volumePath", "huggingFace", "s3", *others]
    given = ", ".join(f"has(self.{name})" for name in names)
    return Rule(
        cel=f"[{given}].exists_one(given, given)",
        holds=lambda model: sum(getattr(model, snake(name)) is not None for name in names) == 1,
        message=message.format(fields),
    )


class ModelSource(ContractModel):
    """Where the base model comes from: exactly one of the three."""

    volume_path: VolumePath | None = None
    """Folder on the models volume that already holds the weights, in Hugging Face layout."""
    hugging_face: HuggingFaceSource | None = None
    """Repository to download onto the models volume, once for all jobs."""
    s3: S3Source | None = None
    """Folder of a bucket to download onto the models volume, once for all jobs."""

    rules: ClassVar[tuple[Rule, ...]] = (
        VOLUME_PATH_RULE,
        _places("volumePath, huggingFace and s3", "model needs exactly one of {}"),
    )


class DataPlace(ContractModel):
    """Where rows come from: exactly one of the three."""

    volume_path: VolumePath | None = None
    """File on the models volume: JSON Lines, JSON, Parquet or CSV; or a folder of such files."""
    hugging_face: HuggingFaceData | None = None
    """Dataset repository to download onto the models volume, once for all jobs."""
    s3: S3Source | None = None
    """Object or folder of a bucket to download onto the models volume, once for all jobs."""

    def place(self) -> "DataPlace":
        """The place alone."""
        return DataPlace.model_construct(volume_path=self.volume_path, hugging_face=self.hugging_face, s3=self.s3)


_ONE_PLACE: Final = _places("volumePath, huggingFace and s3", "exactly one of {} is required")


class MixedDatasetSpec(RowOptions, DataPlace):
    """A further dataset."""

    rules: ClassVar[tuple[Rule, ...]] = (VOLUME_PATH_RULE, _ONE_PLACE)


class DatasetSpec(DatasetOptions, DataPlace):
    """The training data and how they are read."""

    mixture: list[MixedDatasetSpec] = Field(default=[], max_length=16)
    """Further datasets, mixed with this one by their weights."""

    rules: ClassVar[tuple[Rule, ...]] = (*DatasetOptions.rules, VOLUME_PATH_RULE, _ONE_PLACE, MIXTURE_RULE)


class ValidationSpec(ValidationOptions, DataPlace):
    """Held-out data: its loss is measured before the first step and after the last."""

    rules: ClassVar[tuple[Rule, ...]] = (
        VOLUME_PATH_RULE,
        _places("volumePath, huggingFace, s3 and fraction", "exactly one of {} is required", "fraction"),
    )
