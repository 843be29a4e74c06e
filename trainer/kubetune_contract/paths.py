"""Where things lie inside the containers and on the volumes, and the names of the variables that say so."""

from typing import Final

MODELS_MOUNT: Final = "/kubetune/models"
"""The models claim: read-only in workers, writable only in the staging Job."""
OUTPUT_MOUNT: Final = "/kubetune/output"
"""The output claim."""
CONFIG_MOUNT: Final = "/kubetune/config"
"""The job's ConfigMap."""
TOKEN_MOUNT: Final = "/kubetune/token"  # noqa: S105 - a folder
"""The projected, audience-bound token for progress reports."""

RUN_CONFIG_FILE: Final = "run.json"
"""Key in the ConfigMap: the complete RunConfig."""
CA_FILE: Final = "ca.crt"
"""Key in the ConfigMap: PEM certificates that the progress endpoint's certificate is checked against."""
TOKEN_FILE: Final = "token"  # noqa: S105 - a file name
TOKEN_AUDIENCE: Final = "kubetune.io/progress"  # noqa: S105 - an audience

TERMINATION_LOG: Final = "/dev/termination-log"
TERMINATION_LIMIT: Final = 4096
"""Bytes that the kubelet keeps of a termination message."""

PROGRESS_URL_ENV: Final = "KUBETUNE_PROGRESS_URL"
"""Where rank 0 posts ProgressReport documents; unset outside a cluster."""
PROGRESS_PATH: Final = "/v1/progress/{namespace}/{name}/{attempt}"

CACHE_ENV: Final = "KUBETUNE_CACHE"
"""Folder of tokenized data; where it is unset, the trainer looks for one."""
CACHE_DIR: Final = ".tokens"
"""That folder on the output claim, shared by all jobs: a restarted worker and the next run find their tokens there."""

COMPLETE_FILE: Final = ".complete"
"""The staging manifest, written last beside the staged files."""

CHECKPOINTS_DIR: Final = "checkpoints"
ADAPTER_DIR: Final = "adapter"
MODEL_DIR: Final = "model"
"""The trained weights of full fine-tuning."""
MERGED_DIR: Final = "merged"
METRICS_FILE: Final = "metrics.jsonl"
LOSS_PICTURE: Final = "loss.png"
SAMPLES_FILE: Final = "samples.json"
PROFILE_DIR: Final = "profile"
TENSORBOARD_DIR: Final = "tensorboard"
RESULT_FILE: Final = "result.json"
"""The Result, written last: where it stands, the run is finished."""
CONFIG_FILE: Final = "config.yaml"
"""The complete RunConfig of the run, beside its results."""
