"""The machine's own limit: the matrix products of a step, nothing else. As a program it is a side of the benchmark."""

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from benchmarks.trainer.work import RANK, Work

from kubetune_contract.architecture import HEAD_CHUNK

REPEATS: Final = 3
"""Of each product; the fastest counts."""


@dataclass(frozen=True)
class Shape:
    """What of a model's config.json decides the arithmetic."""

    layers: int
    hidden: int
    heads: int
    key_value_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int

    @classmethod
    def read(cls, folder: Path) -> "Shape":
        """From the folder of the weights."""
        about = json.loads((folder / "config.json").read_text())
        heads = about["num_attention_heads"]
        return cls(
            about["num_hidden_layers"],
            about["hidden_size"],
            heads,
            about["num_key_value_heads"],
            about.get("head_dim") or about["hidden_size"] // heads,
            about["intermediate_size"],
            about["vocab_size"],
        )

    def linear(self) -> Iterator[tuple[int, int, int]]:
        """(inputs, outputs, how many of them) of each linear layer of the blocks."""
        queries, keys = self.heads * self.head_dim, self.key_value_heads * self.head_dim
        yield self.hidden, queries, self.layers
        yield self.hidden, keys, 2 * self.layers
        yield queries, self.hidden, self.layers
        yield self.hidden, self.intermediate, 2 * self.layers
        yield self.intermediate, self.hidden, self.layers

    @property
    def head(self) -> tuple[int, int, int]:
        """As `linear`."""
        return self.hidden, self.vocabulary, 1


def step_flops(shape: Shape, work: Work) -> float:
    """Floating-point operations of one step, by the usual count.

    A token takes 2 for each weight of a matrix forward, 2 for the gradient of its input and, where the weight is
    trained, 2 for the weight's own; attention 12 for each pair of a query's and a key's number (Chowdhery et al. 2022,
    appendix B), of which a causal mask needs half. What is computed again does not count.
    """
    products = [*shape.linear(), shape.head]
    weights = sum(inputs * outputs * count for inputs, outputs, count in products)
    adapters = sum(RANK * (inputs + outputs) * count for inputs, outputs, count in shape.linear())
    trained, frozen = (weights, 0) if work.method == "Full" else (adapters, weights)
    attention = 6 * shape.layers * shape.heads * shape.head_dim * work.length
    return float(work.batch * work.length * (6 * trained + 4 * frozen + attention))


def measure(shape: Shape, work: Work) -> float:
    """GFLOP/s of the step's products: each layer forward and backward, weighted by how often it comes.

    The head is multiplied in the chunks that our trainer takes.
    """
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if work.precision == "BF16" else torch.float32
    tokens = work.batch * work.length
    chunk = min(tokens, HEAD_CHUNK)
    inputs, outputs, _ = shape.head
    layers = [(tokens, *layer) for layer in shape.linear()] + [(chunk, inputs, outputs, tokens // chunk)]
    total = seconds = 0.0
    for rows, inputs, outputs, count in layers:
        x, y = (torch.randn(rows, size, device=device, dtype=dtype) for size in (inputs, outputs))
        weight = torch.randn(outputs, inputs, device=device, dtype=dtype)
        for left, right, result in _products(x, y, weight, trained=work.method == "Full"):
            seconds += count * _fastest(left, right, result)
            total += count * 2.0 * rows * inputs * outputs
    return total / seconds / 1e9


def _products(x: Any, y: Any, weight: Any, *, trained: bool) -> list[tuple[Any, Any, Any]]:
    """(left, right, result) of the products of one layer, the results in memory that is there already."""
    found = [(x, weight.t(), y.clone()), (y, weight, x.clone())]
    return [*found, (y.t(), x, weight.clone())] if trained else found


def _fastest(left: Any, right: Any, result: Any) -> float:
    """Seconds of the product."""
    import torch

    times = []
    for _ in range(REPEATS + 1):  # the first one is not warm
        start = time.perf_counter()
        torch.mm(left, right, out=result)
        if result.is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def main() -> None:
    """A side: the result has `gflops`."""
    work, result = Work.read()
    result.write_text(json.dumps({"gflops": measure(Shape.read(Path(work.model)), work)}))


if __name__ == "__main__":
    main()
