"""Drills: the good way, suspension, deletion, names that are taken, and the end that stays the end."""

from tests.drills.drill import Act, Drill, Gone, Object, Seen, submit
from tests.drills.fetching import half_way, hub
from tests.drills.scene import Scene
from tests.drills.steps import (
    LONG,
    checkpoint,
    counted,
    delete,
    event,
    holds,
    kubectl,
    left,
    make,
    nothing_held,
    remove,
    resume,
    says,
    state,
    still,
    suspend,
)

TOPIC = "Lifecycle"
DONE = Seen("Succeeded", "Succeeded", "Done", ("The adapter is at",))
SUSPENDED = Seen("Suspended", "Suspended", "Suspended", holds=True)


def deleted(name: str, case: str, *lead: object, spec: Object, trains: bool = True) -> Drill:
    """A drill in which the FineTuneJob is deleted at some stage."""
    acts = (Act("`kubectl delete finetunejob`", Gone(), (submit, *lead, remove), seconds=240),)  # type: ignore[arg-type]
    return Drill(name, case, acts, spec=spec, topic=TOPIC, trains=trains)


def foreign(kind: str, name: str, api: str, **body: object) -> Drill:
    """A drill in which an object that is not ours has the name of a child."""

    def taken(scene: Scene) -> Object:
        return {"apiVersion": api, "kind": kind, "metadata": {"name": name.format(name=scene.name)}, **body}

    drill = f"taken-{kind.lower()}"
    path = f"{kind.lower()}/{name.format(name=drill)}"
    return Drill(
        drill,
        f"the name of the {kind} is taken",
        (
            Act(
                f"a {kind} of that name created before",
                Seen("Starting", "Started", "NameConflict", (kind, path.partition("/")[2])),
            ),
            Act(f"that {kind} deleted", DONE, (kubectl("delete", path),), seconds=240),
        ),
        before=(make(taken),),
        topic=TOPIC,
    )


POD = {
    "restartPolicy": "Never",
    "securityContext": {"runAsNonRoot": True, "runAsUser": 65532, "seccompProfile": {"type": "RuntimeDefault"}},
    "containers": [
        {
            "name": "main",
            "image": "registry.invalid/none:1",
            "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
        }
    ],
}
GPU: Object = {"workers": {"gpusPerNode": 1}}

DRILLS = (
    Drill(
        "happy",
        "nothing happens",
        (Act("`kubectl apply`", DONE, seconds=240),),
        after=(nothing_held, counted(attempt=1, restarts=0, disruptions=0), event("Succeeded")),
        topic=TOPIC,
    ),
    Drill(
        "suspended-first",
        "suspended before it starts",
        (
            Act("submitted with `suspend: true`", SUSPENDED),
            Act("`suspend: false`", DONE, (resume,), seconds=240),
        ),
        spec={"suspend": True},
        after=(counted(attempt=1, restarts=0),),
        topic=TOPIC,
    ),
    Drill(
        "suspended-staging",
        "suspended while the model comes",
        (
            Act(
                "`suspend: true` in the middle of the download", SUSPENDED, (submit, half_way("stalled-pause"), suspend)
            ),
            Act("`suspend: false`", DONE, (resume,), seconds=240),
        ),
        spec=hub("stalled-pause/tiny-llama"),
        after=(counted(attempt=1, restarts=0),),
        topic=TOPIC,
    ),
    Drill(
        "suspended-training",
        "suspended while it trains",
        (
            Act(
                "`suspend: true` after a checkpoint",
                Seen("Suspended", "Suspended", "Suspended", ("it goes on from step",)),
                (submit, checkpoint(20), suspend),
            ),
            Act("`suspend: false`", Seen("Running", "Running", "Running"), (nothing_held, resume), seconds=240),
        ),
        spec=LONG,
        after=(counted(attempt=1, restarts=0, disruptions=0),),
        topic=TOPIC,
        quick=True,
    ),
    deleted(
        "deleted-staging",
        "deleted while the model comes",
        half_way("stalled-away"),
        spec=hub("stalled-away/tiny-llama"),
        trains=False,
    ),
    deleted(
        "deleted-starting", "deleted while its workers wait", says("Started", "Unschedulable"), spec=GPU, trains=False
    ),
    deleted("deleted-running", "deleted while it trains", holds("Running"), spec=LONG),
    deleted(
        "deleted-suspended", "deleted while it is suspended", holds("Running"), suspend, holds("Suspended"), spec=LONG
    ),
    foreign("Job", "{name}-a1", "batch/v1", spec={"suspend": True, "template": {"spec": POD}}),
    foreign("Service", "{name}", "v1", spec={"clusterIP": "None", "selector": {"app": "other"}}),
    foreign("ConfigMap", "{name}-kubetune", "v1", data={"other": "x"}),
    Drill(
        "sticky",
        "its Jobs and pods are deleted after the end, and `suspend` toggled",
        (
            Act(
                "all deleted, `suspend: true`, `suspend: false`",
                DONE,
                (
                    submit,
                    state("Succeeded"),
                    kubectl("delete", "jobs,pods,services,configmaps", "--selector=kubetune.io/job={name}"),
                    suspend,
                    resume,
                ),
            ),
        ),
        after=(still("Succeeded"), left(job=0, pod=0), counted(attempt=1), event("Succeeded")),
        topic=TOPIC,
    ),
    Drill(
        "sticky-failure",
        "a failed job's Job is deleted",
        (
            Act(
                "`kubectl delete job`, `suspend: true`, `suspend: false`",
                Seen("Failed", "Failed", "InvalidData"),
                (submit, state("Failed"), delete("job/{attempt}"), suspend, resume),
            ),
        ),
        spec={"dataset": {"volumePath": "data/questions.jsonl"}},
        after=(still("Failed"), left(job=0), counted(attempt=1)),
        topic=TOPIC,
    ),
)
