"""The update of a compressive memory: evict, compress and store, in one pass over its rows.

    state  = [compressed | memory], oldest first          recent  = [memory | hidden]
    kept   = the newest memory_length steps of recent     evicted = the steps before them, whole groups of rate
    fresh  = compress(evicted, rate)
    out    = [the newest compressed_length of [compressed | fresh] | kept]

Rae et al.: Compressive Transformers for Long-Range Sequence Modelling (arXiv 1911.05507), algorithm 1.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from par_xl.ops import compression
from par_xl.ops.large_results import to_be_filled
from par_xl.ops.registry import _C, DTYPES, Op, choose, first_derivative_only, rows


class Sizes(NamedTuple):
    """Numbers of rows, in the order of csrc/ops.h, MemoryUpdate."""

    old_compressed: int
    old_memory: int
    segment: int
    new_compressed: int
    new_memory: int
    fresh: int

    @property
    def leaving(self) -> int:
        """Steps of recent that leave the memory; the oldest ones that fill no group are dropped."""
        return self.old_memory + self.segment - self.new_memory


def sizes_of_update(
    state: Tensor, hidden: Tensor, compressed: int, memory_length: int, compressed_length: int, rate: int
) -> Sizes:
    """The sizes of an update of ``state``, whose first ``compressed`` rows are compressed."""
    memory, segment = state.shape[1] - compressed, hidden.shape[1]
    new_memory = min(memory_length, memory + segment)
    fresh = (memory + segment - new_memory) // rate
    return Sizes(compressed, memory, segment, min(compressed_length, compressed + fresh), new_memory, fresh)


def evicted_rows(state: Tensor, hidden: Tensor, sizes: Sizes, rate: int) -> Tensor:
    """The steps that an update compresses, ``(B, sizes.fresh * rate, d)``; a view if they all come from the memory."""
    begin, end, memory = sizes.leaving - sizes.fresh * rate, sizes.leaving, state[:, sizes.old_compressed :]
    if end <= sizes.old_memory:
        return memory[:, begin:end]
    return torch.cat([memory, hidden], dim=1)[:, begin:end]


def update_reference(state: Tensor, hidden: Tensor, fresh: Tensor | None, sizes: Sizes, rate: int, mode: str) -> Tensor:
    """The specification, in plain PyTorch."""
    if fresh is None:
        fresh = compression.compress_reference(evicted_rows(state, hidden, sizes, rate), None, rate, mode)
    compressed = torch.cat([state[:, : sizes.old_compressed], fresh], dim=1)
    recent = torch.cat([state[:, sizes.old_compressed :], hidden], dim=1)
    lost = compressed.shape[1] - sizes.new_compressed
    return torch.cat([compressed[:, lost:], recent[:, sizes.leaving :]], dim=1)


# sizes is a Sizes; method is the mode, a name that inductor keeps for itself; fresh holds the compressed rows that the
# kernel is not to compute (method "given").
UPDATE = Op(
    "memory_update(Tensor(a!) out, Tensor state, Tensor hidden, Tensor? fresh, SymInt[] sizes, int rate, str method,"
    " str backend) -> ()",
    lambda *_: None,
)


def _new(state: Tensor, sizes: Sizes) -> Tensor:
    return state.new_empty(state.shape[0], sizes.new_compressed + sizes.new_memory, state.shape[2])


@UPDATE.implement("native")
def _update_native(out, state, hidden, fresh, sizes, rate, mode):
    code = 3 if mode == "given" else compression.MODES[mode]
    tensors = rows(state), rows(hidden), rows(out), rows(fresh)
    problem = _C.MemoryUpdate(*tensors, state.shape[0], state.shape[2], *sizes, rate, code, DTYPES[state.dtype])
    if state.is_cuda:
        _C.memory_update_cuda(problem, torch.cuda.current_stream().cuda_stream)
    else:
        _C.memory_update_cpu(problem)


@UPDATE.implement("triton")
def _update_triton(out, state, hidden, fresh, sizes, rate, mode):
    from par_xl.kernels.compression import update

    update(state, hidden, fresh, out, sizes, rate, mode)


class UpdateMemory(torch.autograd.Function):
    """``UpdateMemory.apply(state, hidden, fresh or None, sizes, rate, mode, backend)``; see :func:`update_memory`."""

    @staticmethod
    def forward(ctx, state, hidden, fresh, sizes, rate, mode, backend):
        state, hidden, fresh = (x if x is None or x.stride(2) == 1 else x.contiguous() for x in (state, hidden, fresh))
        ctx.save_for_backward(*((state, hidden) if mode == "max" else ()))
        ctx.options = sizes, rate, mode, backend
        out = to_be_filled(_new(state, sizes))
        UPDATE(out, state, hidden, fresh, sizes, rate, mode, backend)
        return out

    @staticmethod
    @first_derivative_only
    def backward(ctx, grad):
        sizes, rate, mode, backend = ctx.options
        lost = sizes.old_compressed + sizes.fresh - sizes.new_compressed
        d_slots = F.pad(grad[:, : sizes.new_compressed], (0, 0, lost, 0))  # of [compressed | fresh]
        d_compressed, d_fresh = d_slots.tensor_split([sizes.old_compressed], dim=1)
        d_kept = grad[:, sizes.new_compressed :]
        if mode == "given":
            d_recent = F.pad(d_kept, (0, 0, sizes.leaving, 0))
        else:
            choice = grad.new_empty(0, dtype=torch.uint8)
            if mode == "max":
                state, hidden = ctx.saved_tensors
                evicted = evicted_rows(state, hidden, sizes, rate)
                _, choice = compression.FORWARD(evicted, None, rate, mode, backend)
            d_evicted = compression.BACKWARD(d_fresh, choice, rate, mode, backend)
            dropped = sizes.leaving - sizes.fresh * rate
            d_recent = F.pad(torch.cat([d_evicted, d_kept], dim=1), (0, 0, dropped, 0))
        d_memory, d_hidden = d_recent.tensor_split([sizes.old_memory], dim=1)
        d_state = torch.cat([d_compressed, d_memory], dim=1)
        return d_state, d_hidden, d_fresh if mode == "given" else None, None, None, None, None


def check_state(state: Tensor, hidden: Tensor, compressed: int, memory_length: int, compressed_length: int) -> None:
    for name, x in (("state", state), ("hidden", hidden)):
        if x.dim() != 3:
            raise ValueError(f"{name} must have 3 dimensions, not shape {tuple(x.shape)}")
        if not x.is_floating_point():
            raise TypeError(f"{name} must be floating point, not {x.dtype}")
    if (state.shape[0], state.shape[2]) != (hidden.shape[0], hidden.shape[2]):
        raise ValueError(
            f"hidden must have the batch and width of state {tuple(state.shape)}, not shape {tuple(hidden.shape)}"
        )
    if state.dtype != hidden.dtype:
        raise TypeError(f"hidden must have the dtype of state {state.dtype}, not {hidden.dtype}")
    if state.device != hidden.device:
        raise ValueError(f"hidden must be on {state.device} as state is, not on {hidden.device}")
    for name, length in (("memory_length", memory_length), ("compressed_length", compressed_length)):
        if length < 0:
            raise ValueError(f"{name} must not be negative, not {length}")
    if not 0 <= compressed <= min(state.shape[1], compressed_length):
        most = min(state.shape[1], compressed_length)
        raise ValueError(f"compressed must lie between 0 and {most}, the rows that can be compressed, not {compressed}")
    if state.shape[1] - compressed > memory_length:
        rest = state.shape[1] - compressed
        raise ValueError(f"memory_length must be at least the {rest} memory rows of state, not {memory_length}")


def update_memory(
    state: Tensor,
    hidden: Tensor,
    compressed: int,
    *,
    memory_length: int,
    compressed_length: int,
    rate: int,
    mode: str = "mean",
    fresh: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, int]:
    """Append a segment to a compressive memory: evict, compress and store in one pass.

    Equivalent, with ``old, memory = state[:, :compressed], state[:, compressed:]``, to ::

        recent = torch.cat([memory, hidden], 1)
        leaving = max(0, recent.shape[1] - memory_length)
        evicted = recent[:, leaving % rate : leaving]
        slots = torch.cat([old, compress(evicted, rate, mode)], 1)
        lost = max(0, slots.shape[1] - compressed_length)
        state = torch.cat([slots[:, lost:], recent[:, leaving:]], 1)

    Args:
        state: ``(B, compressed + memory, d)``, oldest first; ``(B, 0, d)`` for an empty start.
        hidden: ``(B, T, d)``, the new segment, of any length.
        compressed: how many rows of ``state`` are compressed ones.
        memory_length, compressed_length: the most rows of either kind; both are reached once enough was appended.
        rate: steps that become one. Of the steps that leave the memory, the oldest ones that fill no group are dropped,
            so that nothing newer is lost; with segments of a multiple of ``rate`` none are.
        mode: "mean" or "max", computed in the same pass.
        fresh: compressed rows ``(B, leaving // rate, d)`` of another mode, stored in the same pass; ``mode`` is then
            not used. :class:`par_xl.nn.CompressiveMemory` does this.
        backend: "eager", "native", "triton" or "auto"; default: what :func:`par_xl.use_backend` chose.

    Returns:
        The new state, a tensor that shares nothing with the old one, and how many of its rows are compressed.
        Differentiable in ``state``, ``hidden`` and ``fresh``; the second derivative on the eager backend alone.

    Raises:
        ValueError: a wrong rank, shape, device, length, rate, mode or backend.
        TypeError: a dtype that is not floating point, or two different ones.

    Source: arXiv 1911.05507, algorithm 1.
    """
    compression.check_rate(rate)
    check_state(state, hidden, compressed, memory_length, compressed_length)
    sizes = sizes_of_update(state, hidden, compressed, memory_length, compressed_length, rate)
    if fresh is not None:
        _check_fresh(fresh, state, sizes.fresh)
        mode = "given"
    elif mode not in ("mean", "max"):
        raise ValueError(f'mode must be "mean" or "max" (the rows of other modes go to fresh), not {mode!r}')
    chosen = choose(UPDATE, backend, state)
    if chosen == "eager":
        return update_reference(state, hidden, fresh, sizes, rate, mode), sizes.new_compressed
    return UpdateMemory.apply(state, hidden, fresh, sizes, rate, mode, chosen), sizes.new_compressed


def _check_fresh(fresh: Tensor, state: Tensor, n_rows: int) -> None:
    wanted = (state.shape[0], n_rows, state.shape[2])
    if fresh.shape != wanted:
        raise ValueError(f"fresh must have shape {wanted}, not {tuple(fresh.shape)}")
    if fresh.dtype != state.dtype:
        raise TypeError(f"fresh must have the dtype of state {state.dtype}, not {fresh.dtype}")
    if fresh.device != state.device:
        raise ValueError(f"fresh must be on {state.device} as state is, not on {fresh.device}")
