"""Our adapter is peft's adapter: same start, same outputs, same gradients."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kubetune_contract.config import AdapterConfig
from kubetune_contract.errors import ConfigError
from kubetune_trainer import peft
from kubetune_trainer.hub import WeightReader, load_weights
from kubetune_trainer.model import Llama
from kubetune_trainer.peft import (
    LoRALinear,
    adapter_disabled,
    add_lora,
    init_adapter,
    lora_layers,
    merge,
    peft_name,
    trainable,
)

TARGETS = {
    "all linear layers": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "torchtune's default": ["q_proj", "v_proj", "o_proj"],
    "one layer": ["down_proj"],
}

CLOSE = {"rtol": 1e-4, "atol": 1e-5}
"""fp32: the same products, added in another order; some 1e-6 relative."""


def adapted(folder: Path, adapter: AdapterConfig, seed: int = 0, *, magnitude: bool = False) -> Llama:
    reader = WeightReader(folder)
    model = Llama(reader.config())
    load_weights(model, reader)
    add_lora(model, adapter, magnitude=magnitude)
    init_adapter(model, seed)
    return model


def their_peft(folder: Path, adapter: AdapterConfig, *, magnitude: bool = False) -> Any:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    settings = LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        target_modules=list(adapter.target_modules),
        lora_dropout=adapter.dropout,
        task_type="CAUSAL_LM",
        use_dora=magnitude,
    )
    return get_peft_model(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), settings)


def copy_random_adapter(model: Llama, oracle: Any) -> dict[str, nn.Parameter]:
    """Gives both the same adapter, B not zero; returns peft's parameters under our names."""
    generator = torch.Generator().manual_seed(5)
    by_name = {
        name.removeprefix("base_model.model.").replace(".default", "").replace("vector.weight", "vector"): parameter
        for name, parameter in oracle.named_parameters()
        if parameter.requires_grad
    }
    with torch.no_grad():
        for name, parameter in trainable(model).items():
            noise = 0.1 * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(parameter + noise if name.endswith("magnitude_vector") else noise)
            by_name[name].copy_(parameter)
    return by_name


def words(*shape: int) -> Tensor:
    return torch.randint(97, shape, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("magnitude", [False, True], ids=["LoRA", "DoRA"])
@pytest.mark.parametrize("targets", TARGETS.values(), ids=TARGETS.keys())
def test_outputs_and_gradients_equal_peft(targets: list[Any], magnitude: bool, tiny: Path) -> None:
    compare(AdapterConfig(rank=4, alpha=12, target_modules=targets), magnitude, tiny)


OUTSIDE = {
    "the embedding": ["embed_tokens"],
    "the head": ["lm_head"],
    "everything": ["embed_tokens", "q_proj", "down_proj", "lm_head"],
}


@pytest.mark.parametrize("targets", OUTSIDE.values(), ids=OUTSIDE.keys())
def test_embedding_and_head_equal_peft(targets: list[Any], tiny: Path) -> None:
    compare(AdapterConfig(rank=4, alpha=12, target_modules=targets), False, tiny)


def compare(adapter: AdapterConfig, magnitude: bool, folder: Path) -> None:
    """Logits, loss and the gradients of both are those of peft."""
    model, oracle = (build(folder, adapter, magnitude=magnitude) for build in (adapted, their_peft))
    theirs = copy_random_adapter(model, oracle)
    ours = trainable(model)
    assert theirs.keys() == ours.keys()
    ids, labels = words(2, 30), words(2, 30)
    logits, expected = model(ids), oracle(ids).logits
    torch.testing.assert_close(logits, expected, **CLOSE)
    sums = model(ids, labels), F.cross_entropy(expected.flatten(0, 1), labels.flatten(), reduction="sum")
    torch.testing.assert_close(*sums, rtol=1e-5, atol=0)
    pairs = [(logits.square().mean(), expected.square().mean()), [one / labels.numel() for one in sums]]
    for one, other in pairs:
        found = torch.autograd.grad(one, list(ours.values()))
        wanted = torch.autograd.grad(other, [theirs[name] for name in ours], retain_graph=True)
        for name, mine, their in zip(ours, found, wanted, strict=True):
            torch.testing.assert_close(mine, their, msg=lambda text, name=name: f"{name}: {text}", **CLOSE)


def test_dropout_with_magnitudes_is_that_of_peft(tiny: Path) -> None:
    """The change of magnitude acts on what dropout has left. Both draw the same numbers, one layer in each block."""
    adapter = AdapterConfig(rank=4, alpha=12, dropout=0.3, target_modules=["q_proj"])
    model, oracle = adapted(tiny, adapter, magnitude=True).train(), their_peft(tiny, adapter, magnitude=True).train()
    copy_random_adapter(model, oracle)
    ids = words(1, 30)
    torch.manual_seed(1)
    found = model(ids)
    torch.manual_seed(1)
    torch.testing.assert_close(found, oracle(ids).logits, **CLOSE)


def test_nothing_but_the_adapter_is_trained(tiny: Path) -> None:
    model = adapted(tiny, AdapterConfig(rank=2))
    model(words(1, 8), words(1, 8)).backward()
    with_gradient = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert with_gradient == trainable(model).keys()
    assert all(".lora_A." in name or ".lora_B." in name for name in with_gradient)


def test_the_base_keeps_its_names(tiny: Path) -> None:
    reader = WeightReader(tiny)
    model = adapted(tiny, AdapterConfig(rank=2))
    assert {name for name, _ in model.named_parameters()} - trainable(model).keys() == set(reader.names())


@pytest.mark.parametrize("magnitude", [False, True], ids=["LoRA", "DoRA"])
def test_a_fresh_adapter_changes_nothing(magnitude: bool, tiny: Path) -> None:
    model = adapted(tiny, AdapterConfig(rank=2), magnitude=magnitude)
    with torch.no_grad():
        fresh = model(words(2, 9))
        with adapter_disabled(model):
            torch.testing.assert_close(model(words(2, 9)), fresh, rtol=0, atol=0)


def test_a_is_drawn_as_peft_draws_it(tiny: Path) -> None:
    """Uniform in +-1/sqrt(in): the same bound, and over 2,560 numbers the same deviation within 3 % (4 sigma)."""
    adapter = AdapterConfig(rank=32, target_modules=["down_proj"])
    (_, ours), *_ = lora_layers(adapted(tiny, adapter))
    theirs = next(p for name, p in their_peft(tiny, adapter).named_parameters() if "lora_A" in name)
    bound = ours.lora_A.in_features**-0.5
    for weight in (ours.lora_A.weight, theirs):
        assert 0.99 * bound < weight.abs().max().item() <= bound
        assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.03)
    assert not ours.lora_B.weight.any()


def test_a_depends_on_the_seed_and_the_layer_only(tiny: Path) -> None:
    adapter = AdapterConfig(rank=2)
    first, again, other = adapted(tiny, adapter, 1), adapted(tiny, adapter, 1), adapted(tiny, adapter, 2)
    drawn = [layer.lora_A.weight for _, layer in lora_layers(first)]
    assert all(torch.equal(a, b.lora_A.weight) for a, (_, b) in zip(drawn, lora_layers(again), strict=True))
    assert not any(torch.equal(a, b.lora_A.weight) for a, (_, b) in zip(drawn, lora_layers(other), strict=True))
    same_shape = [weight for weight in drawn if weight.shape == drawn[0].shape]
    assert len({weight.sum().item() for weight in same_shape}) == len(same_shape)
    fewer = adapted(tiny, AdapterConfig(rank=2, target_modules=["down_proj"]), 1)
    known = dict(lora_layers(first))
    assert all(torch.equal(layer.lora_A.weight, known[path].lora_A.weight) for path, layer in lora_layers(fewer))


def test_a_switched_off_adapter_leaves_the_base(tiny: Path) -> None:
    adapter = AdapterConfig(rank=2)
    model = adapted(tiny, adapter)
    base = Llama(WeightReader(tiny).config())
    load_weights(base, WeightReader(tiny))
    copy_random_adapter(model, their_peft(tiny, adapter))
    with torch.no_grad():
        expected = base(words(2, 9))
        with adapter_disabled(model):
            torch.testing.assert_close(model(words(2, 9)), expected, rtol=0, atol=0)
        assert not torch.allclose(model(words(2, 9)), expected)


def test_the_adapter_of_a_bf16_model_is_float32(tiny: Path) -> None:
    model = Llama(WeightReader(tiny).config()).to(torch.bfloat16)
    add_lora(model, AdapterConfig(rank=2))
    init_adapter(model, 0)
    model.init_buffers()
    load_weights(model, WeightReader(tiny))
    model(words(1, 8), words(1, 8)).backward()
    assert {(p.dtype, p.grad.dtype) for p in trainable(model).values()} == {(torch.float32, torch.float32)}
    assert model(words(1, 8)).dtype == torch.bfloat16


def test_dropout_acts_on_the_adapter_only_and_only_in_training(tiny: Path) -> None:
    model = adapted(tiny, AdapterConfig(rank=4, dropout=0.5))
    ids = words(1, 20)
    with torch.no_grad():
        fresh = [model.train()(ids), model.eval()(ids)]
        assert torch.equal(*fresh)  # B is zero: what A drops cannot be seen
        for _, layer in lora_layers(model):
            layer.lora_B.weight.normal_(generator=torch.Generator().manual_seed(1))
        assert torch.equal(model(ids), model(ids))
        model.train()
        torch.manual_seed(1)
        first = model(ids)
        assert not torch.equal(first, model(ids))
        torch.manual_seed(1)
        assert torch.equal(first, model(ids))


def test_merging_equals_peft() -> None:
    from peft import LoraConfig, get_peft_model

    base = nn.Sequential(nn.Linear(24, 16, bias=False))
    expected = base[0].weight.detach().clone()
    oracle = get_peft_model(base, LoraConfig(r=4, lora_alpha=6, target_modules=["0"], init_lora_weights=False))
    layer = oracle.base_model.model[0]
    a, b = layer.lora_A["default"].weight.detach().clone(), layer.lora_B["default"].weight.detach().clone()
    factors = {"lora_A.weight": a, "lora_B.weight": b}
    found = merge(expected, factors, 6 / 4)
    torch.testing.assert_close(found, oracle.merge_and_unload()[0].weight)
    assert merge(expected.bfloat16(), factors, 1.5).dtype == torch.bfloat16


def test_a_target_that_the_model_lacks_is_refused() -> None:
    model = nn.ModuleDict({"q_proj": nn.Linear(4, 4, bias=False)})
    with pytest.raises(ConfigError) as caught:
        add_lora(model, AdapterConfig(target_modules=["q_proj", "v_proj", "up_proj"]))
    assert caught.value.problems == (
        "adapter.target_modules: the model has no layer v_proj: remove it",
        "adapter.target_modules: the model has no layer up_proj: remove it",
    )


def test_an_answering_model_computes_its_norms_once(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, norms = [], peft._row_norms
    monkeypatch.setattr(peft, "_row_norms", lambda *inputs: calls.append(0) or norms(*inputs))
    model = adapted(tiny, AdapterConfig(rank=2, target_modules=["q_proj"]), magnitude=True).eval()
    calls.clear()
    with torch.no_grad():
        first = model(words(1, 5))
        assert torch.equal(model(words(1, 5)), first)
        assert len(calls) == 2  # two blocks
        for _, layer in lora_layers(model.train().eval()):
            layer.lora_magnitude_vector.mul_(2)
        assert not torch.allclose(model(words(1, 5)), first)
    model(words(1, 5)).sum().backward()
    assert all(layer.lora_magnitude_vector.grad is not None for _, layer in lora_layers(model.train()))


def test_an_embedding_that_is_the_head_too_can_have_no_adapter(llama_folder: Callable[..., Path]) -> None:
    model = Llama(WeightReader(llama_folder(tie_word_embeddings=True)).config())
    with pytest.raises(ConfigError) as caught:
        add_lora(model, AdapterConfig(target_modules=["q_proj", "lm_head", "embed_tokens"]))
    assert caught.value.problems == tuple(
        "adapter.target_modules: this model's head is its embedding (tie_word_embeddings), "
        f"so {name} can have no adapter of its own: remove {name}"
        for name in ("lm_head", "embed_tokens")
    )


def test_names_are_those_of_peft_files(tiny: Path) -> None:
    from peft import get_peft_model_state_dict

    adapter = AdapterConfig(rank=2)
    theirs = get_peft_model_state_dict(their_peft(tiny, adapter))
    assert {peft_name(name) for name in trainable(adapted(tiny, adapter))} == theirs.keys()


def test_the_frozen_product_is_not_copied(llama_folder: Callable[..., Path]) -> None:
    """The adapter's part is added in place: one product of full size, and nothing else of full size is allocated."""
    layer = LoRALinear(nn.Linear(64, 512, bias=False).requires_grad_(False), AdapterConfig(rank=2))
    x = torch.randn(100, 64, requires_grad=True)
    with torch.profiler.profile(profile_memory=True) as profile:
        layer(x)
    full_size = 100 * 512 * 4
    assert sum(event.self_cpu_memory_usage >= full_size for event in profile.events()) == 1
