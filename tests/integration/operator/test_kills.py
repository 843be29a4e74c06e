"""Many jobs, and an operator that is killed again and again: nothing is lost, nothing is done twice.

`make drill-kill` runs it with 200 jobs. KUBETUNE_DRILL_JOBS, KUBETUNE_DRILL_SEED and KUBETUNE_DRILL_REPLICAS choose
others.
"""

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from tests.integration.operator.conftest import DONE, STAGED, Operator
from tests.integration.operator.kubelet import Kubelet, Witness
from tests.integration.operator.server import Account, Api, Call, Fault, Proxy

from kubetune_operator.api import GROUP, PLURAL, VERSION
from kubetune_operator.names import OPERATOR_LABEL

pytestmark = pytest.mark.integration
Object = dict[str, Any]

JOBS = int(os.environ.get("KUBETUNE_DRILL_JOBS", "20"))
SEED = int(os.environ.get("KUBETUNE_DRILL_SEED", "0")) or random.SystemRandom().randrange(1, 10**6)
REPLICAS = int(os.environ.get("KUBETUNE_DRILL_REPLICAS", "1"))
SECONDS = 300 + 6 * JOBS
"""Until when all jobs must have ended. Two idle cores need a small part of it."""
KILL_SECONDS = (0.2, max(5.0, JOBS / 20))
"""Between the moment at which somebody leads and the next death: there is progress, however long a takeover takes."""
DIES_AT_A_WRITE = 0.02 / REPLICAS
"""Share of all writes at which the writer dies: half of them are carried out."""
LEADER_DIES = 0.75
"""Share of the deaths at a moment that meet the leader, where there are others."""
NEW_POD = 0.75
"""Share of dead replicas whose pod is replaced. In the others the container starts again, and a leader leads on."""

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
    """Kills replicas of the operator at random moments, and in the middle of their writes; brings each one back."""

    def __init__(self, replicas: list[Operator], chance: random.Random) -> None:
        self.replicas = replicas
        self.chance = chance
        self.deaths: Counter[str] = Counter()
        self.gaps: list[float] = []
        """Seconds without a leader, each time that one died."""
        self.at: float | None = None
        """When the next one dies; None until somebody leads."""
        self.lost: float | None = None
        """Since when nobody leads."""

    def fault(self, replica: Operator, call: Call) -> Fault | None:
        """Called before every write of a replica, in its proxy's thread."""
        process = replica.process
        if process is None or process.poll() is not None or self.chance.random() >= DIES_AT_A_WRITE:
            return None
        carried_out = self.chance.random() < 0.5
        self._kill(replica, "after a write" if carried_out else "before a write")
        return Fault(lost=True) if carried_out else Fault(code=503, message="the operator is dead")

    def look(self) -> None:
        """Bring back the dead, see who leads, and kill one if it is time."""
        for replica in self.replicas:
            assert replica.process is not None
            if replica.process.poll() is not None:
                self._bring_back(replica)
        if (self.at is None or self.lost is not None) and self._leader() is not None:
            self._somebody_leads()
        at = self.at
        if at is not None and time.monotonic() > at:
            self._kill(self._victim(), "at a moment")

    def _somebody_leads(self) -> None:
        lost, self.lost = self.lost, None
        if lost is not None:
            self.gaps.append(time.monotonic() - lost)
        if self.at is None:
            self.at = time.monotonic() + self.chance.uniform(*KILL_SECONDS)

    def _leader(self) -> Operator | None:
        return next((replica for replica in self.replicas if replica.leads()), None)

    def _victim(self) -> Operator:
        leader = self._leader()
        others = [replica for replica in self.replicas if replica is not leader]
        if leader is not None and (not others or self.chance.random() < LEADER_DIES):
            return leader
        return self.chance.choice(others)

    def _kill(self, replica: Operator, when: str) -> None:
        assert replica.process is not None
        led = replica.leads()
        replica.process.kill()
        self.at = None
        self.deaths[f"{'leader' if led else 'other'} {when}"] += 1
        if led and self.lost is None:
            self.lost = time.monotonic()

    def _bring_back(self, replica: Operator) -> None:
        """A new life. Some are over before anybody leads."""
        assert replica.process is not None
        replica.process.wait()
        if len(self.replicas) > 1 and self.chance.random() < NEW_POD:
            replica.environment["KUBETUNE_POD_NAME"] = f"pod-{self.deaths.total()}-{replica.port}"
        replica.launch()
        self.at = None if self.chance.random() < 0.8 else time.monotonic() + self.chance.uniform(0.2, 2.0)


@pytest.fixture
def standby(drill: Any, kube: Any, tmp_path: Path) -> Iterator[Callable[..., tuple[Operator, Proxy]]]:
    """standby(drill, number): another replica of its operator, behind a proxy of its own; it is ready."""
    made: list[tuple[Operator, Proxy]] = []

    def make(drill: Any, number: int) -> tuple[Operator, Proxy]:
        folder = tmp_path / f"replica-{number}"
        folder.mkdir()
        proxy = Proxy(Account.of(kube.config), folder)
        made.append((Operator(proxy.start(), drill.namespace, folder, pod_name=f"replica-{number}"), proxy))
        made[-1][0].start()
        return made[-1]

    yield make
    for operator, proxy in made:
        if operator.process is not None:
            operator.stop(signal.SIGKILL)
        proxy.stop()
        assert operator.errors() == []


@pytest.mark.timeout(SECONDS + 120)
def test_no_job_is_lost_or_doubled_while_the_operator_is_killed(drill, standby, kube):
    chance = random.Random(SEED)
    print(f"seed {SEED}, {JOBS} jobs, {REPLICAS} replica(s)")
    drill = drill(proxied=True)
    account = Account.of(kube.config)
    fates = {f"job-{number}": FATES[number % len(FATES)] for number in range(JOBS)}
    kubelet = Kubelet(account, drill.namespace, {name: fate for name, (fate, _) in fates.items()}, DONE, STAGED)
    witness = Witness(account, drill.namespace)
    team = [(drill.operator, drill.proxy), *(standby(drill, number) for number in range(1, REPLICAS))]
    api, killer = Api(account), Killer([replica for replica, _ in team], chance)
    path = f"/apis/{GROUP}/{VERSION}/namespaces/{drill.namespace}/{PLURAL}"
    for replica, proxy in team:
        proxy.fault = partial(killer.fault, replica)
    started = time.monotonic()
    witness.start()
    kubelet.start()
    try:
        for name in fates:
            api.request("POST", path, _manifest(drill, name, chance.choice((1, 1, 2))))
        found = _until_ended(api, path, killer, started)
        takeovers = _takeovers(api, drill.namespace)
    finally:
        kubelet.stop()
        witness.stop()
        api.close()
    seconds = time.monotonic() - started
    stagings = sum(len(uids) for name, uids in witness.uids.items() if name.startswith("kubetune-stage"))
    writes = sum(proxy.counted().total() for _, proxy in team)
    print(f"{seconds:.0f} s, {killer.deaths.total()} deaths: {dict(killer.deaths)}, writes: {writes}")
    print(
        f"takeovers: {takeovers}, longest without a leader: {max(killer.gaps, default=0):.1f} s, stagings: {stagings}"
    )
    ends = {name: _end(body) for name, body in found.items()}
    doubled = sum(len(uids) > 1 for name, uids in witness.uids.items() if not name.startswith("kubetune-stage"))
    print(f"lost: {sum(ends.get(name) != end for name, (_, end) in fates.items())}, doubled: {doubled}")
    assert ends == {name: end for name, (_, end) in fates.items()}
    assert (kubelet.problems, witness.problems) == ([], [])
    attempts = {f"{name}-a{number + 1}" for name, (fate, _) in fates.items() for number in range(len(fate))}
    assert {name for name in witness.uids if not name.startswith("kubetune-stage")} == attempts
    assert sum(name.startswith("kubetune-stage") for name in witness.uids) == 1
    assert killer.deaths.total() >= 3, "the drill was no drill"
    assert (takeovers > 0) == (REPLICAS > 1), "one replica leads on in its next life; of two, the other takes over"


def _takeovers(api: Api, namespace: str) -> int:
    """How often the Lease went from one replica to another."""
    lease = api.request("GET", f"/apis/coordination.k8s.io/v1/namespaces/{namespace}/leases/kubetune")
    return int(lease["spec"].get("leaseTransitions") or 0)


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
