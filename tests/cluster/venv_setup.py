"""The project's virtual environment, made with uv; uv itself comes from pip when it is not on PATH."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from pathlib import Path

from layout import REPOSITORY, Layout
from shell import caller, give_to_caller, run, which, write_if_changed

EXTRAS = "operator,trainer,kubectl,dev"
ENVIRONMENT = REPOSITORY / ".venv"
STAMP = ENVIRONMENT / "kubetune.stamp"


def programs(layout: Layout) -> dict[str, str]:
    """Return the packages that getting uv needs: Debian's Python comes without its venv module."""
    has_venv = importlib.util.find_spec("ensurepip") is not None
    return {} if has_venv or find_uv(layout) else {"python3-venv": "python3-venv"}


def current() -> bool:
    """Say whether the environment was made from today's pyproject.toml."""
    return STAMP.is_file() and STAMP.read_text() == wanted_stamp()


def wanted_stamp() -> str:
    """Return what the stamp says when the environment is current."""
    total = hashlib.sha256((REPOSITORY / "pyproject.toml").read_bytes())
    return f"{sys.version_info.major}.{sys.version_info.minor} {total.hexdigest()}\n"


def ensure(layout: Layout) -> str:
    """Make the environment, or bring it up to pyproject.toml; the stamp is written last."""
    if current():
        return "already there"
    uv, log = ensure_uv(layout), layout.log / "virtual-environment.log"
    if not (ENVIRONMENT / "bin" / "python").exists():
        run([uv, "venv", "--allow-existing", "--python", sys.executable, ENVIRONMENT], log=log, user=caller())
    project = f"{REPOSITORY}[{EXTRAS}]"
    python = ENVIRONMENT / "bin" / "python"
    run(
        [uv, "pip", "install", "--compile-bytecode", "--python", python, "--editable", project],
        cwd=REPOSITORY,
        log=log,
        user=caller(),
    )
    write_if_changed(STAMP, wanted_stamp())
    return "installed"


def ensure_uv(layout: Layout) -> str | Path:
    """Return uv's path; without one on PATH, a copy of our own is installed with pip once."""
    if not (uv := find_uv(layout)):
        tools = layout.cache / "tools"
        tools.mkdir(parents=True, exist_ok=True)
        give_to_caller(tools)
        log = layout.log / "virtual-environment.log"
        run([sys.executable, "-m", "venv", tools], log=log, user=caller())
        run([tools / "bin" / "python", "-m", "pip", "install", "uv"], log=log, user=caller())
        uv = tools / "bin" / "uv"
    return uv


def find_uv(layout: Layout) -> str | Path | None:
    """Return the path of the uv that is there: on PATH, else our own copy."""
    own = layout.cache / "tools" / "bin" / "uv"
    return which("uv") or (own if own.exists() else None)
