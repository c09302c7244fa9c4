"""The memory of the Compressive Transformer: recent steps as they are, older ones compressed.

Rae et al.: Compressive Transformers for Long-Range Sequence Modelling (arXiv 1911.05507).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from par_xl.ops import compress, update_memory
from par_xl.ops.compression import check_options
from par_xl.ops.memory_update import Sizes, check_state, evicted_rows, sizes_of_update

FUSED = ("mean", "max")  # the modes that the update computes on its way
STATE = ("rows", "usage", "compressed")  # of a CompressiveMemory, by their names in its state dict


class Compressor(nn.Module):
    """:func:`par_xl.compress` as a module with the weights of its mode: ``(B, N, width)`` to ``(B, N // rate, width)``.

    Args:
        width: of a step.
        rate: steps that become one.
        mode: "mean", "max", "conv", "dilated_conv" or "most_used".
        dilation: of the layers of "dilated_conv" (sonnet's example: 1, 2, 4).
        bias: of the convolutions (sonnet: none; the lucidrains and labml packages: with).

    Parameters: ``weights``, a ``(width, width, 2)`` for each dilated layer and the ``(width, width, rate)`` of the
    last, initialised as in ``nn.Conv1d``; ``biases`` of ``(width,)``.

    Source: sonnet v1 ``ConvCompressor``, ``PoolCompressor``; lucidrains' ``ConvCompress`` (its ``conv.weight``).
    """

    def __init__(
        self, width: int, rate: int, mode: str = "mean", *, dilation: Sequence[int] | None = None, bias: bool = False
    ):
        super().__init__()
        check_options(rate, mode, dilation)
        self.width, self.rate, self.mode, self.dilation = width, rate, mode, dilation
        kernels = {"conv": [rate], "dilated_conv": [2] * len(dilation or ()) + [rate]}.get(mode, [])
        self.weights = nn.ParameterList(torch.empty(width, width, kernel) for kernel in kernels)
        self.biases = nn.ParameterList(torch.empty(width) for _ in kernels if bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for i, weight in enumerate(self.weights):
            nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
            if self.biases:
                bound = 1 / math.sqrt(self.width * weight.shape[2])
                nn.init.uniform_(self.biases[i], -bound, bound)

    def forward(self, memory: Tensor, usage: Tensor | None = None) -> Tensor:
        options: dict[str, Any] = dict(usage=usage)
        if self.weights:
            options["bias"] = list(self.biases) or None
            options["weight"], options["dilation"] = list(self.weights), self.dilation
        return compress(memory, self.rate, self.mode, **options)

    def extra_repr(self) -> str:
        return f"{self.width}, rate={self.rate}, mode={self.mode!r}, dilation={self.dilation}"


@dataclass
class MemoryState:
    """What a compressive memory holds between segments.

    Attributes:
        rows: ``(B, compressed + memory, d)``, oldest first; all of them are real.
        compressed: how many of them, at the front, are compressed.
        usage: ``(B, memory)``, the attention each memory row has received so far (mode "most_used"), else None.
    """

    rows: Tensor
    compressed: int = 0
    usage: Tensor | None = None


@dataclass
class Evicted:
    """What left the memory in one update.

    Attributes:
        rows: ``(B, n * rate, d)``, detached.
        compressed: ``(B, n, d)``, what they became, with the graph to the compressor's weights; None if it has none.
    """

    rows: Tensor
    compressed: Tensor | None


def advance(
    state: MemoryState,
    hidden: Tensor,
    compressor: Compressor,
    memory_length: int,
    compressed_length: int,
    *,
    usage: Tensor | None = None,
    bptt: bool = False,
) -> tuple[MemoryState, Evicted]:
    """Append the segment ``hidden (B, T, d)``; see :class:`CompressiveMemory`, which holds the state itself.

    Returns a new state of the same dtype (under autocast, ``hidden`` and what compressors make may have another); the
    old one stays as it is. ``hidden`` is detached, and unless ``bptt`` so is everything else.
    """
    rows = state.rows if bptt else state.rows.detach()
    hidden = hidden.detach().to(rows.dtype)
    check_state(rows, hidden, state.compressed, memory_length, compressed_length)
    options: dict[str, Any] = dict(memory_length=memory_length, compressed_length=compressed_length)
    options["rate"] = compressor.rate
    sizes = sizes_of_update(rows, hidden, state.compressed, **options)
    old = evicted_rows(rows.detach(), hidden, sizes, compressor.rate)
    received, rest = _received(state, usage, sizes, compressor)
    fresh = None if compressor.mode in FUSED else compressor(old, received)
    if fresh is None:
        options["mode"] = compressor.mode
    else:
        options["fresh"] = (fresh if bptt else fresh.detach()).to(rows.dtype)
    rows, compressed = update_memory(rows, hidden, state.compressed, **options)
    return MemoryState(rows, compressed, rest), Evicted(old, fresh if compressor.weights else None)


def _received(
    state: MemoryState, usage: Tensor | None, sizes: Sizes, compressor: Compressor
) -> tuple[Tensor | None, Tensor | None]:
    """The attention that the evicted rows have received, and that of the rows that stay."""
    if compressor.mode != "most_used":
        if usage is not None:
            raise ValueError(f"usage must be given with mode most_used alone, not with {compressor.mode}")
        return None, None
    shape = (state.rows.shape[0], sizes.old_memory + sizes.segment)
    if usage is None or usage.shape != shape:
        raise ValueError(f"usage must have shape {shape}, not {None if usage is None else tuple(usage.shape)}")
    total = usage.detach().float().clone()
    if state.usage is not None:
        total[:, : sizes.old_memory] += state.usage
    kept = sizes.fresh * compressor.rate
    return total[:, sizes.leaving - kept : sizes.leaving], total[:, sizes.leaving :]


class CompressiveMemory(nn.Module):
    """One buffer ``[compressed | memory]``, oldest first, to which segments are appended.

    Appending ``T`` steps evicts the oldest of the memory, compresses them, appends the result at the end of the
    compressed part and drops the oldest of that. A segment may have any length. Steps that leave the memory and fill no
    group of ``rate`` are dropped, the oldest ones first; with segments of a multiple of ``rate`` there are none.

        memory = CompressiveMemory(Compressor(d, 4, "conv"), memory_length=512, compressed_length=512)
        memory.reset(batch_size)
        for segment in segments:
            output = layer(segment, memory.rows)      # (B, compressed + memory, d), to attend to
            evicted = memory.update(segment)          # for an auxiliary loss

    Args:
        compressor: what compresses; its weights train by an auxiliary loss on what :meth:`update` returns, or ``bptt``.
        memory_length, compressed_length: the most rows of either kind.
        bptt: keep the graph of the compressed rows, so that the task trains the compressor through later segments;
            :meth:`detach` truncates it. The memory itself is always detached.

    The memory is written anew at every update: what autograd has saved is never overwritten. No value is read by the
    host, and once both parts are full all shapes are static. The state dict holds the rows and may be loaded whatever
    the shape of the present ones. They are no buffers, which DistributedDataParallel would overwrite with those of the
    first rank. ``usage`` stays fp32, whatever the dtype of the module.

    An update binds ``rows`` (and ``usage``) to a new tensor, so a CUDA graph of it reads those of its capture at every
    replay: capture :func:`par_xl.update_memory` on a static tensor, into which each step copies the new rows.
    """

    def __init__(self, compressor: Compressor, memory_length: int, compressed_length: int, *, bptt: bool = False):
        super().__init__()
        if memory_length < 0 or compressed_length < 0:
            raise ValueError(f"lengths must not be negative, not {memory_length} and {compressed_length}")
        self.compressor, self.bptt = compressor, bptt
        self.memory_length, self.compressed_length = memory_length, compressed_length
        self.compressed = 0
        self.rows, self.usage = torch.empty(0, 0, compressor.width), torch.empty(0, 0, dtype=torch.float32)

    def reset(self, batch_size: int, start: str = "empty") -> None:
        """Forget everything. ``start``: "empty", or "zero" for full memories of zeros, which are read as any rows."""
        if start not in ("empty", "zero"):
            raise ValueError(f'start must be "empty" or "zero", not {start!r}')
        memory, self.compressed = (self.memory_length, self.compressed_length) if start == "zero" else (0, 0)
        self.rows = self.rows.new_zeros(batch_size, self.compressed + memory, self.compressor.width)
        self.usage = self.usage.new_zeros(batch_size, memory if self.compressor.mode == "most_used" else 0)

    def update(self, hidden: Tensor, usage: Tensor | None = None) -> Evicted:
        """Append ``hidden (B, T, d)``, which is detached.

        ``usage (B, memory + T)``, with mode "most_used": the attention that each row of the memory and the segment has
        received in this segment. It is added up for as long as a row is in the memory.

        Returns:
            What left the memory, and what became of it.
        """
        if not len(self.rows) and len(hidden):
            raise ValueError("reset(batch_size) must be called before the first update")
        state = MemoryState(self.rows, self.compressed, self.usage if self.compressor.mode == "most_used" else None)
        lengths = self.memory_length, self.compressed_length
        new, evicted = advance(state, hidden, self.compressor, *lengths, usage=usage, bptt=self.bptt)
        self.rows, self.compressed = new.rows, new.compressed
        if new.usage is not None:
            self.usage = new.usage
        return evicted

    def detach(self) -> None:
        """Truncate back-propagation through time: the compressed rows become constants."""
        self.rows = self.rows.detach()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "CompressiveMemory":
        """To another device or dtype, with the rest of the module."""
        super()._apply(fn, recurse)
        self.rows, usage = fn(self.rows), fn(self.usage)
        self.usage = usage if usage.dtype == self.usage.dtype else self.usage.to(usage.device)
        return self

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles, which cannot hold a graph."""
        return {**self.__dict__, "rows": self.rows.detach()}

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in STATE:
            tensor = torch.as_tensor(getattr(self, name)).detach()
            destination[prefix + name] = tensor.clone(memory_format=torch.contiguous_format)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        own = {name: state_dict[prefix + name] for name in STATE if prefix + name in state_dict}
        rest = {key: value for key, value in state_dict.items() if key.removeprefix(prefix) not in own}
        super()._load_from_state_dict(rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        missing_keys += [prefix + name for name in STATE if strict and name not in own]
        for name, tensor in own.items():
            present = getattr(self, name)
            setattr(self, name, int(tensor) if name == "compressed" else tensor.detach().to(present, copy=True))

    def extra_repr(self) -> str:
        return f"memory_length={self.memory_length}, compressed_length={self.compressed_length}, bptt={self.bptt}"
