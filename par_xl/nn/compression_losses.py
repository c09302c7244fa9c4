"""Auxiliary losses that train a compressor: what a compressed memory must still be good for.

    attention reconstruction   mean((attention(q, old) - attention(q, compressed))^2)
    auto-encoding              mean((old - decode(compressed))^2)

Attention is by content: no positions, no mask, over the evicted steps alone. As published, the loss trains the
compressor and nothing else: the queries, the old memory and the projections are constants to it. The third way of the
paper, BPTT, has no loss of its own: ``CompressiveMemory(bptt=True)``.

Rae et al.: Compressive Transformers for Long-Range Sequence Modelling (arXiv 1911.05507), section 3.3; sonnet v1
``nets/transformer.py``, ``CompressiveTransformer``.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from par_xl.ops.registry import acc_dtype


def attention_reconstruction_loss(
    hidden: Tensor,
    old: Tensor,
    compressed: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    value_weight: Tensor,
    n_heads: int,
    *,
    scale: float | None = None,
    stop_hidden: bool = True,
    stop_old: bool = True,
    stop_weights: bool = True,
    reduction: str = "mean",
) -> Tensor:
    """How far attention to the compressed steps is from attention to the steps that they replace.

    Equivalent, up to which gradients are stopped, to ::

        heads = lambda x, weight: F.linear(x, weight).unflatten(2, (n_heads, -1)).transpose(1, 2)
        q = heads(hidden, query_weight)
        read = lambda x: F.scaled_dot_product_attention(q, heads(x, key_weight), heads(x, value_weight), scale=scale)
        F.mse_loss(read(compressed), read(old), reduction=reduction)

    Nothing of queries times steps is made (torch's fused attention).

    Args:
        hidden: ``(B, T, d)``, the layer's input of the current segment, normalised if the layer normalises its input.
        old: ``(B, n, d)``, the steps that left the memory, normalised likewise.
        compressed: ``(B, n / rate, d)``, what they became.
        query_weight, key_weight, value_weight: ``(n_heads * D, d)``, the layer's projections.
        n_heads: heads.
        scale: default ``D ** -0.5``.
        stop_hidden, stop_old, stop_weights: whether the loss sends no gradient into these; all three as published.
        reduction: "mean" over elements (the published code) or "sum" (the paper's squared norm).

    Returns:
        A 0-d tensor in fp32 (fp64 for fp64); 0 where nothing was evicted.

    Raises:
        ValueError: a wrong reduction, or inputs of different batch.
    """
    _check_reduction(reduction)
    if not len(hidden) == len(old) == len(compressed):
        sizes = f"{len(hidden)}, {len(old)} and {len(compressed)}"
        raise ValueError(f"hidden, old and compressed must have one batch size, not {sizes}")
    if compressed.shape[1] == 0:
        return _nothing(compressed)
    hidden, old = (x.detach() if stop else x for x, stop in ((hidden, stop_hidden), (old, stop_old)))

    def heads(x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight.detach() if stop_weights else weight).unflatten(2, (n_heads, -1)).transpose(1, 2)

    def read(x: Tensor) -> Tensor:
        keys, values = heads(x, key_weight), heads(x, value_weight)
        return F.scaled_dot_product_attention(queries, keys, values, scale=scale)

    queries = heads(hidden, query_weight)
    return _squared_error(read(compressed), read(old), reduction)


def auto_encoding_loss(
    old: Tensor,
    compressed: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stop_old: bool = True,
    reduction: str = "mean",
) -> Tensor:
    """How far a linear decoder of the compressed steps is from the steps that they replace.

    Equivalent to ``F.mse_loss(F.conv_transpose1d(compressed.mT, weight, bias, stride=rate).mT, old.detach())``, as one
    matrix product.

    Args:
        old: ``(B, n, d)``.
        compressed: ``(B, n / rate, d)``.
        weight: ``(d, d, rate)``, the decoder's, as in ``nn.ConvTranspose1d``: input, output, step of the group.
        bias: ``(d,)`` or None.
        stop_old: whether the loss sends no gradient into ``old``; as published.
        reduction: "mean" over elements or "sum".

    Returns:
        A 0-d tensor in fp32 (fp64 for fp64); 0 where nothing was evicted.

    Raises:
        ValueError: a wrong reduction, or ``old`` of another shape than what is decoded.
    """
    _check_reduction(reduction)
    rate = weight.shape[2]
    wanted = (compressed.shape[0], rate * compressed.shape[1], weight.shape[1])
    if old.shape != wanted:
        raise ValueError(f"old must have shape {wanted}, not {tuple(old.shape)}")
    if compressed.shape[1] == 0:
        return _nothing(compressed)
    product = F.linear(compressed, weight.permute(2, 1, 0).flatten(0, 1), None if bias is None else bias.repeat(rate))
    decoded = product.unflatten(2, (rate, -1)).flatten(1, 2)
    return _squared_error(decoded, old.detach() if stop_old else old, reduction)


def _squared_error(x: Tensor, y: Tensor, reduction: str) -> Tensor:
    return F.mse_loss(x.to(acc_dtype(x)), y.to(acc_dtype(y)), reduction=reduction)


def _nothing(compressed: Tensor) -> Tensor:
    return compressed.sum(dtype=acc_dtype(compressed))


def _check_reduction(reduction: str) -> None:
    if reduction not in ("mean", "sum"):
        raise ValueError(f'reduction must be "mean" or "sum", not {reduction!r}')


def reduce_layers(losses: Sequence[Tensor], reduction: str = "mean") -> Tensor:
    """One loss from those of the layers: "mean" (sonnet, lucidrains) or "sum" (the paper, labml)."""
    _check_reduction(reduction)
    total = torch.stack(tuple(losses))
    return total.mean() if reduction == "mean" else total.sum()


class AttentionReconstructionLoss(nn.Module):
    """:func:`attention_reconstruction_loss` as a module, without parameters of its own."""

    def __init__(
        self,
        n_heads: int,
        *,
        scale: float | None = None,
        stop_hidden: bool = True,
        stop_old: bool = True,
        stop_weights: bool = True,
        reduction: str = "mean",
    ):
        super().__init__()
        self.n_heads = n_heads
        self.options: dict[str, Any] = dict(scale=scale, reduction=reduction)
        self.options |= dict(stop_hidden=stop_hidden, stop_old=stop_old, stop_weights=stop_weights)

    def forward(
        self, hidden: Tensor, old: Tensor, compressed: Tensor, query: Tensor, key: Tensor, value: Tensor
    ) -> Tensor:
        return attention_reconstruction_loss(hidden, old, compressed, query, key, value, self.n_heads, **self.options)


class AutoEncodingLoss(nn.Module):
    """:func:`auto_encoding_loss` with its own decoder: ``decoder.weight (width, width, rate)``, no bias (sonnet)."""

    def __init__(self, width: int, rate: int, *, stop_old: bool = True, reduction: str = "mean"):
        super().__init__()
        self.decoder = nn.ConvTranspose1d(width, width, rate, rate, bias=False)  # sonnet's conv.transpose()
        self.stop_old, self.reduction = stop_old, reduction

    def forward(self, old: Tensor, compressed: Tensor) -> Tensor:
        weight = self.decoder.weight
        return auto_encoding_loss(old, compressed, weight, stop_old=self.stop_old, reduction=self.reduction)
