"""Low-rank adapters, put into a model from outside: LoRA (Hu et al. 2021) and DoRA (Liu et al. 2024).

Names and formulas are peft's. The base may be dense or packed in 4 bits; the adapter is float32 whatever the base is,
because a bf16 adapter loses most of its small updates to rounding.
"""

import hashlib
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kubetune_contract.architecture import NORM_NUMBERS
from kubetune_contract.config import AdapterConfig
from kubetune_contract.errors import ConfigError
from kubetune_trainer.cross_entropy import Pair
from kubetune_trainer.distributed import local_rows
from kubetune_trainer.quant import NF4Linear, dense, own_rows, product, take_over


class LoRALinear(nn.Module):
    """A frozen linear layer plus scale * B A x. Its weight keeps its names, and those of the factors are peft's.

    DoRA also trains the magnitude of each row of W + scale * B A; what those factors change is only its direction.
    """

    def __init__(self, base: nn.Linear | NF4Linear, adapter: AdapterConfig, *, magnitude: bool = False) -> None:
        super().__init__()
        take_over(self, base)
        self.scale = adapter.alpha / adapter.rank
        self.dropout = adapter.dropout
        self.enabled = True
        place: dict[str, Any] = {"device": base.weight.device, "dtype": torch.float32}
        self.lora_A = nn.Linear(base.in_features, adapter.rank, bias=False, **place)
        self.lora_B = nn.Linear(adapter.rank, base.out_features, bias=False, **place)
        self.lora_magnitude_vector = nn.Parameter(torch.empty(base.out_features, **place)) if magnitude else None
        self._known_strength: Tensor | None = None

    def train(self, mode: bool = True) -> Self:
        """As of any module; weights may have changed since."""
        self._known_strength = None
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        if not self.enabled:
            return product(self, x)
        rows = x.flatten(0, -2)
        dropped = F.dropout(rows, self.dropout, self.training)
        inner, lora_b = dropped @ self.lora_A.weight.to(x.dtype).t(), self.lora_B.weight.to(x.dtype).t()
        output = product(self, rows)
        if self.lora_magnitude_vector is None or not (self.dropout and self.training):
            # No backward pass needs the frozen product's value, so the adapter's part is added in place.
            output = output.addmm_(inner, lora_b, alpha=self.scale)
            output = output if self.lora_magnitude_vector is None else output * self._strength(x.dtype)
        else:
            # peft's formula: the change of magnitude acts on what dropout left, the base's output on everything.
            strength = self._strength(x.dtype)
            changed = product(self, dropped) * (strength - 1)
            output = output + changed + (inner @ lora_b) * (strength * self.scale)
        return output.view(*x.shape[:-1], -1)

    def products(self, hidden: Tensor) -> list[Pair]:
        """As a head: what the logits of `hidden` [..., in] are the sum of (LoRA only)."""
        frozen = (hidden, dense(self))
        if not self.enabled:
            return [frozen]
        dropped = F.dropout(hidden, self.dropout, self.training)
        inner = F.linear(dropped, self.lora_A.weight.to(hidden.dtype)) * self.scale
        return [frozen, (inner, self.lora_B.weight.to(hidden.dtype))]

    def _strength(self, dtype: torch.dtype) -> Tensor:
        """What each output is multiplied by, [out]. The norm counts as constant (section 4.3 of the paper).

        It costs as much as `rank` tokens, so a model that only answers computes it once.
        """
        answering = not (self.training or torch.is_grad_enabled())
        if answering and self._known_strength is not None:
            return self._known_strength
        assert self.lora_magnitude_vector is not None
        with torch.no_grad():
            norms = _row_norms(dense(self), self.lora_A.weight, self.lora_B.weight, self.scale)
        strength = (self.lora_magnitude_vector / norms).to(dtype)
        if answering:
            self._known_strength = strength
        return strength

    def reset(self, generator: torch.Generator) -> None:
        """A uniform as nn.Linear draws it (and so peft), B zero, the magnitude that of W. Collective."""
        whole = torch.empty(self.lora_A.weight.shape, dtype=torch.float32)
        nn.init.kaiming_uniform_(whole, a=math.sqrt(5), generator=generator)
        _put(self.lora_A.weight, whole)
        local_rows(self.lora_B.weight)[0].zero_()
        if self.lora_magnitude_vector is not None:
            rows = own_rows(self)
            nothing = rows.new_zeros((len(rows), 1), dtype=torch.float32)
            norms = _row_norms(rows, nothing.new_zeros((1, rows.shape[1])), nothing, 0.0)
            local_rows(self.lora_magnitude_vector)[0].copy_(norms)


class LoRAEmbedding(nn.Module):
    """A frozen embedding plus scale * B A of the token; its factors have peft's names, shapes and first values."""

    def __init__(self, base: nn.Embedding, adapter: AdapterConfig) -> None:
        super().__init__()
        self.weight = base.weight
        self.scale = adapter.alpha / adapter.rank
        self.enabled = True
        place: dict[str, Any] = {"device": base.weight.device, "dtype": torch.float32}
        self.lora_embedding_A = nn.Parameter(torch.empty((adapter.rank, base.num_embeddings), **place))
        self.lora_embedding_B = nn.Parameter(torch.empty((base.embedding_dim, adapter.rank), **place))

    def forward(self, input_ids: Tensor) -> Tensor:
        """[...] -> [..., embedding]."""
        output = F.embedding(input_ids, self.weight)
        if not self.enabled:
            return output
        inner = F.embedding(input_ids, self.lora_embedding_A.t())
        return (output + inner @ self.lora_embedding_B.t() * self.scale).to(output.dtype)

    def reset(self, generator: torch.Generator) -> None:
        """A zero, B normal."""
        local_rows(self.lora_embedding_A)[0].zero_()
        _put(self.lora_embedding_B, torch.randn(self.lora_embedding_B.shape, generator=generator))


Adapted = LoRALinear | LoRAEmbedding


def _put(parameter: Tensor, whole: Tensor) -> None:
    local, start = local_rows(parameter)
    local.copy_(whole[start : start + len(local)])


def _row_norms(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float) -> Tensor:
    """The L2 norm of each row of weight + scale * B A, float32 [out]. The sum is never there as a whole."""
    rows = max(1, NORM_NUMBERS // weight.shape[1])
    pairs = zip(torch.split(weight, rows), torch.split(lora_b, rows), strict=True)
    return torch.cat(
        [torch.linalg.vector_norm(torch.addmm(w.float(), b, lora_a, alpha=scale), dim=1) for w, b in pairs]
    )


def add_lora(model: nn.Module, adapter: AdapterConfig, *, magnitude: bool = False) -> None:
    """Put an adapter around each chosen layer and freeze everything else; `magnitude` makes it DoRA.

    Works on meta; init_adapter() gives the values. Raises ConfigError for a target that cannot be had.
    """
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    found = set()
    for path, module in list(model.named_modules()):
        parent, _, name = path.rpartition(".")
        if name not in adapter.target_modules:
            continue
        if isinstance(module, nn.Linear | NF4Linear):
            setattr(model.get_submodule(parent), name, LoRALinear(module, adapter, magnitude=magnitude))
        elif isinstance(module, nn.Embedding):
            setattr(model.get_submodule(parent), name, LoRAEmbedding(module, adapter))
        else:
            continue
        found.add(name)
    tied = getattr(model, "lm_head", model) is None
    problems = [_problem(target, found, tied) for target in adapter.target_modules]
    if any(problems):
        raise ConfigError([f"adapter.target_modules: {problem}" for problem in problems if problem])


def _problem(target: str, found: set[str], tied: bool) -> str | None:
    if tied and target in ("lm_head", "embed_tokens"):
        return (
            f"this model's head is its embedding (tie_word_embeddings), so {target} can have no adapter of its own: "
            f"remove {target}"
        )
    return None if target in found else f"the model has no layer {target}: remove it"


def init_adapter(model: nn.Module, seed: int) -> None:
    """Give every adapter its first values, with which the model is still its base. Collective.

    They are drawn whole from the seed and the layer's name, then each process keeps its rows: the same values at every
    world size and in every order of layers.
    """
    for path, layer in lora_layers(model):
        layer.reset(_generator(seed, path))


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))


def lora_layers(model: nn.Module) -> Iterator[tuple[str, Adapted]]:
    """All adapted layers with their paths."""
    for path, module in model.named_modules():
        if isinstance(module, LoRALinear | LoRAEmbedding):
            yield path, module


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that the optimizer changes, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def peft_name(name: str) -> str:
    """The key of an adapter's tensor in adapter_model.safetensors."""
    return f"base_model.model.{name}"


def merge(weight: Tensor, factors: Mapping[str, Tensor], scale: float) -> Tensor:
    """A base weight with its adapter, computed in float32 (as peft merges), in weight's dtype.

    `factors` are the layer's tensors by the names that they have in the layer and, behind the layer's name, in peft's
    files. W + scale * B A; for DoRA each row is then given its magnitude.
    """
    if "lora_embedding_A" in factors:
        delta = (factors["lora_embedding_B"].float() @ factors["lora_embedding_A"].float()).t()
    else:
        delta = factors["lora_B.weight"].float() @ factors["lora_A.weight"].float()
    merged = delta.mul_(scale).add_(weight)
    magnitude = factors.get("lora_magnitude_vector")
    if magnitude is not None:
        merged *= (magnitude.float() / torch.linalg.vector_norm(merged, dim=1))[:, None]
    return merged.to(weight.dtype)


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
