"""The data side of a RunConfig: where rows come from, what they look like, and what of them is learnt."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from kubetune_contract.base import ContractModel, Rule

DataFormat = Literal["OpenAI", "ShareGPT", "Alpaca", "Instruct", "Completion", "Preference"]
TemplateName = Literal["Alpaca", "ChatML", "GrammarErrorCorrection", "QuestionAnswer", "Summarize"]

VolumePath = Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+(/[A-Za-z0-9._-]+)*$", max_length=512)]
"""A path relative to the root of a volume."""


def stays_inside(path: str) -> bool:
    """Whether the path begins at the root of the volume and no step climbs out of it."""
    return not {"", ".", ".."} & set(path.split("/"))


VOLUME_PATH_RULE = Rule(
    cel="!has(self.volumePath) || !self.volumePath.split('/').exists(step, step in ['', '.', '..'])",
    holds=lambda model: model.volume_path is None or stays_inside(model.volume_path),
    message="volumePath {volumePath} must be a path below the volume's root: without a leading '/' and without '..'",
)


class Columns(ContractModel):
    """Names of the columns in the data, where they are not those of the format."""

    messages: str = Field(default="messages", min_length=1, max_length=256)
    """OpenAI: the list of turns."""
    conversations: str = Field(default="conversations", min_length=1, max_length=256)
    """ShareGPT: the list of turns."""
    instruction: str = Field(default="instruction", min_length=1, max_length=256)
    """Alpaca: what to do."""
    input: str = Field(default="input", min_length=1, max_length=256)
    """Alpaca: what to do it with, may be empty or absent. Instruct: the question."""
    output: str = Field(default="output", min_length=1, max_length=256)
    """Alpaca and Instruct: the answer."""
    text: str = Field(default="text", min_length=1, max_length=256)
    """Completion: the text."""
    prompt: str = Field(default="prompt", min_length=1, max_length=256)
    """Preference: the question, a text or turns; absent where both answers are whole conversations."""
    chosen: str = Field(default="chosen", min_length=1, max_length=256)
    """Preference: the better answer, a text or turns."""
    rejected: str = Field(default="rejected", min_length=1, max_length=256)
    """Preference: the worse answer, a text or turns."""


class Affixes(ContractModel):
    """Texts around one turn."""

    prefix: str = Field(default="", max_length=4096)
    """Stands before it."""
    suffix: str = Field(default="", max_length=4096)
    """Stands after it."""


class PromptTemplate(ContractModel):
    """Texts around each turn's content: a named set, or one pair for each role.

    Inside the model's chat template; where the model has none, the affixes alone make up the text.
    """

    name: TemplateName | None = None
    """A named template."""
    system: Affixes | None = None
    """Around system turns."""
    user: Affixes | None = None
    """Around user turns."""
    assistant: Affixes | None = None
    """Around assistant turns."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            cel="has(self.name) != (has(self.system) || has(self.user) || has(self.assistant))",
            holds=lambda template: (template.name is None) == any((template.system, template.user, template.assistant)),
            message="promptTemplate needs a name, or affixes for at least one of system, user and assistant, not both",
        ),
    )


class RowOptions(ContractModel):
    """What a row looks like, and how often it is seen."""

    format: DataFormat = "OpenAI"
    """Layout of a row. OpenAI: {"messages": [{"role": ..., "content": ...}]}."""
    columns: Columns = Columns()
    """Names of the columns in the data, where they are not those of the format."""
    prompt_template: PromptTemplate | None = None
    """Texts around each turn's content."""
    weight: float = Field(default=1.0, gt=0, le=1000)
    """Passes over these rows in an epoch: 0.5 takes a random half each time, 2 takes each row twice."""


class Source(ContractModel):
    """Where rows come from: a path, or a dataset repository of the Hugging Face Hub."""

    path: str | None = Field(default=None, min_length=1)
    """A JSON Lines, JSON, Parquet or CSV file, or a folder of such files."""
    repo: str | None = Field(default=None, pattern=r"^[A-Za-z0-9._-]+/[A-Za-z0-9._-]+$", max_length=256)
    """A dataset repository of the Hugging Face Hub, as owner/name."""
    revision: str = Field(default="main", pattern=r"^[A-Za-z0-9._/-]+$", max_length=256)
    """Branch, tag or commit of the repository."""
    split: str = Field(default="train", min_length=1, max_length=256)
    """Split of the repository."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            cel=None,  # a manifest has a volumePath instead
            holds=lambda source: (source.path is None) != (source.repo is None),
            message="exactly one of path and repo is required",
        ),
    )


class MixedDataset(RowOptions, Source):
    """A further dataset."""


class DatasetOptions(RowOptions):
    """How the training data are read."""

    train_on: Literal["Assistant", "Last", "All"] = "Assistant"
    """Which tokens carry the loss: the assistant's turns, only the last of them, or every token."""
    max_sequence_length: int = Field(default=2048, ge=16, le=1048576)
    """Tokens per sequence. Longer conversations are cut at the end; the run says how many."""
    packed: bool = False
    """Whether short conversations share a sequence of maxSequenceLength tokens. None of them sees another."""
    shuffle: bool = True
    """Whether each epoch has an order of its own, drawn from training.seed."""
    max_bad_rows: int = Field(default=0, ge=0)
    """Rows that may be left out because they are malformed; one more ends the run."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            cel="!has(self.packed) || !self.packed || !has(self.format) || self.format != 'Preference'",
            holds=lambda dataset: not (dataset.packed and dataset.format == "Preference"),
            message="packed does not go with the format Preference, whose rows are pairs: set packed to false",
        ),
    )


MIXTURE_RULE = Rule(
    cel="!has(self.mixture) || self.mixture.all(other, "
    "(has(self.format) && self.format == 'Preference') == (has(other.format) && other.format == 'Preference'))",
    holds=lambda dataset: (
        {dataset.format == "Preference"}
        == {dataset.format == "Preference", *(other.format == "Preference" for other in dataset.mixture)}
    ),
    message="the format Preference cannot be mixed with other formats",
)


class DatasetConfig(DatasetOptions, Source):
    """The training data."""

    mixture: list[MixedDataset] = Field(default=[], max_length=64)
    """Further datasets, mixed with this one by their weights."""

    rules: ClassVar[tuple[Rule, ...]] = (
        *Source.rules,
        *DatasetOptions.rules,
        MIXTURE_RULE,
    )

    @property
    def sources(self) -> "tuple[DatasetConfig | MixedDataset, ...]":
        """All datasets of the mixture, this one first."""
        return (self, *self.mixture)


class ValidationOptions(ContractModel):
    """Held-out data: its loss is measured before the first step and after the last."""

    fraction: float | None = Field(default=None, gt=0, lt=1)
    """Share of the training data to hold out, instead of a file; drawn from training.seed."""
    every_steps: int | None = Field(default=None, ge=1)
    """Also measure the loss each time so many optimizer steps are done."""
    samples: int = Field(default=0, ge=0, le=64)
    """Number of held-out prompts to answer before and after training; the answers go to samples.json."""
    sample_tokens: int = Field(default=64, ge=1, le=4096)
    """Longest answer, in tokens."""


class ValidationConfig(ValidationOptions):
    """The held-out data."""

    path: str | None = Field(default=None, min_length=1)
    """A file in the format of the training data."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            cel=None,  # a manifest has a volumePath instead
            holds=lambda validation: (validation.path is None) != (validation.fraction is None),
            message="exactly one of path and fraction is required",
        ),
    )
