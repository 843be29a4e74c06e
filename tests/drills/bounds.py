"""Drills: deadlines, what is removed after the end, and what may be changed on the way."""

from tests.drills.drill import Act, Drill, Gone, Refused, Seen, Step, submit
from tests.drills.scene import Scene
from tests.drills.steps import (
    LONG,
    all_ready,
    checkpoint,
    counted,
    freeze,
    left,
    nothing_held,
    patch,
    state,
    then,
)

TOPIC = "Deadlines, cleaning up, changes"
SUSPENDED = Seen("Suspended", "Suspended", "Suspended", holds=True)
LARGER = {"nodes": 2, "resources": {"requests": {"cpu": "60m"}}}
WRONG = {"dataset": {"volumePath": "data/questions.jsonl"}}


def requests(cpu: str) -> Step:
    """The workers' pods request so much of a core."""

    def check(scene: Scene) -> None:
        found = {pod["spec"]["containers"][0]["resources"]["requests"]["cpu"] for pod in scene.pods()}
        assert found == {cpu}, f"{found} in place of {cpu}"

    return check


DRILLS = (
    Drill(
        "active-deadline",
        "a job takes too long",
        (
            Act(
                "`activeDeadlineSeconds: 25` on a job of hours",
                Seen("Failed", "Failed", "DeadlineExceeded", ("spec.activeDeadlineSeconds", "Create it again")),
                seconds=240,
            ),
        ),
        spec={**LONG, "activeDeadlineSeconds": 25, "cleanPodPolicy": "None"},
        after=(nothing_held, left(job=1, configmap=1, service=1)),
        topic=TOPIC,
    ),
    Drill(
        "startup-deadline",
        "the workers find no place in time",
        (
            Act(
                "`failurePolicy.startupDeadlineSeconds: 30`, `requests.cpu: 1000`",
                Seen("Failed", "Failed", "Unschedulable", ("Insufficient cpu", "failurePolicy.startupDeadlineSeconds")),
                seconds=240,
            ),
        ),
        spec={
            "failurePolicy": {"startupDeadlineSeconds": 30},
            "workers": {"resources": {"requests": {"cpu": "1000"}}},
        },
        after=(nothing_held, left(job=0, pod=0)),
        topic=TOPIC,
        trains=False,
    ),
    Drill(
        "staging-deadline",
        "the staging pod does not start in time",
        (
            Act(
                "`failurePolicy.startupDeadlineSeconds: 20`, an image that was never built",
                Seen("Failed", "Failed", "ImagePull", ("never-built", "failurePolicy.startupDeadlineSeconds")),
                seconds=240,
            ),
        ),
        spec={"failurePolicy": {"startupDeadlineSeconds": 20}},
        after=(nothing_held,),
        operator="missing-image",
        topic=TOPIC,
        trains=False,
    ),
    Drill(
        "stalled",
        "the workers run, but train no more",
        (
            Act(
                "the training process stopped (SIGSTOP), `failurePolicy.progressDeadlineSeconds: 75`",
                Seen("Restarting", "Started", "Restarting", ("no step was finished after step", "restart 1 of 3")),
                (submit, checkpoint(20), freeze),
                seconds=240,
            ),
        ),
        spec={**LONG, "failurePolicy": {"progressDeadlineSeconds": 75}},
        after=(counted(attempt=2, restarts=1),),
        topic=TOPIC,
    ),
    Drill(
        "time-to-live",
        "a job that has ended is deleted",
        (
            Act("`ttlSecondsAfterFinished: 2`", Seen("Failed", "Failed", "InvalidModel")),
            Act("(two seconds later)", Gone(), (then,), seconds=30),
        ),
        spec={"ttlSecondsAfterFinished": 2, "model": {"volumePath": "nowhere"}},
        topic=TOPIC,
        trains=False,
    ),
    Drill(
        "clean-all",
        "everything goes at the end",
        (Act("`cleanPodPolicy: All`, an error of the user", Seen("Failed", "Failed", "InvalidData"), seconds=240),),
        spec={**WRONG, "cleanPodPolicy": "All"},
        after=(left(job=0, pod=0, configmap=0, service=0),),
        topic=TOPIC,
    ),
    Drill(
        "clean-running",
        "only what runs goes at the end",
        (Act("`cleanPodPolicy: Running`, an error of the user", Seen("Failed", "Failed", "InvalidData"), seconds=240),),
        spec={**WRONG, "cleanPodPolicy": "Running"},
        after=(nothing_held, left(job=1, pod=1, configmap=1, service=1)),
        topic=TOPIC,
    ),
    Drill(
        "changed-suspended",
        "more workers, while suspended",
        (
            Act(
                "`suspend: true`, `workers.nodes: 2`, `requests.cpu: 60m`",
                SUSPENDED,
                (
                    submit,
                    checkpoint(20),
                    patch(suspend=True, workers={"nodes": 2, "resources": {"requests": {"cpu": "60m"}}}),
                ),
                seconds=240,
            ),
            Act(
                "`suspend: false`",
                Seen("Running", "Running", "Running", ("2 of 2 workers",)),
                (patch(suspend=False),),
                seconds=240,
            ),
        ),
        spec=LONG,
        after=(all_ready(2), requests("60m"), counted(restarts=0)),
        topic=TOPIC,
    ),
    Drill(
        "changed-running",
        "more workers, while it trains",
        (
            Act(
                "`workers.nodes: 2`",
                Refused(("spec.workers.nodes can only be changed while the job is suspended",)),
                (submit, state("Staging"), patch(workers={"nodes": 2})),
            ),
        ),
        topic=TOPIC,
        trains=False,
    ),
)
