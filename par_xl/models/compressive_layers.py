"""What the Compressive Transformer may add to Transformer-XL's layers."""

import torch
from torch import Tensor, nn


class GRUGate(nn.Module):
    """``GRU(input=y, state=x)`` in place of the residual connection ``x + y``.

    Parameters: ``gru.{weight_ih, weight_hh, bias_ih, bias_hh}``, initialised as in ``nn.GRUCell``.

    Source: Parisotto et al. (arXiv 1910.06764); the lucidrains package's ``gru_gated_residual``.
    """

    def __init__(self, width: int):
        super().__init__()
        self.gru = nn.GRUCell(width, width)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.gru(y.flatten(0, -2), x.flatten(0, -2)).view_as(x)


class CompressedPositions(nn.Module):
    """A layer's relative keys for the compressed steps: ``r_net.weight (HD, d)`` and ``r_r_bias (H, D)``.

    Source: sonnet v1 ``nets/transformer.py`` (``relative_keys_0``, ``r_r_bias_0``).
    """

    def __init__(self, n_head: int, d_model: int, d_head: int):
        super().__init__()
        self.n_head = n_head
        self.r_net = nn.Linear(d_model, n_head * d_head, bias=False)
        self.r_r_bias = nn.Parameter(torch.zeros(n_head, d_head))
        nn.init.normal_(self.r_net.weight, 0.0, 0.02)
        nn.init.normal_(self.r_r_bias, 0.0, 0.02)

    def forward(self, waves: Tensor) -> Tensor:
        """Position encodings ``(P, d)`` to rows ``(H, P, D)``."""
        return self.r_net(waves).unflatten(-1, (self.n_head, -1)).transpose(0, 1)
