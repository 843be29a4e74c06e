"""Checkpoints that are complete or absent, and the claim of one run on its output folder.

A checkpoint holds the trainable parameters, the optimizer's state, the random state of every rank and the caller's own
values; the frozen weights are the base model's. It is written under a temporary name, brought to the disk, given a
manifest with the size of every file, and renamed: a kill at any moment leaves a whole checkpoint or none.
"""

import errno
import io
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

import torch

from kubetune_contract.exit_codes import ExitCode, JobError
from kubetune_contract.paths import CHECKPOINTS_DIR, METRICS_FILE, RESULT_FILE, SAMPLES_FILE
from kubetune_contract.progress import CheckpointStatus
from kubetune_trainer.distributed import World, barrier, broadcast_object

MANIFEST_FILE: Final = "manifest.json"
IDENTITY_FILE: Final = "identity.json"
"""In the output folder: what decides the run."""
_PARTIAL: Final = ".partial-"
_DIGEST_EDGE: Final = 1 << 20
_NOT_WRITABLE: Final = frozenset(
    {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR, errno.EEXIST}
)


class OutputError(JobError):
    """The output folder cannot be written."""

    exit_code = ExitCode.OUTPUT_NOT_WRITABLE


class OtherRunError(JobError):
    """The output folder belongs to a run with other settings."""

    exit_code = ExitCode.INVALID_CONFIG


def as_output_error(error: BaseException, folder: Path) -> OutputError | None:
    """The error as the user's, where it says that files cannot be written."""
    if not (isinstance(error, OSError) and error.errno in _NOT_WRITABLE):
        return None
    where = error.filename or folder
    return OutputError(f"{where} cannot be written: {error.strerror}; give output_dir a folder with rights and space")


class Checkpointer:
    """The checkpoints of a run in `<output>/checkpoints/step-<8 digits>`. All methods are collective."""

    def __init__(self, output: Path, keep: int, world: World) -> None:
        self._output = output
        self._folder = output / CHECKPOINTS_DIR
        self._keep = keep
        self._world = world

    def latest(self) -> Path | None:
        """The newest complete checkpoint. What a killed save has left behind is removed."""
        newest: Path | None = None
        if self._world.is_main and self._folder.is_dir():
            for path in self._folder.iterdir():
                if not is_complete(path):
                    shutil.rmtree(path)
            newest = max(self._folder.iterdir(), default=None)
        return broadcast_object(self._world, newest)

    def save(self, step: int, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> CheckpointStatus:
        """Saves after `step` steps and drops checkpoints beyond `keep`."""
        from torch.distributed.checkpoint.filesystem import FileSystemWriter
        from torch.distributed.checkpoint.state_dict_saver import save

        final = self._folder / f"step-{step:08}"
        partial = self._folder / f"{_PARTIAL}{final.name}"
        if self._world.is_main:
            _make_empty(partial)
        barrier(self._world)
        with _plain_failures():
            alone = self._world.size == 1
            save(_tensors(model, optimizer), storage_writer=FileSystemWriter(partial), no_dist=alone)
        _write_synced(partial / f"random-{self._world.rank}.pt", _random_state(self._world))
        barrier(self._world)
        if self._world.is_main:
            _complete(partial, final, {"step": step, "world_size": self._world.size})
            self._drop_old()
        barrier(self._world)
        relative = str(final.relative_to(self._output))
        return CheckpointStatus(step=step, path=relative, time=datetime.now(UTC))

    def load(self, path: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> tuple[int, str | None]:
        """Puts everything back and returns the steps done, with a note where the number of ranks has changed.

        Then the random state starts anew from the step, and sums are rounded in another order.
        """
        from torch.distributed.checkpoint.filesystem import FileSystemReader
        from torch.distributed.checkpoint.state_dict_loader import load

        manifest = _manifest(path)
        step, saved_by = manifest["step"], manifest["world_size"]
        _create_state(optimizer)
        with _plain_failures():
            alone = self._world.size == 1
            load(_tensors(model, optimizer), storage_reader=FileSystemReader(path), no_dist=alone)
        if saved_by == self._world.size:
            _set_random_state(path / f"random-{self._world.rank}.pt", self._world)
            return step, None
        torch.manual_seed(hash((step, self._world.rank)))
        return step, (
            f"the checkpoint was saved by {saved_by} processes and goes on with {self._world.size}: the same batches, "
            "but dropout is drawn anew and sums are rounded in another order"
        )

    def _drop_old(self) -> None:
        for path in sorted(self._folder.glob("step-*"))[: -self._keep]:
            doomed = path.rename(path.with_name(f"{_PARTIAL}{path.name}"))
            shutil.rmtree(doomed)


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
    manifest: dict[str, Any] = json.loads((path / MANIFEST_FILE).read_bytes())
    return manifest


def _complete(partial: Path, final: Path, manifest: dict[str, Any]) -> None:
    """Manifest last, then the name: from here on the checkpoint exists."""
    files = {file.name: file.stat().st_size for file in sorted(partial.iterdir())}
    _write_synced(partial / MANIFEST_FILE, json.dumps(manifest | {"files": files}, indent=1).encode())
    _sync_folder(partial)
    partial.rename(final)
    _sync_folder(final.parent)


def _tensors(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Flat names, the same under any number of ranks: `model.<name>`, `optimizer.<name>.exp_avg`, ..."""
    _reshard(model)
    trainable = {name: param for name, param in model.named_parameters() if param.requires_grad}
    tensors: dict[str, torch.Tensor] = {f"model.{name}": param for name, param in trainable.items()}
    for name, param in trainable.items():
        assert optimizer.state[param], f"{name} has been trained, so the optimizer has a state for it"
        tensors |= {f"optimizer.{name}.{key}": value for key, value in optimizer.state[param].items()}
    return tensors


def _reshard(model: torch.nn.Module) -> None:
    """After a forward pass without a backward pass (validation) FSDP leaves whole copies in its parameters' places."""
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
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


# --- one folder, one run ----------------------------------------------------------------------------------------------


def claim(output: Path, identity: Mapping[str, Any], first: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Makes the folder this run's and returns what the run's first start wrote as `first()`, now or earlier.

    Rank 0 only; both are JSON. A folder with a checkpoint or result of another identity is refused with OtherRunError;
    one in which no checkpoint was reached is taken over. Raises OutputError where it cannot be written.
    """
    with _refused_writes(output):
        output.mkdir(parents=True, exist_ok=True)
        known = _read_identity(output)
        if known is not None and not (different := differences(known["identity"], identity)):
            return dict(known["first"])
        if known is not None and _has_results(output):
            raise OtherRunError(
                f"{output} belongs to a run with other settings: {'; '.join(different)}. "
                "Choose another output_dir, take the settings back, or remove that folder"
            )
        for name in (METRICS_FILE, SAMPLES_FILE):
            (output / name).unlink(missing_ok=True)
        known = {"identity": identity, "first": first()}
        write_file(output / IDENTITY_FILE, json.dumps(known, indent=1).encode())
        return dict(known["first"])


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """The leaves that differ, such as `training.seed was 1, now 2`."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        below = [differences(old.get(key), new.get(key), f"{path}.{key}".lstrip(".")) for key in sorted({*old, *new})]
        return [one for found in below for one in found]
    return [] if old == new else [f"{path} was {old}, now {new}"]


def digest_files(folder: Path, names: Iterable[str]) -> str:
    """Tells model folders apart at little cost: of each file the name, the size, the first and the last MiB."""
    digest = sha256()
    for name in sorted(names):
        with (folder / name).open("rb") as file:
            size = (folder / name).stat().st_size
            digest.update(f"{name} {size}".encode() + file.read(_DIGEST_EDGE))
            file.seek(max(0, size - _DIGEST_EDGE))
            digest.update(file.read())
    return digest.hexdigest()


def write_file(path: Path, content: bytes) -> None:
    """Replaces a file: the old content or the new one, whole and on the disk."""
    scratch = path.with_name(f".{path.name}.tmp")
    _write_synced(scratch, content)
    scratch.replace(path)
    _sync_folder(path.parent)


@contextmanager
def _refused_writes(output: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise as_output_error(error, output) or error from error


def _read_identity(output: Path) -> dict[str, Any] | None:
    try:
        known: dict[str, Any] = json.loads((output / IDENTITY_FILE).read_bytes())
    except FileNotFoundError:
        return None
    return known


def _has_results(output: Path) -> bool:
    checkpoints = output / CHECKPOINTS_DIR
    return (output / RESULT_FILE).exists() or (checkpoints.is_dir() and any(map(is_complete, checkpoints.iterdir())))


def _make_empty(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)


def _write_synced(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
