"""Decoding with Transformer-XL: a step costs one token, because every layer keeps its keys and values."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from par_xl.models.transformer_xl import TransformerXL


class KeyValueCache:
    """Keys and values of a layer's last ``limit`` steps, in buffers of twice the room: most appends copy nothing old.

    Args:
        k, v: ``(B, H, M, D)``, those of the memory; the last ``limit`` are kept.
        limit: number of steps.
    """

    def __init__(self, k: Tensor, v: Tensor, limit: int):
        batch, heads, _, width = k.shape
        self.limit, self.start, self.end = limit, 0, 0
        self.keys, self.values = (x.new_empty(batch, heads, 2 * limit, width) for x in (k, v))
        self.append(k, v)

    def append(self, k: Tensor, v: Tensor) -> None:
        new = min(k.shape[2], self.limit)
        if self.end + new > 2 * self.limit:
            self._move_to_front(self.limit - new)
        for buffer, x in ((self.keys, k), (self.values, v)):
            buffer[:, :, self.end : self.end + new] = x[:, :, x.shape[2] - new :]
        self.end += new
        self.start = max(self.start, self.end - self.limit)

    def _move_to_front(self, kept: int) -> None:
        # The two places do not overlap: end > limit + kept.
        for buffer in (self.keys, self.values):
            buffer[:, :, :kept] = buffer[:, :, self.end - kept : self.end]
        self.start, self.end = 0, kept

    def __len__(self) -> int:
        return self.end - self.start

    def read(self) -> tuple[Tensor, Tensor]:
        """Views ``(B, H, len, D)``."""
        return self.keys[:, :, self.start : self.end], self.values[:, :, self.start : self.end]


class Decoder:
    """Feeds tokens to a :class:`TransformerXL` a few at a time, in evaluation mode and without gradients.

    A token sees the ``mem_len`` steps before the call and those of the call up to itself, as in the model's own
    segments; token by token this is ``same_length="inclusive"`` on the whole text. With relative positions
    (``attn_type`` 0 and 1) the layers keep keys and values; absolute positions change what they depend on at each step,
    so types 2 and 3 keep the hidden states and project them again.

    Args:
        model: in evaluation mode.
        memory: the model's, ``(n_layer, B, M, d)``: what was read before.
    """

    def __init__(self, model: TransformerXL, memory: Tensor):
        self.model, self.memory = model, memory
        self._positions: list = []
        self._n_positions = 0
        self.caches: list[KeyValueCache] = []
        if model.config.attn_type in (0, 1):
            with torch.no_grad():
                pairs = [f.keys_values(x) for f, x in zip(self._attentions(), memory, strict=True)]
            self.caches = [KeyValueCache(k, v, model.config.mem_len) for k, v in pairs]

    @torch.no_grad()
    def step(self, tokens: Tensor) -> Tensor:
        """The next tokens, int64 ``(B, T)``, to the model's hidden states ``(B, T, d)``."""
        if not self.caches:
            output = self.model(tokens, memory=self.memory)
            self.memory = output.memory
            return output.hidden
        model, n_keys = self.model, len(self.caches[0]) + tokens.shape[1]
        x = model.word_emb(tokens)
        states = iter(zip(self.caches, self._rows(n_keys, x.dtype), strict=True))
        options = model.attention_options()
        for layer in model.layers:
            if layer.dec_attn is not None:
                cache, (rows, *biases) = next(states)
                out, k, v, _ = layer.dec_attn.attend(x, rows[:, -n_keys:], *biases, cache.read(), **options)
                cache.append(k, v)
                x = layer.dec_attn.residual(x, out)
            if layer.pos_ff is not None:
                x = layer.pos_ff(x)
        return x

    def _attentions(self) -> list:
        return [layer.dec_attn for layer in self.model.layers if layer.dec_attn is not None]

    def _rows(self, n_keys: int, dtype: torch.dtype) -> list:
        """Each attention's projected positions of at least ``n_keys`` distances, made once, and its biases."""
        if n_keys > self._n_positions:
            self._n_positions = max(n_keys, self.model.config.mem_len + 1)
            by_layer = zip(self.model.layers, self.model.positions(self._n_positions, dtype), strict=True)
            self._positions = [
                layer.dec_attn.prepare(*args) for layer, (_, args) in by_layer if layer.dec_attn is not None
            ]
        return self._positions


def generate(
    model: TransformerXL,
    prompt: Tensor,
    n_tokens: int,
    *,
    memory: Tensor | None = None,
    temperature: float = 1.0,
    top_k: int = 0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Continue a text token by token. The model's :meth:`TransformerXL.generate`.

    Args:
        prompt: int64 ``(B, T)``.
        n_tokens: how many to add.
        memory: of what was read before the prompt; default: the model's ``init_memory``.
        temperature: divides the log-probabilities; 0 takes the most probable token.
        top_k: draw from the k most probable tokens only; 0 draws from all.
        generator: default: torch's.

    Returns:
        int64 ``(B, T + n_tokens)``, the prompt included.
    """

    def start() -> Decoder:
        return Decoder(model, model.init_memory(len(prompt)) if memory is None else memory)

    return continue_text(model, start, prompt, n_tokens, temperature, top_k, generator)


@torch.no_grad()
def continue_text(
    model: Any, start: Callable[[], Any], prompt: Tensor, n_tokens: int, temperature: float, top_k: int,
    generator: torch.Generator | None,
) -> Tensor:  # fmt: skip
    """What every ``generate`` does with the decoder that ``start`` makes once the model is in evaluation mode."""
    if prompt.dim() != 2 or not prompt.shape[1]:
        raise ValueError(f"prompt must have shape (B, T) with T > 0, not {tuple(prompt.shape)}")
    if temperature < 0 or top_k < 0:
        raise ValueError(f"temperature and top_k must not be negative, not {temperature} and {top_k}")
    if n_tokens < 0:
        raise ValueError(f"n_tokens must not be negative, not {n_tokens}")
    training = model.training
    model.eval()
    try:
        decoder, text = start(), [prompt]
        for _ in range(n_tokens):
            log_prob = model.log_prob(decoder.step(text[-1])[:, -1:])[:, 0]
            text.append(_sample(log_prob, temperature, top_k, generator))
    finally:
        model.train(training)
    return torch.cat(text, 1)


def _sample(log_prob: Tensor, temperature: float, top_k: int, generator: torch.Generator | None) -> Tensor:
    """``(B, V)`` to ``(B, 1)``."""
    if temperature == 0:
        return log_prob.argmax(-1, keepdim=True)
    words = None
    if 0 < top_k < log_prob.shape[1]:
        log_prob, words = log_prob.topk(top_k)
    drawn = torch.multinomial((log_prob / temperature).softmax(-1), 1, generator=generator)
    return drawn if words is None else words.gather(1, drawn)
