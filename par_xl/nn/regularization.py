"""Regularisers of activations."""

from torch import Tensor, nn

from par_xl.ops import ar_tar_loss


class ActivationRegularization(nn.Module):
    """AR and TAR as a module; see :func:`par_xl.ar_tar_loss`.

    Equivalent to ``alpha * output.pow(2).mean() + beta * raw_output.diff(dim=1).pow(2).mean()`` for ``(B, T, d)``.
    """

    def __init__(self, alpha: float = 2.0, beta: float = 1.0, batch_first: bool = True):
        super().__init__()
        self.alpha, self.beta, self.batch_first = alpha, beta, batch_first

    def forward(self, output: Tensor, raw_output: Tensor | None = None, lengths: Tensor | None = None) -> Tensor:
        """``(B, T, d)`` (or ``(T, B, d)``) to a 0-d tensor."""
        return ar_tar_loss(output, raw_output, self.alpha, self.beta, lengths=lengths, batch_first=self.batch_first)

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}, beta={self.beta}, batch_first={self.batch_first}"
