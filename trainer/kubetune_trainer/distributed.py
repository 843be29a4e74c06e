"""The processes of one run: who am I, how many are we, and the few collectives that the loop needs."""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final, TypeGuard, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kubetune_contract.exit_codes import ExitCode, JobError

if TYPE_CHECKING:  # a run on one device never imports them: they take 0.7 s and 43 MiB
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

T = TypeVar("T")

TIMEOUT: Final = timedelta(minutes=30)
"""How long a collective waits for a peer that is silent. Rank 0 may write a 5 GB shard meanwhile."""


class PeerLostError(JobError):
    """Another worker is gone. A restart from the last checkpoint helps."""

    exit_code = ExitCode.PEER_LOST


class SharedError(JobError):
    """An error of one rank, raised on all of them, so that none waits for another and the first rank can tell it."""

    def __init__(self, exit_code: ExitCode, text: str) -> None:
        super().__init__(text)
        self.exit_code = exit_code


@dataclass(frozen=True)
class World:
    """The run's processes, seen from one of them."""

    rank: int
    """0 is the main process: it reports and writes results."""
    size: int
    local_rank: int
    """Number of this process on its node; also of its GPU."""
    device: torch.device
    local_size: int = 1
    """Processes of this node."""

    @property
    def is_main(self) -> bool:
        """Whether this process is rank 0."""
        return self.rank == 0


def start() -> World:
    """Join the run that the launcher described in RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE and MASTER_*.

    A process that is alone makes no group. Raises PeerLostError if the others do not come.
    """
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    device = _device(local_rank)
    if device.type == "cpu":
        _share_cores()
    if size > 1:
        _join(device)
    return World(rank, size, local_rank, device, local_size)


def _device(local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def _share_cores() -> None:
    """Split this node's cores among its processes: two that each start a thread per core run many times slower."""
    local_size = os.environ.get("LOCAL_WORLD_SIZE")
    if local_size and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // int(local_size)))


def _join(device: torch.device) -> None:
    on_gpu = device.type == "cuda"
    try:
        dist.init_process_group(_backend(device), timeout=TIMEOUT, device_id=device if on_gpu else None)
    except RuntimeError as error:
        if is_peer_lost(error):
            raise PeerLostError(f"the other workers did not come to the meeting point: {error}") from error
        raise


def _backend(device: torch.device) -> str:
    """With gloo beside NCCL: offloaded weights and checkpoints that are written meanwhile are on the host."""
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"


def ensure_group(world: World) -> None:
    """A process that is alone makes a group of itself: FSDP needs one even where there is nobody to talk to."""
    if not dist.is_initialized():
        assert world.size == 1, "several processes have met in start()"
        dist.init_process_group(_backend(world.device), store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]


def stop() -> None:
    """Leave the group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def all_sum(world: World, *values: float) -> list[float]:
    """Each value summed over all ranks, in float64, in one all-reduce."""
    if world.size == 1:
        return [float(value) for value in values]
    sums = torch.tensor(values, dtype=torch.float64, device=world.device)
    dist.all_reduce(sums)
    return [float(value) for value in sums.tolist()]


def broadcast_object(world: World, value: T) -> T:
    """Rank 0's value, on every rank. It is pickled: small things only."""
    if world.size == 1:
        return value
    box: list[Any] = [value]
    dist.broadcast_object_list(box, src=0, device=world.device)
    received: T = box[0]
    return received


def gather_objects(world: World, value: T) -> list[T]:
    """Every rank's value, rank 0's first, on every rank. They are pickled: small things only."""
    if world.size == 1:
        return [value]
    values: list[Any] = [None] * world.size
    dist.all_gather_object(values, value)
    return values


def together(world: World, act: Callable[[], T]) -> T:
    """`act` on every rank; if it fails on any, the first failing rank's error is raised on all, as SharedError."""
    try:
        value, failure = act(), None
    except JobError as error:
        value, failure = None, (error.exit_code, str(error))
    for known in gather_objects(world, failure):
        if known is not None:
            raise SharedError(*known)
    return value  # type: ignore[return-value] # without a failure there is a value


def barrier(world: World) -> None:
    """Wait until every rank is here."""
    all_sum(world, 0.0)


_LOST_WORDS: Final = (
    "connection closed by peer",
    "connection reset by peer",
    "connection was likely closed",
    "connection refused",
    "broken pipe",
    "timed out waiting",
    "socket timeout",
    "client socket has timed out",
    "remote process exit",
    "ncclremoteerror",
    "nccl communicator was aborted",
)


def is_peer_lost(error: BaseException) -> bool:
    """Whether a collective failed because another process is gone or silent (gloo, NCCL or the rendezvous store)."""
    if isinstance(error, PeerLostError | dist.DistNetworkError | dist.DistStoreError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(words in text for words in _LOST_WORDS)


def is_distributed(tensor: object) -> "TypeGuard[DTensor]":
    """Whether FSDP has made the tensor a DTensor."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def sharded_modules(model: nn.Module) -> "list[FSDPModule]":
    """The modules that FSDP shards on their own, the root first."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return [] if fsdp is None else [module for module in model.modules() if isinstance(module, fsdp.FSDPModule)]


def local_rows(parameter: Tensor) -> tuple[Tensor, int]:
    """The rows of `parameter` that this process stores, to be written in place, and the number of the first of them.

    A plain tensor is stored whole. FSDP2 shards dimension 0 as torch.chunk does: all but the last shards are equal.
    With copies on several nodes (HSDP) only the mesh dimension inside a node counts.
    """
    if not is_distributed(parameter):
        return parameter.detach(), 0
    local, mesh = parameter.to_local().detach(), parameter.device_mesh
    dimension = next(number for number, placement in enumerate(parameter.placements) if placement.is_shard())
    rows, ranks = parameter.shape[0], mesh.size(dimension)
    return local, min(rows, -(-rows // ranks) * mesh.get_local_rank(dimension))


def whole_value(scalar: Tensor) -> float:
    """The value of a possibly distributed scalar. All ranks must call it."""
    return (scalar.full_tensor() if is_distributed(scalar) else scalar).item()


def full_tensor(parameter: Tensor, world: World) -> Tensor | None:
    """The whole of a possibly sharded parameter, on the CPU of rank 0; None elsewhere. All ranks must call it."""
    whole = parameter.detach()
    if is_distributed(whole):
        whole = whole.full_tensor()
    return whole.cpu() if world.is_main else None
