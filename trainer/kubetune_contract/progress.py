"""Documents that a container sends to the operator: progress while it runs, one termination message at its end."""

from datetime import datetime
from typing import Annotated, Self

from pydantic import Field

from kubetune_contract.base import ContractModel
from kubetune_contract.paths import TERMINATION_LIMIT
from kubetune_contract.staging import StagedData, StagedModel


class Progress(ContractModel):
    """How far the training is, as rank 0 sees it."""

    step: int = Field(ge=0)
    """Optimizer steps done."""
    total_steps: int = Field(ge=0)
    """Optimizer steps of the whole run."""
    epoch: float = Field(ge=0)
    """Epochs done, with the fraction of the current one."""
    percentage: int = Field(ge=0, le=100)
    """100 x step / totalSteps, rounded down."""
    loss: float | None = None
    """Mean cross-entropy per label token of the last step, in nats."""
    learning_rate: float | None = None
    """Learning rate of the last step."""
    tokens_per_second: float | None = None
    """All tokens of all workers per second, over the last reporting interval."""
    label_tokens_per_second: float | None = None
    """The same, counting only the tokens that carry the loss."""
    gradient_norm: float | None = None
    """Global L2 norm of the gradients before clipping."""
    peak_memory_bytes: int | None = None
    """Peak device memory of rank 0; on CPU its peak resident memory."""
    estimated_remaining_seconds: int | None = None
    """Seconds until the last step at the present rate."""
    updated_time: datetime | None = None
    """When the trainer measured this."""


class CheckpointStatus(ContractModel):
    """The newest complete checkpoint."""

    step: int = Field(ge=0)
    """Optimizer steps in the checkpoint."""
    path: str
    """Folder, relative to the run's output folder."""
    time: datetime
    """When it was complete."""


class Result(ContractModel):
    """What a finished run leaves behind. Paths are relative to the run's output folder."""

    adapter_path: str | None = None
    """The peft adapter: adapter_model.safetensors and adapter_config.json."""
    model_path: str | None = None
    """The trained Hugging Face model of full fine-tuning."""
    merged_path: str | None = None
    """The base model with the adapter merged in, as a Hugging Face model."""
    samples_path: str | None = None
    """Answers to validation prompts before and after training."""
    loss_picture_path: str | None = None
    """The loss curve as a PNG."""
    final_loss: float | None = None
    """Training loss of the last step, in nats per label token."""
    initial_validation_loss: float | None = None
    """Validation loss before the first step, in nats per label token."""
    final_validation_loss: float | None = None
    """Validation loss of what was exported (the last step, or the best), in nats per label token."""
    steps: int = Field(ge=0)
    """Optimizer steps done."""
    tokens: int = Field(ge=0)
    """Tokens trained on, padding not counted, all workers together."""


class ProgressReport(ContractModel):
    """The body that rank 0 posts to the operator."""

    progress: Progress
    checkpoint: CheckpointStatus | None = None


Reason = Annotated[str, Field(pattern=r"^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$", max_length=128)]


class TerminationMessage(ContractModel):
    """A container's last word, at most TERMINATION_LIMIT bytes of JSON. The operator reads it from the pod's status."""

    reason: Reason
    """Of the exit code: `Done`, `InvalidData`, ..."""
    message: str
    """One sentence for people: what happened, and the remedy when it is theirs."""
    log: str | None = None
    """The last lines of the traceback of a crash."""
    result: Result | None = None
    checkpoint: CheckpointStatus | None = None
    staged: StagedModel | None = None
    staged_data: StagedData | None = None

    def fitted(self) -> Self:
        """The same message, its log and then its text shortened until the JSON fits the kubelet's limit."""
        excess = len(self.to_json().encode()) - TERMINATION_LIMIT
        if excess > 0 and self.log:
            log = self.log[excess:].partition("\n")[2]  # whole lines
            return self.model_copy(update={"log": log or None}).fitted()
        excess = len(self.to_json().encode()) - TERMINATION_LIMIT
        if excess <= 0:
            return self
        # A character is at least one byte of JSON: cutting one for each excess byte always suffices.
        return self.model_copy(update={"message": self.message[: max(0, len(self.message) - excess - 3)] + "..."})
