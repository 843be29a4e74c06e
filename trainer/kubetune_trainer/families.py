"""The sizes of Meta's Llama 3 models, for questions about models whose files are not at hand."""

import re
from typing import Final

from kubetune_contract.architecture import Llama3Scaling, LlamaConfig


def _model(hidden: int, inner: int, layers: int, heads: int, *, context: int, stretch: float = 0) -> LlamaConfig:
    """`stretch`: factor of RoPE's scaling, 0 for none. Models of fewer than 4096 hidden dimensions tie their head."""
    return LlamaConfig(
        vocab_size=128256,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=hidden // heads,
        rms_norm_eps=1e-5,
        rope_theta=500000.0,
        rope_scaling=Llama3Scaling(stretch, 1.0, 4.0, 8192) if stretch else None,
        tie_word_embeddings=hidden < 4096,
        max_position_embeddings=context,
    )


FAMILIES: Final = {
    "llama3/8B": _model(4096, 14336, 32, 32, context=8192),
    "llama3/70B": _model(8192, 28672, 80, 64, context=8192),
    "llama3_1/8B": _model(4096, 14336, 32, 32, context=131072, stretch=8),
    "llama3_1/70B": _model(8192, 28672, 80, 64, context=131072, stretch=8),
    "llama3_1/405B": _model(16384, 53248, 126, 128, context=131072, stretch=8),
    "llama3_2/1B": _model(2048, 8192, 16, 32, context=131072, stretch=32),
    "llama3_2/3B": _model(3072, 8192, 28, 24, context=131072, stretch=32),
    "llama3_3/70B": _model(8192, 28672, 80, 64, context=131072, stretch=8),
}
"""Family and size, as the names of presets begin (the models' config.json)."""

_IN_PATHS: Final = re.compile(r"llama-?3(?:[._](\d))?-(\d+b)\b", re.IGNORECASE)


def known(preset: str | None, path: str) -> LlamaConfig | None:
    """The model that a preset's name begins with, or that is named by a folder such as Meta-Llama-3.1-8B-Instruct."""
    if found := _IN_PATHS.search(path):
        minor, size = found.groups()
        return FAMILIES.get(f"llama3{f'_{minor}' if minor else ''}/{size.upper()}")
    return next((model for name, model in FAMILIES.items() if (preset or "").startswith(f"{name}_")), None)
