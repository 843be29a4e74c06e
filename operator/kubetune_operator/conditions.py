"""The conditions of a FineTuneJob as one table: which reasons each can have, when, and what a person can do.

The page docs/reference/conditions.md is made from it. A test compares it with what the planner can say, both ways.
"""

from collections.abc import Iterator
from typing import Final, Literal, NamedTuple

from kubetune_operator.api import ConditionType

Status = Literal["True", "False"]


class Reason(NamedTuple):
    """A condition's reason, when it is given, and the remedy; "" where there is nothing to do."""

    name: str
    when: str
    remedy: str = ""


OBSTACLES: Final = (
    Reason(
        "Unschedulable",
        "The scheduler finds no node for a pod; the message has its words.",
        "Free or add what it misses, or ask for less under `workers`. The job goes on by itself.",
    ),
    Reason("SchedulingGated", "Somebody put a scheduling gate on a pod.", "Whoever set the gate must lift it."),
    Reason("SchedulerError", "The scheduler failed; the message has its words.", "Look at the scheduler's log."),
    Reason(
        "VolumeMissing",
        "A claim that `storage` or `workers.volumes` names does not exist. After a grace the job fails.",
        "Create the claim, or submit the job again with one that exists.",
    ),
    Reason(
        "VolumeNotBound",
        "A claim exists and has no volume yet; the message has the provisioner's words.",
        "Name a StorageClass that exists and works, or create a volume for it.",
    ),
    Reason(
        "MountFailed", "A node cannot mount a volume.", "Check that the volume is there and that the node can reach it."
    ),
    Reason("SecretMissing", "A Secret, or a key of it, is not there.", "Create it; the pod then starts by itself."),
    Reason(
        "ConfigMapMissing", "A ConfigMap, or a key of it, is not there.", "Create it; the pod then starts by itself."
    ),
    Reason(
        "ImagePull",
        "A node cannot pull the image.",
        "Check its name, its registry and the image pull secrets. The kubelet tries again by itself.",
    ),
    Reason(
        "CreateContainerConfigError", "The kubelet cannot make a container's configuration.", "Correct what it names."
    ),
    Reason("CreateContainerError", "The container runtime cannot create a container.", "Correct what it names."),
    Reason("RunContainerError", "The container runtime cannot start a container.", "Correct what it names."),
    Reason(
        "SandboxFailed", "A node cannot give a pod its network or its sandbox.", "Its administrator must look at it."
    ),
    Reason("PodNotStarted", "A node does not start a pod for a reason that has no other name.", "Follow the message."),
    Reason(
        "NodeSilent", "A node has not even taken note of its pod.", "`kubectl describe node` tells whether it is up."
    ),
    Reason(
        "QuotaExceeded",
        "A ResourceQuota has no room for a Job or a pod.",
        "Free some of it, have it raised, or ask for less. The job goes on by itself.",
    ),
    Reason(
        "AdmissionDenied",
        "The API server or a webhook refuses a Job or a pod.",
        "Change what it objects to, or ask whoever runs it. It is tried again.",
    ),
    Reason(
        "NameConflict",
        "An object of a name that the job needs is there and is not the job's. It is left alone.",
        "Delete it, or give the job another name. It is tried again, ever more seldom.",
    ),
)
"""What keeps pods from starting. The job waits, or fails when `failurePolicy.startupDeadlineSeconds` are over."""

DISRUPTIONS: Final = (
    Reason("Preempted", "A pod of a higher priority takes a worker's place.", "Give the job a higher priority class."),
    Reason("Evicted", "A worker is evicted, as `kubectl drain` and autoscalers do."),
    Reason("NodeLost", "A worker's node does not answer, is being emptied, or is gone."),
    Reason("NodeShutdown", "A worker's node shuts down."),
    Reason(
        "NodePressure",
        "A worker's node ran out of a resource of which the worker used more than it requests.",
        "Request what the worker needs under `workers.resources.requests`.",
    ),
    Reason("NodeRejected", "A node did not take a pod that the scheduler gave it."),
    Reason("Disruption", "A worker is taken away from outside; the message has the words of whoever does it."),
)
"""What takes workers away from outside. The gang restarts from its newest checkpoint; such restarts are not counted."""

FAULTS: Final = (
    Reason("InvalidConfig", "The spec cannot work; the message names every field.", "Submit a corrected job."),
    Reason("InvalidData", "The data cannot be trained on.", "Correct the data, or how `dataset` reads them."),
    Reason("InvalidModel", "The base model is not complete or not supported.", "Correct `model` or its files."),
    Reason(
        "DoesNotFit", "The run needs more memory than there is.", "Choose one of the settings that the message names."
    ),
    Reason("OutOfMemory", "A GPU has no memory left.", "Choose one of the settings that the message names."),
    Reason("OutputNotWritable", "The output volume refuses files.", "Correct its permissions, or name another claim."),
    Reason("StorageFull", "A volume has no room for what must be written.", "Make room, or name a larger claim."),
    Reason("SourceDenied", "The source refuses the model or the data.", "Correct the credentials or ask for access."),
    Reason("NonFiniteLoss", "The loss is no number any more.", "Lower the learning rate, or look at the data."),
)
"""What only a person can repair: never tried again."""

CRASHES: Final = (
    Reason("Crash", "A worker ended with an exit code that is not ours; the message has its last lines."),
    Reason("OOMKilled", "A container used more memory than its limit.", "Raise the limit that the message names."),
    Reason("PeerLost", "A worker lost the connection to another one, and no other shows why."),
    Reason("Saved", "A worker was asked to stop by a signal, and nobody shows why."),
    Reason("SourceUnavailable", "The source of the model or the data does not answer.", "Submit the job again later."),
    Reason(
        "StorageLimitExceeded",
        "A worker wrote more to its node's disk than it may.",
        "Raise `ephemeral-storage` under `workers.resources.limits`.",
    ),
    Reason("StartError", "A container could not be started.", "Correct what the message names."),
    Reason("PodDeleted", "Somebody deleted a worker's pod."),
    Reason("JobDeleted", "Somebody deleted the worker Job of a running attempt."),
    Reason(
        "Stalled",
        "No step was finished for `failurePolicy.progressDeadlineSeconds`.",
        "Look at the workers' logs. Raise the deadline if steps, or loading the model, take longer.",
    ),
)
"""What is tried again from the newest checkpoint, `failurePolicy.maxRestarts` times; then the job fails."""

DEADLINES: Final = (
    Reason(
        "DeadlineExceeded",
        "The job was active for `activeDeadlineSeconds`.",
        "Submit it again with a longer deadline, more workers or fewer steps. It may begin from the newest checkpoint.",
    ),
    Reason(
        "StartupDeadlineExceeded",
        "The staging pod or the workers were not up after `failurePolicy.startupDeadlineSeconds`; nothing told why.",
        "Look at the pods with `kubectl describe`, or raise the deadline.",
    ),
)

_QUOTA: Final = Reason(
    "WaitingForQuota",
    "Kueue has not admitted the Job yet, or has taken its quota back.",
    "Wait, have the queue's quota raised, or submit the job to another queue.",
)
_VERDICTS: Final = (*FAULTS, *CRASHES, *DISRUPTIONS, *DEADLINES, *OBSTACLES)


class Section(NamedTuple):
    """All reasons that a condition of one status can have."""

    condition: ConditionType
    status: Status
    means: str
    reasons: tuple[Reason, ...]


TABLE: Final = (
    Section(
        "Staged", "True", "Model and data are on the models volume.", (Reason("Staged", "Every file was checked."),)
    ),
    Section(
        "Staged",
        "False",
        "Model or data are not there yet, or cannot be brought.",
        (
            Reason("Staging", "A staging pod is at work, or is being started."),
            Reason(
                "OperatorOutdated",
                "The spec was made for a newer operator than the one that runs.",
                "Have the operator upgraded.",
            ),
            _QUOTA,
            *_VERDICTS,
        ),
    ),
    Section("Started", "True", "All workers of the attempt came up.", (Reason("Started", "All of them were ready."),)),
    Section(
        "Started",
        "False",
        "The workers are not up yet, or no more.",
        (
            Reason("Starting", "The worker Job is being created, or not all of its pods are ready."),
            _QUOTA,
            Reason(
                "Restarting", "An attempt has ended; the message says why, when the next one starts and from where."
            ),
            Reason(
                "WorkersChanged",
                "`workers` was changed while the job was suspended: the next attempt takes over. Nothing is counted.",
            ),
            Reason("Suspended", "No worker is held.", "Set `suspend` to false."),
            *OBSTACLES,
        ),
    ),
    Section(
        "Running",
        "True",
        "The workers train.",
        (
            Reason("Running", "All workers came up."),
            Reason("Ending", "An attempt fails, and its last workers are still ending."),
            *DISRUPTIONS,
        ),
    ),
    Section(
        "Running",
        "False",
        "The workers train no more.",
        (
            Reason("Suspended", "No worker is held.", "Set `suspend` to false."),
            Reason("WorkersChanged", "Other workers take over."),
            _QUOTA,
            Reason("Done", "The job has succeeded."),
            *_VERDICTS,
        ),
    ),
    Section(
        "Suspended",
        "True",
        "No worker is held.",
        (Reason("Suspended", "`suspend` is true and every pod has ended.", "Set `suspend` to false."),),
    ),
    Section(
        "Suspended",
        "False",
        "Workers are held, or will be.",
        (
            Reason("Suspending", "`suspend` is true; the workers save a checkpoint and end."),
            Reason("Resumed", "`suspend` is false again."),
            Reason("Done", "The job has succeeded."),
            *_VERDICTS,
        ),
    ),
    Section(
        "Succeeded", "True", "The job is over, and well.", (Reason("Done", "The message says where the result is."),)
    ),
    Section("Succeeded", "False", "The job has failed: the reasons are those of Failed.", _VERDICTS),
    Section("Failed", "True", "The job is over. Nothing is tried again.", _VERDICTS),
)
"""In the order in which a job meets them."""


def is_known(condition: str, status: str, reason: str) -> bool:
    """Whether the table has that reason for that condition."""
    return any(
        (section.condition, section.status) == (condition, status) and reason in {item.name for item in section.reasons}
        for section in TABLE
    )


def reasons() -> Iterator[str]:
    """Every reason of the table, once."""
    yield from dict.fromkeys(item.name for section in TABLE for item in section.reasons)


_GROUPS: Final = (
    (
        "What keeps pods from starting",
        OBSTACLES,
        "The job waits, and fails when `failurePolicy.startupDeadlineSeconds` are over.",
    ),
    (
        "What takes workers away",
        DISRUPTIONS,
        "The gang restarts from its newest checkpoint. Such restarts are not counted.",
    ),
    ("What only a person can repair", FAULTS, "It is never tried again."),
    (
        "What may pass",
        CRASHES,
        "The gang restarts from its newest checkpoint, at most `failurePolicy.maxRestarts` times; then the job fails.",
    ),
    ("Deadlines", DEADLINES, "The job fails, and everything is freed."),
)


def page() -> str:
    """The reference page as Markdown."""
    lines = [
        "<!-- Generated by `python -m kubetune_operator.crd`. Do not edit. -->",
        "# Conditions",
        "",
        "`kubectl get finetunejob NAME -o yaml` shows them under `status.conditions`; `kubectl describe` shows the",
        "messages too. A condition that was never set is not there: what never held needs no denial. `Succeeded` or",
        "`Failed` being `True` is final.",
        "",
        "## By condition",
        "",
        "| condition | status | reason | when | what to do |",
        "|---|---|---|---|---|",
    ]
    lines += [line for section in TABLE for line in _rows(section)]
    lines += ["", "## Reasons that several conditions share", ""]
    for title, group, follows in _GROUPS:
        lines += [f"### {title}", "", follows, "", "| reason | when | what to do |", "|---|---|---|"]
        lines += [f"| `{item.name}` | {item.when} | {item.remedy} |" for item in group] + [""]
    return "\n".join(lines)


def _rows(section: Section) -> Iterator[str]:
    """The section's own reasons; the groups that it shares with others are named."""
    shared = {item.name for _, group, _ in _GROUPS for item in group}
    own = [item for item in section.reasons if item.name not in shared]
    for item in own:
        yield f"| {section.condition} | {section.status} | `{item.name}` | {item.when} | {item.remedy} |"
    groups = [title.lower() for title, group, _ in _GROUPS if set(group) <= set(section.reasons)]
    if groups:
        yield f"| {section.condition} | {section.status} | below: {'; '.join(groups)} | {section.means} | |"
