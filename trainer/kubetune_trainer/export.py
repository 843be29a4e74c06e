"""What a run leaves for others: a peft adapter, or a whole model in Hugging Face layout.

Tensors are gathered and written one at a time: rank 0 never holds the model twice.
Numbers are stored in the precision of the run. OSError is left to the caller.
"""

from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from kubetune_contract.config import RunConfig
from kubetune_trainer.distributed import World, full_tensor
from kubetune_trainer.model import Llama
from kubetune_trainer.peft import LoRAEmbedding, LoRALinear, merge, peft_name, trainable
from kubetune_trainer.quant import full_weight
from kubetune_trainer.shards import ShardWriter, Spec, finished_folder, write_companions, write_json


def export_adapter(model: Llama, config: RunConfig, folder: Path, world: World) -> None:
    """Write adapter_model.safetensors and adapter_config.json as peft reads them. All ranks must call it."""
    adapter = config.lora
    assert adapter is not None, "full fine-tuning has no adapter"
    with finished_folder(folder, world) as scratch:
        tensors = {peft_name(name): full_tensor(parameter, world) for name, parameter in trainable(model).items()}
        if not world.is_main:
            return
        whole = {name: tensor.contiguous() for name, tensor in tensors.items() if tensor is not None}
        save_file(whole, scratch / "adapter_model.safetensors", metadata={"format": "pt"})
        settings = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": config.model.path,
            "r": adapter.rank,
            "lora_alpha": adapter.alpha,
            "lora_dropout": adapter.dropout,
            "use_dora": config.has_magnitude,
            "target_modules": adapter.target_modules,
            "bias": "none",
            "inference_mode": True,
        }
        write_json(settings, scratch / "adapter_config.json")


def export_model(model: Llama, source: Path, folder: Path, world: World) -> None:
    """Write the model, with its adapter merged in if it has one, and the tokenizer of the base model in `source`.

    A base in 4 bits is written as the adapter saw it: every packed weight unpacked to the run's precision, then merged.
    Every rank count gives the same bits. All ranks must call it.
    """
    with finished_folder(folder, world) as scratch:
        dtype = model.dtype
        shapes = model.config.shapes()
        writer = ShardWriter(scratch, [{n: Spec(dtype, s)} for n, s in shapes.items()]) if world.is_main else None
        for name in shapes:
            tensor = _merged(model, name, world)
            if writer is not None and tensor is not None:
                writer.add(name, tensor)
        if writer is not None:
            writer.finish()
            write_companions(source, scratch, dtype)


def _merged(model: Llama, name: str, world: World) -> Tensor | None:
    """A base weight with its adapter, on rank 0; computed from whole tensors, so that sharding changes no bit."""
    layer = model.get_submodule(name.removesuffix(".weight"))
    weight = full_weight(layer, world)
    if not isinstance(layer, LoRALinear | LoRAEmbedding):
        return weight
    gathered = {key: full_tensor(parameter, world) for key, parameter in trainable(layer).items()}
    factors = {key: factor for key, factor in gathered.items() if factor is not None}
    return None if weight is None else merge(weight, factors, layer.scale)
