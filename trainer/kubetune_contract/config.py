"""RunConfig: everything that decides a run, closed and complete. Every bound, default and rule stands here, once."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from kubetune_contract.base import ContractModel, Rule
from kubetune_contract.dataset import DatasetConfig, ValidationConfig

Method = Literal["Full", "LoRA", "DoRA", "QLoRA", "QDoRA"]
TargetModule = Literal[
    "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "embed_tokens", "lm_head"
]


class ModelConfig(ContractModel):
    """The base model."""

    path: str = Field(min_length=1)
    """Folder with config.json, tokenizer.json and safetensors files in Hugging Face layout."""


class AdapterConfig(ContractModel):
    """The low-rank adapter (LoRA, Hu et al. 2021; DoRA, Liu et al. 2024)."""

    rank: int = Field(default=8, ge=1, le=1024)
    """Inner dimension of the two factors."""
    alpha: float = Field(default=16, gt=0, le=65536)
    """The adapter's output is scaled by alpha / rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Probability with which an input of the adapter is dropped while training."""
    target_modules: list[TargetModule] = Field(
        default=["q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        min_length=1,
        max_length=9,
        json_schema_extra={"x-kubernetes-list-type": "set"},
    )
    """The layers that get an adapter: linear layers of every block, the embedding, the head."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            cel=None,  # the list type `set` says it
            holds=lambda adapter: len(set(adapter.target_modules)) == len(adapter.target_modules),
            message="targetModules must not name a module twice",
        ),
    )


class QuantizationConfig(ContractModel):
    """How QLoRA and QDoRA store the frozen weights: in 4 bits, as NF4 in blocks of 64 (Dettmers et al. 2023)."""

    double: bool = True
    """Whether the blocks' scales are stored in 8 bits too: 0.37 bits less for each weight."""


class DPOConfig(ContractModel):
    """Direct preference optimization (Rafailov et al. 2023); the reference is the model without its adapter."""

    beta: float = Field(default=0.1, gt=0, le=100)
    """How strongly the model is held to the reference."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Probability that a preference is the wrong way round."""


def _refuse_fp16(value: Any) -> Any:
    if str(value).lower() in ("fp16", "float16", "half"):
        raise ValueError(
            f"{value} is not offered: gradients leave its range unless the loss is scaled; "
            "BF16 takes the same memory and has the range of FP32"
        )
    return value


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
    precision: Annotated[Literal["Auto", "BF16", "FP32"], BeforeValidator(_refuse_fp16)] = "Auto"
    """Number format of the matrix products. Auto: BF16 where the device has instructions for it, else FP32."""
    activation_checkpointing: Literal["None", "Selective", "Full"] = "None"
    """Full keeps only each block's input and computes the rest again in the backward pass; Selective also keeps the
    outputs of the matrix products and of attention."""
    optimizer: Literal["AdamW", "AdamW8bit", "PagedAdamW8bit"] = "AdamW"
    """AdamW (Loshchilov and Hutter 2019); 8bit stores its state in 8 bits (bitsandbytes, GPU only), Paged also lets
    it move to host memory."""
    optimizer_in_backward: bool = False
    """Full fine-tuning: update each weight as soon as its gradient is there, so that no two gradients are held."""
    master_weights: Literal["FP32", "BF16"] = "FP32"
    """Full fine-tuning: number format in which the weights are kept between steps. BF16 takes half the memory and
    loses small updates."""
    sharding: Literal["Full", "Hybrid"] = "Full"
    """Full shards the model over all processes (FSDP); Hybrid over those of a node, each node has a copy (HSDP)."""
    cpu_offload: bool = False
    """Whether sharded weights, gradients and optimizer state stay in host memory and come to the GPU when needed."""
    compile: bool = False
    """Whether each block is compiled (torch.compile): a slow first step, then faster ones on GPUs."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            cel="!has(self.optimizerInBackward) || !self.optimizerInBackward"
            " || !has(self.gradientAccumulationSteps) || self.gradientAccumulationSteps == 1",
            holds=lambda training: not training.optimizer_in_backward or training.gradient_accumulation_steps == 1,
            message="optimizerInBackward needs gradientAccumulationSteps 1, but it is {gradientAccumulationSteps}: "
            "a gradient that is used at once cannot be added up",
        ),
        Rule(
            cel="!has(self.optimizerInBackward) || !self.optimizerInBackward"
            " || !has(self.maxGradientNorm) || self.maxGradientNorm == 0.0",
            holds=lambda training: not training.optimizer_in_backward or training.max_gradient_norm == 0,
            message="optimizerInBackward needs maxGradientNorm 0, but it is {maxGradientNorm}: "
            "the norm is known only when all gradients are there",
        ),
        Rule(
            cel="!has(self.cpuOffload) || !self.cpuOffload || !has(self.optimizer) || self.optimizer == 'AdamW'",
            holds=lambda training: not training.cpu_offload or training.optimizer == "AdamW",
            message="cpuOffload goes with the optimizer AdamW, but it is {optimizer}: "
            "bitsandbytes' optimizers run on GPUs only",
        ),
    )


class CheckpointConfig(ContractModel):
    """How often the state of the run is saved, so that a lost worker costs little."""

    every_steps: int = Field(default=100, ge=1)
    """Optimizer steps between checkpoints."""
    keep: int = Field(default=2, ge=1, le=1000)
    """How many checkpoints stay; older ones are deleted."""
    every_epoch: bool = False
    """Whether to save at the end of each epoch too."""
    keep_best: bool = False
    """Whether the checkpoint with the lowest held-out loss stays too, and is what is exported at the end."""
    asynchronous: bool = False
    """Whether training goes on while a checkpoint is written; it takes a copy of what is saved in host memory."""


class ExportConfig(ContractModel):
    """What is written at the end besides the adapter or the trained model."""

    merged: bool = False
    """Adapters: also write the base model with the adapter merged in, in Hugging Face layout."""


class LoggingConfig(ContractModel):
    """Where metrics go besides metrics.jsonl."""

    tensorboard: bool = False
    """Write event files for TensorBoard to the output folder."""
    wandb_project: str | None = Field(default=None, min_length=1, max_length=128)
    """Project in Weights & Biases; the key comes from the environment variable WANDB_API_KEY."""


class ProfilerConfig(ContractModel):
    """A window of steps that torch's profiler records; the trace goes to the output folder."""

    start_step: int = Field(default=5, ge=1)
    """First recorded step."""
    steps: int = Field(default=3, ge=1, le=100)
    """Recorded steps."""
    memory: bool = False
    """Whether allocations are recorded too."""


class RunConfig(ContractModel):
    """A whole run: what to train, on what, how, and where the results go."""

    method: Method = "LoRA"
    """Full trains every weight; LoRA low-rank adapters of the chosen layers; DoRA also their magnitude; QLoRA and QDoRA
    the same on a base model in 4 bits."""
    model: ModelConfig
    """The base model."""
    dataset: DatasetConfig
    """The training data."""
    validation: ValidationConfig | None = None
    """The held-out data."""
    adapter: AdapterConfig | None = None
    """The adapter of all methods but Full."""
    quantization: QuantizationConfig | None = None
    """How QLoRA and QDoRA store the frozen weights."""
    dpo: DPOConfig | None = None
    """Direct preference optimization, for data of the format Preference."""
    training: TrainingConfig = TrainingConfig()
    """The optimisation."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """How often the state of the run is saved."""
    export: ExportConfig = ExportConfig()
    """What is written at the end."""
    logging: LoggingConfig = LoggingConfig()
    """Where metrics go besides metrics.jsonl."""
    profiler: ProfilerConfig | None = None
    """A window of steps to record."""
    output_dir: str = Field(min_length=1)
    """Folder of this run's checkpoints and results."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            cel="!has(self.method) || self.method != 'Full' || !has(self.adapter)",
            holds=lambda run: run.method != "Full" or run.adapter is None,
            message="adapter does not go with method {method}: remove adapter, or set method to LoRA",
        ),
        Rule(
            cel="!has(self.method) || self.method != 'Full' || !has(self.export)"
            " || !has(self.export.merged) || !self.export.merged",
            holds=lambda run: run.method != "Full" or not run.export.merged,
            message="export.merged does not go with method {method}: full fine-tuning writes a whole model anyway",
        ),
        Rule(
            cel="!has(self.quantization) || !has(self.method) || self.method in ['QLoRA', 'QDoRA']",
            holds=lambda run: run.quantization is None or run.quantized is not None,
            message="quantization does not go with method {method}: remove quantization, or set method to QLoRA",
        ),
        Rule(
            cel="!has(self.method) || !(self.method in ['DoRA', 'QDoRA']) || !has(self.adapter)"
            " || !has(self.adapter.targetModules)"
            " || !self.adapter.targetModules.exists(name, name in ['embed_tokens', 'lm_head'])",
            holds=lambda run: (
                not run.has_magnitude
                or not {"embed_tokens", "lm_head"} & set((run.adapter or AdapterConfig()).target_modules)
            ),
            message="adapter.targetModules must not name embed_tokens or lm_head with method {method}, "
            "which trains magnitudes inside the blocks only: remove them, or set method to LoRA",
        ),
        Rule(
            cel="!has(self.dpo) || !has(self.dataset.format) || self.dataset.format == 'Preference'",
            holds=lambda run: run.dpo is None or run.dataset.format == "Preference",
            message="dpo goes with data of the format Preference: remove dpo, or set dataset.format to Preference",
        ),
        Rule(
            cel="!has(self.method) || self.method != 'Full' || !has(self.dataset.format)"
            " || self.dataset.format != 'Preference'",
            holds=lambda run: run.method != "Full" or run.dataset.format != "Preference",
            message="the format Preference does not go with method {method}, "
            "because the model without its adapter is the reference: set method to LoRA",
        ),
        Rule(
            cel="!has(self.training) || !has(self.training.optimizerInBackward) || !self.training.optimizerInBackward"
            " || !has(self.method) || self.method == 'Full'",
            holds=lambda run: not run.training.optimizer_in_backward or run.method == "Full",
            message="training.optimizerInBackward goes with method Full, but method is {method}: "
            "an adapter's gradients are small, set it to false",
        ),
        Rule(
            cel="!has(self.checkpoint) || !has(self.checkpoint.keepBest) || !self.checkpoint.keepBest"
            " || (has(self.validation) && has(self.validation.everySteps)) || has(self.preset)",
            holds=lambda run: (
                not run.checkpoint.keep_best or (run.validation is not None and run.validation.every_steps is not None)
            ),
            message="checkpoint.keepBest needs validation.everySteps: only a measured loss can be the best",
        ),
    )

    @property
    def lora(self) -> AdapterConfig | None:
        """The adapter to train; None for full fine-tuning."""
        return None if self.method == "Full" else self.adapter or AdapterConfig()

    @property
    def quantized(self) -> QuantizationConfig | None:
        """How frozen weights are stored in 4 bits; None where they are not."""
        return (self.quantization or QuantizationConfig()) if self.method in ("QLoRA", "QDoRA") else None

    @property
    def has_magnitude(self) -> bool:
        """Whether the adapter trains magnitudes too (DoRA)."""
        return self.method in ("DoRA", "QDoRA")

    @property
    def preference(self) -> DPOConfig | None:
        """How preferences are learnt; None for supervised fine-tuning."""
        return (self.dpo or DPOConfig()) if self.dataset.format == "Preference" else None
