"""The Triton kernels of rel_attention: what the op's own tests cannot see, and their machine code."""

import re

import pytest
import torch
from test_rel_attention import TestRelAttention, attention

import par_xl
from par_xl.machine_code import compile_launches
from par_xl.testing import make_inputs, run

triton = pytest.importorskip("triton")


def on_triton(**inputs):
    return par_xl.rel_attention(**inputs, backend="triton")


cpu = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("rows", [1, 64, 100])
def test_scratch_budget(rows, monkeypatch):
    """The gradients of the positions do not depend on how heads, sequences and queries take turns in the scratch."""
    from par_xl.kernels import rel_attention_backward

    inputs = make_inputs(attention(2, 2, 130, 130, 20, 16), torch.float64, cpu if cpu == "cpu" else "cpu")
    wanted = run(on_triton, inputs)
    scratches = []
    kernel = rel_attention_backward._differentiate_queries

    class Recorded:
        def __getitem__(self, grid):
            def launch(*args, **flags):
                scratches.append(next(x for x in reversed(args) if isinstance(x, torch.Tensor)))
                kernel[grid](*args, **flags)

            return launch

    row_bytes = 192 * 8 + 2 * 16 * 8  # 150 columns in whole tiles, and two rows of sums
    monkeypatch.setattr(rel_attention_backward, "SCRATCH_BYTES", rows * row_bytes)
    monkeypatch.setattr(rel_attention_backward, "_differentiate_queries", Recorded())
    got = run(on_triton, inputs)
    assert len(scratches) == 2 * 2 * 3
    assert max(x.nbytes for x in scratches) <= 64 * row_bytes  # a tile of queries is the least
    for group, others in zip(got, wanted, strict=True):
        for x, y in zip(group, others, strict=True):
            torch.testing.assert_close(x, y)


def test_queries_that_see_no_key_may_hold_anything():
    case = attention(2, 1, 70, 9, None, 16, spare=0)  # causal, more queries than keys: the first 61 see nothing
    clean = make_inputs(case, torch.float32, "cpu")
    dirty = {name: x.detach().clone() for name, x in clean.items()}
    dirty["q"][:, :, :61] = torch.nan
    gradient = torch.linspace(-1, 1, clean["q"].numel()).view(clean["q"].shape)
    results = []
    for inputs, poison in ((clean, 0.0), (dirty, torch.nan)):
        leaves = [x.requires_grad_() for x in inputs.values()]
        grad = gradient.clone()
        grad[:, :, :61] = poison
        out = on_triton(**inputs)
        results.append([out, *torch.autograd.grad(out, leaves, grad)])
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


def test_expanded_gradient():
    """The gradient of a sum has stride 0 everywhere."""
    inputs = TestRelAttention().first_case(torch.float32, "cpu")
    got, wanted = (
        torch.autograd.grad(par_xl.rel_attention(**inputs, backend=b).sum(), inputs["q"])[0] for b in ("triton", "eager")
    )
    torch.testing.assert_close(got, wanted)


def launches_of(width, **options):
    from par_xl.kernels import rel_attention, rel_attention_backward

    batch, heads, queries, memory = 2, 4, 512, 1600
    empty = lambda *shape: torch.empty(shape, dtype=torch.bfloat16, device="meta")  # noqa: E731
    q, k, v, k_memory, v_memory = (torch.empty(batch, heads, n, width, dtype=torch.bfloat16) for n in (512, 512, 512, 16, 16))
    del empty, queries, memory
    r = torch.empty(heads, 528, width, dtype=torch.bfloat16)
    biases = torch.empty(2, heads, width, dtype=torch.bfloat16).unbind()
    inputs = (q, k, v, r, *biases, k_memory, v_memory, options.get("lengths"), options.get("seed"))
    limits = 2**31 - 1, 0, width**-0.5, options.get("dropout_p", 0.0)
    lse = torch.empty(batch, heads, 512)
    rel_attention.forward(*inputs, *limits, q, lse)
    gradients = [torch.empty_like(x) for x in inputs[:8]]
    rel_attention_backward.backward(q, *inputs, q, lse, *limits, *gradients)
