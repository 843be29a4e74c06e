"""Packed weights are bitsandbytes' NF4, bit for bit, on any number of processes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from kubetune_contract.architecture import ModelError
from kubetune_contract.config import QuantizationConfig, RunConfig
from kubetune_trainer.distributed import World, full_tensor, local_rows
from kubetune_trainer.hub import WeightReader
from kubetune_trainer.model import Llama
from kubetune_trainer.parallel import build
from kubetune_trainer.peft import lora_layers
from kubetune_trainer.quant import NF4Linear, own_rows, packed, quantize

Configure = Callable[..., RunConfig]
Spawn = Callable[..., list[Any]]

WIDE = {"hidden_size": 128, "intermediate_size": 320, "num_attention_heads": 4, "num_key_value_heads": 2}
"""Rows of whole blocks; 5 processes do not divide 64, 128 or 320 rows evenly, and blocks of 256 scales cross rows."""
LAYERS = 2 * 7
DOUBLE = pytest.mark.parametrize("double", [True, False], ids=["double quantization", "single"])


def theirs(weight: Tensor, double: bool) -> dict[str, Tensor]:
    """What bitsandbytes' Linear4bit stores for a weight."""
    import bitsandbytes as bnb

    layer = bnb.nn.Linear4bit(
        weight.shape[1], weight.shape[0], bias=False, compress_statistics=double, quant_type="nf4"
    )
    layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, compress_statistics=double, quant_type="nf4")
    stored = layer.to("cpu").weight
    state = stored.quant_state
    dense = bnb.functional.dequantize_4bit(stored.data, state)
    parts = {"weight": stored.data.view(-1), "absmax": state.absmax.view(-1), "dense": dense}
    if double:
        parts |= {"nabsmax": state.state2.absmax, "offset": state.offset.view(1), "code": state.state2.code}
    return parts


def ours(world: World, config: RunConfig) -> dict[str, dict[str, Any]]:
    """Every packed layer: the whole of it on rank 0, this rank's dense rows, and where they begin."""
    model = build(config, WeightReader(config.model.path), world)
    found = {}
    for path, layer in model.named_modules():
        stored = packed(layer)
        if stored is not None:
            whole = {name: full_tensor(part, world) for name, part in stored._asdict().items() if part is not None}
            start = local_rows(layer.weight)[1]
            found[path] = whole | {
                "rows": own_rows(layer),
                "start": start,
                "sharded": isinstance(layer.weight, DTensor),
            }
    return found


def assert_bytes_of_bitsandbytes(layers: dict[str, dict[str, Any]], config: RunConfig, dtype: torch.dtype) -> None:
    assert config.quantized is not None
    assert len(layers) == LAYERS
    reader = WeightReader(config.model.path)
    for path, layer in layers.items():
        expected = theirs(reader.full(f"{path}.weight").to(dtype), config.quantized.double)
        dense = expected.pop("dense")
        for name, part in expected.items():
            same = layer[name].view(-1).view(part.dtype)
            assert torch.equal(same, part), f"{path} {name}"
        rows = layer["rows"]
        assert torch.equal(rows, dense[layer["start"] : layer["start"] + len(rows)]), path


@DOUBLE
@pytest.mark.parametrize("precision", ["FP32", "BF16"])
def test_bytes_and_scales_are_those_of_bitsandbytes(
    double: bool, precision: str, llama_folder: Callable[..., Path], run_config: Configure, alone: World
) -> None:
    folder = llama_folder(**WIDE)
    config = run_config(folder, method="QLoRA", quantization={"double": double}, training={"precision": precision})
    dtype = torch.float32 if precision == "FP32" else torch.bfloat16
    assert_bytes_of_bitsandbytes(ours(alone, config), config, dtype)


@pytest.mark.parametrize(("size", "double"), [(5, True), (2, False)], ids=["5 ranks, double", "2 ranks, single"])
def test_ranks_that_pack_their_own_rows_store_the_same_bits(
    size: int, double: bool, llama_folder: Callable[..., Path], run_config: Configure, spawn: Spawn
) -> None:
    """The mean of all scales, which double quantization needs, is that of all ranks' rows."""
    config = run_config(llama_folder(**WIDE), method="QDoRA", quantization={"double": double})
    ranks = spawn(size, ours, config)
    assert_bytes_of_bitsandbytes(ranks[0], config, torch.float32)
    reader = WeightReader(config.model.path)
    for path, layer in ranks[0].items():
        assert layer["sharded"]
        rows = [rank[path]["rows"] for rank in ranks]
        assert [rank[path]["start"] for rank in ranks] == [sum(map(len, rows[:rank])) for rank in range(size)]
        assert torch.equal(torch.cat(rows), theirs(reader.full(f"{path}.weight"), double)["dense"])


def test_a_product_keeps_packed_tensors_only(alone: World, llama_folder: Callable[..., Path]) -> None:
    """Plain autograd would keep the dense weight of every layer until the backward pass."""
    layer = packed_layer()
    x = torch.randn(3, 5, 128, requires_grad=True)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        output = layer(x)
    assert all(one is None or any(one is part for part in packed(layer)) for one in kept)
    stored = packed(layer)
    assert stored is not None
    dense = stored.dense(torch.float32)
    torch.testing.assert_close(output, x @ dense.t())
    output.square().sum().backward()
    torch.testing.assert_close(x.grad, 2 * output.detach() @ dense)


def packed_layer() -> NF4Linear:
    """A layer of 192 x 128 random bytes with plausible scales."""
    layer = NF4Linear(128, 192, double=True, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    for part in (layer.weight, layer.absmax):
        part.copy_(torch.randint(256, part.shape, generator=generator))
    for name, numbers in (("nabsmax", torch.ones(2)), ("offset", torch.ones(1)), ("code", torch.linspace(-1, 1, 256))):
        getattr(layer, name).copy_(numbers)
    return layer


@pytest.mark.parametrize("spoil", [nn.Module.bfloat16, nn.Module.half, nn.Module.double])
def test_a_converted_layer_is_noticed(spoil: Callable[[nn.Module], nn.Module]) -> None:
    """bitsandbytes' kernels do not look at number formats: they would return garbage."""
    with pytest.raises(AssertionError, match="packed, then converted to"):
        spoil(packed_layer())(torch.randn(1, 128))


def test_embedding_norms_and_head_stay_as_they_are(llama_folder: Callable[..., Path]) -> None:
    config = WeightReader(llama_folder(**WIDE)).config()
    with torch.device("meta"):
        model = Llama(config)
    quantize(model, QuantizationConfig())
    dense = {name for name, parameter in model.named_parameters() if parameter.is_floating_point()}
    norms = {name for name in dense if name.endswith("norm.weight")}
    assert dense - norms == {"model.embed_tokens.weight", "lm_head.weight"}
    assert len(norms) == 5
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert not any(parameter.requires_grad for parameter in model.parameters() if parameter.dtype == torch.uint8)


@pytest.mark.parametrize(("double", "bits"), [(True, 4.127), (False, 4.5)])
def test_bits_for_each_weight(double: bool, bits: float) -> None:
    with torch.device("meta"):
        layer = NF4Linear(4096, 14336, double=double, dtype=torch.bfloat16)
    size = sum(one.numel() * one.element_size() for one in [*layer.parameters(), *layer.buffers()])
    assert 8 * size / (4096 * 14336) == pytest.approx(bits, abs=0.001)


def test_rows_that_are_no_whole_blocks_are_refused(tiny: Path, run_config: Configure, alone: World) -> None:
    with pytest.raises(ModelError) as caught:
        build(run_config(tiny, method="QLoRA"), WeightReader(tiny), alone)
    assert str(caught.value) == (
        "model.layers.0.self_attn.q_proj has rows of 48 weights, but NF4 needs a multiple of 64: "
        "set method to LoRA or DoRA, which leave the weights as they are"
    )


def test_a_layer_without_adapter_is_packed_too(
    llama_folder: Callable[..., Path], run_config: Configure, alone: World
) -> None:
    config = run_config(llama_folder(**WIDE), method="QLoRA", adapter={"rank": 2, "target_modules": ["q_proj"]})
    model = build(config, WeightReader(config.model.path), alone)
    assert sum(packed(layer) is not None for layer in model.modules()) == LAYERS
    assert len(list(lora_layers(model))) == 2
    ids = torch.arange(12)[None]
    model(ids, ids).backward()
    assert all(layer.lora_B.weight.grad.abs().sum() > 0 for _, layer in lora_layers(model))
