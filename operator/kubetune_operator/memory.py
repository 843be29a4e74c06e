"""How much memory a training step of a job takes, told before any GPU is held. Pure.

The estimate is the contract's closed form over the sizes that staging reported. It is about the longest rows that the
configuration allows; how long they are, only the trainer sees. So a job fails here only if it would not fit with the
shortest rows either; in between, people are told that it may not.
"""

import itertools
from typing import Final, NamedTuple

from pydantic.alias_generators import to_camel

from kubetune_contract.architecture import LlamaSizes
from kubetune_contract.config import RunConfig
from kubetune_contract.estimate import GIB, Estimate, estimate
from kubetune_contract.fit import MARGIN, NO_REMEDY, remedies
from kubetune_operator.api import FineTuneJob, MemoryEstimate
from kubetune_operator.build import run_config
from kubetune_operator.decision import Decision
from kubetune_operator.workers import GPU_RESOURCE, Workers, amount

MEMORY_LABEL: Final = "nvidia.com/gpu.memory"
"""Of a node: memory of one of its GPUs in MiB, as GPU feature discovery writes it."""
_SHORTEST_ROWS: Final = 16
"""Tokens; the least that dataset.maxSequenceLength may be."""
_MOST_GPUS: Final = 8
"""In a node, where a remedy asks for more of them."""
_WAYS: Final = 2


class Device(NamedTuple):
    """What has the memory."""

    kind: str
    """In a sentence."""
    memory: int | None
    """Bytes; None where they are not known."""
    said: str
    """Who says so, as in `workers.gpuMemory is 80Gi`."""


def check(turn: Decision) -> None:
    """Write the estimate down. A job that cannot fit ends, unless it was tried already: then the trainer has judged."""
    job = turn.job
    if turn.status.staged is None or turn.status.staged.sizes is None:
        return
    config, sizes, device = run_config(job), turn.status.staged.sizes, device_of(job.spec.workers)
    most = _most(job, config, sizes)
    kind = "GPU" if job.spec.workers.gpus_per_node else "Pod"
    turn.set(estimate=MemoryEstimate(device=kind, bytes=_needed(job, most), available=device.memory, **most._asdict()))
    if device.memory is None or turn.status.attempt_start_time is not None:
        return
    if _least(job, config, sizes) > device.memory * (1 + MARGIN):
        turn.fail("DoesNotFit", _does_not_fit(job, config, sizes, device))


def told(turn: Decision) -> str:
    """The estimate in a sentence, for the condition that says what was staged; empty without one."""
    job, staged = turn.job, turn.status.staged
    if staged is None or staged.sizes is None:
        return ""
    device = device_of(job.spec.workers)
    needed = _needed(job, _most(job, run_config(job), staged.sizes))
    text = f" A step takes at most {_gib(needed)} of memory {device.kind}"
    if device.memory is None or needed <= device.memory:
        return f"{text}."
    return (
        f"{text}, more than there is ({device.said}): it fits only if the longest row is shorter than "
        "dataset.maxSequenceLength, which the trainer finds out before its first step."
        if job.spec.workers.gpus_per_node
        else f"{text}, more than there is ({device.said}): a pod that takes more is killed."
    )


def device_of(workers: Workers) -> Device:
    """The device of one process, and how much memory it has."""
    if not workers.gpus_per_node:
        limit = workers.resources.limits.get("memory")
        memory = None if limit is None else int(amount(limit))
        return Device("in each pod", memory, f"workers.resources.limits.memory is {limit}")
    if workers.gpu_memory is not None:
        said = f"workers.gpuMemory is {workers.gpu_memory}"
        return Device("on each GPU", int(amount(workers.gpu_memory)), said)
    label = workers.node_selector.get(MEMORY_LABEL, "")
    if label.isdecimal() and workers.gpu_resource == GPU_RESOURCE:
        said = f"workers.nodeSelector asks for {MEMORY_LABEL} {label} MiB"
        return Device("on each GPU", int(label) << 20, said)
    return Device("on each GPU", None, "")


def _most(job: FineTuneJob, config: RunConfig, sizes: LlamaSizes) -> Estimate:
    """With the longest rows."""
    return _estimate(job, _widest(job, config), sizes)


def _widest(job: FineTuneJob, config: RunConfig) -> RunConfig:
    """On the CPU, precision Auto is FP32 where it has no instructions for BF16."""
    if job.spec.workers.gpus_per_node or config.training.precision != "Auto":
        return config
    return _with(config, "training", precision="FP32")


def _least(job: FineTuneJob, config: RunConfig, sizes: LlamaSizes) -> int:
    """Bytes that a step takes however short the rows are; packed rows are as long as they may be.

    On the CPU only what is there between steps: the rest is allocated differently than on a GPU, for which the form is.
    """
    if not job.spec.workers.gpus_per_node:
        parts = _estimate(job, config, sizes)
        return parts.weights + parts.adapter + parts.gradients + parts.optimizer + parts.host
    short = config if config.dataset.packed else _with(config, "dataset", max_sequence_length=_SHORTEST_ROWS)
    return _estimate(job, short, sizes).needed


def _estimate(job: FineTuneJob, config: RunConfig, sizes: LlamaSizes) -> Estimate:
    workers = job.spec.workers
    per_node = max(1, workers.gpus_per_node)
    return estimate(config, sizes, workers.nodes * per_node, per_node)


def _needed(job: FineTuneJob, parts: Estimate) -> int:
    """On the CPU there is no other memory."""
    return parts.needed + (0 if job.spec.workers.gpus_per_node else parts.host)


def _with(config: RunConfig, section: str, **values: object) -> RunConfig:
    return config.model_copy(update={section: getattr(config, section).model_copy(update=values)})


def _does_not_fit(job: FineTuneJob, config: RunConfig, sizes: LlamaSizes, device: Device) -> str:
    assert device.memory is not None, "only what is known can be too small"
    workers, most = job.spec.workers, _most(job, config, sizes)
    per_node = max(1, workers.gpus_per_node)
    goal = int(device.memory / (1 + MARGIN))
    found = remedies(
        _widest(job, config),
        sizes,
        workers.nodes * per_node,
        per_node,
        goal,
        spell=to_camel,
        gang=lambda processes: _gang(workers, processes),
    )
    ways = list(itertools.islice(found, _WAYS))
    if not workers.gpus_per_node:
        raised = -(-int(_needed(job, most) * (1 + MARGIN)) // GIB)
        ways = [f"raise workers.resources.limits.memory to {raised}Gi", *ways][:_WAYS]
    parts = most._asdict() | {"host": 0 if workers.gpus_per_node else most.host}
    largest = sorted(((size, name) for name, size in parts.items() if size), reverse=True)[:3]
    shares = ", ".join(f"{name} {_gib(size)}" for size, name in largest)
    return (
        f"A step needs {_gib(_needed(job, most))} of memory {device.kind} ({shares}), but {device.said}: "
        f"{', or '.join(ways) or NO_REMEDY}. The estimate may be {MARGIN:.0%} wrong; it is too large by more than that."
    )


def _gang(workers: Workers, processes: int) -> str | None:
    """How to have so many processes."""
    if not workers.gpus_per_node:
        return f"set workers.nodes to {processes}"
    if workers.nodes == 1 and processes <= _MOST_GPUS:
        return f"set workers.gpusPerNode to {processes}"
    nodes, rest = divmod(processes, workers.gpus_per_node)
    return None if rest else f"set workers.nodes to {nodes}"


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB"
