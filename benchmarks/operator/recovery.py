"""How long it takes until jobs get on again: after a restart of the API server, and after the leader's death."""

import asyncio
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import node
import yaml
from benchmarks.figures import Table
from benchmarks.operator.case import Outcome, Size, middle, repeat, tell
from benchmarks.operator.field import Field, spent, wait_until
from benchmarks.operator.load import Load
from benchmarks.operator.usage import Share
from tests.integration.operator.conftest import Operator
from tests.integration.operator.server import Account, Api, Refused, free_port

COMMAND: Final = "python -m benchmarks.operator --only recovery"
JOBS: Final = 50
"""That run meanwhile."""
QUIET_SECONDS: Final = 2.0
"""In which it is looked whether others leave the machine alone."""


async def recovery(field: Field, size: Size) -> Outcome:
    """Both kinds of recovery."""
    outcome = Outcome()
    rows = [*await _restarts(field, size, outcome), *await _takeovers(field, size, outcome)]
    outcome.tables["operator-6-recovery"] = Table(
        title="Recovery",
        note="Seconds until the child Job of a FineTuneJob that was submitted meanwhile, while "
        f"{min(JOBS, size.jobs)} others run. The API server that is restarted is a second kube-apiserver on the "
        "cluster's etcd, which the operator alone uses.",
        columns=("what happens", "away", "until the child Job", "the slowest", "runs"),
        rows=tuple(rows),
        command=COMMAND,
    )
    return outcome


async def _populate(load: Load, size: Size) -> None:
    load.hold = True
    await load.submit_at(10, min(JOBS, size.jobs))
    await load.until(lambda: list(load.states.values()).count("Running") == len(load.sent))


def _row(what: str, found: list[tuple[float, float]]) -> tuple[str, ...]:
    after = [seconds for _, seconds in found]
    return (
        what,
        f"{middle([away for away, _ in found])} s",
        f"{middle(after, 2)} s",
        f"{max(after):.2f} s",
        str(len(found)),
    )


# ---------------------------------------------------------------- the API server


class ApiServer:
    """A kube-apiserver of our own on the cluster's etcd."""

    def __init__(self, field: Field) -> None:
        port = free_port()
        changed = {"--secure-port": str(port), "--endpoint-reconciler-type": "none"}
        words = [str(word) for word in node.api_server(field.layout).argv]
        self._argv = [f"{word.partition('=')[0]}={changed.get(word.partition('=')[0], word.partition('=')[2])}"
                      if "=" in word else word for word in words]  # fmt: skip
        self.config = field.folder / "second.kubeconfig"
        config = yaml.safe_load(field.kube.config.read_text())
        for cluster in config["clusters"]:
            address = cluster["cluster"]["server"].rpartition(":")[0]
            cluster["cluster"]["server"] = f"{address}:{port}"
        self.config.write_text(yaml.safe_dump(config))
        self._account = Account.of(self.config)
        self._log = field.folder / "apiserver.log"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it and wait until it is ready."""
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(self._argv, stdout=log, stderr=log)
        wait_until(self._ready, f"the second API server is not ready: see {self._log}")

    def stop(self) -> None:
        """End it, as its own restart would."""
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None

    def _ready(self) -> bool:
        assert self._process is not None
        if self._process.poll() is not None:
            sys.exit(f"the second API server has ended: {self._log.read_text()[-2000:]}")
        connection = Api(self._account)._open(1.0)
        try:
            connection.request("GET", "/readyz")
            return connection.getresponse().status == 200
        except (OSError, Refused):
            return False
        finally:
            connection.close()


@contextmanager
def _second_server(field: Field) -> Iterator[ApiServer]:
    server = ApiServer(field)
    server.start()
    try:
        yield server
    finally:
        server.stop()


async def _restarts(field: Field, size: Size, outcome: Outcome) -> list[tuple[str, ...]]:
    namespace = field.namespace()
    with _second_server(field) as server:
        operator = field.operator(namespace, server.config)
        operator.start()
        wait_until(operator.leads, "the operator does not lead")
        async with field.load(namespace) as load:
            await _populate(load, size)
            found = await repeat("API server", size, outcome, lambda: _restart(field, server, operator, load))
    return [_row("the API server is restarted", found)]


async def _restart(
    field: Field, server: ApiServer, operator: Operator, load: Load
) -> tuple[tuple[float, float], Share]:
    before = field.look(operator)
    await asyncio.sleep(QUIET_SECONDS)
    share = spent(field, before, operator)  # what comes is full of processes that begin and end
    begun = time.monotonic()
    await asyncio.to_thread(server.stop)
    name = await load.submit()
    kubelet = asyncio.create_task(_keep_up(operator))
    await asyncio.to_thread(server.start)
    ready = time.monotonic()
    await load.until(lambda: name in load.child)
    after = max(0.0, load.child[name] - ready)
    await load.until(lambda: load.states.get(name) == "Running")
    kubelet.cancel()
    return (ready - begun, after), share


async def _keep_up(operator: Operator) -> None:
    """Start the operator again whenever it ends, as a kubelet does."""
    while True:
        if operator.process is not None and operator.process.poll() is not None:
            tell("the operator has ended, and is started again")
            operator.launch()
        await asyncio.sleep(0.05)


# ---------------------------------------------------------------- the leader


async def _takeovers(field: Field, size: Size, outcome: Outcome) -> list[tuple[str, ...]]:
    namespace = field.namespace()
    replicas = [field.operator(namespace, pod_name=f"replica-{number}") for number in (0, 1)]
    rows = []
    replicas[0].start()
    wait_until(replicas[0].leads, "the operator does not lead")
    replicas[1].start()
    async with field.load(namespace) as load:
        await _populate(load, size)
        for how, what in ((signal.SIGKILL, "the leader is killed"), (signal.SIGTERM, "the leader ends (SIGTERM)")):
            found = await repeat(
                f"takeover after {how.name}",
                size,
                outcome,
                lambda how=how: _takeover(field, replicas, load, how),  # type: ignore[misc]
            )
            rows.append(_row(what, found))
    return rows


async def _takeover(
    field: Field, replicas: list[Operator], load: Load, how: signal.Signals
) -> tuple[tuple[float, float], Share]:
    leader = next(replica for replica in replicas if replica.leads())
    standby = next(replica for replica in replicas if replica is not leader)
    before = field.look(standby)
    begun = time.monotonic()
    await asyncio.to_thread(leader.stop, how)
    name = await load.submit()
    await asyncio.to_thread(wait_until, standby.leads, "nobody leads", 60.0)
    leads = time.monotonic()
    await load.until(lambda: name in load.child)
    share = spent(field, before, standby)
    leader.start()
    return (leads - begun, load.child[name] - begun), share
