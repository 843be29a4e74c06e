"""Frozen linear layers in 4 bits: NF4 (Dettmers et al. 2023), stored so that FSDP2 can shard it.

A packed layer has the plain uint8 parameters `weight` [out, in / 2] and `absmax`, which are sharded by rows like any
other. Every block of 64 weights in a row shares one absmax. Layout and numbers are those of bitsandbytes' Linear4bit,
bit for bit, and the kernels are bitsandbytes' own; it is imported only when something is packed.

Double quantization stores each absmax in 8 bits: its distance from the mean of all (`offset`), in blocks of 256 that
each have a scale (`nabsmax`) for the values of the table `code`. These blocks cross rows, so nabsmax stays whole on
every process: 0.002 bits for each weight. Without it `absmax` holds the bytes of float32 values.
"""

import math
from typing import Any, Final, NamedTuple, Self

import torch
from torch import Tensor, nn

from kubetune_contract.architecture import ModelError
from kubetune_contract.config import QuantizationConfig
from kubetune_trainer.distributed import World, full_tensor, is_distributed, local_rows
from kubetune_trainer.hub import WeightReader

BLOCK: Final = 64
"""Weights that share an absmax."""
ABSMAX_BLOCK: Final = 256
"""Absmax values that share a scale."""


class Packed(NamedTuple):
    """A packed weight, or some rows of it with everything that they need."""

    weight: Tensor
    """Two weights in a byte, uint8 [rows, in / 2]."""
    absmax: Tensor
    """uint8 [rows, in / 64], or the bytes of float32 values [rows, in / 16]."""
    nabsmax: Tensor | None
    """float32 [blocks of 256]; None without double quantization, as the following."""
    offset: Tensor | None
    """float32 [1]."""
    code: Tensor | None
    """float32 [256]."""

    def check(self) -> Self:
        """Kernels do not look at number formats and return garbage: FSDP's mixed precision or .to() may change them."""
        formats = [None if part is None else part.dtype for part in self]
        floats = None if self.nabsmax is None else torch.float32
        assert formats == [torch.uint8, torch.uint8, floats, floats, floats], f"packed, then converted to {formats}"
        return self

    def scales(self) -> Tensor:
        """The absmax of every block, float32 [rows * in / 64]. Blocks of 256 must begin with the first row."""
        if self.offset is None:
            return self.absmax.reshape(-1).view(torch.float32)
        operation = torch.ops.bitsandbytes.dequantize_blockwise
        scales: Tensor = operation(self.absmax.reshape(-1), self.nabsmax, self.code, ABSMAX_BLOCK, torch.float32)
        return scales + self.offset

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weight [rows, in]."""
        return _unpack(self.check().weight, self.scales(), dtype)


def _unpack(weight: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    shape = (weight.shape[0], 2 * weight.shape[1])
    operation = torch.ops.bitsandbytes.dequantize_4bit
    dense: Tensor = operation(weight.reshape(-1, 1), scales, BLOCK, "nf4", shape, dtype)
    return dense


class NF4Linear(nn.Module):
    """A frozen linear layer without bias whose weight is packed."""

    nabsmax: Tensor | None
    offset: Tensor | None
    code: Tensor | None

    def __init__(self, in_features: int, out_features: int, *, double: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.dtype = dtype
        """Number format from which weights are packed: that of the run."""
        blocks = in_features // BLOCK
        self.weight = _bytes(out_features, in_features // 2)
        self.absmax = _bytes(out_features, blocks if double else 4 * blocks)
        sizes = {"nabsmax": math.ceil(out_features * blocks / ABSMAX_BLOCK), "offset": 1, "code": 256}
        for name, size in sizes.items():
            self.register_buffer(name, torch.empty(size, dtype=torch.float32) if double else None, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return product(self, x)


def _bytes(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=torch.uint8), requires_grad=False)


def packed(layer: Any) -> Packed | None:
    """The packed weight of a layer, or of an adapter around it; None if its weight is dense."""
    return Packed(*(getattr(layer, name) for name in Packed._fields)) if hasattr(layer, "absmax") else None


def take_over(layer: nn.Module, base: nn.Module) -> None:
    """Make a base layer's frozen weight, whichever way it is stored, that of the layer around it, under its names."""
    for name, parameter in base.named_parameters(recurse=False):
        layer.register_parameter(name, parameter)
    for name in base._buffers:
        layer.register_buffer(name, base._buffers[name], persistent=False)
    layer.dtype = base.dtype if isinstance(base, NF4Linear) else base.weight.dtype  # type: ignore[assignment]


def dense(layer: Any) -> Tensor:
    """The frozen weight of a linear layer, whichever way it is stored, [out, in]."""
    stored = packed(layer)
    weight: Tensor = layer.weight if stored is None else stored.dense(layer.dtype)
    return weight


def product(layer: Any, x: Tensor) -> Tensor:
    """x @ weight.T for x [..., in] and a linear layer's frozen weight, whichever way it is stored."""
    stored = packed(layer)
    output: Tensor = x @ layer.weight.t() if stored is None else _Product.apply(x, *stored)  # type: ignore[no-untyped-call]
    return output


class _Product(torch.autograd.Function):
    """Keeps packed tensors only: plain autograd would keep every dense weight until the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *stored: Tensor | None) -> Tensor:
        ctx.save_for_backward(*stored)
        return x @ Packed(*stored).dense(x.dtype).t()  # type: ignore[arg-type]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        return gradient @ Packed(*ctx.saved_tensors).dense(gradient.dtype), None, None, None, None, None


# --- packing ----------------------------------------------------------------------------------------------------------


def quantize(model: nn.Module, options: QuantizationConfig) -> None:
    """Replace every linear layer of the blocks by a packed one, without values. Embedding, norms and head stay.

    Raises ModelError for a layer whose rows are no whole number of blocks.
    """
    import bitsandbytes  # noqa: F401  # registers the kernels

    for path, layer in list(model.named_modules()):
        if ".layers." not in path or not isinstance(layer, nn.Linear):
            continue
        if layer.in_features % BLOCK:
            raise ModelError(
                f"{path} has rows of {layer.in_features} weights, but NF4 needs a multiple of {BLOCK}: "
                "set method to LoRA or DoRA, which leave the weights as they are"
            )
        parent, _, name = path.rpartition(".")
        with layer.weight.device:
            new = NF4Linear(layer.in_features, layer.out_features, double=options.double, dtype=layer.weight.dtype)
        setattr(model.get_submodule(parent), name, new)


def load_packed(model: nn.Module, reader: WeightReader, world: World) -> None:
    """Fill every packed layer from the reader's folder: each process packs its own rows, on its device. Collective."""
    for path, layer in model.named_modules():
        if packed(layer) is not None:
            fill(layer, f"{path}.weight", reader, world)


def fill(layer: Any, name: str, reader: WeightReader, world: World) -> None:
    """Pack the weight `name` into a layer: each process its own rows, on its device. Collective."""
    weight, start = local_rows(layer.weight)
    rows = reader.slice(name, start, start + len(weight)).to(world.device, layer.dtype)
    absmax = rows.new_empty((len(rows), rows.shape[1] // BLOCK), dtype=torch.float32)
    if len(rows):
        values, scales = torch.ops.bitsandbytes.quantize_4bit(rows, BLOCK, "nf4", torch.uint8)
        weight.copy_(values.view(weight.shape))
        absmax.copy_(scales.view(absmax.shape))
    local, start = local_rows(layer.absmax)
    if layer.nabsmax is None:
        local.copy_(absmax.view(torch.uint8))
    else:
        nested, layer.nabsmax, layer.offset, layer.code = _nest(_whole(absmax, layer.absmax))
        local.copy_(nested[start : start + len(local)])


def _nest(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """All of a layer's absmax in 8 bits, as uint8 of the same shape, with nabsmax, offset and code."""
    from bitsandbytes.functional import create_dynamic_map

    code = create_dynamic_map().to(absmax.device)  # type: ignore[no-untyped-call]
    offset = absmax.mean()
    values, scales = torch.ops.bitsandbytes.quantize_blockwise(absmax.view(-1) - offset, code, ABSMAX_BLOCK)
    return values.view(absmax.shape), scales, offset.view(1), code


def _whole(local: Tensor, like: Tensor) -> Tensor:
    """The rows of all processes, where `local` are this one's and lie as those of the parameter `like`. Collective."""
    if not is_distributed(like):
        return local
    from torch.distributed.tensor import DTensor

    shape = torch.Size((like.shape[0], *local.shape[1:]))
    mesh, placements = like.device_mesh, like.placements
    shards = local.to(mesh.device_type)
    return DTensor.from_local(
        shards, mesh, placements, run_check=False, shape=shape, stride=local.stride()
    ).full_tensor()


# --- unpacking --------------------------------------------------------------------------------------------------------


def own_rows(layer: Any) -> Tensor:
    """This process's rows of a layer's frozen weight, dense, [rows, in]. Collective."""
    weight, start = local_rows(layer.weight)
    stored = packed(layer)
    if stored is None:
        return weight
    # With offloading the packed bytes are in host memory; the second level never is.
    device = weight.device if stored.nabsmax is None else stored.nabsmax.device
    absmax = _whole(local_rows(layer.absmax)[0], layer.absmax).to(device)
    scales = stored._replace(absmax=absmax).scales().view(len(absmax), -1)[start : start + len(weight)]
    if not len(weight):
        return scales.new_empty((0, 2 * weight.shape[1]), dtype=layer.dtype)
    return _unpack(weight.to(device), scales.reshape(-1), layer.dtype)


def full_weight(layer: Any, world: World) -> Tensor | None:
    """The whole of a layer's frozen weight, dense, on the CPU of rank 0; None elsewhere. All ranks must call it."""
    stored = packed(layer)
    weight = full_tensor(layer.weight, world)
    if stored is None:
        return weight
    absmax = full_tensor(layer.absmax, world)
    if weight is None or absmax is None:
        return None
    second = (None if part is None else part.cpu() for part in stored[2:])
    return Packed(weight, absmax, *second).dense(layer.dtype)
