"""Decoding with the Compressive Transformer, segment by segment as in training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from par_xl.models.generation import KeyValueCache, continue_text
from par_xl.nn.compressive_memory import MemoryState

if TYPE_CHECKING:
    from par_xl.models.compressive import CompressiveTransformer, Memory


class SegmentDecoder:
    """Feeds tokens to a model in evaluation mode, without gradients; a token costs one step.

    The memory stays as it is until ``segment_length`` tokens were read, and then takes them all, as in training: token
    by token, each would be evicted alone and none would fill a group to compress. Within a segment the layers keep keys
    and values.
    """

    def __init__(self, model: CompressiveTransformer, memory: Memory, segment_length: int):
        self.model, self.segment_length = model, segment_length
        self._start([MemoryState(*state) for state in memory])

    def _start(self, states: list[MemoryState]) -> None:
        model, dtype = self.model, states[0].rows.dtype
        self.states, self.segment, self.n_read = states, torch.empty(0), 0
        by_layer = dict(zip(model.memory_layers, states, strict=True))
        empty = MemoryState(states[0].rows[:, :0])
        # Of each layer: keys and values, projected positions (the farthest first) and biases; of the compressed steps
        # that have positions of their own, how many and these.
        self.layers: list[Any] = []
        for i, layer in enumerate(model.layers):
            state = by_layer.get(i, empty)
            limit = state.rows.shape[1] + self.segment_length
            k, v = layer.dec_attn.keys_values(state.rows)
            cache = KeyValueCache(k, v, limit)
            own = state.compressed if model.compressed_positions else 0
            positions = layer.dec_attn.prepare(*model.positions(limit - own, dtype)[0][1])
            rows = None
            if own:
                waves: Any = model.positions(own + self.segment_length, dtype)[0][1][0]
                rows = model.compressed_positions[str(i)](waves[:-1])
            self.layers.append((layer, cache, positions, own, rows))

    @torch.no_grad()
    def step(self, tokens: Tensor) -> Tensor:
        """The next tokens, int64 ``(B, T)``, to hidden states ``(B, T, d)``."""
        read = []
        while tokens.shape[1]:
            part, tokens = tokens.tensor_split([self.segment_length - self.n_read], 1)
            read.append(self._read(part))
        return torch.cat(read, 1)

    def _read(self, tokens: Tensor) -> Tensor:
        """The same within a segment."""
        room, steps = self.segment_length - self.n_read, tokens.shape[1]
        x, options = self.model.word_emb(tokens), self.model.attention_options()
        for i, (layer, cache, (r, *biases), own, rows) in enumerate(self.layers):
            # Their rows of the distances own + n_read + steps - 1 to n_read + 1.
            near = None if rows is None else rows[:, room - steps : room + own - 1]
            old, part = self.model.split_memory(i, cache.read(), own, near)
            n_keys = len(cache) - own + steps
            out, k, v, _ = layer.dec_attn.attend(x, r[:, -n_keys:], *biases, old, compressed=part, **options)
            cache.append(k, v)
            x = layer.pos_ff(layer.dec_attn.residual(x, out))
        self.segment = torch.cat([self.segment, tokens], 1) if self.n_read else tokens
        self.n_read += steps
        if self.n_read == self.segment_length:
            memory: Memory = [(s.rows, s.compressed, s.usage) for s in self.states]
            self._start([MemoryState(*state) for state in self.model(self.segment, memory=memory).memory])
        return x


def generate(
    model: CompressiveTransformer,
    prompt: Tensor,
    n_tokens: int,
    *,
    segment_length: int | None = None,
    memory: Memory | None = None,
    temperature: float = 1.0,
    top_k: int = 0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Continue a text token by token. The model's :meth:`CompressiveTransformer.generate`.

    Args:
        prompt: int64 ``(B, T)``, of any length.
        n_tokens: how many to add.
        segment_length: steps after which the memory takes a segment, as in training; default: ``config.segment_len``.
        memory: of what was read before the prompt; default: the model's ``init_memory``.
        temperature: divides the log-probabilities; 0 takes the most probable token.
        top_k: draw from the k most probable tokens only; 0 draws from all.
        generator: default: torch's.

    Returns:
        int64 ``(B, T + n_tokens)``, the prompt included.
    """
    most = model.config.segment_len
    length = most if segment_length is None else segment_length
    if length < 1 or 0 < most < length:
        limit = f"and at most config.segment_len {most}" if most else "as config.segment_len is not given"
        raise ValueError(f"segment_length must be positive, {limit}, not {segment_length}")

    def start() -> SegmentDecoder:
        return SegmentDecoder(model, model.init_memory(len(prompt)) if memory is None else memory, length)

    return continue_text(model, start, prompt, n_tokens, temperature, top_k, generator)
