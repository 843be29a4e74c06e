"""Kubetune's trainer beside its peers, in turns on this machine; what is measured goes to benchmarks/results.

    python -m benchmarks.trainer [--only CASE ...] [--quick]

transformers, peft and TRL come with the project's extra `dev`; torchtune has an environment of its own, which is made
in the cache where none is named. Cases of an 8B shape need a GPU and are left out without one.
"""

import argparse
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from benchmarks.figures import record
from benchmarks.harness import FOREIGN_SHARE, RUNS, BusyError, SideError, in_turns
from benchmarks.trainer import inputs
from benchmarks.trainer.cases import (
    PLANS,
    TORCHTUNE,
    Options,
    Outcome,
    Plan,
    check_same,
    program,
    side_of,
    sides_of,
    table,
    work_of,
)

PEAKS: Final = {"H100 PCIe": 756e3, "H100": 989e3, "H200": 989e3, "A100": 312e3, "L40S": 362e3}
"""GFLOP/s of dense bf16 products by the data sheets; the first name that fits counts."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and record. Returns 1 where a case could not be measured; the others are recorded."""
    options = parse(arguments)
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # the sample that runs is ended then too
    gpu, bf16 = _device()
    plans = [plan for plan in PLANS if plan.key in options.only and (gpu or not plan.gpu)]
    if not plans:
        sys.exit("cases of an 8B shape need a GPU, and this machine has none")
    needs_torchtune = any(TORCHTUNE in side for plan in plans for side in plan.sides)
    python = options.torchtune or (inputs.torchtune_python() if needs_torchtune else Path())
    known = Options(python, options.quick, bf16 and not gpu)
    if not options.quick:
        minutes = sum(plan.minutes * (1 if plan.once else options.runs / RUNS) for plan in plans)
        print(f"{len(plans)} cases, about {minutes:.0f} minutes on two quiet cores", file=sys.stderr)
    warmed: set[str] = set()
    failed = [plan.key for plan in plans if not _measured(plan, known, options, warmed)]
    if failed:
        print(f"not measured: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.trainer", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    keys = [plan.key for plan in PLANS]
    parser.add_argument("--only", nargs="+", choices=keys, default=keys, metavar="CASE", help=", ".join(keys))
    parser.add_argument("--runs", type=int, default=RUNS, help=f"of each side (default: {RUNS})")
    parser.add_argument("--quick", action="store_true", help="one short run of each side, small; nothing is recorded")
    parser.add_argument("--torchtune", type=Path, metavar="PYTHON", help="the Python of an environment that has it")
    parser.add_argument(
        "--foreign",
        type=float,
        default=FOREIGN_SHARE,
        metavar="SHARE",
        help=f"of the cores' time that others may take during a sample (default: {FOREIGN_SHARE})",
    )
    return parser.parse_args(arguments)


def _measured(plan: Plan, known: Options, options: argparse.Namespace, warmed: set[str]) -> bool:
    """Whether the case was measured; then it is printed and recorded too."""
    print(f"{plan.key}: {plan.title}", file=sys.stderr, flush=True)
    work = work_of(plan, known)
    names = sides_of(plan, known)
    sides = [side_of(name, work, known) for name in names]
    try:
        rounds = in_turns(
            [replace(side, warm_up=None) if program(side.name) in warmed else side for side in sides],
            1 if plan.once or options.quick else options.runs,
            warm=not options.quick,
            allowed=float("inf") if options.quick else options.foreign,
        )
        if not work.chat:  # TRL learns the questions too, unless it is told not to
            check_same(rounds)
    except (BusyError, SideError, ValueError) as error:
        print(f"{plan.key} could not be measured: {error}", file=sys.stderr, flush=True)
        return False
    warmed.update(map(program, names))
    found = Outcome(plan, work, rounds, f"python -m benchmarks.trainer --only {plan.key}")
    figures, cells = plan.figures(found), table(found, peak=_peak() if plan.gpu else None)
    for row in (cells.columns, *cells.rows):
        print(" | ".join(row), flush=True)
    for key, one in figures.items():
        print(f"{key}: {one.ours:.4g}" + (f" beside {one.peer:.4g}, {one.ratio:.3f}" if one.peer else ""), flush=True)
    if not options.quick:
        record("trainer", figures, {plan.key: cells})
    return True


def _device() -> tuple[bool, bool]:
    """Whether there is a GPU, and whether the run's device multiplies bf16 in hardware."""
    import torch

    from kubetune_contract.config import RunConfig
    from kubetune_trainer.precision import choose_precision

    gpu = torch.cuda.is_available()
    any_run = RunConfig.model_validate({"model": {"path": "-"}, "dataset": {"path": "-"}, "output_dir": "-"})
    dtype, _ = choose_precision(any_run, torch.device("cuda" if gpu else "cpu"))
    return gpu, dtype == torch.bfloat16


def _peak() -> float | None:
    """Of the GPU, where its data sheet is known here."""
    import torch

    name = torch.cuda.get_device_name()
    return next((peak for known, peak in PEAKS.items() if known in name), None)


if __name__ == "__main__":
    sys.exit(main())
