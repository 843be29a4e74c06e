"""`make drills`: run the drills on the cluster that is up, and write docs/drills.md from what was seen.

With names, only those run, and only their rows change; the page is written once all drills were seen.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from cluster_tool import REPOSITORY, ClusterError, default_layout, describe
from kube import Kube
from tests.drills import material, runner, table
from tests.drills.catalogue import DRILLS
from tests.drills.drill import API_SERVER, Drill
from tests.drills.ledger import Ledger
from tests.drills.site import Site

PAGE = REPOSITORY / "docs" / "drills.md"


def main() -> int:
    """Run the drills; 0 if all were as they must be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="drills to run; default: all")
    parser.add_argument("--keep", action="store_true", help="leave namespaces and operators for a look afterwards")
    arguments = parser.parse_args()
    unknown = set(arguments.names) - {drill.name for drill in DRILLS}
    if unknown:
        parser.error(f"no such drill: {', '.join(sorted(unknown))}")
    drills = [drill for drill in DRILLS if not arguments.names or drill.name in arguments.names]
    try:
        layout = default_layout()
        kube = Kube(layout)
        if kube.external:  # whose API server is not ours to stop
            drills = [drill for drill in drills if drill.outage is None or drill.outage.of != API_SERVER]
        site = Site(kube, layout)
        ledger = Ledger(layout.cache / "drills.json")  # the state goes with the cluster
        reports = carry_out(site, drills, ledger, arguments.keep)
    except (ClusterError, OSError) as error:
        print(f"error: {describe(error)}", file=sys.stderr)
        return 1
    failed = [report for report in reports if report.problem]
    for report in failed:
        print(f"\n{report.drill.name}: {report.drill.case}\n  {report.problem}", file=sys.stderr)
    print(f"{len(reports) - len(failed)} of {len(reports)} drills were as they must be", file=sys.stderr)
    known = ledger.reports(DRILLS)
    if not arguments.names or all(report.rows for report in known):
        PAGE.write_text(table.page(known))
    else:
        print(
            f"{PAGE.name} stays as it is: it tells of all drills, and not all were seen on this machine",
            file=sys.stderr,
        )
    return 1 if failed else 0


def carry_out(site: Site, drills: list[Drill], ledger: Ledger, keep: bool) -> list[runner.Report]:
    """Bring up what the drills need, run them, and remove it."""
    with tempfile.TemporaryDirectory() as folder:
        site.set_up(drills, material.write(Path(folder)))
    try:
        return runner.run(site, drills, ledger.take)
    finally:
        if not keep:
            site.tear_down()


if __name__ == "__main__":
    sys.exit(main())
