"""Adapters that peft has written: beside the weights, merged in memory, merged on disk; all as peft computes them."""

import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kubetune_contract.architecture import ModelError
from kubetune_contract.config import RunConfig
from kubetune_contract.errors import ConfigError
from kubetune_contract.exit_codes import JobError
from kubetune_trainer import shards
from kubetune_trainer.adapter import Adapter
from kubetune_trainer.convert import merge, quantize
from kubetune_trainer.distributed import World
from kubetune_trainer.export import export_adapter
from kubetune_trainer.hub import WeightReader
from kubetune_trainer.inference import load
from kubetune_trainer.parallel import build
from kubetune_trainer.peft import adapter_disabled, trainable
from kubetune_trainer.shards import ShardWriter
from kubetune_trainer.task_config import InferenceModel, MergeConfig, QuantizeConfig

Write = Callable[..., Path]

EXACT = {"rtol": 0, "atol": 1e-4}
"""The project's bar for fp32 logits. W + BA is rounded once more where it is merged."""

KINDS: dict[str, dict[str, Any]] = {
    "LoRA": {"target_modules": ["q_proj", "v_proj", "down_proj"]},
    "LoRA of every linear layer": {"target_modules": "all-linear", "r": 3, "lora_alpha": 5},
    "rank-stabilised": {"target_modules": ["q_proj"], "use_rslora": True},
    "the embedding and the head": {"target_modules": ["embed_tokens", "lm_head", "k_proj"]},
    "DoRA": {"target_modules": ["q_proj", "o_proj", "up_proj"], "use_dora": True},
}


@pytest.fixture
def write_adapter(tmp_path: Path) -> Write:
    """Writes an adapter of the base in `folder`, made by peft with every tensor moved from its first value."""

    def write(base: Path, **settings: Any) -> Path:
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        config = LoraConfig(**({"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM"} | settings))
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
        generator = torch.Generator().manual_seed(3)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
        model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
        return tmp_path / "adapter"

    return write


def peft_logits(base: Path, adapter: Path, ids: Tensor, *, merged: bool = False) -> Tensor:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model: Any = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter)
    model = model.merge_and_unload() if merged else model
    with torch.no_grad():
        logits: Tensor = model.eval()(ids).logits
    return logits


@pytest.mark.parametrize("settings", KINDS.values(), ids=KINDS.keys())
def test_an_adapter_of_peft_answers_as_in_peft(
    settings: dict[str, Any], tiny: Path, write_adapter: Write, tmp_path: Path
) -> None:
    adapter = write_adapter(tiny, **settings)
    ids = torch.arange(3, 43)[None]
    expected = peft_logits(tiny, adapter, ids)
    plain = load(InferenceModel(path=str(tiny), precision="FP32")).model(ids)
    assert (plain - expected).abs().max() > 0.05  # the adapter does something
    for merged in (False, True):
        options = InferenceModel(path=str(tiny), adapter_path=str(adapter), merged=merged, precision="FP32")
        torch.testing.assert_close(load(options).model(ids), expected, **EXACT)
    merge(MergeConfig(model={"path": str(tiny)}, adapter_path=str(adapter), output_dir=str(tmp_path / "merged")))
    written = load(InferenceModel(path=str(tmp_path / "merged"), precision="FP32")).model(ids)
    torch.testing.assert_close(written, peft_logits(tiny, adapter, ids, merged=True), **EXACT)


def test_what_is_merged_is_what_peft_merges_bit_for_bit_but_for_one_rounding(
    tiny: Path, write_adapter: Write, tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    adapter = write_adapter(tiny, **KINDS["DoRA"])
    merge(MergeConfig(model={"path": str(tiny)}, adapter_path=str(adapter), output_dir=str(tmp_path / "merged")))
    base = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    theirs: Any = PeftModel.from_pretrained(base, adapter).merge_and_unload()
    ours = load_file(tmp_path / "merged" / "model.safetensors")
    for name, tensor in theirs.state_dict().items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-5, atol=1e-6)  # sums of fp32 in another order


def test_a_large_merged_model_is_written_in_files_with_an_index_and_keeps_its_format(
    llama_folder: Write, write_adapter: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "MAX_SHARD", 50_000)
    base = llama_folder(dtype=torch.bfloat16, shards=2)
    adapter = write_adapter(base, **KINDS["LoRA"])
    folder = tmp_path / "new" / "merged"
    merge(MergeConfig(model={"path": str(base)}, adapter_path=str(adapter), output_dir=str(folder)))
    assert len(list(folder.glob("*.safetensors"))) > 1
    assert json.loads((folder / "config.json").read_bytes())["torch_dtype"] == "bfloat16"
    reader, original = WeightReader(folder), WeightReader(base)
    kept = [name for name in reader.names() if torch.equal(reader.full(name), original.full(name))]
    assert len(kept) == len(reader.names()) - 2 * 3  # two blocks, three layers each
    assert not list(folder.parent.glob(".*"))


@pytest.mark.parametrize("method", ["LoRA", "DoRA", "QLoRA", "QDoRA"])
def test_a_runs_adapter_answers_as_its_model_did(
    method: str, llama_folder: Write, run_config: Callable[..., RunConfig], alone: World, tmp_path: Path
) -> None:
    base = llama_folder(hidden_size=64, num_attention_heads=8, intermediate_size=128)
    config = run_config(base, method=method)
    model = build(config, WeightReader(base), alone).eval()
    generator = torch.Generator().manual_seed(3)
    for parameter in trainable(model).values():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    export_adapter(model, config, tmp_path / "adapter", alone)
    quantization = {"quantization": {}} if method.startswith("Q") else {}
    values = {"path": str(base), "adapter_path": str(tmp_path / "adapter"), "precision": "FP32"} | quantization
    ids = torch.arange(3, 43)[None]
    torch.testing.assert_close(load(InferenceModel.model_validate(values)).model(ids), model(ids), rtol=0, atol=0)
    if quantization:
        del values["adapter_path"]
        with adapter_disabled(model):
            plain = model(ids)
        torch.testing.assert_close(load(InferenceModel.model_validate(values)).model(ids), plain, rtol=0, atol=0)


def test_no_more_than_one_weight_is_in_memory(
    llama_folder: Write, write_adapter: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"hidden_size": 64, "num_attention_heads": 8, "intermediate_size": 128}
    base = llama_folder(**sizes)
    adapter = write_adapter(base, **KINDS["LoRA"])
    written: list[tuple[str, weakref.ref[Tensor]]] = []
    alive: list[set[str]] = []
    add = ShardWriter.add

    def watched(writer: ShardWriter, name: str, tensor: Tensor) -> None:
        add(writer, name, tensor)
        written.append((name, weakref.ref(tensor)))
        alive.append({name.partition("weight")[0] for name, reference in written if reference() is not None})

    monkeypatch.setattr(ShardWriter, "add", watched)
    merge(MergeConfig(model={"path": str(base)}, adapter_path=str(adapter), output_dir=str(tmp_path / "merged")))
    for form in ("NF4", "INT8"):
        quantize(QuantizeConfig(model={"path": str(base)}, output_dir=str(tmp_path / form), format=form))
    assert len(alive) > 3 * 21
    assert max(map(len, alive)) <= 2  # the one before goes when the next has its name


# --- errors -----------------------------------------------------------------------------------------------------------


def change(adapter: Path, **settings: Any) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_bytes()) | settings))


def lose_a_factor(adapter: Path) -> None:
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    del tensors[next(name for name in tensors if "lora_B" in name)]
    save_file(tensors, file)


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no weights": (lambda a: (a / "adapter_model.safetensors").unlink(), "no adapter_model.safetensors"),
    "no settings": (lambda a: (a / "adapter_config.json").unlink(), "has no adapter_config.json"),
    "damaged weights": (lambda a: (a / "adapter_model.safetensors").write_bytes(b"12345678"), "damaged"),
    "half a layer": (lose_a_factor, "only a part of the adapter of model.layers.0"),
    "another method": (lambda a: change(a, peft_type="IA3"), "peft_type is 'IA3'; LORA is supported"),
    "ranks by layer": (lambda a: change(a, rank_pattern={"q_proj": 2}), "rank_pattern is .*merge_and_unload"),
    "trained biases": (lambda a: change(a, bias="all"), "bias is 'all', which is not supported"),
    "another rank": (lambda a: change(a, r=5), r"the shape \[4, 80\], but the base model calls for \[5, 80\]"),
    "no rank": (lambda a: change(a, r=None), "r must be a number above 0"),
}


@pytest.mark.parametrize(("damage", "message"), BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_adapter_is_refused(
    damage: Callable[[Path], Any], message: str, tiny: Path, write_adapter: Write
) -> None:
    folder = write_adapter(tiny, **KINDS["LoRA"])
    damage(folder)
    with pytest.raises(ModelError, match=message):
        Adapter(folder).check(WeightReader(tiny).config())


def test_an_adapter_of_another_base_is_refused(tiny: Path, llama_folder: Write, write_adapter: Write) -> None:
    adapter = write_adapter(tiny, **KINDS["LoRA"])
    others = {"shape": llama_folder(hidden_size=96), "not have": llama_folder(num_hidden_layers=1)}
    for message, other in others.items():
        with pytest.raises(ModelError, match=f"not trained on this base model: .*{message}.* give that as model.path"):
            load(InferenceModel(path=str(other), adapter_path=str(adapter)))


def test_nothing_is_written_where_something_is_missing(tiny: Path, write_adapter: Write, tmp_path: Path) -> None:
    adapter = write_adapter(tiny, **KINDS["LoRA"])
    cases: list[tuple[dict[str, str], type[JobError], str]] = [
        ({"adapter_path": str(tmp_path / "adaptor")}, ModelError, "did you mean adapter"),
        ({"model": str(tmp_path / "gone")}, ModelError, "the folder .*gone does not exist"),
        ({"output_dir": str(tiny)}, ConfigError, "output_dir: .* exists already"),
    ]
    for changes, kind, message in cases:
        values = {"model": str(tiny), "adapter_path": str(adapter), "output_dir": str(tmp_path / "out")} | changes
        with pytest.raises(kind, match=message):
            merge(MergeConfig.model_validate(values | {"model": {"path": values["model"]}}))
        assert not (tmp_path / "out").exists()
