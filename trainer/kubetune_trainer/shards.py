"""Model folders as they are written: complete or absent, safetensors files of at most 5 GB, one tensor at a time.

A folder is written under a temporary name, brought to the disk and renamed. OSError is left to the caller.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from kubetune_trainer.distributed import World, barrier
from kubetune_trainer.hub import COMPANIONS, CONFIG_FILE, INDEX_FILE, TOKENIZER_FILE, WEIGHTS_FILE, WeightReader
from kubetune_trainer.tiktoken_files import find_tiktoken, write_hugging_face

MAX_SHARD = 5_000_000_000
"""Bytes of weights in one file, as on the Hugging Face hub."""
_NAMES: Final = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint8: "U8",
    torch.int8: "I8",
}
"""safetensors' names of number formats."""


class Spec(NamedTuple):
    """What a tensor will be."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Its size on disk."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


Group = Mapping[str, Spec]
"""Tensors that stay in one file: a weight, and what belongs to it."""


class ShardWriter:
    """Writes tensors, in any order, to their places in the files of a folder. None is held in memory."""

    def __init__(self, folder: Path, groups: Sequence[Group], limit: int | None = None) -> None:
        """Makes every file at its full size; what is not yet added is a hole."""
        self._folder = folder
        self._places: dict[str, tuple[str, int]] = {}
        self._specs = {name: spec for group in groups for name, spec in group.items()}
        self.shards = plan_shards(groups, limit or MAX_SHARD)
        for file, names in self.shards.items():
            self._make(file, {name: self._specs[name] for name in names})

    def _make(self, file: str, specs: Group) -> None:
        """The header (safetensors format). Wide numbers first: readers want each tensor at a multiple of its width."""
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end, places = 0, {}
        for name, spec in sorted(specs.items(), key=lambda item: -item[1].dtype.itemsize):
            header[name] = {
                "dtype": _NAMES[spec.dtype],
                "shape": list(spec.shape),
                "data_offsets": [end, end + spec.bytes],
            }
            places[name] = end
            end += spec.bytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with (self._folder / file).open("wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            stream.truncate(8 + len(text) + end)
        self._places |= {name: (file, 8 + len(text) + place) for name, place in places.items()}

    def add(self, name: str, tensor: Tensor) -> None:
        """Write one tensor, from any device."""
        spec = self._specs[name]
        assert (tensor.dtype, tuple(tensor.shape)) == spec, f"{name} was planned as {spec}, not {tensor.shape}"
        file, place = self._places.pop(name)
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        with (self._folder / file).open("r+b") as stream:
            stream.seek(place)
            stream.write(data.numpy().data)

    def finish(self) -> None:
        """Write the index, where there are several files. Every tensor must be there."""
        assert not self._places, f"{', '.join(self._places)} were planned, but not written"
        if len(self.shards) > 1:
            weight_map = {name: file for file, names in self.shards.items() for name in names}
            total = sum(spec.bytes for spec in self._specs.values())
            write_json({"metadata": {"total_size": total}, "weight_map": weight_map}, self._folder / INDEX_FILE)


def plan_shards(groups: Sequence[Group], limit: int) -> dict[str, list[str]]:
    """Which file each tensor goes into, in order; a file has at most `limit` bytes unless one group is larger."""
    files: list[list[str]] = []
    room = 0
    for group in groups:
        size = sum(spec.bytes for spec in group.values())
        if not files or size > room:
            files.append([])
            room = limit
        files[-1].extend(group)
        room -= size
    if len(files) == 1:
        return {WEIGHTS_FILE: files[0]}
    return {f"model-{number:05}-of-{len(files):05}.safetensors": names for number, names in enumerate(files, 1)}


def write_companions(source: Path, folder: Path, dtype: torch.dtype, **changes: Any) -> None:
    """The tokenizer's files and config.json of the model in `source`, with the number format of its copy and `changes`.

    The format is `torch_dtype` in transformers 4, `dtype` in 5.
    """
    values = WeightReader(source).values
    key = "dtype" if "dtype" in values else "torch_dtype"
    write_json(values | {key: str(dtype).removeprefix("torch.")} | changes, folder / CONFIG_FILE)
    for name in COMPANIONS:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    if not (source / TOKENIZER_FILE).exists() and (tiktoken := find_tiktoken(source)):
        write_hugging_face(tiktoken, folder)


def write_json(values: dict[str, Any], file: Path) -> None:
    """A file for people and for transformers."""
    file.write_text(json.dumps(values, indent=2) + "\n")


@contextmanager
def finished_folder(folder: Path, world: World) -> Iterator[Path]:
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
        sync(file)
    sync(scratch)
    if folder.exists():  # left by an attempt that was killed right after its export
        shutil.rmtree(folder)
    scratch.rename(folder)
    sync(folder.parent)


def sync(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
