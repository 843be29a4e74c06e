"""The processes of one run: meeting, adding, sharing, and telling a lost peer from other errors."""

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from socket import socket
from typing import Any

import pytest
import torch
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from kubetune_contract.exit_codes import ExitCode, JobError
from kubetune_trainer.data import DataError
from kubetune_trainer.distributed import (
    PeerLostError,
    SharedError,
    World,
    all_sum,
    barrier,
    broadcast_object,
    full_tensor,
    is_peer_lost,
    local_rows,
    start,
    stop,
    together,
)

Spawn = Callable[..., list[Any]]


def test_one_process_needs_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    world = start()
    assert (world.rank, world.size, world.is_main) == (0, 1, True)
    assert all_sum(world, 1.5, 2) == [1.5, 2.0]
    assert broadcast_object(world, "text") == "text"
    barrier(world)
    stop()
    assert not dist.is_initialized()


def talk(world: World) -> dict[str, Any]:
    barrier(world)
    return {
        "world": (world.rank, world.size, world.local_rank, world.is_main, str(world.device)),
        # 2^53 + 1 is beyond float32 and float64 alike; 2^30 + 1 is beyond float32 only.
        "sums": all_sum(world, world.rank, 2.0**30 + 1, 0.5),
        "object": broadcast_object(world, {"from": world.rank}),
    }


def test_three_processes_talk(spawn: Spawn) -> None:
    results = spawn(3, talk)
    assert [result["world"] for result in results] == [(rank, 3, rank, rank == 0, "cpu") for rank in range(3)]
    assert all(result["sums"] == [3.0, 3 * (2.0**30 + 1), 1.5] for result in results)
    assert all(result["object"] == {"from": 0} for result in results)


def rows_of(world: World, lengths: list[int]) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (world.size,))
    held, whole = [], []
    for length in lengths:
        tensor = torch.arange(length * 2.0).reshape(length, 2)
        sharded = distribute_tensor(tensor, mesh, [Shard(0)])
        local, first = local_rows(sharded)
        assert torch.equal(local, tensor[first : first + len(local)])
        held.append((first, len(local)))
        whole.append(full_tensor(sharded, world))
    return {"held": held, "whole": whole}


def test_rows_of_a_shard_are_known_by_number(spawn: Spawn) -> None:
    first, second, third = spawn(3, rows_of, [6, 7, 2, 1])
    assert first["held"] == [(0, 2), (0, 3), (0, 1), (0, 1)]
    assert second["held"] == [(2, 2), (3, 3), (1, 1), (1, 0)]
    assert third["held"] == [(4, 2), (6, 1), (2, 0), (1, 0)]
    assert [len(tensor) for tensor in first["whole"]] == [6, 7, 2, 1]
    assert second["whole"] == third["whole"] == [None] * 4


def test_a_plain_tensor_is_its_own_rows(alone: World) -> None:
    parameter = torch.nn.Parameter(torch.ones(3, 2))
    local, first = local_rows(parameter)
    local.zero_()
    assert first == 0
    assert not parameter.any()
    assert torch.equal(full_tensor(parameter, alone), torch.zeros(3, 2))


# --- threads ----------------------------------------------------------------------------------------------------------

THREADS: dict[str, tuple[dict[str, str], Callable[[int], int]]] = {
    "more processes than cores": ({"LOCAL_WORLD_SIZE": "1000"}, lambda _: 1),
    "the user's own number stays": ({"LOCAL_WORLD_SIZE": "1000", "OMP_NUM_THREADS": "2"}, lambda _: 2),
}


@pytest.mark.parametrize(("environment", "expected"), THREADS.values(), ids=THREADS.keys())
def test_processes_of_a_node_share_its_cores(environment: dict[str, str], expected: Callable[[int], int]) -> None:
    program = (
        "import torch; from kubetune_trainer import distributed; distributed.start(); print(torch.get_num_threads())"
    )
    clean = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=clean | environment, check=True, stdout=subprocess.PIPE, text=True
    )
    assert int(done.stdout) == expected(len(os.sched_getaffinity(0)))


# --- lost peers -------------------------------------------------------------------------------------------------------


RANK = """
    import os, signal, sys
    from kubetune_trainer import distributed
    world = distributed.start()
    if world.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        distributed.all_sum(world, 1.0)
    except RuntimeError as error:
        print(error, file=sys.stderr)
        os._exit(20 if distributed.is_peer_lost(error) else 21)
"""


def test_a_killed_peer_is_recognised(tmp_path: Path) -> None:
    script = tmp_path / "rank.py"
    script.write_text(textwrap.dedent(RANK))
    with closing(socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [
        subprocess.Popen([sys.executable, script], env=common | {"RANK": str(rank)}, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    codes = []
    for rank in ranks:
        _, text = rank.communicate(timeout=120)
        codes.append((rank.returncode, text))
    assert codes[1][0] == -signal.SIGKILL
    assert codes[0][0] == 20, codes[0][1]


ERRORS: dict[str, tuple[BaseException, bool]] = {
    "gloo: the peer's process ended": (
        RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [10.0.0.2]:41001"),
        True,
    ),
    "gloo: the peer's node is gone": (RuntimeError("Read error [10.0.0.2]:41001: Connection reset by peer"), True),
    "gloo: the peer is silent": (RuntimeError("Timed out waiting 1800000ms for recv operation to complete"), True),
    "NCCL: the peer's process ended": (
        dist.DistBackendError("NCCL error: remote process exited or there was a network error"),
        True,
    ),
    "the store is gone": (dist.DistNetworkError("Connection reset by peer"), True),
    "the store is silent": (dist.DistStoreError("wait timeout after 1800000ms"), True),
    "ours": (PeerLostError("gone"), True),
    "a wrong shape": (RuntimeError("mat1 and mat2 shapes cannot be multiplied (1x2 and 3x4)"), False),
    "a closed file": (ConnectionResetError("Connection reset by peer"), False),
    "memory": (torch.OutOfMemoryError("CUDA out of memory"), False),
}


@pytest.mark.parametrize(("error", "lost"), ERRORS.values(), ids=ERRORS.keys())
def test_a_lost_peer_is_told_from_other_errors(error: BaseException, lost: bool) -> None:
    assert is_peer_lost(error) is lost


def test_peers_that_never_come_are_lost_peers() -> None:
    """Nobody listens at the meeting point: a retry helps, and the exit code says so."""
    program = """
        from datetime import timedelta
        from kubetune_trainer import distributed
        distributed.TIMEOUT = timedelta(seconds=1)
        try:
            distributed.start()
        except distributed.PeerLostError as error:
            raise SystemExit(int(error.exit_code))
    """
    environment = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "9"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], env=os.environ | environment, check=False, timeout=120
    )
    assert done.returncode == ExitCode.PEER_LOST


def _together(world: World, failing: list[int]) -> tuple[str, int]:
    def act() -> int:
        if world.rank in failing:
            raise DataError(f"rank {world.rank} cannot")
        return world.rank

    try:
        return "", together(world, act)
    except SharedError as error:
        return str(error), error.exit_code


def test_an_error_of_one_rank_is_raised_on_all(spawn: Spawn) -> None:
    assert spawn(3, _together, []) == [("", 0), ("", 1), ("", 2)]
    assert spawn(3, _together, [2, 1]) == [("rank 1 cannot", 65)] * 3


def test_alone_an_error_is_told_as_it_is(alone: World) -> None:
    def act() -> int:
        raise DataError("cannot")

    with pytest.raises(JobError, match="cannot") as caught:
        together(alone, act)
    assert caught.value.exit_code == ExitCode.INVALID_DATA
