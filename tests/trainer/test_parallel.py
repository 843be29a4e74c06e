"""A model over several processes is the model of one process."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from kubetune_contract.config import RunConfig
from kubetune_contract.errors import ConfigError
from kubetune_trainer.checkpoint import Checkpointer
from kubetune_trainer.distributed import World, full_tensor, local_rows
from kubetune_trainer.hub import WeightReader
from kubetune_trainer.model import IGNORE
from kubetune_trainer.optim import make_optimizer, set_learning_rate
from kubetune_trainer.parallel import (
    build,
    check_compiler,
    clip_gradients,
    make_mesh,
    notes,
)
from kubetune_trainer.peft import lora_layers, trainable
from kubetune_trainer.precision import _cpu_flags, choose_precision

Spawn = Callable[..., list[Any]]
Configure = Callable[..., RunConfig]

CPU = torch.device("cpu")
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
"""The project's bar for more processes: only the order of the sum over rows differs."""


def batch() -> tuple[Tensor, Tensor]:
    """Four rows with different numbers of labels; the last has none, as where a rank runs out of data."""
    ids = torch.randint(97, (4, 21), generator=torch.Generator().manual_seed(3))
    labels = ids.roll(-1, dims=1)
    labels[:, -1] = IGNORE
    labels[0, :15] = IGNORE
    labels[3] = IGNORE
    return ids, labels


def step(world: World, config: RunConfig) -> dict[str, Any]:
    """Everything that one training step computes, on rank 0 whole: weights, logits, loss, gradients, norms."""
    model = build(config, WeightReader(config.model.path), world)
    with torch.no_grad():  # some values that are not the start's: B is zero there, and so is the gradient of A
        for _, layer in lora_layers(model):
            local, start = local_rows(layer.lora_B.weight)
            local += torch.arange(start, start + len(local))[:, None] * 1e-3
    weights = gathered(world, dict(model.named_parameters()))
    ids, labels = batch()
    mine = slice(world.rank, None, world.size)
    with torch.no_grad():
        logits = model(ids)
    loss = model(ids[mine], labels[mine]) / (labels != IGNORE).sum()
    loss.backward()
    parameters = trainable(model)
    gradients = gathered(world, {name: p.grad for name, p in parameters.items() if p.grad is not None})
    norms = [clip_gradients(list(parameters.values()), limit) for limit in (0.0, 1e-2, 0.0)]
    return {"weights": weights, "logits": logits, "loss": loss.item(), "gradients": gradients, "norms": norms}


def gathered(world: World, tensors: dict[str, Tensor]) -> dict[str, Tensor | None]:
    whole = {name: full_tensor(tensor, world) for name, tensor in tensors.items()}
    return {name: None if tensor is None else tensor.clone() for name, tensor in whole.items()}


METHODS: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "full fine-tuning": {"method": "Full"},
    "LoRA with activation checkpointing": {"training": {"precision": "FP32", "activation_checkpointing": "Full"}},
}


@pytest.mark.parametrize("changes", METHODS.values(), ids=METHODS.keys())
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_two_ranks_compute_what_one_computes(
    changes: dict[str, Any],
    tied: bool,
    llama_folder: Callable[..., Path],
    run_config: Configure,
    spawn: Spawn,
    alone: World,
) -> None:
    config = run_config(llama_folder(tie_word_embeddings=tied), **changes)
    expected = step(alone, config)
    first, second = spawn(2, step, config)
    for name, weight in expected["weights"].items():
        assert torch.equal(first["weights"][name], weight), name  # not a bit differs
    torch.testing.assert_close(first["logits"], expected["logits"], **CLOSE)
    assert torch.equal(first["logits"], second["logits"])
    assert first["loss"] + second["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert first["gradients"].keys() == expected["gradients"].keys()
    for name, gradient in expected["gradients"].items():
        torch.testing.assert_close(first["gradients"][name], gradient, msg=name, **CLOSE)
    assert first["norms"] == second["norms"]
    assert first["norms"] == pytest.approx(expected["norms"], rel=1e-5)
    assert first["norms"][2] == pytest.approx(1e-2, rel=1e-3)  # clipped to 1e-2, less the 1e-6 in clip's divisor


def start(world: World, config: RunConfig) -> dict[str, Any]:
    model = build(config, WeightReader(config.model.path), world)
    rows = {name: local_rows(parameter) for name, parameter in model.named_parameters()}
    return {
        "weights": gathered(world, dict(model.named_parameters())),
        "rows": {name: (first, first + len(local)) for name, (local, first) in rows.items()},
    }


def test_five_ranks_hold_every_row_once(tiny: Path, run_config: Configure, spawn: Spawn, alone: World) -> None:
    """Most sizes are no multiple of 5, and the adapter's A has fewer rows than there are ranks."""
    config = run_config(tiny)
    expected = start(alone, config)
    ranks = spawn(5, start, config)
    for name, weight in expected["weights"].items():
        assert torch.equal(ranks[0]["weights"][name], weight), name
        held = [row for rank in ranks for row in range(*rank["rows"][name])]
        assert held == list(range(len(weight))), name
    assert ranks[4]["rows"]["model.layers.0.mlp.up_proj.lora_A.weight"] == (4, 4)


def hybrid_step(world: World, config: RunConfig) -> dict[str, Any]:
    """As step(), with a checkpoint there and back and which ranks hold which rows."""
    found = step(world, config)
    model = build(config, WeightReader(config.model.path), world)
    rows = {name: local_rows(parameter) for name, parameter in trainable(model).items()}
    found["rows"] = {name: (first, first + len(local)) for name, (local, first) in rows.items()}
    optimizer = make_optimizer(trainable(model).values(), config.training)
    ids, labels = batch()
    model(ids, labels).backward()
    optimizer.step()
    optimizer.zero_grad()
    found["trained"] = gathered(world, trainable(model))
    saver = Checkpointer(Path(config.output_dir), 2, world)
    path = Path(config.output_dir) / saver.save(1, model, optimizer).path
    fresh = build(config, WeightReader(config.model.path), world)
    saver.load(path, fresh, make_optimizer(trainable(fresh).values(), config.training))
    found["loaded"] = gathered(world, trainable(fresh))
    return found


@pytest.mark.parametrize("method", ["LoRA", "Full"])
def test_hybrid_sharding_is_inside_nodes_and_changes_nothing(
    method: str, tiny: Path, tmp_path: Path, run_config: Configure, spawn: Spawn, alone: World
) -> None:
    """Four ranks on two nodes: gradients are added up over all four, rows are dealt out in each node."""
    training = {"precision": "FP32", "sharding": "Hybrid"}
    config = run_config(tiny, method=method, training=training, output_dir=str(tmp_path / "out"))
    expected = step(alone, config)
    ranks = spawn(4, hybrid_step, config, per_node=2)
    for name, gradient in expected["gradients"].items():
        torch.testing.assert_close(ranks[0]["gradients"][name], gradient, msg=name, **CLOSE)
    for name, weight in expected["weights"].items():
        assert torch.equal(ranks[0]["weights"][name], weight), name
    assert sum(rank["loss"] for rank in ranks) == pytest.approx(expected["loss"], rel=1e-5)
    assert {tuple(rank["norms"]) for rank in ranks} == {tuple(ranks[0]["norms"])}
    assert ranks[0]["norms"] == pytest.approx(expected["norms"], rel=1e-5)
    assert ranks[0]["rows"] == ranks[2]["rows"] != ranks[1]["rows"] == ranks[3]["rows"]
    for name, weight in ranks[0]["trained"].items():
        assert torch.equal(ranks[0]["loaded"][name], weight), name


def test_hybrid_sharding_needs_nodes_of_equal_size(run_config: Configure) -> None:
    training = run_config(Path("m"), training={"sharding": "Hybrid"}).training
    world = World(0, 3, 0, torch.device("cpu"), local_size=2)
    with pytest.raises(ConfigError, match="3 processes are no multiple of the 2 on this node: set it to Full"):
        make_mesh(world, training)


NOTES = {
    "offloading on the CPU": (
        {"cpu_offload": True},
        2,
        ["training.cpu_offload changes nothing: this run is on the CPU already"],
    ),
    "copies on one node": (
        {"sharding": "Hybrid"},
        2,
        ["training.sharding Hybrid is the same as Full: there is only one node"],
    ),
    "copies on two nodes": ({"sharding": "Hybrid"}, 1, []),
    "nothing special": ({}, 2, []),
}


@pytest.mark.parametrize("case", NOTES)
def test_options_that_change_nothing_are_told(case: str, run_config: Configure) -> None:
    training, local_size, expected = NOTES[case]
    config = run_config(Path("m"), training=training)
    assert notes(config, World(0, 2, 0, CPU, local_size)) == expected


def test_a_missing_compiler_is_told_before_anything_is_loaded(
    run_config: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    check_compiler(run_config(Path("m")).training)
    with pytest.raises(ConfigError, match="needs the compiler no-such-compiler"):
        check_compiler(run_config(Path("m"), training={"compile": True}).training)


# --- master weights ---


def master_step(world: World, config: RunConfig) -> dict[str, Any]:
    """Two steps of full fine-tuning: number formats, and how far a weight has moved by updates below bf16's steps."""
    model = build(config, WeightReader(config.model.path), world)
    optimizer = make_optimizer(trainable(model).values(), config.training)
    before = gathered(world, trainable(model))
    ids, labels = batch()
    losses = []
    for _ in range(2):
        set_learning_rate(optimizer, 1e-6)
        loss = model(ids, labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    after = gathered(world, trainable(model))
    moved = {name: not torch.equal(weight, after[name]) for name, weight in before.items() if weight is not None}
    return {
        "stored": {str(param.dtype) for param in model.parameters()},
        "products": str(model(ids).dtype),
        "exported": str(model.dtype),
        "moved": moved,
        "losses": losses,
    }


@pytest.mark.parametrize("ranks", [1, 2])
def test_master_weights_keep_small_updates_that_bf16_loses(
    ranks: int, tiny: Path, run_config: Configure, spawn: Spawn
) -> None:
    """A single process uses FSDP's mixed precision too, so that there is one way for all."""
    outcome = {}
    for kept in ("FP32", "BF16"):
        training = {"precision": "BF16", "master_weights": kept, "weight_decay": 0}
        config = run_config(tiny, method="Full", training=training)
        outcome[kept] = spawn(ranks, master_step, config)[0]
        assert outcome[kept]["products"] == outcome[kept]["exported"] == "torch.bfloat16"
    assert outcome["FP32"]["stored"] == {"torch.float32"}
    assert outcome["BF16"]["stored"] == {"torch.bfloat16"}
    assert all(outcome["FP32"]["moved"].values())
    norms = "input_layernorm.weight"  # near 1, where the next bf16 number is 8e-3 away
    assert not any(moved for name, moved in outcome["BF16"]["moved"].items() if norms in name)
    assert outcome["FP32"]["losses"][0] == outcome["BF16"]["losses"][0]


def frozen_state(world: World, config: RunConfig) -> dict[str, Any]:
    model = build(config, WeightReader(config.model.path), world)
    return {
        "sharded": all(isinstance(parameter, DTensor) for parameter in model.parameters()),
        "dtypes": {name: str(p.dtype) for name, p in model.named_parameters() if not p.requires_grad},
        "adapter": {str(p.dtype) for p in trainable(model).values()},
        "logits": model(batch()[0]).detach(),
        "frequencies": model.model.inverse_frequencies,
    }


def test_bf16_runs_sharded_with_a_float32_adapter(
    tiny: Path, run_config: Configure, spawn: Spawn, alone: World
) -> None:
    config = run_config(tiny, training={"precision": "BF16"})
    expected = frozen_state(alone, config)
    first, _ = spawn(2, frozen_state, config)
    assert first["sharded"]
    assert not expected["sharded"]
    assert set(first["dtypes"].values()) == {"torch.bfloat16"}
    assert first["adapter"] == {"torch.float32"}
    assert first["logits"].dtype == torch.bfloat16
    assert torch.equal(first["logits"], expected["logits"])
    assert torch.equal(first["frequencies"], expected["frequencies"])


def test_full_fine_tuning_trains_every_weight(tiny: Path, run_config: Configure, alone: World) -> None:
    model = build(run_config(tiny, method="Full"), WeightReader(tiny), alone)
    assert trainable(model).keys() == set(WeightReader(tiny).names())
    assert model.training


def test_the_adapter_does_not_touch_torchs_random_state(tiny: Path, run_config: Configure, alone: World) -> None:
    before = torch.get_rng_state()
    build(run_config(tiny), WeightReader(tiny), alone)
    assert torch.equal(torch.get_rng_state(), before)


# --- gradients --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [0, 1e9, 0.5], ids=["only measured", "within the limit", "clipped"])
def test_clipping_equals_torch(limit: float) -> None:
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(size, generator=generator) for size in ((3, 5), (7,), (2, 2))]
    ours = [nn.Parameter(torch.zeros_like(gradient)) for gradient in gradients]
    theirs = [nn.Parameter(torch.zeros_like(gradient)) for gradient in gradients]
    for parameter, gradient in zip(ours + theirs, gradients * 2, strict=True):
        parameter.grad = gradient.clone()
    expected = nn.utils.clip_grad_norm_(theirs, limit or float("inf"))
    assert clip_gradients(ours, limit) == expected.item()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(ours, theirs, strict=True))


def test_clipping_ignores_what_has_no_gradient() -> None:
    one, none = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    one.grad = torch.tensor([3.0, 4.0])
    assert clip_gradients([one, none], 1.0) == 5.0
    torch.testing.assert_close(one.grad, torch.tensor([0.6, 0.8]))


# --- precision --------------------------------------------------------------------------------------------------------

CPUINFO = {
    "a Xeon with AMX": ("flags\t\t: fpu avx2 avx512_bf16 amx_bf16 amx_tile", {"avx512_bf16", "amx_bf16"}),
    "an EPYC with AVX2 only": ("model name\t: AMD EPYC\nflags\t\t: fpu avx2 fma", set()),
    "no such file": (None, set()),
}


@pytest.mark.parametrize(("text", "expected"), CPUINFO.values(), ids=CPUINFO.keys())
def test_bf16_instructions_are_read_from_cpuinfo(text: str | None, expected: set[str], tmp_path: Path) -> None:
    file = tmp_path / "cpuinfo"
    if text is not None:
        file.write_text(text)
    assert _cpu_flags(file) & {"avx512_bf16", "amx_bf16"} == expected


def test_a_wish_is_followed_and_said(run_config: Configure) -> None:
    config = run_config(Path("m"), training={"precision": "FP32"})
    assert choose_precision(config, CPU) == (torch.float32, "fp32, as training.precision says")
    config = run_config(Path("m"), training={"precision": "BF16"})
    dtype, why = choose_precision(config, CPU)
    assert dtype == torch.bfloat16
    assert why.startswith("bf16, as training.precision says")


def test_auto_takes_bf16_only_where_the_cpu_multiplies_it(run_config: Configure) -> None:
    config = run_config(Path("m"), training={"precision": "Auto"})
    flags = _cpu_flags() & {"avx512_bf16", "amx_bf16"}
    dtype, why = choose_precision(config, CPU)
    _, warning = choose_precision(run_config(Path("m"), training={"precision": "BF16"}), CPU)
    if flags and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        assert dtype == torch.bfloat16
        assert all(flag in why for flag in flags)
    else:
        assert (dtype, why) == (torch.float32, "fp32: this CPU has no bf16 instructions (avx512_bf16 or amx_bf16)")
        assert warning.endswith("; it will be slow: this CPU has no bf16 instructions (avx512_bf16 or amx_bf16)")
