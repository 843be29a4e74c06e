"""Our Llama equals transformers' Llama; its loss equals PyTorch's cross-entropy."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kubetune_contract.architecture import LlamaConfig, ModelError
from kubetune_trainer.distributed import World
from kubetune_trainer.hub import WeightReader, load_weights
from kubetune_trainer.model import IGNORE, KeyValueCache, Llama, swiglu

EXACT = {"rtol": 0, "atol": 1e-4}
"""The project's bar for fp32 logits (values up to 35): rounding alone stays far below it, a wrong formula far above."""

CLOSE = {"rtol": 1e-4, "atol": 1e-5}
"""fp32 gradients: sums over a few hundred terms in another order differ by some 1e-6 relative."""

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
"""Llama 3.1's scaling, with an original context so short that a test reaches beyond it."""


def ours(folder: Path) -> Llama:
    reader = WeightReader(folder)
    model = Llama(reader.config())
    load_weights(model, reader)
    return model


def theirs(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def words(vocabulary: int, *shape: int) -> Tensor:
    return torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(7))


# --- logits -----------------------------------------------------------------------------------------------------------

KINDS: dict[str, dict[str, Any]] = {
    "grouped heads, untied head": {},
    "tied head": {"tie_word_embeddings": True},
    "one key-value head for all": {"num_key_value_heads": 1},
    "a key-value head for each query head": {"num_key_value_heads": 6},
    "heads wider than hidden_size / heads": {"head_dim": 16},
    "Llama 3 scaled RoPE as transformers 4 writes it": {"rope_scaling": LLAMA3_ROPE, "rope_theta": 500000.0},
    "Llama 3 scaled RoPE as transformers 5 writes it": {"rope_parameters": LLAMA3_ROPE | {"rope_theta": 500000.0}},
    "another RoPE base": {"rope_theta": 100.0},
    "another epsilon": {"rms_norm_eps": 0.1},
}


@pytest.mark.parametrize("changes", KINDS.values(), ids=KINDS.keys())
def test_logits_equal_transformers(changes: dict[str, Any], llama_folder: Callable[..., Path]) -> None:
    folder = llama_folder(**changes)
    ids = words(97, 2, 150)
    with torch.no_grad():
        torch.testing.assert_close(ours(folder)(ids), theirs(folder)(ids).logits, **EXACT)


def test_logits_of_smollm2_equal_transformers_at_every_real_position(smollm2: Path) -> None:
    """A full batch, and one with right padding: the rows of different lengths that training sees."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2, padding_side="right")
    texts = ["The capital of France is Paris.", "Kubernetes runs containers on many machines, restarts them and more."]
    padded = tokenizer(texts, padding=True, return_tensors="pt")
    model, oracle = ours(smollm2), theirs(smollm2)
    full = words(49152, 2, 33)
    with torch.no_grad():
        torch.testing.assert_close(model(full), oracle(full).logits, **EXACT)
        expected = oracle(**{key: padded[key] for key in ("input_ids", "attention_mask")}).logits
        real = padded["attention_mask"].bool()
        assert not real.all()
        torch.testing.assert_close(model(padded["input_ids"])[real], expected[real], **EXACT)


def test_rotary_frequencies_survive_a_change_of_dtype(tiny: Path) -> None:
    model = ours(tiny)
    expected = model.model.inverse_frequencies.clone()
    model.to(torch.bfloat16)
    model.init_buffers()
    assert torch.equal(model.model.inverse_frequencies, expected)


def test_bf16_is_as_near_to_fp32_as_in_transformers(tiny: Path) -> None:
    """Both round at the same places; the order inside products differs, so the errors agree in size, not in bits."""
    ids = words(97, 4, 100)
    with torch.no_grad():
        exact = theirs(tiny)(ids).logits
        expected = (theirs(tiny).to(torch.bfloat16)(ids).logits - exact).norm()
        model = ours(tiny).to(torch.bfloat16)
        model.init_buffers()
        found = (model(ids) - exact).norm()
    assert found < 1.2 * expected


# --- loss -------------------------------------------------------------------------------------------------------------


def shifted(ids: Tensor, *ignored: tuple[int, slice]) -> Tensor:
    labels = torch.roll(ids, -1, dims=1)
    labels[:, -1] = IGNORE
    for row, positions in ignored:
        labels[row, positions] = IGNORE
    return labels


@pytest.mark.parametrize("tied", [False, True], ids=["untied head", "tied head"])
def test_loss_and_all_gradients_equal_transformers(tied: bool, llama_folder: Callable[..., Path]) -> None:
    folder = llama_folder(tie_word_embeddings=tied)
    ids = words(97, 3, 40)
    labels = shifted(ids, (0, slice(0, 25)), (1, slice(5, 9)))
    model, oracle = ours(folder), theirs(folder)
    loss = model(ids, labels)
    loss.backward()
    expected = F.cross_entropy(oracle(ids).logits.flatten(0, 1), labels.flatten(), reduction="sum")
    expected.backward()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected)
    theirs_by_name = dict(oracle.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs_by_name[name].grad, msg=name, **CLOSE)


def test_padding_changes_neither_loss_nor_gradients(tiny: Path) -> None:
    ids = words(97, 1, 12)
    plain, padded = ours(tiny), ours(tiny)
    loss = plain(ids, shifted(ids))
    loss.backward()
    longer = torch.cat([ids, torch.zeros(1, 9, dtype=torch.long)], dim=1)
    labels = torch.cat([shifted(ids), torch.full((1, 9), IGNORE)], dim=1)
    padded_loss = padded(longer, labels)
    padded_loss.backward()
    torch.testing.assert_close(padded_loss, loss)
    for (name, one), other in zip(plain.named_parameters(), padded.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, msg=name, **CLOSE)


def test_a_batch_without_labels_costs_nothing_and_has_a_graph(tiny: Path) -> None:
    model = ours(tiny)
    loss = model(words(97, 2, 8), torch.full((2, 8), IGNORE))
    loss.backward()
    assert loss.item() == 0
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in model.parameters() if p.grad is not None)
    assert model.model.layers[0].self_attn.q_proj.weight.grad is not None


# --- ragged rows ------------------------------------------------------------------------------------------------------


def test_documents_of_one_row_do_not_see_each_other(tiny: Path) -> None:
    """Loss and all gradients are those of each document alone, up to the order of sums."""
    model, lengths = ours(tiny), [5, 1, 17, 9]
    ids, labels = words(97, 1, 32), words(97, 1, 32)
    labels[0, 3:7] = IGNORE
    together = model(ids, labels, lengths=lengths)
    found = torch.autograd.grad(together, list(model.parameters()))
    pairs = zip(ids.split(lengths, dim=1), labels.split(lengths, dim=1), strict=True)
    alone = sum(model(document, targets) for document, targets in pairs)
    expected = torch.autograd.grad(alone, list(model.parameters()))
    torch.testing.assert_close(together, alone, rtol=1e-6, atol=0)
    for name, one, other in zip(dict(model.named_parameters()), found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def test_each_document_has_its_loss(tiny: Path) -> None:
    """Weighted sums of them have the gradients of each document alone, as preferences need them."""
    model, lengths = ours(tiny), [6, 4, 8]
    ids, labels = words(97, 1, 18), words(97, 1, 18)
    labels[0, 6:10] = IGNORE
    losses = model(ids, labels, lengths=lengths, by_document=True)
    pairs = zip(ids.split(lengths, dim=1), labels.split(lengths, dim=1), strict=True)
    alone = torch.stack([model(document, targets) for document, targets in pairs])
    torch.testing.assert_close(losses, alone, rtol=1e-6, atol=0)
    weights, weight = torch.tensor([0.5, 1.0, -2.0]), model.model.layers[0].mlp.up_proj.weight
    (found,) = torch.autograd.grad(losses @ weights, weight)
    (expected,) = torch.autograd.grad(alone @ weights, weight)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_lengths_that_are_not_those_of_the_row_are_a_bug(tiny: Path) -> None:
    with pytest.raises(RuntimeError):
        ours(tiny)(words(97, 1, 10), lengths=[4, 5])


# --- cache ------------------------------------------------------------------------------------------------------------


def test_the_cache_gives_the_logits_of_the_whole_sequence(tiny: Path) -> None:
    model, ids = ours(tiny), words(97, 2, 12)
    cache = KeyValueCache(12)
    with torch.no_grad():
        whole = model(ids)
        torch.testing.assert_close(model(ids[:, :7], cache=cache), whole[:, 6:7], **EXACT)
        for position in range(7, 12):
            one = model(ids[:, position : position + 1], cache=cache)
            torch.testing.assert_close(one, whole[:, position : position + 1], **EXACT)


# --- config.json ------------------------------------------------------------------------------------------------------

SUPPORTED = (
    "supported is LlamaForCausalLM, the text models of Llama 2, 3, 3.1, 3.2, 3.3 and every model of the same form"
)

WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "another architecture": (
        {"architectures": ["MistralForCausalLM"], "model_type": "mistral"},
        f"config.json: the architecture is MistralForCausalLM; {SUPPORTED}",
    ),
    "a classifier": (
        {"architectures": ["LlamaForSequenceClassification"]},
        f"config.json: the architecture is LlamaForSequenceClassification; {SUPPORTED}",
    ),
    "no architecture": (
        {"architectures": None, "model_type": "gpt2"},
        f"config.json: the architecture is gpt2; {SUPPORTED}",
    ),
    "a missing field": ({"hidden_size": None}, "config.json: hidden_size is missing"),
    "a size of zero": ({"vocab_size": 0}, "config.json: vocab_size must be a whole number above 0, but it is 0"),
    "a size in words": (
        {"num_hidden_layers": "two"},
        "config.json: num_hidden_layers must be a whole number above 0, but it is 'two'",
    ),
    "a negative epsilon": (
        {"rms_norm_eps": -1},
        "config.json: rms_norm_eps must be a finite number above 0, but it is -1",
    ),
    "heads that do not group": (
        {"num_key_value_heads": 4},
        "config.json: num_attention_heads (6) must be a multiple of num_key_value_heads (4)",
    ),
    "an odd head": (
        {"head_dim": 7},
        "config.json: head_dim must be even for RoPE, but it is 7 (hidden_size 48, num_attention_heads 6)",
    ),
    "another activation": ({"hidden_act": "gelu"}, "config.json: hidden_act is 'gelu'; Llama's activation is silu"),
    "biases": (
        {"attention_bias": True},
        "config.json: attention_bias is True; linear layers with a bias are not supported",
    ),
    "quantized weights": (
        {"quantization_config": {"bits": 4}},
        "config.json: quantization_config is {'bits': 4}; quantized weights cannot be trained: give the original bf16 "
        "or fp32 model",
    ),
    "another RoPE": (
        {"rope_scaling": {"type": "yarn", "factor": 4.0}},
        "config.json: RoPE of type 'yarn' is not supported; 'default' and 'llama3' are",
    ),
    "half a RoPE scaling": (
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
        "config.json: low_freq_factor is missing",
    ),
}


@pytest.mark.parametrize(("changes", "message"), WRONG.values(), ids=WRONG.keys())
def test_a_config_that_is_no_llama_is_refused(changes: dict[str, Any], message: str, tiny: Path) -> None:
    values = json.loads((tiny / "config.json").read_bytes()) | changes
    with pytest.raises(ModelError) as caught:
        LlamaConfig.from_hf(values)
    assert str(caught.value) == message


def test_absent_fields_have_the_defaults_of_transformers() -> None:
    from transformers import LlamaConfig as Theirs

    needed = {"vocab_size": 10, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1}
    found = LlamaConfig.from_hf({"model_type": "llama", "num_attention_heads": 2} | needed)
    oracle = Theirs(num_attention_heads=2, **needed)
    names = ["num_key_value_heads", "head_dim", "rms_norm_eps", "max_position_embeddings", "tie_word_embeddings"]
    assert {name: getattr(found, name) for name in names} == {name: getattr(oracle, name) for name in names}
    assert found.rope_theta == oracle.rope_parameters["rope_theta"]


@pytest.mark.parametrize("tied", [False, True], ids=["untied head", "tied head"])
def test_names_and_shapes_are_those_of_transformers(tied: bool, llama_folder: Callable[..., Path]) -> None:
    folder = llama_folder(tie_word_embeddings=tied)
    config = WeightReader(folder).config()
    oracle = {name: tuple(parameter.shape) for name, parameter in theirs(folder).named_parameters()}
    assert config.shapes() == oracle
    with torch.device("meta"):
        assert {name: tuple(p.shape) for name, p in Llama(config).named_parameters()} == oracle
    assert config.parameters == theirs(folder).num_parameters()


def test_a_model_of_8_billion_takes_no_memory_on_meta(alone: World) -> None:
    with torch.device("meta"):
        model = Llama(LlamaConfig.from_hf(LLAMA3_8B))
    assert sum(parameter.numel() for parameter in model.parameters()) == 8_030_261_248
    assert all(parameter.is_meta for parameter in model.parameters())


LLAMA3_8B = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5,
}
"""Meta-Llama-3-8B's published sizes; 8,030,261,248 is its published number of parameters."""


def test_swiglu_has_the_formulas_values_and_gradients_and_keeps_only_its_inputs():
    gate, up = (torch.randn(5, 7, dtype=torch.float64, requires_grad=True) for _ in range(2))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda tensor: tensor):
        product = swiglu(gate, up)
    assert len(kept) == 2
    torch.testing.assert_close(product, F.silu(gate) * up)
    assert torch.autograd.gradcheck(swiglu, (gate, up))
