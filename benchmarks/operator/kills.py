"""The kill drill with a thousand jobs: how many are lost, how many are doubled."""

import os
import re
import subprocess
import sys
from typing import Final

from benchmarks.operator.case import Outcome, tell

COMMAND: Final = "python -m benchmarks.operator --kills"
DRILL: Final = "tests/integration/operator/test_kills.py"
JOBS: Final = 1000


def kills(jobs: int = JOBS) -> Outcome:
    """Run the drill. It takes about an hour."""
    environment = {**os.environ, "KUBETUNE_DRILL_JOBS": str(jobs)}
    command = [sys.executable, "-m", "pytest", "-s", "-p", "no:cacheprovider", DRILL]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    tell(done.stdout[-6000:])
    return Outcome(values={"kills": [float(wrong_in(done.stdout))]}, foreign=[0.0])


def wrong_in(told: str) -> int:
    """Jobs that the drill found lost or doubled. Raises ValueError if it did not come so far."""
    found = re.search(r"^lost: (\d+), doubled: (\d+)$", told, re.MULTILINE)
    if found is None:
        raise ValueError(f"{DRILL} did not come to its end: {told[-1000:]}")
    return sum(map(int, found.groups()))
