"""A models claim, the staging container that works on it, and damage."""

import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

from kubetune_contract.paths import COMPLETE_FILE
from kubetune_contract.progress import TerminationMessage
from kubetune_contract.staging import StageSource, StagingManifest
from kubetune_trainer.stage import main


class Claim:
    """A models claim, and the staging container that works on it. After a run `code` and `output` tell more."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "models"
        self.log = folder / "termination-log"
        self.environment = {"HF_HOME": str(folder / "home")}
        self.root.mkdir()
        self.log.touch()

    def stage(self, path: str, **source: Any) -> TerminationMessage:
        """Stages in this process; returns the termination message."""
        output = StringIO()
        with redirect_stdout(output), redirect_stderr(output):
            self.code = main(self._arguments(path, source))
        self.output = output.getvalue()
        return TerminationMessage.model_validate_json(self.log.read_text())

    def run(self, path: str, *, prefix: tuple[str, ...] = (), **source: Any) -> TerminationMessage:
        """Stages in a process of its own, as the container does. Slow: it imports everything."""
        container = self.start(path, prefix=prefix, **source)
        self.output = container.communicate()[0]
        self.code = container.returncode
        return TerminationMessage.model_validate_json(self.log.read_text())

    def start(self, path: str, *, prefix: tuple[str, ...] = (), **source: Any) -> subprocess.Popen[str]:
        """The same, while it runs."""
        command = [*prefix, sys.executable, "-m", "kubetune_trainer", "stage", *self._arguments(path, source)]
        clean = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "AWS_"))}
        environment = clean | self.environment
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def _arguments(self, path: str, source: dict[str, Any]) -> list[str]:
        document = StageSource(path=path, **source).to_json()
        return ["--source", document, "--root", str(self.root), "--termination-log", str(self.log)]

    def manifest(self, path: str) -> StagingManifest:
        return StagingManifest.model_validate_json((self.root / path / COMPLETE_FILE).read_bytes())


def flip(file: Path, *, keep_time: bool) -> None:
    """Damage one byte."""
    status = file.stat()
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    if keep_time:
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert file.stat().st_size == status.st_size
