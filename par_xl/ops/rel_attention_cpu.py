"""rel_attention on the CPU: vendor matrix products over blocks of query rows, and C++ (csrc/cpu) for all between them.

A block is some query rows of a group of heads against every key that they see, so a row's softmax is complete in its
block. The products of a block go to a workspace that each thread keeps, small enough for the cache:

    scores = content_q k^T,  position = position_q r[p0:p1]^T    content_q, position_q: (q + bias) * scale
    rows:    scores <- exp(scores + position, shifted, - max)
    out    = scores v / sum

Backward, in the same blocks: d_weights = grad v^T; the rows turn scores into weights, d_weights into dS and position into
dS shifted back; one product each then gives the gradients of v, k, r and of both queries, whose sums are the biases'.
Memory and segment are two parts with a product and a score buffer each.
"""

import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from par_xl.ops.registry import _C, DTYPES

ROWS = 128  # query rows of a block: enough for full-speed products, few enough to skip what causality hides
WORKSPACE = 2**21  # elements; 8 MB in fp32


class _Workspace(threading.local):
    """One allocation per thread and dtype, cut anew for each block."""

    def __init__(self) -> None:
        self.memory: dict[torch.dtype, Tensor] = {}

    def cut(self, dtype: torch.dtype, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
        sizes = [torch.Size(shape).numel() for shape in shapes]
        if sum(sizes) > WORKSPACE:
            memory = torch.empty(sum(sizes), dtype=dtype)
        else:
            memory = self.memory.setdefault(dtype, torch.empty(0, dtype=dtype))
            if not memory.numel():
                memory = self.memory[dtype] = torch.empty(WORKSPACE, dtype=dtype)
        pieces = memory[: sum(sizes)].split(sizes)
        return [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)]


_workspace = _Workspace()


class _Problem:
    """The inputs of a call, and how it is cut into groups of heads and blocks of rows."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, r: Tensor, content_bias: Tensor, position_bias: Tensor,
        k_memory: Tensor | None, v_memory: Tensor | None, key_lengths: Tensor | None, seed: Tensor | None,
        left: int, right: int, scale: float, dropout_p: float,
    ) -> None:  # fmt: skip
        self.wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        self.q, self.r = q, r.to(self.wide)
        self.content_bias = content_bias.to(self.wide)[:, None] * scale
        self.position_bias = position_bias.to(self.wide)[:, None] * scale
        if k_memory is None or v_memory is None:
            k_memory, v_memory = k[:, :, :0], v[:, :, :0]
        self.keys, self.values = (k_memory, k), (v_memory, v)
        self.n_keys = k_memory.shape[2] + k.shape[2]
        self.lengths = None if key_lengths is None else key_lengths.tolist()
        self.seed = 0 if seed is None else int(seed)
        self.left, self.right, self.scale, self.dropout_p = left, right, scale, dropout_p

    def groups(self, score_buffers: int) -> Iterator["_Group"]:
        """Sequences and heads whose blocks fit into the workspace together."""
        batch, heads, n_queries, width = self.q.shape
        per_row = score_buffers * (self.n_keys + width) + 2 * width
        rows = min(n_queries, ROWS)
        while rows > 16 and rows * per_row > WORKSPACE:
            rows //= 2
        items = max(WORKSPACE // max(rows * per_row, 1), 1)
        heads_each = -(-heads // -(-heads // items)) if heads else 1
        batch_each = 1 if self.lengths else max(items // max(heads, 1), 1)
        for b in range(0, batch, batch_each):
            for h in range(0, heads, heads_each):
                n_segment = self.lengths[b] if self.lengths else self.keys[1].shape[2]
                yield _Group(self, slice(b, b + batch_each), slice(h, h + heads_each), rows, n_segment)


class _Group:
    """Some heads of some sequences: keys and values ``(items, n, D)`` of the two parts in the arithmetic type."""

    def __init__(self, problem: _Problem, batch: slice, heads: slice, rows: int, n_segment: int) -> None:
        self.problem, self.batch, self.heads, self.rows = problem, batch, heads, rows
        self.sizes = problem.keys[0].shape[2], n_segment
        self.keys = [self.panel(x, n) for x, n in zip(problem.keys, self.sizes, strict=True)]
        self.values = [self.panel(x, n) for x, n in zip(problem.values, self.sizes, strict=True)]
        self.items = self.keys[0].shape[0]

    def panel(self, x: Tensor, n: int) -> Tensor:
        return x[self.batch, self.heads, :n].to(self.problem.wide).flatten(0, 1)

    def blocks(self) -> Iterator["_Block"]:
        """Blocks over the rows that see a key."""
        p = self.problem
        lag, n_keys = p.n_keys - p.q.shape[2], sum(self.sizes)  # distance of row 0 and key 0; keys that are real
        first, end = max(0, -lag - p.right), min(p.q.shape[2], n_keys - lag + p.left)
        if n_keys and p.left + p.right >= 0:
            for row in range(first, end, self.rows):
                yield _Block(self, row, min(row + self.rows, end))


class _Block:
    """Rows ``[begin, end)`` of a group, the keys and position rows that they see, and a share of the workspace."""

    def __init__(self, group: _Group, begin: int, end: int) -> None:
        p, self.group = group.problem, group
        n_queries = p.q.shape[2]
        lag = p.n_keys - n_queries
        self.index = group.batch, group.heads, slice(begin, end)
        first_key, end_key = max(0, begin + lag - p.left), min(sum(group.sizes), end + lag + p.right)
        starts = 0, group.sizes[0]
        self.spans = []  # of the keys, in each part
        for start, n in zip(starts, group.sizes, strict=True):
            low = min(max(first_key - start, 0), n)
            self.spans.append(slice(low, max(low, min(end_key - start, n))))
        self.columns = tuple(span.stop - span.start for span in self.spans)
        # Query i and key j meet in row j - i + Q - 1 of r.
        first_position = max(first_key - end + n_queries, p.n_keys - 1 - p.left)
        end_position = min(end_key - begin + n_queries - 1, p.n_keys + p.right)
        self.positions = slice(first_position, end_position)
        self.r = p.r[group.heads, self.positions]
        self.shift = first_key - begin + n_queries - 1 - first_position
        self.distance = begin + lag - first_key
        self.offset = ((group.batch.start * p.q.shape[1] + group.heads.start) * n_queries + begin) * p.n_keys + first_key

    def cut(self, *widths: int) -> list[Tensor]:
        """Pieces of the workspace, ``(items, rows, width)``."""
        rows = self.index[2].stop - self.index[2].start
        return _workspace.cut(self.r.dtype, [(self.group.items, rows, width) for width in widths])

    def parts(self, panels: Sequence[Tensor]) -> list[Tensor]:
        """The rows of the block's keys, in each part."""
        return [x[:, span] for x, span in zip(panels, self.spans, strict=True)]

    def by_head(self, x: Tensor) -> Tensor:
        """``(items, rows, width)`` in the order (head, sequence), as ``(heads, sequences * rows, width)``."""
        return x.view(-1, x.shape[0] // self.r.shape[0] * x.shape[1], x.shape[2])

    def products(self, content_q: Tensor, position_q: Tensor, scores: Sequence[Tensor], position: Tensor) -> None:
        """Both queries, ``(q + bias) * scale``, and their products with the keys and with r."""
        p, heads = self.group.problem, self.group.heads
        q = p.q[self.index]  # (sequences, heads, rows, D)
        torch.add(p.content_bias[heads], q, alpha=p.scale, out=content_q.view(q.shape))
        by_head = position_q.view(q.shape[1], q.shape[0], *q.shape[2:])
        torch.add(p.position_bias[heads], q, alpha=p.scale, out=by_head.transpose(0, 1))
        for key, score in zip(self.parts(self.group.keys), scores, strict=True):
            _product(score, content_q, key.mT)
        _product(self.by_head(position), self.by_head(position_q), self.r.mT)

    def rows(self, scores: Sequence[Tensor], position: Tensor, d_weights: Sequence[Tensor] = ()) -> Any:
        """What the C++ rows need to know."""
        p, (items, n_rows, n_positions) = self.group.problem, position.shape
        n_heads = self.r.shape[0]
        row_offsets = p.q.shape[1] * p.q.shape[2] * p.n_keys, p.q.shape[2] * p.n_keys, p.n_keys
        return _C.RelRows(
            (items // n_heads, n_heads, n_rows),
            tuple(x.data_ptr() for x in scores),
            tuple(x.data_ptr() for x in d_weights) or (0, 0),
            self.columns,
            position.data_ptr(),
            n_positions,
            self.shift,
            (self.distance, p.left, p.right),
            p.dropout_p,
            p.seed,
            (self.offset, *row_offsets),
            DTYPES[position.dtype],
        )


def _product(out: Tensor, a: Tensor, b: Tensor, alpha: float = 1.0, accumulate: bool = False) -> None:
    """out = alpha * a b, or plus that."""
    if out.numel():
        torch.baddbmm(out, a, b, beta=int(accumulate), alpha=alpha, out=out)


def forward(*inputs: Any) -> tuple[Tensor, Tensor]:
    """The registered op, on the CPU."""
    p = _Problem(*inputs)
    out, lse = torch.zeros_like(p.q), torch.full(p.q.shape[:3], -torch.inf, dtype=p.wide)
    width = p.q.shape[3]
    for group in p.groups(score_buffers=2):
        for block in group.blocks():
            content_q, position_q, *scores, position, values, factor = block.cut(
                width, width, *block.columns, block.r.shape[1], width, 1
            )
            block.products(content_q, position_q, scores, position)
            rows, row_lse = block.rows(scores, position), lse[block.index]
            _C.rel_attention_forward_cpu(rows, factor.data_ptr(), row_lse.data_ptr(), row_lse.stride()[:2])
            for part, value in enumerate(block.parts(group.values)):
                _product(values, scores[part], value, accumulate=part > 0)
            row_out = out[block.index]
            torch.mul(values.view(row_out.shape), factor.view(*row_out.shape[:3], 1), out=row_out)
    return out, lse


def backward(grad: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    """The registered op, on the CPU."""
    *inputs, _, lse, left, right, scale, dropout_p = inputs
    p = _Problem(*inputs, left, right, scale, dropout_p)
    q, k, v, r, content_bias, position_bias, k_memory, v_memory = inputs[:8]
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    dk_memory, dv_memory = (q.new_empty(0) if x is None else torch.zeros_like(x) for x in (k_memory, v_memory))
    dr, d_content_bias, d_position_bias = (
        torch.zeros(x.shape, dtype=p.wide) for x in (r, content_bias, position_bias)
    )
    for group in p.groups(score_buffers=3):
        d_keys, d_values = ([torch.zeros_like(x) for x in panels] for panels in (group.keys, group.values))
        for block in group.blocks():
            d_content_q, d_position_q = _block_backward(block, grad, lse, d_keys, d_values, dr)
            d_content_bias[group.heads] += d_content_q.sum((0, 2))
            d_position_bias[group.heads] += d_position_q.sum((0, 2))
            torch.add(d_content_q, d_position_q, out=dq[block.index])
        for n, *pairs in zip(group.sizes, (dk_memory, dk), d_keys, (dv_memory, dv), d_values, strict=True):
            for total, part in (pairs[:2], pairs[2:]):
                if n:
                    piece = total[group.batch, group.heads, :n]
                    piece.copy_(part.view(piece.shape))
    summed = (x.to(q.dtype) for x in (dr, d_content_bias, d_position_bias))
    return dq, dk, dv, *summed, dk_memory, dv_memory


def _block_backward(
    block: _Block, grad: Tensor, lse: Tensor, d_keys: list[Tensor], d_values: list[Tensor], dr: Tensor
) -> tuple[Tensor, Tensor]:
    """Adds to the gradients of keys, values and r; returns those of both queries, ``(sequences, heads, rows, D)``."""
    group, (grad, lse), width = block.group, (x[block.index] for x in (grad, lse)), grad.shape[3]
    content_q, position_q, d_out, *scores, d0, d1, position = block.cut(
        width, width, width, *block.columns, *block.columns, block.r.shape[1]
    )
    d_weights = d0, d1
    d_out.view(grad.shape).copy_(grad)
    block.products(content_q, position_q, scores, position)
    for d_weight, value in zip(d_weights, block.parts(group.values), strict=True):
        _product(d_weight, d_out, value.mT)
    _C.rel_attention_backward_cpu(block.rows(scores, position, d_weights), lse.data_ptr(), lse.stride()[:2])
    d_position = block.by_head(position)
    _product(dr[group.heads, block.positions], d_position.mT, block.by_head(position_q), accumulate=True)
    for part, (dk, dv) in enumerate(zip(block.parts(d_keys), block.parts(d_values), strict=True)):
        _product(dv, scores[part].mT, d_out, accumulate=True)
        _product(dk, d_weights[part].mT, content_q, accumulate=True)
    # The queries are used up: their memory takes their gradients.
    for part, key in enumerate(block.parts(group.keys)):
        _product(content_q, d_weights[part], key, group.problem.scale, accumulate=part > 0)
    _product(block.by_head(position_q), d_position, block.r, group.problem.scale)
    by_head = position_q.view(grad.shape[1], grad.shape[0], *grad.shape[2:])
    return content_q.view(grad.shape), by_head.transpose(0, 1)
