"""The Triton kernels of rel_attention: what the op's own tests cannot see, and their machine code."""

import pytest
import torch
from test_rel_attention import attention

import par_xl
from par_xl.machine_code import compile_launches
from par_xl.ops.rel_attention_inputs import UNLIMITED
from par_xl.testing import make_inputs, run

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="these run in the interpreter, on the CPU")


def on_triton(**inputs):
    return par_xl.rel_attention(**inputs, backend="triton")


@pytest.mark.parametrize("rows", [1, 100])
def test_scratch_budget(rows, monkeypatch):
    """The gradients of the positions do not depend on how heads, sequences and queries take turns in the scratch."""
    from par_xl.kernels import rel_attention_backward

    inputs = make_inputs(attention(2, 2, 130, 130, 20, 16), torch.float64, "cpu")
    wanted = run(on_triton, inputs)
    scratches = []
    kernel = rel_attention_backward.differentiate_queries

    class Recorded:
        def __getitem__(self, grid):
            def launch(*args, **flags):
                scratches.append([x for x in args if isinstance(x, torch.Tensor)][-1])
                kernel[grid](*args, **flags)

            return launch

    row_bytes = 192 * 8 + 2 * 16 * 8  # 150 columns in whole tiles, and two rows of sums
    monkeypatch.setattr(rel_attention_backward, "SCRATCH_BYTES", rows * row_bytes)
    monkeypatch.setattr(rel_attention_backward, "differentiate_queries", Recorded())
    got = run(on_triton, inputs)
    assert len(scratches) == 2 * 2 * 3
    assert max(x.nbytes for x in scratches) <= 64 * row_bytes  # a tile of queries is the least
    for group, others in zip(got, wanted, strict=True):
        for x, y in zip(group, others, strict=True):
            torch.testing.assert_close(x, y)


def test_queries_that_see_no_key_may_hold_anything():
    case = attention(2, 1, 70, 9, None, 16)  # causal, more queries than keys: the first 61 see nothing
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


def launch(width, dtype, clamp_len=UNLIMITED, queries=128, dropout_p=0.0):
    """Forward and backward as a language model calls them."""
    from par_xl.kernels.rel_attention import forward
    from par_xl.kernels.rel_attention_backward import backward

    q, k, v, k_memory, v_memory = torch.empty(5, 2, 4, 128, width, dtype=dtype).unbind()
    q = q[:, :, :queries]
    r, biases = torch.empty(4, 256, width, dtype=dtype), torch.empty(2, 4, width, dtype=dtype)
    lengths, seed = torch.empty(2, dtype=torch.int64), torch.empty(1, dtype=torch.int64) if dropout_p else None
    inputs = (q, k, v, r, *biases.unbind(), k_memory, v_memory, lengths, seed)
    limits = UNLIMITED, 0, clamp_len, width**-0.5, dropout_p
    lse = torch.empty(2, 4, queries)
    forward(*inputs, *limits, q, lse)
    with pytest.MonkeyPatch.context() as patch:  # torch's product of bf16 into fp32 is there on a GPU alone
        patch.setattr(torch, "bmm", lambda x, y: x.new_empty(*x.shape[:2], y.shape[2]))
        backward(q, *inputs, q, lse, False, *limits, *(torch.empty_like(x) for x in inputs[:8]))


def launches_64():
    launch(64, torch.bfloat16)


def launches_128():
    launch(128, torch.bfloat16)


def launches_clamped():
    launch(64, torch.bfloat16, clamp_len=30)
    launch(128, torch.bfloat16, clamp_len=30)


def launches_others():
    launch(41, torch.bfloat16)  # rows that are no whole tiles, nor 16 bytes apart
    launch(64, torch.float32)
    launch(64, torch.bfloat16, queries=8)
    launch(64, torch.bfloat16, dropout_p=0.1)
    launch(128, torch.bfloat16, dropout_p=0.1)


def test_other_widths_types_and_dropout_do_not_spill():
    for one in compile_launches("test_rel_attention_gpu_kernels:launches_others", (90,)):
        assert one.stack == 0, one.kernel


@pytest.mark.parametrize("precision, wanted", [("highest", "ieee"), ("high", "tf32")])
def test_fp32_products_have_torchs_precision(precision, wanted):
    from par_xl.kernels.rel_attention import products

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        assert products(torch.float32)["PRECISION"] == wanted
    finally:
        torch.set_float32_matmul_precision(before)


def test_fp32_products_follow_torch_backends():
    """The setting for GPUs alone, with which ``torch.get_float32_matmul_precision`` is an error."""
    from par_xl.kernels.rel_attention import products

    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        assert products(torch.float32)["PRECISION"] == "tf32"
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


PRODUCTS = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}


@pytest.mark.parametrize(
    "launches, capabilities", [("launches_64", (80, 90, 100)), ("launches_128", (90, 100)), ("launches_clamped", (90,))]
)
def test_machine_code(launches, capabilities):
    """No spills; products on the tensor cores; tiles are prefetched into shared memory 16 bytes at a time."""
    compiled = compile_launches(f"test_rel_attention_gpu_kernels:{launches}", capabilities)
    kernels = {"_forward", "_prepare", "differentiate_queries", "differentiate_keys"}
    assert {(one.kernel, one.capability) for one in compiled} == {(k, c) for k in kernels for c in capabilities}
    for one in compiled:
        assert one.stack == 0, (one.kernel, one.capability)
        if one.kernel != "_prepare":
            assert PRODUCTS[one.capability] in one.sass
            assert "LDGSTS.E.BYPASS" in one.sass and ".128" in one.sass
        if one.kernel == "differentiate_keys":
            assert "SHFL" not in one.sass  # the rotation goes through shared memory, not between lanes
