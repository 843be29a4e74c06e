"""`make chaos`: hit many short jobs with faults drawn from a seed, and write docs/chaos.md from what came of them."""

import argparse
import os
import random
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

from cluster_tool import REPOSITORY, ClusterError, Layout, default_layout, describe
from tests.chaos import host, page
from tests.chaos.catalogue import CALM, FAULTS
from tests.chaos.fault import Run, calm, calm_name, draw
from tests.chaos.gate import GatedKube
from tests.chaos.ground import Ground, note_weights
from tests.drills import material, runner

PAGE = REPOSITORY / "docs" / "chaos.md"


def main() -> int:
    """Run; 0 if every job ended as it must."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=200, help="how many; default: 200")
    parser.add_argument("--seed", type=int, default=0, help="default: one of chance")
    parser.add_argument("--only", nargs="*", metavar="KIND", help="of these kinds only; the page stays as it is")
    parser.add_argument("--keep", action="store_true", help="leave everything for a look afterwards")
    arguments = parser.parse_args()
    unknown = set(arguments.only or ()) - {fault.name for fault in FAULTS}
    if unknown:
        parser.error(f"no such kind: {', '.join(sorted(unknown))}; there are {', '.join(one.name for one in FAULTS)}")
    seed = arguments.seed or random.SystemRandom().randrange(1, 10**6)
    faults = tuple(fault for fault in FAULTS if not arguments.only or fault.name in arguments.only)
    hit = draw(faults, arguments.faults, seed, note_weights)
    runs = undisturbed(hit) + hit
    began = time.monotonic()
    try:
        ground = Ground(GatedKube(owned()), default_layout())
        reports, orphans = carry_out(ground, runs, arguments.keep)
    except (ClusterError, OSError) as error:
        print(f"error: {describe(error)}", file=sys.stderr)
        return 1
    told = page.Told(seed, len(hit), datetime.now(UTC).date(), time.monotonic() - began, orphans)
    outcomes = page.outcomes(runs, reports, ground.digests)
    print(page.summary(told, outcomes), file=sys.stderr)
    if not arguments.only:
        PAGE.write_text(page.page(told, outcomes))
    return 1 if orphans or any(outcome.problem for outcome in outcomes) else 0


def owned() -> Layout:
    """The layout of a node that is ours to hurt."""
    if os.geteuid() != 0:
        raise ClusterError("chaos needs root on the node, for the processes and the network of its pods: use sudo")
    if os.environ.get("KUBE_CONTEXT"):
        raise ClusterError("chaos hurts the node itself, so it runs on the embedded cluster only: unset KUBE_CONTEXT")
    return default_layout()


def undisturbed(runs: list[Run]) -> list[Run]:
    """The runs that nothing is done to, and with which these are compared."""
    wanted = {run.like for run in runs if page.compares(run)}
    made = [(calm(model, nodes, spec, note_weights), calm_name(model, nodes)) for model, nodes, spec in CALM]
    return [Run(drill, None, name) for drill, name in made if name in wanted]


def carry_out(ground: Ground, runs: list[Run], keep: bool) -> tuple[list[runner.Report], list[str]]:
    """Bring up what the runs need, let them run, and remove it. The second value is what was left behind."""
    drills = [run.drill for run in runs]
    host.unmount_all()
    with tempfile.TemporaryDirectory() as folder:
        ground.set_up(drills, material.write(Path(folder)))
    try:
        reports = runner.run(ground, drills)
        return reports, ground.orphans()
    finally:
        if not keep:
            ground.tear_down()


if __name__ == "__main__":
    sys.exit(main())
