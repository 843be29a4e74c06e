"""The FineTuneJob API, v1alpha1: what a person writes (spec) and what the operator answers (status).

The training sections are the contract's own models. A manifest names only what differs from its preset, so they are
kept as plain mappings here (`Overrides` names the model whose schema they follow) and are judged as a whole once the
preset is laid under them.
"""

from datetime import datetime
from typing import Annotated, Any, ClassVar, Final, Literal, NamedTuple, Self

from pydantic import Field, ValidationError
from pydantic.alias_generators import to_camel

from kubetune_contract.base import ContractModel, Rule
from kubetune_contract.config import (
    AdapterConfig,
    CheckpointConfig,
    DPOConfig,
    ExportConfig,
    LoggingConfig,
    Method,
    ProfilerConfig,
    QuantizationConfig,
    RunConfig,
    TrainingConfig,
)
from kubetune_contract.errors import explain
from kubetune_contract.presets import preset_names
from kubetune_contract.progress import CheckpointStatus, Progress, Result
from kubetune_contract.staging import StagedData, StagedModel
from kubetune_operator.errors import InvalidJob, UnknownFields
from kubetune_operator.sources import DatasetSpec, DnsName, ModelSource, ValidationSpec
from kubetune_operator.workers import Queue, Workers

GROUP: Final = "kubetune.io"
VERSION: Final = "v1alpha1"
API_VERSION: Final = f"{GROUP}/{VERSION}"
KIND: Final = "FineTuneJob"
PLURAL: Final = "finetunejobs"
SHORT_NAME: Final = "ftj"


class Overrides(NamedTuple):
    """Marks a mapping in the spec that may name any of the model's fields."""

    model: type[ContractModel]


class Claim(ContractModel):
    """A PersistentVolumeClaim in the job's namespace."""

    claim_name: DnsName
    """Name of the claim."""


class Storage(ContractModel):
    """The volumes of the job."""

    models: Claim
    """Holds models and data. Workers mount it read-only; only the staging Job writes there."""
    output: Claim
    """Takes checkpoints and results. Every node of the job must be able to mount it."""


Seconds = Annotated[int, Field(le=1_000_000_000)]
"""A time span. Its limit, 31 years, keeps sums with times of day representable."""


class FailurePolicy(ContractModel):
    """What happens when a worker is lost, and how long the job waits for its workers. Errors that only a person can
    repair are never retried."""

    max_restarts: int = Field(default=3, ge=0, le=1000)
    """Crashes after which the gang restarts from its newest checkpoint. Evictions and lost nodes are not counted."""
    startup_deadline_seconds: Seconds | None = Field(default=None, ge=1)
    """Seconds in which the staging pod, and then each attempt's workers, must be up. Else everything is freed and the
    job fails for the reason that kept them. A suspended or queued job does not wait for its workers. Without it the
    job waits as long as it takes."""
    progress_deadline_seconds: Seconds | None = Field(default=None, ge=1)
    """Seconds in which running workers must finish a step; loading the model comes before the first one, validation
    between two, and what follows the last step is not judged. Else the gang restarts from its newest checkpoint, which
    counts as a crash. Needs the operator's progress endpoint."""


CleanPodPolicy = Literal["Running", "All", "None"]


class FineTuneJobSpec(ContractModel):
    """One fine-tuning run. Little of it can be changed later."""

    preset: str | None = Field(default=None, json_schema_extra={"enum": list(preset_names())})
    """A named configuration; the training sections below override it field by field."""
    method: Method | None = None
    """Full trains every weight; LoRA low-rank adapters of the chosen layers; DoRA also their magnitude; QLoRA and QDoRA
    the same on a base model in 4 bits."""
    model: ModelSource
    """Where the base model comes from."""
    dataset: Annotated[dict[str, Any], Overrides(DatasetSpec)]
    """The training data and how they are read."""
    validation: Annotated[dict[str, Any] | None, Overrides(ValidationSpec)] = None
    """The held-out data."""
    adapter: Annotated[dict[str, Any] | None, Overrides(AdapterConfig)] = None
    """The adapter of all methods but Full."""
    quantization: Annotated[dict[str, Any] | None, Overrides(QuantizationConfig)] = None
    """How QLoRA and QDoRA store the frozen weights."""
    dpo: Annotated[dict[str, Any] | None, Overrides(DPOConfig)] = None
    """Direct preference optimization, for data of the format Preference."""
    training: Annotated[dict[str, Any] | None, Overrides(TrainingConfig)] = None
    """The optimisation."""
    checkpoint: Annotated[dict[str, Any] | None, Overrides(CheckpointConfig)] = None
    """How often the state of the run is saved."""
    export: Annotated[dict[str, Any] | None, Overrides(ExportConfig)] = None
    """What is written at the end."""
    logging: Annotated[dict[str, Any] | None, Overrides(LoggingConfig)] = None
    """Where metrics go besides metrics.jsonl."""
    profiler: Annotated[dict[str, Any] | None, Overrides(ProfilerConfig)] = None
    """A window of steps to record."""
    workers: Workers = Workers()
    """The gang that trains together."""
    queue: Queue | None = None
    """Kueue's queue in which the workers wait for quota; without one they start at once."""
    storage: Storage
    """The volumes of the job."""
    failure_policy: FailurePolicy = FailurePolicy()
    """What happens when a worker is lost, and how long the job waits for its workers."""
    active_deadline_seconds: Seconds | None = Field(default=None, ge=1)
    """Seconds after which a job that has not ended is stopped and fails. Staging, waiting for workers and restarts
    count; time in which the job is suspended or queued does not."""
    ttl_seconds_after_finished: Seconds | None = Field(default=None, ge=0)
    """Seconds after its end when the FineTuneJob is deleted with all that it owns; what is on the volumes stays.
    Without it, it stays until somebody deletes it."""
    clean_pod_policy: CleanPodPolicy = "Running"
    """What is removed at the end. No policy lets workers of an ended job run on. Running: an attempt that is not over
    goes with all its pods; Jobs and pods that have ended stay for their logs, as do ConfigMap and Service. All: every
    Job with its pods, the ConfigMap and the Service go. None: nothing goes but the running pods of an attempt that is
    stopped; its Job and its ended pods stay."""
    suspend: bool = False
    """True frees the workers after a checkpoint; false goes on from there."""

    # For the API server only: Python judges the RunConfig, once the preset is laid under the spec.
    rules: ClassVar[tuple[Rule, ...]] = tuple(rule._replace(holds=lambda _: True) for rule in RunConfig.rules)


State = Literal["Pending", "Staging", "Starting", "Running", "Suspended", "Restarting", "Succeeded", "Failed"]
ConditionType = Literal["Staged", "Started", "Running", "Suspended", "Succeeded", "Failed"]


class Condition(ContractModel):
    """A metav1.Condition."""

    type: ConditionType
    """What the condition is about."""
    status: Literal["True", "False", "Unknown"]
    """Whether it holds."""
    reason: str = Field(min_length=1, max_length=1024, pattern=r"^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$")
    """Why, in one word for programs."""
    message: str = Field(max_length=32768)
    """Why, in a sentence for people."""
    last_transition_time: datetime
    """When status last changed."""
    observed_generation: int | None = None
    """The generation of the spec that this is about."""


class WorkersStatus(ContractModel):
    """Worker pods of the present attempt."""

    active: int = 0
    """Pods that are pending or running."""
    ready: int = 0
    """Pods that are ready."""
    succeeded: int = 0
    """Pods that ended well."""
    failed: int = 0
    """Pods that failed."""


class MemoryEstimate(ContractModel):
    """Memory that a training step takes at most on each device, in bytes: its parts when it needs the most."""

    device: Literal["GPU", "Pod"]
    """What has the memory: each GPU, or on the CPU each worker pod."""
    bytes: int
    """What the device must have: all parts, gaps between them, and what the libraries take."""
    available: int | None = None
    """What the device has, where that is known."""
    weights: int
    """The model as it is stored between steps."""
    adapter: int
    """The adapter."""
    gradients: int
    """Gradients of what is trained."""
    optimizer: int
    """The optimizer's state."""
    activations: int
    """What the forward pass keeps for the backward pass, and what one block takes in it."""
    loss: int
    """Hidden states and logits."""
    sharding: int
    """Whole weights of the blocks at work, where they are sharded."""
    dequantization: int
    """A weight out of 4 bits."""
    host: int
    """In host memory, not in bytes."""


class Display(ContractModel):
    """The columns of `kubectl get`: numbers rounded for people."""

    progress: str
    """Steps done, such as `42%`."""
    loss: str | None = None
    """Training loss of the last step."""
    eta: str | None = None
    """Time until the last step, such as `3m10s`."""

    @classmethod
    def of(cls, progress: Progress) -> Self:
        """The columns of this progress."""
        remaining = progress.estimated_remaining_seconds
        return cls(
            progress=f"{progress.percentage}%",
            loss=None if progress.loss is None else f"{progress.loss:.4g}",
            eta=None if remaining is None else duration(remaining),
        )


def duration(seconds: float) -> str:
    """A time span in its two largest units, such as `45s`, `3m10s`, `2h5m` or `1d3h`."""
    left, parts = int(seconds), []
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60), ("s", 1)):
        count, left = divmod(left, size)
        parts.append((count, unit))
    while len(parts) > 1 and parts[0][0] == 0:
        parts.pop(0)
    return "".join(f"{count}{unit}" for count, unit in parts[:2] if count) or "0s"


class FineTuneJobStatus(ContractModel):
    """What the operator knows. Everything that a restarted operator needs stands here."""

    observed_generation: int | None = None
    """The generation of the spec that this status is about."""
    state: State | None = None
    """The conditions in one word, for people."""
    conditions: list[Condition] = Field(
        default=[], json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]}
    )
    """The details, for programs."""
    start_time: datetime | None = None
    """When the first attempt was created."""
    completion_time: datetime | None = None
    """When the job succeeded or failed."""
    attempt: int = 0
    """Number of the present attempt, from 1; 0 before the first."""
    attempt_start_time: datetime | None = None
    """When the present attempt's Job was first seen; absent while it waits to be created."""
    next_attempt_time: datetime | None = None
    """Earliest time at which the next attempt is created, while one waits."""
    active_seconds: int = 0
    """Seconds that count for activeDeadlineSeconds, without those since activeSince."""
    active_since: datetime | None = None
    """Since when time counts for activeDeadlineSeconds; absent while it does not."""
    waiting_since: datetime | None = None
    """Since when the staging pod or the workers are asked for and not up; absent while nothing is waited for."""
    last_step_time: datetime | None = None
    """When the operator last heard of a new step of the present attempt."""
    restarts: int = 0
    """Restarts of the gang after crashes."""
    disruptions: int = 0
    """Restarts of the gang after evictions and lost nodes; they are not limited."""
    workers: WorkersStatus | None = None
    """Worker pods of the present attempt."""
    staged: StagedModel | None = None
    """The staged base model."""
    staged_data: list[StagedData] | None = Field(
        default=None, json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["path"]}
    )
    """The datasets that were downloaded."""
    estimate: MemoryEstimate | None = None
    """Memory that a training step takes, told before any GPU is held."""
    progress: Progress | None = None
    """How far the training is."""
    display: Display | None = None
    """The same for `kubectl get`."""
    checkpoint: CheckpointStatus | None = None
    """The newest complete checkpoint."""
    output_path: str | None = None
    """Folder of this run on the output volume."""
    result: Result | None = None
    """What the run left behind. Paths are on the output volume."""
    clean_up_time: datetime | None = None
    """When cleanPodPolicy All was carried out."""


class FineTuneJob(NamedTuple):
    """A FineTuneJob as the operator reads it."""

    namespace: str
    name: str
    uid: str
    generation: int
    deleting: bool
    spec: FineTuneJobSpec
    status: FineTuneJobStatus

    @classmethod
    def of(cls, body: dict[str, Any], spec: FineTuneJobSpec) -> Self:
        """The API object with its spec as it was read."""
        metadata = body["metadata"]
        return cls(
            namespace=metadata["namespace"],
            name=metadata["name"],
            uid=metadata["uid"],
            generation=metadata.get("generation", 1),
            deleting="deletionTimestamp" in metadata,
            spec=spec,
            status=FineTuneJobStatus.model_validate(body.get("status") or {}),
        )

    @property
    def key(self) -> str:
        """namespace/name."""
        return f"{self.namespace}/{self.name}"


def parse(body: dict[str, Any]) -> FineTuneJob:
    """The typed FineTuneJob of an API object.

    Raises InvalidJob with every problem, spelt as in the manifest; UnknownFields where some are fields that we do not
    know: the API server lets none through that its CRD does not have.
    """
    try:
        spec = FineTuneJobSpec.model_validate(body.get("spec", {}))
    except ValidationError as error:
        unknown = any(problem["type"] == "extra_forbidden" for problem in error.errors(include_url=False))
        kind = UnknownFields if unknown else InvalidJob
        raise kind(f"spec.{problem}" for problem in explain(error, FineTuneJobSpec, to_camel)) from error
    return FineTuneJob.of(body, spec)
