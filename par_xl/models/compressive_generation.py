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
        model = self.model
        self.states, self.segment, self.n_read = states, torch.empty(0), 0
        rows: list[Any] = [states[0].rows[:, :0]] * len(model.layers)
        for i, state in zip(model.memory_layers, states, strict=True):
            rows[i] = state.rows
        self.caches = []
        self.rows: list[Any] = []  # each layer's projected positions, farthest first, and biases
        for i, (layer, x) in enumerate(zip(model.layers, rows, strict=True)):
            limit = x.shape[1] + self.segment_length
            k, v = layer.dec_attn.keys_values(x)
            self.caches.append(KeyValueCache(k, v, limit))
            self.rows.append(layer.dec_attn.prepare(*model.positions(limit, x.dtype)[i][1]))

    @torch.no_grad()
    def step(self, tokens: Tensor) -> Tensor:
        """The next tokens, int64 ``(B, T)``, to hidden states ``(B, T, d)``."""
        room = self.segment_length - self.n_read
        if tokens.shape[1] > room:
            return torch.cat([self.step(tokens[:, :room]), self.step(tokens[:, room:])], 1)
        x = self.model.word_emb(tokens)
        for layer, cache, (rows, *biases) in zip(self.model.layers, self.caches, self.rows, strict=True):
            n_keys = len(cache) + tokens.shape[1]
            out, k, v = layer.dec_attn.attend(x, rows[:, -n_keys:], *biases, cache.read(), None)
            cache.append(k, v)
            x = layer.pos_ff(layer.dec_attn.residual(x, out))
        self.segment = torch.cat([self.segment, tokens], 1) if self.n_read else tokens
        self.n_read += tokens.shape[1]
        if self.n_read == self.segment_length:
            memory: Memory = [(s.rows, s.compressed, s.usage) for s in self.states]
            self._start([MemoryState(*state) for state in self.model(self.segment, memory=memory).memory])
        return x


def generate(
    model: CompressiveTransformer,
    prompt: Tensor,
    n_tokens: int,
    *,
    segment_length: int,
    memory: Memory | None = None,
    temperature: float = 1.0,
    top_k: int = 0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Continue a text token by token. The model's :meth:`CompressiveTransformer.generate`.

    Args:
        prompt: int64 ``(B, T)``, of any length.
        n_tokens: how many to add.
        segment_length: steps after which the memory takes a segment, as in training.
        memory: of what was read before the prompt; default: the model's ``init_memory``.
        temperature: divides the log-probabilities; 0 takes the most probable token.
        top_k: draw from the k most probable tokens only; 0 draws from all.
        generator: default: torch's.

    Returns:
        int64 ``(B, T + n_tokens)``, the prompt included.
    """
    if segment_length < 1:
        raise ValueError(f"segment_length must be positive, not {segment_length}")

    def start() -> SegmentDecoder:
        return SegmentDecoder(model, model.init_memory(len(prompt)) if memory is None else memory, segment_length)

    return continue_text(model, start, prompt, n_tokens, temperature, top_k, generator)
