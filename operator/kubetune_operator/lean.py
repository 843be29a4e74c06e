"""Imported before kopf and the Kubernetes client: keeps out of memory what their packages import and nobody here uses.

The client's package imports its synchronous half, with requests, OAuth and websockets: 19 MiB of a replica's 80, and a
fifth of its start. kopf imports the package too. With the packages there but not executed, each part is imported where
it is named.
"""

import sys
from importlib.util import find_spec, module_from_spec
from typing import Final

PACKAGES: Final = ("kubernetes", "kubernetes.aio")


def spare(package: str) -> None:
    """Have the package be there without what its __init__ imports, unless somebody has imported it already."""
    spec = None if package in sys.modules else find_spec(package)
    if spec is not None:
        sys.modules[package] = module_from_spec(spec)


for _package in PACKAGES:
    spare(_package)
