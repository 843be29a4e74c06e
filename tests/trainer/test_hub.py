"""A model's folder: read row by row, or refused with a sentence that says what is wrong with which file."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from kubetune_contract.architecture import ModelError
from kubetune_trainer.hub import WeightReader, check_model, load_weights
from kubetune_trainer.model import Llama

Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize("shards", [1, 3], ids=["one file", "three files with an index"])
def test_every_weight_is_read_bit_for_bit(shards: int, llama_folder: Callable[..., Path]) -> None:
    folder = llama_folder(shards=shards)
    stored = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    reader = WeightReader(folder)
    assert set(reader.names()) == set(stored)
    for name, tensor in stored.items():
        assert torch.equal(reader.full(name), tensor)
        assert torch.equal(reader.slice(name, 1, 7), tensor[1:7])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_weights_are_converted_to_the_dtype_of_the_model(dtype: torch.dtype, llama_folder: Callable[..., Path]) -> None:
    folder = llama_folder(dtype=torch.bfloat16)
    model = Llama(WeightReader(folder).config()).to(dtype)
    load_weights(model, WeightReader(folder))
    for name, tensor in load_file(folder / "model.safetensors").items():
        assert torch.equal(model.get_parameter(name), tensor.to(dtype))


def test_the_files_of_a_model_are_those_that_a_run_reads(llama_folder: Callable[..., Path]) -> None:
    folder = llama_folder(shards=2)
    (folder / "README.md").write_text("not read")
    (folder / "training_args.bin").write_text("not read")
    assert WeightReader(folder).files() == [
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "model.safetensors.index.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]


def test_a_stored_copy_of_a_tied_head_and_old_rope_buffers_are_ignored(llama_folder: Callable[..., Path]) -> None:
    folder = llama_folder(tie_word_embeddings=True)

    def add(state: dict[str, torch.Tensor]) -> None:
        state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
        state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)

    _rewrite(folder, add)
    assert "lm_head.weight" not in WeightReader(folder).names()


def test_checking_a_folder_does_not_import_torch(tiny: Path) -> None:
    """The staging container is small and quick because of that."""
    program = (
        "import sys; from pathlib import Path; from kubetune_trainer import hub, stage;"
        "hub.check_model(Path(sys.argv[1])); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program, str(tiny)], check=True)


# --- refusals ---------------------------------------------------------------------------------------------------------


def _rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    file = folder / "model.safetensors"
    state = load_file(file)
    change(state)
    save_file(state, file)


def _config(folder: Path, **changes: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_bytes()) | changes))


def _resize(folder: Path, change: int) -> None:
    file = folder / "model.safetensors"
    os.truncate(file, file.stat().st_size + change)


def _as_lfs_pointer(folder: Path) -> None:
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n"
    (folder / "model.safetensors").write_text(text)


def _only(name: str) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()

    return act


def _with_index(weight_map: dict[str, str]) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    return act


LAYOUT = (
    "give a folder in Hugging Face layout: config.json, tokenizer.json and safetensors files; "
    "or in Meta's: params.json, tokenizer.model and consolidated.*.pth"
)
NO_WEIGHTS = "{folder} has no model.safetensors and no model.safetensors.index.json"
FILE = "{folder}/model.safetensors"
AGAIN = "copy or download it again"
BIAS = "model.layers.0.self_attn.q_proj.bias"

WRONG: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config.json": (
        lambda folder: (folder / "config.json").unlink(),
        "{folder} has no config.json; found: model.safetensors, tokenizer.json, tokenizer_config.json; " + LAYOUT,
    ),
    "config.json is no JSON": (
        lambda folder: (folder / "config.json").write_text("[1"),
        "{folder}/config.json cannot be read: Expecting ',' delimiter: line 1 column 3 (char 2)",
    ),
    "config.json is a list": (
        lambda folder: (folder / "config.json").write_text("[]"),
        "{folder}/config.json must hold a JSON object",
    ),
    "config.json of a size that is no size": (
        lambda folder: _config(folder, hidden_size=-1),
        "config.json: hidden_size must be a whole number above 0, but it is -1",
    ),
    "no tokenizer": (
        lambda folder: (folder / "tokenizer.json").unlink(),
        "{folder} has no tokenizer.json; found: config.json, model.safetensors, tokenizer_config.json; " + LAYOUT,
    ),
    "no weights": (
        lambda folder: (folder / "model.safetensors").unlink(),
        NO_WEIGHTS + "; give the safetensors files too",
    ),
    "weights as pickle": (
        _only("pytorch_model.bin"),
        NO_WEIGHTS + "; its .bin files must be converted first: load them in transformers and save_pretrained() them",
    ),
    "weights for llama.cpp": (
        _only("model.gguf"),
        NO_WEIGHTS + "; GGUF files are made for inference: give the original model in Hugging Face layout",
    ),
    "an empty index": (
        _only("model.safetensors.index.json"),
        "{folder}/model.safetensors.index.json cannot be read: Expecting value: line 1 column 1 (char 0)",
    ),
    "an index without a map": (
        _with_index({}),
        "{folder}/model.safetensors.index.json has no weight_map; " + AGAIN,
    ),
    "a shard is missing": (
        _with_index({"lm_head.weight": "model-00002-of-00002.safetensors"}),
        "{folder}/model-00002-of-00002.safetensors is missing; " + AGAIN,
    ),
    "a truncated file": (
        lambda folder: _resize(folder, -1000),
        FILE + " is truncated: its header promises 179,520 bytes of weights, 178,520 are there; " + AGAIN,
    ),
    "a file with too much": (
        lambda folder: _resize(folder, 4),
        FILE + " is damaged: its header promises 179,520 bytes of weights, 179,524 are there; " + AGAIN,
    ),
    "an empty file": (
        lambda folder: os.truncate(folder / "model.safetensors", 0),
        FILE + " is damaged: it has no safetensors header; " + AGAIN,
    ),
    "a file of something else": (
        lambda folder: (folder / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0" + b"not json" * 3),
        FILE + " cannot be read: Expecting value: line 1 column 1 (char 0); " + AGAIN,
    ),
    "a Git LFS pointer": (
        _as_lfs_pointer,
        FILE + " is a Git LFS pointer, not the weights: run `git lfs pull` and copy it again",
    ),
    "a missing tensor": (
        lambda folder: _rewrite(folder, lambda state: state.pop(Q_PROJ)),
        f"the weights lack {Q_PROJ}, which config.json calls for; copy or download them again",
    ),
    "many missing tensors": (
        lambda folder: _config(folder, num_hidden_layers=3),
        "the weights lack model.layers.2.self_attn.q_proj.weight, model.layers.2.self_attn.k_proj.weight, "
        "model.layers.2.self_attn.v_proj.weight and 6 more, which config.json calls for; copy or download them again",
    ),
    "a tensor of another shape": (
        lambda folder: _config(folder, vocab_size=98),
        "model.safetensors: model.embed_tokens.weight has the shape [97, 48], but config.json calls for [98, 48]; "
        "weights and config.json are of different models",
    ),
    "a quantized tensor": (
        lambda folder: _rewrite(folder, lambda state: state.update({Q_PROJ: state[Q_PROJ].to(torch.int8)})),
        f"model.safetensors: {Q_PROJ} is stored as I8; supported are F32, BF16, F16: "
        "give the original, unquantized model",
    ),
    "a tensor that no Llama has": (
        lambda folder: _rewrite(folder, lambda state: state.update({BIAS: torch.ones(1)})),
        f"the weights hold {BIAS}, which a Llama model does not have",
    ),
}


@pytest.mark.parametrize(("damage", "message"), WRONG.values(), ids=WRONG.keys())
def test_a_damaged_folder_is_refused(damage: Callable[[Path], object], message: str, tiny: Path) -> None:
    damage(tiny)
    with pytest.raises(ModelError) as caught:
        check_model(tiny)
    assert str(caught.value) == message.format(folder=tiny)


MISSING = {
    "a near name": ("Meta-Llama-3-8B", "did you mean Meta-Llama-3.1-8B?"),
    "a wrong parent": ("modles/Meta-Llama-3.1-8B", "{root} has no modles; there are: Meta-Llama-3.1-8B, data"),
    "nothing near": ("x", "{root} has no x; there are: Meta-Llama-3.1-8B, data"),
    "an empty folder above": ("data/x", "{root}/data has no x; it is empty"),
}


@pytest.mark.parametrize(("path", "hint"), MISSING.values(), ids=MISSING.keys())
def test_a_missing_folder_is_told_with_what_is_there(path: str, hint: str, tmp_path: Path) -> None:
    for name in ("Meta-Llama-3.1-8B", "data", ".hidden"):
        (tmp_path / name).mkdir()
    with pytest.raises(ModelError) as caught:
        WeightReader(tmp_path / path)
    text = str(caught.value)
    assert text.startswith(f"the folder {tmp_path / path} does not exist: ")
    assert text.endswith(hint.format(root=tmp_path))
