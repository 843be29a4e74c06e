"""Tasks that make a model folder from a model folder, one tensor at a time, on the CPU: merge and quantize."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from kubetune_contract.errors import ConfigError
from kubetune_contract.exit_codes import ExitCode
from kubetune_trainer.adapter import Adapter, MergedReader
from kubetune_trainer.distributed import World
from kubetune_trainer.failures import as_output_error
from kubetune_trainer.hub import WeightReader, check_model
from kubetune_trainer.quant import BLOCK, NF4Linear, fill, packed
from kubetune_trainer.shards import Group, ShardWriter, Spec, finished_folder, write_companions
from kubetune_trainer.task_config import MergeConfig, QuantizeConfig

_STATE: Final = "quant_state.bitsandbytes__nf4"
_STATE_BYTES: Final = 512
"""Room for the JSON text of a quantization state. The text's length varies, and blanks after it mean nothing."""
ALONE: Final = World(0, 1, 0, torch.device("cpu"))
"""These tasks need no GPU."""
_KEPT: Final = ("lm_head", "embed_tokens", "norm")
"""Parts of the names of weights that transformers does not quantize: embedding, norms and head."""


def merge(config: MergeConfig) -> int:
    """Writes the base model with the adapter merged in. Raises JobError."""
    base, adapter = check_model(Path(config.model.path)), Adapter(Path(config.adapter_path))
    reader = MergedReader(base.folder, adapter)
    groups = [{name: _stored(base, name)} for name in base.names()]
    with _new_folder(config.output_dir) as scratch:
        writer = ShardWriter(scratch, groups)
        for name in base.names():
            writer.add(name, reader.full(name))
        writer.finish()
        write_companions(base.folder, scratch, _dtype(base))
    print(f"merged {len(adapter.modules)} layers of {adapter.folder} into {base.folder}: {config.output_dir}")
    return ExitCode.DONE


def quantize(config: QuantizeConfig) -> int:
    """Writes the model in 4 or 8 bits. Raises JobError."""
    import bitsandbytes  # noqa: F401  # registers the kernels

    base = check_model(Path(config.model.path))
    form = _NF4(base, config.double) if config.format == "NF4" else _INT8(base)
    linear = {name for name in base.names() if not any(part in name for part in _KEPT)}
    groups = [form.plan(name) if name in linear else {name: _stored(base, name)} for name in base.names()]
    with _new_folder(config.output_dir) as scratch:
        writer = ShardWriter(scratch, groups)
        for name in base.names():
            parts = form.parts(name) if name in linear else {name: base.full(name)}
            for part, tensor in parts.items():
                writer.add(part, tensor)
        writer.finish()
        settings = {"quant_method": "bitsandbytes", **form.settings}
        write_companions(base.folder, scratch, _dtype(base), quantization_config=settings)
    print(f"quantized {len(linear)} layers of {base.folder} to {config.format}: {config.output_dir}")
    return ExitCode.DONE


class _NF4:
    """The layout of bitsandbytes' Linear4bit: QuantState.as_dict(packed=True) beside each weight."""

    def __init__(self, base: WeightReader, double: bool) -> None:
        self._base, self._double = base, double
        self.settings = {
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": double,
            "bnb_4bit_compute_dtype": _name(_dtype(base)),
            "bnb_4bit_quant_storage": "uint8",
        }
        """As transformers' BitsAndBytesConfig has them."""

    def plan(self, name: str) -> Group:
        """The tensors of one weight. Raises ConfigError for rows that are no whole number of blocks."""
        rows, columns = self._base.config().shapes()[name]
        if columns % BLOCK:
            reason = f"NF4 needs rows of a multiple of {BLOCK} weights, but those of {name} have {columns}"
            raise ConfigError([f"format: {reason}: set format to INT8"])
        count = rows * columns
        blocks = count // BLOCK
        specs = {
            "": Spec(torch.uint8, (count // 2, 1)),
            ".absmax": Spec(torch.uint8 if self._double else torch.float32, (blocks,)),
            ".quant_map": Spec(torch.float32, (16,)),
            f".{_STATE}": Spec(torch.uint8, (_STATE_BYTES,)),
        }
        if self._double:
            specs[".nested_absmax"] = Spec(torch.float32, (-(-blocks // 256),))
            specs[".nested_quant_map"] = Spec(torch.float32, (256,))
        return {f"{name}{end}": spec for end, spec in specs.items()}

    def parts(self, name: str) -> dict[str, Tensor]:
        """Their values."""
        from bitsandbytes.functional import get_4bit_type

        dtype, (rows, columns) = _stored(self._base, name)
        layer = NF4Linear(columns, rows, double=self._double, dtype=dtype)
        fill(layer, name, self._base, ALONE)
        stored = packed(layer)
        assert stored is not None
        state: dict[str, Any] = {
            "quant_type": "nf4",
            "blocksize": BLOCK,
            "dtype": _name(dtype),
            "shape": [rows, columns],
        }
        scales = stored.absmax.reshape(-1)
        tensors = {"": stored.weight.reshape(-1, 1), ".quant_map": get_4bit_type("nf4", device="cpu")}  # type: ignore[no-untyped-call]
        if stored.nabsmax is not None and stored.code is not None and stored.offset is not None:
            tensors |= {".nested_absmax": stored.nabsmax, ".nested_quant_map": stored.code}
            state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": stored.offset.item()}
        else:
            scales = scales.view(torch.float32)
        text = json.dumps(state).encode().ljust(_STATE_BYTES)
        tensors |= {".absmax": scales, f".{_STATE}": torch.frombuffer(bytearray(text), dtype=torch.uint8)}
        return {f"{name}{end}": tensor for end, tensor in tensors.items()}


class _INT8:
    """The layout of bitsandbytes' Linear8bitLt (LLM.int8, Dettmers et al. 2022): int8 rows and their largest value."""

    def __init__(self, base: WeightReader) -> None:
        self._base = base
        self.settings = {"load_in_4bit": False, "load_in_8bit": True, "llm_int8_threshold": 6.0}
        """As transformers' BitsAndBytesConfig has them."""

    def plan(self, name: str) -> Group:
        """The tensors of one weight."""
        rows, columns = self._base.config().shapes()[name]
        scale, kind = _beside(name)
        return {
            name: Spec(torch.int8, (rows, columns)),
            scale: Spec(torch.float32, (rows,)),
            kind: Spec(torch.uint8, ()),
        }

    def parts(self, name: str) -> dict[str, Tensor]:
        """Their values."""
        # bitsandbytes converts to float16 first: the same bytes need the same detour.
        values, largest, _ = torch.ops.bitsandbytes.int8_vectorwise_quant(self._base.full(name).to(torch.float16))
        scale, kind = _beside(name)
        return {name: values, scale: largest, kind: torch.tensor(0, dtype=torch.uint8)}


def _beside(name: str) -> tuple[str, str]:
    """Names of a weight's scales and of the mark for the order of its values (0: by rows)."""
    layer = name.removesuffix("weight")
    return f"{layer}SCB", f"{layer}weight_format"


def _stored(base: WeightReader, name: str) -> Spec:
    return Spec(base.slice(name, 0, 1).dtype, base.config().shapes()[name])


def _dtype(base: WeightReader) -> torch.dtype:
    """The number format that config.json names: that of the matrices."""
    return _stored(base, next(iter(base.names()))).dtype


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@contextmanager
def _new_folder(path: str) -> Iterator[Path]:
    """A temporary folder that becomes `path`, which must not exist, if all goes well."""
    folder = Path(path)
    if folder.exists():
        raise ConfigError([f"output_dir: {folder} exists already: give the name of a new folder, or remove it"])
    try:
        with finished_folder(folder, ALONE) as scratch:
            yield scratch
    except OSError as error:
        raise as_output_error(error, folder) or error from error
