"""The training loop, the same for full and LoRA fine-tuning, on one device or many."""

import math
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Final, Self

import numpy as np
import torch

from kubetune_contract.config import DPOConfig, RunConfig
from kubetune_contract.errors import ConfigError
from kubetune_contract.exit_codes import ExitCode, JobError
from kubetune_contract.progress import CheckpointStatus
from kubetune_trainer.checkpoint import Checkpointer
from kubetune_trainer.data import Dataset
from kubetune_trainer.distributed import World, all_sum, broadcast_object, gather_objects
from kubetune_trainer.model import Llama
from kubetune_trainer.objective import PREFERENCE_MEASURES, preference
from kubetune_trainer.optim import InBackward, learning_rate, set_learning_rate
from kubetune_trainer.parallel import clip_gradients
from kubetune_trainer.profiler import Profiler
from kubetune_trainer.report import Reporter, Step
from kubetune_trainer.sampling import Sampler, Tokens, deal


class SavedError(JobError):
    """The run was told to stop and can go on from its newest checkpoint."""

    exit_code = ExitCode.SAVED

    def __init__(self, status: CheckpointStatus) -> None:
        super().__init__(
            f"stopped by SIGTERM, saved after step {status.step} in {status.path}; started again, the run goes on there"
        )
        self.status = status


class NonFiniteLossError(JobError):
    """The loss or the gradient is no finite number any more. The weights of the step before stay."""

    exit_code = ExitCode.NON_FINITE_LOSS


class StopFlag:
    """Whether SIGTERM has come. The loop asks once per step, so a step is never cut."""

    def __init__(self) -> None:
        self.requested = False

    @classmethod
    def on_sigterm(cls) -> Self:
        """From here on SIGTERM only sets the flag."""
        flag = cls()
        signal.signal(signal.SIGTERM, flag._request)
        return flag

    def _request(self, _signal: int, _frame: FrameType | None) -> None:
        self.requested = True


NAMED_ROWS: Final = 8
"""Rows that are named where a batch cannot be learnt."""


@dataclass(frozen=True)
class Run:
    """All that the loop works on."""

    config: RunConfig
    world: World
    data: Dataset
    held_out: Dataset | None
    sampler: Sampler
    model: Llama
    params: list[torch.nn.Parameter]
    """What is trained."""
    optimizer: torch.optim.Optimizer
    checkpoints: Checkpointer
    reporter: Reporter
    profiler: Profiler
    stop: StopFlag
    total: int
    """Optimizer steps of the whole run."""


def train(run: Run, start: int) -> None:
    """Takes the run from `start` steps done to its end.

    Raises SavedError on SIGTERM, after the step and a checkpoint, and NonFiniteLossError before a bad step is taken.
    """
    if start and _wants_validation(run, start) and (loss := validate(run, start)) is not None:
        run.checkpoints.measured(start, loss)  # a stop has left it out
    run.reporter.begin(start)
    with run.checkpoints, run.profiler:
        for step in range(start, run.total):
            done = step + 1
            run.profiler.begin(done)
            stopping = train_step(run, step)
            run.profiler.end(done)
            loss = validate(run, done) if _wants_validation(run, done) and not stopping else None
            if stopping or _wants_checkpoint(run, done, loss):
                run.reporter.flush()  # a lost machine must not take lines of steps that will not be done again
                status = run.checkpoints.save(done, run.model, run.optimizer, loss)
            if stopping:
                run.checkpoints.finish()
                raise SavedError(status)
            _tell_checkpoint(run)
    _tell_checkpoint(run)


def _tell_checkpoint(run: Run) -> None:
    if run.checkpoints.newest is not None:
        run.reporter.checkpoint(run.checkpoints.newest)


def train_step(run: Run, step: int) -> bool:
    """One optimizer step, counted from 0. Returns whether any rank was told to stop."""
    training = run.config.training
    rows = run.sampler.rows(step)
    # Every rank knows all rows, so the global weight costs no communication. A micro-batch's loss is a sum over its
    # label tokens or pairs; divided by their global count, gradients add up over micro-batches and ranks to those of
    # the mean over the whole batch. (FSDP averages over ranks by default; parallel.shard makes it add.)
    weight = _weight(run.data, rows)
    rate = learning_rate(step, run.total, training)
    set_learning_rate(run.optimizer, rate)
    passes = run.sampler.micro_batches(step, run.world.rank, run.world.size)
    if training.optimizer_in_backward and len(passes) > 1:
        raise ConfigError([_too_many_passes(len(passes))])
    shares = []
    for indices in passes:
        share = forward(run.model, run.world, run.data, indices, run.config.preference) / weight
        share[0].backward()  # type: ignore[no-untyped-call] # torch does not annotate it
        shares.append(share.detach())
    sums = torch.stack(shares).sum(dim=0).tolist()
    mean_loss, *measures, stops = all_sum(run.world, *sums, float(run.stop.requested))
    norm = (
        run.optimizer.take_norm()
        if isinstance(run.optimizer, InBackward)
        else clip_gradients(run.params, training.max_gradient_norm)
    )
    if not (math.isfinite(mean_loss) and math.isfinite(norm)):
        raise NonFiniteLossError(_not_finite(step + 1, mean_loss, norm, rate) + _suspects(run, passes, shares))
    run.optimizer.step()
    run.optimizer.zero_grad()
    tokens, labels = int(run.data.lengths[rows].sum()), int(run.data.label_counts[rows].sum())
    named = dict(zip(PREFERENCE_MEASURES, measures, strict=False))  # none without preferences
    run.reporter.step(Step(step + 1, mean_loss, rate, norm, tokens, labels, named))
    return stops > 0


def forward(
    model: Llama, world: World, data: Dataset, indices: Sequence[int], preferences: DPOConfig | None
) -> torch.Tensor:
    """The loss summed over what some rows weigh, in nats; 0 for none. [1]; with PREFERENCE_MEASURES [4]."""
    input_ids, labels, lengths = data.batch(indices)
    input_ids, labels = input_ids.to(world.device), labels.to(world.device)
    if preferences is not None:
        return preference(model, input_ids, labels, lengths, preferences)
    loss: torch.Tensor = model(input_ids, labels, lengths=lengths)
    return loss[None]


def _weight(data: Dataset, rows: Tokens) -> int:
    """What the loss of some rows is divided by: their label tokens, or pairs."""
    return len(rows) if data.pairs else int(data.label_counts[rows].sum())


def validate(run: Run, step: int) -> float | None:
    """The held-out loss after `step` steps, in nats per label token or pair. A restarted run keeps what it measured."""
    if run.held_out is None:
        return None
    known = broadcast_object(run.world, run.reporter.metrics.validation_loss(step))
    if known is not None:
        return known
    loss = mean_loss(run, run.held_out)
    run.reporter.validation(step, loss)
    return loss


def mean_loss(run: Run, data: Dataset) -> float:
    """The run's model on some data, as measure() has it."""
    return measure(run.model, run.world, data, run.config.training.batch_size, run.config.preference)


def measure(model: Llama, world: World, data: Dataset, batch_size: int, preferences: DPOConfig | None = None) -> float:
    """Mean loss per label token or pair, without dropout, in nats. All ranks must call it."""
    rows = np.arange(len(data), dtype=np.int32)
    total = torch.zeros((), dtype=torch.float64, device=world.device)
    training = model.training
    model.eval()
    with torch.no_grad():
        for indices in deal(rows, data.lengths, batch_size, world.rank, world.size):
            total += forward(model, world, data, indices, preferences)[0]
    model.train(training)
    (summed,) = all_sum(world, total.item())
    return summed / _weight(data, rows)


def _wants_validation(run: Run, done: int) -> bool:
    """The losses before the first and after the last step are measured outside the loop.

    Where the best checkpoint is kept, the loop needs the last one too.
    """
    every = run.config.validation.every_steps if run.config.validation else None
    if done == run.total:
        return run.config.checkpoint.keep_best
    return every is not None and 0 < done < run.total and done % every == 0


def _wants_checkpoint(run: Run, done: int, loss: float | None) -> bool:
    options = run.config.checkpoint
    if done == run.total or done % options.every_steps == 0:
        return True
    if options.every_epoch and done % run.sampler.steps_per_epoch == 0:
        return True
    if not options.keep_best or loss is None:
        return False
    best = run.checkpoints.best()
    return best is None or loss < best[1]


def _not_finite(step: int, loss: float, norm: float, rate: float) -> str:
    return (
        f"step {step} has loss {loss} and gradient norm {norm}, so nothing can be learnt any more: lower "
        f"training.learning_rate (it is {rate:g} here), set training.max_gradient_norm, or look for damaged rows"
    )


def _suspects(run: Run, passes: list[list[int]], shares: list[torch.Tensor]) -> str:
    """The rows of the micro-batches whose own loss is no number, or else of the whole batch."""
    mine = [row for rows, share in zip(passes, shares, strict=True) if not torch.isfinite(share[0]) for row in rows]
    bad = [row for rows in gather_objects(run.world, mine) for row in rows]
    whole = [row for rows in gather_objects(run.world, passes) for one in rows for row in one]
    places = run.data.places(sorted(bad or whole))
    more = f" and {len(places) - NAMED_ROWS} more" if len(places) > NAMED_ROWS else ""
    return f" among {', '.join(places[:NAMED_ROWS])}{more}"


def _too_many_passes(passes: int) -> str:
    return (
        f"training.optimizer_in_backward needs one forward pass per step, but this step takes {passes}: "
        "start as many processes as at the first start, or raise training.batch_size"
    )
