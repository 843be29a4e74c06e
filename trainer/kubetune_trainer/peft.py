"""Low-rank adapters (LoRA, Hu et al. 2021), put into a model from outside. Names and formulas are peft's."""

import hashlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kubetune_contract.config import AdapterConfig
from kubetune_contract.errors import ConfigError
from kubetune_trainer.distributed import local_rows


class LoRALinear(nn.Module):
    """A frozen linear layer plus scale * B A x. `weight` keeps its name; `lora_A` and `lora_B` are as in peft."""

    def __init__(self, base: nn.Linear, adapter: AdapterConfig) -> None:
        super().__init__()
        self.weight = base.weight
        self.scale = adapter.alpha / adapter.rank
        self.dropout = adapter.dropout
        self.enabled = True
        # float32 whatever the base's dtype: a bf16 adapter loses most of its small updates to rounding.
        place: dict[str, Any] = {"bias": False, "device": base.weight.device, "dtype": torch.float32}
        self.lora_A = nn.Linear(base.in_features, adapter.rank, **place)
        self.lora_B = nn.Linear(adapter.rank, base.out_features, **place)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        if not self.enabled:
            return F.linear(x, self.weight)
        rows = x.flatten(0, -2)
        dropped = F.dropout(rows, self.dropout, self.training)
        inner = dropped @ self.lora_A.weight.to(x.dtype).t()
        # No backward pass needs the frozen product's value, so the adapter's part is added in place.
        output = (rows @ self.weight.t()).addmm_(inner, self.lora_B.weight.to(x.dtype).t(), alpha=self.scale)
        return output.view(*x.shape[:-1], -1)


def add_lora(model: nn.Module, adapter: AdapterConfig) -> None:
    """Replace each chosen linear layer by a LoRALinear and freeze everything else.

    Works on meta; init_adapter() gives the values. Raises ConfigError for a target that the model does not have.
    """
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    found = set()
    for path, module in list(model.named_modules()):
        parent, _, name = path.rpartition(".")
        if name in adapter.target_modules and isinstance(module, nn.Linear):
            setattr(model.get_submodule(parent), name, LoRALinear(module, adapter))
            found.add(name)
    missing = [target for target in adapter.target_modules if target not in found]
    if missing:
        raise ConfigError([f"adapter.target_modules: the model has no linear layer {name}" for name in missing])


def init_adapter(model: nn.Module, seed: int) -> None:
    """Give every adapter its first values: A uniform as nn.Linear draws it (and so peft), B zero.

    A is drawn whole from the seed and the layer's name, then each process keeps its rows: the same values at every
    world size and in every order of layers.
    """
    for path, layer in lora_layers(model):
        weight = layer.lora_A.weight
        whole = torch.empty(weight.shape, dtype=torch.float32)
        nn.init.kaiming_uniform_(whole, a=math.sqrt(5), generator=_generator(seed, path))
        local, start = local_rows(weight)
        local.copy_(whole[start : start + len(local)])
        local_rows(layer.lora_B.weight)[0].zero_()


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoRALinear]]:
    """All adapted layers with their paths."""
    for path, module in model.named_modules():
        if isinstance(module, LoRALinear):
            yield path, module


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that the optimizer changes, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def peft_name(name: str) -> str:
    """The key of an adapter's tensor in adapter_model.safetensors."""
    return f"base_model.model.{name}"


def merge(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float) -> Tensor:
    """weight + scale * B A, computed in float32 (as peft merges), in weight's dtype."""
    delta = (lora_b.float() @ lora_a.float()).mul_(scale)
    return delta.add_(weight).to(weight.dtype)


@contextmanager
def adapter_disabled(model: nn.Module) -> Iterator[None]:
    """Inside, the model answers as its base does."""
    layers = [layer for _, layer in lora_layers(model)]
    for layer in layers:
        layer.enabled = False
    try:
        yield
    finally:
        for layer in layers:
            layer.enabled = True
