"""Memory for large results on the CPU, which is used again when no tensor holds it any more.

malloc maps 32 MB and more anew each time and gives smaller blocks back to the system as it happens, and the first touch
of new memory costs several times the writing itself.
"""

import mmap
import weakref

import torch
from torch import Tensor

LARGE = 2 << 20  # bytes, from which on memory is kept: those of a huge page
KEPT = 512 << 20  # the most bytes that are kept for later results; what was free for longest goes first

_free: list[mmap.mmap] = []


def to_be_filled(x: Tensor) -> Tensor:
    """In place of ``x``, which a kernel is about to fill, a tensor in kept memory, if it is large and on the CPU.

    The memory is free again once no tensor has that storage, none that autograd has saved either.
    """
    if torch.compiler.is_compiling() or x.device.type != "cpu" or x.nbytes < LARGE:
        return x
    if not (x.is_contiguous() and hasattr(mmap, "MAP_ANONYMOUS")):  # Windows has no such mapping
        return x
    # Each tensor gets a view of its own of a block, which torch holds for as long as the storage lives.
    block = _take(x.nbytes)
    view = memoryview(block)
    weakref.finalize(view, _give_back, block).atexit = False
    return torch.frombuffer(view, dtype=x.dtype).view(x.shape)


def _take(n_bytes: int) -> mmap.mmap:
    for block in _free.copy():
        if len(block) == n_bytes:
            try:
                _free.remove(block)
            except ValueError:  # another thread was faster
                continue
            return block
    block = mmap.mmap(-1, n_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        block.madvise(mmap.MADV_HUGEPAGE)
    return block


def _give_back(block: mmap.mmap) -> None:
    _free.append(block)
    while sum(map(len, _free.copy())) > KEPT:
        _free.pop(0)
