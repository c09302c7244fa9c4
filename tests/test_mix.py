"""The mixture of a stochastic block: the shared checks, mixed precision, and the machine code of the kernels."""

import pytest
import torch
import torch.nn.functional as F

import par_xl
from par_xl.machine_code import compile_launches
from par_xl.testing import OpChecks, assert_capturable, make_inputs, run

NAMES = ("x", "attended", "dense", "weights", "gamma_0", "beta_0", "gamma_1", "beta_1")


def mixed(*shape, **options):
    def case(randn):
        tensors = [*(randn(*shape) for _ in range(3)), randn(3), *(randn(shape[-1]) for _ in range(4))]
        return dict(zip(NAMES, tensors, strict=True), **options)

    return case


class TestMix(OpChecks):
    ops = ("mix_forward", "mix_backward")
    call = staticmethod(par_xl.mix)
    cases = {
        "batch": mixed(3, 17, 63),
        "wide": mixed(2, 9, 1024),
        "many-rows": mixed(5, 65, 40, eps=1e-3),
        "one-row": mixed(1, 1, 500),
        "no-batch": mixed(65),
        "narrow": mixed(4, 6, 5),
        "empty-batch": mixed(0, 4, 8),
    }
    gradcheck_cases = {"batch": mixed(2, 3, 5), "no-batch": mixed(4, eps=0.1), "one-column": mixed(3, 1)}
    bad_input = {
        "rank": (dict(x=torch.tensor(1.0)), ValueError, "x must have at least 1 dimension"),
        "shape": (dict(dense=torch.zeros(3, 17, 62)), ValueError, "dense must have shape (3, 17, 63), not (3, 17, 62)"),
        "weights": (dict(weights=torch.zeros(2)), ValueError, "weights must have shape (3,), not (2,)"),
        "parameters": (dict(beta_1=torch.zeros(62)), ValueError, "beta_1 must have shape (63,), not (62,)"),
        "integers": (dict(attended=torch.zeros(3, 17, 63).int()), TypeError, "attended must be floating point"),
        "device": (dict(gamma_0=torch.zeros(63, device="meta")), ValueError, "gamma_0 must be on"),
    }

    def test_mixed_precision(self, backend, device):
        """Autocast: half-precision branches of an fp32 stream, whose result and gradients keep their dtypes."""
        inputs = make_inputs(mixed(3, 17, 64), torch.float32, device)
        half = {n: inputs[n].detach().half().requires_grad_() for n in ("attended", "dense")}
        got = run(self.on(backend), {**inputs, **half})
        exact = run(self.on("eager"), {**inputs, **{n: x.detach().float().requires_grad_() for n, x in half.items()}})
        assert [x.dtype for x in got[1][:3]] == [torch.float32, torch.float16, torch.float16]
        for x, y in zip([*got[0], *got[1]], [*exact[0], *exact[1]], strict=True):
            torch.testing.assert_close(x.float(), y, rtol=2e-3 if x.dtype == torch.float16 else 1e-5, atol=1e-4)

    def test_number_of_threads_does_not_change_the_bits(self):
        inputs = make_inputs(mixed(9, 70, 300), torch.float32, "cpu")
        threads, results = torch.get_num_threads(), []
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(run(self.on("native"), inputs))
        torch.set_num_threads(threads)
        for other in results[1:]:
            self._equal(other, results[0])

    def test_rows_far_from_zero(self, backend, device):
        """Variances are of the centred values, not differences of large squares."""
        inputs = make_inputs(mixed(4, 256), torch.float32, device)
        shifted = {**inputs, "x": (inputs["x"].detach() + 1000).requires_grad_()}
        exact = self.on("eager")(**{n: x.detach().double() for n, x in shifted.items()})
        torch.testing.assert_close(self.on(backend)(**shifted).double(), exact, rtol=1e-5, atol=1e-3)

    @pytest.mark.gpu
    def test_no_synchronisation_and_cuda_graph(self, backend):
        inputs = make_inputs(mixed(8, 70, 256), torch.float32, "cuda")
        tensors = list(inputs.values())
        assert_capturable(lambda: list(torch.autograd.grad(self.on(backend)(**inputs).sum(), tensors)))


def test_formula():
    """The published block, on modules of torch."""
    x, attended, dense = torch.randn(3, 2, 5, 8).unbind()
    first, second = torch.nn.LayerNorm(8), torch.nn.LayerNorm(8)
    for norm in (first, second):
        torch.nn.init.normal_(norm.weight)
        torch.nn.init.normal_(norm.bias)
    w = torch.tensor([0.5, 0.2, 0.3])
    expected = w[0] * first(attended + x) + w[1] * second(dense + x) + w[2] * x
    got = par_xl.mix(x, attended, dense, w, first.weight, first.bias, second.weight, second.bias)
    torch.testing.assert_close(got, expected)
    one_hot = par_xl.mix(x, attended, dense, torch.tensor([0.0, 1.0, 0.0]), *[torch.ones(8), torch.zeros(8)] * 2)
    torch.testing.assert_close(one_hot, F.layer_norm(x + dense, (8,)))


def launches():
    """What the machine-code tests compile: every kernel, narrow and wide, in two storage types and mixed."""
    from par_xl.kernels import mix

    half, single = torch.bfloat16, torch.float32
    for dtype, branch, width in ((half, half, 128), (single, single, 1024), (single, half, 1024)):
        x, out, grad, d_x = torch.empty(4, 4096, width, dtype=dtype).unbind()
        attended, dense, d_attended, d_dense = torch.empty(4, 4096, width, dtype=branch).unbind()
        parameters = [torch.empty(3), *(torch.empty(width) for _ in range(4))]
        stats = torch.empty(4096, 4)
        mix.forward(x, attended, dense, *parameters, 1e-5, out, stats)
        results = d_x, d_attended, d_dense, torch.empty(3), torch.empty(4, width)
        mix.backward(grad, x, attended, dense, *parameters, stats, *results)


def test_triton_machine_code():
    """No spills, and rows are read in 16-byte loads and written in 16-byte stores."""
    compiled = compile_launches("test_mix:launches")
    kernels = {"_forward", "_backward", "_finish"}
    assert {(one.kernel, one.capability) for one in compiled} == {(k, c) for k in kernels for c in (80, 90, 100)}
    for one in compiled:
        assert one.stack == 0, one.kernel
        if one.kernel != "_finish":
            assert "LDG.E.128" in one.sass and "STG.E.128" in one.sass, one.kernel
