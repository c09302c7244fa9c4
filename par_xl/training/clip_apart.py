"""Gradient clipping for losses, or parts of a model, that must not be coupled by a common norm."""

from collections.abc import Callable, Iterable
from typing import Any

import lightning as L
import torch
from torch import nn


class ClipApart(L.Callback):
    """Clips the gradients of one part of the model and of all the rest to ``norm`` each; 0 does not clip.

    Args:
        norm: the largest norm of either.
        part: gives the part's parameters of ``pl_module.model``.
    """

    def __init__(self, norm: float, part: Callable[[Any], Iterable[nn.Parameter]]):
        self.norm, self.part = norm, part

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        if not self.norm:
            return
        part = list(self.part(pl_module.model))
        own = {id(p) for p in part}
        for group in (part, [p for p in pl_module.parameters() if id(p) not in own]):
            nn.utils.clip_grad_norm_(group, self.norm)
