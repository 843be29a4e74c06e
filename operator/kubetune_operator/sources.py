"""Where models and data come from, as a person writes it."""

from typing import Annotated, ClassVar

from pydantic import Field

from kubetune_contract.base import ContractModel, Rule
from kubetune_contract.dataset import (
    MIXTURE_RULE,
    VOLUME_PATH_RULE,
    DatasetOptions,
    RowOptions,
    ValidationOptions,
    VolumePath,
)

DnsName = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$", max_length=253)]


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
    """Branch, tag or commit."""
    ignore_patterns: list[Annotated[str, Field(min_length=1, max_length=256)]] = Field(default=[], max_length=32)
    """Files that are not downloaded, as shell patterns."""
    token_secret_ref: SecretKey | None = None
    """Access token for gated or private repositories."""


class ModelSource(ContractModel):
    """Where the base model comes from: exactly one of the two."""

    volume_path: VolumePath | None = None
    """Folder on the models volume that already holds the weights, in Hugging Face layout."""
    hugging_face: HuggingFaceSource | None = None
    """Repository to download onto the models volume, once for all jobs."""

    rules: ClassVar[tuple[Rule, ...]] = (
        VOLUME_PATH_RULE,
        Rule(
            cel="has(self.volumePath) != has(self.huggingFace)",
            holds=lambda model: (model.volume_path is None) != (model.hugging_face is None),
            message="model needs exactly one of volumePath and huggingFace",
        ),
    )


class MixedDatasetSpec(RowOptions):
    """A further dataset."""

    volume_path: VolumePath
    """File on the models volume: JSON Lines, JSON, Parquet or CSV; or a folder of such files."""

    rules: ClassVar[tuple[Rule, ...]] = (VOLUME_PATH_RULE,)


class DatasetSpec(DatasetOptions):
    """The training data and how they are read."""

    volume_path: VolumePath
    """File on the models volume: JSON Lines, JSON, Parquet or CSV; or a folder of such files."""
    mixture: list[MixedDatasetSpec] = Field(default=[], max_length=16)
    """Further datasets, mixed with this one by their weights."""

    rules: ClassVar[tuple[Rule, ...]] = (*DatasetOptions.rules, VOLUME_PATH_RULE, MIXTURE_RULE)


class ValidationSpec(ValidationOptions):
    """Held-out data: its loss is measured before the first step and after the last."""

    volume_path: VolumePath | None = None
    """File on the models volume, in the format of the training data."""

    rules: ClassVar[tuple[Rule, ...]] = (
        VOLUME_PATH_RULE,
        Rule(
            cel="has(self.volumePath) != has(self.fraction)",
            holds=lambda validation: (validation.volume_path is None) != (validation.fraction is None),
            message="exactly one of volumePath and fraction is required",
        ),
    )
