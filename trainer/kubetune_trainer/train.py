"""One run from its configuration to its results, in numbered stages. This module alone composes the others."""

import os
import sys
import traceback
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
import yaml

from kubetune_contract.config import RunConfig
from kubetune_contract.dataset import DatasetConfig, MixedDataset
from kubetune_contract.exit_codes import ExitCode
from kubetune_contract.fit import check_memory
from kubetune_contract.paths import (
    ADAPTER_DIR,
    CONFIG_FILE,
    LOSS_PICTURE,
    MERGED_DIR,
    MODEL_DIR,
    RESULT_FILE,
    SAMPLES_FILE,
)
from kubetune_contract.progress import Result, TerminationMessage
from kubetune_trainer import distributed
from kubetune_trainer.cache import cache_folder
from kubetune_trainer.checkpoint import Checkpointer, status_of, write_file
from kubetune_trainer.claim import claim, digest_files
from kubetune_trainer.data import Dataset, describe, load_data, load_questions, validation_source
from kubetune_trainer.distributed import SharedError, World, broadcast_object, together
from kubetune_trainer.export import export_adapter, export_model
from kubetune_trainer.failures import as_job_error, last_lines
from kubetune_trainer.formats import Question
from kubetune_trainer.hub import WeightReader, check_model
from kubetune_trainer.loggers import check_loggers, make_loggers
from kubetune_trainer.loop import Run, SavedError, StopFlag, train, validate
from kubetune_trainer.model import Llama
from kubetune_trainer.optim import check_optimizer, effective_warmup, make_optimizer
from kubetune_trainer.parallel import build, check_compiler, notes
from kubetune_trainer.peft import trainable
from kubetune_trainer.precision import choose_precision
from kubetune_trainer.profiler import Profiler
from kubetune_trainer.report import Poster, Reporter, write_termination
from kubetune_trainer.samples import samples_after, samples_before
from kubetune_trainer.sampling import Sampler
from kubetune_trainer.sources import origin_of, pin
from kubetune_trainer.tokenizer import Tokenizer

_PRECISIONS: Final = {torch.bfloat16: "BF16", torch.float32: "FP32"}

_MAY_CHANGE: Final = frozenset({"activation_checkpointing", "compile", "cpu_offload", "sharding"})
"""Fields of training that trade memory for time: a later attempt may set them otherwise."""


class Inputs(NamedTuple):
    """What was read."""

    tokenizer: Tokenizer
    data: Dataset
    held_out: Dataset | None
    questions: list[Question]


def main(config: RunConfig) -> int:
    """Be one process of the run. Returns the exit code; an error is told to people and in the termination message."""
    stop = StopFlag.on_sigterm()
    try:
        world = distributed.start()
        result = run(config, world, stop)
        distributed.stop()
    except Exception as error:  # noqa: BLE001 - whatever it is, the container must say it
        return _tell_failure(error, config)
    if world.is_main:
        write_termination(TerminationMessage(reason=ExitCode.DONE.reason, message=_story(result), result=result))
    return ExitCode.DONE


def run(config: RunConfig, world: World, stop: StopFlag) -> Result:
    """The whole run; every rank calls it and gets the result. Raises JobError."""
    folder = Path(config.output_dir)
    # 1. The model's files are whole, and the output folder is ours. Whatever is wrong is found before memory is taken.
    reader = together(world, lambda: _check(config, world))
    first = broadcast_object(world, together(world, lambda: _claim(config, reader, world)))
    if (finished := _finished(folder, world)) is not None:
        _say(world, f"this run has finished already, its results are in {folder}")
        return finished
    # 2. The data, as tokens.
    tokenizer, data, held_out, questions = inputs = together(world, lambda: _read(config, first))
    # 3. Who does what in which step.
    sampler = Sampler(
        data.lengths,
        first["global_batch"],
        config.training.batch_size,
        config.training.seed,
        config.dataset.shuffle,
        data.shares,
    )
    total = min(config.training.epochs * sampler.steps_per_epoch, config.training.max_steps or sys.maxsize)
    _say(world, _plan_text(config, world, inputs, sampler, total))
    _check_fits(config, reader, world, data)
    # 4. The model and its optimizer. Ranks draw their dropout from seeds of their own.
    torch.manual_seed(config.training.seed + world.rank)
    fixed = config.training.model_copy(update={"precision": first["precision"]})
    model = build(config.model_copy(update={"training": fixed}), reader, world)
    params = trainable(model)
    optimizer = make_optimizer(params.values(), config.training)
    _say(world, _model_text(config, model, params, first["precision"], choose_precision(config, world.device)))
    # 5. Where an earlier attempt has come to.
    saving = config.checkpoint
    checkpoints = Checkpointer(folder, saving.keep, world, keep_best=saving.keep_best, asynchronous=saving.asynchronous)
    profiler = Profiler(config.profiler, folder, world)
    poster = Poster.from_env() if world.is_main else None
    loggers = make_loggers(config, folder, world, first["started"])
    with Reporter(folder, world, total, sampler.steps_per_epoch, poster=poster, loggers=loggers) as reporter:
        trained = list(params.values())
        state = Run(
            config,
            world,
            data,
            held_out,
            sampler,
            model,
            trained,
            optimizer,
            checkpoints,
            reporter,
            profiler,
            stop,
            total,
        )
        start = _resume(state)
        # 6. What the model knows before the first step.
        if start == 0:
            validate(state, 0)
        samples = samples_before(state, tokenizer, questions, start)
        # 7. The loop.
        train(state, start)
        # 8. What it knows now.
        validate(state, total)
        exported = _take_best(state)
        samples_after(state, tokenizer, questions, samples)
        # 9. The results; the file that says so comes last.
        result = _export(state, reader)
        return _finish(state, exported, result)


# --- 1. and 2. inputs ---


def _check(config: RunConfig, world: World) -> WeightReader:
    """Whatever can be found wrong without data and weights."""
    check_optimizer(config.training, world.device)
    check_compiler(config.training)
    check_loggers(config.logging)
    return check_model(Path(config.model.path))


def _claim(config: RunConfig, reader: WeightReader, world: World) -> dict[str, Any]:
    """What rank 0 fixes at the first start of the run, for all ranks and whatever machines a later attempt gets:

    the date, the sequences per step, the number format, and the commits of data on the hub.
    """
    if not world.is_main:
        return {}
    folder = Path(config.output_dir)
    training = config.training

    def fixed() -> dict[str, Any]:
        dtype, _ = choose_precision(config, world.device)
        return {
            "started": datetime.now().isoformat(),
            "global_batch": training.batch_size * training.gradient_accumulation_steps * world.size,
            "precision": _PRECISIONS[dtype],
            "commits": pin(config.dataset.sources),
        }

    first = claim(folder, _identity(config, reader), fixed)
    write_file(
        folder / CONFIG_FILE,
        yaml.safe_dump(config.model_dump(mode="json", exclude_none=True), sort_keys=False).encode(),
    )
    return first


def _identity(config: RunConfig, reader: WeightReader) -> dict[str, Any]:
    """What must not change between the attempts of a run."""
    values = config.model_dump(mode="json")
    lora = config.lora
    return {
        "method": config.method,
        "model": digest_files(reader.folder, reader.files()),
        "dataset": _content(config.dataset) | {"mixture": [_content(other) for other in config.dataset.mixture]},
        "validation": _held_out_identity(config),
        "adapter": lora.model_dump(mode="json") if lora else None,
        "quantization": config.quantized.model_dump(mode="json") if config.quantized else None,
        "dpo": config.preference.model_dump(mode="json") if config.preference else None,
        "training": {key: value for key, value in values["training"].items() if key not in _MAY_CHANGE},
    }


def _content(source: DatasetConfig | MixedDataset) -> dict[str, Any]:
    """A dataset with its content in place of its path or repository."""
    if source.repo is not None:  # claim() pins its commit
        return source.model_dump(mode="json", exclude={"path", "mixture", "max_bad_rows"})
    values = source.model_dump(mode="json", exclude={"path", "repo", "revision", "split", "mixture", "max_bad_rows"})
    return values | {"path": origin_of(source, {}).digest()}


def _held_out_identity(config: RunConfig) -> str | float | None:
    if config.validation is None:
        return None
    if config.validation.fraction is not None:
        return config.validation.fraction
    return origin_of(validation_source(config.validation, config.dataset), {}).digest()


def _read(config: RunConfig, first: Mapping[str, Any]) -> Inputs:
    tokenizer = Tokenizer.from_folder(Path(config.model.path), datetime.fromisoformat(first["started"]))
    data = load_data(config, tokenizer, cache_folder(Path(config.output_dir)), first["commits"])
    count = config.validation.samples if config.validation else 0
    parts = data.held_out.parts if data.held_out else ()
    questions = load_questions(parts, count, config.dataset, tokenizer)
    return Inputs(tokenizer, data.training, data.held_out, questions)


def _finished(folder: Path, world: World) -> Result | None:
    path = folder / RESULT_FILE
    text = broadcast_object(world, path.read_text() if world.is_main and path.exists() else None)
    return Result.model_validate_json(text) if text is not None else None


def _check_fits(config: RunConfig, reader: WeightReader, world: World, data: Dataset) -> None:
    """Host memory is not judged: others share it, and it may be swapped."""
    if world.device.type == "cuda":
        _, memory = torch.cuda.mem_get_info(world.device)
        longest = int(data.lengths.max())
        check_memory(config, reader.config(), world.size, world.local_size, memory=memory, longest=longest)


# --- 5. resume ---


def _resume(state: Run) -> int:
    """Puts the newest checkpoint back and returns the steps done."""
    path = state.checkpoints.latest()
    start, note = state.checkpoints.load(path, state.model, state.optimizer) if path else (0, None)
    state.reporter.rewind(start)
    if path is not None:
        state.reporter.checkpoint(status_of(path, state.reporter.folder))
        state.reporter.say(f"resuming    after step {start} of {state.total}" + (f"; {note}" if note else ""))
    return start


def _take_best(state: Run) -> int:
    """Where the best checkpoint is kept, it is what is exported. Returns the step after which the export was saved."""
    best = state.checkpoints.best() if state.config.checkpoint.keep_best else None
    if best is None:
        return state.total
    path, loss = best
    step = status_of(path, state.reporter.folder).step
    if step != state.total:
        state.checkpoints.load(path, state.model, state.optimizer)
    state.reporter.say(f"best        after step {step}, with validation loss {loss:.4f}: this is exported")
    return step


# --- 9. results ---


def _export(state: Run, reader: WeightReader) -> dict[str, str]:
    """Writes the weights; returns the fields of the Result that name them."""
    config, folder = state.config, state.reporter.folder
    if config.lora is None:
        export_model(state.model, reader.folder, folder / MODEL_DIR, state.world)
        return {"model_path": MODEL_DIR}
    export_adapter(state.model, config, folder / ADAPTER_DIR, state.world)
    if not config.export.merged:
        return {"adapter_path": ADAPTER_DIR}
    export_model(state.model, reader.folder, folder / MERGED_DIR, state.world)
    return {"adapter_path": ADAPTER_DIR, "merged_path": MERGED_DIR}


def _finish(state: Run, exported: int, weights: dict[str, str]) -> Result:
    """Draws, sums up and writes the result on rank 0; every rank waits for it."""
    state.reporter.draw()
    result = None
    if state.world.is_main:
        metrics, folder = state.reporter.metrics, state.reporter.folder
        result = Result(
            samples_path=SAMPLES_FILE if (folder / SAMPLES_FILE).exists() else None,
            loss_picture_path=LOSS_PICTURE,
            final_loss=metrics.last_loss(),
            initial_validation_loss=metrics.validation_loss(0),
            final_validation_loss=metrics.validation_loss(exported),
            steps=state.total,
            tokens=sum(int(state.data.lengths[state.sampler.rows(step)].sum()) for step in range(state.total)),
            **weights,
        )
        write_file(folder / RESULT_FILE, result.to_json(indent=2).encode())
        state.reporter.say(_story(result) + f" in {folder}")
    shared: Result = broadcast_object(state.world, result)  # type: ignore[assignment] # rank 0 has one
    return shared


# --- what is told ---


def _say(world: World, text: str) -> None:
    if world.is_main:
        print(text, flush=True)


def _plan_text(config: RunConfig, world: World, inputs: Inputs, sampler: Sampler, total: int) -> str:
    training = config.training
    per_epoch = sampler.steps_per_epoch
    epochs = "1 epoch" if training.epochs == 1 else f"{training.epochs} epochs"
    _, warmup_note = effective_warmup(total, training)
    lines = [
        f"model       {config.model.path}",
        f"data        {describe(inputs.data, config.dataset)}",
        f"validation  {describe(inputs.held_out, config.dataset)}" if inputs.held_out else "",
        f"processes   {world.size} on {world.device.type}",
        f"steps       {total} in batches of {sampler.global_batch} ({epochs} of {per_epoch} steps"
        + (", cut by training.max_steps)" if total < training.epochs * per_epoch else ")"),
        *(f"note        {note}" for note in (warmup_note, *notes(config, world)) if note),
        f"output      {config.output_dir}",
    ]
    return "\n".join(line for line in lines if line)


def _model_text(
    config: RunConfig,
    model: Llama,
    params: dict[str, torch.nn.Parameter],
    precision: str,
    choice: tuple[torch.dtype, str],
) -> str:
    trained = sum(param.numel() for param in params.values())
    lora, (dtype, why) = config.lora, choice
    # Not counted in the model: a packed parameter holds two weights in an element.
    everything = model.config.parameters + (trained if lora else 0)
    how = (
        f"{config.method}, rank {lora.rank}, alpha {lora.alpha:g}, on {', '.join(lora.target_modules)}"
        if lora
        else "Full"
    )
    return (
        f"method      {how}\n"
        f"trainable   {trained:,} of {everything:,} parameters ({100 * trained / everything:.1f} %)\n"
        f"precision   {why if _PRECISIONS[dtype] == precision else f'{precision}, as at the first start (here {why})'}"
    )


def _story(result: Result) -> str:
    loss = f", training loss {result.final_loss:.4f}" if result.final_loss is not None else ""
    if result.initial_validation_loss is not None and result.final_validation_loss is not None:
        loss += f", validation loss {result.initial_validation_loss:.4f} -> {result.final_validation_loss:.4f}"
    paths = [path for path in (result.adapter_path, result.model_path, result.merged_path) if path]
    return f"trained {result.steps} steps{loss}; results: {', '.join(paths)}"


def _tell_failure(error: Exception, config: RunConfig) -> int:
    """To people on stderr, to the operator in the termination message. Returns the exit code."""
    known, log = as_job_error(error, config), None
    rank = os.environ.get("RANK", "0")
    if known.exit_code == ExitCode.CRASH:
        traceback.print_exception(error)
        log = last_lines(error)
    if rank == "0" or not isinstance(known, SharedError | SavedError):
        print(f"error: {known}" if rank == "0" else f"error on rank {rank}: {known}", file=sys.stderr, flush=True)
    checkpoint = known.status if isinstance(known, SavedError) else None
    word = TerminationMessage(reason=known.exit_code.reason, message=str(known), log=log, checkpoint=checkpoint)
    write_termination(word)
    return known.exit_code
