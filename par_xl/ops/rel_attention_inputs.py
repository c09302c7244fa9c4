"""What rel_attention and compressed_attention check of their arguments, and what the kernels take in their place."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from par_xl.ops.registry import _C, DTYPES, host_can_look, under_autocast

UNLIMITED = 2**31 - 1  # a window without an end, no clamp


def check_tensor(name: str, x: Tensor, q: Tensor, shape: tuple[int | None, ...], why: str) -> None:
    """``shape`` holds None where any size will do; ``why`` says in words what the sizes mean."""
    if x.dim() != len(shape) or any(n is not None and size != n for size, n in zip(x.shape, shape, strict=True)):
        sizes = ", ".join("any" if n is None else str(n) for n in shape)
        raise ValueError(f"{name} must have shape ({sizes}), {why}, not {tuple(x.shape)}")
    if x.dtype != q.dtype:
        raise TypeError(f"{name} must have the dtype of q {q.dtype}, not {x.dtype}")
    if x.device != q.device:
        raise ValueError(f"{name} must be on {q.device} as q is, not on {x.device}")


def check_tensors(q: Tensor, k: Tensor, v: Tensor, r: Tensor, memory: Sequence[Tensor]) -> None:
    if q.dim() != 4:
        raise ValueError(f"q must have 4 dimensions, (B, H, Q, D), not shape {tuple(q.shape)}")
    if not q.is_floating_point():
        raise TypeError(f"q must be floating point, not {q.dtype}")
    batch, heads, _, width = q.shape
    check_tensor("k", k, q, (batch, heads, None, width), "(B, H, T, D)")
    check_tensor("v", v, q, tuple(k.shape), "that of k")
    check_tensor("r", r, q, (heads, None, width), "(H, P, D)")
    if memory:
        check_tensor("memory[0]", memory[0], q, (batch, heads, None, width), "(B, H, M, D)")
        check_tensor("memory[1]", memory[1], q, tuple(memory[0].shape), "that of memory[0]")


def bias_of(name: str, bias: Tensor | None, q: Tensor) -> Tensor:
    if bias is None:
        return q.new_zeros(q.shape[1], q.shape[3])
    bias = bias.to(q.dtype) if bias.dtype == torch.float32 else under_autocast(bias)[0]
    check_tensor(name, bias, q, (q.shape[1], q.shape[3]), "(H, D)")
    return bias.contiguous()


def check_key_lengths(key_lengths: Tensor, q: Tensor) -> None:
    if key_lengths.shape != (q.shape[0],):
        raise ValueError(
            f"key_lengths must have shape ({q.shape[0]},), one for each sequence, not {tuple(key_lengths.shape)}"
        )
    if key_lengths.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"key_lengths must be int32 or int64, not {key_lengths.dtype}")
    if key_lengths.device != q.device:
        raise ValueError(f"key_lengths must be on {q.device} as q is, not on {key_lengths.device}")


def check_length_values(key_lengths: Tensor | None, n_keys: int) -> None:
    if key_lengths is not None and host_can_look(key_lengths):
        for n in key_lengths.tolist():
            if not 0 <= n <= n_keys:
                raise ValueError(f"key_lengths must lie between 0 and {n_keys}, the keys of the segment, not {n}")


def limits_of(causal: bool, window: tuple[int | None, int | None] | None) -> tuple[int, int]:
    """The largest and the smallest distance that see each other, as (left, right): -right <= d <= left."""
    left, right = (UNLIMITED if limit is None else limit for limit in window or (None, None))
    if left < -1 or right < 0:
        raise ValueError(f"window must be (left, right) with left >= -1 and right >= 0, not {window}")
    if causal and right not in (0, UNLIMITED):
        raise ValueError(f"window must not look {right} steps to the right when causal is True; it was {window}")
    return min(left, UNLIMITED), 0 if causal else min(right, UNLIMITED)


def clamp_of(clamp_len: int | None) -> int:
    if clamp_len is None:
        return UNLIMITED
    if not isinstance(clamp_len, int):
        raise TypeError(f"clamp_len must be an int or None, not {type(clamp_len).__name__}")
    if clamp_len < 0:
        raise ValueError(f"clamp_len must not be negative, not {clamp_len}")
    return min(clamp_len, UNLIMITED)


def head_rows(x: Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0, 0) if x is None or x.numel() == 0 else (x.data_ptr(), *x.stride()[:3])


def kernel_call(*inputs: Any) -> Any:
    """What the C++ and CUDA kernels need to know of a call, from the registered op's inputs."""
    q, k, v, r, content_bias, position_bias, k_memory, v_memory, key_lengths, seed, *options = inputs
    tensors = tuple(head_rows(x) for x in (q, k, v, r[None], k_memory, v_memory))
    addresses = tuple(0 if x is None else x.data_ptr() for x in (content_bias, position_bias, key_lengths, seed))
    batch, heads, queries, width = q.shape
    memory = 0 if k_memory is None else k_memory.shape[2]
    sizes = batch, heads, queries, k.shape[2], memory, r.shape[1], width
    return _C.RelAttention(tensors, addresses, sizes, *options, DTYPES[q.dtype])


def no_fp64_on_a_gpu(device: str, dtype: torch.dtype) -> str:
    return "Triton has no fp64 products" if device == "cuda" and dtype == torch.float64 else ""
