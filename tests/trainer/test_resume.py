"""A run that is killed in each of its steps ends with the same bits as one that was left alone."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.trainer.conftest import write_llama

from kubetune_contract.config import RunConfig
from kubetune_contract.exit_codes import ExitCode
from kubetune_contract.presets import merge
from kubetune_trainer import checkpoint, loop, train
from kubetune_trainer.checkpoint import Checkpointer
from kubetune_trainer.report import read_metrics

DEADLINE = 120.0
STEPS = 60

DRILL_STEPS = 12
"""Two epochs of 6 steps, saved after every third."""
DRILLS: dict[str, dict[str, Any]] = {
    "LoRA with dropout": {},
    "Full": {"method": "Full"},
    "DoRA": {"method": "DoRA"},
    "QLoRA": {"method": "QLoRA"},
    "DPO": {"dataset": {"format": "Preference"}},
    "LoRA, the best kept, written meanwhile": {
        "checkpoint": {"every_steps": 3, "every_epoch": True, "keep_best": True, "asynchronous": True}
    },
}
"""What is drilled, as changes of a LoRA run's configuration; a new method needs a line here and nothing else."""


def be_rank(environment: dict[str, str], config: RunConfig, log: Path, kill: int | None) -> None:
    """A worker as the launcher starts it, without the seconds that importing torch takes."""
    os.environ |= environment
    torch.set_num_threads(1)
    stream = log.open("a")
    os.dup2(stream.fileno(), 1)
    os.dup2(stream.fileno(), 2)
    if kill is not None:
        arm(kill)
    sys.exit(train.main(config))


def arm(kill: int) -> None:
    """This process kills itself in step `kill`: when it is taken, or in the middle of its save if there is one."""
    saves = kill % 3 == 0
    step, write = loop.train_step, Checkpointer._write

    def last_step(run: loop.Run, number: int) -> bool:
        stopping = step(run, number)
        if number + 1 == kill and not saves:
            os.kill(os.getpid(), signal.SIGKILL)
        return stopping

    def last_write(self: Checkpointer, tensors: Any, partial: Path, final: Path, manifest: dict[str, Any]) -> None:
        if manifest["step"] == kill and saves:
            if not self._world.is_main:
                os.kill(os.getpid(), signal.SIGKILL)
            checkpoint._complete = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        write(self, tensors, partial, final, manifest)

    loop.train_step = last_step
    Checkpointer._write = last_write  # type: ignore[method-assign]


class Ranks:
    """The processes of one attempt."""

    def __init__(self, context: Any, config: RunConfig, size: int, kills: Mapping[int, int] = {}) -> None:
        with closing(socket.socket()) as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.folder = Path(config.output_dir)
        self.log = self.folder.with_name(f"{self.folder.name}.log")
        self.processes = []
        for rank in range(size):
            environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "OMP_NUM_THREADS": 1}
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} if size > 1 else {}
            texts = {name: str(value) for name, value in environment.items()}
            arguments = (texts, config, self.log, kills.get(rank))
            self.processes.append(context.Process(target=be_rank, args=arguments))
        for process in self.processes:
            process.start()

    def until(self, holds: Callable[[], bool]) -> None:
        deadline = time.monotonic() + DEADLINE
        while not holds():
            assert time.monotonic() < deadline, f"it did not happen in time\n{self.log.read_text()}"
            alive = [process for process in self.processes if process.exitcode is None]
            assert alive, f"all ranks have ended: {self.log.read_text()}"
            time.sleep(0.001)

    def until_step(self, step: int) -> None:
        self.until(lambda: any(line["step"] >= step for line in read_metrics(self.folder / "metrics.jsonl")))

    def wait(self) -> list[int]:
        for process in self.processes:
            process.join(DEADLINE)
        return [process.exitcode for process in self.processes]

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


Start = Callable[..., Ranks]


@pytest.fixture
def start(forkserver: Any) -> Iterator[Start]:
    attempts: list[Ranks] = []

    def begin(config: RunConfig, size: int = 1, kills: Mapping[int, int] = {}) -> Ranks:
        attempts.append(Ranks(forkserver, config, size, kills))
        return attempts[-1]

    yield begin
    for attempt in attempts:
        attempt.kill()


def configure(base: RunConfig, name: str, method: str = "LoRA", ranks: int = 1) -> RunConfig:
    """60 steps in batches of 4 sequences, whatever the number of ranks."""
    assert base.validation is not None
    return base.model_copy(
        update={
            "method": method,
            "adapter": base.adapter if method == "LoRA" else None,
            "training": base.training.model_copy(update={"epochs": 5, "gradient_accumulation_steps": 2 // ranks}),
            "validation": base.validation.model_copy(update={"every_steps": 7}),
            "output_dir": str(Path(base.output_dir).with_name(name)),
        }
    )


def results(config: RunConfig) -> dict[str, Any]:
    """All that a run leaves, except when it was."""
    folder = Path(config.output_dir)
    timeless = ("time", "tokens_per_second", "label_tokens_per_second")
    lines = read_metrics(folder / "metrics.jsonl")
    weights = folder / ("model/model.safetensors" if config.lora is None else "adapter/adapter_model.safetensors")
    return {
        "weights": weights.read_bytes(),
        "metrics": [{key: value for key, value in line.items() if key not in timeless} for line in lines],
        "samples": json.loads((folder / "samples.json").read_text()),
        "result": json.loads((folder / "result.json").read_text()),
        "checkpoints": sorted(path.name for path in (folder / "checkpoints").iterdir()),
    }


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    different = [name for name, value in one.items() if value != other[name]]
    assert different == []


def as_preference(line: str) -> str:
    """The row's answer, preferred to a wrong one of another length."""
    question, answer = (turn["content"] for turn in json.loads(line)["messages"])
    return json.dumps({"prompt": question, "chosen": answer, "rejected": f"no, {answer}"})


def drill(base: RunConfig, name: str, changes: dict[str, Any], ranks: int) -> RunConfig:
    """12 steps in 2 epochs, each of 4 rows in 2 passes, whatever the number of ranks."""
    rows = Path(base.dataset.path).with_name("drill.jsonl")
    lines = Path(base.dataset.path).read_text().splitlines()[:24]
    preferences = changes.get("dataset") == {"format": "Preference"}
    rows.write_text("".join(f"{as_preference(line) if preferences else line}\n" for line in lines))
    values: dict[str, Any] = {
        "dataset": {"path": str(rows)},
        "training": {"epochs": 2, "batch_size": 2 // ranks},
        "validation": {"every_steps": 4, "samples": 1},
        "checkpoint": {"every_steps": 3},
        "adapter": None if changes.get("method") == "Full" else base.model_dump()["adapter"],
        "output_dir": str(Path(base.output_dir).with_name(name)),
    }
    if preferences:
        values["validation"]["path"] = str(rows)
    if changes.get("method") == "QLoRA":  # NF4 needs rows of whole blocks
        model = write_llama(rows.with_name("wide"), hidden_size=128, intermediate_size=192, num_attention_heads=4)
        values["model"] = {"path": str(model)}
    return RunConfig.model_validate(merge(merge(base.model_dump() | {"adapter": None}, values), changes))


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("case", DRILLS)
def test_a_kill_in_every_step_changes_no_bit(case: str, ranks: int, training_run: RunConfig, start: Start) -> None:
    """One run, killed in step 1, started again, killed in step 2, ...: every attempt but the last is cut off."""
    undisturbed = drill(training_run, "undisturbed", DRILLS[case], ranks)
    assert start(undisturbed, ranks).wait() == [0] * ranks
    config = drill(training_run, "killed", DRILLS[case], ranks)
    for step in range(1, DRILL_STEPS + 1):
        victim = step % ranks
        attempt = start(config, ranks, {victim: step})
        codes = attempt.wait()
        assert codes.pop(victim) == -signal.SIGKILL, attempt.log.read_text()
        assert codes == [ExitCode.PEER_LOST] * (ranks - 1), attempt.log.read_text()
    last = start(config, ranks)
    assert last.wait() == [0] * ranks, last.log.read_text()
    expected, got = results(undisturbed), results(config)
    assert_same(expected, got)
    steps = [line["step"] for line in got["metrics"] if "loss" in line]
    assert steps == list(range(1, DRILL_STEPS + 1)), "each step exactly once"
    assert [line["step"] for line in got["metrics"] if "validation_loss" in line] == [0, 4, 8, 12]


@pytest.mark.parametrize("ranks", [1, 2])
def test_sigterm_to_one_rank_saves_the_step_on_all(ranks: int, training_run: RunConfig, start: Start) -> None:
    undisturbed = configure(training_run, "undisturbed", ranks=ranks)
    assert start(undisturbed, ranks).wait() == [0] * ranks
    config = configure(training_run, "stopped", ranks=ranks)
    for step in (2, 18):
        attempt = start(config, ranks)
        attempt.until_step(step)
        attempt.processes[-1].terminate()
        assert attempt.wait() == [ExitCode.SAVED] * ranks
        done = max(line["step"] for line in read_metrics(attempt.folder / "metrics.jsonl"))
        assert (attempt.folder / "checkpoints" / f"step-{done:08}").is_dir()
        assert (
            f"error: stopped by SIGTERM, saved after step {done} in checkpoints/step-{done:08}"
            in attempt.log.read_text()
        )
    assert start(config, ranks).wait() == [0] * ranks
    expected, got = results(undisturbed), results(config)
    del expected["checkpoints"], got["checkpoints"]
    assert_same(expected, got)


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
@pytest.mark.parametrize("case", ["LoRA", "Full", "DoRA", "QLoRA", "DPO"])
def test_another_number_of_ranks_goes_on_to_the_same_losses(
    case: str, before: int, after: int, training_run: RunConfig, start: Start
) -> None:
    """Without dropout, whose masks are each rank's own. The bar is that of two ranks against one."""
    changes = merge(DRILLS.get(case, {}), {} if case == "Full" else {"adapter": {"dropout": 0.0}})

    def on(ranks: int, name: str) -> RunConfig:
        batches = {"training": {"batch_size": 1, "gradient_accumulation_steps": 4 // ranks}}
        return drill(training_run, name, merge(changes, batches), ranks)

    undisturbed, moved = on(1, "undisturbed"), on(before, "moved")
    assert start(undisturbed).wait() == [0]
    attempt = start(moved, before, {0: 7})
    assert attempt.wait()[0] == -signal.SIGKILL, attempt.log.read_text()
    last = start(moved, after)
    assert last.wait() == [0] * after, last.log.read_text()
    processes = "1 process" if before == 1 else "2 processes"
    assert f"resuming    after step 6 of 12; the checkpoint was saved by {processes}" in last.log.read_text()
    expected, got = (
        [line["loss"] for line in results(config)["metrics"] if "loss" in line] for config in (undisturbed, moved)
    )
    assert len(got) == DRILL_STEPS
    assert got == pytest.approx(expected, abs=1e-5)


def test_the_launcher_passes_a_stop_on_and_a_second_start_finishes(training_run: RunConfig, start: Start) -> None:
    """The whole chain of a pod, once: launcher, two workers, SIGTERM, exit code, resume, done."""
    undisturbed = configure(training_run, "undisturbed", ranks=2)
    assert start(undisturbed, 2).wait() == [0, 0]
    config = configure(training_run, "launched", ranks=2)
    folder = Path(config.output_dir)
    file = folder.with_name("run.json")
    file.write_text(config.to_json())
    command = [sys.executable, "-m", "kubetune_trainer", "launch", "--config", str(file)]
    environment = os.environ | {"PET_NPROC_PER_NODE": "2", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as launcher:
        deadline = time.monotonic() + DEADLINE
        while not any(line["step"] >= 5 for line in read_metrics(folder / "metrics.jsonl")):
            assert launcher.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.001)
        launcher.send_signal(signal.SIGTERM)
        launcher.communicate(timeout=DEADLINE)
        assert launcher.returncode == ExitCode.SAVED
    assert not (folder / "result.json").exists()
    subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, timeout=DEADLINE)
    expected, got = results(undisturbed), results(config)
    del expected["checkpoints"], got["checkpoints"]
    assert_same(expected, got)
