"""The Llama decoder in plain PyTorch. Parameter names are Hugging Face's; adapters and sharding come from outside.

Shapes: B rows, S positions, D hidden_size, H query heads, K key-value heads, E head_dim, V vocab_size.
Half-split RoPE layout, as in Hugging Face's files. Training batches are ragged: one row of documents, end to end, that
do not see each other. Right padding would need no mask: attention is causal, so nothing real sees what is behind it.
"""

import math
from collections.abc import Sequence
from typing import Any, Final, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kubetune_contract.architecture import Llama3Scaling, LlamaConfig, ModelError
from kubetune_trainer.cross_entropy import Pair, linear_cross_entropy, sum_products

__all__ = ["IGNORE", "KeyValueCache", "Llama", "LlamaConfig", "ModelError"]

IGNORE: Final = -100
"""Label of a position without loss (PyTorch's ignore_index)."""


class Documents(NamedTuple):
    """Where the documents of a ragged row lie."""

    lengths: tuple[int, ...]
    """Positions of each, first to last."""
    numbers: Tensor
    """Number of each token's document, int64 [S]."""
    positions: Tensor
    """Position of each token in its document, int64 [S]."""
    boundaries: Tensor | None
    """0 and the end of each document, int32 [documents + 1]; only where the device has a kernel that takes them."""

    @classmethod
    def of(cls, lengths: Sequence[int], like: Tensor) -> Self:
        """For a row of documents with the device and dtype of the activations `like`."""
        ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        numbers = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
        positions = torch.arange(len(numbers)) - ends[numbers]
        kernel = like.device.type == "cuda" and like.dtype == torch.bfloat16
        device = like.device
        return cls(tuple(lengths), numbers.to(device), positions.to(device), ends.to(device) if kernel else None)


class KeyValueCache:
    """Keys and values of the positions seen so far, for generation: room for `positions` in each layer."""

    def __init__(self, positions: int) -> None:
        self.positions = positions
        self.length = 0
        """Positions filled. The model moves it on after each forward pass."""
        self._layers: dict[int, Pair] = {}

    def append(self, layer: int, keys: Tensor, values: Tensor) -> Pair:
        """Store `keys` and `values` [B, S, K, E] after the filled positions; returns all of that layer's so far."""
        if layer not in self._layers:
            shape = (keys.shape[0], self.positions, *keys.shape[2:])
            self._layers[layer] = keys.new_empty(shape), values.new_empty(shape)
        all_keys, all_values = self._layers[layer]
        end = self.length + keys.shape[1]
        all_keys[:, self.length : end] = keys
        all_values[:, self.length : end] = values
        return all_keys[:, :end], all_values[:, :end]


class Attention(nn.Module):
    """Causal grouped-query self-attention with rotary positions."""

    def __init__(self, config: LlamaConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        queries = config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=False)

    def forward(
        self, x: Tensor, rotation: Pair, documents: Documents | None = None, cache: KeyValueCache | None = None
    ) -> Tensor:
        """[B, S, D] -> [B, S, D]."""
        heads = (*x.shape[:2], -1, self.head_dim)
        q = rotate(self.q_proj(x).view(heads), rotation)
        k = rotate(self.k_proj(x).view(heads), rotation)
        v = self.v_proj(x).view(heads)
        if cache is not None:
            assert x.shape[1] == 1 or not cache.length, "after the prompt the cache takes one position at a time"
            k, v = cache.append(self.layer, k, v)
        mixed = attend(q, k, v) if documents is None else attend_documents(q, k, v, documents)
        output: Tensor = self.o_proj(mixed.flatten(2))
        return output


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention: [B, S, H, E] and twice [B, S, K, E] -> [B, S, H, E]; or one position behind a cache."""
    # enable_gqa beats expanded keys and values on CPU by a fifth and needs no copy. SDPA's causal mask starts at the
    # upper left: right for whole sequences, not for one position behind a cache.
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1, enable_gqa=True).transpose(1, 2)


def attend_documents(q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
    """Causal attention inside each document of one row: [1, S, H, E] and twice [1, S, K, E] -> [1, S, H, E]."""
    if documents.boundaries is not None:
        from torch.nn.attention.varlen import varlen_attn

        ends, longest = documents.boundaries, max(documents.lengths)
        mixed: Tensor = varlen_attn(  # type: ignore[assignment]  # a pair only with return_aux
            q[0], k[0], v[0], ends, ends, longest, longest, window_size=(-1, 0), enable_gqa=True
        )
        return mixed[None]
    split = (torch.split(tensor, list(documents.lengths), dim=1) for tensor in (q, k, v))
    return torch.cat([attend(*document) for document in zip(*split, strict=True)], dim=1)


def rotate(x: Tensor, rotation: Pair) -> Tensor:
    """Rotary position embedding (Su et al. 2021) of [B, S, heads, E]; element i is paired with i + E / 2."""
    cos, sin = rotation
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class MLP(nn.Module):
    """The SwiGLU feed-forward layer (Shazeer 2020)."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, S, D] -> [B, S, D]."""
        output: Tensor = self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))
        return output


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, elementwise. Only the two inputs are kept for the backward pass."""
    product: Tensor = _SwiGLU.apply(gate, up)  # type: ignore[no-untyped-call]  # torch's apply
    return product


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Pair:
        (gradient,) = gradients
        gate, up = ctx.saved_tensors
        # These are the widest tensors of a block: two more for a moment, not four.
        gate_gradient = gradient * up
        torch.ops.aten.silu_backward.grad_input(gate_gradient, gate, grad_input=gate_gradient)
        return gate_gradient, F.silu(gate).mul_(gradient)


class Block(nn.Module):
    """One decoder layer: attention and MLP, each behind a norm and beside a residual."""

    def __init__(self, config: LlamaConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp = MLP(config)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, x: Tensor, rotation: Pair, documents: Documents | None = None, cache: KeyValueCache | None = None
    ) -> Tensor:
        """[B, S, D] -> [B, S, D]."""
        x = x + self.self_attn(self.input_layernorm(x), rotation, documents, cache)
        output: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return output


class Decoder(nn.Module):
    """Embedding, blocks and final norm: what Hugging Face names `model`."""

    inverse_frequencies: Tensor

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.register_buffer("inverse_frequencies", inverse_frequencies(config), persistent=False)

    def embed(self, input_ids: Tensor) -> Tensor:
        """[B, S] -> [B, S, D], on the blocks' device also where the table is kept in host memory."""
        x: Tensor = self.embed_tokens(input_ids.to(self.embed_tokens.weight.device))
        return x.to(self.norm.weight.device)

    def rotation(self, positions: Tensor, dtype: torch.dtype) -> Pair:
        """Cosine and sine of the positions [S], computed in fp32."""
        angles = torch.outer(positions.float(), self.inverse_frequencies)[:, None]
        return angles.cos().to(dtype), angles.sin().to(dtype)


class Head(nn.Linear):
    """The layer that gives the logits. It is never called, so that the loss can take it chunk by chunk."""

    def products(self, hidden: Tensor) -> list[Pair]:
        """What the logits of `hidden` [..., D] are the sum of: pairs of [..., K] and [V, K], to be multiplied."""
        return [(hidden, self.weight)]


class Llama(nn.Module):
    """A Llama language model. Build it under `torch.device("meta")` to allocate nothing."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.dtype = torch.get_default_dtype()
        """Number format of the products; weights may be kept in a wider one."""
        self.model = Decoder(config)
        # A tied head has no module: the head then reads the embedding's weight.
        tied = config.tie_word_embeddings
        self.lm_head = None if tied else Head(config.hidden_size, config.vocab_size, bias=False)

    @property
    def blocks(self) -> list[Block]:
        """The decoder layers, first to last."""
        return [block for block in self.model.layers if isinstance(block, Block)]

    def init_buffers(self, device: torch.device | None = None) -> None:
        """Compute the RoPE frequencies again, in fp32 on `device`: to_empty() and .to(dtype) spoil them.

        Without a `device`, on that of the weights; offloaded weights are elsewhere.
        """
        with device or self.model.norm.weight.device:
            self.model.inverse_frequencies = inverse_frequencies(self.config)

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        *,
        lengths: Sequence[int] | None = None,
        cache: KeyValueCache | None = None,
        by_document: bool = False,
    ) -> Tensor:
        """Logits, or the loss if there are labels.

        `input_ids` [B, S]: token ids. `labels` [B, S]: position i's target token, or IGNORE; they are shifted already.
        `lengths`: the one row (B = 1) is made of documents of so many tokens, none of which sees another.
        `cache`: the positions before `input_ids`; the model adds these to it.
        Returns logits [B, S, V] in the weights' dtype; with a cache those of the last position only, [B, 1, V]; with
        labels the float32 SUM of the cross-entropy over all label tokens, in nats (0 if there are none), or
        `by_document` the sum of each document, [documents].
        """
        x = self.model.embed(input_ids)
        documents = None if lengths is None else Documents.of(lengths, x)
        if documents is None:
            start = cache.length if cache is not None else 0
            positions = torch.arange(start, start + input_ids.shape[1], device=x.device)
        else:
            positions = documents.positions
        rotation = self.model.rotation(positions, x.dtype)
        for block in self.model.layers:
            x = block(x, rotation, documents, cache)
        if cache is not None:
            cache.length += input_ids.shape[1]
            x = x[:, -1:]
        if labels is None:
            return sum_products(self._products(self.model.norm(x)))
        chosen = labels != IGNORE
        products = self._products(self.model.norm(x[chosen]))
        losses = linear_cross_entropy(products, labels[chosen], by_token=by_document)
        if documents is None or not by_document:
            return losses
        return losses.new_zeros(len(documents.lengths)).index_add(0, documents.numbers[chosen[0]], losses)

    def _products(self, hidden: Tensor) -> list[Pair]:
        return [(hidden, self.model.embed_tokens.weight)] if self.lm_head is None else self.lm_head.products(hidden)


def inverse_frequencies(config: LlamaConfig) -> Tensor:
    """RoPE's angle per position for each pair of dimensions, [E / 2], float32, scaled for Llama 3.1 and later."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float() / config.head_dim
    frequencies = 1.0 / config.rope_theta**exponents
    return frequencies if config.rope_scaling is None else _scale(frequencies, config.rope_scaling)


def _scale(frequencies: Tensor, scaling: Llama3Scaling) -> Tensor:
    """Llama 3.1's rule (`apply_scaling` in Meta's llama-models): long waves are stretched, short ones stay."""
    wavelengths = 2 * math.pi / frequencies
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = (scaling.original_max_position_embeddings / wavelengths - low) / (high - low)
    kept = kept.clamp(0, 1)
    return (1 - kept) * frequencies / scaling.factor + kept * frequencies
