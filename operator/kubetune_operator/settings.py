"""The operator's settings. Each is read from the variable KUBETUNE_<NAME>; the Helm chart sets them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, ClassVar, Final, Literal, Self

from pydantic import BeforeValidator, Field, ValidationError
from pydantic.alias_generators import to_snake

from kubetune_contract.base import ContractModel, Rule
from kubetune_contract.errors import explain

PREFIX: Final = "KUBETUNE_"
OPERATOR_NAME: Final = "kubetune"
"""The operator of every FineTuneJob that names none."""


class SettingsError(Exception):
    """The operator cannot start. `problems` has one sentence for each variable."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("; ".join(self.problems))


def _split(text: object) -> object:
    """`a,b` as a list; an empty variable is an empty list."""
    return [part for part in text.split(",") if part] if isinstance(text, str) else text


Names = Annotated[list[str], BeforeValidator(_split)]


class Settings(ContractModel):
    """Everything that an administrator decides for all FineTuneJobs."""

    trainer_image: str = Field(min_length=1)
    """Image of the staging and worker pods."""
    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] = "IfNotPresent"
    """When the trainer's image is pulled."""
    image_pull_secrets: Names = Field(default=[])
    """Secrets, in the FineTuneJob's namespace, that open the trainer image's registry; separated by commas."""
    allow_service_accounts: Names = Field(default=[])
    """ServiceAccounts that FineTuneJobs may name for their pods; separated by commas, `*` allows all."""
    allow_host_network: bool = False
    """Whether FineTuneJobs may ask for their nodes' own network; their namespace must allow such pods too."""
    allow_rdma: bool = False
    """Whether FineTuneJobs may ask to pin memory for RDMA; their namespace must allow such pods too."""
    stage_queue: str | None = Field(default=None, pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$", max_length=63)
    """LocalQueue in every FineTuneJob's namespace in which staging waits for quota; for clusters where Kueue manages
    Jobs that name no queue."""
    hub_endpoint: str | None = Field(default=None, pattern=r"^https?://")
    """Base URL of the model hub that staging downloads from, in place of the Hugging Face Hub."""
    staged_trust_seconds: float = Field(default=604800, ge=0)
    """Age, in seconds, of the last look at every byte of a staged model or dataset after which the next job that needs
    it has all digests checked again; until then files whose size and time are the same are believed. 0 is always."""
    namespace: str = Field(min_length=1)
    """Namespace in which the operator runs."""
    operator_name: str = Field(default=OPERATOR_NAME, pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", max_length=63)
    """Name of this operator. It handles FineTuneJobs that carry it as their label kubetune.io/operator; those without
    the label belong to the operator with the default name."""
    pod_name: str | None = Field(default=None, min_length=1)
    """Name of the operator's pod. It takes a Lease of this name back at once. None, outside of a cluster: a name made
    of the host's."""
    pod_ip: str | None = Field(default=None, min_length=1)
    """Address at which other replicas reach this one's progress endpoint. None: they cannot hand reports over."""
    lease_name: str = Field(default=OPERATOR_NAME, pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$", max_length=253)
    """The Lease, in the operator's namespace, that makes one of the replicas the leader."""
    watch_namespace: str | None = None
    """The only namespace whose FineTuneJobs are handled; None is all of them."""
    progress_url: str | None = Field(default=None, pattern=r"^https://[^/]+$")
    """Base URL of the progress endpoint as the workers reach it, such as `https://kubetune-progress.team.svc:8443`."""
    progress_port: int = Field(default=8443, ge=1, le=65535)
    """Port on which the progress endpoint listens."""
    metrics_port: int = Field(default=8080, ge=1, le=65535)
    """Port of /metrics, /healthz and /readyz."""
    ca_file: Path | None = None
    """PEM file that workers check the progress endpoint's certificate against."""
    tls_cert_file: Path | None = None
    """PEM file with the progress endpoint's certificate."""
    tls_key_file: Path | None = None
    """PEM file with the certificate's key."""
    progress_auth: Literal["TokenReview", "KeySet"] = "TokenReview"
    """How the workers' tokens are checked: by the API server, which takes a right on the whole cluster, or with the
    cluster's public keys."""
    resync_seconds: float = Field(default=300, gt=0)
    """Seconds between two full passes over all FineTuneJobs."""
    restart_backoff_seconds: float = Field(default=10, ge=0)
    """Wait before the first restart after a crash, in seconds; it doubles with each further crash. What the API server
    refuses is asked for again after as long, and then as long as it has lasted."""
    restart_backoff_max_seconds: float = Field(default=300, ge=0)
    """Longest wait before a restart, or before what was refused is asked for again, in seconds."""
    volume_grace_seconds: float = Field(default=15, ge=0)
    """Seconds that a claim may be missing before the job fails."""
    lost_node_grace_seconds: float = Field(default=60, ge=0)
    """Seconds after the end of an attempt in which pods on an unreachable node hold up the next attempt."""
    progress_write_seconds: float = Field(default=10, ge=0)
    """Least number of seconds between two writes of one FineTuneJob's progress. A change of nothing but counts of
    workers and wordings waits as long for a change that matters, to be written together with it."""
    debounce_seconds: float = Field(default=0.5, ge=0)
    """Seconds in which further changes of one FineTuneJob are gathered into one status write."""
    workers: int = Field(default=16, ge=1, le=256)
    """FineTuneJobs that are reconciled at the same time."""
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    """Least severe messages that are logged."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            cel=None,  # settings are no API
            holds=lambda settings: (
                len({file is None for file in (settings.ca_file, settings.tls_cert_file, settings.tls_key_file)}) == 1
                and (settings.progress_url is None) == (settings.ca_file is None)
            ),
            message="KUBETUNE_PROGRESS_URL, KUBETUNE_CA_FILE, KUBETUNE_TLS_CERT_FILE and KUBETUNE_TLS_KEY_FILE "
            "go together: set all four, or none to run without a progress endpoint",
        ),
    )

    @classmethod
    def from_env(cls, environ: Mapping[str, str]) -> Self:
        """The settings in the environment. Raises SettingsError with every problem at once."""
        found = {name.removeprefix(PREFIX).lower(): value for name, value in environ.items() if name.startswith(PREFIX)}
        try:
            return cls.model_validate({name: value for name, value in found.items() if value != ""})
        except ValidationError as error:
            raise SettingsError(explain(error, cls, variable)) from error


def variable(field: str) -> str:
    """The environment variable of a setting."""
    return PREFIX + to_snake(field).upper()
