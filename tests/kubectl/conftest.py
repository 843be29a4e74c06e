"""What a real cluster answered (recorded/), and a kubectl that gives these answers again."""

import io
import json
import os
import stat
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from kubetune_kubectl.jobs import Job, read
from kubetune_kubectl.kubectl import Kubectl

Object = dict[str, Any]
RECORDED = Path(__file__).parent / "recorded"
REPLAY = Path(__file__).parent / "replay.py"
NOW = datetime(2026, 11, 24, 15, 12, tzinfo=UTC)
"""A moment after everything was recorded."""


def recorded(name: str) -> Object:
    """An object, or a list, as `kubectl get -o json` gave it."""
    found: Object = json.loads((RECORDED / f"{name}.json").read_text())
    return found


def pods_of(name: str) -> list[Object]:
    """The worker pods of a recorded job."""
    found: list[Object] = recorded(f"{name}-pods")["items"]
    return found


def listed(*items: Object) -> str:
    """What `kubectl get -o json` prints of several objects."""
    return json.dumps({"apiVersion": "v1", "kind": "List", "items": items})


def events(*told: tuple[str, Object]) -> str:
    """What `kubectl get --watch --output-watch-events -o json` prints."""
    return "".join(json.dumps({"type": kind, "object": item}, indent=4) + "\n" for kind, item in told)


def changed(body: Object, version: str, **status: Any) -> Object:
    """The object with another status, as the server has it later."""
    metadata = {**body["metadata"], "resourceVersion": version}
    return {**body, "metadata": metadata, "status": {**body.get("status", {}), **status}}


@pytest.fixture
def job() -> Callable[[str], Job]:
    """job("running"): a recorded FineTuneJob."""
    return lambda name: read(recorded(name))


@pytest.fixture
def now() -> datetime:
    """The present."""
    return NOW


class Replay:
    """The answers that kubectl will give, and what it was asked."""

    def __init__(self, folder: Path) -> None:
        self._scenario = folder / "scenario.json"
        self._log = folder / "asked.jsonl"
        self._answers: list[Object] = []
        self._scenario.write_text("[]")

    def answer(self, *words: str, out: str = "", err: str = "", times: int = 1_000_000, hangs: bool = False) -> None:
        """To a command line with all these words; the first answer that fits and is not used up is given."""
        code = 1 if err else 0
        self._answers.append({"words": words, "out": out, "err": err, "code": code, "times": times, "hangs": hangs})
        self._scenario.write_text(json.dumps(self._answers))

    def asked(self, *words: str) -> list[list[str]]:
        """The command lines with all these words, in order."""
        lines = self._log.read_text().splitlines() if self._log.exists() else []
        commands = [json.loads(line)["argv"] for line in lines]
        return [command for command in commands if all(word in command for word in words)]


@pytest.fixture
def replay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Replay:
    """A kubectl on PATH that gives recorded answers."""
    folder = tmp_path / "replay"
    folder.mkdir()
    program = folder / "kubectl"
    program.write_text(f"#!/bin/sh\nexec '{sys.executable}' -S '{REPLAY}' '{folder}' \"$@\"\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return Replay(folder)


@pytest.fixture
def kubectl(replay: Replay) -> Kubectl:
    """The plugin's way to it."""
    return Kubectl(namespace="kubetune-plugin")


@pytest.fixture
def page() -> io.StringIO:
    """Where a command writes: no terminal."""
    return io.StringIO()
