"""Meta's own format: params.json and consolidated.NN.pth, one file for each rank of its model-parallel group.

A .pth file is a zip archive with a pickle that names the tensors and one member with the numbers of each. Here the
pickle is read without torch and may name nothing but tensors: whatever else it calls is refused, never run.
"""

import math
import re
import struct
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, Final

from kubetune_contract.architecture import ARCHITECTURE, ModelError
from kubetune_trainer import plain_pickle
from kubetune_trainer.stored import AGAIN, DTYPES, StoredTensor, Weight, read_start

PARAMS_FILE: Final = "params.json"
_ORIGINAL: Final = "original"
"""The folder of Meta's files in a repository of the Hugging Face hub."""

_MAX_PICKLE: Final = 100_000_000
"""Bytes. That of the largest model has less than 1 MB."""

_NAMES: Final = {
    "tok_embeddings": "model.embed_tokens",
    "norm": "model.norm",
    "output": "lm_head",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
"""Meta's names, those of a layer without its number -> Hugging Face's."""

_ROW_PARALLEL: Final = ("attention.wo", "feed_forward.w2")
"""Each rank has all rows and some columns. Of the other matrices it has some rows; norms are the same on all."""

_FORMATS: Final = {"FloatStorage": "F32", "BFloat16Storage": "BF16", "HalfStorage": "F16"}

_LLAMA_3_WORDS: Final = 128_256

Parts = dict[str, list[StoredTensor]]
"""Meta's name -> the tensor in each file."""


def find(folder: Path) -> Path | None:
    """The folder of Meta's files: `folder` or its `original`; None where there are none."""
    return next((place for place in (folder, folder / _ORIGINAL) if any(place.glob("consolidated.*.pth"))), None)


def read_parts(folder: Path) -> Parts:
    """Every tensor in the folder's files. Raises ModelError that names the file."""
    files = sorted(folder.glob("consolidated.*.pth"))
    for number, file in enumerate(files):
        expected = folder / f"consolidated.{number:02}.pth"
        if file != expected:
            raise ModelError(f"{expected} is missing, but {file.name} is there; {AGAIN}")
    tables = [_read_table(file) for file in files]
    for file, table in zip(files, tables, strict=True):
        if table.keys() != tables[0].keys():
            raise ModelError(f"{file} has other tensors than {files[0].name}: they are not parts of one model")
    return {name: [table[name] for table in tables] for name in tables[0] if not name.startswith("rope.")}


def hugging_face_config(params: Mapping[str, Any], parts: Parts) -> dict[str, Any]:
    """What config.json would say. What params.json leaves out comes from Meta's code and the tensors.

    Raises ModelError that names the field.
    """
    for name in ("quantization_args", "lora_args", "vision_chunk_size", "moe_args"):
        if params.get(name) not in (None, -1):
            raise ModelError(f"{PARAMS_FILE} has {name}: only the original text models of Llama can be trained")
    dim, heads = (_number(params, name) for name in ("dim", "n_heads"))
    tied, scaled, theta = _tied(parts), bool(params.get("use_scaled_rope")), _real(params, "rope_theta", 10000.0)
    words = params.get("vocab_size")
    if words in (None, 0, -1):  # Llama 2 leaves it to the tokenizer
        words = sum(part.shape[0] for part in parts.get("output.weight", []) if part.shape)
    config = {
        "architectures": [ARCHITECTURE],
        "model_type": "llama",
        "vocab_size": words,
        "hidden_size": dim,
        "intermediate_size": _inner_size(params, dim),
        "num_hidden_layers": _number(params, "n_layers"),
        "num_attention_heads": heads,
        "num_key_value_heads": params.get("n_kv_heads") or heads,
        "hidden_act": "silu",
        "rms_norm_eps": params.get("norm_eps", 1e-5),
        "rope_theta": theta,
        "rope_scaling": _rope_scaling(params, tied) if scaled else None,
        "max_position_embeddings": 131_072 if scaled else 8192 if theta > 10000.0 else 4096,
        "tie_word_embeddings": tied,
        "torch_dtype": "bfloat16",
    }
    if words == _LLAMA_3_WORDS:
        config |= {"bos_token_id": 128_000, "eos_token_id": [128_001, 128_008, 128_009]}
    return config


def _number(params: Mapping[str, Any], name: str) -> int:
    value = params.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**31:
        raise ModelError(f"{PARAMS_FILE}: {name} must be a whole number above 0, but it is {value!r}")
    return value


def _real(params: Mapping[str, Any], name: str, default: float) -> float:
    value = params.get(name) or default
    if not isinstance(value, int | float) or not 0 < value < 1e12:
        raise ModelError(f"{PARAMS_FILE}: {name} must be a number above 0, but it is {value!r}")
    return float(value)


def _inner_size(params: Mapping[str, Any], dim: int) -> int:
    """The width of the feed-forward layer, as Meta's code rounds it."""
    width = int(_real(params, "ffn_dim_multiplier", 1.0) * int(2 * 4 * dim / 3))
    multiple = _number(params, "multiple_of")
    return -(-width // multiple) * multiple


def _rope_scaling(params: Mapping[str, Any], tied: bool) -> dict[str, Any]:
    """Old files of Meta's only say that there is a scaling. The factor of 3.1 is 8; of 3.2, the tied models, 32."""
    return {
        "rope_type": "llama3",
        "factor": _real(params, "rope_scaling_factor", 32 if tied else 8),
        "low_freq_factor": 1.0,
        "high_freq_factor": _real(params, "rope_high_freq_factor", 4),
        "original_max_position_embeddings": 8192,
    }


def _tied(parts: Parts) -> bool:
    """Whether head and embedding are one: params.json does not say so, and files hold the numbers twice or once."""
    head, embedding = (
        [(part.shape, part.checksum) for part in parts.get(f"{name}.weight", [])]
        for name in ("output", "tok_embeddings")
    )
    return not head or (head == embedding and all(checksum is not None for _, checksum in head))


def weights(parts: Parts, config: Mapping[str, Any]) -> dict[str, Weight]:
    """Hugging Face name -> the weight. Raises ModelError where the parts do not go together."""
    found = {_translate(name): _weight(name, tensors, config) for name, tensors in parts.items()}
    if config["tie_word_embeddings"]:
        found.pop("lm_head.weight", None)
    return found


def _translate(name: str) -> str:
    match = re.fullmatch(r"(layers\.\d+\.)?(.+)\.weight", name)
    if match is None or match[2] not in _NAMES:
        return name  # told as a tensor that a Llama does not have
    layer = f"model.{match[1]}" if match[1] else ""
    return f"{layer}{_NAMES[match[2]]}.weight"


def _weight(name: str, tensors: list[StoredTensor], config: Mapping[str, Any]) -> Weight:
    kind = re.sub(r"^layers\.\d+\.|\.weight$", "", name)
    if kind.endswith("norm") or any(len(part.shape) != 2 for part in tensors):
        return Weight((tensors[0],))  # whoever compares shapes refuses what should be a matrix
    # Llama 2 splits the embedding by columns, Llama 3 by rows.
    columns = kind in _ROW_PARALLEL or (
        kind == "tok_embeddings" and len(tensors) > 1 and tensors[0].shape[0] == config["vocab_size"]
    )
    axis = int(columns)
    if len({part.shape[1 - axis : 2 - axis] for part in tensors}) > 1 or len({part.dtype for part in tensors}) > 1:
        raise ModelError(f"{name} has parts of different forms in {tensors[0].file.name} and the files beside it")
    rotated = kind in ("attention.wq", "attention.wk")
    head = config["hidden_size"] // config["num_attention_heads"]
    return Weight(tuple(tensors), axis, head if rotated else 0)


# --- one file ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Storage:
    """The numbers that one or more tensors of a pickle look into."""

    kind: str
    """torch's class, such as `BFloat16Storage`."""
    key: str


@dataclass(frozen=True)
class _View:
    storage: _Storage
    offset: int
    """In elements."""
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def _read_table(file: Path) -> dict[str, StoredTensor]:
    return read_start(file, _parse)


def _parse(file: Path) -> dict[str, StoredTensor]:
    try:
        with zipfile.ZipFile(file) as archive, file.open("rb") as stream:
            members = {member.filename.partition("/")[2]: member for member in archive.infolist()}
            table = _unpickle(file, _pickle(file, archive, members))
            return {name: _place(file, stream, name, view, members) for name, view in table}
    # RuntimeError: encrypted; NotImplementedError: a compression that nobody has.
    except (zipfile.BadZipFile, zlib.error, struct.error, EOFError, RuntimeError, NotImplementedError) as error:
        raise ModelError(f"{file} is truncated or no checkpoint of torch.save(): {error}; {AGAIN}") from error


def _pickle(file: Path, archive: zipfile.ZipFile, members: Mapping[str, zipfile.ZipInfo]) -> bytes:
    """torch.save() compresses nothing, so the pickle cannot be larger than the file."""
    member = members.get("data.pkl")
    if member is None or member.compress_type != zipfile.ZIP_STORED or member.file_size > _MAX_PICKLE:
        raise ModelError(f"{file} is no checkpoint of torch.save(); {AGAIN}")
    return archive.read(member)


def _unpickle(file: Path, content: bytes) -> Iterator[tuple[str, _View]]:
    try:
        table = plain_pickle.load(content, _CALLS, _storage)
    except plain_pickle.PickleError as error:
        raise ModelError(f"{file} is not a plain file of weights: {error}; give Meta's original file") from error
    if not isinstance(table, dict):
        raise ModelError(f"{file} holds a {type(table).__name__}, not named tensors; give Meta's original file")
    return ((str(name), view) for name, view in table.items() if isinstance(view, _View))


def _storage(identity: Any) -> _Storage:
    """torch.save() writes ("storage", class, member, device, elements)."""
    _, kind, key, *_ = identity
    if kind not in _STORAGES.values() or not isinstance(key, str):
        raise plain_pickle.PickleError("a storage has no kind or no member")
    return _Storage(kind(), key)


def _view(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> _View:
    """torch._utils._rebuild_tensor_v2."""
    numbers = (offset, *shape, *strides)
    if not isinstance(storage, _Storage) or not all(type(number) is int and 0 <= number < 2**63 for number in numbers):
        raise plain_pickle.PickleError("a tensor has no storage, or sizes that are no sizes")
    return _View(storage, offset, shape, strides)


_STORAGES: Final[plain_pickle.Calls] = {
    f"torch {kind}Storage": partial(str, f"{kind}Storage")
    for kind in ("Float", "BFloat16", "Half", "Double", "Long", "Int", "Short", "Char", "Byte", "Bool")
}
_CALLS: Final[plain_pickle.Calls] = {
    **_STORAGES,
    "collections OrderedDict": OrderedDict,
    "torch._utils _rebuild_tensor_v2": _view,
    "torch._utils _rebuild_parameter": lambda view, *_: view,
}
"""Stand-ins for the few names that plain tensors need."""


def _place(
    file: Path, stream: IO[bytes], name: str, view: _View, members: Mapping[str, zipfile.ZipInfo]
) -> StoredTensor:
    member = members.get(f"data/{view.storage.key}")
    dtype = _FORMATS.get(view.storage.kind, view.storage.kind)
    size = DTYPES.get(dtype, 0)
    count = math.prod(view.shape)
    if view.strides != _contiguous(view.shape):
        raise ModelError(f"{file}: {name} is not stored row after row; give Meta's original file")
    if member is None or member.compress_type != zipfile.ZIP_STORED or (view.offset + count) * size > member.file_size:
        raise ModelError(f"{file} is damaged: the numbers of {name} are not whole; {AGAIN}")
    whole = view.offset == 0 and count * size == member.file_size
    offset = _content_offset(stream, member) + view.offset * size
    return StoredTensor(file, dtype, view.shape, offset, member.CRC if whole else None)


def _content_offset(stream: IO[bytes], member: zipfile.ZipInfo) -> int:
    """Where a member's bytes begin: behind its local header, whose last two fields are the lengths of what follows."""
    stream.seek(member.header_offset)
    name, extra = struct.unpack("<26xHH", stream.read(30))
    return member.header_offset + 30 + int(name) + int(extra)


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
