"""Writes models as Meta publishes them: params.json, consolidated.NN.pth of a model-parallel group, tokenizer.model."""

import base64
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

NAMES = {
    "embed_tokens": "tok_embeddings",
    "q_proj": "attention.wq",
    "k_proj": "attention.wk",
    "v_proj": "attention.wv",
    "o_proj": "attention.wo",
    "gate_proj": "feed_forward.w1",
    "down_proj": "feed_forward.w2",
    "up_proj": "feed_forward.w3",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "norm": "norm",
    "lm_head": "output",
}
COLUMNS = ("o_proj", "down_proj")


def write_meta(
    source: Path, folder: Path, *, shards: int = 1, embedding_axis: int = 0, head: str = "own", **params: Any
) -> Path:
    """The Llama of a Hugging Face folder with one file, as Meta would have published it; `params` go to params.json.

    `embedding_axis` 1 is Llama 2's. `head` of a tied model: "absent", "shared" (one storage) or "own" (a copy).
    """
    config = json.loads((source / "config.json").read_bytes())
    state = load_file(source / "model.safetensors")
    if config["tie_word_embeddings"] and head != "absent":
        embedding = state["model.embed_tokens.weight"]
        state["lm_head.weight"] = embedding if head == "shared" else embedding.clone()
    folder.mkdir(parents=True, exist_ok=True)
    for rank in range(shards):
        part = {
            _name(name): _part(name, weight, rank, shards, config, embedding_axis) for name, weight in state.items()
        }
        if head == "shared":
            part["output.weight"] = part["tok_embeddings.weight"]
        part["rope.freqs"] = torch.ones(config["hidden_size"] // config["num_attention_heads"] // 2)
        torch.save(part, folder / f"consolidated.{rank:02}.pth")
    values = {
        "dim": config["hidden_size"],
        "n_layers": config["num_hidden_layers"],
        "n_heads": config["num_attention_heads"],
        "n_kv_heads": config["num_key_value_heads"],
        "vocab_size": config["vocab_size"],
        "multiple_of": config["intermediate_size"],
        "ffn_dim_multiplier": config["intermediate_size"] / int(8 * config["hidden_size"] / 3),
        "norm_eps": config["rms_norm_eps"],
        "rope_theta": config["rope_theta"],
    }
    (folder / "params.json").write_text(json.dumps(values | params))
    write_ranks(folder)
    return folder


def _name(name: str) -> str:
    *layer, kind, _ = name.removeprefix("model.").split(".")
    return ".".join([*layer[:2], NAMES[kind], "weight"])


def _part(
    name: str, weight: torch.Tensor, rank: int, shards: int, config: dict[str, Any], embedding_axis: int
) -> torch.Tensor:
    kind = name.split(".")[-2]
    if kind in ("q_proj", "k_proj"):  # Hugging Face's half-split rows back to Meta's pairs
        size = config["hidden_size"] // config["num_attention_heads"]
        weight = weight.view(-1, 2, size // 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
    if weight.dim() == 1:
        return weight.clone()
    axis = embedding_axis if kind == "embed_tokens" else int(kind in COLUMNS)
    return weight.chunk(shards, axis)[rank].clone()


def write_ranks(folder: Path, merged: tuple[bytes, ...] = ()) -> Path:
    """A tiktoken file with all single bytes and the tokens `merged`."""
    tokens = [bytes([byte]) for byte in range(256)] + list(merged)
    lines = [base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens)]
    (folder / "tokenizer.model").write_bytes(b"".join(lines))
    return folder
