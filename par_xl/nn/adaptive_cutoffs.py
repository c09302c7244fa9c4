"""Where to cut a vocabulary for an adaptive softmax: the optimum under Grave's cost model, by dynamic programming."""

from collections.abc import Sequence

import numpy as np
from torch import Tensor

# Columns x tokens below which a product takes no less time: 50 x 2560, where the paper's measured curve leaves the
# flat.
FLAT = 128e3


def adaptive_cutoffs(
    counts: Sequence[int] | Tensor | np.ndarray, n_clusters: int, *, tokens: int = 4096, div_value: float = 4.0,
    flat: float = FLAT,
) -> list[int]:  # fmt: skip
    """The cutoffs of ``n_clusters`` tails that take the least time for ``tokens`` tokens drawn as the counts say.

    A product of k columns with B rows takes time in proportion to ``max(flat, k * B)``: below ``flat`` a device is not
    busy. The head of ``cutoffs[0] + n_clusters`` columns is charged to every token, and tail i, from class l to class
    r, to its ``tokens * P(l <= class < r)`` tokens with its width:

        max(flat, (cutoffs[0] + K) tokens) + sum_i max(flat, (r - l) tokens P(l, r) / div_value**i)

    The optimum over all cutoffs, not over a grid; among equals, the later cutoffs, whose classes are wider. Each
    tail's cost has the quadrangle inequality (it is a convex increasing function of a product of two measures of an
    interval), so that the best left end moves right with the right end, and each of the K steps takes O(V log V).

    Args:
        counts: ``(V,)``, how often each class occurs, in falling order.
        n_clusters: K, the number of tails, from 1 to V - 1.
        tokens: tokens of a batch.
        div_value: factor between the widths of successive tails (1: none).
        flat: columns x tokens below which a product takes no less time; 0 counts operations alone.

    Returns:
        K increasing cutoffs, without V: ``torch.nn.AdaptiveLogSoftmaxWithLoss(d, V, cutoffs, div_value)``.

    Raises:
        ValueError: counts that are not a vector in falling order, negative, infinite or all zero, or n_clusters, tokens
            or div_value out of range.

    Source: arXiv 1609.04309, section 4 (there by hand for two and by search for more clusters).
    """
    frequency = np.asarray(counts, dtype=np.float64)
    falling = frequency.ndim == 1 and (np.diff(frequency) <= 0).all() and (frequency >= 0).all()
    if not (falling and 0 < frequency.sum() < np.inf):
        raise ValueError("counts must be a finite vector in falling order, none negative and one of them positive")
    for name, value in (("tokens", tokens), ("div_value", div_value)):
        if not value > 0:
            raise ValueError(f"{name} must be positive, not {value}")
    n = len(frequency)
    if not 1 <= n_clusters < n:
        raise ValueError(f"n_clusters must lie between 1 and {n - 1}, the number of classes less one, not {n_clusters}")
    mass = np.concatenate([[0.0], frequency.cumsum() / frequency.sum()])  # of the classes before each

    def tail(i: int, begin: np.ndarray, end: np.ndarray) -> np.ndarray:
        return np.maximum(flat, (end - begin) * (mass[end] - mass[begin]) * (tokens / div_value**i))

    # best[r]: the least cost of the head and i tails that end at class r; begins[i - 1][r]: where the last of them
    # begins.
    ends = np.arange(n + 1)
    best = np.where(ends > 0, np.maximum(flat, (ends + n_clusters) * float(tokens)), np.inf)
    begins = []
    for i in range(1, n_clusters):
        best, begin = _extend(best, i, tail)
        begins.append(begin)
    last = best[:-1] + tail(n_clusters, ends[:-1], ends[-1:])
    cutoffs = [n - 1 - int(last[::-1].argmin())]
    for begin in reversed(begins):
        cutoffs.append(int(begin[cutoffs[-1]]))
    return cutoffs[::-1]


def _extend(best: np.ndarray, i: int, tail) -> tuple[np.ndarray, np.ndarray]:
    """The least ``best[l] + tail(i, l, r)`` over i <= l < r, for every r, and its l.

    By divide and conquer over r, all the midpoints of a level at once: a midpoint's l lies between those of its
    neighbours, so that a level looks at O(V) pairs.
    """
    n = len(best) - 1
    cost, argument = np.full(n + 1, np.inf), np.zeros(n + 1, dtype=np.int64)
    low, high = np.array([i + 1]), np.array([n])  # ranges of r
    first, last = np.array([i]), np.array([n - 1])  # and of l
    while len(low):
        middle = (low + high) // 2
        stop = np.minimum(last, middle - 1)
        sizes = stop - first + 1
        starts = np.concatenate([[0], sizes.cumsum()[:-1]])
        left = np.arange(sizes.sum()) - np.repeat(starts - first, sizes)
        values = best[left] + tail(i, left, np.repeat(middle, sizes))
        cost[middle] = np.minimum.reduceat(values, starts)
        at = np.flatnonzero(values == np.repeat(cost[middle], sizes))
        argument[middle] = left[at[np.searchsorted(at, starts + sizes) - 1]]
        below, above = low < middle, middle < high
        low, high, first, last = (
            np.concatenate(pair)
            for pair in (
                (low[below], middle[above] + 1),
                (middle[below] - 1, high[above]),
                (first[below], argument[middle][above]),
                (argument[middle][below], last[above]),
            )
        )
    return cost, argument
