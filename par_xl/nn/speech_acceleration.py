"""Fused twins of the relative attention of ESPnet and NeMo, which take those layers' own calls."""

import copy
import inspect
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from par_xl.nn.attention_mask import Visible, read_mask, read_once
from par_xl.nn.rel_position_attention import attention_heads


def speech_twin(module: nn.Module) -> nn.Module | None:
    """The twin of ESPnet's ``RelPositionMultiHeadedAttention`` or NeMo's ``RelPositionMultiHeadAttention``; else None.

    Both are told by the class name, the order of the call's arguments and the parts, since other functions have one or
    the other: ESPnet's ``Legacy...`` shifts in one direction only, WeNet's class of ESPnet's name takes ``(mask,
    pos_emb, cache)`` and does not shift, ``zero_triu`` drops the positions of the future. They are left alone.

    A twin is a copy that shares all parts with ``module``, of a class derived from the module's own.
    """
    call = type(module).__name__, tuple(inspect.signature(module.forward).parameters)
    if call not in TWINS or set(module._modules) != MODULES or set(module._parameters) != BIASES:
        return None
    if not hasattr(module, "rel_shift") or getattr(module, "zero_triu", False):
        return None
    twin = copy.copy(module)
    twin.__class__ = _twin_class((TWINS[call], type(module)))
    return twin


@cache
def _twin_class(bases: tuple[type, ...]) -> Any:
    return type(f"Fused{bases[1].__name__}", bases, {})


def _new_twin(*bases: type) -> Any:
    kind = _twin_class(bases)
    return kind.__new__(kind)


class _SpeechTwin(nn.Module):
    """The fused attention where the kernel can do what a call asks for, and the module's own ``forward`` elsewhere.

    That is for a mask other than a window around each query, the padding behind the real keys and queries that see
    nothing (such as NeMo's chunks, or a cache that is not full), and for positions of each sequence's own. To know, the
    host looks at the mask once for all layers that share it; for a mask made in ``torch.inference_mode``, whose changes
    cannot be seen, once a layer.
    """

    def __reduce__(self) -> Any:  # pickle would look for the class by its name
        return _new_twin, type(self).__bases__, self.__dict__

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, pos_emb: Tensor, mask: Tensor | None, keeps: bool
    ) -> Tensor | None:
        """The layer's result ``(B, Q, d)``; None where the kernel cannot give it. ``keeps``: a nonzero mask does."""
        theirs: Any = self
        batch, n_queries, n_keys = *query.shape[:2], key.shape[1]
        if pos_emb.dim() != 3 or len(pos_emb) != 1 or not n_queries <= n_keys <= pos_emb.shape[1] - n_queries + 1:
            return None
        seen: Visible | None = Visible()
        if mask is not None:
            allowed = mask.dim() == 3 and mask.shape[0] in (1, batch) and mask.shape[1] in (1, n_queries)
            seen = read_once(mask, _read, n_queries, keeps) if allowed and mask.shape[2] == n_keys else None
        if seen is None:
            return None
        lengths = None if seen.key_lengths is None else seen.key_lengths.expand(batch)
        dropout_p = theirs.dropout.p if theirs.dropout.training else 0.0
        heads = attention_heads(theirs, query, key, value, pos_emb, dropout_p, seen.window, lengths)
        if seen.rows is not None:
            heads = heads.masked_fill(~seen.rows[:, None, :, None], 0.0)
        return theirs.linear_out(heads.transpose(1, 2).flatten(2))


def _read(mask: Tensor, n_queries: int, keeps: bool) -> Visible | None:
    return read_mask(mask != 0 if keeps else mask == 0, n_queries)


class EspnetTwin(_SpeechTwin):
    """``query, key, value (B, T, d)``, ``pos_emb (1, 2T - 1, d)``; ``mask (B, 1, T)`` or ``(B, T, T)`` keeps where it
    is not 0. There is no ``attn`` to look at."""

    def forward(self, query, key, value, pos_emb, mask):
        fits = pos_emb.shape[1] == 2 * key.shape[1] - 1
        out = self.attend(query, key, value, pos_emb, mask, keeps=True) if fits else None
        return super().forward(query, key, value, pos_emb, mask) if out is None else out


class NemoTwin(_SpeechTwin):
    """``query, key, value (B, T, d)``, ``cache (B, C, d)``, ``pos_emb (1, P, d)`` with ``P >= C + 2T - 1``; ``mask
    (B, T, C + T)`` hides where it is True. With a cache it returns the next one too."""

    def forward(self, query, key, value, mask, pos_emb, cache=None):
        keys, values = key, value
        if cache is not None:
            keys = values = torch.cat((cache, key), 1)
        out = self.attend(query, keys, values, pos_emb, mask, keeps=False)
        if out is None:
            return super().forward(query, key, value, mask, pos_emb, cache)
        if cache is None:
            return out
        n_kept = query.shape[1] - self.cache_drop_size  # of these frames; an encoder may drop its look-ahead
        return out, torch.cat((cache[:, n_kept:], query[:, :n_kept]), 1)


MODULES = {"linear_q", "linear_k", "linear_v", "linear_out", "linear_pos", "dropout"}
BIASES = {"pos_bias_u", "pos_bias_v"}
TWINS: dict[tuple[str, tuple[str, ...]], type] = {
    ("RelPositionMultiHeadedAttention", ("query", "key", "value", "pos_emb", "mask")): EspnetTwin,
    ("RelPositionMultiHeadAttention", ("query", "key", "value", "mask", "pos_emb", "cache")): NemoTwin,
}
