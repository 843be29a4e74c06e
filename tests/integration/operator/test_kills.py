"""Many jobs, and an operator that is killed again and again: nothing is lost, nothing is done twice.

`make drill-kill` runs it with 200 jobs. KUBETUNE_DRILL_JOBS and KUBETUNE_DRILL_SEED choose others.
"""

import os
import random
import time
from collections import Counter
from typing import Any

import pytest
from tests.integration.operator.conftest import DONE, STAGED
from tests.integration.operator.kubelet import Kubelet, Witness
from tests.integration.operator.server import Account, Api, Call, Fault

from kubetune_operator.api import GROUP, PLURAL, VERSION
from kubetune_operator.names import OPERATOR_LABEL

pytestmark = pytest.mark.integration
Object = dict[str, Any]

JOBS = int(os.environ.get("KUBETUNE_DRILL_JOBS", "20"))
SEED = int(os.environ.get("KUBETUNE_DRILL_SEED", "0")) or random.SystemRandom().randrange(1, 10**6)
SECONDS = 300 + 6 * JOBS
"""Until when all jobs must have ended. Two idle cores need a small part of it."""
KILL_SECONDS = (0.2, max(5.0, JOBS / 20))
"""Between one operator's readiness and its death."""
DIES_AT_A_WRITE = 0.02
"""Share of all writes at which the operator dies: half of them are carried out."""

FATES = [
    # What becomes of each attempt, and what the status must say in the end: state, attempt, restarts, disruptions.
    (["done"], ("Succeeded", 1, 0, 0)),
    (["done"], ("Succeeded", 1, 0, 0)),
    (["done"], ("Succeeded", 1, 0, 0)),
    (["user"], ("Failed", 1, 0, 0)),
    (["crash", "done"], ("Succeeded", 2, 1, 0)),
    (["delete", "done"], ("Succeeded", 2, 1, 0)),
    (["evict", "done"], ("Succeeded", 2, 0, 1)),
    (["crash", "user"], ("Failed", 2, 1, 0)),
    (["evict", "crash", "done"], ("Succeeded", 3, 1, 1)),
    (["crash", "crash", "crash"], ("Failed", 3, 2, 0)),
]


class Killer:
    """Kills the operator at random moments, and in the middle of its writes; brings it back each time."""

    def __init__(self, operator: Any, chance: random.Random) -> None:
        self.operator = operator
        self.chance = chance
        self.deaths: Counter[str] = Counter()
        self.at: float | None = None

    def begin(self) -> None:
        """A new life. Its time runs from when the operator is ready; some are killed before."""
        self.at = None if self.chance.random() < 0.8 else time.monotonic() + self.chance.uniform(0.2, 2.0)

    def fault(self, call: Call) -> Fault | None:
        """Called before every write, in the proxy's thread."""
        process = self.operator.process
        if process is None or process.poll() is not None or self.chance.random() >= DIES_AT_A_WRITE:
            return None
        process.kill()
        carried_out = self.chance.random() < 0.5
        self.deaths["after a write" if carried_out else "before a write"] += 1
        return Fault(lost=True) if carried_out else Fault(code=503, message="the operator is dead")

    def look(self) -> None:
        process = self.operator.process
        if process.poll() is not None:
            process.wait()
            self.operator.launch()
            self.begin()
        elif self.at is None and self.operator.answers("/readyz"):
            self.at = time.monotonic() + self.chance.uniform(*KILL_SECONDS)
        elif self.at is not None and time.monotonic() > self.at:
            process.kill()
            self.deaths["at a moment"] += 1


@pytest.mark.timeout(SECONDS + 120)
def test_no_job_is_lost_or_doubled_while_the_operator_is_killed(drill, kube, record_property):
    chance = random.Random(SEED)
    print(f"seed {SEED}, {JOBS} jobs")
    drill = drill(proxied=True)
    account = Account.of(kube.config)
    fates = {f"job-{number}": FATES[number % len(FATES)] for number in range(JOBS)}
    kubelet = Kubelet(account, drill.namespace, {name: fate for name, (fate, _) in fates.items()}, DONE, STAGED)
    witness = Witness(account, drill.namespace)
    api, killer = Api(account), Killer(drill.operator, chance)
    path = f"/apis/{GROUP}/{VERSION}/namespaces/{drill.namespace}/{PLURAL}"
    drill.proxy.fault = killer.fault
    started = time.monotonic()
    witness.start()
    kubelet.start()
    try:
        for name in fates:
            api.request("POST", path, _manifest(drill, name, chance.choice((1, 1, 2))))
        found = _until_ended(api, path, killer, started)
    finally:
        kubelet.stop()
        witness.stop()
        api.close()
    seconds = time.monotonic() - started
    stagings = sum(len(uids) for name, uids in witness.uids.items() if name.startswith("kubetune-stage"))
    print(
        f"{seconds:.0f} s, deaths: {dict(killer.deaths)}, writes: {drill.proxy.counted().total()}, stagings: {stagings}"
    )
    assert {name: _end(body) for name, body in found.items()} == {name: end for name, (_, end) in fates.items()}
    assert (kubelet.problems, witness.problems) == ([], [])
    attempts = {f"{name}-a{number + 1}" for name, (fate, _) in fates.items() for number in range(len(fate))}
    assert {name for name in witness.uids if not name.startswith("kubetune-stage")} == attempts
    assert sum(name.startswith("kubetune-stage") for name in witness.uids) == 1
    assert killer.deaths.total() >= 3, "the drill was no drill"


def _manifest(drill: Any, name: str, nodes: int) -> Object:
    manifest: Object = drill.manifest(name, preset="llama3/8B_lora", workers={"nodes": nodes})
    manifest["metadata"]["labels"] = {OPERATOR_LABEL: drill.namespace}
    manifest["spec"]["failurePolicy"] = {"maxRestarts": 2}
    return manifest


def _until_ended(api: Api, path: str, killer: Killer, started: float) -> dict[str, Object]:
    look = 0.0
    while True:
        killer.look()
        time.sleep(0.1)
        if time.monotonic() < look:
            continue
        look = time.monotonic() + 2
        found = {item["metadata"]["name"]: item for item in api.request("GET", path)["items"]}
        if all(_ended(body) for body in found.values()):
            return found
        if time.monotonic() > started + SECONDS:
            waiting = {
                name: body.get("status") for name, body in found.items() if _end(body)[0] not in ("Succeeded", "Failed")
            }
            pytest.fail(f"{len(waiting)} jobs did not end: {waiting}"[:6000])


def _ended(body: Object) -> bool:
    return _end(body)[0] in ("Succeeded", "Failed")


def _end(body: Object) -> tuple[Any, ...]:
    status = body.get("status", {})
    return tuple(status.get(field) for field in ("state", "attempt", "restarts", "disruptions"))
