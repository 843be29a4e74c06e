"""What a drill is: something that goes wrong, or is done, and what the operator must then say and leave behind."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.drills.scene import Scene

Object = dict[str, Any]
Step = Callable[["Scene"], None]
"""Something that is done, or waited for. Raises AssertionError where it does not come."""


def submit(scene: "Scene") -> None:
    """Apply the drill's FineTuneJob."""
    scene.submit()


OPERATOR = "operator"
API_SERVER = "kube-apiserver"
"""What may be away."""
MAIN = "main"
"""The operator of most drills, and the namespace with the volumes."""


@dataclass(frozen=True)
class Seen:
    """What must be seen of the FineTuneJob: its state, and the condition that explains it."""

    state: str
    condition: str
    reason: str
    words: tuple[str, ...] = ()
    """Must stand in the condition's message: who, where, and what to do."""
    holds: bool | None = None
    """The condition's status, where it matters beside the reason."""
    also: Callable[[Object], bool] = lambda _: True
    """What else must be true of the status at that moment."""
    anew: bool = False
    """Whether it must be written after what was done: what was there before does not count."""

    def fits(self, job: Object | None) -> bool:
        """Whether the FineTuneJob is where it must be."""
        status = (job or {}).get("status") or {}
        found = condition_of(status, self.condition)
        return (
            status.get("state") == self.state
            and found.get("reason") == self.reason
            and (self.holds is None or found["status"] == str(self.holds))
            and all(word in found.get("message", "") for word in self.words)
            and self.also(status)
        )


@dataclass(frozen=True)
class Gone:
    """The FineTuneJob and all that it owned must be gone."""


@dataclass(frozen=True)
class Refused:
    """The API server must refuse what was done, in these words."""

    words: tuple[str, ...]


@dataclass(frozen=True)
class Act:
    """One row of the table: what was done, and what was seen of it."""

    done: str
    """For the table; as a person would say it."""
    seen: Seen | Gone | Refused
    steps: tuple[Step, ...] = (submit,)
    """The time counts from the start of the last one."""
    seconds: float = 120
    """The latest at which it must be seen, on two very busy cores."""


@dataclass(frozen=True)
class Outage:
    """Something is stopped in the middle of a drill. All drills with one share it: theirs is the same moment."""

    lead: tuple[Step, ...]
    """What is done before."""
    meanwhile: tuple[Step, ...] = ()
    """What is done while it is away. The acts follow; the first one's time counts from its start."""
    brief: bool = False
    """Whether the stage that the lead leads to passes soon: such leads come last."""
    of: str = OPERATOR
    """OPERATOR, or API_SERVER of the embedded cluster."""


@dataclass(frozen=True)
class Drill:
    """One FineTuneJob and what happens to it."""

    name: str
    """Of the FineTuneJob."""
    case: str
    acts: tuple[Act, ...]
    spec: Mapping[str, Any] = field(default_factory=dict)
    """What differs from the small job that every drill starts from."""
    before: tuple[Step, ...] = ()
    """What is made ready before the job is submitted."""
    after: tuple[Step, ...] = ()
    """What must be, or must not be, left behind."""
    topic: str = "Lifecycle"
    """Heading in the table."""
    model: str = "tiny"
    """The folder of which the drill gets a copy of its own, so that no staging is shared by chance."""
    operator: str = MAIN
    place: str = MAIN
    """Its namespace."""
    outage: Outage | None = None
    trains: bool = True
    """Whether worker pods come up; those that do not may run side by side in great number."""
    quick: bool = False
    """Whether it belongs to the few that every run of the tests makes."""


def condition_of(status: Object, kind: str) -> Object:
    """A condition; {} where it was never set."""
    return next((one for one in status.get("conditions") or [] if one["type"] == kind), {})
