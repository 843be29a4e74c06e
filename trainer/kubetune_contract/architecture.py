"""What a Llama model is, without torch: its config.json and the names and shapes of its weights.

Both sides need it: the trainer builds the model, the operator tells from its sizes how much memory a run takes.
"""

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Self

from pydantic import Field

from kubetune_contract.base import ContractModel
from kubetune_contract.exit_codes import ExitCode, JobError

ARCHITECTURE = "LlamaForCausalLM"
"""The one architecture that is supported, as config.json names it."""

HEAD_CHUNK: Final = 512
"""Label tokens whose logits live at once: 0.26 GB in fp32 for Llama 3's 128,256 words, less than a block takes."""

MOST_LAYERS: Final = 4096
"""Blocks of a model, at most: whoever reads a size from a file lists the weights of so many. Llama 3.1 405B has 126."""

_LARGEST: Final = 2**31 - 1
"""Of all other sizes."""

NORM_NUMBERS: Final = 1 << 24
"""Weights whose norms are computed at once: 64 MiB in float32."""


class ModelError(JobError):
    """The files are not a usable Llama model. The message names file, tensor or field, and the remedy."""

    exit_code = ExitCode.INVALID_MODEL


@dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1's stretching of RoPE to a longer context."""

    factor: float
    """By which the low frequencies are divided."""
    low_freq_factor: float
    """Wavelengths above original_max_position_embeddings / low_freq_factor are stretched whole."""
    high_freq_factor: float
    """Wavelengths below original_max_position_embeddings / high_freq_factor stay; between the two lies a ramp."""
    original_max_position_embeddings: int
    """Tokens of context in pretraining."""


class LlamaSizes(ContractModel):
    """Sizes of a model, named as in Hugging Face's config.json: all that its memory depends on."""

    vocab_size: int = Field(ge=1)
    """Tokens that the model knows."""
    hidden_size: int = Field(ge=1)
    """Width between the blocks."""
    intermediate_size: int = Field(ge=1)
    """Width inside the MLPs."""
    num_hidden_layers: int = Field(ge=1)
    """Blocks."""
    num_attention_heads: int = Field(ge=1)
    """Heads of the queries."""
    num_key_value_heads: int = Field(ge=1)
    """Heads of keys and values."""
    head_dim: int = Field(ge=1)
    """Width of a head."""
    tie_word_embeddings: bool
    """Whether the head is the embedding's table."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every weight's Hugging Face name and shape, in the order of the layers. A tied `lm_head.weight` is absent."""
        return dict(self._shapes())

    @property
    def parameters(self) -> int:
        """Number of weights; tied ones are counted once."""
        outside, whole = (self._weights(layers) for layers in (0, 1))
        return outside + self.num_hidden_layers * (whole - outside)

    def _weights(self, layers: int) -> int:
        """Number of weights with so many blocks; they are counted, not listed: the sizes may come from others."""
        return sum(_product(shape) for _, shape in self.model_copy(update={"num_hidden_layers": layers})._shapes())

    def _shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        hidden, inner = self.hidden_size, self.intermediate_size
        queries = self.num_attention_heads * self.head_dim
        keys = self.num_key_value_heads * self.head_dim
        yield "model.embed_tokens.weight", (self.vocab_size, hidden)
        for layer in range(self.num_hidden_layers):
            block = f"model.layers.{layer}"
            yield f"{block}.self_attn.q_proj.weight", (queries, hidden)
            yield f"{block}.self_attn.k_proj.weight", (keys, hidden)
            yield f"{block}.self_attn.v_proj.weight", (keys, hidden)
            yield f"{block}.self_attn.o_proj.weight", (hidden, queries)
            yield f"{block}.mlp.gate_proj.weight", (inner, hidden)
            yield f"{block}.mlp.up_proj.weight", (inner, hidden)
            yield f"{block}.mlp.down_proj.weight", (hidden, inner)
            yield f"{block}.input_layernorm.weight", (hidden,)
            yield f"{block}.post_attention_layernorm.weight", (hidden,)
        yield "model.norm.weight", (hidden,)
        if not self.tie_word_embeddings:
            yield "lm_head.weight", (self.vocab_size, hidden)


class LlamaConfig(LlamaSizes):
    """Sizes and constants of a model, named as in Hugging Face's config.json."""

    rms_norm_eps: float
    """Term that keeps the norms' division finite."""
    rope_theta: float
    """Base of RoPE's wavelengths."""
    rope_scaling: Llama3Scaling | None
    """Llama 3.1's stretching of RoPE; None without."""
    max_position_embeddings: int
    """Longest context, in tokens."""

    @classmethod
    def from_hf(cls, values: Mapping[str, Any]) -> Self:
        """Read the content of a config.json, as transformers 4 or 5 writes it.

        Fields that are absent have the defaults of transformers' LlamaConfig. Raises ModelError that names the field.
        """
        return cls(**_Fields(values).read())

    @property
    def sizes(self) -> LlamaSizes:
        """The sizes alone."""
        return LlamaSizes(**{name: getattr(self, name) for name in LlamaSizes.model_fields})


def _product(shape: tuple[int, ...]) -> int:
    size = 1
    for length in shape:
        size *= length
    return size


class _Fields:
    """Reads config.json field by field and says which one is wrong."""

    _UNSUPPORTED: ClassVar[dict[str, tuple[Any, str]]] = {
        "hidden_act": ("silu", "Llama's activation is silu"),
        "attention_bias": (False, "linear layers with a bias are not supported"),
        "mlp_bias": (False, "linear layers with a bias are not supported"),
        "quantization_config": (None, "quantized weights cannot be trained: give the original bf16 or fp32 model"),
    }
    """Field -> the one value that is supported (also the default), and why others are not."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values = values

    def read(self) -> dict[str, Any]:
        """The arguments of LlamaConfig."""
        self._check_architecture()
        for name, (only, reason) in self._UNSUPPORTED.items():
            if self.values.get(name, only) != only:
                raise ModelError(f"config.json: {name} is {self.values[name]!r}; {reason}")
        hidden, heads = self._size("hidden_size"), self._size("num_attention_heads")
        key_value_heads = self._size("num_key_value_heads", heads)
        head_dim = self._size("head_dim", max(1, hidden // heads))
        self._check_heads(hidden, heads, key_value_heads, head_dim)
        return {
            "vocab_size": self._size("vocab_size"),
            "hidden_size": hidden,
            "intermediate_size": self._size("intermediate_size"),
            "num_hidden_layers": self._size("num_hidden_layers", most=MOST_LAYERS),
            "num_attention_heads": heads,
            "num_key_value_heads": key_value_heads,
            "head_dim": head_dim,
            "rms_norm_eps": self._positive("rms_norm_eps", 1e-6),
            "rope_theta": self._rope_theta(),
            "rope_scaling": self._rope_scaling(),
            "tie_word_embeddings": bool(self.values.get("tie_word_embeddings", False)),
            "max_position_embeddings": self._size("max_position_embeddings", 2048),
        }

    def _check_architecture(self) -> None:
        names = self.values.get("architectures") or [self.values.get("model_type", "not named")]
        if not isinstance(names, list) or (ARCHITECTURE not in names and names != ["llama"]):
            told = ", ".join(map(repr, names)).replace("'", "") if isinstance(names, list) else repr(names)
            raise ModelError(
                f"config.json: the architecture is {told}; supported is {ARCHITECTURE}, "
                "the text models of Llama 2, 3, 3.1, 3.2, 3.3 and every model of the same form"
            )

    @staticmethod
    def _check_heads(hidden: int, heads: int, key_value_heads: int, head_dim: int) -> None:
        if heads % key_value_heads:
            raise ModelError(
                f"config.json: num_attention_heads ({heads}) must be a multiple of num_key_value_heads "
                f"({key_value_heads})"
            )
        if head_dim % 2:
            raise ModelError(
                f"config.json: head_dim must be even for RoPE, but it is {head_dim} (hidden_size {hidden}, "
                f"num_attention_heads {heads})"
            )

    def _size(self, name: str, default: int | None = None, most: int = _LARGEST) -> int:
        value = self._value(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ModelError(f"config.json: {name} must be a whole number above 0, but it is {value!r}")
        if value > most:
            raise ModelError(f"config.json: {name} must be at most {most}, but it is larger")
        return value

    def _positive(self, name: str, default: float | None = None) -> float:
        value = self._value(name, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= sys.float_info.max:
            raise ModelError(f"config.json: {name} must be a finite number above 0, but it is {value!r}")
        return float(value)

    def _value(self, name: str, default: float | None) -> Any:
        value = self.values.get(name)
        value = default if value is None else value
        if value is None:
            raise ModelError(f"config.json: {name} is missing")
        return value

    def _rope(self) -> Mapping[str, Any]:
        """transformers 5 keeps all of RoPE in `rope_parameters`, 4 has `rope_theta` beside `rope_scaling`."""
        name = "rope_parameters" if self.values.get("rope_parameters") else "rope_scaling"
        values = self.values.get(name) or {}
        if not isinstance(values, Mapping):
            raise ModelError(f"config.json: {name} must be an object, but it is {values!r}")
        return values

    def _rope_theta(self) -> float:
        return _Fields({**self.values, **self._rope()})._positive("rope_theta", 10000.0)

    def _rope_scaling(self) -> Llama3Scaling | None:
        rope = self._rope()
        kind = rope.get("rope_type") or rope.get("type") or "default"
        if kind == "default":
            return None
        if kind != "llama3":
            raise ModelError(f"config.json: RoPE of type {kind!r} is not supported; 'default' and 'llama3' are")
        fields = _Fields(rope)
        return Llama3Scaling(
            factor=fields._positive("factor"),
            low_freq_factor=fields._positive("low_freq_factor"),
            high_freq_factor=fields._positive("high_freq_factor"),
            original_max_position_embeddings=fields._size("original_max_position_embeddings"),
        )
