"""What `quantize` writes is what transformers with bitsandbytes loads: the logits of quantizing while loading."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kubetune_contract.errors import ConfigError
from kubetune_trainer import shards
from kubetune_trainer.convert import quantize
from kubetune_trainer.task_config import QuantizeConfig

Write = Callable[..., Path]

FORMATS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "NF4, scales in 8 bits": (
        {"format": "NF4"},
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    ),
    "NF4, scales in fp32": (
        {"format": "NF4", "double": False},
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    ),
    "INT8": ({"format": "INT8"}, {"load_in_8bit": True}),
}
BASES: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16 and a tied head": {"dtype": torch.bfloat16, "torch_dtype": "bfloat16", "tie_word_embeddings": True},
}
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 8}
IDS = torch.arange(3, 43)[None]


def write(base: Path, folder: Path, **options: Any) -> Path:
    quantize(QuantizeConfig(model={"path": str(base)}, output_dir=str(folder), **options))
    return folder


def load(folder: Path, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, device_map="cpu", **options).eval()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(IDS).logits
    return result


@pytest.mark.parametrize("base", BASES.values(), ids=BASES.keys())
@pytest.mark.parametrize(("options", "settings"), FORMATS.values(), ids=FORMATS.keys())
@pytest.mark.filterwarnings("ignore:MatMul8bitLt. inputs will be cast:UserWarning")
def test_transformers_loads_what_it_would_have_made_itself(
    base: dict[str, Any], options: dict[str, Any], settings: dict[str, Any], llama_folder: Write, tmp_path: Path
) -> None:
    from transformers import BitsAndBytesConfig

    source = llama_folder(**SIZES, **base)
    dtype = base.get("dtype", torch.float32)
    compute = {"bnb_4bit_compute_dtype": dtype} if "load_in_4bit" in settings else {}
    theirs = load(source, dtype=dtype, quantization_config=BitsAndBytesConfig(**settings, **compute))
    ours = load(write(source, tmp_path / "small", **options))
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=0, atol=0)
    expected, found = theirs.state_dict(), ours.state_dict()
    assert set(found) == set(expected)
    for name in expected:
        if "quant_state" not in name:  # a JSON text: ours is padded
            assert torch.equal(found[name], expected[name]), name


def test_a_large_model_is_written_in_several_files(
    llama_folder: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "MAX_SHARD", 20_000)
    source = llama_folder(**SIZES, shards=3)
    folder = write(source, tmp_path / "small")
    files = json.loads((folder / "model.safetensors.index.json").read_bytes())["weight_map"]
    assert len(set(files.values())) > 2
    for name, file in files.items():  # a weight's scales lie in its file
        assert file == files[name.partition(".weight")[0] + ".weight"]
    load(folder)
    assert (folder / "tokenizer.json").is_file()


def test_the_folder_is_small(llama_folder: Write, tmp_path: Path) -> None:
    source = llama_folder(**SIZES | {"intermediate_size": 4096}, dtype=torch.bfloat16)
    sizes = {
        name: (write(source, tmp_path / name, format=name) / "model.safetensors").stat().st_size
        for name in ("NF4", "INT8")
    }
    whole = (source / "model.safetensors").stat().st_size
    assert sizes["NF4"] < 0.30 * whole  # 4.13 of 16 bits, and embedding and head as they were
    assert sizes["INT8"] < 0.53 * whole


def test_rows_that_are_no_whole_blocks_are_refused_for_nf4_only(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"NF4 needs rows of a multiple of 64 weights.* set format to INT8"):
        write(tiny, tmp_path / "small")
    assert not list(tmp_path.glob("*small*"))
    write(tiny, tmp_path / "small", format="INT8")
