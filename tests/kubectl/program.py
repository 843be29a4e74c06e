"""The plugin as it is installed: a program on kubectl's PATH, and people who may use it."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import yaml
from cluster_tool import REPOSITORY

Object = dict[str, Any]
PAGE = (REPOSITORY / "docs" / "kubectl-plugin.md").read_text()
ROLE: Object = yaml.safe_load(PAGE.partition("```yaml\n# role\n")[2].partition("```")[0])
"""What the page says that the plugin needs."""


def environment(folder: Path, kubectl_program: str, kubeconfig: Path) -> dict[str, str]:
    """Variables with which `kubectl finetune` is this tree's plugin on that cluster."""
    program = folder / "kubectl-finetune"
    program.write_text(f"#!/bin/sh\nexec '{sys.executable}' -m kubetune_kubectl \"$@\"\n")
    program.chmod(0o755)
    path = [str(folder), str(Path(kubectl_program).parent), os.environ["PATH"]]
    python = [str(REPOSITORY / "operator"), str(REPOSITORY / "trainer")]
    places = {"PATH": os.pathsep.join(path), "PYTHONPATH": os.pathsep.join(python), "KUBECONFIG": str(kubeconfig)}
    return {**os.environ, **places}


def account(
    kubectl: Callable[..., CompletedProcess[str]],
    kubeconfig: Path,
    namespace: str,
    name: str,
    role: Object | None,
    folder: Path,
) -> Path:
    """The kubeconfig, in the folder, of a new account of the namespace that has the role or none."""
    where = ["--namespace", namespace]
    assert kubectl("create", "serviceaccount", name, *where).returncode == 0
    if role is not None:
        own = {**role, "metadata": {"name": name, "namespace": namespace}}
        assert kubectl("create", "-f", "-", stdin=own).returncode == 0
        bound = f"--serviceaccount={namespace}:{name}"
        assert kubectl("create", "rolebinding", name, f"--role={name}", bound, *where).returncode == 0
    token = kubectl("create", "token", name, *where).stdout.strip()
    config = yaml.safe_load(kubeconfig.read_text())
    config["users"] = [{"name": one["name"], "user": {"token": token}} for one in config["users"]]
    path = folder / "config"
    path.write_text(yaml.safe_dump(config))
    return path
