"""The attention that each key receives: the weights' column sums, which are the gradient of the values."""

from functools import partial

import pytest
import torch
from test_rel_attention import attention, lengths

import par_xl
from par_xl.machine_code import compile_launches
from par_xl.ops.rel_attention_inputs import UNLIMITED
from par_xl.ops.rel_attention_received import RECEIVED
from par_xl.testing import OpChecks, largest_error, make_inputs, peak_memory, promoted

CASES = {
    "memory": attention(2, 1, 65, 65, 20, 32),
    "clamp": attention(1, 1, 70, 70, 90, 16, clamp_len=21),
    "window": attention(1, 1, 90, 90, None, 8, causal=False, window=(7, 3)),
    "bidirectional": attention(1, 2, 37, 37, None, 41, causal=False),
    "lengths": attention(3, 2, 20, 20, 9, 16, key_lengths=lengths(20, 0, 7)),
    "decoding": attention(3, 2, 1, 1, 66, 64),
    "more-queries": attention(2, 2, 50, 9, 3, 16, spare=2),
    "no-query": attention(2, 2, 0, 5, 4, 8),
    "no-key": attention(2, 2, 4, 0, 0, 8),
    "empty-batch": attention(0, 2, 4, 4, 4, 8),
}


def column_sums(inputs):
    """(B, H, K), by autograd through the eager reference."""
    values = [*(x for x in inputs.get("memory", ())[1:]), inputs["v"]]
    out = par_xl.rel_attention(**inputs, backend="eager")
    gradients = torch.autograd.grad(out, values, torch.ones_like(out))
    return torch.cat([x[..., 0] for x in gradients], 2)


class TestReceived(OpChecks):
    ops = ("rel_attention_received",)
    call = staticmethod(partial(par_xl.rel_attention, return_received=True))
    cases = {"memory": attention(1, 2, 9, 9, 5, 8)}
    gradcheck_cases = {"memory": attention(1, 1, 3, 3, 2, 2)}
    bad_input = {"clamp": (dict(clamp_len=-1), ValueError, "clamp_len must not be negative, not -1")}

    @pytest.mark.parametrize("name", CASES)
    def test_column_sums(self, name, backend, device):
        inputs = make_inputs(CASES[name], torch.float32, device)
        wanted = column_sums(promoted(inputs, torch.float64)).float()
        for dropout_p in (0.0, 0.5):
            out, got = self.on(backend)(**inputs, dropout_p=dropout_p)
            assert got.dtype == torch.float32 and not got.requires_grad and out.requires_grad
            torch.testing.assert_close(got, wanted)

    @pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
    def test_half_precision(self, half, backend, device):
        """A weight is exact to the rounding of the queries with their bias and scale, once."""
        inputs = make_inputs(CASES["memory"], half, device)
        wanted = column_sums(promoted(inputs, torch.float64))
        _, got = self.on(backend)(**inputs)
        assert got.dtype == torch.float32
        assert largest_error(got, wanted) <= 4 * torch.finfo(half).eps * wanted.max().item()


def test_no_matrix_of_queries_times_keys():
    inputs = make_inputs(attention(1, 4, 1024, 1024, 1024, 16), torch.float32, "cpu")
    matrices = 4 * 4 * 1024 * 2048
    with torch.no_grad():
        peak = peak_memory(lambda: par_xl.rel_attention(**inputs, return_received=True), inputs["q"].device)
    assert peak < matrices / 8


@pytest.mark.skipif(torch.cuda.is_available(), reason="this runs in the interpreter, on the CPU")
def test_a_sequence_of_impossible_length_gives_nan():
    """As the forward: on a GPU the host does not look."""
    q, k, r, bias = (torch.randn(*shape) for shape in ((3, 1, 4, 8), (3, 1, 4, 8), (1, 4, 8), (1, 8)))
    limits = UNLIMITED, 0, UNLIMITED, 0.3
    got = RECEIVED(q, k, r, bias, bias, None, lengths(5, 3, -1), torch.zeros(3, 1, 4), *limits, "triton")
    assert got[[0, 2]].isnan().all() and got[1].isfinite().all()


def test_native_on_a_gpu_is_refused_up_front():
    assert "has no CUDA kernels" in RECEIVED.lacks["native"]("cuda", torch.float16)


def launch(width, dtype=torch.bfloat16, clamp_len=UNLIMITED):
    from par_xl.kernels.rel_attention_received import receive

    q, k, k_memory = torch.empty(3, 2, 4, 128, width, dtype=dtype).unbind()
    r, biases = torch.empty(4, 256, width, dtype=dtype), torch.empty(2, 4, width, dtype=dtype)
    lengths, lse = torch.empty(2, dtype=torch.int64), torch.empty(2, 4, 128)
    limits = UNLIMITED, 0, clamp_len, width**-0.5
    receive(q, k, r, *biases.unbind(), k_memory, lengths, lse, *limits, torch.empty(2, 4, 256))


def launches():
    launch(64)
    launch(128)


def launches_others():
    launch(64, clamp_len=30)
    launch(41)
    launch(64, torch.float32)


def test_machine_code():
    """No spills; half-precision products on the tensor cores."""
    products = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}
    compiled = compile_launches("test_rel_attention_received:launches", tuple(products))
    assert {(one.kernel, one.capability) for one in compiled} == {
        (k, c) for k in ("_receive", "_prepare") for c in products
    }
    assert all(products[one.capability] in one.sass for one in compiled if one.kernel == "_receive")
    for one in (*compiled, *compile_launches("test_rel_attention_received:launches_others", (90,))):
        assert one.stack == 0, (one.kernel, one.capability)
