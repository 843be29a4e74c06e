"""An API server that refuses, throttles and loses answers, and names that come again at once."""

import json
import random
from typing import Any

import pytest
from tests.integration.operator.server import Call, Fault

pytestmark = pytest.mark.integration
Object = dict[str, Any]

TROUBLE = [
    Fault(lost=True),
    Fault(code=429, message="slow down", headers=(("Retry-After", "1"),)),
    Fault(code=500, message="etcdserver: leader changed"),
    Fault(code=409, message="the object has been modified"),
]


@pytest.mark.parametrize("seed", [1, 2])
def test_a_job_comes_to_its_end_although_half_of_all_writes_fail(drill, seed):
    """Throttled, refused by a server without its etcd, in conflict, or carried out without an answer."""
    drill = drill(proxied=True)
    chance = random.Random(seed)
    spared = ("events", "leases")  # an Event is not tried again, and whoever cannot renew its Lease ends, as it must
    faults = [*TROUBLE, None, None, None, None]
    drill.proxy.fault = lambda call: None if call.resource in spared else chance.choice(faults)
    pods = drill.running()
    drill.ends(pods[0], 0, drill.done)
    drill.ends(pods[1], 0)
    status = drill.until_state("job", "Succeeded")
    assert (status["attempt"], status.get("restarts", 0)) == (1, 0)
    assert len(json.loads(drill.kubectl("get", "jobs", "-l", "kubetune.io/role=worker", "-o", "json"))["items"]) == 1
    told = drill.watch("events", drill.every, reached=lambda found: "Succeeded" in _reasons(found))
    ends = [item for item in told.values() if item["reason"] == "Succeeded"]
    assert [item["count"] for item in ends] == [1], "the end is told once, also when the first answer was lost"


def _reasons(events: dict[str, Object]) -> set[str]:
    return {item["reason"] for item in events.values()}


def test_a_refused_job_says_so_and_goes_on_when_it_may(drill):
    """A quota, or a webhook: somebody else can lift it."""
    drill = drill(proxied=True)
    words = 'jobs.batch "job-a1" is forbidden: exceeded quota: team, requested: count/jobs.batch=1, used: 4, limited: 4'
    closed = True

    def refuse(call: Call) -> Fault | None:
        worker = call.kind == "create jobs" and call.name == "job-a1"
        return Fault(code=403, message=words) if worker and closed else None

    drill.proxy.fault = refuse
    drill.submit()
    drill.stage()
    status = drill.until("job", lambda status: drill.condition(status, "Started").get("reason") == "QuotaExceeded")
    assert "Exceeded quota: team" in drill.condition(status, "Started")["message"]
    closed = False
    drill.runs(*drill.workers())
    assert drill.until_state("job", "Running")["attempt"] == 1


def test_a_job_that_is_deleted_and_created_at_once_starts_from_nothing(drill):
    """Its children's names are those of the earlier one's, which are still being collected."""
    drill = drill(proxied=True)
    drill.running()
    before = json.loads(drill.kubectl("get", "finetunejob", "job", "-o", "json"))["metadata"]["uid"]
    drill.kubectl("delete", "finetunejob", "job", "--wait=false")
    drill.submit()
    again = drill.until("job", lambda status: status.get("state") == "Staging")
    assert again.get("attempt", 0) == 0
    drill.stage()
    drill.runs(*drill.workers())
    status = drill.until_state("job", "Running")
    assert (status["attempt"], status.get("restarts", 0)) == (1, 0)
    job = json.loads(drill.kubectl("get", "job", "job-a1", "-o", "json"))
    assert job["metadata"]["ownerReferences"][0]["uid"] != before
    events = json.loads(drill.kubectl("get", "events", "-o", "json"))["items"]
    assert "NameConflict" not in {item["reason"] for item in events}
