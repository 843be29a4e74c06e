"""Who leads: one Lease, replicas that want it, and a loop whose time passes as fast as nothing happens."""

import asyncio
import random
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest

from kubetune_operator.errors import ApiError, Unreachable
from kubetune_operator.lease import ADDRESS, LEASE_SECONDS, RENEW_SECONDS, RETRY_SECONDS, TRY_SECONDS, Election

Object = dict[str, Any]


class QuickLoop(asyncio.SelectorEventLoop):
    """A loop that never waits: where it would, its clock goes on to the next timer."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0
        wait = self._selector.select

        def select(timeout: float | None) -> Any:
            self.now += timeout or 0.0
            return wait(0)

        self._selector.select = select

    def time(self) -> float:
        return self.now


@pytest.fixture
def quickly() -> Callable[..., Any]:
    """quickly(coroutine function): runs it on a loop of its own that never waits."""

    def run(main: Callable[[], Any]) -> Any:
        with asyncio.Runner(loop_factory=QuickLoop) as runner:
            return runner.run(asyncio.wait_for(main(), 36000))

    return run


def clock() -> float:
    return asyncio.get_running_loop().time()


class Server:
    """Has one Lease, and compares versions as the API server does."""

    def __init__(self) -> None:
        self.lease: Object | None = None
        self.version = 0
        self.writes: list[tuple[float, str]] = []
        self.changed = asyncio.Event()

    def put(self, manifest: Object) -> Object:
        self.version += 1
        self.lease = {**manifest, "metadata": {**manifest["metadata"], "resourceVersion": str(self.version)}}
        self.writes.append((clock(), manifest["spec"]["holderIdentity"]))
        self.changed.set()
        self.changed = asyncio.Event()
        return self.lease

    @property
    def holder(self) -> str:
        return self.lease["spec"]["holderIdentity"] if self.lease else ""


class Link:
    """One replica's connection to the server; `fault` breaks it."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.fault: Callable[[], Any] | None = None
        self.deaf = False
        self.reads = 0

    async def _pass(self) -> None:
        await asyncio.sleep(0.001)
        if self.fault is not None:
            await self.fault()

    async def read(self) -> Object | None:
        self.reads += 1
        await self._pass()
        return self.server.lease

    async def create(self, manifest: Object) -> Object:
        await self._pass()
        if self.server.lease is not None:
            raise ApiError(409, "already exists")
        return self.server.put(manifest)

    async def replace(self, manifest: Object) -> Object:
        await self._pass()
        if manifest["metadata"]["resourceVersion"] != str(self.server.version):
            raise ApiError(409, "the object has been modified")
        return self.server.put(manifest)

    async def watch(self, version: str):
        await self._pass()
        seen = version
        while True:
            changed = self.server.changed
            if self.deaf or seen == str(self.server.version):
                await (asyncio.Event().wait() if self.deaf else changed.wait())
                await self._pass()
            seen = str(self.server.version)
            kind = "MODIFIED" if self.server.lease else "DELETED"
            yield {"type": kind, "object": self.server.lease or {"metadata": {"resourceVersion": seen}}}


async def refuses() -> None:
    raise Unreachable("connection refused")


async def stalls() -> None:
    await asyncio.Event().wait()


class Replica:
    """An election, its link, and how it went."""

    def __init__(self, server: Server, name: str) -> None:
        self.link = Link(server)
        self.election = Election(self.link, name, f"{name}:8443")
        self.led_at: float | None = None
        self.lost: str | None = None
        self.lost_at: float | None = None
        self.task = asyncio.ensure_future(self._run())

    async def _run(self) -> None:
        await self.election.acquire()
        self.led_at = clock()
        self.lost = await self.election.keep()
        self.lost_at = clock()

    async def die(self) -> None:
        """As with SIGKILL."""
        self.task.cancel()
        with suppress(asyncio.CancelledError):
            await self.task


async def leading(replica: Replica) -> float:
    """When the replica leads."""
    while replica.led_at is None:
        await asyncio.sleep(0.05)
    return replica.led_at


async def pair() -> tuple[Server, Replica, Replica]:
    """A leader, and a standby that has seen it."""
    server = Server()
    leader = Replica(server, "one")
    await leading(leader)
    standby = Replica(server, "two")
    await asyncio.sleep(5)
    assert (leader.election.leads(), standby.election.leads()) == (True, False)
    return server, leader, standby


def test_the_first_replica_makes_the_lease_and_leads(quickly):
    async def main():
        server = Server()
        replica = Replica(server, "one")
        await leading(replica)
        spec = server.lease["spec"]
        assert (spec["holderIdentity"], spec["leaseDurationSeconds"], spec["leaseTransitions"]) == ("one", 15, 0)
        assert spec["renewTime"].endswith("Z")
        assert server.lease["metadata"]["annotations"] == {ADDRESS: "one:8443"}
        assert replica.election.leads()
        assert replica.election.leader_address is None

    quickly(main)


def test_a_leader_renews_every_two_seconds_for_as_long_as_it_lives(quickly):
    async def main():
        server, _leader, standby = await pair()
        started = len(server.writes)
        await asyncio.sleep(600)
        assert (len(server.writes) - started) == pytest.approx(600 / RETRY_SECONDS, rel=0.01)
        assert {holder for _, holder in server.writes} == {"one"}
        assert standby.led_at is None
        assert standby.election.leader_address == "one:8443"
        assert standby.link.reads == 1, "a standby only watches"

    quickly(main)


def test_a_dead_leader_is_followed_when_its_lease_has_run_out(quickly):
    async def main():
        server, leader, standby = await pair()
        await leader.die()
        died = clock()
        took = await leading(standby) - died
        assert LEASE_SECONDS - RETRY_SECONDS - 0.1 < took < LEASE_SECONDS + 0.1
        assert server.holder == "two"
        assert server.lease["spec"]["leaseTransitions"] == 1
        assert server.lease["metadata"]["annotations"] == {ADDRESS: "two:8443"}

    quickly(main)


def test_a_leader_that_stops_is_followed_at_once(quickly):
    async def main():
        server, leader, standby = await pair()
        await leader.die()
        stopped = clock()
        await leader.election.release()
        assert not leader.election.leads()
        assert await leading(standby) - stopped < 0.1
        assert server.writes[-2][1] == ""

    quickly(main)


def test_a_standby_that_stops_gives_nothing_back(quickly):
    async def main():
        server, _, standby = await pair()
        await standby.election.release()
        assert server.holder == "one"

    quickly(main)


@pytest.mark.parametrize("fault", [refuses, stalls], ids=["refuses", "stalls"])
def test_a_leader_whose_connection(quickly, fault):
    """... gives up before another one may lead."""

    async def main():
        _server, leader, standby = await pair()
        leader.link.fault = fault
        cut = clock()
        took_over = await leading(standby)
        assert leader.lost == "the Lease could not be renewed for 10 s"
        assert leader.lost_at - cut <= RENEW_SECONDS + 0.01
        assert not leader.election.leads()
        assert took_over - leader.lost_at > 1.0

    quickly(main)


@pytest.mark.parametrize("fault", [refuses, stalls], ids=["refuses", "stalls"])
def test_a_leader_outlives_a_connection_that_for_a_while(quickly, fault):
    async def main():
        _server, leader, standby = await pair()
        leader.link.fault = fault
        await asyncio.sleep(RENEW_SECONDS - RETRY_SECONDS - TRY_SECONDS)
        leader.link.fault = None
        await asyncio.sleep(60)
        assert leader.lost is None
        assert standby.led_at is None

    quickly(main)


def test_there_are_never_two_leaders_however_the_connections_break(quickly):
    """Fences are asked at every moment: who surely leads is at most one."""

    async def main():
        server = Server()
        replicas = [Replica(server, name) for name in ("one", "two", "three")]
        turns, dice = 0, random.Random(5)
        for _ in range(400):
            for replica in replicas:
                replica.link.fault = dice.choice((refuses, stalls, None))
                replica.link.deaf = dice.random() < 0.2
            for _ in range(dice.randrange(40)):
                await asyncio.sleep(0.5)
                assert sum(replica.election.leads() for replica in replicas) <= 1
            for position, replica in enumerate(replicas):
                if replica.lost is not None:
                    replicas[position] = Replica(server, f"{replica.election.identity}+")
                    turns += 1
        assert turns > 5

    quickly(main)


def test_an_answer_that_was_lost_is_no_lost_lease(quickly):
    """The server took the renewal, the answer never came: the next one meets a version that is our own."""

    async def main():
        server, leader, standby = await pair()
        replace = leader.link.replace

        async def without_answer(manifest: Object) -> Object:
            leader.link.replace = replace
            server.put(manifest)
            raise Unreachable("connection reset")

        leader.link.replace = without_answer
        await asyncio.sleep(30)
        assert leader.lost is None
        assert standby.led_at is None

    quickly(main)


def test_a_leader_that_finds_another_holder_ends_at_once(quickly):
    async def main():
        server, leader, _ = await pair()
        server.put({**server.lease, "spec": {**server.lease["spec"], "holderIdentity": "a person"}})
        await asyncio.sleep(RETRY_SECONDS + 0.1)
        assert leader.lost == "a person holds the Lease now"

    quickly(main)


def test_a_deleted_lease_is_free(quickly):
    async def main():
        server, leader, standby = await pair()
        await leader.die()
        server.lease, server.version = None, server.version + 1
        server.changed.set()
        deleted = clock()
        assert await leading(standby) - deleted < 1

    quickly(main)


def test_a_restarted_container_takes_its_own_lease_back(quickly):
    async def main():
        server, leader, standby = await pair()
        await leader.die()
        again = Replica(server, "one")
        died = clock()
        assert await leading(again) - died < 0.1
        await asyncio.sleep(60)
        assert standby.led_at is None

    quickly(main)


def test_a_standby_with_a_deaf_watch_asks_before_it_takes_the_lease(quickly):
    async def main():
        _server, leader, standby = await pair()
        standby.link.deaf = True
        await asyncio.sleep(120)
        assert standby.led_at is None
        assert leader.lost is None

    quickly(main)


def test_a_standby_waits_for_a_server_that_is_away(quickly):
    async def main():
        server = Server()
        replica = Replica(server, "one")
        replica.link.fault = refuses
        await asyncio.sleep(60)
        assert replica.led_at is None
        replica.link.fault = None
        back = clock()
        assert await leading(replica) - back < RETRY_SECONDS + 0.1

    quickly(main)


def test_what_others_wrote_on_the_lease_stays(quickly):
    async def main():
        server, _leader, _ = await pair()
        server.lease["metadata"]["labels"] = {"team": "ml"}
        await asyncio.sleep(30)
        assert server.lease["metadata"]["labels"] == {"team": "ml"}

    quickly(main)


def test_the_wait_is_what_the_holder_wrote(quickly):
    async def main():
        server, leader, standby = await pair()
        await leader.die()
        server.put({**server.lease, "spec": {**server.lease["spec"], "leaseDurationSeconds": 40}})
        written = clock()
        assert await leading(standby) - written == pytest.approx(40, abs=0.2)

    quickly(main)
