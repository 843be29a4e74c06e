"""Drills: the model comes from a hub that does not do its part, or is damaged afterwards."""

from tests.drills.drill import Act, Drill, Object, Seen, Step, submit
from tests.drills.scene import Scene
from tests.drills.steps import counted, kubectl, nothing_held, staging_pod

TOPIC = "Staging from a hub"


def hub(repo: str, **more: object) -> Object:
    """A spec whose model comes from the hub."""
    return {"model": {"volumePath": None, "huggingFace": {"repo": repo, **more}}}


def denied(name: str, case: str, done: str, spec: Object, *words: str) -> Drill:
    """A drill in which the hub says no."""
    seen = Seen("Failed", "Failed", "SourceDenied", words)
    return Drill(name, case, (Act(done, seen),), spec=spec, after=(nothing_held,), topic=TOPIC, trains=False)


def half_way(owner: str) -> Step:
    """Until the first part of the weights lies on the volume; the hub then sends no more. A volume has no watch."""
    part = f"find /models -path '*{owner}--*' -type f -size +8M"

    def step(scene: Scene) -> None:
        staging_pod(scene)
        scene.site.files.shell(f'n=0; until [ -n "$({part})" ] || [ $n -gt 600 ]; do n=$((n+1)); sleep 0.2; done')

    return step


CHUNK = 10 << 20
"""Bytes that the hub's client writes at once: what it has of the next ones is lost with the connection."""


def sent_once(owner: str) -> Step:
    """The weights went over the line once: what was there was not fetched again."""

    def check(scene: Scene) -> None:
        sent, size = scene.site.sent(owner), scene.site.weights()
        assert sent <= size + CHUNK, f"{sent} bytes sent for a file of {size}"

    return check


STAGED = Seen("Succeeded", "Succeeded", "Done")

DRILLS = (
    denied(
        "hub-gated", "the repository is gated", "HTTP 403 for its files", hub("gated/tiny-llama"), "is gated", "accept"
    ),
    denied(
        "hub-401",
        "the repository is private and there is no token",
        "HTTP 401",
        hub("private/tiny-llama"),
        "HTTP 401",
        "tokenSecretRef",
    ),
    denied("hub-404", "the repository does not exist", "HTTP 404", hub("good/none-such"), "HTTP 404", "good/none-such"),
    denied(
        "hub-revision",
        "the revision does not exist",
        "`revision: v9`",
        hub("good/tiny-llama", revision="v9"),
        "no revision v9",
        "model.huggingFace.revision",
    ),
    Drill(
        "hub-503",
        "the hub does not work",
        (
            Act(
                "HTTP 503 for everything, until the last retry of the staging Job",
                Seen("Failed", "Failed", "SourceUnavailable", ("HTTP 503", "broken/tiny-llama")),
                seconds=240,
            ),
        ),
        spec=hub("broken/tiny-llama"),
        after=(nothing_held,),
        topic=TOPIC,
        trains=False,
    ),
    Drill(
        "hub-cut",
        "the download breaks off half-way",
        (Act("the connection closed in the middle of the weights", STAGED, seconds=240),),
        spec=hub("cut/tiny-llama"),
        after=(sent_once("cut"), counted(restarts=0)),
        topic=TOPIC,
    ),
    Drill(
        "stage-pod-killed",
        "the staging pod is lost half-way",
        (
            Act(
                "the pod deleted when half of the weights had come",
                STAGED,
                (
                    submit,
                    half_way("stalled-kill"),
                    kubectl("delete", "pods", "--selector=job-name={stage}", "--force", "--grace-period=0"),
                ),
                seconds=240,
            ),
        ),
        spec=hub("stalled-kill/tiny-llama"),
        after=(sent_once("stalled-kill"), counted(restarts=0)),
        topic=TOPIC,
    ),
    Drill(
        "stage-job-deleted",
        "a person deletes the staging Job",
        (
            Act(
                "`kubectl delete job` while the weights come",
                STAGED,
                (submit, half_way("stalled-job"), kubectl("delete", "job/{stage}", "--wait=false")),
                seconds=240,
            ),
        ),
        spec=hub("stalled-job/tiny-llama"),
        after=(sent_once("stalled-job"),),
        topic=TOPIC,
    ),
)
