"""The configurations of single tasks: closed models, as a run's. Importing this module does not import torch."""

from typing import ClassVar, Literal

from pydantic import Field

from kubetune_contract.base import ContractModel, Rule
from kubetune_contract.config import ModelConfig, QuantizationConfig
from kubetune_contract.dataset import DatasetConfig


class InferenceModel(ModelConfig):
    """A model to ask: the base, or the base with an adapter."""

    adapter_path: str | None = Field(default=None, min_length=1)
    """Folder of a LoRA or DoRA adapter in peft's layout, such as a run writes."""
    merged: bool = False
    """Whether the adapter is merged into the weights while they are loaded: faster answers, and in BF16 a little less
    exact than the adapter beside its weights."""
    quantization: QuantizationConfig | None = None
    """Store the frozen weights in 4 bits, as QLoRA and QDoRA train on them."""
    precision: Literal["Auto", "BF16", "FP32"] = "Auto"
    """Number format of the matrix products. Auto: BF16 where the device has instructions for it, else FP32."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            cel=None,  # tasks have no manifest
            holds=lambda model: not model.merged or model.adapter_path is not None,
            message="merged needs an adapterPath: there is nothing to merge",
        ),
        Rule(
            cel=None,
            holds=lambda model: not (model.merged and model.quantization is not None),
            message="merged does not go with quantization: an adapter stays beside weights in 4 bits",
        ),
    )


class PromptConfig(ContractModel):
    """What to ask: a conversation, or a text to continue."""

    user: str | None = Field(default=None, min_length=1)
    """The user's turn, rendered with the model's chat template."""
    system: str | None = Field(default=None, min_length=1)
    """The system's turn before it."""
    text: str | None = Field(default=None, min_length=1)
    """A text that the model continues as it stands, without chat format; special tokens in it count as such."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            cel=None,
            holds=lambda prompt: (prompt.user is None) != (prompt.text is None),
            message="exactly one of prompt.user (a question) and prompt.text (a text to continue) is required",
        ),
        Rule(
            cel=None,
            holds=lambda prompt: prompt.system is None or prompt.user is not None,
            message="prompt.system goes with prompt.user, not with prompt.text",
        ),
    )


class GenerationConfig(ContractModel):
    """An answer to one prompt."""

    model: InferenceModel
    """The model to ask."""
    prompt: PromptConfig
    """What to ask."""
    max_new_tokens: int = Field(default=300, ge=1, le=1048576)
    """Longest answer, in tokens."""
    temperature: float = Field(default=0.6, ge=0, le=100)
    """Logits are divided by it before a token is drawn; 0 always takes the most probable token."""
    top_k: int | None = Field(default=300, ge=1)
    """Draw among so many of the most probable tokens only."""
    top_p: float | None = Field(default=None, gt=0, le=1)
    """Draw among the most probable tokens only that together reach this probability."""
    seed: int = Field(default=42, ge=0, le=2147483647)
    """Decides what is drawn."""


class HarnessConfig(ContractModel):
    """Tasks of EleutherAI's lm-evaluation-harness, which is the extra [eval]. It fetches its data sets itself."""

    tasks: list[str] = Field(min_length=1, max_length=256)
    """Names of tasks, such as `truthfulqa_mc2`."""
    limit: int | None = Field(default=None, ge=1)
    """Take only the first so many documents of each task."""
    num_fewshot: int | None = Field(default=None, ge=0, le=64)
    """Solved examples before each question, where not the task's own number."""
    chat_template: bool = False
    """Whether questions are rendered with the model's chat template."""
    include_path: str | None = Field(default=None, min_length=1)
    """Folder with further tasks, as YAML files."""


class EvaluationConfig(ContractModel):
    """How good a model is: on data of one's own, on public tasks, or both."""

    model: InferenceModel
    """The model to measure."""
    dataset: DatasetConfig | None = None
    """Held-out rows, each of which counts once: packed, shuffle and weight change nothing."""
    batch_size: int = Field(default=8, ge=1, le=4096)
    """Sequences per forward pass."""
    answers: int = Field(default=0, ge=0)
    """So many of the rows are answered, greedily, and compared with the answer in the data."""
    max_new_tokens: int = Field(default=256, ge=1, le=1048576)
    """Longest answer, in tokens."""
    harness: HarnessConfig | None = None
    """Tasks of the lm-evaluation-harness."""
    results_file: str | None = Field(default=None, min_length=1)
    """JSON file for the results; they are printed in any case."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            cel=None,
            holds=lambda config: config.dataset is not None or config.harness is not None,
            message="dataset (rows of your own) or harness (public tasks) is required",
        ),
        Rule(
            cel=None,
            holds=lambda config: config.dataset is not None or config.answers == 0,
            message="answers is {answers}, but there is no dataset to answer: give dataset.path",
        ),
        Rule(
            cel=None,
            holds=lambda config: config.dataset is None or config.dataset.format != "Preference",
            message="dataset.format Preference has no single right answer to measure: give rows of another format",
        ),
    )


class QuantizeConfig(ContractModel):
    """A model in 4 or 8 bits, in the layout in which transformers keeps bitsandbytes' numbers."""

    model: ModelConfig
    """The model to quantize; merge an adapter first."""
    format: Literal["NF4", "INT8"] = "NF4"
    """NF4: 4 bits, in blocks of 64 (Dettmers et al. 2023). INT8: 8 bits, one scale for each row (LLM.int8)."""
    double: bool = True
    """NF4: whether the blocks' scales are stored in 8 bits too."""
    output_dir: str = Field(min_length=1)
    """Folder to write; must not exist."""


class MergeConfig(ContractModel):
    """An adapter merged into its base model, written as a whole model. Needs a CPU and memory for one tensor."""

    model: ModelConfig
    """The base model that the adapter was trained on."""
    adapter_path: str = Field(min_length=1)
    """Folder of a LoRA or DoRA adapter in peft's layout, such as a run writes."""
    output_dir: str = Field(min_length=1)
    """Folder to write; must not exist."""
