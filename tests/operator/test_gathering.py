"""Which changes of a status wait for company, and for how long."""

import pytest

from kubetune_operator.api import FineTuneJobStatus
from kubetune_operator.gathering import Gathering, is_small

RUNNING = {
    "state": "Running",
    "attempt": 1,
    "workers": {"active": 2, "ready": 1},
    "conditions": [
        {
            "type": "Running",
            "status": "True",
            "reason": "Running",
            "message": "1 of 2",
            "lastTransitionTime": "2030-01-01T12:00:00Z",
            "observedGeneration": 1,
        }
    ],
}


def status(**changes) -> FineTuneJobStatus:
    return FineTuneJobStatus.model_validate({**RUNNING, **changes})


def condition(**changes) -> dict:
    return {"conditions": [{**RUNNING["conditions"][0], **changes}]}


CHANGES = [
    ("nothing", {}, True),
    ("the count of workers", {"workers": {"active": 2, "ready": 2}}, True),
    ("the first count of workers", {"workers": None}, True),
    ("a wording", condition(message="2 of 2"), True),
    ("a reason", condition(reason="Disruption"), False),
    ("a condition's status", condition(status="False"), False),
    ("a new condition", {"conditions": [*RUNNING["conditions"], *condition(type="Started")["conditions"]]}, False),
    ("the state", {"state": "Suspended"}, False),
    ("the attempt", {"attempt": 2}, False),
    ("a restart", {"restarts": 1}, False),
    ("a step", {"progress": {"step": 1, "totalSteps": 2, "epoch": 0, "percentage": 50}}, False),
    ("a new generation of the spec", {"observedGeneration": 2}, False),
]


@pytest.mark.parametrize(("changes", "small"), [case[1:] for case in CHANGES], ids=[case[0] for case in CHANGES])
def test_what_is_small(changes, small):
    assert is_small(status(), status(**changes)) is small


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_small_news_waits_from_when_it_was_first_seen():
    clock = Clock()
    gathering = Gathering(10, clock)
    assert gathering.wait("team/bot", status(), status(**condition(message="a"))) == 10
    clock.now += 4
    assert gathering.wait("team/bot", status(), status(**condition(message="b"))) == 6
    clock.now += 6
    assert gathering.wait("team/bot", status(), status(**condition(message="b"))) == 0
    assert gathering.wait("team/bot", status(), status(**condition(message="c"))) == 10, "it was written"


def test_what_matters_takes_small_news_along():
    clock = Clock()
    gathering = Gathering(10, clock)
    gathering.wait("team/bot", status(), status(**condition(message="a")))
    assert gathering.wait("team/bot", status(), status(state="Failed", **condition(message="a"))) == 0
    clock.now += 9
    assert gathering.wait("team/bot", status(), status(**condition(message="b"))) == 10


@pytest.mark.parametrize("settled", ["taken back", "forgotten"])
def test_news_that_is_none_any_more_does_not_wait(settled):
    clock = Clock()
    gathering = Gathering(10, clock)
    gathering.wait("team/bot", status(), status(**condition(message="a")))
    if settled == "taken back":
        assert gathering.wait("team/bot", status(), status()) == 0
    else:
        gathering.forget("team/bot")
    clock.now += 9
    assert gathering.wait("team/bot", status(), status(**condition(message="b"))) == 10


def test_jobs_wait_each_for_themselves():
    clock = Clock()
    gathering = Gathering(10, clock)
    gathering.wait("team/bot", status(), status(**condition(message="a")))
    clock.now += 9
    assert gathering.wait("team/other", status(), status(**condition(message="a"))) == 10


def test_without_a_time_to_gather_everything_is_written_at_once():
    assert Gathering(0).wait("team/bot", status(), status(**condition(message="a"))) == 0
