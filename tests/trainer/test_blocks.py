"""What a block keeps for the backward pass and how it is run changes no gradient."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kubetune_contract.config import RunConfig
from kubetune_trainer.distributed import World
from kubetune_trainer.hub import WeightReader
from kubetune_trainer.model import Llama
from kubetune_trainer.parallel import build
from kubetune_trainer.peft import lora_layers, trainable

Configure = Callable[..., RunConfig]
LENGTHS = [5, 1, 17, 9]


def make(configure: Configure, folder: Path, world: World, method: str = "LoRA", **training: Any) -> Llama:
    changes: dict[str, Any] = {"method": method, "training": {"precision": "FP32"} | training}
    if method == "LoRA":
        changes["adapter"] = {"rank": 4, "dropout": 0.2, "target_modules": ["q_proj", "o_proj", "up_proj", "down_proj"]}
    model = build(configure(folder, **changes), WeightReader(folder), world)
    with torch.no_grad():  # B starts as zero, and with it the gradient of A
        for _, layer in lora_layers(model):
            layer.lora_B.weight += 1e-2
    return model


def losses(model: Llama, passes: int = 2) -> Tensor:
    torch.manual_seed(4)
    ids = torch.randint(3, 97, (1, sum(LENGTHS) + 1), generator=torch.Generator().manual_seed(3))
    return torch.stack([model(ids[:, :-1], ids[:, 1:], lengths=LENGTHS) for _ in range(passes)])


def gradients(model: Llama) -> dict[str, Tensor]:
    model.zero_grad()
    losses(model).sum().backward()
    return {name: param.grad for name, param in trainable(model).items() if param.grad is not None}


@contextmanager
def counted() -> Iterator[dict[str, int]]:
    """Matrix products and attentions that run inside."""
    from torch.utils._python_dispatch import TorchDispatchMode

    counts = {"mm": 0, "attention": 0}

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            counts["mm"] += func is torch.ops.aten.mm.default
            counts["attention"] += "_scaled_dot_product" in str(func) and "backward" not in str(func)
            return func(*args, **(kwargs or {}))

    with Count():
        yield counts


@pytest.mark.parametrize("method", ["LoRA", "Full"])
@pytest.mark.parametrize("kept", ["Selective", "Full"])
def test_checkpointed_blocks_give_the_same_bits(
    kept: str, method: str, tiny: Path, run_config: Configure, alone: World
) -> None:
    """Also with dropout, and where the adapter's part is added in place to a product that is kept."""
    plain = make(run_config, tiny, alone, method)
    saving = make(run_config, tiny, alone, method, activation_checkpointing=kept)
    expected, found = gradients(plain), gradients(saving)
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


def test_selective_runs_no_product_and_no_attention_twice(tiny: Path, run_config: Configure, alone: World) -> None:
    counts = {}
    for kept in ("None", "Selective", "Full"):
        model = make(run_config, tiny, alone, "Full", activation_checkpointing=kept)
        with counted() as counts[kept]:
            gradients(model)
    assert counts["Selective"] == counts["None"]
    assert counts["Full"]["mm"] > counts["None"]["mm"]
    assert counts["Full"]["attention"] == 2 * counts["None"]["attention"]


@pytest.mark.filterwarnings("ignore")  # dynamo looks into everything, also into what warns when it is looked at
@pytest.mark.parametrize("kept", ["None", "Selective"])
def test_compiled_blocks_give_the_same_gradients(
    kept: str, tiny: Path, run_config: Configure, alone: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Traced and differentiated as always, but run op by op: to make machine code takes a minute on a small machine."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    plain = make(run_config, tiny, alone)
    compiled = make(run_config, tiny, alone, compile=True, activation_checkpointing=kept)
    for model in (plain, compiled):
        for _, layer in lora_layers(model):
            layer.dropout = 0.0  # compiled code draws other random numbers
    expected, found = gradients(plain), gradients(compiled)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5, msg=name)
