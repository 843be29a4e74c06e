"""Who leads: one Lease, held by one replica. Knows no client: the caller brings the requests.

A holder that has not renewed for RENEW_SECONDS stops writing and ends its process; the others wait for the longer
LEASE_SECONDS, counted by their own clock from when they last saw the Lease change. So no two replicas ever write at the
same time, however their clocks differ.

Why not the client's own election: a lost connection ends its loop while the leader's task goes on, and a stalled one
is never noticed.
"""

import asyncio
import logging
import random
from collections.abc import AsyncGenerator
from contextlib import aclosing
from datetime import UTC, datetime
from typing import Any, Final, Protocol

from kubetune_operator.errors import ApiError, OperatorError

Manifest = dict[str, Any]

LEASE_SECONDS: Final = 15
"""Others may take a Lease that has not changed for so long."""
RENEW_SECONDS: Final = 10.0
"""The holder gives up after so long without a renewal."""
RETRY_SECONDS: Final = 2.0
"""Between two renewals, and between two tries that failed."""
TRY_SECONDS: Final = 3.0
"""Of one try: a stalled connection must leave time for others."""
ADDRESS: Final = "kubetune.io/progress-address"
"""Annotation of the Lease: host:port at which the leader takes progress reports."""

log = logging.getLogger(__name__)


class Requests(Protocol):
    """The requests about the one Lease. All raise OperatorErrors."""

    async def read(self) -> Manifest | None:
        """The Lease; None if there is none."""
        ...

    async def create(self, manifest: Manifest) -> Manifest:
        """Make it; its name is filled in."""
        ...

    async def replace(self, manifest: Manifest) -> Manifest:
        """Write it, if it is still as it was read."""
        ...

    def watch(self, resource_version: str) -> AsyncGenerator[Manifest]:
        """What happens to it from there on."""
        ...


class Election:
    """This replica's part in the election. `address` is where its progress endpoint is reached."""

    def __init__(self, requests: Requests, identity: str, address: str | None = None) -> None:
        self._requests = requests
        self.identity = identity
        self._address = address
        self._lease: Manifest | None = None
        self._changed = float("-inf")
        self._renewed = float("-inf")

    def leads(self) -> bool:
        """Whether this replica holds the Lease, and surely so."""
        return self._left() > 0

    @property
    def leader_address(self) -> str | None:
        """Where the leader's progress endpoint is reached, if another replica leads and says so."""
        if self._lease is None or self._holder in ("", self.identity):
            return None
        address: str | None = (self._lease["metadata"].get("annotations") or {}).get(ADDRESS)
        return address

    async def acquire(self) -> None:
        """Wait until this replica leads. A Lease that it held in an earlier life of its pod is its own at once."""
        while not await self._try():
            await self._follow()

    async def keep(self) -> str:
        """Renew until the Lease is lost; why it is."""
        while True:
            await asyncio.sleep(min(RETRY_SECONDS, self._left()))
            left = self._left()
            if left <= 0:
                return f"the Lease could not be renewed for {RENEW_SECONDS:.0f} s"
            try:
                async with asyncio.timeout(min(left, TRY_SECONDS)):
                    if not await self._renew():
                        return f"{self._holder or 'nobody'} holds the Lease now"
            except (OperatorError, TimeoutError) as error:
                log.warning("cannot renew the Lease: %s", str(error) or "no answer in time")

    def _left(self) -> float:
        """Seconds for which this replica surely leads."""
        return self._renewed + RENEW_SECONDS - _clock()

    async def release(self) -> None:
        """Give the Lease back, so that another replica need not wait until it has run out. Raises OperatorError."""
        held, self._renewed = self.leads(), float("-inf")
        if held:
            await self._write(holder="")

    async def _try(self) -> bool:
        """Take the Lease if it is free; whether it is ours now."""
        try:
            async with asyncio.timeout(TRY_SECONDS):
                await self._read()
                if self._expires_in() > 0:
                    return False
                await self._write(self.identity)
        except (OperatorError, TimeoutError) as error:
            if not (isinstance(error, ApiError) and error.status == 409):  # another replica was faster
                log.warning("cannot take the Lease: %s", str(error) or "no answer in time")
                await asyncio.sleep(RETRY_SECONDS * random.uniform(0.5, 1.0))  # noqa: S311 - jitter
            return False
        return True

    async def _renew(self) -> bool:
        """Write the Lease once more; False if it is somebody else's."""
        try:
            await self._write(self.identity)
        except ApiError as error:
            if error.status != 409:
                raise
            await self._read()  # an earlier try may have been taken without an answer
            if self._holder != self.identity:
                return False
            await self._write(self.identity)
        return True

    async def _follow(self) -> None:
        """Watch the Lease until it is free to take, or the watch ends."""
        if self._lease is None:
            return
        try:
            async with asyncio.timeout(None) as limit:
                limit.reschedule(_clock() + self._expires_in())
                async with aclosing(self._requests.watch(self._lease["metadata"]["resourceVersion"])) as events:
                    async for event in events:
                        self._see(None if event["type"] == "DELETED" else event["object"])
                        limit.reschedule(_clock() + self._expires_in())
        except TimeoutError:
            return
        except OperatorError as error:
            log.warning("cannot watch the Lease: %s", error)
            await asyncio.sleep(RETRY_SECONDS * random.uniform(0.5, 1.0))  # noqa: S311 - jitter

    async def _read(self) -> None:
        self._see(await self._requests.read())

    def _see(self, lease: Manifest | None) -> None:
        """Take in what the server has; a change starts the holder's time anew."""
        if _version(lease) != _version(self._lease):
            self._changed = _clock()
        self._lease = lease

    @property
    def _holder(self) -> str:
        return (self._lease or {}).get("spec", {}).get("holderIdentity") or ""

    def _expires_in(self) -> float:
        """Seconds until this replica may take the Lease; 0 if it may now."""
        if self._holder in ("", self.identity):
            return 0.0
        assert self._lease is not None
        duration = self._lease["spec"].get("leaseDurationSeconds") or LEASE_SECONDS
        return max(0.0, self._changed + float(duration) - _clock())

    async def _write(self, holder: str) -> None:
        """Write the Lease. It is ours from the moment before the request was sent."""
        started = _clock()
        lease = renewed(self._lease, holder, self._address, datetime.now(UTC))
        write = self._requests.create if self._lease is None else self._requests.replace
        self._see(await write(lease))
        if holder:
            self._renewed = started


def renewed(lease: Manifest | None, holder: str, address: str | None, now: datetime) -> Manifest:
    """The Lease as `holder` writes it; an empty holder gives it back."""
    before = lease or {"metadata": {}}
    known = before.get("spec") or {}
    moved = holder != (known.get("holderIdentity") or "")
    moment = now.strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    annotations = {**(before["metadata"].get("annotations") or {}), ADDRESS: address if holder else None}
    return {
        "apiVersion": "coordination.k8s.io/v1",
        "kind": "Lease",
        "metadata": {
            **{key: value for key, value in before["metadata"].items() if key != "managedFields"},
            "annotations": {key: value for key, value in annotations.items() if value is not None},
        },
        "spec": {
            **known,
            "holderIdentity": holder,
            "leaseDurationSeconds": LEASE_SECONDS if holder else 1,
            "acquireTime": moment if moved else known.get("acquireTime", moment),
            "renewTime": moment,
            "leaseTransitions": (known.get("leaseTransitions") or 0) + (1 if holder and moved and lease else 0),
        },
    }


def _clock() -> float:
    """Seconds that only go forward."""
    return asyncio.get_running_loop().time()


def _version(lease: Manifest | None) -> str | None:
    return None if lease is None else lease["metadata"]["resourceVersion"]
