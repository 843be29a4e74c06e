"""RunConfig: everything that decides a run, closed and complete. Every bound, default and rule stands here, once."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from kubetune_contract.base import ContractModel, Rule

Method = Literal["Full", "LoRA"]
DataFormat = Literal["OpenAI"]
TargetModule = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

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


class ModelConfig(ContractModel):
    """The base model."""

    path: str = Field(min_length=1)
    """Folder with config.json, tokenizer.json and safetensors files in Hugging Face layout."""


class DatasetOptions(ContractModel):
    """How the training data are read."""

    format: DataFormat = "OpenAI"
    """Layout of a row. OpenAI: {"messages": [{"role": ..., "content": ...}]}."""
    train_on: Literal["Assistant", "Last", "All"] = "Assistant"
    """Which tokens carry the loss: the assistant's turns, only the last of them, or every token."""
    max_sequence_length: int = Field(default=2048, ge=16, le=1048576)
    """Tokens per sequence. Longer conversations are cut at the end; the run says how many."""
    shuffle: bool = True
    """Whether each epoch has an order of its own, drawn from training.seed."""


class DatasetConfig(DatasetOptions):
    """The training data."""

    path: str = Field(min_length=1)
    """A JSON Lines file."""


class ValidationOptions(ContractModel):
    """Held-out data: its loss is measured before the first step and after the last."""

    every_steps: int | None = Field(default=None, ge=1)
    """Also measure the loss each time so many optimizer steps are done."""
    samples: int = Field(default=0, ge=0, le=64)
    """Number of held-out prompts to answer before and after training; the answers go to samples.json."""
    sample_tokens: int = Field(default=64, ge=1, le=4096)
    """Longest answer, in tokens."""


class ValidationConfig(ValidationOptions):
    """The held-out data."""

    path: str = Field(min_length=1)
    """A JSON Lines file in the format of the training data."""


class AdapterConfig(ContractModel):
    """The low-rank adapter of LoRA (Hu et al. 2021)."""

    rank: int = Field(default=8, ge=1, le=1024)
    """Inner dimension of the two factors."""
    alpha: float = Field(default=16, gt=0, le=65536)
    """The adapter's output is scaled by alpha / rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Probability with which an input of the adapter is dropped while training."""
    target_modules: list[TargetModule] = Field(
        default=["q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        min_length=1,
        max_length=7,
        json_schema_extra={"x-kubernetes-list-type": "set"},
    )
    """The linear layers that get an adapter, in every block."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            cel=None,  # the list type `set` says it
            holds=lambda adapter: len(set(adapter.target_modules)) == len(adapter.target_modules),
            message="targetModules must not name a module twice",
        ),
    )


class TrainingConfig(ContractModel):
    """The optimisation."""

    epochs: int = Field(default=1, ge=1, le=10000)
    """Passes over the training data."""
    max_steps: int | None = Field(default=None, ge=1)
    """Stop after so many optimizer steps, even inside an epoch."""
    batch_size: int = Field(default=2, ge=1, le=4096)
    """Sequences per process and forward pass."""
    gradient_accumulation_steps: int = Field(default=8, ge=1, le=4096)
    """Forward passes per optimizer step."""
    learning_rate: float = Field(default=3e-4, gt=0, le=1)
    """Highest learning rate of the schedule."""
    schedule: Literal["Cosine", "Linear", "Constant"] = "Cosine"
    """Course of the learning rate after warm-up: down to 0 along half a cosine or a line, or level."""
    warmup_steps: int = Field(default=100, ge=0)
    """Optimizer steps until the learning rate is reached. A run shorter than twice this warms up for half its steps."""
    weight_decay: float = Field(default=0.01, ge=0, le=1)
    """Decoupled weight decay of AdamW."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of AdamW's mean of gradients."""
    beta2: float = Field(default=0.999, ge=0, lt=1)
    """Decay of AdamW's mean of squared gradients."""
    epsilon: float = Field(default=1e-8, gt=0, le=1)
    """Term that keeps AdamW's division finite."""
    max_gradient_norm: float = Field(default=1.0, ge=0)
    """Gradients are scaled down to this global L2 norm; 0 leaves them as they are."""
    seed: int = Field(default=42, ge=0, le=2147483647)
    """Decides the data order, the adapter's first weights and dropout."""
    precision: Literal["Auto", "BF16", "FP32"] = "Auto"
    """Number format of the matrix products. Auto: BF16 where the device has instructions for it, else FP32."""
    activation_checkpointing: Literal["None", "Full"] = "None"
    """Full keeps only each block's input and computes the rest again in the backward pass."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            cel="!has(self.maxSteps) || !has(self.warmupSteps) || self.warmupSteps < self.maxSteps",
            holds=lambda training: training.max_steps is None or training.warmup_steps < training.max_steps,
            message="warmupSteps {warmupSteps} must be less than maxSteps {maxSteps}: lower the one or raise the other",
        ),
    )


class CheckpointConfig(ContractModel):
    """How often the state of the run is saved, so that a lost worker costs little."""

    every_steps: int = Field(default=100, ge=1)
    """Optimizer steps between checkpoints."""
    keep: int = Field(default=2, ge=1, le=1000)
    """How many checkpoints stay; older ones are deleted."""


class ExportConfig(ContractModel):
    """What is written at the end besides the adapter or the trained model."""

    merged: bool = False
    """LoRA: also write the base model with the adapter merged in, in Hugging Face layout."""


class RunConfig(ContractModel):
    """A whole run: what to train, on what, how, and where the results go."""

    method: Method = "LoRA"
    """Full trains every weight, LoRA low-rank adapters of the chosen linear layers."""
    model: ModelConfig
    """The base model."""
    dataset: DatasetConfig
    """The training data."""
    validation: ValidationConfig | None = None
    """The held-out data."""
    adapter: AdapterConfig | None = None
    """The adapter of LoRA."""
    training: TrainingConfig = TrainingConfig()
    """The optimisation."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """How often the state of the run is saved."""
    export: ExportConfig = ExportConfig()
    """What is written at the end."""
    output_dir: str = Field(min_length=1)
    """Folder of this run's checkpoints and results."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            cel="!has(self.method) || self.method != 'Full' || !has(self.adapter)",
            holds=lambda run: run.method != "Full" or run.adapter is None,
            message="adapter goes with method LoRA, but method is {method}: remove adapter, or set method to LoRA",
        ),
        Rule(
            cel="!has(self.method) || self.method != 'Full' || !has(self.export)"
            " || !has(self.export.merged) || !self.export.merged",
            holds=lambda run: run.method != "Full" or not run.export.merged,
            message="export.merged goes with method LoRA, but method is {method}: "
            "full fine-tuning writes a whole model anyway",
        ),
    )

    @property
    def lora(self) -> AdapterConfig | None:
        """The adapter to train; None for full fine-tuning."""
        return None if self.method == "Full" else self.adapter or AdapterConfig()
