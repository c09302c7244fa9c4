"""dropout: the shared checks, the mask's statistics, and that it equals torch's dropout up to the mask."""

import pytest
import torch
import torch.nn.functional as F

import par_xl
from par_xl.machine_code import compile_launches
from par_xl.ops.dropout import plane
from par_xl.testing import OpChecks, peak_memory

SEED = torch.tensor([0x123456789ABCDEF])


def case(*shape, **options):
    return lambda randn: dict(x=randn(*shape), seed=SEED, **{"p": 0.3, **options})


class TestDropout(OpChecks):
    ops = ("dropout_forward", "dropout_backward")
    call = staticmethod(par_xl.dropout)
    cases = {
        "relu": case(3, 70, 65, relu=True),
        "plain": case(3, 70, 65),
        "one": case(1),
        "63": case(63, p=0.9),
        "500": case(500, relu=True, p=1e-3),
        "empty": case(2, 0, 4),
        "many-blocks": case(9, 1031),
    }
    gradcheck_cases = {"relu": case(3, 30, relu=True), "plain": case(3, 30)}
    bad_input = {
        "p": (dict(p=1.5), ValueError, "p must lie in [0, 1], not 1.5"),
        "seed-shape": (dict(seed=torch.zeros(2, dtype=torch.int64)), ValueError, "seed must have shape (1,), not (2,)"),
        "seed-dtype": (dict(seed=torch.zeros(1)), TypeError, "seed must be int64, not torch.float32"),
        "integers": (dict(x=torch.ones(3, dtype=torch.int64)), TypeError, "x must be floating point, not torch.int64"),
    }

    def test_mask_does_not_depend_on_the_backend_or_on_what_is_dropped(self, backend):
        x = torch.rand(10_000) + 1
        masks = [
            par_xl.dropout(x, relu=relu, seed=SEED, backend=b) != 0
            for b in ("eager", backend)
            for relu in (True, False)
        ]
        assert all(torch.equal(mask, masks[0]) for mask in masks)

    def test_equals_torch_up_to_the_mask(self, backend):
        """Also for what is not a number: torch's ReLU lets a NaN and its gradient pass."""
        x = torch.randn(4, 100)
        x[0, :6] = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0, torch.nan])
        x.requires_grad_()
        for relu in (False, True):
            y = par_xl.dropout(x, 0.25, relu=relu, seed=SEED, backend=backend)
            kept = par_xl.dropout(torch.ones_like(x), 0.25, seed=SEED, backend=backend) != 0
            wanted = torch.where(kept, (F.relu(x) if relu else x) / 0.75, 0.0)
            torch.testing.assert_close(y, wanted, equal_nan=True)
            got, expected = (torch.autograd.grad(out, x, torch.ones_like(x))[0] for out in (y, wanted))
            torch.testing.assert_close(got, expected)

    def test_keeps_no_mask(self):
        """In C++; in Triton's interpreter the kernel's own variables are torch's allocations too."""
        x = torch.randn(1 << 18, requires_grad=True)
        for relu in (False, True):
            peak = peak_memory(lambda relu=relu: par_xl.dropout(x, 0.1, relu=relu, backend="native"), x.device)
            assert peak <= x.nbytes + 1024

    def test_bits_do_not_depend_on_the_threads(self):
        x, threads, seen = torch.randn(200_000), torch.get_num_threads(), []
        for n in (1, 3):
            torch.set_num_threads(n)
            seen.append(par_xl.dropout(x, seed=SEED, backend="native"))
        torch.set_num_threads(threads)
        assert torch.equal(*seen)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.97])
def test_statistics(p):
    """Frequency overall and by word, and independence of neighbours, of words and of calls, within 4.5 sigma."""
    n = 400_000
    first, second = (par_xl.dropout(torch.ones(n), p) != 0 for _ in range(2))

    def near(samples, expected, variance):
        assert abs(samples.double().mean().item() - expected) < 4.5 * (variance / len(samples)) ** 0.5

    q = 1 - p
    near(first, q, p * q)
    for word in first.split(plane(n)):
        near(word, q, p * q)
    both = q * q
    for pair in (first[1:] & first[:-1], first[: n // 2] & first[plane(n) :][: n // 2], first & second):
        near(pair, both, both * (1 - both) * 3)  # neighbouring pairs share an element: at most three times the variance


def test_nothing_is_dropped_when_there_is_nothing_to_drop():
    x = torch.randn(5)
    before = torch.get_rng_state()
    assert par_xl.dropout(x, 0.5, False) is x and par_xl.dropout(x, 0.0) is x
    assert torch.equal(par_xl.dropout(x, 0.5, training=False, relu=True), F.relu(x))
    assert torch.equal(torch.get_rng_state(), before)


def test_everything_may_be_dropped():
    x = torch.randn(3, 4, requires_grad=True)
    y = par_xl.nn.Dropout(1.0)(x)
    assert (y == 0).all() and (torch.autograd.grad(y.sum(), x)[0] == 0).all()


def test_the_mask_follows_torchs_generator():
    x = torch.randn(300)
    for backend in ("eager", "auto"):
        first, other, again = ((torch.manual_seed(seed), par_xl.dropout(x, backend=backend))[1] for seed in (1, 2, 1))
        assert torch.equal(first, again) and not torch.equal(first, other)


def launches():
    from par_xl.kernels import dropout

    for dtype in (torch.bfloat16, torch.float32):
        x, y, grad = torch.empty(3, 4096, 64, dtype=dtype).unbind()
        for relu in (False, True):
            dropout.forward(x, torch.empty(1, dtype=torch.int64), y, plane(x.numel()), 1000, 1.1, relu, 7)
        dropout.relu_backward(grad, y, x, 1.1)


def test_triton_machine_code():
    """No spills, and 16-byte loads and stores."""
    compiled = compile_launches("test_dropout:launches")
    assert {one.kernel for one in compiled} == {"_dropout", "_relu_backward"}
    for one in compiled:
        assert one.stack == 0 and "LDG.E.128" in one.sass and "STG.E.128" in one.sass, one.kernel
