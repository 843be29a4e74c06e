"""The memory that a training step of the real code holds at most: shapes and lifetimes on fake tensors, no numbers.

Fake CPU tensors stand for a GPU's, so the kernels that a GPU would take are called by name: flash attention and the
fused norm. Counted are live storages; the CUDA context, workspaces of kernels and the allocator's gaps are not.
"""

import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from kubetune_contract.architecture import LlamaConfig
from kubetune_contract.config import RunConfig
from kubetune_contract.estimate import embedding_on_host
from kubetune_trainer import model as model_module
from kubetune_trainer import parallel
from kubetune_trainer.distributed import World
from kubetune_trainer.model import Documents, Llama
from kubetune_trainer.optim import make_optimizer
from kubetune_trainer.peft import trainable


class Trace(NamedTuple):
    """Bytes of live tensors."""

    static: int
    """Before the last micro-batch of a step: weights, gradients, optimizer state."""
    peak: int
    """The most during it."""
    largest: list[tuple[int, str]]
    """What lives at the peak: bytes and a description, largest first."""


class LiveStorages(TorchDispatchMode):
    """Counts the bytes of all storages that operators make, while they live."""

    def __init__(self, explain: bool) -> None:
        super().__init__()
        self._explain = explain
        self.bytes = self.peak = 0
        self._alive: dict[int, tuple[int, str]] = {}
        self.at_peak: list[tuple[int, str]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        made = func(*_without_masks(func, args), **(kwargs or {}))
        for tensor in tree_iter(made):
            if isinstance(tensor, Tensor):
                self._add(tensor, f"{func} {tuple(tensor.shape)} {tensor.dtype}" if self._explain else "")
        return made

    def forget_peak(self) -> None:
        self.peak = self.bytes

    def forget(self, tensor: Tensor) -> None:
        """Not in the device's memory."""
        self._remove(tensor.untyped_storage()._cdata)

    def _add(self, tensor: Tensor, description: str) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._alive:
            return
        self._alive[key] = storage.nbytes(), description
        self.bytes += storage.nbytes()
        weakref.finalize(storage, self._remove, key)
        if self.bytes > self.peak:
            self.peak = self.bytes
            self.at_peak = list(self._alive.values()) if self._explain else []

    def _remove(self, key: int) -> None:
        self.bytes -= self._alive.pop(key, (0, ""))[0]


def _without_masks(func: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """How many elements a mask chooses is unknown without numbers. All: the most."""
    if func.__name__.partition(".")[0] not in ("index", "index_put", "index_put_", "_index_put_impl_"):
        return args
    indices = []
    for index in args[1]:
        mask = index is not None and index.dtype == torch.bool
        indices += [torch.empty(index.numel(), dtype=torch.int64) for _ in index.shape] if mask else [index]
    return args[0], indices, *args[2:]


def trace_step(architecture: LlamaConfig, config: RunConfig, *, explain: bool = False) -> Trace:
    """One micro-batch of batch_size documents of max_sequence_length tokens, after steps that made all state.

    `explain` fills `largest`, which is slow.
    """
    live = LiveStorages(explain)
    with _fakes(live):
        model = parallel.build(config, _Reader(architecture), World(0, 1, 0, torch.device("cpu")))
        if embedding_on_host(config, architecture, 1):
            live.forget(model.model.embed_tokens.weight)
        params = list(trainable(model).values())
        optimizer = make_optimizer(params, config.training)
        for group in optimizer.param_groups:  # as on a GPU
            group.update(fused=True, foreach=False)
        for param in params:
            param.grad = torch.zeros_like(param)
        optimizer.step()
        lengths = [config.dataset.max_sequence_length] * config.training.batch_size
        tokens = torch.zeros(1, sum(lengths), dtype=torch.int64)
        live.forget_peak()
        static = live.bytes
        loss = model(tokens, tokens, lengths=lengths)
        loss.backward()
        del loss
        optimizer.step()
        return Trace(static, live.peak, sorted(live.at_peak, reverse=True))


class _Reader(NamedTuple):
    architecture: LlamaConfig

    def config(self) -> LlamaConfig:
        return self.architecture


@contextmanager
def _fakes(live: LiveStorages) -> Iterator[None]:
    """The model leaves meta for fake tensors instead of memory; from there on nothing real is made."""
    with ExitStack() as stack:

        def to_empty(model: Llama, *, device: torch.device) -> Llama:
            stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
            stack.enter_context(live)
            for module in model.modules():
                for name, param in module._parameters.items():
                    if param is not None:
                        fake = torch.empty(param.shape, dtype=param.dtype)
                        module._parameters[name] = nn.Parameter(fake, param.requires_grad)
                for name, buffer in module._buffers.items():
                    if buffer is not None:
                        module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
            return model

        for place, name, value in (
            (Llama, "to_empty", to_empty),
            (parallel, "load_weights", lambda *_: None),
            (parallel, "load_packed", lambda *_: None),
            (parallel, "init_adapter", lambda *_: None),
            (Documents, "of", _documents),
            (model_module, "attend_documents", _attend),
            (F, "rms_norm", lambda x, shape, weight, epsilon: _FusedNorm.apply(x, weight)),
        ):
            stack.enter_context(patch.object(place, name, value))
        yield


class _FusedNorm(torch.autograd.Function):
    """The tensors of a GPU's kernel; a CPU computes the norm in steps, in fp32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty((*x.shape[:-1], 1), dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return tuple(
            torch.empty_like(tensor) if wanted else None
            for tensor, wanted in zip(ctx.saved_tensors[:2], ctx.needs_input_grad, strict=True)
        )


def _documents(lengths: list[int], like: Tensor) -> Documents:
    numbers, positions = torch.empty(2, sum(lengths), dtype=torch.int64)
    return Documents(tuple(lengths), numbers, positions, None)


def _attend(q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
    del documents  # the kernel for ragged rows keeps the same tensors
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    mixed: Tensor = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True)[0]
    return mixed.transpose(1, 2)
