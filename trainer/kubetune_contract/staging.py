"""What staging is asked to do, leaves beside the weights (`.complete`) and tells the operator."""

from typing import ClassVar, Literal

from pydantic import Field

from kubetune_contract.architecture import LlamaSizes
from kubetune_contract.base import ContractModel, Rule


class StageSource(ContractModel):
    """What the staging container is asked to do (`stage --source JSON`): download the files, or check what is there."""

    content: Literal["Model", "Dataset"] = "Model"
    """What the files are."""
    path: str = Field(min_length=1)
    """Their folder, relative to the root of the models claim."""
    repo: str | None = None
    """Repository of the Hugging Face Hub to download from."""
    revision: str = "main"
    """Branch, tag or commit of the repository."""
    file: str | None = None
    """File or folder in the repository of a dataset."""
    split: str | None = None
    """Split of a dataset whose files are wanted."""
    uri: str | None = None
    """Bucket and prefix to download from, as s3://bucket/prefix."""
    endpoint: str | None = None
    """Base URL of another S3 service than Amazon's."""
    region: str = "us-east-1"
    """Region of the bucket."""
    ignore_patterns: list[str] = Field(default=[])
    """Files that are not downloaded, as shell patterns."""
    trusted_seconds: float = Field(default=604800, ge=0)
    """Age of the last check of all digests after which every file is read again, though none seems to have changed."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            cel=None,  # no API
            holds=lambda source: source.repo is None or source.uri is None,
            message="repo and uri exclude each other",
        ),
        Rule(
            cel=None,
            holds=lambda source: source.content == "Model" or source.repo is not None or source.uri is not None,
            message="a dataset needs repo or uri: what is on the volume already is not staged",
        ),
    )


class StagedFile(ContractModel):
    """One staged file."""

    path: str
    """Relative to the folder."""
    size: int = Field(ge=0)
    """Bytes."""
    modified: int = Field(ge=0)
    """When it was last changed, in nanoseconds since 1970."""
    sha256: str
    """Hexadecimal digest of the content."""


class StagedModel(ContractModel):
    """The staged base model."""

    path: str
    """Folder, relative to the root of the models volume."""
    architecture: str
    """As config.json says, such as `LlamaForCausalLM`."""
    parameters: int = Field(ge=1)
    """Number of weights; tied ones are counted once."""
    bytes: int = Field(ge=1)
    """Size of all files."""
    revision: str | None = None
    """Commit of the repository that the files are of."""
    sizes: LlamaSizes | None = None
    """What the memory of a run depends on."""


class StagedData(ContractModel):
    """A staged dataset."""

    path: str
    """Folder, relative to the root of the models volume."""
    files: int = Field(ge=1)
    """Number of data files."""
    bytes: int = Field(ge=0)
    """Size of all files."""
    revision: str | None = None
    """Commit of the repository that the files are of."""


class StagingManifest(ContractModel):
    """The `.complete` file. It is written last, by rename: where it stands, every listed file is whole."""

    version: Literal[2] = 2
    """Another version is as good as none: the files are checked anew."""
    model: StagedModel | None = None
    data: StagedData | None = None
    files: list[StagedFile]

    @property
    def staged(self) -> StagedModel | StagedData:
        """What was staged."""
        found = self.model or self.data
        assert found is not None, "the rule says so"
        return found

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            cel=None,  # no API
            holds=lambda manifest: (manifest.model is None) != (manifest.data is None),
            message="exactly one of model and data is there",
        ),
    )
