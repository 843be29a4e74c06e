"""Drills: what lies on the models claim is shared, and believed by its digests; who does not fit is told early."""

import json
from typing import Any

from tests.drills.drill import Act, Drill, Object, Seen, Step, submit
from tests.drills.fetching import STAGED, hub
from tests.drills.scene import PATIENCE, Scene
from tests.drills.steps import left, nothing_held, state

TOPIC = "What is staged"
FOLDER = "/models/huggingface"


def another(suffix: str) -> Step:
    """Submit one more job with the same spec."""

    def step(scene: Scene) -> None:
        manifest = scene.manifest()
        manifest["metadata"]["name"] = f"{scene.name}-{suffix}"
        scene.make(manifest)

    return step


def ends_too(*suffixes: str) -> Step:
    """The other jobs succeed as well."""

    def check(scene: Scene) -> None:
        for suffix in suffixes:
            which = f"finetunejob/{scene.name}-{suffix}"
            scene.kubectl("wait", "--for=condition=Succeeded", which, f"--timeout={PATIENCE:.0f}s")

    return check


def sent_times(owner: str, times: int) -> Step:
    """The weights went over the line so many times, to the byte."""

    def check(scene: Scene) -> None:
        sent, size = scene.site.sent(owner), scene.site.weights()
        assert sent == times * size, f"{sent} bytes sent for a file of {size}"

    return check


def staged_by(*suffixes: str) -> Step:
    """One staging Job belongs to this job and to the others."""

    def check(scene: Scene) -> None:
        (name,) = scene.stage_jobs()
        job = json.loads(scene.kubectl("get", "job", name, "--output=json"))
        owners = {owner["name"] for owner in job["metadata"]["ownerReferences"]}
        assert owners == {scene.name, *(f"{scene.name}-{suffix}" for suffix in suffixes)}

    return check


def damage(owner: str) -> Step:
    """Change one byte of the staged weights."""
    file = f"$(ls {FOLDER}/{owner}--*/model.safetensors)"

    def step(scene: Scene) -> None:
        scene.site.files.shell(f'printf "\\377" | dd of={file} bs=1 seek=100000 conv=notrunc status=none')

    return step


def same_as_the_hubs(owner: str) -> Step:
    """The staged weights are those of the hub."""

    def check(scene: Scene) -> None:
        scene.site.files.shell(f"cmp /models/hub/model.safetensors {FOLDER}/{owner}--*/model.safetensors")

    return check


def _has_commit(status: Object) -> bool:
    return len(status["staged"].get("revision", "")) == 40


def _has_estimate(status: Object) -> bool:
    found: dict[str, Any] = status.get("estimate", {})
    return bool(found.get("device") == "GPU" and found["bytes"] > found["available"] == 1 << 30)


LARGE_STEP: Object = {
    "workers": {"gpusPerNode": 1, "gpuMemory": "1Gi"},
    "dataset": {"packed": True, "maxSequenceLength": 8192},
    "training": {"batchSize": 64},
}

DRILLS = (
    Drill(
        "shared",
        "three jobs need the same model",
        (
            Act(
                "three jobs submitted at once",
                Seen("Succeeded", "Succeeded", "Done", also=_has_commit),
                (submit, another("two"), another("three")),
                seconds=240,
            ),
        ),
        spec=hub("good-shared/tiny-llama"),
        after=(ends_too("two", "three"), sent_times("good-shared", 1), staged_by("two", "three")),
        topic=TOPIC,
    ),
    Drill(
        "damaged",
        "a staged model is damaged",
        (
            Act("the first job", STAGED, seconds=240),
            Act(
                "one byte of the weights changed on the volume, then the same job again under another name",
                STAGED,
                (damage("good-damaged"), another("again"), ends_too("again")),
            ),
        ),
        spec=hub("good-damaged/tiny-llama"),
        after=(sent_times("good-damaged", 2), same_as_the_hubs("good-damaged")),
        topic=TOPIC,
    ),
    Drill(
        "data-too",
        "model and data come from the hub",
        (
            Act(
                "`huggingFace` for both",
                Seen("Succeeded", "Succeeded", "Done", also=lambda status: status["stagedData"][0]["files"] == 1),
                seconds=240,
            ),
        ),
        spec={
            **hub("good-both/tiny-llama"),
            "dataset": {"volumePath": None, "huggingFace": {"repo": "good-both/tiny-llama", "path": "train.jsonl"}},
        },
        topic=TOPIC,
    ),
    Drill(
        "no-data-file",
        "the dataset repository lacks the file",
        (
            Act(
                "`path: trian.jsonl`",
                Seen("Failed", "Failed", "InvalidData", ("no data files at trian.jsonl", "train.jsonl")),
            ),
        ),
        spec={"dataset": {"volumePath": None, "huggingFace": {"repo": "good-no/tiny-llama", "path": "trian.jsonl"}}},
        after=(nothing_held,),
        topic=TOPIC,
        trains=False,
    ),
    Drill(
        "too-large",
        "the run does not fit into the GPU",
        (
            Act(
                "`gpuMemory: 1Gi` and long packed rows",
                Seen("Failed", "Failed", "DoesNotFit", ("on each GPU", "workers.gpuMemory is 1Gi: set ", ", or set ")),
            ),
            Act(
                "(the estimate is in the status)",
                Seen("Failed", "Failed", "DoesNotFit", also=_has_estimate),
                (state("Failed"),),
            ),
        ),
        spec=LARGE_STEP,
        after=(left(job=0, service=0, configmap=0), nothing_held),
        topic=TOPIC,
        trains=False,
        quick=True,
    ),
)
