"""The adaptive embedding: frequent words have wide vectors, rare ones narrow vectors and a projection."""

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from par_xl.ops.adaptive_tables import integers


def cluster_ends(cutoffs: Sequence[int], n_token: int, name: str = "cutoffs") -> list[int]:
    """Where the clusters end, the vocabulary's end last."""
    ends = [*integers(name, cutoffs), n_token]
    if any(start >= end for start, end in itertools.pairwise([0, *ends])):
        raise ValueError(f"{name} must ascend between 0 and the {n_token} words, not {ends[:-1]}")
    return ends


def cluster_widths(width: int, div_val: float, clusters: int, name: str = "div_val") -> list[int]:
    """``width // div_val**i`` for each cluster i."""
    if not div_val > 0:
        raise ValueError(f"{name} must be positive, not {div_val}")
    widths = [int(width // div_val**i) for i in range(clusters)]
    if 0 in widths:
        i = widths.index(0)
        raise ValueError(f"{name} {div_val} leaves tail {i} of {clusters - 1} no feature: {width} / {div_val}**{i} < 1")
    return widths


class AdaptiveEmbedding(nn.Module):
    """Words in clusters by frequency; cluster i has vectors of width ``d_embed // div_val**i`` and a projection.

    ``y = sqrt(d_proj) * emb_projs[i] @ emb_layers[i].weight[x - start_i]`` for a word ``x`` of cluster i; int64 of any
    shape to ``(..., d_proj)``. With ``div_val == 1`` there is one table, and a projection only if ``d_proj`` differs
    from ``d_embed``; equivalent to ``F.linear(F.embedding(x, weight), proj) * d_proj**0.5``.

    Parameters, as upstream: ``emb_layers.{i}.weight (size_i, width_i)`` and ``emb_projs.{i} (d_proj, width_i)``.

    Args:
        n_token: size of the vocabulary, which is sorted by falling frequency.
        d_embed: width of the first cluster's vectors.
        d_proj: width of the result.
        cutoffs: where the second and later clusters start, ascending, without ``n_token``.
        div_val: how much narrower each cluster is than the one before.

    Raises:
        ValueError: cutoffs that are not ascending within the vocabulary, or a cluster without a width.

    Source: Baevski, Auli (arXiv 1809.10853); github.com/kimiyoung/transformer-xl, AdaptiveEmbedding.
    """

    def __init__(self, n_token: int, d_embed: int, d_proj: int, cutoffs: Sequence[int] = (), div_val: int = 1):
        super().__init__()
        self.n_token, self.d_embed, self.d_proj, self.div_val = n_token, d_embed, d_proj, div_val
        self.ends = [0, *cluster_ends(cutoffs, n_token)]
        sizes = [n_token] if div_val == 1 else [end - start for start, end in itertools.pairwise(self.ends)]
        widths = cluster_widths(d_embed, div_val, len(sizes))
        self.emb_layers = nn.ModuleList(nn.Embedding(*shape) for shape in zip(sizes, widths, strict=True))
        projected = div_val > 1 or d_proj != d_embed
        self.emb_projs = nn.ParameterList(
            nn.Parameter(torch.randn(d_proj, width) * 0.01) for width in (widths if projected else ())
        )

    def forward(self, tokens: Tensor) -> Tensor:
        if self.div_val == 1:
            embedded = self.emb_layers[0](tokens)
            projection = self.emb_projs[0] if self.emb_projs else None
        else:
            embedded = torch.cat([self._cluster(i, tokens) for i in range(len(self.emb_layers))], -1)
            projection = torch.cat(list(self.emb_projs), 1)
        if projection is not None:
            embedded = F.linear(embedded, projection)
        return embedded * self.d_proj**0.5

    def _cluster(self, i: int, tokens: Tensor) -> Tensor:
        """The vectors of cluster i's words and zeros for the others, so that one product projects all clusters.

        Nothing here depends on the tokens' values, so the host never waits for them. A token outside the vocabulary is
        in no other cluster and stays for torch to refuse.
        """
        start, end = self.ends[i : i + 2]
        elsewhere = ((tokens >= 0) & (tokens < start)) | ((tokens >= end) & (tokens < self.n_token))
        local = (tokens - start).masked_fill(elsewhere, 0)
        return torch.where(elsewhere[..., None], 0.0, self.emb_layers[i](local))

    def extra_repr(self) -> str:
        return f"{self.n_token}, {self.d_embed}, {self.d_proj}, cutoffs={self.ends[1:-1]}, div_val={self.div_val}"
