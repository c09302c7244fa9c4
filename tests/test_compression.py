"""Compression and the update of a compressive memory: the shared checks, parity with torch, and the machine code."""

import pytest
import torch
import torch.nn.functional as F

import par_xl
from par_xl.machine_code import compile_launches, cuda_kernels, has_cuda_kernels
from par_xl.testing import OpChecks, assert_capturable, leaves, make_inputs, run


def pooled(mode, rate, *shape):
    return lambda randn: dict(memory=randn(*shape), rate=rate, mode=mode)


def time_first(mode, rate, steps, batch, width):
    return lambda randn: dict(memory=randn(steps, batch, width).transpose(0, 1), rate=rate, mode=mode)


def most_used(rate, *shape):
    def case(randn):
        usage = torch.rand(shape[:2], generator=torch.Generator().manual_seed(1)).mul(8).round()  # with many ties
        return dict(memory=randn(*shape), rate=rate, mode="most_used", usage=usage)

    return case


def conv(rate, batch, steps, width):
    return lambda randn: dict(
        memory=randn(batch, steps, width), rate=rate, mode="conv", weight=randn(width, width, rate), bias=randn(width)
    )


def dilated_conv(rate, dilation, batch, steps, width):
    def case(randn):
        kernels = [2] * len(dilation) + [rate]
        weight = [randn(width, width, kernel) for kernel in kernels]
        bias = [randn(width) if i % 2 else None for i in range(len(kernels))]
        options = dict(mode="dilated_conv", weight=weight, bias=bias, dilation=dilation)
        return dict(memory=randn(batch, steps, width), rate=rate, **options)

    return case


class TestCompress(OpChecks):
    ops = ("compress_forward", "compress_backward")
    call = staticmethod(par_xl.compress)
    cases = {
        "max": pooled("max", 4, 3, 64, 63),
        "mean": pooled("mean", 4, 3, 64, 63),
        "wide": pooled("mean", 3, 2, 9, 1024),
        "max-time-first": time_first("max", 3, 63, 5, 40),
        "mean-time-first": time_first("mean", 5, 65, 3, 8),
        "rate-one": pooled("max", 1, 2, 5, 7),
        "one-group": pooled("mean", 500, 1, 500, 8),
        "large-rate": pooled("max", 500, 2, 500, 9),
        "one-column": pooled("mean", 2, 4, 6, 1),
        "most-used": most_used(4, 3, 64, 65),
        "conv": conv(4, 3, 64, 63),
        "dilated": dilated_conv(3, (1, 2, 4), 2, 63, 24),
        "empty-batch": pooled("max", 2, 0, 4, 8),
        "empty-memory": pooled("mean", 2, 2, 0, 8),
    }
    gradcheck_cases = {
        "max": pooled("max", 3, 2, 6, 3),
        "mean": pooled("mean", 3, 2, 6, 3),
        "time-first": time_first("max", 2, 4, 2, 3),
        "most-used": most_used(2, 1, 4, 2),
        "conv": conv(2, 2, 4, 3),
        "dilated": dilated_conv(2, (1, 2), 2, 4, 3),
    }
    bad_input = {
        "rank": (dict(memory=torch.zeros(3, 4)), ValueError, "memory must have 3 dimensions, not shape (3, 4)"),
        "integers": (dict(memory=torch.zeros(1, 4, 3).long()), TypeError, "memory must be floating point"),
        "rate": (dict(rate=0), ValueError, "rate must be a positive integer, not 0"),
        "rate-float": (dict(rate=2.0), ValueError, "rate must be a positive integer, not 2.0"),
        "steps": (dict(rate=3), ValueError, "a number of steps divisible by rate 3, not 64"),
        "mode": (dict(mode="sum"), ValueError, "mode must be one of mean, max, most_used, conv, dilated_conv"),
        "no-usage": (dict(mode="most_used"), ValueError, "usage must be given with mode most_used"),
        "other-usage": (dict(usage=torch.zeros(3, 64)), ValueError, "and no other, not with max"),
        "usage-shape": (dict(mode="most_used", usage=torch.zeros(64)), ValueError, "usage must have shape (3, 64)"),
        "usage-dtype": (dict(mode="most_used", usage=torch.zeros(3, 64).long()), TypeError, "usage must be floating"),
        "usage-device": (
            dict(mode="most_used", usage=torch.zeros(3, 64, device="meta")),
            ValueError,
            "usage must be on",
        ),
        "other-weight": (dict(weight=torch.zeros(63, 63, 4)), ValueError, "weight must not be given with mode max"),
        "no-weight": (dict(mode="conv"), ValueError, "weight must have shape (63, 63, 4), not None"),
        "weight": (dict(mode="conv", weight=torch.zeros(63, 63, 3)), ValueError, "weight must have shape (63, 63, 4)"),
        "weight-dtype": (
            dict(mode="conv", weight=torch.zeros(63, 63, 4).half()),
            TypeError,
            "weight must have the dtype of memory",
        ),
        "bias": (
            dict(mode="conv", weight=torch.zeros(63, 63, 4), bias=torch.zeros(62)),
            ValueError,
            "bias must have shape (63,), not (62,)",
        ),
        "no-dilation": (dict(mode="dilated_conv"), ValueError, "dilation must be given with mode dilated_conv"),
        "layers": (
            dict(mode="dilated_conv", dilation=(1, 2), weight=[torch.zeros(63, 63, 2)]),
            ValueError,
            "must each have 3 tensors, one for each dilated layer and one for the last, not 1",
        ),
    }

    def test_second_derivative_is_an_error(self, backend, device):
        """The op is linear where its maxima stay: only a gradient that depends on the input has a second derivative."""
        inputs = self.first_case(torch.float32, device)
        output = self.on(backend)(**inputs)
        (first,) = torch.autograd.grad(output.square().sum(), inputs["memory"], create_graph=True)
        with pytest.raises(RuntimeError, match="no second derivative"):
            first.sum().backward()

    def test_ties_and_nan_of_max(self, dtype, backend, device):
        values = [0.0, -0.0, 1.0, torch.nan, torch.inf, -torch.inf]
        memory = torch.tensor(values, dtype=dtype, device=device)
        memory = torch.cartesian_prod(memory, memory, memory).T.reshape(1, 3, -1).requires_grad_()
        got, want = (run(self.on(b), dict(memory=memory, rate=3, mode="max")) for b in (backend, "eager"))
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)

    @pytest.mark.parametrize("rate", [2, 11, 1100])
    def test_most_used_with_ties_and_special_values(self, rate, backend, device):
        values = torch.tensor([0.0, -0.0, 1.0, -1.0, torch.nan, -torch.nan, torch.inf, -torch.inf, 1e-45, -1e-45])
        usage = values[torch.randint(len(values), (2, 1100))].to(device)
        memory = torch.arange(2 * 1100.0, device=device).view(2, 1100, 1)
        got, want = (par_xl.compress(memory, rate, "most_used", usage=usage, backend=b) for b in (backend, "eager"))
        assert torch.equal(got, want)
        assert (got.diff(dim=1) > 0).all()  # time order

    def test_equal_usage_keeps_the_oldest(self, backend, device):
        memory = torch.arange(8.0, device=device).view(1, 8, 1)
        usage = torch.tensor([[1.0, 5, 2, 2, 2, 9, 2, 2]], device=device)
        kept = par_xl.compress(memory, 2, "most_used", usage=usage, backend=backend)
        assert kept.flatten().tolist() == [1, 2, 3, 5]

    def test_half_precision_is_summed_in_fp32(self, backend, device):
        memory = torch.full((1, 64, 8), 60000.0, dtype=torch.float16, device=device)
        assert (par_xl.compress(memory, 64, "mean", backend=backend) == 60000).all()

    def test_the_memory_is_not_kept_for_the_backward(self, backend, device):
        memory = torch.randn(2, 8, 16, device=device, requires_grad=True)
        for mode in ("mean", "max"):
            kept = par_xl.compress(memory, 4, mode, backend=backend).grad_fn.saved_tensors
            assert sum(x.nbytes for x in kept) <= memory.numel() // 4

    def test_apply_takes_what_compress_takes(self, backend, device):
        memory, usage = torch.randn(2, 6, 8, device=device).transpose(1, 2), torch.rand(2, 8, device=device).double()
        for mode, given in (("max", None), ("most_used", usage)):
            wanted = par_xl.compress(memory, 2, mode, usage=given, backend="eager")
            assert torch.equal(par_xl.Compress.apply(memory, given, 2, mode, backend), wanted)
        with pytest.raises(ValueError, match="usage must be given with mode most_used"):
            par_xl.Compress.apply(memory, None, 2, "most_used", backend)

    @pytest.mark.gpu
    def test_no_synchronisation_and_cuda_graph(self, backend):
        memory = torch.randn(4, 64, 128, device="cuda", requires_grad=True)
        usage = torch.rand(4, 64, device="cuda")
        for mode in ("mean", "max", "most_used"):

            def step(mode=mode):
                options = dict(usage=usage) if mode == "most_used" else {}
                out = par_xl.compress(memory, 4, mode, backend=backend, **options)
                return list(torch.autograd.grad(out.sum(), memory))

            assert_capturable(step)


@pytest.mark.parametrize("chosen", ["eager", "auto"])
def test_formulas(chosen):
    """Each mode against the plain torch expression over (B, d, N)."""
    memory, rate = torch.randn(3, 12, 8), 3
    m = memory.transpose(1, 2)
    weight, bias, inner = torch.randn(8, 8, rate), torch.randn(8), torch.randn(8, 8, 2)
    usage = torch.rand(3, 12)
    top = usage.topk(4).indices.sort().values
    wanted = {
        "mean": (F.avg_pool1d(m, rate), {}),
        "max": (F.max_pool1d(m, rate), {}),
        "conv": (F.conv1d(m, weight, bias, stride=rate), dict(weight=weight, bias=bias)),
        "dilated_conv": (
            F.conv1d(F.conv1d(F.pad(m, (2, 0)), inner, dilation=2).relu(), weight, stride=rate),
            dict(weight=[inner, weight], dilation=[2]),
        ),
        "most_used": (torch.stack([x[:, i] for x, i in zip(m, top, strict=True)]), dict(usage=usage)),
    }
    for mode, (expected, options) in wanted.items():
        got = par_xl.compress(memory, rate, mode, backend=chosen, **options)
        torch.testing.assert_close(got, expected.transpose(1, 2), msg=lambda text, mode=mode: f"{mode}: {text}")


def test_the_product_of_conv_reads_the_memory_in_place():
    """A group of rows of a contiguous memory is a row of the product: nothing as large as the memory is made."""
    memory, weight = torch.randn(4, 512, 64), torch.randn(64, 64, 4)
    with torch.profiler.profile(profile_memory=True) as profile:
        par_xl.compress(memory, 4, "conv", weight=weight, backend="native")
    largest = max(event.self_cpu_memory_usage for event in profile.key_averages())
    assert largest < memory.nbytes, "an unfolded copy was made"


def updated(mode, rate, memory_length, compressed_length, state, hidden, compressed):
    """A case of update_memory; ``state`` and ``hidden`` are shapes."""

    def case(randn):
        lengths = dict(memory_length=memory_length, compressed_length=compressed_length)
        return dict(state=randn(*state), hidden=randn(*hidden), compressed=compressed, rate=rate, mode=mode, **lengths)

    return case


def given(case, rows):
    """The same case with rows that were compressed beforehand."""

    def with_fresh(randn):
        inputs = case(randn)
        batch, _, width = inputs["state"].shape
        return {**inputs, "fresh": randn(batch, rows, width)}

    return with_fresh


FULL = dict(rate=4, memory_length=16, compressed_length=8, state=(3, 24, 63), hidden=(3, 8, 63), compressed=8)


class TestUpdateMemory(OpChecks):
    ops = ("memory_update",)
    call = staticmethod(lambda **inputs: par_xl.update_memory(**inputs)[0])
    cases = {
        "max": updated("max", **FULL),
        "mean": updated("mean", **FULL),
        "given": given(updated("mean", **FULL), 2),
        "wide": updated("mean", 4, 12, 6, (2, 18, 1024), (2, 8, 1024), 6),
        "empty-start": updated("max", 2, 6, 4, (2, 0, 8), (2, 4, 8), 0),
        "growing": updated("mean", 2, 6, 4, (2, 5, 8), (2, 5, 8), 1),
        "segment-longer-than-memory": updated("max", 2, 3, 4, (2, 5, 8), (2, 9, 8), 2),
        "more-fresh-than-kept": updated("mean", 2, 3, 2, (2, 5, 8), (2, 12, 8), 2),
        "short-segment": updated("max", 4, 8, 4, (2, 12, 8), (2, 7, 8), 4),
        "shorter-than-rate": updated("mean", 4, 8, 4, (2, 12, 8), (2, 3, 8), 4),
        "no-memory": updated("mean", 2, 0, 4, (2, 4, 8), (2, 4, 8), 4),
        "no-compressed": updated("max", 2, 6, 0, (2, 6, 8), (2, 4, 8), 0),
        "empty-segment": updated("mean", 2, 6, 4, (2, 8, 8), (2, 0, 8), 2),
        "empty-batch": updated("mean", 2, 6, 4, (0, 10, 8), (0, 2, 8), 4),
    }
    gradcheck_cases = {
        "max": updated("max", 2, 4, 2, (1, 6, 2), (1, 4, 2), 2),
        "mean": updated("mean", 2, 4, 2, (1, 6, 2), (1, 2, 2), 2),
        "given": given(updated("mean", 2, 4, 2, (1, 6, 2), (1, 2, 2), 2), 1),
        "segment-longer-than-memory": updated("mean", 2, 3, 4, (1, 5, 1), (1, 8, 1), 2),
        "short-segment": updated("max", 2, 4, 2, (1, 6, 1), (1, 3, 1), 2),
    }
    bad_input = {
        "rank": (dict(hidden=torch.zeros(3, 4)), ValueError, "hidden must have 3 dimensions"),
        "integers": (dict(state=torch.zeros(3, 24, 63).long()), TypeError, "state must be floating point"),
        "shape": (dict(hidden=torch.zeros(3, 8, 62)), ValueError, "hidden must have the batch and width of state"),
        "dtype": (dict(hidden=torch.zeros(3, 8, 63).half()), TypeError, "hidden must have the dtype of state"),
        "device": (dict(hidden=torch.zeros(3, 8, 63, device="meta")), ValueError, "hidden must be on"),
        "compressed": (dict(compressed=9), ValueError, "compressed must lie between 0 and 8"),
        "memory": (dict(memory_length=15), ValueError, "memory_length must be at least the 16 memory rows"),
        "rate": (dict(rate=0), ValueError, "rate must be a positive integer"),
        "mode": (dict(mode="conv"), ValueError, 'mode must be "mean" or "max"'),
        "negative": (dict(compressed_length=-1), ValueError, "compressed_length must not be negative, not -1"),
        "fresh": (dict(fresh=torch.zeros(3, 3, 63)), ValueError, "fresh must have shape (3, 2, 63), not (3, 3, 63)"),
        "fresh dtype": (dict(fresh=torch.zeros(3, 2, 63).half()), TypeError, "fresh must have the dtype of state"),
        "fresh device": (dict(fresh=torch.zeros(3, 2, 63, device="meta")), ValueError, "fresh must be on"),
    }

    def test_second_derivative_is_an_error(self, backend, device):
        """As for compress: a linear map."""
        inputs = self.first_case(torch.float32, device)
        output = self.on(backend)(**inputs)
        (first,) = torch.autograd.grad(output.square().sum(), inputs["state"], create_graph=True)
        with pytest.raises(RuntimeError, match="no second derivative"):
            first.sum().backward()

    def test_the_mean_keeps_nothing_for_the_backward(self, backend, device):
        inputs = make_inputs(self.cases["mean"], torch.float32, device)
        out = self.on(backend)(**inputs)
        assert out.grad_fn.saved_tensors == ()
        wanted = torch.autograd.grad(self.on("eager")(**inputs).sum(), leaves(inputs))
        with torch.no_grad():
            inputs["hidden"].mul_(2)
        torch.testing.assert_close(torch.autograd.grad(out.sum(), leaves(inputs)), wanted)

    @pytest.mark.gpu
    def test_no_synchronisation_and_cuda_graph(self, backend):
        inputs = self.first_case(torch.float32, "cuda")
        assert_capturable(lambda: [self.on(backend)(**inputs).detach()])


def test_update_is_the_published_expression():
    """arXiv 1911.05507, algorithm 1, with full memories."""
    compressed, memory, hidden = torch.randn(2, 6, 8), torch.randn(2, 12, 8), torch.randn(2, 4, 8)
    fresh = F.avg_pool1d(memory[:, :4].transpose(1, 2), 2).transpose(1, 2)
    expected = torch.cat([compressed[:, 2:], fresh, memory[:, 4:], hidden], 1)
    state = torch.cat([compressed, memory], 1)
    got, n = par_xl.update_memory(state, hidden, 6, memory_length=12, compressed_length=6, rate=2)
    torch.testing.assert_close(got, expected)
    assert n == 6


def launches():
    """What the machine-code tests compile: every kernel and mode, in two storage types."""
    from par_xl.kernels import compression

    for dtype in (torch.bfloat16, torch.float32):
        memory, compressed = torch.empty(2, 64, 1024, dtype=dtype), torch.empty(2, 16, 1024, dtype=dtype)
        modes = dict(
            mean=torch.empty(0), max=torch.empty(2, 16, 1024, dtype=torch.uint8), most_used=torch.empty(2, 64).int()
        )
        for mode, choice in modes.items():
            compression.forward(memory, torch.empty(2, 64), 4, mode, compressed, choice)
            compression.backward(compressed, choice, 4, mode, memory)
        sizes = 32, 64, 64, 32, 64, 16
        state, out = torch.empty(2, 2, 96, 1024, dtype=dtype).unbind()
        for mode, fresh in (("mean", None), ("max", None), ("given", compressed)):
            compression.update(state, memory, fresh, out, sizes, 4, mode)


def test_triton_machine_code():
    """No spills; rows are read in 16-byte loads and written in 16-byte stores."""
    compiled = compile_launches("test_compression:launches")
    kernels = {"_pool", "_unpool", "_select", "_keep", "_update"}
    assert {(one.kernel, one.capability) for one in compiled} == {(k, c) for k in kernels for c in (80, 90, 100)}
    for one in compiled:
        assert one.stack == 0, one.kernel
        if one.kernel != "_select":
            assert "LDG.E.128" in one.sass and "STG.E.128" in one.sass, one.kernel


WIDEST = {"6__half": 8, "13__nv_bfloat16": 8, "If": 4, "Id": 2}  # mangled storage type: elements in 16 bytes


@pytest.mark.skipif(not has_cuda_kernels(), reason="the extension was built without CUDA kernels")
def test_cuda_machine_code():
    """No spills; the 16-byte kernels (vector width 8, 4 or 2) load and store 16 bytes at a time."""
    compiled = cuda_kernels("compression")
    wide = [one for one in compiled if any(f"{t}Li{n}E" in one.kernel for t, n in WIDEST.items())]
    assert len(wide) == len({one.capability for one in compiled}) * 4 * 2 * len(WIDEST)
    for one in compiled:
        assert one.stack == 0, one.kernel
    for one in wide:
        assert "LDG.E.128" in one.sass and "STG.E.128" in one.sass, one.kernel
