"""Changes of a manifest that several modules make, and a line that kubectl prints for many that are refused."""

from typing import Any

Object = dict[str, Any]

UNCHECKED = (
    "<nil>: Invalid value: null: some validation rules were not checked because the object was invalid; "
    "correct the existing errors to complete validation"
)


def hub(**changes: Any) -> Object:
    """A repository instead of a folder of the volume."""
    return {"volumePath": None, "huggingFace": {"repo": "meta-llama/Llama-3.2-1B", **changes}}


def resources(side: str, name: str, amount: float | str) -> Object:
    """resources("limits", "cpu", 1): what a worker asks for."""
    return {"workers": {"resources": {side: {name: amount}}}}
