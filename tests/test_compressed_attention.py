"""Attention in which the compressed steps have position rows of their own, against the maths written out."""

import math

import pytest
import torch

from par_xl.ops.compressed_attention import COMPRESSED, RECENT, compressed_attention, joint_scores
from par_xl.ops.rel_attention import dropout_keep

BACKENDS = ("eager", "native", "triton")


def arguments(batch=2, heads=2, queries=5, memory=4, compressed=3, width=8, dtype=torch.float64):
    def randn(*shape):
        return torch.randn(shape, dtype=dtype, requires_grad=True)

    tokens, old, rest = ((batch, heads, n, width) for n in (queries, compressed, memory))
    inputs = dict(q=randn(*tokens), k=randn(*tokens), v=randn(*tokens), r=randn(heads, memory + queries, width))
    inputs |= dict(content_bias=randn(heads, width), position_bias=randn(heads, width))
    inputs |= dict(compressed=(randn(*old), randn(*old)), compressed_bias=randn(heads, width))
    inputs["compressed_r"] = randn(heads, compressed + queries - 1, width)
    return {**inputs, "memory": (randn(*rest), randn(*rest))} if memory else inputs


def tensors(inputs):
    return [x for value in inputs.values() for x in (value if isinstance(value, tuple) else (value,))]


def written_out(q, k, v, r, content_bias, position_bias, compressed, compressed_bias, compressed_r, memory=None):
    """Element by element: the compressed key c is ``i + C - c`` slots from query i, another key ``i + M - j`` steps."""
    n_compressed, n_memory = compressed[0].shape[2], 0 if memory is None else memory[0].shape[2]
    keys = torch.cat([compressed[0], *([] if memory is None else [memory[0]]), k], 2)
    values = torch.cat([compressed[1], *([] if memory is None else [memory[1]]), v], 2)
    rows = []
    for i in range(q.shape[2]):
        scores = []
        for j in range(n_compressed + n_memory + i + 1):
            if j < n_compressed:
                row, bias = compressed_r[:, compressed_r.shape[1] - (i + n_compressed - j)], compressed_bias
            else:
                row, bias = r[:, r.shape[1] - 1 - (i + n_memory + n_compressed - j)], position_bias
            content = ((q[:, :, i] + content_bias) * keys[:, :, j]).sum(-1)
            scores.append((content + ((q[:, :, i] + bias) * row).sum(-1)) / math.sqrt(q.shape[3]))
        weights = torch.stack(scores, -1).softmax(-1)
        rows.append((weights[..., None] * values[:, :, : weights.shape[2]]).sum(2))
    return torch.stack(rows, 2)


@pytest.mark.parametrize(
    "sizes", [dict(), dict(queries=1), dict(memory=0), dict(compressed=70, queries=65, batch=1, heads=1)]
)
@pytest.mark.parametrize("chosen", BACKENDS)
def test_output_and_gradients(chosen, sizes):
    inputs = arguments(**sizes)
    grad = torch.randn_like(inputs["q"])
    got, wanted = compressed_attention(**inputs, backend=chosen), written_out(**inputs)
    torch.testing.assert_close(got, wanted)
    for name, x, y in zip(
        inputs, *(torch.autograd.grad(out, tensors(inputs), grad) for out in (got, wanted)), strict=False
    ):
        torch.testing.assert_close(x, y, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("chosen", ["native", "triton"])
def test_gradcheck(chosen):
    inputs = arguments(batch=1, queries=3, memory=2, compressed=2, width=4)
    names = [name for name, value in inputs.items() for _ in (value if isinstance(value, tuple) else (value,))]

    def function(*values):
        given = {}
        for name, value in zip(names, values, strict=True):
            given[name] = (*given[name], value) if name in given else (value,)
        plain = {name: value if len(value) == 2 else value[0] for name, value in given.items()}
        return compressed_attention(**plain, backend=chosen)

    assert torch.autograd.gradcheck(function, tensors(inputs), fast_mode=chosen == "triton", nondet_tol=0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("chosen", ["native", "triton"])
def test_precision(chosen, dtype):
    """At most twice the error of the reference in the same dtype, an eps, and that of the log-sum-exps that join the
    parts: an fp32 eps of their size is one of every weight."""
    inputs = arguments(queries=40, memory=30, compressed=30, dtype=dtype)
    exact = {
        name: tuple(x.double() for x in value) if isinstance(value, tuple) else value.double()
        for name, value in inputs.items()
    }
    grad = torch.randn_like(inputs["q"])
    results = [compressed_attention(**inputs, backend=b) for b in (chosen, "eager")]
    gradients = [torch.autograd.grad(x, tensors(inputs), grad) for x in results]
    truth = compressed_attention(**exact, backend="eager")
    parts = [(exact["compressed"][0], exact["compressed_r"], exact["compressed_bias"], COMPRESSED)]
    parts.append((torch.cat([exact["memory"][0], exact["k"]], 2), exact["r"], exact["position_bias"], RECENT))
    lse = joint_scores(exact["q"], exact["content_bias"], parts, 8**-0.5).logsumexp(3).abs().max().item()
    band = 2 * torch.finfo(dtype).eps + lse * torch.finfo(torch.float32).eps
    true_gradients = torch.autograd.grad(truth, tensors(inputs), grad.double())
    for got, eager, true in zip(
        (results[0], *gradients[0]), (results[1], *gradients[1]), (truth, *true_gradients), strict=True
    ):
        error, own = ((x.double() - true.double()).abs().max().item() for x in (got, eager))
        assert error <= 2 * own + band * true.abs().max().item()


@pytest.mark.parametrize("chosen", BACKENDS)
def test_dropout(chosen):
    """The masks are those of the two calls' offsets, the same on every backend."""
    inputs = arguments()
    torch.manual_seed(5)
    got = compressed_attention(**inputs, dropout_p=0.5, backend=chosen)
    torch.manual_seed(5)
    seeds = torch.randint(2**63 - 1, (2,))
    sizes = zip((3, 9), seeds.split(1), strict=True)
    offsets = ((seed, torch.arange(2 * 2 * 5 * n).view(2, 2, 5, n)) for n, seed in sizes)
    keep = torch.cat([dropout_keep(seed, offset, 0.5) for seed, offset in offsets], 3)
    values = torch.cat([inputs["compressed"][1], inputs["memory"][1], inputs["v"]], 2)
    plain = []  # with ones for one key's value, its weights
    for j in range(12):
        one = torch.zeros_like(values)
        one[:, :, j] = 1
        parts = one.split([3, 4, 5], 2)
        given = {**inputs, "compressed": (inputs["compressed"][0], parts[0])}
        given |= {"memory": (inputs["memory"][0], parts[1]), "v": parts[2]}
        plain.append(written_out(**given)[..., 0])
    wanted = (torch.stack(plain, -1) * keep * 2) @ values
    torch.testing.assert_close(got, wanted)
    wanted_gradient = torch.autograd.grad(wanted.sum(), inputs["q"])[0]
    torch.testing.assert_close(torch.autograd.grad(got.sum(), inputs["q"])[0], wanted_gradient)


def test_compiled():
    inputs = arguments(dtype=torch.float32)
    function = torch.compile(lambda **x: compressed_attention(**x, backend="native"), fullgraph=True)
    results = [
        torch.autograd.grad(f(**inputs).square().sum(), tensors(inputs)) for f in (function, compressed_attention)
    ]
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("chosen", BACKENDS)
def test_attention_received(chosen):
    """Of both parts, dropout or not: the column sums of the weights, which the values' gradient is."""
    inputs = arguments()
    one = torch.ones_like(inputs["q"]) / inputs["q"].shape[3]
    values = inputs["compressed"][1], inputs["memory"][1], inputs["v"]
    wanted = torch.cat([x.sum(3) for x in torch.autograd.grad(written_out(**inputs), values, one)], 2)
    out, got = compressed_attention(**inputs, return_received=True, backend=chosen)
    assert out.requires_grad and not got.requires_grad
    torch.testing.assert_close(got, wanted)
    _, got = compressed_attention(**inputs, return_received=True, dropout_p=0.5, backend=chosen)
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize(
    ("replaced", "error", "message"),
    [
        (dict(compressed_r=torch.zeros(2, 8, 8).double()), ValueError, r"compressed_r must have shape \(2, 7, 8\)"),
        (dict(compressed=(torch.zeros(2, 2, 0, 8).double(),) * 2), ValueError, "compressed must hold keys"),
        (dict(compressed=(torch.zeros(2, 2, 3, 8),) * 2), TypeError, r"compressed\[0\] must have the dtype of q"),
        (dict(r=torch.zeros(2, 8, 8).double()), ValueError, "r must have at least 9 positions"),
        (dict(scale=-1.0), ValueError, "scale must not be negative"),
    ],
)
def test_bad_input(replaced, error, message):
    with pytest.raises(error, match=message):
        compressed_attention(**{**arguments(), **replaced})
