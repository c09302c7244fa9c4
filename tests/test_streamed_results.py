"""C++ kernels write results from 8 MB on past the caches, whole lines at a time: code that small cases never reach."""

import pytest
import torch

import par_xl
from par_xl.testing import leaves, make_inputs

LINES, ODD = 1024, 1021  # widths whose rows are whole lines of a cache, and begin and end within one


def ar_tar(width):
    weights = dict(alpha=1e6, beta=1e6)  # of means: gradients that fp16 holds
    return lambda randn: dict(output=randn(7, 301, width), raw_output=randn(7, 301, width), **weights)


def compress(mode):
    def of_width(width):
        usage = {"usage": torch.rand(3, 1400)} if mode == "most_used" else {}
        return lambda randn: dict(memory=randn(3, 1400, width), rate=4, mode=mode, **usage)

    return of_width


def update(mode):
    """Odd numbers of rows, of each kind and together: rows are copied by twos."""

    def of_width(width):
        lengths = dict(compressed=301, memory_length=800, compressed_length=303, rate=4, mode=mode)
        return lambda randn: dict(state=randn(3, 1101, width), hidden=randn(3, 23, width), **lengths)

    return of_width


def mix(width):
    norms = ("gamma_0", "beta_0", "gamma_1", "beta_1")
    rows = ("x", "attended", "dense")
    return lambda randn: (
        {name: randn(2101, width) for name in rows} | {name: randn(width) for name in norms} | dict(weights=randn(3))
    )


CASES = {
    "ar_tar": (par_xl.ar_tar_loss, ar_tar),
    "mix": (par_xl.mix, mix),
    **{f"compress-{mode}": (par_xl.compress, compress(mode)) for mode in ("mean", "max", "most_used")},
    **{f"update-{mode}": (lambda **x: par_xl.update_memory(**x)[0], update(mode)) for mode in ("mean", "max")},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("width", [LINES, ODD])
@pytest.mark.parametrize("name", CASES)
def test_like_eager(name, width, dtype):
    op, case = CASES[name]
    inputs = make_inputs(case(2 * width if dtype == torch.float16 else width), dtype, "cpu")
    assert max(x.nbytes for x in leaves(inputs)) > 8 << 20
    outputs = [op(**inputs, backend=backend) for backend in ("native", "eager")]
    grad = torch.randn_like(outputs[0])
    results = ([out, *torch.autograd.grad(out, leaves(inputs), grad)] for out in outputs)
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-4 * wanted.abs().max().item())
