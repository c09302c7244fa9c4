"""Sinusoidal position encodings."""

import torch
from torch import Tensor


def sinusoids(
    positions: Tensor, width: int, *, interleaved: bool = False, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Position encodings, ``(N,)`` to ``(N, width)``.

    ``[sin(x w_0), sin(x w_1), ..., cos(x w_0), cos(x w_1), ...]`` with ``w_i = 10000^(-2i / width)``, as in
    Transformer-XL; with ``interleaved`` ``[sin(x w_0), cos(x w_0), sin(x w_1), ...]``, as in ESPnet and NeMo.

    Positions and angles are fp32 (fp64 for ``dtype=torch.float64``), whatever the model's dtype: bf16 counts exactly to
    256 and fp16 to 2048 only. The result is then rounded once, to ``dtype``.

    Args:
        positions: integer or floating point; negative ones are fine.
        width: an even number.
        dtype: of the result.
    """
    if width % 2:
        raise ValueError(f"width must be even, half sines and half cosines, not {width}")
    wide = torch.promote_types(dtype, torch.float32)
    frequencies = 10000 ** (torch.arange(0, width, 2, device=positions.device, dtype=wide) / -width)
    angles = positions.to(wide)[:, None] * frequencies
    waves = torch.stack((angles.sin(), angles.cos()), -1 if interleaved else -2)
    return waves.flatten(1).to(dtype)


def distances(n_keys: int, device: torch.device | None = None, *, right: int = 0) -> Tensor:
    """The distances of the rows of ``r`` in :func:`par_xl.rel_attention`: ``n_keys - 1, ..., 1, 0, ..., -right``.

    ``right`` is 0 for a causal language model and ``Q - 1`` for a bidirectional encoder.
    """
    return torch.arange(n_keys - 1, -right - 1, -1, device=device)
