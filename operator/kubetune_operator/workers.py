"""The gang of workers, as a person writes it."""

from typing import Annotated, ClassVar

from pydantic import Field

from kubetune_contract.base import ContractModel, Rule

Quantity = Annotated[
    Annotated[int, Field(ge=0)]
    | Annotated[str, Field(pattern=r"^[0-9]+(\.[0-9]+)?(m|k|Ki|[MGTPE]i?|e[0-9]+)?$", max_length=32)],
    Field(json_schema_extra={"x-kubernetes-int-or-string": True}),
]
"""An amount, such as 2, 500m or 16Gi."""


class Resources(ContractModel):
    """Resources of one worker pod, as in a container."""

    requests: dict[str, Quantity] = Field(default={}, max_length=32)
    """What the scheduler sets aside."""
    limits: dict[str, Quantity] = Field(default={}, max_length=32)
    """What the pod may use at most."""


class Workers(ContractModel):
    """The gang that trains together."""

    nodes: int = Field(default=1, ge=1, le=1024)
    """Worker pods; all of them start and restart together."""
    gpus_per_node: int = Field(default=0, ge=0, le=64)
    """GPUs of each pod, one process per GPU. 0 trains on the CPU with one process per pod."""
    resources: Resources = Resources()
    """CPU and memory of each pod. GPUs are added from gpusPerNode."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            cel="!has(self.resources) || ["
            "has(self.resources.requests) ? self.resources.requests : {}, "
            "has(self.resources.limits) ? self.resources.limits : {}"
            "].all(amounts, !('nvidia.com/gpu' in amounts))",
            holds=lambda workers: "nvidia.com/gpu" not in {**workers.resources.requests, **workers.resources.limits},
            message="resources must not name nvidia.com/gpu: set gpusPerNode",
        ),
    )
