"""The tables of an adaptive softmax, how they make its softmaxes, and the checks of their shapes."""

import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Tables(NamedTuple):
    """The parameters of an adaptive softmax over V classes, d features and K tails.

    Attributes:
        weights: one ``(C_i, d_i)`` for the head and each tail, or a single ``(V, d_0)`` that the cutoffs cut.
        biases: as many, ``(C_i,)`` or None.
        projections: K + 1 of ``(d_i, d)`` or None (``d_i = d``).
        cluster_weight: ``(K, d_0)``, the head's columns of the tails; None where the last K rows of ``weights[0]`` are.
        cluster_bias: ``(K,)`` or None.
    """

    weights: Sequence[Tensor]
    biases: Sequence[Tensor | None]
    projections: Sequence[Tensor | None]
    cluster_weight: Tensor | None = None
    cluster_bias: Tensor | None = None

    def flat(self) -> tuple[Tensor | None, ...]:
        return (*self.weights, *self.biases, *self.projections, self.cluster_weight, self.cluster_bias)


def unflatten(tensors: Sequence[Any], n_softmaxes: int) -> Tables:
    """The inverse of ``Tables.flat``."""
    n = (len(tensors) - n_softmaxes - 2) // 2
    return Tables(tensors[:n], tensors[n : 2 * n], tensors[2 * n : -2], *tensors[-2:])


class Options(NamedTuple):
    """What a call does with its tensors; ``ends`` are the cutoffs and V."""

    ends: tuple[int, ...]
    descending: bool
    ignore_index: int
    label_smoothing: float
    z_loss: float
    workspace: int

    def target_error(self, target: float) -> ValueError:
        allowed = f"between 0 and {self.ends[-1] - 1} or be ignore_index {self.ignore_index}"
        return ValueError(f"target must lie {allowed}, not {target}")


class Softmax(NamedTuple):
    """One softmax: its weight in pieces of neighbouring columns, which stand below each other, and their biases.

    Of gradients in the place of parameters, those that are not wanted are None.
    """

    weights: list[Any]
    biases: list[Tensor | None]
    projection: Tensor | None


def softmaxes(tables: Tables, ends: Sequence[int], separate_columns: bool) -> list[Softmax]:
    """The head and the tails, as views; ``separate_columns``: the head's last columns are a piece of their own."""
    sizes = [end - begin for begin, end in zip([0, *ends], ends, strict=False)]

    def cut(group: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        if len(group) == len(sizes):
            return group
        return [None] * len(sizes) if group[0] is None else group[0].split(sizes)

    groups = (cut(tables.weights), cut(tables.biases), tables.projections)
    head, *tails = [Softmax([w], [b], p) for w, b, p in zip(*groups, strict=True)]
    if separate_columns:
        head.weights.append(tables.cluster_weight)
        head.biases.append(tables.cluster_bias)
    return [head, *tails]


def softmax_logits(x: Tensor, softmax: Softmax) -> Tensor:
    """``(N, d)`` to ``(N, C)`` in plain PyTorch."""
    hidden = x if softmax.projection is None else F.linear(x, softmax.projection)
    pieces = [F.linear(hidden, w, b) for w, b in zip(softmax.weights, softmax.biases, strict=True)]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1)


def head_column(tail: int, ends: Sequence[int], descending: bool) -> int:
    """The head's column of a tail, both counted from 0."""
    return ends[0] + (len(ends) - 2 - tail if descending else tail)


def integer(name: str, value: Any) -> int:
    """Python's int of an element of an array or a tensor too, but of no float."""
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, not {value!r}") from None


def integers(name: str, values: Sequence[Any] | Tensor) -> list[int]:
    return [integer(f"{name}[{i}]", value) for i, value in enumerate(values)]


def check_options(order: str, reduction: str, label_smoothing: float) -> None:
    if order not in ("ascending", "descending"):
        raise ValueError(f'order must be "ascending" or "descending", not {order!r}')
    if reduction not in ("none", "sum", "mean"):
        raise ValueError(f'reduction must be "none", "sum" or "mean", not {reduction!r}')
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be between 0 and 1, not {label_smoothing}")


def check_counts(tables: Tables, cutoffs: Sequence[int]) -> None:
    n, given = len(cutoffs) + 1, len(tables.weights)
    allowed = {"weights": {1, n}, "biases": {given}, "projections": {n}}
    for name, counts in allowed.items():
        found = len(getattr(tables, name))
        if found not in counts:
            wanted = " or ".join(map(str, sorted(counts)))
            raise ValueError(f"{name} must hold {wanted} tensors for {n - 1} cutoffs, not {found}")
    for i, weight in enumerate(tables.weights):
        if not isinstance(weight, Tensor):
            raise TypeError(f"weights[{i}] must be a tensor, not {weight!r}")
    if n > 1 and given == 1 and tables.cluster_weight is None:
        raise ValueError("cluster_weight must be given when one table holds all the classes")
    if n == 1 and tables.cluster_weight is not None:
        raise ValueError("cluster_weight must be None without cutoffs")
    if tables.cluster_bias is not None and tables.cluster_weight is None:
        raise ValueError("cluster_bias must be None without cluster_weight")


def check(x: Tensor, target: Tensor, tables: Tables, ends: Sequence[int]) -> None:
    if x.dim() == 0 or target.shape != x.shape[:-1]:
        wanted = f"the shape of input without its last dimension, {tuple(x.shape[:-1])}"
        raise ValueError(f"target must have {wanted}, not {tuple(target.shape)}")
    if not x.is_floating_point():
        raise TypeError(f"input must be floating point, not {x.dtype}")
    if target.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"target must be int32 or int64, not {target.dtype}")
    if target.device != x.device:
        raise ValueError(f"target must be on {x.device} as input is, not on {target.device}")
    cutoffs = list(ends[:-1])
    if cutoffs != sorted(set(cutoffs)) or not all(0 < c < ends[-1] for c in cutoffs):
        raise ValueError(f"cutoffs must be increasing and between 1 and {ends[-1] - 1}, not {cutoffs}")
    _check_shapes(x, tables, ends)


def _check_shapes(x: Tensor, tables: Tables, ends: Sequence[int]) -> None:
    tails = len(ends) - 1
    separate = tables.cluster_weight is not None
    sizes = [end - begin for begin, end in zip([0, *ends], ends, strict=False)]
    sizes[0] += 0 if separate else tails
    if len(tables.weights) == 1:
        sizes = [ends[-1]]
    named: list[tuple[str, Tensor | None, tuple[int, ...]]] = []
    for i, (size, weight, bias) in enumerate(zip(sizes, tables.weights, tables.biases, strict=True)):
        named += [(f"weights[{i}]", weight, (size, *weight.shape[-1:])), (f"biases[{i}]", bias, (size,))]
    for i, projection in enumerate(tables.projections):
        width = tables.weights[i if len(tables.weights) > 1 else 0].shape[-1]
        if projection is None and width != x.shape[-1]:
            wanted = f"weights[{i}] has {width} columns, and input {x.shape[-1]}"
            raise ValueError(f"projections[{i}] must be given: {wanted}")
        if width == 0:
            raise ValueError(f"weights[{i}] must have at least one column: d / div_val**{i} is below 1")
        named.append((f"projections[{i}]", projection, (width, x.shape[-1])))
    named.append(("cluster_weight", tables.cluster_weight, (tails, tables.weights[0].shape[-1])))
    named.append(("cluster_bias", tables.cluster_bias, (tails,)))
    for name, tensor, shape in named:
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise ValueError(f"{name} must have shape {shape}, not {tuple(tensor.shape)}")
        if tensor.dtype != x.dtype:
            raise TypeError(f"{name} must have the dtype of input {x.dtype}, not {tensor.dtype}")
        if tensor.device != x.device:
            raise ValueError(f"{name} must be on {x.device} as input is, not on {tensor.device}")
