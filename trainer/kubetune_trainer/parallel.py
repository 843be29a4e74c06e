"""From a folder to a model that is ready to train, on one device or sharded over many (FSDP2)."""

import os
import shutil
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from kubetune_contract.config import RunConfig, TrainingConfig
from kubetune_contract.errors import ConfigError
from kubetune_contract.estimate import embedding_on_host
from kubetune_trainer.distributed import World, ensure_group, is_distributed, sharded_modules
from kubetune_trainer.hub import WeightReader, load_weights
from kubetune_trainer.model import Llama
from kubetune_trainer.peft import add_lora, init_adapter
from kubetune_trainer.precision import choose_precision
from kubetune_trainer.quant import load_packed, quantize

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def build(config: RunConfig, reader: WeightReader, world: World) -> Llama:
    """The model of a run, on `world.device`, with its weights. Each step needs the ones before it."""
    training = config.training
    dtype, _ = choose_precision(config, world.device)
    # 1. Names and shapes only: no process ever holds the whole model.
    with torch.device("meta"):
        model = Llama(reader.config())
    model.to(_stored(config, dtype))
    model.dtype = dtype
    # 2. The frozen weights' storage, then the adapter around it: it takes over what it finds. Both before sharding, so
    # that packed weights and factors are sharded with the layer that they belong to.
    if config.quantized is not None:
        quantize(model, config.quantized)
    if config.lora is not None:
        add_lora(model, config.lora, magnitude=config.has_magnitude)
    # 3. What a block's forward pass keeps and how it is run, before sharding: FSDP's hooks must stay outside.
    prepare_blocks(model, training)
    # 4. Sharding, before memory is taken: each process allocates its own rows only.
    sharded = world.size > 1 or _stored(config, dtype) != dtype or _offloads(training, world)
    if sharded:
        shard(model, world, dtype, training)
    # 5. Memory, and what is not in any file.
    model.to_empty(device="cpu" if _offloads(training, world) else world.device)
    if world.device.type == "cuda" and not sharded and embedding_on_host(config, model.config, world.size):
        model.model.embed_tokens.to_empty(device="cpu")
    model.init_buffers(world.device)
    # 6. Values: weights from the files, the adapter from the seed.
    load_weights(model, reader)
    load_packed(model, reader, world)
    init_adapter(model, training.seed)
    return model.train()


def _stored(config: RunConfig, dtype: torch.dtype) -> torch.dtype:
    """The number format in which weights are kept: float32 where they are trained, unless BF16 is wished."""
    return torch.float32 if config.method == "Full" and config.training.master_weights == "FP32" else dtype


def _offloads(training: TrainingConfig, world: World) -> bool:
    return training.cpu_offload and world.device.type != "cpu"


def notes(config: RunConfig, world: World) -> list[str]:
    """Options that change nothing here, each in a sentence."""
    training, found = config.training, []
    if training.cpu_offload and not _offloads(training, world):
        found.append("training.cpu_offload changes nothing: this run is on the CPU already")
    if training.sharding == "Hybrid" and world.size == world.local_size:
        found.append("training.sharding Hybrid is the same as Full: there is only one node")
    return found


def check_compiler(training: TrainingConfig) -> None:
    """Raises ConfigError where blocks are to be compiled without a compiler."""
    compiler = os.environ.get("CXX", "g++")
    if training.compile and shutil.which(compiler) is None:
        raise ConfigError([f"training.compile needs the compiler {compiler}: install it, or set compile to false"])


# --- blocks -----------------------------------------------------------------------------------------------------------

_aten = torch.ops.aten
_KEPT: Final = frozenset(
    {
        _aten.mm.default,
        _aten.addmm.default,
        _aten.bmm.default,
        _aten._scaled_dot_product_flash_attention.default,
        _aten._scaled_dot_product_flash_attention_for_cpu.default,
        _aten._scaled_dot_product_efficient_attention.default,
        _aten._scaled_dot_product_cudnn_attention.default,
    }
)
"""Ops that cost far more time than their outputs cost memory."""
_KEPT_NAMES: Final = frozenset({"torch_attn::_varlen_attn"})
"""The same, registered only when torch.nn.attention.varlen is imported."""


class _Selection:
    """The policy of selective checkpointing for one pass through a block."""

    def __init__(self) -> None:
        self._storages: set[int] = set()

    def __call__(self, context: Any, op: Any, *inputs: Any, **_: Any) -> CheckpointPolicy:
        """Keep the outputs of products and attention.

        What changes a kept output in place (a LoRA layer adds to the base's product) must not run on it again: the
        kept tensor has the change already, so that op's output is kept too. It is the same storage and costs nothing.
        """
        in_place = isinstance(op, torch._ops.OpOverload) and op._schema.is_mutable
        if in_place:
            kept = bool(inputs) and isinstance(inputs[0], Tensor) and _storage(inputs[0]) in self._storages
        else:
            kept = op in _KEPT or getattr(op, "_name", "").partition(".")[0] in _KEPT_NAMES
        if not kept:
            return CheckpointPolicy.PREFER_RECOMPUTE
        outputs = context.op_output if isinstance(context.op_output, tuple) else (context.op_output,)
        self._storages |= {_storage(output) for output in outputs if isinstance(output, Tensor)}
        return CheckpointPolicy.MUST_SAVE


def _storage(tensor: Tensor) -> int:
    number: int = tensor.untyped_storage()._cdata
    return number


def _selective_contexts() -> Any:
    return create_selective_checkpoint_contexts(_Selection(), allow_cache_entry_mutation=True)  # type: ignore[no-untyped-call]


def prepare_blocks(model: Llama, training: TrainingConfig) -> None:
    """Checkpoint and compile each block, for the passes that have a backward pass; other passes run as they are."""
    for block in model.blocks:
        plain = special = block.forward
        if training.activation_checkpointing == "Full":
            special = partial(checkpoint, plain, use_reentrant=False)
        elif training.activation_checkpointing == "Selective":
            special = partial(checkpoint, plain, use_reentrant=False, context_fn=_selective_contexts)
        if training.compile:
            # Batches are ragged: with dynamic shapes one program serves them all.
            special = torch.compile(special, dynamic=True)
        if special is not plain:
            block.forward = _in_training(special, plain)  # type: ignore[method-assign]


def _in_training(special: Callable[..., Tensor], plain: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def forward(*inputs: Any) -> Tensor:
        return special(*inputs) if torch.is_grad_enabled() else plain(*inputs)

    return forward


# --- sharding ---------------------------------------------------------------------------------------------------------


def shard(model: Llama, world: World, dtype: torch.dtype, training: TrainingConfig) -> None:
    """Shard each block, then embedding, norm and head together, over the processes of the mesh.

    Products are computed in `dtype`; gradients are SUMMED over the processes in float32. (FSDP's default is their mean,
    which is wrong when processes have different numbers of label tokens.)
    """
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

    mesh = make_mesh(world, training)
    # Nothing is cast where the weights have the dtype already: an adapter is gathered in float32 (a magnitude in bf16
    # would be 0.4 % off), and so are the scales of packed weights.
    cast = dtype if model.model.norm.weight.dtype != dtype else None
    policy = MixedPrecisionPolicy(param_dtype=cast, reduce_dtype=torch.float32)
    offload = CPUOffloadPolicy() if _offloads(training, world) else OffloadPolicy()
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy, offload_policy=offload)
    fully_shard(model, mesh=mesh, mp_policy=policy, offload_policy=offload)
    for module in sharded_modules(model):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo has no scaled sum


def make_mesh(world: World, training: TrainingConfig) -> "DeviceMesh":
    """All processes in a row, or for Hybrid (nodes, processes of a node): copies across nodes, shards inside each.

    A single process gets a group of its own. Raises ConfigError where Hybrid meets nodes of different sizes.
    """
    nodes, rest = divmod(world.size, world.local_size)
    if training.sharding == "Hybrid" and rest:
        raise ConfigError(
            [
                f"training.sharding Hybrid needs nodes of equal size, but {world.size} processes are no multiple of "
                f"the {world.local_size} on this node: set it to Full"
            ]
        )
    from torch.distributed.device_mesh import init_device_mesh

    ensure_group(world)
    if training.sharding == "Full" or nodes == 1:
        return init_device_mesh(world.device.type, (world.size,))
    return init_device_mesh(world.device.type, (nodes, world.local_size), mesh_dim_names=("replicate", "shard"))


# --- gradients --------------------------------------------------------------------------------------------------------


def clip_gradients(parameters: list[nn.Parameter], max_norm: float) -> float:
    """Scale all gradients down so that their global L2 norm is at most `max_norm`; returns the norm before.

    0 only measures. Gradients may be sharded: then all ranks must call it and get the same number.
    """
    norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
    if is_distributed(norm):
        norm = norm.full_tensor()
    if max_norm > 0:
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm.item()
