"""What we write is what peft and transformers read; sharding changes no bit of it."""

import json
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.trainer.conftest import ALL_LINEAR
from torch import Tensor

from kubetune_contract.architecture import ModelError
from kubetune_contract.config import RunConfig
from kubetune_trainer import shards
from kubetune_trainer.distributed import World, local_rows
from kubetune_trainer.export import export_adapter, export_model
from kubetune_trainer.hub import WeightReader, check_model
from kubetune_trainer.model import Llama
from kubetune_trainer.parallel import build
from kubetune_trainer.peft import trainable
from kubetune_trainer.shards import ShardWriter, Spec, plan_shards

Configure = Callable[..., RunConfig]
Spawn = Callable[..., list[Any]]

EXACT = {"rtol": 0, "atol": 1e-4}
"""The project's bar for fp32 logits (values up to 36). Merging rounds W + BA once more, which moves SmolLM2's logits by
some 7e-5; peft's own merge moves them by the same."""


def trained(world: World, config: RunConfig, distance: float = 0.02) -> Llama:
    """A model as if it had been trained: every trainable weight is moved, by the same at every world size."""
    model = build(config, WeightReader(config.model.path), world)
    generator = torch.Generator().manual_seed(11)
    for parameter in trainable(model).values():
        change = distance * torch.randn(parameter.shape, generator=generator)
        local, start = local_rows(parameter)
        local += change[start : start + len(local)]
    return model.eval()


def their_logits(folder: Path, ids: Tensor, adapter: Path | None = None, *, packed: bool = False) -> Tensor:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    options: dict[str, Any] = {}
    if packed:
        four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
        options = {"quantization_config": four_bits, "device_map": "cpu"}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    # Not in eval(): bitsandbytes then multiplies in bf16 on some CPUs. There is no dropout in these models.
    with torch.no_grad():
        logits: Tensor = model.train(packed)(ids).logits
    return logits


def check_three_ways(model: Llama, config: RunConfig, world: World, folder: Path) -> float:
    """Own model, peft on the base, merged export in transformers: all the same. Returns the largest difference."""
    base = Path(config.model.path)
    export_adapter(model, config, folder / "adapter", world)
    export_model(model, base, folder / "merged", world)
    ids = torch.randint(model.config.vocab_size, (2, 40), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        ours = model(ids)
    packed = config.quantized is not None
    peft = their_logits(base, ids, folder / "adapter", packed=packed)
    merged = their_logits(folder / "merged", ids)
    assert (ours - their_logits(base, ids, packed=packed)).abs().max() > 0.1  # the adapter does something
    for other in (peft, merged):
        torch.testing.assert_close(other, ours, **EXACT)
    torch.testing.assert_close(merged, peft, **EXACT)
    return max((one - other).abs().max().item() for one, other in ((ours, peft), (ours, merged), (peft, merged)))


def test_adapter_and_merged_model_of_smollm2_in_peft_and_transformers(
    smollm2: Path, run_config: Configure, alone: World, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    config = run_config(smollm2)
    difference = check_three_ways(trained(alone, config, 0.002), config, alone, tmp_path)
    record_property("largest difference of logits", difference)
    print(f"largest difference of logits: {difference:.2e}")


KINDS: dict[str, dict[str, Any]] = {
    "tied head": {"tie_word_embeddings": True},
    "three files": {"shards": 3},
    "bf16 base": {"dtype": torch.bfloat16, "torch_dtype": "bfloat16"},
}


@pytest.mark.parametrize("changes", KINDS.values(), ids=KINDS.keys())
def test_adapter_and_merged_model_of_other_kinds(
    changes: dict[str, Any], llama_folder: Callable[..., Path], run_config: Configure, alone: World, tmp_path: Path
) -> None:
    config = run_config(llama_folder(**changes))
    check_three_ways(trained(alone, config), config, alone, tmp_path)


WIDE = {"hidden_size": 128, "intermediate_size": 320, "num_attention_heads": 4, "num_key_value_heads": 2}
EVERYWHERE = {"rank": 3, "alpha": 5, "target_modules": [*ALL_LINEAR, "embed_tokens", "lm_head"]}
METHODS: dict[str, dict[str, Any]] = {
    "LoRA, embedding and head too": {"method": "LoRA", "adapter": EVERYWHERE},
    "DoRA": {"method": "DoRA"},
    "QLoRA": {"method": "QLoRA"},
    "QLoRA, embedding and head too": {"method": "QLoRA", "adapter": EVERYWHERE},
    "QDoRA": {"method": "QDoRA"},
}


@pytest.mark.parametrize("changes", METHODS.values(), ids=METHODS.keys())
def test_adapter_and_merged_model_of_each_method(
    changes: dict[str, Any], llama_folder: Callable[..., Path], run_config: Configure, alone: World, tmp_path: Path
) -> None:
    """Of a base in 4 bits peft has bitsandbytes' layers, and the merged model has unpacked weights."""
    config = run_config(llama_folder(**WIDE), **changes)
    check_three_ways(trained(alone, config), config, alone, tmp_path)


@pytest.mark.parametrize("method", ["LoRA, embedding and head too", "DoRA"])
def test_the_merged_weights_are_bit_for_bit_those_that_peft_merges(
    method: str, tiny: Path, run_config: Configure, alone: World, tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    config = run_config(tiny, **METHODS[method])
    model = trained(alone, config)
    export_adapter(model, config, tmp_path / "adapter", alone)
    export_model(model, tiny, tmp_path / "merged", alone)
    base = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    theirs = PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload().state_dict()
    ours = load_file(tmp_path / "merged" / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_the_model_of_full_fine_tuning_in_transformers(
    tiny: Path, run_config: Configure, alone: World, tmp_path: Path
) -> None:
    model = trained(alone, run_config(tiny, method="Full"))
    export_model(model, tiny, tmp_path / "model", alone)
    ids = torch.arange(60).reshape(2, 30)
    with torch.no_grad():
        torch.testing.assert_close(their_logits(tmp_path / "model", ids), model(ids), **EXACT)


def test_the_adapters_config_says_what_peft_needs(
    tiny: Path, run_config: Configure, alone: World, tmp_path: Path
) -> None:
    from peft import PeftConfig

    config = run_config(
        tiny, adapter={"rank": 3, "alpha": 7.5, "dropout": 0.1, "target_modules": ["q_proj", "up_proj"]}
    )
    export_adapter(trained(alone, config), config, tmp_path / "adapter", alone)
    read: Any = PeftConfig.from_pretrained(str(tmp_path / "adapter"))
    assert (read.peft_type, read.task_type, read.base_model_name_or_path) == ("LORA", "CAUSAL_LM", str(tiny))
    assert (read.r, read.lora_alpha, read.lora_dropout, read.target_modules) == (3, 7.5, 0.1, {"q_proj", "up_proj"})
    assert (read.bias, read.use_dora, read.use_rslora) == ("none", False, False)


@pytest.mark.parametrize("method", ["DoRA", "LoRA, embedding and head too"])
def test_names_and_shapes_are_those_that_peft_writes(
    method: str, tiny: Path, run_config: Configure, alone: World, tmp_path: Path
) -> None:
    from peft import PeftModel, get_peft_model_state_dict
    from transformers import AutoModelForCausalLM

    config = run_config(tiny, **METHODS[method])
    export_adapter(trained(alone, config), config, tmp_path / "adapter", alone)
    ours = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    base = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    read = PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert read.peft_config["default"].use_dora == config.has_magnitude
    theirs = get_peft_model_state_dict(read, save_embedding_layers=False)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_an_exported_model_is_whole_and_brings_its_tokenizer(
    smollm2: Path, tiny: Path, run_config: Configure, alone: World, tmp_path: Path
) -> None:
    (tiny / "chat_template.jinja").write_text("template")
    (tiny / "notes.txt").write_text("stays behind")
    export_model(trained(alone, run_config(tiny)), tiny, tmp_path / "merged", alone)
    files = {file.name for file in (tmp_path / "merged").iterdir()}
    assert files == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    }
    assert check_model(tmp_path / "merged").names() == WeightReader(tiny).names()


PRECISIONS = {
    "fp32 of a bf16 base, transformers 4": ("FP32", "torch_dtype", "float32", torch.float32),
    "bf16, transformers 4": ("BF16", "torch_dtype", "bfloat16", torch.bfloat16),
    "fp32 of a bf16 base, transformers 5": ("FP32", "dtype", "float32", torch.float32),
}


@pytest.mark.parametrize(("precision", "key", "name", "dtype"), PRECISIONS.values(), ids=PRECISIONS.keys())
def test_weights_are_stored_in_the_runs_precision(
    precision: str,
    key: str,
    name: str,
    dtype: torch.dtype,
    llama_folder: Callable[..., Path],
    run_config: Configure,
    alone: World,
    tmp_path: Path,
) -> None:
    base = llama_folder(dtype=torch.bfloat16)
    values = json.loads((base / "config.json").read_bytes())
    del values["torch_dtype"]
    (base / "config.json").write_text(json.dumps(values | {key: "bfloat16"}))
    config = run_config(base, training={"precision": precision})
    model = trained(alone, config)
    export_model(model, base, tmp_path / "merged", alone)
    export_adapter(model, config, tmp_path / "adapter", alone)
    assert {t.dtype for t in load_file(tmp_path / "merged" / "model.safetensors").values()} == {dtype}
    assert json.loads((tmp_path / "merged" / "config.json").read_bytes()) == values | {key: name}
    assert {t.dtype for t in load_file(tmp_path / "adapter" / "adapter_model.safetensors").values()} == {torch.float32}


# --- many ranks -------------------------------------------------------------------------------------------------------


def export_all(world: World, config: RunConfig, folder: Path, limit: int) -> None:
    shards.MAX_SHARD = limit
    model = trained(world, config)
    base = Path(config.model.path)
    if config.lora is not None:
        export_adapter(model, config, folder / "adapter", world)
    export_model(model, base, folder / "model", world)
    assert (folder / "model").is_dir()  # on every rank: none returns before the folder is there


@pytest.mark.parametrize("method", ["LoRA", "QDoRA", "Full"])
def test_two_ranks_write_the_bytes_of_one(
    method: str, llama_folder: Callable[..., Path], run_config: Configure, spawn: Spawn, alone: World, tmp_path: Path
) -> None:
    config = run_config(llama_folder(**WIDE), method=method)
    export_all(alone, config, tmp_path / "one", shards.MAX_SHARD)
    spawn(2, export_all, config, tmp_path / "two", shards.MAX_SHARD)
    files = [file.relative_to(tmp_path / "one") for file in (tmp_path / "one").rglob("*.*")]
    assert any(file.suffix == ".safetensors" for file in files)
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes(), file


def test_a_large_model_comes_in_several_files(
    tiny: Path, run_config: Configure, alone: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "MAX_SHARD", 50_000)
    model = trained(alone, run_config(tiny, method="Full"))
    export_model(model, tiny, tmp_path / "model", alone)
    index = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_bytes())
    sizes = {file: (tmp_path / "model" / file).stat().st_size for file in set(index["weight_map"].values())}
    assert len(sizes) > 2
    assert max(sizes.values()) < 50_000 + 4096  # and a header
    assert index["metadata"]["total_size"] == 4 * WeightReader(tiny).config().parameters
    ids = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(their_logits(tmp_path / "model", ids), model(ids), **EXACT)


SHARDS: dict[str, tuple[int, dict[str, list[str]]]] = {
    "all in one file": (1000, {"model.safetensors": ["a", "b", "c"]}),
    "just full": (
        80,
        {"model-00001-of-00002.safetensors": ["a", "b"], "model-00002-of-00002.safetensors": ["c"]},
    ),
    "one weight is larger than a file may be": (
        40,
        {
            "model-00001-of-00003.safetensors": ["a"],
            "model-00002-of-00003.safetensors": ["b"],
            "model-00003-of-00003.safetensors": ["c"],
        },
    ),
}


@pytest.mark.parametrize(("limit", "expected"), SHARDS.values(), ids=SHARDS.keys())
def test_weights_are_packed_into_files_in_order(limit: int, expected: dict[str, list[str]]) -> None:
    shapes = {"a": (2, 5), "b": (10,), "c": (4, 4)}
    assert plan_shards([{name: Spec(torch.float32, shape)} for name, shape in shapes.items()], limit) == expected


def test_tensors_of_every_kind_are_written_in_any_order(tmp_path: Path) -> None:
    """As safetensors reads them: each at a multiple of its width, and those that belong together in one file."""
    tensors = {
        "a": torch.arange(5, dtype=torch.uint8),
        "a.scale": torch.tensor(1.5),
        "b": torch.randn(3, 4, dtype=torch.bfloat16),
        "c": torch.randn(2, 3).t(),
        "d": torch.empty(0, 4, dtype=torch.int8),
    }
    groups = [["a", "a.scale"], ["b"], ["c"], ["d"]]
    specs = [{n: Spec(tensors[n].dtype, tuple(tensors[n].shape)) for n in names} for names in groups]
    writer = ShardWriter(tmp_path, specs, limit=30)
    for name in reversed(tensors):
        writer.add(name, tensors[name])
    writer.finish()
    files = sorted(tmp_path.glob("*.safetensors"))
    assert [set(load_file(file)) for file in files] == [{"a", "a.scale"}, {"b"}, {"c", "d"}]
    for file in files:
        for name, tensor in load_file(file).items():
            assert torch.equal(tensor, tensors[name]), name


# --- complete or absent -----------------------------------------------------------------------------------------------


def test_others_may_read_every_file(tiny: Path, run_config: Configure, alone: World, tmp_path: Path) -> None:
    """The pods that serve the model run as another user; safetensors itself writes 0600."""
    config = run_config(tiny)
    model = trained(alone, config)
    export_adapter(model, config, tmp_path / "adapter", alone)
    export_model(model, tiny, tmp_path / "merged", alone)
    modes = {stat.S_IMODE(file.stat().st_mode) for file in tmp_path.glob("*d*/*.*") if file.parent != tiny}
    assert modes == {0o644}


def test_a_failed_export_leaves_no_folder_of_that_name(
    tiny: Path, run_config: Configure, alone: World, tmp_path: Path
) -> None:
    model = trained(alone, run_config(tiny))
    with pytest.raises(ModelError, match="gone"):
        export_model(model, tmp_path / "gone", tmp_path / "merged", alone)
    assert not (tmp_path / "merged").exists()
    export_model(model, tiny, tmp_path / "merged", alone)
    check_model(tmp_path / "merged")
    assert not list(tmp_path.glob(".*partial"))


def test_a_second_export_replaces_the_first(tiny: Path, run_config: Configure, alone: World, tmp_path: Path) -> None:
    config = run_config(tiny)
    export_adapter(trained(alone, config), config, tmp_path / "adapter", alone)
    (tmp_path / "adapter" / "old.txt").touch()
    fresh = build(config, WeightReader(tiny), alone)
    export_adapter(fresh, config, tmp_path / "adapter", alone)
    written = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert all(torch.equal(written[f"base_model.model.{name}"], p) for name, p in trainable(fresh).items())
    assert not (tmp_path / "adapter" / "old.txt").exists()


def test_a_folder_that_cannot_be_written_is_told_as_oserror(
    tiny: Path, run_config: Configure, alone: World, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    config = run_config(tiny)
    with pytest.raises(OSError, match="file"):
        export_adapter(trained(alone, config), config, tmp_path / "file" / "adapter", alone)
