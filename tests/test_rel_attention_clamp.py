"""rel_attention with clamped distances: r has a row for each distance up to clamp_len, and farther ones share row 0."""

import pytest
import torch
from test_rel_attention import attention, lengths, seeded

import par_xl
from par_xl.testing import make_inputs, run

# The interpreter's tiles are 64 queries by 64 keys, or 16 by 64; the C++ kernel's blocks are at most 96 queries.
GEOMETRIES = {
    "inside-a-tile": attention(2, 1, 70, 70, 90, 16, clamp_len=40),
    "three-tiles-beyond": attention(1, 1, 130, 130, 200, 8, clamp_len=100),
    "at-the-edge-of-a-tile": attention(1, 2, 64, 64, 128, 8, clamp_len=65),
    "one-before-the-edge": attention(1, 2, 64, 64, 128, 8, clamp_len=66),
    "one-behind-the-edge": attention(1, 2, 64, 64, 128, 8, clamp_len=64),
    "in-the-first-tile": attention(1, 2, 70, 70, 90, 8, clamp_len=158),
    "one-row": attention(1, 2, 70, 70, 30, 8, clamp_len=0),
    "no-memory": attention(1, 2, 130, 130, None, 8, clamp_len=63),
    "decoding": attention(2, 2, 1, 1, 99, 16, clamp_len=13),
    "few-queries": attention(1, 2, 5, 5, 150, 8, clamp_len=20),
    "window": attention(1, 2, 70, 70, 90, 8, clamp_len=40, window=(100, 0)),
    "window-within": attention(1, 2, 70, 70, 90, 8, clamp_len=40, window=(30, 0)),
    "lengths": attention(3, 1, 70, 70, 40, 8, clamp_len=40, key_lengths=lengths(70, 0, 33)),
    "all-real-keys-beyond": attention(2, 1, 70, 70, None, 8, clamp_len=68, key_lengths=lengths(1, 0)),
    "bidirectional": attention(2, 1, 90, 90, 20, 8, clamp_len=16, causal=False),
    "context": attention(1, 2, 90, 90, None, 8, clamp_len=16, causal=False, window=(70, 30)),
    "more-queries": attention(1, 2, 90, 30, 3, 8, clamp_len=4),
    "more-keys": attention(1, 2, 9, 80, 90, 8, clamp_len=100),
    "spare-positions": attention(1, 2, 20, 20, 90, 8, clamp_len=30, spare=7),
    "dropout": attention(1, 2, 70, 70, 90, 8, clamp_len=40, dropout_p=0.3),
}


@pytest.fixture(params=GEOMETRIES)
def inputs(request, device):
    # fp64 where there is a kernel for it: nothing hides in the rounding.
    return make_inputs(GEOMETRIES[request.param], torch.float64 if device == "cpu" else torch.float32, device)


def unclamped(r, clamp_len, **inputs):
    """The same call without a clamp: the row that every distance counts as, taken from ``r`` as often as it takes."""
    n_keys = inputs["k"].shape[2] + (inputs["memory"][0].shape[2] if "memory" in inputs else 0)
    distances = torch.arange(n_keys - 1, n_keys - 1 - (n_keys + inputs["q"].shape[2] - 1), -1, device=r.device)
    rows = min(n_keys - 1, clamp_len) - distances.clamp(max=clamp_len)
    return seeded(r=r[:, rows[rows < r.shape[1]]], **inputs)


def assert_close(got, wanted):
    for group, others in zip(got, wanted, strict=True):
        for x, y in zip(group, others, strict=True):
            torch.testing.assert_close(x, y)


def test_against_equal_rows(inputs, backend):
    """Forward and every gradient; that of row 0 is the sum over the distances that share it."""
    wanted = run(lambda **x: unclamped(**x, backend="eager"), inputs)
    for name in ("eager", backend):
        assert_close(run(lambda name=name, **x: seeded(**x, backend=name), inputs), wanted)


@pytest.mark.parametrize("clamp_len", [69, 70, 2**40])
def test_a_clamp_that_no_distance_reaches_changes_no_bit(clamp_len, backend, device):
    inputs = make_inputs(attention(1, 1, 40, 40, 30, 8), torch.float32, device)
    call = lambda **x: par_xl.rel_attention(**x, backend=backend)  # noqa: E731
    wanted = run(call, inputs)
    for got, want in zip(run(lambda **x: call(**x, clamp_len=clamp_len), inputs), wanted, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))


@pytest.mark.parametrize(
    ("options", "unused"),
    [
        (dict(clamp_len=50, window=(40, 0)), [slice(0, 10), slice(51, None)]),  # row 0 too: the window ends before it
        (dict(clamp_len=20, window=(40, 0)), [slice(21, None)]),
        (dict(clamp_len=20, key_lengths=lengths(3, 1)), [slice(0, 0), slice(21, None)]),
        (dict(clamp_len=38, key_lengths=lengths(0, 0)), [slice(None)]),
    ],
)
def test_unused_positions_do_not_leak(options, unused, backend, device):
    """NaN in rows that no pair uses reaches neither results nor gradients."""
    memory = None if options["clamp_len"] == 38 else 40
    clean = make_inputs(attention(2, 1, 40, 40, memory, 8, spare=5, **options), torch.float32, device)
    dirty = {**clean, "r": clean["r"].detach().clone()}
    for rows in unused:
        dirty["r"][:, rows] = torch.nan
    dirty["r"].requires_grad_()
    for name in ("eager", backend):
        call = lambda name=name, **x: par_xl.rel_attention(**x, backend=name)  # noqa: E731
        for got, wanted in zip(run(call, dirty), run(call, clean), strict=True):
            assert all(torch.equal(x, y) for x, y in zip(got, wanted, strict=True))


def test_keys_ahead_are_not_clamped(backend, device):
    """Of a bidirectional call with clamp_len = 0: distances behind share a row, those ahead have rows of their own."""
    inputs = make_inputs(attention(1, 1, 6, 6, None, 4, causal=False, clamp_len=0), torch.float32, device)
    gradient = torch.autograd.grad(par_xl.rel_attention(**inputs, backend=backend).square().sum(), inputs["r"])[0]
    assert inputs["r"].shape[1] == 6 and (gradient[0] != 0).any(1).all()


@pytest.mark.skipif(torch.cuda.is_available(), reason="only the interpreter's kernels run in Python, to be counted")
def test_tiles_beyond_the_clamp_multiply_and_rotate_nothing(monkeypatch):
    """Of the ten tiles of keys the two that hold nearer ones rotate: forward, both ways in dq, and in dk."""
    from par_xl.kernels import rel_attention, rel_attention_keys, rel_attention_queries

    inputs = make_inputs(attention(1, 1, 64, 64, 576, 8, clamp_len=63), torch.float32, "cpu")
    found = []
    for module in (rel_attention, rel_attention_queries, rel_attention_keys):
        rotate = module.permute_tile
        counted = lambda *x, rotate=rotate, module=module: (found.append(module.__name__), rotate(*x))[1]  # noqa: E731
        monkeypatch.setattr(module, "permute_tile", counted)
    run(lambda **x: par_xl.rel_attention(**x, backend="triton"), inputs)
    counts = {name.split(".")[-1]: found.count(name) for name in found}
    assert counts == {"rel_attention": 2, "rel_attention_queries": 4, "rel_attention_keys": 2}


def test_clamped_calls_compile(backend, device):
    """With sizes and clamp that change from call to call."""
    call = torch.compile(lambda **x: par_xl.rel_attention(**x, backend=backend), fullgraph=True, dynamic=True)
    for case in (attention(1, 2, 9, 9, 20, 8, clamp_len=7), attention(1, 2, 12, 12, 24, 8, clamp_len=11)):
        inputs = make_inputs(case, torch.float32, device)
        assert_close(run(call, inputs), run(lambda **x: par_xl.rel_attention(**x, backend=backend), inputs))
