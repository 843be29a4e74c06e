"""The parts of the embedded cluster's tool that the demo uses: where things lie, commands, steps with their times."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "cluster"))

from layout import REPOSITORY, Layout, default_layout
from shell import ClusterError, run, which
from steps import Plan, bar, describe

__all__ = ["REPOSITORY", "ClusterError", "Layout", "Plan", "bar", "default_layout", "describe", "run", "which"]
