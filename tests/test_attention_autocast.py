"""rel_attention and compressed_attention under torch.autocast do as torch's scaled_dot_product_attention does."""

import pytest
import torch
from torch.utils._pytree import tree_map_only

import par_xl
from par_xl.ops import compressed_attention
from par_xl.testing import leaves, make_inputs

NAMES = ("q", "k", "v", "r", "content_bias", "position_bias")
HALF = torch.bfloat16


def inputs_of(op, dtypes):
    """Leaves, whose dtypes are those of ``dtypes`` in turn."""
    batch, heads, n, width = 2, 2, 5, 8
    turn = iter(dtypes * 12)

    def case(randn):
        shapes = {"r": (heads, 2 * n, width), **dict.fromkeys(NAMES[4:], (heads, width))}
        made = {name: randn(*shapes.get(name, (batch, heads, n, width))) for name in NAMES}
        pairs = ["memory"] if op is par_xl.rel_attention else ["memory", "compressed"]
        made |= {name: tuple(randn(batch, heads, n, width) for _ in range(2)) for name in pairs}
        if op is compressed_attention:
            made |= dict(compressed_r=randn(heads, 2 * n - 1, width), compressed_bias=randn(heads, width))
        return made

    inputs = make_inputs(case, torch.float32, "cpu")
    return tree_map_only(torch.Tensor, lambda x: x.detach().to(next(turn)).requires_grad_(), inputs)


def result(op, inputs, backend):
    out = op(**inputs, backend=backend)
    return out, torch.autograd.grad(out.float().square().sum(), leaves(inputs))


@pytest.fixture(params=[par_xl.rel_attention, compressed_attention], ids=lambda op: op.__name__)
def op(request):
    return request.param


@pytest.mark.parametrize("dtypes", [(torch.float32,), (HALF, torch.float32, torch.float16), (torch.float32, HALF)])
@pytest.mark.parametrize("chosen", ["eager", "native", "triton"])
def test_inputs_are_rounded_and_gradients_have_their_dtypes(op, chosen, dtypes):
    inputs = inputs_of(op, dtypes)
    with torch.autocast("cpu", HALF):
        out = op(**inputs, backend=chosen)
        q, k, v = (inputs[name] for name in NAMES[:3])
        assert out.dtype == torch.nn.functional.scaled_dot_product_attention(q, k, v).dtype == HALF
    gradients = torch.autograd.grad(out.float().square().sum(), leaves(inputs))
    rounded = tree_map_only(torch.Tensor, lambda x: x.detach().to(HALF).requires_grad_(), inputs)
    wanted, wanted_gradients = result(op, rounded, chosen)
    assert torch.equal(out, wanted)
    for x, gradient, expected in zip(leaves(inputs), gradients, wanted_gradients, strict=True):
        assert gradient.dtype == x.dtype and torch.equal(gradient, expected.to(x.dtype))


@pytest.mark.parametrize("chosen", ["eager", "native", "triton"])
def test_fp64_stays(op, chosen):
    inputs = inputs_of(op, (torch.float64,))
    inputs["content_bias"] = inputs["content_bias"].float()  # the one that may always be fp32
    wanted, _ = result(op, inputs, chosen)
    with torch.autocast("cpu", HALF):
        assert torch.equal(op(**inputs, backend=chosen), wanted)
        with pytest.raises(TypeError, match=r"k must have the dtype of q torch.float64, not torch.bfloat16"):
            op(**{**inputs, "k": inputs["k"].float()}, backend=chosen)


def test_mixed_dtypes_without_autocast(op):
    with pytest.raises(TypeError, match=r"k must have the dtype of q torch.float32, not torch.bfloat16"):
        op(**inputs_of(op, (torch.float32, HALF)))


@pytest.mark.parametrize("chosen", ["eager", "native"])
def test_compiled(op, chosen):
    """By a compiler that keeps the roundings; Inductor leaves out those between two operations that it fuses."""
    inputs = inputs_of(op, (torch.float32, HALF))
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", HALF):
        (out, gradients), (wanted, wanted_gradients) = (result(f, inputs, chosen) for f in (compiled, op))
    assert out.dtype == HALF and torch.equal(out, wanted)
    assert [x.dtype for x in gradients] == [x.dtype for x in leaves(inputs)]
    torch.testing.assert_close(gradients, wanted_gradients)
