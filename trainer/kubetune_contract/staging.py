"""What staging is asked to do, leaves beside the weights (`.complete`) and tells the operator."""

from pydantic import Field

from kubetune_contract.base import ContractModel


class StageSource(ContractModel):
    """What the staging container is asked to do (`stage --source JSON`): download the files, or check what is there."""

    path: str = Field(min_length=1)
    """Folder of the model, relative to the root of the models claim."""
    repo: str | None = None
    """Repository to download into the folder; None: somebody else put the files there, and they are only checked."""
    revision: str = "main"
    """Branch, tag or commit of the repository."""
    ignore_patterns: list[str] = Field(default=[])
    """Files of the repository that are not downloaded, as shell patterns."""


class StagedFile(ContractModel):
    """One file of a staged model."""

    path: str
    """Relative to the model's folder."""
    size: int = Field(ge=0)
    """Bytes."""
    modified: int = Field(ge=0)
    """When it was last changed, in nanoseconds since 1970."""
    sha256: str
    """Hexadecimal digest of the content."""


class StagedModel(ContractModel):
    """What the operator needs to know of the weights."""

    path: str
    """Folder of the model, relative to the root of the models claim."""
    architecture: str
    """As config.json says, such as `LlamaForCausalLM`."""
    parameters: int = Field(ge=1)
    """Number of weights; tied ones are counted once."""
    bytes: int = Field(ge=1)
    """Size of all files."""


class StagingManifest(ContractModel):
    """The `.complete` file. It is written last, by rename: where it stands, every listed file is whole."""

    version: int = 1
    model: StagedModel
    files: list[StagedFile]
