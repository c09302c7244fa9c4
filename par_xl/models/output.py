"""What every language model of this package returns."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

IGNORED = -100  # as a target: the token has no loss


@dataclass(kw_only=True)
class ModelOutput:
    """The result of ``model(tokens, targets=None, memory=None)``, ``tokens`` and ``targets`` int64 ``(B, T)``.

    Attributes:
        hidden: ``(B, T, d)``, what the output layer sees.
        memory: the detached state for the next segment's ``memory``.
        nll: ``(B, T)``, the negative log-likelihood of each target, fp32 (fp64 in fp64); None without targets.
        loss: 0-d, what to minimise: the mean of ``nll`` over the targets that are not -100, 0 if there is none, plus
            the model's own penalties; None without targets.
    """

    hidden: Tensor
    memory: Any
    nll: Tensor | None = None
    loss: Tensor | None = None


def mean_nll(nll: Tensor, targets: Tensor) -> Tensor:
    """The mean over the tokens that have a loss, 0-d; 0 where none has."""
    return nll.sum() / (targets != IGNORED).sum().clamp(min=1)
