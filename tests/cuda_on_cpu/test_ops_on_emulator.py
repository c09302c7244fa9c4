"""The CUDA kernels on the emulator: the checks of each op, and what only an emulator can check.

Every launch draws a new order of blocks and threads, in the inherited checks too.
"""

import itertools
import sys

import pytest
import test_adaptive_softmax
import test_ar_tar
import test_compression
import torch
from test_rel_attention_cuda import ForwardChecks
from torch.utils._pytree import tree_map_only

import par_xl
from par_xl.ops.adaptive_softmax import _loss
from par_xl.ops.adaptive_softmax_cuda import rows_in_place, sort
from par_xl.ops.adaptive_tables import Options, head_column
from par_xl.ops.compressed_attention import compressed_attention
from par_xl.ops.registry import acc_dtype
from par_xl.testing import OpChecks, largest_error, make_inputs, replaced_allocations, run

adaptive = test_adaptive_softmax.TestAdaptiveNLL
GUARD = 1 << 14  # bytes


class Guards:
    """Tensors in the midst of 0xff bytes, a NaN or -1 for who reads them; ``check`` finds who has written there."""

    def __init__(self):
        self.made = []

    def __call__(self, x, shift=0):
        """x's values in the same strides, ``shift`` elements off the alignment."""
        span = 1 + sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True)) if x.numel() else 0
        bytes = torch.full((2 * GUARD + (span + shift) * x.element_size(),), 255, dtype=torch.uint8)
        place = x.shape, x.stride(), GUARD // x.element_size() + shift
        self.made.append((bytes, x.dtype, place))
        guarded = bytes.view(x.dtype).as_strided(*place).copy_(x.detach())
        return guarded.requires_grad_(x.requires_grad)

    def check(self):
        for bytes, dtype, place in self.made:
            got, untouched = bytes.clone(), torch.full_like(bytes, 255)
            for x in (got, untouched):
                x.view(dtype).as_strided(*place).zero_()
            assert torch.equal(got, untouched), f"something was written outside a tensor of {place[0]}, {dtype}"


class OnEmulator:
    """Runs the ``native`` tests of a class of checks on the emulator."""

    backends, devices = ("native",), ("cpu",)
    order_dtypes, guard_dtypes = (torch.float32, torch.float16), (torch.float16, torch.float64)

    @pytest.fixture(autouse=True)
    def _on_emulator(self, emulator):
        emulator.seed(0)
        self.emulator = emulator
        with emulator.runs(*self.ops):
            yield

    def test_order_of_blocks_and_threads(self, case, backend):
        for dtype in self.order_dtypes:
            inputs = make_inputs(case, dtype, "cpu")
            results = []
            for seed in range(3):
                self.emulator.seed(seed)
                results.append(run(self.on(backend), inputs))
            self._equal(results[1], results[0])
            self._equal(results[2], results[0])

    def test_nothing_outside_is_touched(self, case, backend):
        """With tensors at 16-byte boundaries, and with inputs that are not."""
        for dtype, shift in itertools.product(self.guard_dtypes, (0, 1)):
            inputs = make_inputs(case, dtype, "cpu")
            wanted = run(self.on(backend), inputs)
            guards, made = Guards(), {}
            inputs = tree_map_only(torch.Tensor, lambda x: made.setdefault(id(x), guards(x, shift)), inputs)  # noqa: B023
            with replaced_allocations(guards):
                got = run(self.on(backend), inputs)
            guards.check()
            for x, y in zip(got, wanted, strict=True):
                torch.testing.assert_close(x, y)


class TestArTar(OnEmulator, test_ar_tar.TestArTar):
    @pytest.mark.parametrize("lengths", [[1, 66, 2], [-1, 3, 3]])
    def test_lengths_outside_the_segment(self, lengths, monkeypatch):
        """NaN, as on a GPU, where the host does not look at the lengths."""
        monkeypatch.setattr("par_xl.ops.ar_tar._check_length_values", lambda *_: None)
        inputs = {**self.first_case(torch.float32, "cpu"), "lengths": torch.tensor(lengths)}
        assert par_xl.ar_tar_loss(**inputs, backend="native").isnan()


class TestCompress(OnEmulator, test_compression.TestCompress):
    pass


class TestUpdateMemory(OnEmulator, test_compression.TestUpdateMemory):
    pass


class TestRelAttention(OnEmulator, ForwardChecks):
    """The forward alone; the gradients that the emulator's own checks take are the C++ kernel's."""

    call = staticmethod(par_xl.rel_attention)
    on, _equal = OpChecks.on, OpChecks._equal
    order_dtypes = guard_dtypes = (torch.float16,)

    @pytest.mark.parametrize("values", [[1, 66], [-1, 3], [2**40, 65], [-(2**40), 0]])
    def test_lengths_outside_the_segment(self, values, dtype, backend, monkeypatch):
        op = sys.modules["par_xl.ops.rel_attention"]  # par_xl.ops.rel_attention is the function
        monkeypatch.setattr(op, "check_length_values", lambda *_: None)
        self.check_lengths(values, dtype, backend, "cpu")

    def test_compressed_attention(self, dtype, backend):
        """Two calls, joined by their log-sum-exps."""
        tokens, old, memory = ([torch.randn(2, 2, n, 24, dtype=dtype) for _ in range(3)] for n in (40, 70, 30))
        r, old_r = (torch.randn(2, n, 24, dtype=dtype) for n in (70, 109))
        inputs = dict(zip("qkv", tokens, strict=True)) | dict(r=r, compressed_r=old_r)
        inputs |= dict(compressed=old[:2], memory=memory[:2])
        wide = tree_map_only(torch.Tensor, torch.Tensor.double, inputs)
        exact = compressed_attention(**wide, backend="eager")
        got, eager = (largest_error(compressed_attention(**inputs, backend=b), exact) for b in (backend, "eager"))
        assert got <= 2 * eager + torch.finfo(dtype).eps * exact.abs().max().item()


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's part runs in the interpreter, on the CPU")
class TestAdaptiveNLL(OnEmulator, OpChecks):
    """The two CUDA kernels among Triton's, in its interpreter; each alone below."""

    ops = adaptive.ops
    call = staticmethod(par_xl.adaptive_nll)
    cases = {"blocks": adaptive.cases["blocks"]}
    gradcheck_cases = {"no-cutoffs": adaptive.gradcheck_cases["no-cutoffs"]}
    dtypes = (torch.float32, torch.float16)
    order_dtypes = guard_dtypes = (torch.float16,)

    def test_target_outside(self, monkeypatch):
        """NaN for its token alone, and the error with the next call."""
        monkeypatch.setattr("par_xl.ops.adaptive_softmax.check_targets", lambda *_: None)
        inputs = make_inputs(adaptive.cases["uniform"], torch.float32, "cpu")
        good = par_xl.adaptive_nll(**inputs, backend="native")
        bad = {**inputs, "target": inputs["target"].index_fill(0, torch.tensor([7]), -3)}
        nll = par_xl.adaptive_nll(**bad, backend="native")
        assert nll[7].isnan() and torch.equal(nll[:7], good[:7]) and torch.equal(nll[8:], good[8:])
        with pytest.raises(ValueError, match="not -3"):
            par_xl.adaptive_nll(**inputs, backend="native")


@pytest.mark.parametrize("descending", [False, True])
@pytest.mark.parametrize("tokens", [0, 1, 1024, 2500])
@pytest.mark.parametrize("tails", [0, 1, 3, 64])
def test_sort_by_tail(tails, tokens, descending, emulator):
    ends = tuple(range(10, 10 + 7 * tails + 1, 7))
    options = Options(ends, descending, ignore_index=12, label_smoothing=0.0, z_loss=0.0, workspace=0)
    target, bad = torch.randint(max(13, ends[-1]), (tokens,)), torch.zeros(1).long()
    target[5::100], target[6::500] = -1, ends[-1]
    emulator.seed(tails + tokens)
    guards = Guards()
    with emulator.active(), replaced_allocations(guards):
        head, tail, order, offsets = sort(guards(target), bad, options)
    guards.check()
    ignored = target == 12
    outside = ((target < 0) | (target >= ends[-1])) & ~ignored
    of = torch.searchsorted(torch.tensor(ends), target, right=True).masked_fill(outside | ignored, 0) - 1
    columns = torch.tensor([head_column(i, ends, descending) for i in range(tails)] or [0])
    wanted = torch.where(of < 0, target, columns[of]).masked_fill(outside, -2).masked_fill(ignored, -1)
    assert torch.equal(head, wanted)
    assert torch.equal(tail, torch.where(of < 0, -1, target - torch.tensor(ends)[of]))
    assert torch.equal(order[: (of >= 0).sum()], of.argsort(stable=True)[(of < 0).sum() :])
    assert offsets.tolist() == [0, *(int(((of >= 0) & (of <= i)).sum()) for i in range(tails))]
    assert bad.item() in (target[outside].tolist() or [0])


@pytest.mark.parametrize("dtype", adaptive.dtypes)
@pytest.mark.parametrize("columns", [1, 63, 4100, 42000])  # the last ones do not fit into shared memory
def test_rows_in_place(columns, dtype, emulator):
    guards, stride = Guards(), -(-columns // 64) * 64
    masked = torch.randn(columns, dtype=acc_dtype(dtype))
    masked[1 : columns // 3] = -torch.inf
    for bias, smoothing in ((None, 0.1), (torch.randn_like(masked), 0.1), (masked, 0.0)):
        options = Options((columns,), False, -100, label_smoothing=smoothing, z_loss=smoothing / 10, workspace=0)
        memory = guards(torch.full((5, stride), torch.nan, dtype=acc_dtype(dtype)))
        z, dz = memory[:, :columns], memory.view(dtype)[:, :columns]
        z.copy_(3 * torch.randn(z.shape))
        logits = (z if bias is None else z + bias).double().requires_grad_()
        column, grad = torch.tensor([0, columns - 1, columns // 2, -1, -2]), torch.rand(5, dtype=acc_dtype(dtype))
        loss = _loss(logits, column.clamp(min=0), options)
        wanted = torch.autograd.grad(loss[:3], logits, grad[:3].double())[0].to(dtype)
        nll = guards(torch.empty(5, dtype=acc_dtype(dtype)))
        with emulator.active():
            rows_in_place(z, dz, bias if bias is None else guards(bias), guards(column), guards(grad), nll, options)
        torch.testing.assert_close(nll[:3], loss[:3].detach().to(nll.dtype))
        assert nll[3] == 0 and nll[4].isnan()
        torch.testing.assert_close(dz, wanted)
    guards.check()
