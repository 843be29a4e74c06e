"""The chart's folder, and what tests read in the objects that helm makes of it."""

from typing import Any

from cluster_tool import REPOSITORY

from kubetune_operator.settings import Settings

Object = dict[str, Any]
Objects = dict[tuple[str, str], Object]
"""By kind and name."""

CHART = REPOSITORY / "charts" / "kubetune"
KUBERNETES = "--kube-version=1.35.0"


def pod(objects: Objects) -> Object:
    """The operator's pod."""
    return objects["Deployment", "kubetune"]["spec"]["template"]["spec"]


def container(objects: Objects) -> Object:
    """Its only container."""
    return pod(objects)["containers"][0]


def variables(objects: Objects) -> dict[str, str | None]:
    """The container's environment; None where the kubelet fills in the value."""
    return {entry["name"]: entry.get("value") for entry in container(objects)["env"]}


def crd_of(objects: Objects) -> Object | None:
    """The CustomResourceDefinition, if it is there."""
    return objects.get(("CustomResourceDefinition", "finetunejobs.kubetune.io"))


def settings_of(objects: Objects) -> Settings:
    """The settings that the operator reads in this Deployment."""
    found = variables(objects)
    filled_in = {"KUBETUNE_NAMESPACE": "ops", "KUBETUNE_POD_NAME": "kubetune-0", "KUBETUNE_POD_IP": "10.0.0.1"}
    assert {name for name, value in found.items() if value is None} == set(filled_in)  # by the kubelet
    return Settings.from_env({**found, **filled_in})
