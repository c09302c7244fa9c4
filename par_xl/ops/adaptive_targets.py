"""Targets that are no class: an error at once on the CPU, and with a later call on a GPU, which nothing waits for."""

from functools import cache

import torch
from torch import Tensor

from par_xl.ops.adaptive_tables import Options
from par_xl.ops.registry import has_values

NONE = -(2**63)


def check_targets(target: Tensor, options: Options) -> None:
    """Even on a GPU, which the host then waits for; not in code that is being traced."""
    if has_values(target) and not torch.compiler.is_compiling():
        bad = target[((target < 0) | (target >= options.ends[-1])) & (target != options.ignore_index)]
        if len(bad):
            raise options.target_error(int(bad[0]))


class BadTarget:
    """A word that kernels write a bad target into, and that the host reads without waiting for the device.

    It lies in pinned memory, which both address, so that it takes no copy and no event: a kernel in a CUDA graph writes
    it with every replay.
    """

    def __init__(self, pinned: bool):
        with torch.inference_mode(False):  # it outlives the block that the first call may stand in
            self.word = torch.full((1,), NONE, pin_memory=pinned)

    def raise_if_written(self, options: Options) -> None:
        value = self.word.item()
        if value != NONE:
            self.word.fill_(NONE)
            raise options.target_error(value)


@cache
def bad_target(device: torch.device, n_classes: int, ignore_index: int) -> BadTarget:
    """That of all calls on a device with the same allowed targets, which the error names."""
    return BadTarget(pinned=device.type == "cuda")
