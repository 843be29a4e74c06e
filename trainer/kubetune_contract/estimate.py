"""How much memory a training step takes at most, in closed form, without torch and before any is taken.

All sizes are bytes of one process and its GPU. A micro-batch is counted with batch_size x max_sequence_length tokens,
all with a label: the most that it can have. A test holds the sums against the live tensors of the real code.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, NamedTuple

from kubetune_contract.architecture import HEAD_CHUNK, NORM_NUMBERS, LlamaSizes
from kubetune_contract.config import RunConfig

GIB: Final = 2**30
CONTEXT: Final = int(0.6 * GIB)
"""What CUDA, cuBLAS and NCCL take beside tensors. A usual figure, not measured here."""
GAPS: Final = 0.03
"""Share of the tensors' size that the allocator loses between them. A usual figure, not measured here."""


class Estimate(NamedTuple):
    """What is in memory when a step needs the most of it, in bytes."""

    weights: int
    """The model as it is stored between steps; of a sharded one this process's part."""
    adapter: int
    gradients: int
    optimizer: int
    activations: int
    """What the forward pass keeps for the backward pass, and what one block takes in its backward pass."""
    loss: int
    """Hidden states and one chunk of logits; 0 where the peak is in a block, when they are gone."""
    sharding: int
    """Whole weights of the blocks at work and of embedding and head, and gradients on their way."""
    dequantization: int
    """One weight out of 4 bits, and the norms of some of its rows (DoRA)."""
    host: int
    """In host memory, not in the total."""

    @property
    def total(self) -> int:
        """Tensors in the device's memory."""
        return sum(self) - self.host

    @property
    def needed(self) -> int:
        """Memory that the device must have: tensors, gaps between them and what the libraries take."""
        return int(self.total * (1 + GAPS)) + CONTEXT

    def fits(self, memory: int) -> bool:
        """Whether a device with so many bytes is large enough."""
        return self.needed <= memory

    def table(self) -> str:
        """For people, in GiB: one line for each part that is not empty."""
        parts = [(name, size) for name, size in zip(self._fields, self, strict=True) if size and name != "host"]
        rows = [*parts, ("total", self.total), ("needed", self.needed), *([("host", self.host)] if self.host else [])]
        notes = {"needed": "with the GPU's context and gaps between tensors", "host": "in host memory"}
        return "\n".join(f"{name:16}{size / GIB:9.2f} GiB  {notes.get(name, '')}".rstrip() for name, size in rows)


def estimate(config: RunConfig, architecture: LlamaSizes, processes: int = 1, per_node: int | None = None) -> Estimate:
    """The memory of each of `processes`, of which `per_node` share a node (all by default)."""
    return _Step(config, architecture, processes, per_node or processes).estimate()


def embedding_on_host(config: RunConfig, architecture: LlamaSizes, processes: int) -> bool:
    """Whether the embedding's table stays in host memory: a step reads some of its rows and never writes it.

    It saves 1 GB for 8B and costs a copy of those rows. Not where it is trained, or is the head too, or is sharded.
    """
    trained = config.lora is None or "embed_tokens" in config.lora.target_modules
    return not (trained or architecture.tie_word_embeddings or processes > 1)


class _Phase(NamedTuple):
    """What a moment of the step adds to what is always there; named as in Estimate."""

    activations: int
    loss: int = 0
    sharding: int = 0
    dequantization: int = 0


@dataclass(frozen=True)
class _Step:
    config: RunConfig
    architecture: LlamaSizes
    processes: int
    per_node: int

    def estimate(self) -> Estimate:
        peak = max(self._phases(), key=sum)
        static = {
            "weights": self._share(self._stored_weights()),
            "adapter": self._share(4 * self._adapter()),
            "gradients": self._share(self._gradients()),
            "optimizer": self._share(self._optimizer()),
        }
        if self.config.training.cpu_offload:
            return Estimate(**dict.fromkeys(static, 0), **peak._asdict(), host=sum(static.values()))
        host = self._embedding() * self._width if self._on_host else 0
        return Estimate(**static, **peak._asdict(), host=host)

    # --- what is always there ---

    @property
    def _full(self) -> bool:
        return self.config.lora is None

    @property
    def _width(self) -> int:
        """Bytes of a number in products. Auto is bf16: this is about GPUs."""
        return 4 if self.config.training.precision == "FP32" else 2

    @property
    def _stored_width(self) -> int:
        """Bytes of a number in a weight between steps."""
        return 4 if self._full and self.config.training.master_weights == "FP32" else self._width

    @property
    def _sharded(self) -> bool:
        return self.processes > 1 or self._stored_width != self._width or self.config.training.cpu_offload

    @property
    def _on_host(self) -> bool:
        return not self._sharded and embedding_on_host(self.config, self.architecture, self.processes)

    def _share(self, size: int) -> int:
        """The part of a process: all processes share, or with Hybrid those of a node."""
        training = self.config.training
        return math.ceil(size / (self.per_node if training.sharding == "Hybrid" else self.processes))

    def _stored_weights(self) -> int:
        outside = self.architecture.parameters - self._blocks()
        outside -= self._embedding() if self._on_host else 0
        return self._stored_width * outside + self._packed(self._blocks())

    def _packed(self, count: int) -> int:
        """Bytes of `count` weights of blocks. NF4: 4 bits each, an absmax for 64, in 8 or 32 bits; norms are few."""
        quantized = self.config.quantized
        if quantized is None:
            return self._stored_width * count
        return count // 2 + (count // 64 + 4 * count // (64 * 256) if quantized.double else 4 * count // 64)

    def _embedding(self) -> int:
        return self.architecture.vocab_size * self.architecture.hidden_size

    def _head(self) -> int:
        return 0 if self.architecture.tie_word_embeddings else self._embedding()

    def _block(self) -> int:
        """Numbers in the weights of one block."""
        return (
            sum(size_in * size_out for size_in, size_out in self._layers().values()) + 2 * self.architecture.hidden_size
        )

    def _blocks(self) -> int:
        return self.architecture.num_hidden_layers * self._block()

    def _layers(self) -> dict[str, tuple[int, int]]:
        """Linear layers of a block: width of input and output."""
        model = self.architecture
        hidden, inner = model.hidden_size, model.intermediate_size
        queries, keys = model.num_attention_heads * model.head_dim, model.num_key_value_heads * model.head_dim
        return {
            "q_proj": (hidden, queries),
            "k_proj": (hidden, keys),
            "v_proj": (hidden, keys),
            "o_proj": (queries, hidden),
            "gate_proj": (hidden, inner),
            "up_proj": (hidden, inner),
            "down_proj": (inner, hidden),
        }

    def _adapter(self) -> int:
        """Numbers in the adapter, all in fp32."""
        return sum(count for _, count in self._adapters())

    def _adapters(self) -> Iterator[tuple[str, int]]:
        lora, model = self.config.lora, self.architecture
        if lora is None:
            return
        outside = {
            "embed_tokens": (model.vocab_size, model.hidden_size),
            "lm_head": (model.hidden_size, model.vocab_size),
        }
        for name, (size_in, size_out) in (self._layers() | outside).items():
            if name in lora.target_modules:
                magnitude = size_out if self.config.has_magnitude else 0
                times = 1 if name in outside else model.num_hidden_layers
                yield name, times * (lora.rank * (size_in + size_out) + magnitude)

    def _trained(self) -> int:
        return self.architecture.parameters if self._full else self._adapter()

    def _trained_width(self) -> int:
        return self._stored_width if self._full else 4

    def _gradients(self) -> int:
        return 0 if self.config.training.optimizer_in_backward else self._trained_width() * self._trained()

    def _optimizer(self) -> int:
        """Two moments, in the parameters' format or in 8 bits with a scale for 256; Paged can leave for host memory."""
        match self.config.training.optimizer:
            case "AdamW":
                return 2 * self._trained_width() * self._trained()
            case "AdamW8bit":
                return 2 * self._trained() + 2 * 4 * self._trained() // 256
            case "PagedAdamW8bit":
                return 0

    # --- moments of a step ---

    def _phases(self) -> Iterator[_Phase]:
        """The loss, when all blocks wait for their backward pass; the last block's; the embedding's at the end."""
        root = self._width * (self._embedding() + self._head()) if self._sharded else 0
        blocks = 2 * self._gathered_block() if self._sharded else 0  # one at work, one on its way
        kept, head = self._kept(), self._width * self._embedding() if self._full else 0
        of_block = self._block() * (self._width + 4) if self._sharded else self._largest()
        yield _Phase(kept, self._loss() + head, root)
        waiting = head if self._sharded else 0  # the head's gradient waits for that of the embedding
        made = of_block + waiting if self._full else 0
        buffers = root + blocks + made
        yield _Phase(kept + self._work(), sharding=buffers)
        inner, dense = self._rows(self.architecture.intermediate_size), self._largest() if self.config.quantized else 0
        if dense:  # one gradient of MLP width is not there while the weight is
            yield _Phase(kept + self._work() - inner, sharding=buffers, dequantization=dense)
        if self.config.has_magnitude:  # nor two while norms are computed, in fp32, of some rows and their sum
            norms = 2 * 4 * min(NORM_NUMBERS, self.architecture.hidden_size * self.architecture.intermediate_size)
            yield _Phase(kept + self._work() - 2 * inner, sharding=buffers, dequantization=dense + norms)
        if self._full:
            yield _Phase(
                2 * self._rows(self.architecture.hidden_size), sharding=root + (2 * root + root if root else head)
            )

    def _gathered_block(self) -> int:
        return self._packed(self._block()) if self.config.quantized else self._width * self._block()

    def _largest(self) -> int:
        """The gradient of one weight before it is added up."""
        return self._width * self.architecture.hidden_size * self.architecture.intermediate_size

    @property
    def _tokens(self) -> int:
        """A sample of preferences is two documents."""
        documents = self.config.training.batch_size * (2 if self.config.preference else 1)
        return documents * self.config.dataset.max_sequence_length

    def _rows(self, width: int) -> int:
        """A tensor [tokens, width]."""
        return self._tokens * width * self._width

    def _loss(self) -> int:
        """The last hidden states, those with a label, their norm and their gradient; logits in fp32 and as products."""
        each = 4 if self._width == 4 else 4 + self._width
        logits = min(self._tokens, HEAD_CHUNK) * self.architecture.vocab_size * each
        return 4 * self._rows(self.architecture.hidden_size) + logits

    def _kept(self) -> int:
        """What the forward pass keeps of all blocks."""
        model = self.architecture
        hidden, inner = self._rows(model.hidden_size), self._rows(model.intermediate_size)
        queries = self._rows(model.num_attention_heads * model.head_dim)
        keys = self._rows(model.num_key_value_heads * model.head_dim)
        match self.config.training.activation_checkpointing:
            case "None":
                each = hidden + self._inside()
            case "Selective":
                each = 3 * hidden + 2 * (queries + keys + inner) + self._logsumexp()
            case "Full":
                each = hidden
        return model.num_hidden_layers * each

    def _inside(self) -> int:
        """What a block keeps besides its input: residual, norms, q, k, v, attention's output, gate, up and product."""
        model = self.architecture
        size = self._rows(model.hidden_size) + 2 * self._rows(model.intermediate_size) + self._logsumexp()
        size += 2 * self._rows(model.num_attention_heads * model.head_dim)
        size += 2 * self._rows(model.num_key_value_heads * model.head_dim)
        for inputs, width in (
            ({"q_proj", "k_proj", "v_proj"}, model.hidden_size),
            ({"gate_proj", "up_proj"}, model.hidden_size),
            ({"down_proj"}, model.intermediate_size),
        ):
            size += self._rows(width) if self._learns(inputs) else 0
        return size + self._dropped() + self._scaled()

    def _learns(self, layers: set[str]) -> bool:
        """Whether one of the layers has a gradient for its weight or adapter, and so needs its input."""
        return self.config.lora is None or not layers.isdisjoint(self.config.lora.target_modules)

    def _dropped(self) -> int:
        """Dropout: the adapters' own inputs and a byte for each number's fate."""
        lora = self.config.lora
        if lora is None or lora.dropout == 0:
            return 0
        inputs = sum(size_in for name, (size_in, _) in self._layers().items() if name in lora.target_modules)
        return self._rows(inputs) + self._rows(inputs) // self._width

    def _scaled(self) -> int:
        """DoRA: the outputs that are multiplied by what is learnt of the magnitude; two of them with dropout."""
        lora = self.config.lora
        if lora is None or not self.config.has_magnitude:
            return 0
        outputs = sum(size_out for name, (_, size_out) in self._layers().items() if name in lora.target_modules)
        return self._rows(outputs) * (2 if lora.dropout else 1)

    def _logsumexp(self) -> int:
        return self._rows(self.architecture.num_attention_heads) * 4 // self._width

    def _work(self) -> int:
        """What one block takes in its backward pass besides what is kept.

        It is widest where gate and up are there with the gradients of both and of their product, which is gone itself.
        """
        hidden, inner = self._rows(self.architecture.hidden_size), self._rows(self.architecture.intermediate_size)
        work = hidden + (2 if self._learns({"down_proj"}) else 3) * inner
        if self.config.has_magnitude and self._dropped():
            work += inner  # the base's product is there twice, and so is the gradient of its input
        match self.config.training.activation_checkpointing:
            case "None":
                return work
            case "Selective":
                return work + 3 * hidden + inner
            case "Full":
                return work + self._inside()
