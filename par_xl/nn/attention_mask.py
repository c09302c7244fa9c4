"""Reading an attention mask as what a kernel takes: a window, key lengths, and queries that see nothing."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary


class Visible(NamedTuple):
    """What a mask leaves visible: ``-right <= i + (K - Q) - j <= left`` and ``j < key_lengths``, in some rows ``i``.

    ``window`` is ``(left, right)``; ``key_lengths (B,)`` and ``rows (B, Q)`` are None where they hide nothing.
    """

    window: tuple[int | None, int | None] = (None, None)
    key_lengths: Tensor | None = None
    rows: Tensor | None = None


def read_mask(visible: Tensor, n_queries: int) -> Visible | None:
    """What ``visible``, bool ``(B, Q, K)`` or ``(B, 1, K)`` for ``Q = n_queries``, is; None: it is nothing of the kind.

    The host waits for the mask once.
    """
    if visible.numel() == 0:
        return None
    n_keys, key = visible.shape[2], torch.arange(visible.shape[2], device=visible.device)
    key_lengths = torch.where(visible.any(1), key + 1, 0).amax(1)
    expected = (key < key_lengths[:, None])[:, None]
    left = right = torch.full_like(key_lengths[0], n_keys + n_queries)
    if visible.shape[1] > 1:
        distance = torch.arange(n_queries, device=visible.device)[:, None] + (n_keys - n_queries) - key
        somewhere = visible.any(0)
        left, right = (torch.where(somewhere, d, least).amax() for d, least in ((distance, -1), (-distance, 0)))
        expected = expected & (-right <= distance) & (distance <= left)
    rows = visible.any(2)
    same, same_in_rows = (visible == expected).all(), (visible == expected & rows[:, :, None]).all()
    found = torch.stack((left, right, (key_lengths == n_keys).all(), same, same_in_rows)).tolist()
    if not found[4]:
        return None
    window = tuple(None if limit >= n_keys - 1 else limit for limit in found[:2])
    return Visible(window, None if found[2] else key_lengths, None if found[3] else rows)  # type: ignore[arg-type]


# What was read of a mask, by which function, and the mask's version then.
_read: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def read_once(mask: Tensor, read: Callable[..., Any], *args: Any) -> Any:
    """``read(mask, *args)``, so that the host looks once for all layers that share the mask, until it changes."""
    if mask.is_inference():  # it may change unseen
        return read(mask, *args)
    now = mask._version, read, args
    then, result = _read.get(mask, (None, None))
    if then != now:
        result = read(mask, *args)
        _read[mask] = now, result
    return result


# What torch.compiler.disable sets; calling it would import torch._dynamo, and with it triton, along with par_xl.
read_once._torchdynamo_disable = True  # type: ignore[attr-defined]
