"""Memory with more and more FineTuneJobs, and what it costs that they report progress."""

import asyncio
import datetime as dt
import signal
import ssl
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any, Final
from urllib.request import urlopen

import aiohttp
from benchmarks.figures import Table
from benchmarks.operator.case import Outcome, Size, middle, repeat, shares, tell
from benchmarks.operator.field import OURS, Field, calls, settled, spent, wait_until
from benchmarks.operator.load import Load
from benchmarks.operator.usage import Share, resident_mib
from tests.integration.operator.conftest import Operator, tls_settings

from kubetune_contract.paths import TOKEN_AUDIENCE
from kubetune_contract.progress import Progress, ProgressReport

COMMAND: Final = "python -m benchmarks.operator --only population"
GROWTH: Final = 25.0
"""Jobs per second that come until there are enough."""
IDLE_SECONDS: Final = 5.0
INTERVALS: Final = (10.0, 2.0)
"""Seconds between two reports of one job: steps of 10 s, and the trainer's shortest pause."""
KEYS: Final = {0: "memory-idle", 1000: "memory-1000"}


async def population(field: Field, size: Size) -> Outcome:
    """Jobs whose workers run, more and more of them; at one number they report progress."""
    outcome = Outcome()
    crowd = Crowd(field, size, outcome)
    rows = [("0", "", *await crowd.started(0))]
    with field.running(crowd.namespace, **crowd.settings) as operator:
        async with field.load(crowd.namespace) as load:
            load.hold = True
            for count in size.populations:
                grown = await crowd.grow(load, count, operator)
                if count == size.reporting:
                    outcome.tables["operator-5-progress"] = await crowd.progress(operator, load)
                    await settled(load)
                stop(operator)
                rows.append((f"{count:,}", grown, *await crowd.started(count)))
                operator.start()
                wait_until(operator.leads, "the operator does not lead")
    outcome.tables["operator-4-memory"] = Table(
        title="Resident memory",
        note="MiB of one replica, with the progress endpoint. Every FineTuneJob has a running worker, with its Job, "
        "pod, Service and ConfigMap.",
        columns=("FineTuneJobs", "after they have come", "started with them", "seconds from start to lead"),
        rows=tuple(rows),
        command=COMMAND,
    )
    return outcome


def stop(operator: Operator) -> None:
    """End an operator; the next one leads at once."""
    operator.stop(signal.SIGTERM)


class Crowd:
    """The jobs of one namespace, and operators with a progress endpoint for them."""

    def __init__(self, field: Field, size: Size, outcome: Outcome) -> None:
        self.field = field
        self.size = size
        self.outcome = outcome
        self.namespace = field.namespace()
        folder = field.folder / "tls"
        folder.mkdir()
        self.settings = tls_settings(folder)

    async def grow(self, load: Load, count: int, operator: Operator) -> str:
        """Have so many jobs, all running; the operator's memory then."""
        await load.submit_at(GROWTH, count - len(load.sent))
        await load.until(lambda: Counter(load.states.values())["Running"] == count, 600)
        await settled(load)
        assert operator.process is not None
        grown = f"{resident_mib(operator.process.pid):.0f}"
        tell(f"memory: {grown} MiB after {count} jobs have come")
        return grown

    async def started(self, count: int) -> tuple[str, str]:
        """Memory, and seconds until it leads, of operators that are started with so many jobs."""
        found: list[tuple[float, float]] = []
        for _ in range(self.size.runs):
            begun = time.monotonic()
            with self.field.running(self.namespace, **self.settings) as operator:
                seconds = time.monotonic() - begun
                await asyncio.sleep(IDLE_SECONDS)  # the first full pass
                assert operator.process is not None
                found.append((resident_mib(operator.process.pid), seconds))
                stop(operator)
        memory = [mib for mib, _ in found]
        tell(f"memory: {memory} MiB when started with {count} jobs")
        if count in KEYS:
            self.outcome.values[KEYS[count]] = memory
        return middle(memory, 0), middle([seconds for _, seconds in found])

    async def progress(self, operator: Operator, load: Load) -> Table:
        """What it costs that all of them report."""
        tokens = await _tokens(load)
        rows = []
        for interval in INTERVALS:
            async with Reports(self.settings, load, tokens, interval):
                await asyncio.sleep(max(self.size.seconds / 2, interval))  # all have begun
                what = f"progress every {interval:.0f} s"
                found = await repeat(what, self.size, self.outcome, lambda: self.window(operator))
            each = [1000 * share.by["operator"] / share.seconds / rates["reports"] for rates, share in found]
            told = (middle([rates[name] for rates, _ in found], 0) for name in ("reports", "writes", "reviews"))
            sent, cores = f"{len(tokens) / interval:.0f}", shares([share for _, share in found])
            rows.append((f"{interval:.0f} s", sent, *told, *cores, middle(each)))
        return Table(
            title=f"Cost of {len(tokens):,} jobs that report progress",
            note="Each report comes over a TLS connection of its own, as the trainer's do. A job's progress is written "
            "every 10 s at most. Tokens are reviewed once a minute.",
            columns=(
                "a report every",
                "reports/s sent",
                "taken",
                "API writes/s",
                "token reviews/s",
                *(f"{name}, cores" for name in OURS),
                "operator, ms per report",
            ),
            rows=tuple(rows),
            command=COMMAND,
        )

    async def window(self, operator: Operator) -> tuple[tuple[dict[str, float], Share], Share]:
        """What happens for a while."""
        taken, made, before = _taken(operator), calls(operator), self.field.look(operator)
        await asyncio.sleep(self.size.seconds)
        share = spent(self.field, before, operator)
        new = calls(operator) - made
        rates = {
            "reports": (_taken(operator) - taken) / share.seconds,
            "writes": new["patch finetunejobs/status"] / share.seconds,
            "reviews": new["create tokenreviews"] / share.seconds,
        }
        return (rates, share), share


# ---------------------------------------------------------------- the trainers


async def _tokens(load: Load) -> dict[str, str]:
    """The token that the kubelet would give to each job's worker."""
    path = f"/api/v1/namespaces/{load.namespace}/serviceaccounts/default/token"

    async def one(pod: dict[str, Any]) -> str:
        bound = {"apiVersion": "v1", "kind": "Pod", "name": pod["metadata"]["name"], "uid": pod["metadata"]["uid"]}
        spec = {"audiences": [TOKEN_AUDIENCE], "boundObjectRef": bound, "expirationSeconds": 3600}
        answer = await load.api.request("POST", path, {"spec": spec})
        return str(answer["status"]["token"])

    return {name: await one(pod) for name, pod in load.pods.items()}


class Reports:
    """The trainers of all jobs: each reports on its own connection, in turns."""

    def __init__(self, settings: dict[str, str], load: Load, tokens: dict[str, str], interval: float) -> None:
        self._base = settings["progress_url"]
        self._ca_file = settings["ca_file"]
        self._load = load
        self._tokens = tokens
        self._interval = interval

    async def __aenter__(self) -> "Reports":
        context = ssl.create_default_context(cafile=self._ca_file)
        connector = aiohttp.TCPConnector(ssl=context, limit=0, force_close=True)
        self._session = aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=10))
        self._tasks = [
            asyncio.create_task(self._report(name, token, place / len(self._tokens) * self._interval))
            for place, (name, token) in enumerate(self._tokens.items())
        ]
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._session.close()

    async def _report(self, name: str, token: str, wait: float) -> None:
        url = f"{self._base}/v1/progress/{self._load.namespace}/{name}/1"
        headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
        due = time.monotonic() + wait
        for body in _steps():
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            due = max(due + self._interval, time.monotonic())
            try:
                async with self._session.post(url, data=body, headers=headers) as answer:
                    await answer.read()
            except (aiohttp.ClientError, TimeoutError):
                continue  # as the trainer: the next one may arrive


def _steps() -> Iterator[bytes]:
    """Reports of a long training, from where the last ones may have ended."""
    first = int(time.time())
    total = first + 1_000_000
    for step in range(first, total):
        progress = Progress(
            step=step, total_steps=total, epoch=0.1, percentage=100 * step // total, loss=1.25 + 1 / step,
            learning_rate=2e-4, tokens_per_second=12345.6, label_tokens_per_second=2345.6, gradient_norm=0.5,
            peak_memory_bytes=2**33, estimated_remaining_seconds=total - step, updated_time=dt.datetime.now(dt.UTC),
        )  # fmt: skip
        yield ProgressReport(progress=progress).to_json().encode()


def _taken(operator: Operator) -> float:
    """Reports that the operator took so far."""
    with urlopen(f"http://127.0.0.1:{operator.port}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    wanted = 'kubetune_progress_reports_total{outcome="taken"}'
    return next((float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(wanted)), 0.0)
