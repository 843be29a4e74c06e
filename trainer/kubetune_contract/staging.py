"""What staging leaves beside the weights (`.complete`) and tells the operator."""

from pydantic import Field

from kubetune_contract.base import ContractModel


class StagedFile(ContractModel):
    """One file of a staged model."""

    path: str
    """Relative to the model's folder."""
    size: int = Field(ge=0)
    """Bytes."""
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
