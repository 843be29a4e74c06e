"""What the runs of the trainer's benchmark read: weights, rows, and torchtune's environment. Made once, then cached."""

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from benchmarks.figures import ROOT

TORCHTUNE: Final = ("torchtune==0.6.1", "torchao==0.15.0", "torch=={torch}")
"""Of the versions of torchao that go with today's torch, torchtune 0.6.1 imports this one: 0.16 has no
int4_weight_only any more."""
SMOLLM2: Final = "SmolLM2-135M"
SHAPES: Final[dict[str, dict[str, Any]]] = {
    "56M": {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8, "num_attention_heads": 8},
    "vocabulary 128,256": {
        "hidden_size": 256,
        "intermediate_size": 1024,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "vocab_size": 128256,
    },
    "8B": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "tie_word_embeddings": False,
    },
}
"""Llama shapes with random weights; what is not named is below."""
_COMMON: Final = {
    "num_key_value_heads": 4,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_THETA: Final = 500000.0
_TOKENIZER: Final = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
ROWS: Final = 8
LENGTH: Final = 2048
"""Tokens of a row, at least."""
_TEXT: Final = (
    "the a model learns from every row of data and answers what was asked when its weights have moved "
    "far enough along the slope so that loss falls while time goes by on two small machines in one room"
)


def cache() -> Path:
    """${XDG_CACHE_HOME:-~/.cache}/kubetune/benchmarks."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(home, "kubetune", "benchmarks").resolve()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def model(name: str) -> Path:
    """The folder of the weights, in Hugging Face's layout."""
    if name == SMOLLM2:
        script = ROOT / "examples" / "demo" / "smollm2.py"
        done = subprocess.run([sys.executable, script], stdout=subprocess.PIPE, text=True, check=True)
        return Path(done.stdout.strip())
    key = hashlib.sha256(json.dumps([SHAPES[name], _COMMON, _THETA]).encode()).hexdigest()[:12]
    command = [sys.executable, "-m", "benchmarks.trainer.inputs", name]  # so that no memory of the GPU stays taken

    def make(folder: Path) -> None:
        subprocess.run([*command, folder], cwd=ROOT, check=True)

    return _made(cache() / f"llama-{key}", make)


def rows(tokenizer: Path) -> tuple[Path, Path]:
    """(tokens, texts) as `Work` wants them: the same rows, none shorter than LENGTH + 1 tokens.

    A text's tokens do not change when others follow it, so that a row that is cut is the same on each side.
    """

    def write(folder: Path) -> None:
        from tokenizers import Tokenizer

        encoder = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
        draw = random.Random(0)  # noqa: S311 - nothing secret
        texts = [" ".join(draw.choices(_TEXT.split(), k=LENGTH + 16)) for _ in range(ROWS)]
        tokens = [encoder.encode(text, add_special_tokens=False).ids for text in texts]
        assert min(map(len, tokens)) > LENGTH, "a word is at least a token"
        (folder / "tokens.json").write_text(json.dumps(tokens))
        (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))

    digest = hashlib.sha256((tokenizer / "tokenizer.json").read_bytes()).hexdigest()[:12]
    folder = _made(cache() / f"rows-{digest}", write)
    return folder / "tokens.json", folder / "texts.jsonl"


def chats() -> Path:
    """Short conversations, for the time until the first step."""
    answer = "The capital of France is Paris. It lies on the Seine and has two million inhabitants."
    turns = [
        {"role": "user", "content": "What is the capital of France?"},
        {"role": "assistant", "content": answer},
    ]

    def write(folder: Path) -> None:
        (folder / "rows.jsonl").write_text((json.dumps({"messages": turns}) + "\n") * ROWS)

    return _made(cache() / "chats", write) / "rows.jsonl"


def torchtune_python() -> Path:
    """The Python of an environment with torchtune, made with uv where it is on PATH, else with pip: minutes."""
    import torch

    wanted = [requirement.format(torch=torch.__version__.partition("+")[0]) for requirement in TORCHTUNE]
    key = hashlib.sha256("\n".join([*wanted, sys.version]).encode()).hexdigest()[:12]
    folder = cache() / f"torchtune-{key}"
    python, stamp = folder / "bin" / "python", folder / "complete"
    if stamp.exists():
        return python
    print(f"making {folder}, with {', '.join(wanted)}", file=sys.stderr, flush=True)
    shutil.rmtree(folder, ignore_errors=True)  # an environment cannot be moved: it has its own path in its files
    create: list[str | Path]
    install: list[str | Path]
    if uv := shutil.which("uv"):
        create, install = [uv, "venv", "--python", sys.executable, folder], [uv, "pip", "install", "--python", python]
    else:
        create, install = [sys.executable, "-m", "venv", folder], [python, "-m", "pip", "install"]
    subprocess.run(create, check=True)
    subprocess.run([*install, *wanted], check=True)
    stamp.write_text("\n".join(wanted) + "\n")
    return python


def _random_model(name: str, folder: Path) -> None:
    """Seeded weights in bf16, as published checkpoints have them, and SmolLM2's tokenizer, whose numbers all fit."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    about = {**_COMMON, **SHAPES[name]}
    config = LlamaConfig(**about, rope_parameters={"rope_type": "default", "rope_theta": _THETA}, dtype="bfloat16")
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            made = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    made.save_pretrained(folder, max_shard_size="5GB")
    source = model(SMOLLM2)
    for file in _TOKENIZER:
        if (source / file).exists():
            shutil.copy(source / file, folder)


def _made(folder: Path, make: Callable[[Path], None]) -> Path:
    """The folder, complete: what is made now gets its name at the end."""
    if not folder.is_dir():
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
            partial = Path(scratch, "made")
            partial.mkdir()
            make(partial)
            partial.rename(folder)
    return folder


if __name__ == "__main__":
    _random_model(sys.argv[1], Path(sys.argv[2]))
