"""Meta's checkpoints: the same model as in Hugging Face's layout, from any number of files, or a refusal."""

import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from kubetune_contract.architecture import ModelError
from kubetune_contract.staging import StageSource, StagingManifest
from kubetune_trainer import distributed
from kubetune_trainer.hub import WeightReader, check_model, load_weights
from kubetune_trainer.model import Llama
from kubetune_trainer.stage import stage

from .meta_folder import write_meta

NextFolder = Callable[..., Path]
WORDS = torch.arange(40)[None] % 90
EVEN = {"vocab_size": 96}
"""Sizes that two and more files share evenly."""


def logits(folder: Path) -> torch.Tensor:
    reader = WeightReader(folder)
    model = Llama(reader.config())
    load_weights(model, reader)
    with torch.no_grad():
        return model(WORDS)


LAYOUTS: dict[str, dict[str, Any]] = {
    "one file": {},
    "two files": {"shards": 2},
    "two files, embedding split by columns": {"shards": 2, "embedding_axis": 1},
    "a vocabulary that params.json leaves out": {"shards": 2, "embedding_axis": 1, "vocab_size": -1},
    "no scaling, said": {"use_scaled_rope": False},
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("place", ["", "original"], ids=["in the folder", "in original"])
def test_a_model_in_metas_layout_is_the_same_model(
    layout: dict[str, Any], place: str, tmp_path: Path, llama_folder: NextFolder
) -> None:
    folder = llama_folder(**EVEN)
    write_meta(folder, tmp_path / "meta" / place, **layout)
    ours, theirs = WeightReader(tmp_path / "meta"), WeightReader(folder)
    assert ours.config() == theirs.config().__class__(**vars(theirs.config()) | {"max_position_embeddings": 4096})
    stored = load_file(folder / "model.safetensors")
    assert ours.names() == theirs.names()
    for name, tensor in stored.items():
        assert torch.equal(ours.full(name), tensor), name
        for start, stop in ((0, 1), (5, 17), (13, len(tensor)), (3, 3)):
            assert torch.equal(ours.slice(name, start, stop), tensor[start:stop]), (name, start, stop)
    assert torch.equal(logits(tmp_path / "meta"), logits(folder))


def test_eight_files_are_put_together(tmp_path: Path, llama_folder: NextFolder) -> None:
    folder = llama_folder(**EVEN, num_attention_heads=8, num_key_value_heads=8, hidden_size=64, intermediate_size=96)
    write_meta(folder, tmp_path / "meta", shards=8)
    assert torch.equal(logits(tmp_path / "meta"), logits(folder))


def scaling(factor: float) -> dict[str, Any]:
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


FAMILIES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "3.1": ({"rope_theta": 500000.0, "rope_scaling": scaling(8.0)}, {}),
    "3.2, tied, head written twice": (
        {"rope_theta": 500000.0, "rope_scaling": scaling(32.0), "tie_word_embeddings": True},
        {"head": "own"},
    ),
    "3.2, tied, one storage": (
        {"rope_theta": 500000.0, "rope_scaling": scaling(32.0), "tie_word_embeddings": True},
        {"head": "shared"},
    ),
    "3.2, tied, no head": (
        {"rope_theta": 500000.0, "rope_scaling": scaling(32.0), "tie_word_embeddings": True},
        {"head": "absent"},
    ),
    "a factor that params.json gives": (
        {"rope_theta": 500000.0, "rope_scaling": scaling(16.0)},
        {"rope_scaling_factor": 16},
    ),
}


@pytest.mark.parametrize(("changes", "written"), FAMILIES.values(), ids=FAMILIES.keys())
def test_scaled_rope_and_tied_heads_equal_transformers(
    changes: dict[str, Any], written: dict[str, Any], tmp_path: Path, llama_folder: NextFolder
) -> None:
    from transformers import AutoModelForCausalLM

    folder = llama_folder(**EVEN, **changes, max_position_embeddings=131072)
    oracle = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()
    write_meta(folder, tmp_path / "meta", use_scaled_rope=True, **written)
    assert WeightReader(tmp_path / "meta").config() == WeightReader(folder).config()
    with torch.no_grad():
        expected = oracle(WORDS).logits
    # float32 on both sides; sums in another order.
    torch.testing.assert_close(logits(tmp_path / "meta"), expected, atol=2e-5, rtol=1e-4)


def _local_rows_of_rank(world: distributed.World, folder: str) -> dict[str, torch.Tensor]:
    from kubetune_trainer.parallel import build

    from .conftest import run_config

    model = build(run_config(Path(folder), method="Full"), WeightReader(folder), world)
    return {name: parameter.full_tensor().clone() for name, parameter in model.named_parameters()}


def test_ranks_read_their_rows_of_metas_files(
    spawn: Callable[..., list[Any]], tmp_path: Path, llama_folder: NextFolder
) -> None:
    folder = llama_folder(**EVEN)
    write_meta(folder, tmp_path / "meta", shards=2)
    stored = load_file(folder / "model.safetensors")
    for whole in spawn(2, _local_rows_of_rank, str(tmp_path / "meta")):
        assert whole.keys() == stored.keys()
        assert all(torch.equal(whole[name], stored[name]) for name in stored)


def test_safetensors_are_preferred_and_metas_files_are_not_opened(tmp_path: Path, llama_folder: NextFolder) -> None:
    folder = llama_folder()
    (folder / "original").mkdir()
    (folder / "original" / "consolidated.00.pth").write_bytes(b"damaged")
    assert check_model(folder).files() == [
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "model.safetensors",
    ]


def test_staging_checks_metas_folders_without_torch(tmp_path: Path, llama_folder: NextFolder) -> None:
    write_meta(llama_folder(**EVEN), tmp_path / "meta" / "original", shards=2)
    staged = stage(StageSource(path="meta"), tmp_path)
    files = [file for file in (tmp_path / "meta").rglob("*") if file.is_file() and file.name[0] != "."]
    assert staged.parameters == 44784
    assert staged.bytes == sum(file.stat().st_size for file in files)
    manifest = StagingManifest.model_validate_json((tmp_path / "meta" / ".complete").read_bytes())
    assert [file.path for file in manifest.files] == [
        "original/params.json",
        "original/tokenizer.model",
        "original/consolidated.00.pth",
        "original/consolidated.01.pth",
    ]


# --- refusals ---------------------------------------------------------------------------------------------------------


class Hostile:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("echo hostile > hostile",)


def _rewrite(folder: Path, change: Callable[[dict[str, Any]], object], rank: int = 0) -> None:
    file = folder / f"consolidated.{rank:02}.pth"
    state = torch.load(file, weights_only=True)
    change(state)
    torch.save(state, file)


def _params(folder: Path, **changes: Any) -> None:
    file = folder / "params.json"
    file.write_text(json.dumps(json.loads(file.read_bytes()) | changes))


def _without_numbers(folder: Path) -> None:
    file = folder / "consolidated.00.pth"
    with zipfile.ZipFile(file) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w") as archive:
        for name, part in content.items():
            archive.writestr(name, part[:100] if "/data/" in name else part)


def _as_lfs_pointer(folder: Path) -> None:
    (folder / "consolidated.00.pth").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n")


def _plain_pickle(folder: Path) -> None:
    (folder / "consolidated.00.pth").write_bytes(pickle.dumps({"a": 1}))


def _sentencepiece(folder: Path) -> None:
    (folder / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02")


WQ = "layers.0.attention.wq.weight"
Q = "model.layers.0.self_attn.q_proj.weight"
FIRST = "{folder}/consolidated.00.pth"
ORIGINAL = "give Meta's original file"
WRONG: dict[str, tuple[Callable[[Path], object], str]] = {
    "code in the pickle": (
        lambda folder: _rewrite(folder, lambda state: state.update(x=Hostile())),
        FIRST + " is not a plain file of weights: it wants to call posix.system, which could run anything; " + ORIGINAL,
    ),
    "a whole module in the pickle": (
        lambda folder: torch.save(torch.nn.Linear(1, 1), folder / "consolidated.00.pth"),
        FIRST + " is not a plain file of weights: it wants to call torch.nn.modules.linear.Linear, which could run "
        "anything; " + ORIGINAL,
    ),
    "a list": (
        lambda folder: torch.save([torch.ones(1)], folder / "consolidated.00.pth"),
        FIRST + " holds a list, not named tensors; " + ORIGINAL,
    ),
    "a pickle without an archive": (
        _plain_pickle,
        FIRST + " is truncated or no checkpoint of torch.save(): File is not a zip file; copy or download it again",
    ),
    "a truncated file": (
        lambda folder: os.truncate(folder / "consolidated.00.pth", 9000),
        FIRST + " is truncated or no checkpoint of torch.save(): File is not a zip file; copy or download it again",
    ),
    "a Git LFS pointer": (
        _as_lfs_pointer,
        FIRST + " is a Git LFS pointer, not the weights: run `git lfs pull` and copy it again",
    ),
    "numbers are missing": (
        _without_numbers,
        FIRST + " is damaged: the numbers of output.weight are not whole; copy or download it again",
    ),
    "the first file is missing": (
        lambda folder: (folder / "consolidated.00.pth").unlink(),
        FIRST + " is missing, but consolidated.01.pth is there; copy or download it again",
    ),
    "the last file is missing": (
        lambda folder: (folder / "consolidated.01.pth").unlink(),
        "consolidated.00.pth: model.embed_tokens.weight has the shape [48, 48], but params.json calls for [96, 48]; "
        "weights and params.json are of different models, or consolidated files are missing",
    ),
    "files of different models": (
        lambda folder: _rewrite(folder, lambda state: state.pop(WQ), rank=1),
        "{folder}/consolidated.01.pth has other tensors than consolidated.00.pth: they are not parts of one model",
    ),
    "parts that do not go together": (
        lambda folder: _rewrite(folder, lambda state: state.update({WQ: state[WQ][:, :7].clone()}), rank=1),
        f"{WQ} has parts of different forms in consolidated.00.pth and the files beside it",
    ),
    "columns before rows": (
        lambda folder: _rewrite(folder, lambda state: state.update({WQ: state[WQ].t()})),
        FIRST + f": {WQ} is not stored row after row; " + ORIGINAL,
    ),
    "numbers of another kind": (
        lambda folder: [
            _rewrite(folder, lambda state: state.update({WQ: state[WQ].to(torch.int8)}), rank) for rank in (0, 1)
        ],
        f"consolidated.00.pth: {Q} is stored as CharStorage; supported are F32, BF16, F16: give the original, "
        "unquantized model",
    ),
    "a missing tensor": (
        lambda folder: [_rewrite(folder, lambda state: state.pop(WQ), rank) for rank in (0, 1)],
        f"the weights lack {Q}, which params.json calls for; copy or download them again",
    ),
    "a tensor that no Llama has": (
        lambda folder: [
            _rewrite(folder, lambda s: s.update({"vision.weight": torch.ones(1)}), rank) for rank in (0, 1)
        ],
        "the weights hold vision.weight, which a Llama model does not have",
    ),
    "no params.json": (
        lambda folder: (folder / "params.json").unlink(),
        "{folder} has no params.json; found: consolidated.00.pth, consolidated.01.pth, tokenizer.model; give a folder "
        "in Hugging Face layout: config.json, tokenizer.json and safetensors files; or in Meta's: params.json, "
        "tokenizer.model and consolidated.*.pth",
    ),
    "a field is missing": (
        lambda folder: _params(folder, dim=None),
        "params.json: dim must be a whole number above 0, but it is None",
    ),
    "a quantized model": (
        lambda folder: _params(folder, quantization_args={"group_size": 32}),
        "params.json has quantization_args: only the original text models of Llama can be trained",
    ),
    "no tokenizer": (
        lambda folder: (folder / "tokenizer.model").unlink(),
        "{folder} has no tokenizer.json; found: consolidated.00.pth, consolidated.01.pth, params.json; give a folder "
        "in Hugging Face layout: config.json, tokenizer.json and safetensors files; or in Meta's: params.json, "
        "tokenizer.model and consolidated.*.pth",
    ),
    "a tokenizer of Llama 2": (
        _sentencepiece,
        "{folder}/tokenizer.model is no tiktoken file (line 1); SentencePiece files, as Llama 2 has them, are not "
        "read: add the model's tokenizer.json",
    ),
}


@pytest.mark.parametrize(("damage", "message"), WRONG.values(), ids=WRONG.keys())
def test_damaged_and_unsafe_files_are_refused(
    damage: Callable[[Path], object],
    message: str,
    tmp_path: Path,
    llama_folder: NextFolder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = write_meta(llama_folder(**EVEN), tmp_path / "meta", shards=2)
    damage(folder)
    with pytest.raises(ModelError) as caught:
        check_model(folder)
    assert str(caught.value) == message.format(folder=folder)
    assert not (tmp_path / "hostile").exists()


REAL = {
    "Llama 3 8B": ((4096, 32, 32, 8, 128256, 1024, 1.3), 14336, 8_030_261_248),
    "Llama 3 70B": ((8192, 80, 64, 8, 128256, 4096, 1.3), 28672, 70_553_706_496),
    "Llama 3.1 405B": ((16384, 126, 128, 8, 128256, 4096, 1.2), 53248, 405_853_388_800),
    "Llama 3.2 1B": ((2048, 16, 32, 8, 128256, 256, 1.5), 8192, 1_498_482_688),
    "Llama 3.2 3B": ((3072, 28, 24, 8, 128256, 256, 1.0), 8192, 3_606_752_256),
    "Llama 2 7B": ((4096, 32, 32, None, 32000, 256, None), 11008, 6_738_415_616),
}


@pytest.mark.parametrize(("sizes", "inner", "parameters"), REAL.values(), ids=REAL.keys())
def test_published_params_give_the_published_sizes(sizes: tuple[Any, ...], inner: int, parameters: int) -> None:
    """Counted with a head of its own; of 3.2 the head is the embedding, 262,668,288 and 394,002,432 fewer."""
    from kubetune_contract.architecture import LlamaConfig
    from kubetune_trainer.meta_files import hugging_face_config
    from kubetune_trainer.stored import StoredTensor

    names = ("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of", "ffn_dim_multiplier")
    head = StoredTensor(Path("x"), "BF16", (sizes[4], sizes[0]), 0)
    params = dict(zip(names, sizes, strict=True))
    config = hugging_face_config(params, {"output.weight": [head], "tok_embeddings.weight": [head]})
    assert config["intermediate_size"] == inner
    assert LlamaConfig.from_hf(config).parameters == parameters
