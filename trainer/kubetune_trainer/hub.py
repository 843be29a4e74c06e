"""A model's folder, in Hugging Face's or Meta's layout: what is in it, whether it is whole, its weights row by row.

Importing this module does not import torch: the staging container checks folders with it.
"""

import difflib
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from kubetune_contract.architecture import LlamaConfig, ModelError
from kubetune_trainer import meta_files
from kubetune_trainer.safetensors_files import read_header
from kubetune_trainer.stored import DTYPES, Weight
from kubetune_trainer.tiktoken_files import find_tiktoken, read_ranks

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


_FILE_NAME: Final = re.compile(r"(?!\.)[A-Za-z0-9._-]{1,255}")


class WeightReader:
    """A folder whose weights are complete: its configuration and its files agree on every tensor.

    Hugging Face's format (config.json, safetensors) is taken where both are there, else Meta's (params.json,
    consolidated.*.pth) in the folder or in its `original`. Opening reads headers only. Raises ModelError that names the
    file or the tensor.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        meta = None if _has_safetensors(self.folder) else meta_files.find(self.folder)
        if meta is None:
            self.source, self.values = CONFIG_FILE, read_json(self.folder, CONFIG_FILE)
            self._config = LlamaConfig.from_hf(self.values)
            self._weights = read_headers(self.folder)
        else:
            params, parts = read_json(meta, meta_files.PARAMS_FILE), meta_files.read_parts(meta)
            self.source = str((meta / meta_files.PARAMS_FILE).relative_to(self.folder))
            self.values = meta_files.hugging_face_config(params, parts)
            self._config = LlamaConfig.from_hf(self.values)
            self._weights = meta_files.weights(parts, self.values)
        _check_weights(self._config, self._weights, self.source)

    def config(self) -> LlamaConfig:
        """What config.json or params.json says. `values` has the same as the content of a config.json."""
        return self._config

    def names(self) -> list[str]:
        """Hugging Face names of all weights, in the order of the layers."""
        return list(self._config.shapes())

    def files(self) -> list[str]:
        """Paths of all files that make up the model, relative to its folder; those of the weights last."""
        stored = {part.file for weight in self._weights.values() for part in weight.parts}
        others = [self.source, *COMPANIONS, INDEX_FILE]
        if not (self.folder / TOKENIZER_FILE).exists() and (tiktoken := find_tiktoken(self.folder)):
            others.insert(1, str(tiktoken.relative_to(self.folder)))
        there = [name for name in others if (self.folder / name).is_file()]
        return there + sorted(str(file.relative_to(self.folder)) for file in stored)

    def slice(self, name: str, start: int, stop: int) -> "Tensor":
        """Rows start to stop of a weight, in the file's dtype. Only they are read."""
        return self._weights[name].rows(start, stop)

    def full(self, name: str) -> "Tensor":
        """A whole weight, in the file's dtype."""
        return self.slice(name, 0, self._config.shapes()[name][0])


def load_weights(model: "nn.Module", reader: WeightReader) -> None:
    """Fill every weight of the base model from the reader's folder, converted to the parameter's dtype.

    Of a sharded parameter only this process's rows are read. Parameters that an adapter added stay as they are, and so
    do packed ones: quant.load_packed() fills them.
    """
    from kubetune_trainer.distributed import local_rows

    parameters = dict(model.named_parameters())
    for name in reader.names():
        if not parameters[name].is_floating_point():
            continue
        local, start = local_rows(parameters[name])
        if len(local):
            local.copy_(reader.slice(name, start, start + len(local)))


def check_model(folder: Path) -> WeightReader:
    """Make sure that `folder` is a whole Llama model with a tokenizer. Raises ModelError that says what is missing."""
    reader = WeightReader(folder)
    if (tiktoken := find_tiktoken(folder)) is None or (folder / TOKENIZER_FILE).exists():
        read_json(folder, TOKENIZER_FILE)
    else:
        read_ranks(tiktoken)
    return reader


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """A JSON object of the model's folder. Raises ModelError for a missing folder, a missing or a damaged file."""
    try:
        values = json.loads((folder / name).read_bytes())
    except FileNotFoundError as error:
        raise ModelError(_what_is_missing(folder, name)) from error
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{folder / name} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise ModelError(f"{folder / name} must hold a JSON object")
    return values


def _what_is_missing(folder: Path, name: str) -> str:
    if not folder.is_dir():
        return missing_folder(folder)
    remedy = (
        "give a folder in Hugging Face layout: config.json, tokenizer.json and safetensors files; "
        "or in Meta's: params.json, tokenizer.model and consolidated.*.pth"
    )
    found = ", ".join(_visible_names(folder)[:10]) or "nothing"
    return f"{folder} has no {name}; found: {found}; {remedy}"


def missing_folder(folder: Path) -> str:
    """A sentence for a folder that is not there."""
    return f"the folder {missing_path(folder)}"


def missing_path(path: Path) -> str:
    """What is wrong with a path that does not exist: how far it leads, and the nearest names at that point."""
    parent, name = path.parent, path.name
    while not parent.is_dir():
        parent, name = parent.parent, parent.name
    names = _visible_names(parent)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    if near:
        hint = f"did you mean {' or '.join(near)}?"
    else:
        hint = f"there are: {', '.join(names[:10])}" if names else "it is empty"
    return f"{path} does not exist: {parent} has no {name}; {hint}"


def _visible_names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))


def _has_safetensors(folder: Path) -> bool:
    return any((folder / name).exists() for name in (WEIGHTS_FILE, INDEX_FILE))


def read_headers(folder: Path) -> dict[str, Weight]:
    """Every tensor in the folder's safetensors files, from their headers."""
    headers = [read_header(folder / file) for file in _weight_files(folder)]
    return {name: Weight((tensor,)) for header in headers for name, tensor in header.items()}


def _weight_files(folder: Path) -> list[str]:
    if (folder / WEIGHTS_FILE).exists():
        return [WEIGHTS_FILE]
    if (folder / INDEX_FILE).exists():
        weight_map = read_json(folder, INDEX_FILE).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ModelError(f"{folder / INDEX_FILE} has no weight_map; copy or download it again")
        for name in weight_map.values():
            if not isinstance(name, str) or not _FILE_NAME.fullmatch(name):
                raise ModelError(f"{folder / INDEX_FILE} names {name!r}, which is no file beside it")
        return sorted(set(weight_map.values()))
    raise ModelError(f"{folder} has no {WEIGHTS_FILE} and no {INDEX_FILE}{_other_formats(folder)}")


def _other_formats(folder: Path) -> str:
    if any(folder.glob("pytorch_model*.bin")):
        return "; its .bin files must be converted first: load them in transformers and save_pretrained() them"
    if any(folder.glob("*.gguf")):
        return "; GGUF files are made for inference: give the original model in Hugging Face layout"
    return "; give the safetensors files too"


def _check_weights(config: LlamaConfig, weights: dict[str, Weight], source: str) -> None:
    shapes = config.shapes()
    missing = [name for name in shapes if name not in weights]
    if missing:
        raise ModelError(f"the weights lack {_some(missing)}, which {source} calls for; copy or download them again")
    for name, shape in shapes.items():
        weight = weights[name]
        file = weight.parts[0].file.name
        if weight.shape != shape:
            raise ModelError(
                f"{file}: {name} has the shape {list(weight.shape)}, but {source} calls for {list(shape)}; "
                f"weights and {source} are of different models{_perhaps_incomplete(weight)}"
            )
        if weight.dtype not in DTYPES:
            raise ModelError(
                f"{file}: {name} is stored as {weight.dtype}; supported are {', '.join(DTYPES)}: "
                "give the original, unquantized model"
            )
    strange = [name for name in weights if name not in shapes and not _may_be_ignored(name)]
    if strange:
        raise ModelError(f"the weights hold {_some(strange)}, which a Llama model does not have")


def _perhaps_incomplete(weight: Weight) -> str:
    return ", or consolidated files are missing" if weight.parts[0].file.suffix == ".pth" else ""


def _may_be_ignored(name: str) -> bool:
    """A tied head that is stored all the same, and the RoPE buffers that old transformers saved."""
    return name == "lm_head.weight" or name.endswith("rotary_emb.inv_freq")


def _some(names: list[str]) -> str:
    rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + rest
