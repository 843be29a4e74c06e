"""What the trainer's benchmark counts and tells; the runs themselves are `python -m benchmarks.trainer --quick`."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from benchmarks.aims import AIMS
from benchmarks.harness import Rounds, Sample
from benchmarks.trainer import cases, inputs
from benchmarks.trainer.__main__ import parse
from benchmarks.trainer.cases import LIMIT, OURS, PEFT, PLANS, TORCHTUNE, Options, Outcome
from benchmarks.trainer.limit import Shape, step_flops
from benchmarks.trainer.ours import config
from benchmarks.trainer.work import Work

from kubetune_contract.config import RunConfig

SHAPE = {
    "num_hidden_layers": 3,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "vocab_size": 1000,
}
OPTIONS = Options(Path("/peers/python"), quick=False, bf16=False)


@pytest.fixture
def work(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(SHAPE))
    return Work(str(tmp_path), "rows.json", "texts.jsonl", 0.0, batch=2, length=16)


@pytest.fixture
def outcome(work):
    def build(key="smollm2", **sides):
        named = {OURS: {"rate": 20.0, "step": 2.0}, PEFT: {"rate": 10.0, "step": 4.0}, LIMIT: {"gflops": 1e-3}, **sides}
        common = {"peak": 100.0, "startup": 5.0, "loss": 2.0, "resident": 50.0}
        samples = {name: [Sample({**common, **values}, 1.0, 1.0, 0.0)] * 3 for name, values in named.items()}
        plan = next(plan for plan in PLANS if plan.key == key)
        return Outcome(plan, work, Rounds(samples, 1, 0.1), "measure it")

    return build


def test_a_step_is_counted_as_torch_counts_the_matrix_products_of_the_reference_model(work):
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(**SHAPE, attn_implementation="eager"))
    ids = torch.zeros(work.batch, work.length, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids).loss.backward()
    attention = 6 * work.batch * work.length**2 * SHAPE["num_hidden_layers"] * SHAPE["hidden_size"]
    # Eager attention works out the half that a causal mask takes away; rotary angles are products of vectors.
    assert step_flops(Shape.read(Path(work.model)), replace(work, method="Full")) + attention == pytest.approx(
        counter.get_total_flops(), rel=1e-3
    )


def test_frozen_weights_need_no_gradient_of_their_own(work):
    shape = Shape.read(Path(work.model))
    full, lora, qlora = (step_flops(shape, replace(work, method=method)) for method in ("Full", "LoRA", "QLoRA"))
    assert lora == qlora
    linear = sum(inputs * outputs * count for inputs, outputs, count in [*shape.linear(), shape.head])
    adapters = sum(16 * (inputs + outputs) * count for inputs, outputs, count in shape.linear())
    assert full - lora == work.batch * work.length * (2 * linear - 6 * adapters)


def test_the_share_of_the_limit_is_that_of_the_needed_operations(outcome):
    found = outcome()
    figures = found.plan.figures(found)
    assert figures["lora-gemm"].ours == pytest.approx(100 * found.gflops / 2.0 / 1e-3)
    assert (figures["lora"].ours, figures["lora"].peer, figures["lora"].ratio) == (20.0, 10.0, 2.0)


def test_each_side_of_a_speed_has_its_best_number_format(outcome):
    found = outcome("full", **{f"{PEFT}, bf16": {"rate": 40.0, "step": 1.0}, f"{OURS}, bf16": {"rate": 1.0}})
    assert found.plan.figures(found)["full"].ratio == 0.5


def test_the_table_has_each_side_and_what_disturbed(outcome):
    told = cases.table(outcome(), peak=1.0)
    assert [row[:3] for row in told.rows] == [(OURS, "20", "1.00"), (PEFT, "10", "2.00")]
    assert "medians of 3; 1 disturbed round was made again." in told.note
    assert {len(row) for row in told.rows} == {len(told.columns)}


def test_sides_with_other_losses_did_other_work(outcome):
    cases.check_same(outcome().rounds)
    with pytest.raises(ValueError, match=r"they did other work: .*torchtune"):
        cases.check_same(outcome(**{TORCHTUNE: {"loss": 2.2}}).rounds)


def test_every_figure_of_a_case_has_an_aim(outcome):
    known = {aim.key for aim in AIMS["trainer"]}
    sides = {name: {"rate": 1.0, "step": 1.0} for plan in PLANS for name in plan.sides if LIMIT not in name}
    for plan in PLANS:
        found = outcome(plan.key, **sides)
        assert set(plan.figures(found)) <= known, plan.key


@pytest.mark.parametrize("side", sorted({side for plan in PLANS for side in plan.sides}))
def test_a_side_gets_the_work_its_number_format_and_its_environment(side, work):
    made = cases.side_of(side, work, OPTIONS)
    read = Work(**made.case, started=0.0)
    assert read.precision == ("BF16" if "bf16" in side else "FP32")
    assert made.command[0] == ("/peers/python" if side.startswith(TORCHTUNE) else sys.executable)
    assert ("MALLOC_TOP_PAD_" in made.environment) == ("malloc" in side)


def test_a_machine_that_multiplies_bf16_runs_the_speeds_in_bf16_too():
    able = replace(OPTIONS, bf16=True)
    plans = {plan.key: plan for plan in PLANS}
    assert {f"{OURS}, bf16", f"{PEFT}, bf16"} < set(cases.sides_of(plans["full"], able))
    assert cases.sides_of(plans["full"], OPTIONS) == plans["full"].sides
    assert cases.sides_of(plans["memory"], able) == plans["memory"].sides


@pytest.mark.parametrize("method", ["Full", "LoRA", "QLoRA"])
@pytest.mark.parametrize("precision", ["FP32", "BF16"])
def test_our_side_has_a_valid_configuration(work, tmp_path, method, precision):
    made = RunConfig.model_validate(config(replace(work, method=method, precision=precision), tmp_path))
    assert (made.method, made.training.precision, made.training.max_steps) == (method, precision, work.steps)


def test_shapes_are_of_the_size_that_they_are_named_for():
    def weights(name):
        about = {**inputs._COMMON, **inputs.SHAPES[name]}
        hidden, heads = about["hidden_size"], about["num_attention_heads"]
        keys = hidden // heads * about["num_key_value_heads"]
        layer = 2 * hidden * (hidden + keys) + 3 * hidden * about["intermediate_size"] + 2 * hidden
        tables = 1 if about["tie_word_embeddings"] else 2
        return about["num_hidden_layers"] * layer + tables * hidden * about["vocab_size"] + hidden

    assert round(weights("56M") / 1e6, 1) == 56.6
    assert round(weights("8B") / 1e9, 2) == 8.03


def test_an_unknown_case_is_refused(capsys):
    with pytest.raises(SystemExit):
        parse(["--only", "everything"])
    assert "invalid choice: 'everything'" in capsys.readouterr().err


def test_the_sides_of_the_peers_need_nothing_of_ours():
    root = str(Path(cases.__file__).parents[2])
    sides = "benchmarks.trainer.torchtune_side, benchmarks.trainer.transformers_side"
    code = f"import sys; sys.path.append({root!r}); import {sides}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True)
    assert not {"pydantic", "torch", "kubetune_contract"} & set(done.stdout.split())
