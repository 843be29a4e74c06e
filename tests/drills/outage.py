"""Drills: what happens while no operator runs, or no API server. All of it is found in the objects afterwards."""

from tests.drills.drill import API_SERVER, Act, Drill, Gone, Object, Outage, Seen, Step, submit
from tests.drills.fetching import half_way, hub
from tests.drills.lifecycle import DONE, SUSPENDED
from tests.drills.scene import Scene
from tests.drills.steps import (
    LONG,
    checkpoint,
    counted,
    delete,
    gone,
    holds,
    kill,
    kubectl,
    note_operator,
    nothing_held,
    only_left_the_lead,
    remove,
    resume,
    staging_done,
    state,
    still,
    suspend,
    workers_end,
)

TOPIC = "The operator is away"


def away(
    name: str,
    case: str,
    done: str,
    lead: tuple[Step, ...],
    meanwhile: tuple[Step, ...],
    seen: Seen | Gone,
    *after: Step,
    spec: Object,
    brief: bool = False,
) -> Drill:
    """A drill in the operator's absence; the time counts from its return."""
    return Drill(
        name,
        case,
        (Act(done, seen, seconds=240),),
        spec=spec,
        after=after,
        topic=TOPIC,
        outage=Outage(lead, meanwhile, brief),
    )


def gate(name: str) -> tuple[Object, Step]:
    """Fields of a spec whose worker cannot start before a Secret is there, and the step that creates it."""
    env = [{"name": "GATE", "valueFrom": {"secretKeyRef": {"name": f"{name}-gate", "key": "open"}}}]
    create = kubectl("create", "secret", "generic", f"{name}-gate", "--from-literal=open=yes")
    return {"workers": {"env": env}}, create


def ends_badly(scene: Scene) -> None:
    """Kill the worker, and wait until its pod has failed."""
    kill()(scene)
    workers_end("Failed")(scene)


QUESTIONS: Object = {"dataset": {"volumePath": "data/questions.jsonl"}}
SLOW: Object = {"training": {"maxSteps": 600}}
CLOSED_WELL, open_well = gate("away-starting")
CLOSED_BADLY, open_badly = gate("away-error")

DRILLS = (
    Drill(
        "api-server-away",
        "while the job trains",
        (
            Act(
                "`kube-apiserver` stopped, and started again; the job trains all the while",
                Seen("Running", "Running", "Running", ("Attempt 1: 1 of 1 worker running",), anew=True),
                seconds=240,
            ),
        ),
        spec=LONG,
        after=(still("Running"), counted(attempt=1, restarts=0, disruptions=0), only_left_the_lead),
        topic="The API server is away",
        outage=Outage((submit, checkpoint(20), note_operator), of=API_SERVER),
    ),
    away(
        "away-pending",
        "before the job is submitted",
        "submitted and deleted again",
        (),
        (submit, remove, gone),
        Gone(),
        spec={},
    ),
    away(
        "away-submitted",
        "before the job is submitted",
        "submitted",
        (),
        (submit,),
        DONE,
        counted(attempt=1),
        spec={},
    ),
    away(
        "away-staging",
        "while the model is staged",
        "the staging ended",
        (submit, half_way("stalled-while")),
        (staging_done,),  # the hub's client gives the silent connection up and goes on
        DONE,
        counted(attempt=1),
        spec=hub("stalled-while/tiny-llama"),
        brief=True,
    ),
    away(
        "away-starting",
        "while the worker starts",
        "the worker started and ended well",
        (submit, state("Starting")),
        (open_well, workers_end("Succeeded")),
        DONE,
        counted(attempt=1, restarts=0),
        spec=CLOSED_WELL,
    ),
    away(
        "away-crash",
        "while the job trains",
        "the worker crashed after a checkpoint",
        (submit, checkpoint(20)),
        (ends_badly,),
        Seen("Running", "Running", "Running", ("Attempt 2",)),
        counted(attempt=2, restarts=1),
        spec=LONG,
    ),
    away(
        "away-error",
        "while the worker starts",
        "the worker found an error of the user",
        (submit, state("Starting")),
        (open_badly, workers_end("Failed")),
        Seen("Failed", "Failed", "InvalidData", ("no assistant message",)),
        nothing_held,
        counted(restarts=0),
        spec=QUESTIONS | CLOSED_BADLY,
    ),
    away(
        "away-end",
        "while the job trains",
        "the training ended",
        (submit, holds("Running")),
        (workers_end("Succeeded"),),
        DONE,
        counted(attempt=1, restarts=0),
        spec=SLOW,
    ),
    away(
        "away-suspend",
        "while the job trains",
        "`suspend: true`",
        (submit, holds("Running")),
        (suspend,),
        SUSPENDED,
        nothing_held,
        spec=LONG,
    ),
    away(
        "away-resume",
        "while the job is suspended",
        "`suspend: false`",
        (submit, holds("Running"), suspend, holds("Suspended")),
        (resume,),
        Seen("Running", "Running", "Running"),
        counted(restarts=0),
        spec=LONG,
    ),
    away(
        "away-deleted",
        "while the job trains",
        "the FineTuneJob deleted; all of it went without the operator",
        (submit, holds("Running")),
        (remove, gone),
        Gone(),
        spec=LONG,
    ),
    away(
        "away-job-deleted",
        "while the job trains",
        "the worker Job deleted",
        (submit, holds("Running")),
        (delete("job/{attempt}"),),
        Seen("Running", "Running", "Running", ("Attempt 2",)),
        counted(attempt=2, restarts=1),
        spec=LONG,
    ),
    away(
        "away-download",
        "while the model comes from a hub",
        "the staging pod deleted half-way",
        (submit, half_way("stalled-absent")),
        (
            lambda scene: delete(
                "pods", f"--selector=job-name={scene.until_stage_job()}", "--grace-period=0", "--force"
            )(scene),
        ),
        DONE,
        counted(attempt=1),
        spec=hub("stalled-absent/tiny-llama"),
        brief=True,
    ),
)
