"""Transformer-XL's adaptive softmax in plain PyTorch."""

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ProjectedAdaptiveLogSoftmax(nn.Module):
    """A head over the frequent words and one column for each tail, in descending order; parameters as upstream."""

    def __init__(self, n_token: int, d_embed: int, d_proj: int, cutoffs: Sequence[int] = (), div_val: int = 1):
        super().__init__()
        self.ends, self.div_val = [0, *cutoffs, n_token], div_val
        if cutoffs:
            self.cluster_weight = nn.Parameter(torch.randn(len(cutoffs), d_embed) * 0.02)
            self.cluster_bias = nn.Parameter(torch.zeros(len(cutoffs)))
        sizes = [end - start for start, end in itertools.pairwise(self.ends)]
        widths = [d_embed // div_val**i for i in range(len(sizes))]
        self.out_layers = nn.ModuleList(
            [nn.Linear(d_embed, n_token)] if div_val == 1 else map(nn.Linear, widths, sizes)
        )
        projected = div_val > 1 or d_proj != d_embed
        self.out_projs = nn.ParameterList(
            nn.Parameter(torch.randn(d_proj, width) * 0.01) for width in (widths if projected else ())
        )

    def _log_softmax(self, i: int, hidden: Tensor) -> Tensor:
        """Of the head (with a column for each tail) or of tail i, in fp32."""
        if len(self.out_projs):
            hidden = hidden @ self.out_projs[i]
        layer = self.out_layers[0 if self.div_val == 1 else i]
        rows = slice(*self.ends[i : i + 2]) if self.div_val == 1 else slice(None)
        weight, bias = layer.weight[rows], layer.bias[rows]
        if i == 0 and len(self.ends) > 2:
            weight, bias = torch.cat((weight, self.cluster_weight)), torch.cat((bias, self.cluster_bias))
        logits = F.linear(hidden, weight, bias)
        return logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))

    def _column(self, i: int) -> int:
        """Of tail i in the head."""
        return self.ends[1] + len(self.ends) - 2 - i

    def forward(self, hidden: Tensor, target: Tensor) -> Tensor:
        """``hidden (N, d)``, ``target`` int64 ``(N,)`` to the negative log-likelihood of each, ``(N,)``."""
        head = self._log_softmax(0, hidden)
        column = target
        for i in range(1, len(self.ends) - 1):
            column = torch.where((target >= self.ends[i]) & (target < self.ends[i + 1]), self._column(i), column)
        nll = -head.gather(1, column[:, None])[:, 0]
        for i in range(1, len(self.ends) - 1):
            mine = ((target >= self.ends[i]) & (target < self.ends[i + 1])).nonzero()[:, 0]
            local = target[mine, None] - self.ends[i]
            nll = nll.index_add(0, mine, -self._log_softmax(i, hidden[mine]).gather(1, local)[:, 0])
        return nll

    def log_prob(self, hidden: Tensor) -> Tensor:
        """``(N, d)`` to ``(N, V)``."""
        head = self._log_softmax(0, hidden)
        shortlist = self.ends[1]
        tails = [head[:, self._column(i), None] + self._log_softmax(i, hidden) for i in range(1, len(self.ends) - 1)]
        return torch.cat((head[:, :shortlist], *tails), 1)
