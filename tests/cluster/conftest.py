"""Put the cluster tool's modules on the path, as they are when the tool runs as a script."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from layout import Layout


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    """A cluster's paths in a folder of the test."""
    return Layout(state=tmp_path / "state" / "kubetune", cache=tmp_path / "cache" / "kubetune")
