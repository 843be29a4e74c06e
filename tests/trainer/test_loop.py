"""One step's arithmetic: the mean over the global batch however it is cut, refusals, stopping, validation."""

import gzip
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kubetune_contract.config import CheckpointConfig, ProfilerConfig, RunConfig
from kubetune_contract.errors import ConfigError
from kubetune_contract.exit_codes import ExitCode
from kubetune_trainer import loop
from kubetune_trainer.cache import cache_folder
from kubetune_trainer.checkpoint import Checkpointer
from kubetune_trainer.data import Sample, arrange, load_data
from kubetune_trainer.distributed import World, full_tensor
from kubetune_trainer.hub import WeightReader
from kubetune_trainer.loop import NonFiniteLossError, Run, SavedError, StopFlag
from kubetune_trainer.model import IGNORE
from kubetune_trainer.optim import make_optimizer
from kubetune_trainer.parallel import build
from kubetune_trainer.peft import trainable
from kubetune_trainer.profiler import Profiler
from kubetune_trainer.report import Reporter, read_metrics
from kubetune_trainer.sampling import Sampler
from kubetune_trainer.tokenizer import Tokenizer

SUMS = {"rtol": 1e-5, "atol": 1e-7}
"""float32 sums of a few dozen terms in another order: some 1e-7 relative to the largest term."""


def make_run(config: RunConfig, world: World, total: int = 10, **changes: Any) -> Run:
    tokenizer = Tokenizer.from_folder(Path(config.model.path))
    data, held_out = load_data(config, tokenizer, cache_folder(Path(config.output_dir)), {})
    training, folder = config.training, Path(config.output_dir)
    folder.mkdir(exist_ok=True)
    batch = training.batch_size * training.gradient_accumulation_steps * world.size
    sampler = Sampler(data.lengths, batch, training.batch_size, training.seed, config.dataset.shuffle)
    model = build(config, WeightReader(config.model.path), world)
    params = list(trainable(model).values())
    run = Run(
        config=config,
        world=world,
        data=data,
        held_out=held_out,
        sampler=sampler,
        model=model,
        params=params,
        optimizer=make_optimizer(params, training),
        checkpoints=Checkpointer(folder, config.checkpoint.keep, world, keep_best=config.checkpoint.keep_best),
        reporter=Reporter(folder, world, total, sampler.steps_per_epoch),
        profiler=Profiler(config.profiler, folder, world),
        stop=StopFlag(),
        total=total,
    )
    return replace(run, **changes)


def with_training(config: RunConfig, **changes: Any) -> RunConfig:
    return config.model_copy(update={"training": config.training.model_copy(update=changes)})


def without_dropout(config: RunConfig) -> RunConfig:
    assert config.adapter is not None
    return config.model_copy(update={"adapter": config.adapter.model_copy(update={"dropout": 0.0})})


def metrics(run: Run) -> list[dict[str, Any]]:
    return read_metrics(run.reporter.metrics.path)


@pytest.fixture
def config(training_run: RunConfig) -> RunConfig:
    return without_dropout(training_run)


def take_step(run: Run) -> tuple[float, float, dict[str, torch.Tensor]]:
    """Loss and gradient norm as they are reported, and the weights after the step (on rank 0)."""
    run.reporter.begin(0)
    loop.train_step(run, 0)
    weights = {name: full_tensor(param, run.world) for name, param in trainable(run.model).items()}
    if not run.world.is_main:
        return 0.0, 0.0, {}
    (line,) = metrics(run)
    return line["loss"], line["gradient_norm"], {name: value for name, value in weights.items() if value is not None}


def _take_step_as_rank(world: World, config: RunConfig) -> tuple[float, float, dict[str, torch.Tensor]]:
    return take_step(make_run(config, world))


CUTS = {
    "one pass": (4, 1, 1),
    "a pass for each row": (1, 4, 1),
    "an odd cut, so that passes differ in size": (3, 2, 1),
    "two ranks": (2, 1, 2),
    "three ranks, one of them without a row in the second pass": (1, 2, 3),
}


def padded(samples: list[Sample]) -> tuple[torch.Tensor, torch.Tensor]:
    """The samples as rows of their own: the oracle of ragged batches."""
    rows = ([torch.from_numpy(part).long() for part in (one.input_ids, one.labels)] for one in samples)
    ids, labels = zip(*rows, strict=True)
    pad = torch.nn.utils.rnn.pad_sequence
    return pad(list(ids), batch_first=True), pad(list(labels), batch_first=True, padding_value=IGNORE)


@pytest.mark.parametrize("case", CUTS)
@pytest.mark.parametrize("method", ["LoRA", "Full"])
def test_a_step_is_that_of_the_mean_over_all_label_tokens(
    method: str, case: str, config: RunConfig, alone: World, spawn: Callable[..., list[Any]]
) -> None:
    """Rows differ in length and in label tokens, so a mean of means would show."""
    micro, accumulation, ranks = CUTS[case]
    rows = micro * accumulation * ranks
    config = with_training(config, batch_size=micro, gradient_accumulation_steps=accumulation, max_gradient_norm=0.05)
    if method == "Full":
        config = config.model_copy(update={"method": "Full", "adapter": None})
    run = make_run(with_training(config, batch_size=rows, gradient_accumulation_steps=1), alone)
    input_ids, labels = padded([sample for row in run.sampler.rows(0) for sample in run.data.samples(row)])
    mean = run.model(input_ids, labels) / (labels != IGNORE).sum()
    mean.backward()
    norm = torch.nn.utils.clip_grad_norm_(run.params, 0.05)
    loop.set_learning_rate(run.optimizer, config.training.learning_rate / 2)  # the first of two warm-up steps
    run.optimizer.step()

    loss, reported_norm, weights = (
        spawn(ranks, _take_step_as_rank, config)[0] if ranks > 1 else take_step(make_run(config, alone))
    )
    assert loss == pytest.approx(mean.item(), rel=1e-6)
    assert reported_norm == pytest.approx(norm.item(), rel=1e-5)
    expected = {name: param.detach() for name, param in trainable(run.model).items()}
    assert weights.keys() == expected.keys()
    for name, value in expected.items():
        # AdamW's first step is lr * sign(g) where |g| >> eps: a gradient near 0 may turn, by up to 2 lr.
        torch.testing.assert_close(weights[name], value, rtol=1e-4, atol=2e-5)


def test_the_reported_tokens_are_without_padding(config: RunConfig, alone: World) -> None:
    run = make_run(config, alone)
    take_step(run)
    (line,) = metrics(run)
    assert line["tokens"] == run.data.lengths[run.sampler.rows(0)].sum()


def test_the_learning_rate_follows_the_schedule(config: RunConfig, alone: World) -> None:
    run = make_run(config, alone, total=4)
    loop.train(run, 0)
    rates = [line["learning_rate"] for line in metrics(run)]
    assert rates == pytest.approx([0.0025, 0.005, 0.005, 0.0025])


def test_the_first_loss_is_that_of_the_data(config: RunConfig, alone: World) -> None:
    run = make_run(config, alone)
    loss, _, _ = take_step(run)
    rows = run.sampler.rows(0)
    part = replace(run.data.parts[0], chosen=np.sort(rows))
    subset = arrange([part], config.dataset, packed=False)
    fresh = make_run(config, alone)
    assert loop.mean_loss(fresh, subset) == pytest.approx(loss, rel=1e-6)


# --- refusals ---


def test_a_loss_that_is_no_number_ends_the_run_and_leaves_the_weights(config: RunConfig, alone: World) -> None:
    run = make_run(config, alone)
    with torch.no_grad():
        run.model.model.norm.weight.fill_(float("nan"))
    before = [param.clone() for param in run.params]
    run.reporter.begin(0)
    with pytest.raises(
        NonFiniteLossError,
        match=r"step 1 has loss nan and gradient norm nan.*damaged rows among \S*train\.jsonl:\d+, \S*train\.jsonl:\d+",
    ) as caught:
        loop.train_step(run, 0)
    assert caught.value.exit_code == ExitCode.NON_FINITE_LOSS
    assert all(torch.equal(param, old) for param, old in zip(run.params, before, strict=True))
    assert metrics(run) == []


def test_the_micro_batch_without_a_finite_loss_is_named(config: RunConfig, alone: World) -> None:
    run = make_run(config, alone)
    fine, bad = torch.tensor([0.5]), torch.tensor([float("inf")])
    file = config.dataset.path
    assert loop._suspects(run, [[1, 2], [9, 4]], [fine, bad]) == f" among {file}:5, {file}:10"
    assert loop._suspects(run, [[1, 0], [4]], [fine, fine]) == f" among {file}:1, {file}:2, {file}:5"
    assert loop._suspects(run, [list(range(20))], [fine]).endswith(f", {file}:8 and 12 more")


# --- stopping ---


def test_without_a_wish_to_stop_the_loop_runs_to_its_end_and_saves(config: RunConfig, alone: World) -> None:
    run = make_run(config, alone, total=7)
    loop.train(run, 0)
    assert [line["step"] for line in metrics(run)] == [1, 2, 3, 4, 5, 6, 7]
    folder = run.reporter.folder / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000005", "step-00000007"]


def test_a_wish_to_stop_lets_the_step_end_and_saves_it(config: RunConfig, alone: World) -> None:
    run = make_run(config, alone)
    run.stop.requested = True
    with pytest.raises(
        SavedError, match=r"stopped by SIGTERM, saved after step 3 in checkpoints/step-00000003"
    ) as caught:
        loop.train(run, 2)
    assert caught.value.exit_code == ExitCode.SAVED
    assert caught.value.status.step == 3
    assert run.checkpoints.latest() is not None


def test_sigterm_sets_the_flag() -> None:
    import os
    import signal

    before = signal.getsignal(signal.SIGTERM)
    try:
        flag = StopFlag.on_sigterm()
        assert not flag.requested
        os.kill(os.getpid(), signal.SIGTERM)
        assert flag.requested
    finally:
        signal.signal(signal.SIGTERM, before)


# --- checkpoints and profile ---


def saved(run: Run) -> list[int]:
    names = [path.name for path in (run.reporter.folder / "checkpoints").iterdir()]
    return sorted(int(name.removeprefix("step-")) for name in names)


def with_checkpoints(config: RunConfig, **options: Any) -> RunConfig:
    assert config.validation is not None
    return config.model_copy(
        update={
            "checkpoint": CheckpointConfig(**options),
            "validation": config.validation.model_copy(update={"every_steps": 2}),
            "dataset": config.dataset.model_copy(update={"shuffle": False}),
        }
    )


def test_an_epochs_end_is_saved_too(config: RunConfig, alone: World) -> None:
    run = make_run(with_checkpoints(config, every_steps=5, every_epoch=True, keep=9), alone, total=13)
    loop.train(run, 0)
    assert run.sampler.steps_per_epoch == 12
    assert saved(run) == [5, 10, 12, 13]


def test_the_best_checkpoint_is_saved_when_it_is_measured_and_stays(
    config: RunConfig, alone: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = iter([4.0, 2.0, 3.0, 2.5])
    monkeypatch.setattr(loop, "mean_loss", lambda run, data: next(losses))
    run = make_run(with_checkpoints(config, every_steps=3, keep=1, keep_best=True), alone, total=8)
    loop.train(run, 0)
    assert saved(run) == [4, 8]
    path, loss = run.checkpoints.best() or (Path(), 0.0)
    assert (path.name, loss) == ("step-00000004", 2.0)


def test_a_loss_that_is_measured_after_a_restart_counts(config: RunConfig, alone: World) -> None:
    run = make_run(with_checkpoints(config, every_steps=9, keep=1, keep_best=True), alone, total=4)
    run.stop.requested = True
    with pytest.raises(SavedError):
        loop.train(run, 1)
    assert run.checkpoints.best() is None
    run.stop.requested = False
    loop.train(run, 2)
    measured = {line["step"]: line["validation_loss"] for line in metrics(run) if "validation_loss" in line}
    assert measured.keys() == {2, 4}
    _, best = run.checkpoints.best() or (Path(), 0.0)
    assert best == min(measured.values())


def test_the_window_is_profiled(config: RunConfig, alone: World) -> None:
    run = make_run(config.model_copy(update={"profiler": ProfilerConfig(start_step=2, steps=2)}), alone, total=4)
    loop.train(run, 0)
    folder = run.reporter.folder / "profile"
    assert sorted(path.name for path in folder.iterdir()) == ["steps-2-3-rank-0.json.gz", "steps-2-3-rank-0.txt"]
    trace = json.loads(gzip.decompress((folder / "steps-2-3-rank-0.json.gz").read_bytes()))
    assert any(event.get("name") == "aten::mm" for event in trace["traceEvents"])


def test_in_the_backward_pass_more_than_one_forward_pass_is_refused(config: RunConfig, alone: World) -> None:
    changed = with_training(config, optimizer_in_backward=True, max_gradient_norm=0)
    with pytest.raises(ConfigError, match="needs one forward pass per step, but this step takes 2"):
        loop.train_step(make_run(changed, alone), 0)


# --- validation ---


def test_validation_is_the_mean_over_label_tokens_without_dropout(training_run: RunConfig, alone: World) -> None:
    run = make_run(training_run, alone)
    assert run.held_out is not None
    input_ids, labels = padded([sample for row in range(len(run.held_out)) for sample in run.held_out.samples(row)])
    run.model.eval()
    with torch.no_grad():
        expected = (run.model(input_ids, labels) / (labels != IGNORE).sum()).item()
    run.model.train()
    assert loop.validate(run, 0) == pytest.approx(expected, rel=1e-6)
    assert run.model.training


def _validate_as_rank(world: World, config: RunConfig) -> list[float | None]:
    run = make_run(config, world)
    return [loop.validate(run, 0), loop.validate(run, 0)]


def test_all_ranks_get_the_same_validation_loss(
    config: RunConfig, alone: World, spawn: Callable[..., list[Any]]
) -> None:
    expected = loop.mean_loss(run := make_run(config, alone), run.held_out)  # type: ignore[arg-type]
    first, second, third = spawn(3, _validate_as_rank, config)
    assert first == second == third
    assert first == pytest.approx([expected, expected], rel=1e-6)


def test_a_restarted_run_keeps_what_it_has_measured(config: RunConfig, alone: World) -> None:
    run = make_run(config, alone)
    run.reporter.validation(0, 1.25)
    assert loop.validate(run, 0) == 1.25
    assert len(metrics(run)) == 1


def test_validation_comes_every_so_many_steps_between_first_and_last(config: RunConfig, alone: World) -> None:
    assert config.validation is not None
    often = config.model_copy(update={"validation": config.validation.model_copy(update={"every_steps": 2})})
    run = make_run(often, alone, total=6)
    loop.train(run, 0)
    assert [line["step"] for line in metrics(run) if "validation_loss" in line] == [2, 4]


def test_a_validation_that_a_stop_has_skipped_is_made_up_for(config: RunConfig, alone: World) -> None:
    assert config.validation is not None
    often = config.model_copy(update={"validation": config.validation.model_copy(update={"every_steps": 2})})
    run = make_run(often, alone, total=3)
    run.stop.requested = True
    with pytest.raises(SavedError):
        loop.train(run, 1)
    assert not any("validation_loss" in line for line in metrics(run))
    run.stop.requested = False
    loop.train(run, 2)
    assert [line["step"] for line in metrics(run)] == [2, 2, 3]


def test_without_held_out_data_nothing_is_validated(config: RunConfig, alone: World) -> None:
    run = make_run(config, alone, held_out=None)
    assert loop.validate(run, 0) is None
