"""From a folder to a model that is ready to train, on one device or sharded over many (FSDP2)."""

from pathlib import Path

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from kubetune_contract.config import RunConfig
from kubetune_trainer.distributed import World
from kubetune_trainer.estimate import embedding_on_host
from kubetune_trainer.hub import WeightReader, load_weights
from kubetune_trainer.model import Llama
from kubetune_trainer.peft import add_lora, init_adapter
from kubetune_trainer.quant import load_packed, quantize

_CPU_FLAGS = ("avx512_bf16", "amx_bf16")
"""Instructions that multiply bf16 matrices, as /proc/cpuinfo names them."""


def build(config: RunConfig, reader: WeightReader, world: World) -> Llama:
    """The model of a run, on `world.device`, with its weights. Each step needs the ones before it."""
    dtype, _ = choose_precision(config, world.device)
    # 1. Names and shapes only: no process ever holds the whole model.
    with torch.device("meta"):
        model = Llama(reader.config())
    model.to(dtype)
    # 2. The frozen weights' storage, then the adapter around it: it takes over what it finds. Both before sharding, so
    # that packed weights and factors are sharded with the layer that they belong to.
    if config.quantized is not None:
        quantize(model, config.quantized)
    if config.lora is not None:
        add_lora(model, config.lora, magnitude=config.has_magnitude)
    model.checkpoint_blocks = config.training.activation_checkpointing == "Full"
    # 3. Sharding, before memory is taken: each process allocates its own rows only.
    if world.size > 1:
        shard(model, world, dtype)
    # 4. Memory, and what is not in any file.
    model.to_empty(device=world.device)
    if world.device.type == "cuda" and embedding_on_host(config, model.config, world.size):
        model.model.embed_tokens.to_empty(device="cpu")
    model.init_buffers()
    # 5. Values: weights from the files, the adapter from the seed.
    load_weights(model, reader)
    load_packed(model, reader, world)
    init_adapter(model, config.training.seed)
    return model.train()


def shard(model: Llama, world: World, dtype: torch.dtype) -> None:
    """Shard each block, then embedding, norm and head together, over all processes.

    Products are computed in `dtype`; gradients are SUMMED over the processes in float32. (FSDP's default is their mean,
    which is wrong when processes have different numbers of label tokens.)
    """
    mesh = init_device_mesh(world.device.type, (world.size,))
    # Nothing is cast where the weights have the dtype already: an adapter is gathered in float32 (a magnitude in bf16
    # would be 0.4 % off), and so are the scales of packed weights.
    cast = dtype if model.model.norm.weight.dtype != dtype else None
    policy = MixedPrecisionPolicy(param_dtype=cast, reduce_dtype=torch.float32)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no scaled sum


def choose_precision(config: RunConfig, device: torch.device) -> tuple[torch.dtype, str]:
    """The number format of weights and matrix products, and why it was chosen.

    Auto takes bf16 only where the device multiplies it in hardware: a CPU without such instructions is up to 30 times
    slower in bf16 than in float32.
    """
    wish = config.training.precision
    able, reason = _has_bf16(device)
    if wish == "FP32":
        return torch.float32, "fp32, as training.precision says"
    if wish == "BF16":
        warning = "" if able else f"; it will be slow: {reason}"
        return torch.bfloat16, f"bf16, as training.precision says{warning}"
    return (torch.bfloat16, f"bf16: {reason}") if able else (torch.float32, f"fp32: {reason}")


def _has_bf16(device: torch.device) -> tuple[bool, str]:
    if device.type == "cuda":
        able = torch.cuda.get_device_capability(device) >= (8, 0)
        return able, f"{torch.cuda.get_device_name(device)} has {'' if able else 'no '}bf16 instructions"
    flags = _cpu_flags()
    found = [flag for flag in _CPU_FLAGS if flag in flags]
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported() or not found:
        return False, "this CPU has no bf16 instructions (avx512_bf16 or amx_bf16)"
    return True, f"this CPU has bf16 instructions ({', '.join(found)})"


def _cpu_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> set[str]:
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return {flag for line in lines if line.startswith(("flags", "Features")) for flag in line.split()}


def clip_gradients(parameters: list[nn.Parameter], max_norm: float) -> float:
    """Scale all gradients down so that their global L2 norm is at most `max_norm`; returns the norm before.

    0 only measures. Gradients may be sharded: then all ranks must call it and get the same number.
    """
    norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    if max_norm > 0:
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm.item()
