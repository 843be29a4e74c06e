"""Adapters as peft writes them: read, checked against their base model, put beside its weights or merged into them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from torch import Tensor, nn

from kubetune_contract.architecture import LlamaConfig, ModelError
from kubetune_contract.config import AdapterConfig
from kubetune_trainer.distributed import local_rows
from kubetune_trainer.hub import WeightReader, missing_folder, read_json
from kubetune_trainer.peft import lora_layers, merge, peft_name

CONFIG_FILE: Final = "adapter_config.json"
WEIGHTS_FILE: Final = "adapter_model.safetensors"
_PREFIX: Final = peft_name("")
_FACTORS: Final = {
    "lora_A.weight": "lora_A.weight",
    "lora_B.weight": "lora_B.weight",
    "lora_embedding_A": "lora_embedding_A",
    "lora_embedding_B": "lora_embedding_B",
    "lora_magnitude_vector": "lora_magnitude_vector",
    "lora_magnitude_vector.weight": "lora_magnitude_vector",
}
"""Ends of names in peft's files, and the names of the same in our layers."""
_PAIRS: Final = ({"lora_A.weight", "lora_B.weight"}, {"lora_embedding_A", "lora_embedding_B"})
"""Factors of which a layer has both."""
_REFUSED: Final = {
    "rank_pattern": {},
    "alpha_pattern": {},
    "modules_to_save": [],
    "fan_in_fan_out": False,
    "lora_bias": False,
    "bias": "none",
    "alora_invocation_tokens": [],
}
"""Settings of peft with the only value that is supported."""


class Adapter:
    """A folder with adapter_config.json and adapter_model.safetensors.

    Raises ModelError for a missing folder or file, and for an adapter of a kind that is not supported.
    """

    def __init__(self, folder: Path) -> None:
        from safetensors import SafetensorError, safe_open

        if not folder.is_dir():
            raise ModelError(f"the adapter: {missing_folder(folder)}")
        self.folder = folder
        self.settings = read_json(folder, CONFIG_FILE)
        _check_settings(folder, self.settings)
        try:
            self._file: Any = safe_open(folder / WEIGHTS_FILE, framework="pt")
        except FileNotFoundError as error:
            raise ModelError(f"{folder} has no {WEIGHTS_FILE}: copy the adapter's folder again") from error
        except SafetensorError as error:
            raise ModelError(f"{folder / WEIGHTS_FILE} is damaged: {error}; copy it again") from error
        self._names = _by_module(folder, list(self._file.keys()))  # type: ignore[no-untyped-call]

    @property
    def modules(self) -> list[str]:
        """Paths of the adapted layers, such as `model.layers.0.self_attn.q_proj`."""
        return list(self._names)

    @property
    def has_magnitude(self) -> bool:
        """Whether it is a DoRA adapter."""
        return bool(self.settings.get("use_dora"))

    @property
    def scale(self) -> float:
        """By which B A is multiplied."""
        rank, alpha = int(self.settings["r"]), float(self.settings["lora_alpha"])
        return float(alpha / (rank**0.5 if self.settings.get("use_rslora") else rank))

    def config(self) -> AdapterConfig:
        """The same in a run's words."""
        rank = int(self.settings["r"])
        targets = sorted({module.rpartition(".")[2] for module in self.modules})
        return AdapterConfig.model_validate({"rank": rank, "alpha": self.scale * rank, "target_modules": targets})

    def factors(self, module: str) -> dict[str, Tensor]:
        """The tensors for a layer by the names that they have in it; none where it has no adapter."""
        return {key: self._file.get_tensor(name) for key, name in self._names.get(module, {}).items()}

    def check(self, config: LlamaConfig) -> None:
        """Raises ModelError where the adapter does not fit the base model."""
        shapes, rank = config.shapes(), int(self.settings["r"])
        for module, names in self._names.items():
            shape = shapes.get(f"{module}.weight")
            if shape is None:
                raise ModelError(self._other_base(f"it adapts {module}, which the base model does not have"))
            rows, columns = shape
            wanted = {
                "lora_A.weight": [rank, columns],
                "lora_B.weight": [rows, rank],
                "lora_embedding_A": [rank, rows],
                "lora_embedding_B": [columns, rank],
                "lora_magnitude_vector": [rows],
            }
            for key, name in names.items():
                found = self._file.get_slice(name).get_shape()
                if found != wanted[key]:
                    raise ModelError(
                        self._other_base(f"{name} has the shape {found}, but the base model calls for {wanted[key]}")
                    )

    def _other_base(self, reason: str) -> str:
        base = self.settings.get("base_model_name_or_path") or "not named"
        return (
            f"the adapter {self.folder} was not trained on this base model: {reason}; "
            f"its base is {base}: give that as model.path"
        )

    def load_into(self, model: nn.Module) -> None:
        """Fill the model's adapters, which were made with config(). Of sharded ones only the local rows."""
        parameters = dict(model.named_parameters())
        missing = [path for path, _ in lora_layers(model) if path not in self._names]
        if missing:
            raise ModelError(
                f"the adapter {self.folder} leaves out {missing[0]}, but adapts other layers of that name: "
                "merge it, with merged=true"
            )
        for module, names in self._names.items():
            for key, name in names.items():
                local, start = local_rows(parameters[f"{module}.{key}"])
                local.copy_(self._file.get_slice(name)[start : start + len(local)])


class MergedReader(WeightReader):
    """A folder's weights with an adapter in them: each is merged when it is read, in the file's dtype."""

    def __init__(self, folder: Path, adapter: Adapter) -> None:
        super().__init__(folder)
        adapter.check(self.config())
        self._adapter = adapter

    def slice(self, name: str, start: int, stop: int) -> Tensor:
        """Rows start to stop of a merged weight."""
        return self.full(name)[start:stop]

    def full(self, name: str) -> Tensor:
        """A whole merged weight."""
        weight = super().slice(name, 0, self.config().shapes()[name][0])
        factors = self._adapter.factors(name.removesuffix(".weight"))
        return merge(weight, factors, self._adapter.scale) if factors else weight


def _check_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    kind = settings.get("peft_type")
    if kind != "LORA":
        raise ModelError(f"{folder / CONFIG_FILE}: peft_type is {kind!r}; LORA is supported, with or without use_dora")
    for field in ("r", "lora_alpha"):
        if not isinstance(settings.get(field), int | float) or settings[field] <= 0:
            raise ModelError(f"{folder / CONFIG_FILE}: {field} must be a number above 0: {settings.get(field)!r}")
    for field, only in _REFUSED.items():
        if settings.get(field) not in (only, None):
            raise ModelError(
                f"{folder / CONFIG_FILE}: {field} is {settings[field]!r}, which is not supported: "
                "merge the adapter with peft's merge_and_unload, and give the merged model as model.path"
            )


def _by_module(folder: Path, keys: list[str]) -> dict[str, dict[str, str]]:
    """Module -> name in our layer -> name in the file."""
    found: dict[str, dict[str, str]] = {}
    for name in keys:
        end = next((end for end in _FACTORS if name.endswith(f".{end}")), None)
        if end is None or not name.startswith(_PREFIX):
            raise ModelError(f"{folder / WEIGHTS_FILE}: {name} is no tensor of a LoRA or DoRA adapter")
        found.setdefault(name[len(_PREFIX) :].removesuffix(f".{end}"), {})[_FACTORS[end]] = name
    for module, names in found.items():
        if not any(pair <= set(names) for pair in _PAIRS):
            raise ModelError(f"{folder / WEIGHTS_FILE} has only a part of the adapter of {module}: copy it again")
    return found
