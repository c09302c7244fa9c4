"""AR/TAR: the shared checks, the traps of the published implementations, and the machine code of the kernels."""

import pytest
import torch

import par_xl
from par_xl.machine_code import compile_launches, cuda_kernels, has_cuda_kernels
from par_xl.ops.ar_tar import ar_tar_reference
from par_xl.testing import OpChecks, assert_capturable, make_inputs, run


def both(*shape, **options):
    return lambda randn: dict(output=randn(*shape), raw_output=randn(*shape), alpha=0.3, beta=0.7, **options)


def shared(*shape, **options):
    def case(randn):
        x = randn(*shape)
        return dict(output=x, raw_output=x, alpha=2.0, beta=0.7, **options)

    return case


class TestArTar(OpChecks):
    ops = ("ar_tar_forward", "ar_tar_backward")
    call = staticmethod(par_xl.ar_tar_loss)
    cases = {
        "both": both(3, 65, 63),
        "wide": both(2, 9, 1024),
        "time-first": both(65, 3, 40, batch_first=False),
        "shared": shared(3, 17, 65),
        "lengths": both(4, 9, 64, lengths=torch.tensor([9, 0, 1, 5])),
        "shared-lengths": shared(3, 9, 16, lengths=torch.tensor([2, 9, 4], dtype=torch.int32)),
        "one-step": both(5, 1, 8),
        "one-sequence": both(1, 500, 8),
        "one-column": both(4, 6, 1),
        "empty-batch": both(0, 4, 8),
        "no-real-step": both(2, 3, 8, lengths=torch.tensor([0, 0])),
    }
    gradcheck_cases = {
        "both": both(2, 5, 3),
        "shared": shared(2, 5, 3),
        "lengths": both(3, 4, 2, lengths=torch.tensor([4, 1, 2])),
        "time-first": both(5, 2, 3, batch_first=False),
        "one-step": both(2, 1, 3),
    }
    bad_input = {
        "rank": (dict(output=torch.zeros(3, 4)), ValueError, "output must have 3 dimensions, not shape (3, 4)"),
        "integers": (dict(output=torch.zeros(1, 2, 3, dtype=torch.int64)), TypeError, "output must be floating point"),
        "shape": (dict(raw_output=torch.zeros(3, 4, 5)), ValueError, "raw_output must have the shape of output"),
        "dtype": (
            dict(raw_output=torch.zeros(3, 65, 63).half()),
            TypeError,
            "raw_output must have the dtype of output",
        ),
        "device": (dict(raw_output=torch.zeros(3, 65, 63, device="meta")), ValueError, "raw_output must be on"),
        "lengths shape": (dict(lengths=torch.ones(2).long()), ValueError, "lengths must have shape (3,)"),
        "lengths dtype": (dict(lengths=torch.ones(3)), TypeError, "lengths must be int32 or int64"),
        "lengths device": (dict(lengths=torch.ones(3, device="meta").long()), ValueError, "lengths must be on"),
    }

    @pytest.mark.parametrize("lengths", [[1, 66, 2], [-1, 3, 3]])
    def test_lengths_outside_the_segment(self, lengths, backend, device):
        """An error on the CPU; NaN on a GPU, where the host does not wait for the value."""
        inputs = {**self.first_case(torch.float32, device), "lengths": torch.tensor(lengths, device=device)}
        if device == "cuda":
            assert par_xl.ar_tar_loss(**inputs, backend=backend).isnan()
        else:
            with pytest.raises(ValueError, match="between 0 and 65, the number of time steps, not (66|-1)"):
                par_xl.ar_tar_loss(**inputs, backend=backend)

    def test_half_precision_does_not_overflow(self, backend, device):
        """awd-lstm's fp16 ``x.pow(2)`` is infinite from |x| = 256 on."""
        x = torch.full((2, 3, 8), 300.0, dtype=torch.float16, device=device)
        assert par_xl.ar_tar_loss(x, alpha=2.0, backend=backend).item() == 2.0 * 300.0**2

    def test_padding_does_not_leak(self, backend, device):
        """NaN after the last real step reaches neither the loss nor a gradient."""
        lengths = torch.tensor([5, 2], device=device)
        clean = make_inputs(both(2, 5, 8), torch.float32, device)
        dirty = {k: v.detach().clone() if isinstance(v, torch.Tensor) else v for k, v in clean.items()}
        for name in ("output", "raw_output"):
            dirty[name][1, 2:] = torch.nan
            dirty[name].requires_grad_()
        function = self.on(backend)
        for got, want in zip(
            run(function, {**dirty, "lengths": lengths}), run(function, {**clean, "lengths": lengths}), strict=True
        ):
            assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))

    def test_only_the_wanted_gradient(self, backend, device):
        inputs = self.first_case(torch.float32, device)
        full = run(self.on(backend), inputs)[1]
        for i, name in enumerate(("output", "raw_output")):
            other = {**inputs, name: inputs[name].detach()}
            assert torch.equal(run(self.on(backend), other)[1][0], full[1 - i])

    def test_number_of_threads_does_not_change_the_bits(self):
        inputs = make_inputs(both(8, 70, 1150), torch.float32, "cpu")
        threads = torch.get_num_threads()
        results = []
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(run(self.on("native"), inputs))
        torch.set_num_threads(threads)
        assert all(torch.equal(x, y) for other in results[1:] for x, y in zip(other[1], results[0][1], strict=True))
        assert results[0][0] == results[1][0] == results[2][0]

    @pytest.mark.gpu
    def test_no_synchronisation_and_cuda_graph(self, backend):
        x = torch.randn(8, 70, 400, device="cuda", requires_grad=True)
        lengths = torch.full((8,), 60, device="cuda")
        loss = lambda: par_xl.ar_tar_loss(x, lengths=lengths, backend=backend)  # noqa: E731
        assert_capturable(lambda: list(torch.autograd.grad(loss(), x)))


def test_formula():
    """The upstream expressions: AR on the dropped output, TAR on the raw one, along time."""
    output, raw = torch.randn(2, 4, 7, 5).unbind()
    wanted = 2.0 * output.pow(2).mean() + 1.0 * (raw[:, 1:] - raw[:, :-1]).pow(2).mean()
    torch.testing.assert_close(par_xl.ar_tar_loss(output, raw), wanted)
    torch.testing.assert_close(par_xl.nn.ActivationRegularization(2.0, 1.0)(output, raw), wanted)
    torch.testing.assert_close(
        par_xl.ar_tar_loss(output.transpose(0, 1), raw.transpose(0, 1), batch_first=False), wanted
    )
    torch.testing.assert_close(ar_tar_reference(output, raw, None, 2.0, 1.0), wanted)


def test_wide_rows_keep_their_digits():
    """C++ sums no more than some thousand columns in fp32: else a row this wide would lose digits."""
    output, raw = torch.randn(2, 1, 5, 1_000_003).unbind()
    wanted = par_xl.ar_tar_loss(output.double(), raw.double(), backend="eager")
    got = par_xl.ar_tar_loss(output, raw, backend="native")
    torch.testing.assert_close(got.double(), wanted, rtol=3e-7, atol=0)


def launches():
    """What the machine-code tests compile: every kernel, flag and storage type."""
    from par_xl.kernels import ar_tar

    for dtype in (torch.bfloat16, torch.float32):
        output, raw = torch.empty(2, 16, 8, 2048, dtype=dtype).unbind()
        loss, scale = torch.empty(()), torch.empty(2)
        for other, lengths in ((raw, None), (None, torch.empty(16, dtype=torch.int64))):
            ar_tar.forward(output, other, lengths, 2.0, 1.0, loss, scale)
            d_other = output.new_empty(0) if other is None else torch.empty_like(raw)
            ar_tar.backward(loss, output, other, lengths, scale, torch.empty_like(output), d_other)


def test_triton_machine_code():
    """No spills, and rows are read in 16-byte loads and written in 16-byte stores."""
    compiled = compile_launches("test_ar_tar:launches")
    assert {(one.kernel, one.capability) for one in compiled} == {
        (kernel, capability) for kernel in ("_sum_strips", "_finish", "_differentiate") for capability in (80, 90, 100)
    }
    for one in compiled:
        assert one.stack == 0, one.kernel
        if one.kernel != "_finish":
            assert "LDG.E.128" in one.sass, one.kernel
        if one.kernel == "_differentiate":
            assert "STG.E.128" in one.sass


@pytest.mark.skipif(not has_cuda_kernels(), reason="the extension was built without CUDA kernels")
def test_cuda_machine_code():
    """No spills; the 16-byte kernels (vector width 8, 4 or 2) load and store 16 bytes at a time."""
    compiled = cuda_kernels("ar_tar")
    wide = [one for one in compiled if any(f"{t}Li{n}E" in one.kernel for t, n in WIDEST.items())]
    assert len(wide) == len({one.capability for one in compiled}) * 2 * 2 * len(WIDEST)
    for one in compiled:
        assert one.stack == 0, one.kernel
    for one in wide:
        assert "LDG.E.128" in one.sass, one.kernel
        assert ("STG.E.128" in one.sass) == ("differentiate" in one.kernel), one.kernel


WIDEST = {"6__half": 8, "13__nv_bfloat16": 8, "If": 4, "Id": 2}  # mangled storage type: elements in 16 bytes
