"""Checkpoints that are complete or absent.

A checkpoint holds the trainable parameters, the optimizer's state, the random state of every rank and the caller's own
values; the frozen weights are the base model's. It is written under a temporary name, brought to the disk, given a
manifest with the size and the checksum of every file, and renamed: a kill at any moment leaves a whole checkpoint or
none, and one that has changed on the disk since is not resumed from.
"""

import io
import json
import os
import shutil
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Self

import torch
import torch.distributed as dist

from kubetune_contract.exit_codes import ExitCode, JobError
from kubetune_contract.paths import CHECKPOINTS_DIR
from kubetune_contract.progress import CheckpointStatus
from kubetune_trainer.checksums import SUMS, file_sum, sum_of, summing_writer
from kubetune_trainer.distributed import World, barrier, broadcast_object, gather_objects, sharded_modules
from kubetune_trainer.shards import sync

MANIFEST_FILE: Final = "manifest.json"
_PARTIAL: Final = ".partial-"


class WorldSizeError(JobError):
    """The optimizer's state fits only the number of processes that has saved it."""

    exit_code = ExitCode.INVALID_CONFIG


class Checkpointer:
    """The checkpoints of a run in `<output>/checkpoints/step-<8 digits>`.

    All methods but finish() are collective. Used as a context, it leaves when nothing is being written any more.
    """

    def __init__(
        self, output: Path, keep: int, world: World, *, keep_best: bool = False, asynchronous: bool = False
    ) -> None:
        self._output = output
        self._folder = output / CHECKPOINTS_DIR
        self._keep, self._keep_best = keep, keep_best
        self._world = world
        self._asynchronous = asynchronous
        # Its own group: messages of a save must not mix with those of the steps that go on meanwhile.
        self._group = dist.new_group(backend="gloo") if asynchronous and world.size > 1 else None
        self._writer: _Writer | None = None
        self.newest: CheckpointStatus | None = None
        """The newest one that this process knows to be complete."""

    def latest(self) -> Path | None:
        """The newest complete checkpoint. What a killed save has left behind, or what has changed since, is removed."""
        if self._world.is_main and self._folder.is_dir():
            for path in self._folder.iterdir():
                if not is_complete(path):
                    shutil.rmtree(path)
        while True:
            newest: Path | None = None
            if self._world.is_main and self._folder.is_dir():
                newest = max(self._folder.iterdir(), default=None)
            newest = broadcast_object(self._world, newest)
            if newest is None or self._is_unchanged(newest):
                return newest
            if self._world.is_main:
                print(
                    f"checkpoint  {newest.name} is damaged: it is removed, and the one before it is taken", flush=True
                )
                shutil.rmtree(newest)

    def _is_unchanged(self, path: Path) -> bool:
        """Whether the files have the checksums of the manifest: each rank reads its share of them, all know."""
        sums: dict[str, int] = _manifest(path).get("checksums", {})
        share = sorted(sums)[self._world.rank :: self._world.size]
        return all(gather_objects(self._world, all(file_sum(path / name) == sums[name] for name in share)))

    def best(self) -> tuple[Path, float] | None:
        """The complete checkpoint with the lowest held-out loss, and that loss; the earlier one of equals.

        One that is being written counts: it is waited for.
        """
        self.finish()
        return broadcast_object(self._world, self._find_best() if self._world.is_main else None)

    def save(
        self, step: int, model: torch.nn.Module, optimizer: torch.optim.Optimizer, loss: float | None = None
    ) -> CheckpointStatus:
        """Saves after `step` steps, with the held-out `loss` if it is known, and drops what is not to be kept.

        Returns what will be true: at once, or, where checkpoints are written while training goes on, after finish().
        """
        self.finish()
        final = self._folder / f"step-{step:08}"
        partial = self._folder / f"{_PARTIAL}{final.name}"
        if self._world.is_main:
            _make_empty(partial)
        barrier(self._world)
        _write_synced(partial / f"random-{self._world.rank}.pt", _random_state(self._world))
        manifest = {"step": step, "world_size": self._world.size, "validation_loss": loss}
        tensors = _tensors(model, optimizer, self._world)
        if self._asynchronous:
            copies = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
            self._writer = _Writer(lambda: self._write(copies, partial, final, manifest))
        else:
            self._write(tensors, partial, final, manifest)
            barrier(self._world)
        return CheckpointStatus(step=step, path=str(final.relative_to(self._output)), time=datetime.now(UTC))

    def finish(self) -> None:
        """Waits for the checkpoint that is being written; raises what has kept it from being written."""
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.finish()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """A run that ends with an error tells that one, not what the writing has met because of it."""
        try:
            self.finish()
        except Exception:
            if kind is None:
                raise

    def measured(self, step: int, loss: float) -> None:
        """Adds a held-out loss that was not known when the checkpoint was saved; nothing where there is none."""
        path = self._folder / f"step-{step:08}"
        if self._world.is_main and is_complete(path) and _manifest(path).get("validation_loss") != loss:
            write_file(path / MANIFEST_FILE, _as_json(_manifest(path) | {"validation_loss": loss}))
            self._drop_old()

    def load(self, path: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> tuple[int, str | None]:
        """Puts everything back and returns the steps done, with a note where the number of ranks has changed.

        Then the random state starts anew from the step, and sums are rounded in another order. Raises WorldSizeError
        where the optimizer's state cannot be cut for this number.
        """
        from torch.distributed.checkpoint.filesystem import FileSystemReader
        from torch.distributed.checkpoint.state_dict_loader import load

        manifest = _manifest(path)
        step, saved_by = manifest["step"], manifest["world_size"]
        if saved_by != self._world.size and _by_rank(optimizer):
            raise WorldSizeError(
                f"{path} was saved by {saved_by} processes, and an 8-bit optimizer's state cannot be cut anew for "
                f"{self._world.size}: start {saved_by} processes, or remove that checkpoint"
            )
        _create_state(optimizer)
        tensors = _tensors(model, optimizer, self._world)
        with _plain_failures():
            alone = self._world.size == 1
            load(tensors, storage_reader=FileSystemReader(path), no_dist=alone)
        for name, state, key in _states(model, optimizer, self._world):
            if not isinstance(state[key], torch.Tensor):
                state[key] = type(state[key])(tensors[name].item())
        if saved_by == self._world.size:
            _set_random_state(path / f"random-{self._world.rank}.pt", self._world)
            return step, None
        torch.manual_seed(hash((step, self._world.rank)))
        return step, (
            f"the checkpoint was saved by {saved_by} processes and goes on with {self._world.size}: the same batches, "
            "but dropout is drawn anew and sums are rounded in another order"
        )

    def _write(self, tensors: dict[str, torch.Tensor], partial: Path, final: Path, manifest: dict[str, Any]) -> None:
        """Rank 0 returns from torch's save only when every rank has written its part."""
        from torch.distributed.checkpoint.state_dict_saver import save

        with _plain_failures():
            alone = self._world.size == 1
            save(tensors, storage_writer=summing_writer(partial), process_group=self._group, no_dist=alone)
        if self._world.is_main:
            _complete(partial, final, manifest)
            self._drop_old()
            self.newest = status_of(final, self._output)

    def _drop_old(self) -> None:
        complete = sorted(self._folder.glob("step-*"))
        best = self._find_best() if self._keep_best else None
        for path in complete[: -self._keep]:
            if best is None or path != best[0]:
                doomed = path.rename(path.with_name(f"{_PARTIAL}{path.name}"))
                shutil.rmtree(doomed)

    def _find_best(self) -> tuple[Path, float] | None:
        losses = [(path, _manifest(path).get("validation_loss")) for path in sorted(self._folder.glob("step-*"))]
        known = [(path, loss) for path, loss in losses if loss is not None]
        return min(known, key=lambda one: one[1], default=None)


class _Writer(threading.Thread):
    """Does something meanwhile."""

    def __init__(self, act: Callable[[], None]) -> None:
        super().__init__(name="checkpoint", daemon=True)
        self._act = act
        self._error: BaseException | None = None
        self.start()

    def run(self) -> None:
        """In the thread."""
        try:
            self._act()
        except BaseException as error:  # noqa: BLE001 - finish() raises it
            self._error = error

    def finish(self) -> None:
        """Waits; raises what went wrong."""
        self.join()
        if self._error is not None:
            raise self._error


def status_of(path: Path, output: Path) -> CheckpointStatus:
    """What to tell of a complete checkpoint."""
    written = datetime.fromtimestamp((path / MANIFEST_FILE).stat().st_mtime, UTC)
    return CheckpointStatus(step=_manifest(path)["step"], path=str(path.relative_to(output)), time=written)


def is_complete(path: Path) -> bool:
    """Whether the folder is a checkpoint whose files all have the size that its manifest names."""
    if path.name.startswith(_PARTIAL):
        return False
    try:
        files: dict[str, int] = _manifest(path)["files"]
        return all((path / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError, KeyError):
        return False


def _manifest(path: Path) -> dict[str, Any]:
    """Raises ValueError where it is not what was written. One without checksums is of an earlier version."""
    manifest: dict[str, Any] = json.loads((path / MANIFEST_FILE).read_bytes())
    own = manifest.pop("checksum", None)
    if own != sum_of(manifest) and not (own is None and "checksums" not in manifest):
        raise ValueError(f"{path / MANIFEST_FILE} has changed since it was written")
    return manifest


def _as_json(manifest: dict[str, Any]) -> bytes:
    return json.dumps(manifest | {"checksum": sum_of(manifest)}, indent=1).encode()


def _complete(partial: Path, final: Path, manifest: dict[str, Any]) -> None:
    """Manifest last, then the name: from here on the checkpoint exists."""
    sums: dict[str, int | None] = {}
    for part in partial.glob(f"*{SUMS}"):
        sums |= json.loads(part.read_text())
        part.unlink()
    files = {file.name: file.stat().st_size for file in sorted(partial.iterdir())}
    sums |= {name: file_sum(partial / name) for name in files if name not in sums}
    _write_synced(partial / MANIFEST_FILE, _as_json(manifest | {"files": files, "checksums": sums}))
    sync(partial)
    partial.rename(final)
    sync(final.parent)


def _tensors(model: torch.nn.Module, optimizer: torch.optim.Optimizer, world: World) -> dict[str, torch.Tensor]:
    """Flat names, the same under any number of ranks: `model.<name>`, `optimizer.<name>.exp_avg`, ..."""
    _reshard(model)
    tensors: dict[str, torch.Tensor] = {
        f"model.{name}": param for name, param in model.named_parameters() if param.requires_grad
    }
    return tensors | {name: torch.as_tensor(state[key]) for name, state, key in _states(model, optimizer, world)}


def _states(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, world: World
) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Each value of the optimizer's state: its name in a checkpoint, the dictionary and the key where it is held."""
    suffix = f".{world.rank}" if _by_rank(optimizer) else ""
    for name, param in model.named_parameters():
        if param.requires_grad:
            state = optimizer.state[param]
            assert state or suffix, f"{name} has been trained, so the optimizer has a state for it"
            # bitsandbytes' table of 256 numbers is the same for all parameters and never changes.
            yield from ((f"optimizer.{name}.{key}{suffix}", state, key) for key in state if "qmap" not in key)


def _by_rank(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the state belongs to this number of processes (see optim.RowsOptimizer)."""
    return getattr(optimizer, "by_rank", False)


def _reshard(model: torch.nn.Module) -> None:
    """After a forward pass without a backward pass (validation) FSDP leaves whole copies in its parameters' places."""
    for module in sharded_modules(model):
        module.reshard()


def _create_state(optimizer: torch.optim.Optimizer) -> None:
    """A step with rate 0 over zero gradients makes the optimizer create its tensors and changes no weight."""
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for param in group["params"]:
            param.grad = torch.zeros_like(param)
    optimizer.step()
    optimizer.zero_grad()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


@contextmanager
def _plain_failures() -> Iterator[None]:
    """torch's CheckpointException is no Exception and hides the cause: the first rank's cause is raised instead.

    Its warning that a lone process saves alone is no news.
    """
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
            yield
    except CheckpointException as error:
        cause, _ = next(iter(error.failures.values()))
        raise cause from error


def _random_state(world: World) -> bytes:
    state = {"cpu": torch.get_rng_state()}
    if world.device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(world.device)
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def _set_random_state(path: Path, world: World) -> None:
    state = torch.load(path, weights_only=True)
    torch.set_rng_state(state["cpu"])
    if world.device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], world.device)


def write_file(path: Path, content: bytes) -> None:
    """Replaces a file: the old content or the new one, whole and on the disk."""
    scratch = path.with_name(f".{path.name}.tmp")
    _write_synced(scratch, content)
    scratch.replace(path)
    sync(path.parent)


def _make_empty(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)


def _write_synced(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
