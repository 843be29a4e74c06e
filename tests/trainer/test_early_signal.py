"""SIGTERM before anything has begun: a container's first process must answer it itself."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("command", ["launch", "train"])
def test_sigterm_ends_a_program_that_is_still_reading_its_configuration(command: str, tmp_path: Path) -> None:
    """With an exit code of its own: the default action would end it here, but not as a container's first process."""
    config = tmp_path / "config.json"
    os.mkfifo(config)
    words = [sys.executable, "-m", "kubetune_trainer", command, "--config", str(config)]
    with subprocess.Popen(words, stderr=subprocess.PIPE) as program, config.open("w"):  # opens when the program reads
        program.send_signal(signal.SIGTERM)
        assert program.wait(timeout=30) == 128 + signal.SIGTERM
