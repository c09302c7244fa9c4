"""Adaptive softmax modules: torch.nn's and Transformer-XL's, on :func:`par_xl.adaptive_nll`."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.adaptive import _ASMoutput

from par_xl.nn.adaptive_embedding import cluster_ends, cluster_widths
from par_xl.nn.plain_linear import plain
from par_xl.ops.adaptive_softmax import CPU_WORKSPACE, nll_and_loss
from par_xl.ops.adaptive_tables import Tables, check_options, head_column, integer, softmax_logits, softmaxes
from par_xl.ops.registry import acc_dtype, check_name


class _AdaptiveSoftmax(nn.Module, ABC):
    """What needs the tables alone. Subclasses set ``cutoffs`` (with V) and ``options``, and make the tables."""

    cutoffs: list[int]

    @abstractmethod
    def tables(self) -> Tables:
        """The parameters as :func:`par_xl.adaptive_nll` takes them."""

    def _set_options(self, order: str, ignore_index: int, reduction: str, label_smoothing: float, z_loss: float,
                     backend: str | None) -> None:  # fmt: skip
        check_options(order, reduction, label_smoothing)
        check_name(backend or "auto")
        self.order, self.ignore_index, self.reduction = order, integer("ignore_index", ignore_index), reduction
        self.label_smoothing, self.z_loss, self.backend = label_smoothing, z_loss, backend

    def _nll_and_loss(self, input: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        return nll_and_loss(
            input, target, self.tables(), self.cutoffs[:-1], order=self.order, ignore_index=self.ignore_index,
            reduction=self.reduction, label_smoothing=self.label_smoothing, z_loss=self.z_loss, backend=self.backend,
        )  # fmt: skip

    def _log_softmaxes(self, x: Tensor):
        """The head's log-probabilities, and for each tail its head column and its softmax."""
        tables, descending = self.tables(), self.order == "descending"
        head, *tails = softmaxes(tables, self.cutoffs, tables.cluster_weight is not None)
        columns = [head_column(i, self.cutoffs, descending) for i in range(len(tails))]
        return _log_softmax(x, head), list(zip(columns, tails, strict=True))

    def log_prob(self, input: Tensor) -> Tensor:
        """Log-probabilities of all classes: ``(..., d)`` to ``(..., V)``, in fp32 (fp64 for fp64), differentiable."""
        x = input.reshape(-1, input.shape[-1])
        head, tails = self._log_softmaxes(x)
        pieces = [head[:, : self.cutoffs[0]]]
        pieces += [head[:, column, None] + _log_softmax(x, tail) for column, tail in tails]
        return torch.cat(pieces, 1).view(*input.shape[:-1], self.cutoffs[-1])

    @torch.no_grad()
    def topk(self, input: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k most probable classes: ``(..., d)`` to log-probabilities and classes ``(..., k)``, best first.

        ``log_prob(input).topk(k)`` without the log-probabilities in memory: no class of a tail is more probable than
        the tail's column in the head, so a row enters a tail only where that column beats its k-th best class so far.
        Exact; between equally probable classes, any. On a GPU the host waits for the number of such rows. Of a row
        with NaN among its logits, values and classes mean nothing.

        Raises:
            ValueError: k is not between 1 and V.
        """
        if not 1 <= k <= self.cutoffs[-1]:
            raise ValueError(f"k must lie between 1 and {self.cutoffs[-1]}, not {k}")
        x = input.reshape(-1, input.shape[-1])
        blocks = [self._topk_of_block(rows, k) for rows in x.split(_rows(self.cutoffs[0]))]
        values, classes = (torch.cat(parts).view(*input.shape[:-1], k) for parts in zip(*blocks, strict=True))
        return values, classes

    def _topk_of_block(self, x: Tensor, k: int) -> tuple[Tensor, Tensor]:
        head, tails = self._log_softmaxes(x)
        least = torch.finfo(head.dtype).min  # of a class without probability; -inf is a place without a class
        head = head.clamp(min=least)
        values, classes = head[:, : self.cutoffs[0]].topk(min(k, self.cutoffs[0]))
        missing = (0, k - values.shape[1])
        values, classes = F.pad(values, missing, value=-torch.inf), F.pad(classes, missing)
        for i, (column, tail) in enumerate(tails):
            size = self.cutoffs[i + 1] - self.cutoffs[i]
            for rows in (head[:, column] > values[:, -1]).nonzero()[:, 0].split(_rows(size)):
                found = (head[rows, column, None] + _log_softmax(x[rows], tail)).clamp(min=least).topk(min(k, size))
                both = torch.cat([values[rows], found.values], 1).topk(k)
                values[rows] = both.values
                classes[rows] = torch.cat([classes[rows], found.indices + self.cutoffs[i]], 1).gather(1, both.indices)
        return values.masked_fill(values == least, -torch.inf), classes

    def predict(self, input: Tensor) -> Tensor:
        """The most probable class: ``(..., d)`` to ``(...)``; see :meth:`topk`."""
        return self.topk(input, 1)[1][..., 0]


def _rows(columns: int) -> int:
    """Rows of ``columns`` fp32 logits within the workspace."""
    return max(1, CPU_WORKSPACE // (4 * columns))


def _log_softmax(x: Tensor, softmax) -> Tensor:
    z = softmax_logits(x, softmax)
    return F.log_softmax(z, 1, dtype=acc_dtype(z))


class AdaptiveLogSoftmaxWithLoss(_AdaptiveSoftmax, nn.AdaptiveLogSoftmaxWithLoss):
    """``torch.nn.AdaptiveLogSoftmaxWithLoss`` without the logits in memory, and with the options that it lacks.

    Constructor, parameters, state dict and ``(output, loss)`` are torch's, as are ``log_prob`` and ``predict``; output
    and loss are fp32 for half-precision inputs, and any shape of ``target`` is taken. An empty tail gets zero
    gradients.

    Args:
        in_features, n_classes, cutoffs, div_value, head_bias, device, dtype: as in torch.
        tail_bias: a bias for each class of a tail, ``tail.{i}.1.bias``.
        order: of the head's tail columns, "ascending" as in torch or "descending".
        ignore_index, reduction, label_smoothing, z_loss, backend: as in :func:`par_xl.adaptive_nll`; with the reduction
            "none" the loss is ``-output``.

    Shape:
        input ``(..., in_features)``, target ``(...)``; output ``(...)``, the target's log-probability with the sign
        turned of :func:`par_xl.adaptive_nll` (label smoothing and z-loss included).

    Raises:
        ValueError, TypeError: wrong cutoffs, ``in_features / div_value**i`` below 1, and as the op.
    """

    def __init__(
        self, in_features: int, n_classes: int, cutoffs: Sequence[int], div_value: float = 4.0, head_bias: bool = False,
        device=None, dtype=None, *, tail_bias: bool = False, order: str = "ascending", ignore_index: int = -100,
        reduction: str = "mean", label_smoothing: float = 0.0, z_loss: float = 0.0, backend: str | None = None,
    ):  # fmt: skip
        *cutoffs, _ = cluster_ends(cutoffs, n_classes)
        cluster_widths(in_features, div_value, len(cutoffs) + 1, "div_value")
        super().__init__(in_features, n_classes, cutoffs, div_value, head_bias, device, dtype)
        if tail_bias:
            tails: Any = self.tail
            for projection in tails:
                out = projection[1]
                projection[1] = nn.Linear(out.in_features, out.out_features, device=device, dtype=dtype)
        self._set_options(order, ignore_index, reduction, label_smoothing, z_loss, backend)

    def tables(self) -> Tables:
        layers = [plain("head", self.head)]
        projections: list[Tensor | None] = [None]
        tails: Any = self.tail
        for i, (projection, layer) in enumerate(tails):
            layers.append(plain(f"tail[{i}][1]", layer))
            projections.append(plain(f"tail[{i}][0]", projection).weight)
        return Tables([layer.weight for layer in layers], [layer.bias for layer in layers], projections)

    def forward(self, input_: Tensor, target_: Tensor) -> _ASMoutput:
        """``(output, loss)``."""
        nll, loss = self._nll_and_loss(input_, target_)
        return _ASMoutput(-nll, loss)


class ProjectedAdaptiveLogSoftmax(_AdaptiveSoftmax):
    """Transformer-XL's adaptive softmax: ``(hidden, target)`` to the nll of each token, in the order of the tokens.

    The parameters have kimiyoung's names, and a state dict of NVIDIA's is renamed as it is loaded: ``cluster_weight
    (K, d_embed)`` and ``cluster_bias (K,)``, the head's columns of the tails; ``out_layers.{i}.weight (C_i, d_embed //
    div_val**i)`` and ``.bias``, a single ``out_layers.0`` of ``(n_token, d_embed)`` for ``div_val=1``; ``out_projs.{i}
    (d_proj, d_embed // div_val**i)``, absent for ``div_val=1`` and ``d_proj = d_embed``.

    Args:
        n_token, d_embed, d_proj, cutoffs, div_val: as upstream; ``cutoffs`` are increasing and without ``n_token``,
            and an empty list is a full softmax.
        order: of the head's tail columns: "descending" for kimiyoung's, NVIDIA's and salesforce's weights, "ascending"
            for Hugging Face's.
        weights, projections: parameters to share with an embedding (``emb_layers[i].weight`` and ``emb_projs[i]``), one
            for each layer; None, as a whole or for one of them, makes new ones. Transformer-XL on WikiText-103 shares
            all weights, and the projections of all but the head.
        ignore_index, reduction, label_smoothing, z_loss, backend: as in :func:`par_xl.adaptive_nll`.

    Raises:
        ValueError, TypeError: ``d_embed / div_val**i`` below 1, a shared parameter of another shape or without use, and
            as the op.

    Source: arXiv 1901.02860; kimiyoung/transformer-xl ``proj_adaptive_softmax.py``, whose default returns the nll by
    tail and not by token.
    """

    def __init__(
        self, n_token: int, d_embed: int, d_proj: int, cutoffs: Sequence[int], div_val: int = 1, *,
        order: str = "descending", weights: Sequence[nn.Parameter | None] | None = None,
        projections: Sequence[nn.Parameter | None] | None = None, ignore_index: int = -100, reduction: str = "none",
        label_smoothing: float = 0.0, z_loss: float = 0.0, backend: str | None = None,
    ):  # fmt: skip
        super().__init__()
        self.n_token, self.d_embed, self.d_proj, self.div_val = n_token, d_embed, d_proj, div_val
        self.cutoffs = cluster_ends(cutoffs, n_token)
        self._set_options(order, ignore_index, reduction, label_smoothing, z_loss, backend)
        tails = len(self.cutoffs) - 1
        if tails:
            self.cluster_weight = nn.Parameter(torch.zeros(tails, d_embed))
            self.cluster_bias = nn.Parameter(torch.zeros(tails))
        sizes = [end - begin for begin, end in pairwise([0, *self.cutoffs])]
        widths = cluster_widths(d_embed, div_val, tails + 1)
        shapes = [(n_token, d_embed)] if div_val == 1 else list(zip(sizes, widths, strict=True))
        self.out_layers = nn.ModuleList(
            _layer(*pair) for pair in zip(shapes, _given("weights", weights, len(shapes)), strict=True)
        )
        own = _given("projections", projections, tails + 1)
        if div_val != 1 or d_proj != d_embed:
            own = [
                _shared((d_proj, width), given)
                if given is not None
                else nn.Parameter(0.01 * torch.randn(d_proj, width))
                for width, given in zip(widths, own, strict=True)
            ]
        elif any(given is not None for given in own):
            raise ValueError("projections must be None with div_val 1 and d_proj = d_embed, which have none")
        self.out_projs = nn.ParameterList(own)
        self.register_load_state_dict_pre_hook(_rename_nvidia)

    def tables(self) -> Tables:
        layers = [plain(f"out_layers[{i}]", layer) for i, layer in enumerate(self.out_layers)]
        tails = len(self.cutoffs) > 1
        return Tables(
            [layer.weight for layer in layers],
            [layer.bias for layer in layers],
            [None if p is None else p.t() for p in self.out_projs],
            self.cluster_weight if tails else None,
            self.cluster_bias if tails else None,
        )

    def forward(self, hidden: Tensor, target: Tensor) -> Tensor:
        """``hidden (..., d_proj)`` and ``target (...)`` to ``(...)``, or 0-d with the reduction "sum" or "mean"."""
        return self._nll_and_loss(hidden, target)[1]


class SplitSoftmax(_AdaptiveSoftmax):
    """awd-lstm's output layer: one table of full width, read in clusters. ``(hidden, target)`` to each token's nll.

    Parameters: ``weight (V, d)`` and ``bias (V,)`` of awd-lstm's decoder, and of its ``SplitCrossEntropyLoss``, where
    there are splits, ``tail_vectors (K, d)`` and ``tail_bias (K,)``: the head's columns of the K tails, the last one
    being the first tail's. Without splits it is a linear layer and a full softmax whose logits are never all in memory.

    Args:
        in_features, n_classes: d and V.
        splits: where the tails start.
        backend: as in :func:`par_xl.adaptive_nll`.

    Source: https://github.com/salesforce/awd-lstm-lm, splitcross.py.
    """

    def __init__(self, in_features: int, n_classes: int, splits: Sequence[int] = (), *, backend: str | None = None):
        super().__init__()
        self.cutoffs = cluster_ends(splits, n_classes, "splits")
        tails = len(self.cutoffs) - 1
        self._set_options("descending", -100, "none", 0.0, 0.0, backend)
        self.weight: Tensor = nn.Parameter(torch.empty(n_classes, in_features).uniform_(-0.1, 0.1))
        self.bias = nn.Parameter(torch.zeros(n_classes))
        self.tail_vectors = nn.Parameter(torch.zeros(tails, in_features)) if tails else None
        self.tail_bias = nn.Parameter(torch.zeros(tails)) if tails else None

    def tables(self) -> Tables:
        return Tables([self.weight], [self.bias], [None] * len(self.cutoffs), self.tail_vectors, self.tail_bias)

    def forward(self, hidden: Tensor, target: Tensor) -> Tensor:
        """``hidden (..., d)`` and ``target (...)`` to ``(...)``."""
        return self._nll_and_loss(hidden, target)[1]


def _given(name: str, parameters: Sequence[nn.Parameter | None] | None, wanted: int) -> list[nn.Parameter | None]:
    given: list[nn.Parameter | None] = [None] * wanted if parameters is None else list(parameters)
    if len(given) != wanted:
        raise ValueError(f"{name} must hold {wanted} parameters or None, not {len(given)}")
    return given


def _shared(shape: tuple[int, int], parameter: nn.Parameter) -> nn.Parameter:
    if parameter.shape != shape:
        raise ValueError(f"a shared parameter must have shape {shape}, not {tuple(parameter.shape)}")
    return parameter


def _layer(shape: tuple[int, int], weight: nn.Parameter | None) -> nn.Linear:
    size, width = shape
    if weight is None:
        return nn.Linear(width, size)
    layer = nn.Linear(width, size, device="meta")  # no second table in memory
    layer.weight = _shared(shape, weight)
    layer.bias = nn.Parameter(torch.zeros(size, dtype=weight.dtype, device=weight.device))
    return layer


def _rename_nvidia(module: nn.Module, state: dict, prefix: str, *_) -> None:
    for name in [name for name in state if name.startswith(f"{prefix}out_layers_")]:
        kind, i = name.removeprefix(f"{prefix}out_layers_").split(".")
        state[f"{prefix}out_layers.{i}.{'weight' if kind == 'weights' else 'bias'}"] = state.pop(name)
