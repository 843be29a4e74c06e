"""What a fault is, and how the runs that it hits are drawn: one seed, one list of runs."""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tests.chaos.ground import written
from tests.drills.drill import Act, Drill, Seen, Step, submit
from tests.drills.site import merged
from tests.drills.steps import counted, holds, left, nothing_held, state, then

TOPIC = "Faults"
DONE = Seen("Succeeded", "Succeeded", "Done")
SECONDS = 420
"""The latest at which a run must have ended, with three others and their faults beside it on two cores."""
STEPS, EVERY = 200, 10
"""Steps of a run and between two of its checkpoints: a quiet node needs seconds."""
EARLY = 4
"""The checkpoint after which a fault comes at the latest: it still meets a run that trains."""
SPEC: Mapping[str, Any] = {
    "model": {"volumePath": "tiny"},
    "training": {"maxSteps": STEPS},
    "checkpoint": {"everySteps": EVERY},
}
"""What differs from the drills' job."""


@dataclass(frozen=True)
class Hit:
    """A fault whose details have been drawn."""

    done: str
    """What was done, for the log."""
    steps: tuple[Step, ...] = (then,)
    """What is done after the moment that was drawn; the seconds count from the last one."""
    spec: Mapping[str, Any] = field(default_factory=dict)
    before: tuple[Step, ...] = ()
    nodes: int | None = None
    """Workers, where the fault needs a certain number."""
    moment: tuple[str, Step] | None = None
    """When, where the fault cannot come at any moment."""


Draw = Callable[[random.Random, str], Hit]
"""Draws the details of a fault for a run of that name."""


@dataclass(frozen=True)
class Fault:
    """A kind of fault, what may come of it, and what must not."""

    name: str
    case: str
    draw: Draw
    end: Seen = DONE
    restarts: int = 0
    disruptions: int = 0
    trains: bool = True
    """Whether it comes to workers at all."""
    weights: str = "tiny"
    """Folder of the model that is trained, whose undisturbed run must have the same weights."""
    quick: bool = False
    """Whether it belongs to the few that every run of the tests makes."""

    @property
    def must(self) -> str:
        """The right end, for the table."""
        counts = {"restart": self.restarts, "disruption": self.disruptions}
        words = [f"{number} {name}{'s' * (number != 1)}" for name, number in counts.items() if number]
        end = "Succeeded, the same weights" if self.end is DONE else f"Failed, {self.end.reason}"
        return ", ".join([end, *words])


def moments(chance: random.Random) -> tuple[str, Step]:
    """Any moment of a run, from its submission to a fifth of its steps."""
    step = EVERY * chance.randint(1, EARLY)
    return chance.choice(
        [
            ("at once", then),
            ("while the workers start", state("Starting")),
            ("when the workers run", holds("Running")),
            (f"after the checkpoint of step {step}", written(step)),
            (f"after the checkpoint of step {step}", written(step)),
        ]
    )


def late(chance: random.Random) -> tuple[str, Step]:
    """A moment at which workers train: there are at least two checkpoints."""
    step = EVERY * chance.randint(2, EARLY)
    return f"after the checkpoint of step {step}", written(step)


def calm(model: str, nodes: int, spec: Mapping[str, Any], note: Step) -> Drill:
    """The undisturbed run that others are compared with."""
    act = Act("nothing", DONE, seconds=SECONDS)
    after = (counted(attempt=1, restarts=0, disruptions=0), nothing_held, left(job=1), note)
    return Drill(calm_name(model, nodes), "nothing happens", (act,), _spec(spec, nodes), after=after, topic=TOPIC)


def calm_name(model: str, nodes: int) -> str:
    """Name of an undisturbed run."""
    return f"calm-{model}-{nodes}"


@dataclass(frozen=True)
class Run:
    """A job and the fault that it meets; `fault` is None for an undisturbed one."""

    drill: Drill
    fault: Fault | None
    like: str
    """The undisturbed run that has the same weights."""


def drawn(fault: Fault, number: int, chance: random.Random, note: Step) -> Run:
    """One run with that fault."""
    name = f"{fault.name}-{number:03}"
    hit = fault.draw(chance, name)
    nodes = hit.nodes or chance.choice((1, 1, 2))
    when, moment = hit.moment or ("", then)
    act = Act(f"{hit.done} {when}".strip(), fault.end, (submit, moment, *hit.steps), SECONDS)
    after: tuple[Step, ...] = (nothing_held, counted(restarts=fault.restarts, disruptions=fault.disruptions))
    if fault.end is DONE:
        attempts = 1 + fault.restarts + fault.disruptions
        after += (counted(attempt=attempts), left(job=attempts), note)
    drill = Drill(
        name, fault.case, (act,), _spec(hit.spec, nodes), hit.before, after, TOPIC, fault.weights, trains=fault.trains
    )
    return Run(drill, fault, calm_name(fault.weights, nodes))


def _spec(more: Mapping[str, Any], nodes: int) -> dict[str, Any]:
    spec = merged(merged(dict(SPEC), dict(more)), {"workers": {"nodes": nodes}})
    if "huggingFace" in spec["model"]:
        spec["model"]["volumePath"] = None  # what the drills' job has must go in the end
    return spec


def draw(faults: tuple[Fault, ...], count: int, seed: int, note: Step) -> list[Run]:
    """So many runs, each kind as often as any other to within one, in an order of chance."""
    chance = random.Random(seed)
    kinds: list[Fault] = []
    while len(kinds) < count:
        kinds += chance.sample(faults, len(faults))
    return [drawn(fault, number, chance, note) for number, fault in enumerate(kinds[:count], start=1)]
