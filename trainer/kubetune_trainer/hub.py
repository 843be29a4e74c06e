"""A model's folder in Hugging Face layout: what is in it, whether it is whole, and its weights row by row.

Importing this module does not import torch: the staging container checks folders with it.
"""

import difflib
import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from kubetune_trainer.architecture import LlamaConfig, ModelError

if TYPE_CHECKING:
    from torch import Tensor, nn

CONFIG_FILE: Final = "config.json"
WEIGHTS_FILE: Final = "model.safetensors"
INDEX_FILE: Final = "model.safetensors.index.json"
TOKENIZER_FILE: Final = "tokenizer.json"
COMPANIONS: Final = (
    TOKENIZER_FILE,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)
"""Files that belong to a model besides its weights and config.json; all but the first may be absent."""

DTYPES: Final = {"F32": 4, "BF16": 2, "F16": 2}
"""safetensors' names of the supported number formats, with their bytes."""

_MAX_HEADER: Final = 100_000_000
"""The safetensors format's own limit for a header, in bytes."""


@dataclass(frozen=True)
class StoredTensor:
    """Where a weight lies."""

    file: str
    dtype: str
    shape: tuple[int, ...]


class WeightReader:
    """A folder whose weights are complete: config.json and safetensors files agree on every tensor.

    Opening reads headers only. Raises ModelError that names the file or the tensor.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self._config = LlamaConfig.from_hf(read_json(self.folder, CONFIG_FILE))
        self._tensors = read_headers(self.folder)
        self._files: dict[str, Any] = {}
        _check_tensors(self._config, self._tensors)

    def config(self) -> LlamaConfig:
        """What config.json says."""
        return self._config

    def names(self) -> list[str]:
        """Hugging Face names of all weights, in the order of the layers."""
        return list(self._config.shapes())

    def files(self) -> list[str]:
        """Names of all files that make up the model, those of the weights last."""
        weights = sorted({tensor.file for tensor in self._tensors.values()})
        others = (CONFIG_FILE, *COMPANIONS, INDEX_FILE)
        return [*(name for name in others if (self.folder / name).is_file()), *weights]

    def slice(self, name: str, start: int, stop: int) -> "Tensor":
        """Rows start to stop of a weight, in the file's dtype. Only they are read."""
        rows: Tensor = self._open(name).get_slice(name)[start:stop]
        return rows

    def full(self, name: str) -> "Tensor":
        """A whole weight, in the file's dtype."""
        weight: Tensor = self._open(name).get_tensor(name)
        return weight

    def _open(self, name: str) -> Any:
        from safetensors import safe_open

        file = self._tensors[name].file
        if file not in self._files:
            self._files[file] = safe_open(self.folder / file, framework="pt")
        return self._files[file]


def load_weights(model: "nn.Module", reader: WeightReader) -> None:
    """Fill every weight of the base model from the reader's folder, converted to the parameter's dtype.

    Of a sharded parameter only this process's rows are read. Parameters that an adapter added stay as they are.
    """
    from kubetune_trainer.distributed import local_rows

    parameters = dict(model.named_parameters())
    for name in reader.names():
        local, start = local_rows(parameters[name])
        if len(local):
            local.copy_(reader.slice(name, start, start + len(local)))


def check_model(folder: Path) -> WeightReader:
    """Make sure that `folder` is a whole Llama model with a tokenizer. Raises ModelError that says what is missing."""
    reader = WeightReader(folder)
    read_json(folder, TOKENIZER_FILE)
    return reader


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """A JSON object of the model's folder. Raises ModelError for a missing folder, a missing or a damaged file."""
    try:
        values = json.loads((folder / name).read_bytes())
    except FileNotFoundError as error:
        raise ModelError(_what_is_missing(folder, name)) from error
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder / name} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise ModelError(f"{folder / name} must hold a JSON object")
    return values


def _what_is_missing(folder: Path, name: str) -> str:
    if not folder.is_dir():
        return missing_folder(folder)
    remedy = "give a folder in Hugging Face layout: config.json, tokenizer.json and safetensors files"
    found = ", ".join(_visible_names(folder)[:10]) or "nothing"
    return f"{folder} has no {name}; found: {found}; {remedy}"


def missing_folder(folder: Path) -> str:
    """A sentence for a folder that is not there: how far the path leads, and the nearest names at that point."""
    parent, name = folder.parent, folder.name
    while not parent.is_dir():
        parent, name = parent.parent, parent.name
    names = _visible_names(parent)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    if near:
        hint = f"did you mean {' or '.join(near)}?"
    else:
        hint = f"there are: {', '.join(names[:10])}" if names else "it is empty"
    return f"the folder {folder} does not exist: {parent} has no {name}; {hint}"


def _visible_names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))


def read_headers(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor in the folder's safetensors files, from their headers."""
    tensors: dict[str, StoredTensor] = {}
    for file in _weight_files(folder):
        tensors |= dict(_read_header(folder / file))
    return tensors


def _weight_files(folder: Path) -> list[str]:
    if (folder / WEIGHTS_FILE).exists():
        return [WEIGHTS_FILE]
    if (folder / INDEX_FILE).exists():
        weight_map = read_json(folder, INDEX_FILE).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ModelError(f"{folder / INDEX_FILE} has no weight_map; copy or download it again")
        return sorted(set(weight_map.values()))
    raise ModelError(f"{folder} has no {WEIGHTS_FILE} and no {INDEX_FILE}{_other_formats(folder)}")


def _other_formats(folder: Path) -> str:
    if any(folder.glob("pytorch_model*.bin")):
        return "; its .bin files must be converted first: load them in transformers and save_pretrained() them"
    if any(folder.glob("consolidated*")) or any(folder.glob("original/consolidated*")):
        return "; Meta's consolidated files are not read: give the same model in Hugging Face layout"
    if any(folder.glob("*.gguf")):
        return "; GGUF files are made for inference: give the original model in Hugging Face layout"
    return "; give the safetensors files too"


def _read_header(file: Path) -> Iterator[tuple[str, StoredTensor]]:
    """The header of one file (safetensors format: 8 bytes of length, JSON, data), checked against the file's size."""
    header, data_bytes = _parse_header(file)
    header.pop("__metadata__", None)
    end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if end != data_bytes:
        state = "truncated" if data_bytes < end else "damaged"
        raise ModelError(
            f"{file} is {state}: its header promises {end:,} bytes of weights, {data_bytes:,} are there; "
            "copy or download it again"
        )
    for name, entry in header.items():
        yield name, StoredTensor(file.name, entry["dtype"], tuple(entry["shape"]))


def _parse_header(file: Path) -> tuple[dict[str, Any], int]:
    try:
        with file.open("rb") as stream:
            start = stream.read(8)
            if start == b"version ":
                raise ModelError(f"{file} is a Git LFS pointer, not the weights: run `git lfs pull` and copy it again")
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else _MAX_HEADER + 1
            if length > _MAX_HEADER:
                raise ModelError(f"{file} is damaged: it has no safetensors header; copy or download it again")
            header = json.loads(stream.read(length))
    except FileNotFoundError as error:
        raise ModelError(f"{file} is missing; copy or download it again") from error
    except (OSError, ValueError) as error:
        raise ModelError(f"{file} cannot be read: {error}; copy or download it again") from error
    return header, file.stat().st_size - 8 - length


def _check_tensors(config: LlamaConfig, tensors: dict[str, StoredTensor]) -> None:
    shapes = config.shapes()
    missing = [name for name in shapes if name not in tensors]
    if missing:
        raise ModelError(f"the weights lack {_some(missing)}, which config.json calls for; copy or download them again")
    for name, shape in shapes.items():
        stored = tensors[name]
        if stored.shape != shape:
            raise ModelError(
                f"{stored.file}: {name} has the shape {list(stored.shape)}, but config.json calls for {list(shape)}; "
                "weights and config.json are of different models"
            )
        if stored.dtype not in DTYPES:
            raise ModelError(
                f"{stored.file}: {name} is stored as {stored.dtype}; supported are {', '.join(DTYPES)}: "
                "give the original, unquantized model"
            )
    strange = [name for name in tensors if name not in shapes and not _may_be_ignored(name)]
    if strange:
        raise ModelError(f"the weights hold {_some(strange)}, which a Llama model does not have")


def _may_be_ignored(name: str) -> bool:
    """A tied head that is stored all the same, and the RoPE buffers that old transformers saved."""
    return name == "lm_head.weight" or name.endswith("rotary_emb.inv_freq")


def _some(names: list[str]) -> str:
    rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + rest
