"""What the operator takes and what it costs, against a real API server; no kubelet: the pods' status is played.

    python -m benchmarks.operator [--only latency|throughput|population|recovery] [--quick]
    python -m benchmarks.operator --kills

The first takes about 15 minutes on two quiet cores beside the embedded cluster (`make cluster-up`), the second about an
hour. Runs that other programs disturb are made again. The figures go to benchmarks/results/operator.json;
`--quick` is a smoke that records nothing.
"""

import argparse
import asyncio
import signal
import statistics
import sys
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / part) for part in ("operator", "trainer", "examples/demo", "tests/cluster")]

from benchmarks.aims import AIMS  # noqa: E402
from benchmarks.figures import figure, record  # noqa: E402
from benchmarks.operator import kills, latency, population, recovery, throughput  # noqa: E402
from benchmarks.operator.case import FULL, QUICK, Outcome, Size, tell  # noqa: E402
from benchmarks.operator.field import Field  # noqa: E402
from benchmarks.operator.peers import PEERS  # noqa: E402

CASES: Final[dict[str, tuple[Callable[[Field, Size], Awaitable[Outcome]], str]]] = {
    "latency": (latency.latency, latency.COMMAND),
    "throughput": (throughput.throughput, throughput.COMMAND),
    "recovery": (recovery.recovery, recovery.COMMAND),
    "population": (population.population, population.COMMAND),  # the last: it leaves much to be removed
}


def keep(outcome: Outcome, command: str) -> None:
    """Record what a case has found."""
    load = statistics.fmean(outcome.foreign)
    found = {key: figure(values, load=round(load, 3), command=command) for key, values in outcome.values.items()}
    record("operator", found, {**outcome.tables, "operator-7-peers": PEERS})


def show(outcome: Outcome) -> None:
    """Print what a case has found."""
    aims = {aim.key: aim for aim in AIMS["operator"]}
    for key, values in outcome.values.items():
        aim, ours = aims[key], statistics.median(values)
        met = "reached" if aim.reached(ours, None) else "MISSED"
        print(
            f"{key:<14} {ours:>8.1f} {aim.unit:<7} {met} ({aim.words()}); runs {[round(value, 1) for value in values]}"
        )
    for table in outcome.tables.values():
        print(f"\n{table.title}\n  {' | '.join(table.columns)}")
        for row in table.rows:
            print(f"  {' | '.join(row)}")
    print(flush=True)


async def measure(names: list[str], size: Size) -> None:
    """Run the cases, one after the other. Each is recorded when it is over."""
    with tempfile.TemporaryDirectory() as folder:
        field = Field(Path(folder))
        try:
            for name in names:
                tell(f"---- {name}")
                case, command = CASES[name]
                outcome = await case(field, size)
                show(outcome)
                if size.judged:
                    keep(outcome, command)
        finally:
            field.clean()


def end(*_: object) -> None:
    """End through the cleaning up."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(128 + signal.SIGTERM)


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=CASES, action="append", help="this case; may be given several times")
    parser.add_argument("--quick", action="store_true", help="a smoke that records nothing")
    parser.add_argument("--kills", action="store_true", help="the kill drill instead, with 1,000 jobs")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, end)
    if arguments.kills:
        outcome = kills.kills(20 if arguments.quick else kills.JOBS)
        show(outcome)
        if not arguments.quick:
            keep(outcome, kills.COMMAND)
        return
    asyncio.run(measure(arguments.only or list(CASES), QUICK if arguments.quick else FULL))


if __name__ == "__main__":
    main()
