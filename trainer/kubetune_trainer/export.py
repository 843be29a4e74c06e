"""What a run leaves for others: a peft adapter, or a whole model in Hugging Face layout.

A folder is complete or absent: it is written under a temporary name, brought to the disk and renamed. Tensors are
gathered one at a time, so that rank 0 holds one shard of the export in memory, never the model twice.
Numbers are stored in the precision of the run. OSError is left to the caller.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import save_file
from torch import Tensor

from kubetune_contract.config import RunConfig
from kubetune_trainer.distributed import World, barrier, full_tensor
from kubetune_trainer.hub import COMPANIONS, CONFIG_FILE, INDEX_FILE, WEIGHTS_FILE
from kubetune_trainer.model import Llama
from kubetune_trainer.peft import LoRALinear, merge, peft_name, trainable

MAX_SHARD: Final = 5_000_000_000
"""Bytes of weights in one file, as on the Hugging Face hub."""


def export_adapter(model: Llama, config: RunConfig, folder: Path, world: World) -> None:
    """Write adapter_model.safetensors and adapter_config.json as peft reads them. All ranks must call it."""
    adapter = config.lora
    assert adapter is not None, "full fine-tuning has no adapter"
    with _finished_folder(folder, world) as scratch:
        tensors = {peft_name(name): full_tensor(parameter, world) for name, parameter in trainable(model).items()}
        if not world.is_main:
            return
        _save(tensors, scratch / "adapter_model.safetensors")
        settings = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": config.model.path,
            "r": adapter.rank,
            "lora_alpha": adapter.alpha,
            "lora_dropout": adapter.dropout,
            "target_modules": adapter.target_modules,
            "bias": "none",
            "inference_mode": True,
        }
        _write_json(settings, scratch / "adapter_config.json")


def export_model(model: Llama, source: Path, folder: Path, world: World) -> None:
    """Write the model, with its adapter merged in if it has one, and the tokenizer of the base model in `source`.

    Every rank count gives the same bits. All ranks must call it.
    """
    with _finished_folder(folder, world) as scratch:
        dtype = model.model.embed_tokens.weight.dtype
        shards = plan_shards(model.config.shapes(), dtype.itemsize, MAX_SHARD)
        for file, names in shards.items():
            tensors = {name: _merged(model, name, world) for name in names}
            if world.is_main:
                _save(tensors, scratch / file)
        if not world.is_main:
            return
        if len(shards) > 1:
            _write_json(_index(shards, model.config.parameters * dtype.itemsize), scratch / INDEX_FILE)
        _write_json(_config(source, dtype), scratch / CONFIG_FILE)
        for name in COMPANIONS:
            if (source / name).is_file():
                shutil.copyfile(source / name, scratch / name)


def plan_shards(shapes: dict[str, tuple[int, ...]], itemsize: int, limit: int) -> dict[str, list[str]]:
    """Which file each weight goes into, in order; a file has at most `limit` bytes unless one weight is larger."""
    groups: list[list[str]] = []
    room = 0
    for name, shape in shapes.items():
        size = torch.Size(shape).numel() * itemsize
        if not groups or size > room:
            groups.append([])
            room = limit
        groups[-1].append(name)
        room -= size
    if len(groups) == 1:
        return {WEIGHTS_FILE: groups[0]}
    return {f"model-{number:05}-of-{len(groups):05}.safetensors": names for number, names in enumerate(groups, 1)}


def _index(shards: dict[str, list[str]], size: int) -> dict[str, Any]:
    weight_map = {name: file for file, names in shards.items() for name in names}
    return {"metadata": {"total_size": size}, "weight_map": weight_map}


def _merged(model: Llama, name: str, world: World) -> Tensor | None:
    """A base weight with its adapter, on rank 0; computed from whole tensors, so that sharding changes no bit."""
    layer = model.get_submodule(name.removesuffix(".weight"))
    weight = full_tensor(model.get_parameter(name), world)
    if not isinstance(layer, LoRALinear):
        return weight
    lora_a, lora_b = full_tensor(layer.lora_A.weight, world), full_tensor(layer.lora_B.weight, world)
    if weight is None or lora_a is None or lora_b is None:
        return None
    return merge(weight, lora_a, lora_b, layer.scale)


def _config(source: Path, dtype: torch.dtype) -> dict[str, Any]:
    """The base model's config.json with the export's number format (`torch_dtype` in transformers 4, `dtype` in 5)."""
    values: dict[str, Any] = json.loads((source / CONFIG_FILE).read_bytes())
    key = "dtype" if "dtype" in values else "torch_dtype"
    return values | {key: str(dtype).removeprefix("torch.")}


def _save(tensors: dict[str, Tensor | None], file: Path) -> None:
    whole = {name: tensor.contiguous() for name, tensor in tensors.items() if tensor is not None}
    save_file(whole, file, metadata={"format": "pt"})


def _write_json(values: dict[str, Any], file: Path) -> None:
    file.write_text(json.dumps(values, indent=2) + "\n")


@contextmanager
def _finished_folder(folder: Path, world: World) -> Iterator[Path]:
    """A temporary folder that becomes `folder` on rank 0 if all goes well; no rank leaves before it has."""
    scratch = folder.with_name(f".{folder.name}.partial")
    if world.is_main:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
    yield scratch
    if world.is_main:
        _publish(scratch, folder)
    barrier(world)


def _publish(scratch: Path, folder: Path) -> None:
    """Bring the files to the disk, readable for other users (safetensors writes them 0600), and rename the folder."""
    for file in scratch.iterdir():
        file.chmod(0o644)
        _sync(file)
    _sync(scratch)
    if folder.exists():  # left by an attempt that was killed right after its export
        shutil.rmtree(folder)
    scratch.rename(folder)
    _sync(folder.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
