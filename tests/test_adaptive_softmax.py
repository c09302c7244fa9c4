"""adaptive_nll: the shared checks, the traps of the published implementations, memory, and the Triton machine code."""

import pytest
import torch
import torch.nn.functional as F

import par_xl
from par_xl.ops.adaptive_targets import bad_target
from par_xl.testing import OpChecks, assert_capturable, leaves, make_inputs, peak_memory, promoted, run

V, CUTOFFS = 97, [30, 50]


def targets(tokens, spread):
    """Targets over all classes ("uniform", "zipf"), all in one "tail" or in the "head", or all "ignored"."""
    generator = torch.Generator().manual_seed(1)
    if spread == "zipf":
        return torch.multinomial(1 / torch.arange(1.0, V + 1), tokens, replacement=True, generator=generator)
    if spread == "ignored":
        return torch.full((tokens,), -100)
    low, high = {"head": (0, 30), "tail": (30, 50), "uniform": (0, V)}[spread]
    return torch.randint(low, high, (tokens,), generator=generator)


def torch_layout(tokens, d=24, spread="uniform", bias=True, **options):
    """torch's module: the head's table holds the tails' columns, and the tails have projections."""

    def case(randn):
        sizes, widths = [32, 20, 47], [d, d // 2, d // 4]
        return dict(
            input=randn(tokens, d), target=targets(tokens, spread), cutoffs=CUTOFFS,
            weights=[randn(n, w) for n, w in zip(sizes, widths, strict=True)],
            biases=[randn(n) for n in sizes] if bias else None,
            projections=[None, *(randn(w, d) for w in widths[1:])], **options,
        )  # fmt: skip

    return case


def one_table(tokens, d=20, spread="zipf", projected=False, **options):
    """Transformer-XL with div_val 1, and awd-lstm: a table for all the classes, the tails' columns apart."""

    def case(randn):
        return dict(
            input=randn(tokens, d), target=targets(tokens, spread), cutoffs=CUTOFFS, weights=[randn(V, d)],
            biases=[randn(V)], cluster_weight=randn(2, d), cluster_bias=randn(2), order="descending",
            projections=[randn(d, d) for _ in range(3)] if projected else None, **options,
        )  # fmt: skip

    return case


def tiny(reduction="none", tails=2, spread=(0, 3, 5, 2), **options):
    def case(randn):
        y = torch.tensor(spread)
        if tails == 0:
            return dict(input=randn(4, 2), target=y, cutoffs=[], weights=[randn(6, 2)], reduction=reduction)
        return dict(
            input=randn(4, 2), target=y, cutoffs=[3, 4], weights=[randn(5, 2), randn(1, 2), randn(2, 1)],
            biases=[None, None, randn(2)], projections=[None, None, randn(1, 2)], reduction=reduction, **options,
        )  # fmt: skip

    return case


class TestAdaptiveNLL(OpChecks):
    ops = ("adaptive_nll_forward", "adaptive_nll_backward")
    call = staticmethod(par_xl.adaptive_nll)
    cases = {
        "uniform": torch_layout(21),
        "zipf-mean": torch_layout(65, spread="zipf", reduction="mean", bias=False),
        "one-tail": torch_layout(37, spread="tail", reduction="mean"),
        "head-alone": torch_layout(9, spread="head", reduction="sum"),
        "one-table": one_table(15, projected=True, label_smoothing=0.1, z_loss=1e-2),
        "one-table-mean": one_table(33, reduction="mean", ignore_index=0),
        "blocks": torch_layout(40, reduction="mean", label_smoothing=0.2, z_loss=1e-3, workspace=2000),
        "no-workspace": one_table(20, reduction="sum", workspace=0),
        "one-token": torch_layout(1),
        "no-token": torch_layout(0, reduction="mean"),
        "all-ignored": torch_layout(5, spread="ignored", reduction="mean"),
    }
    gradcheck_cases = {
        "none": tiny(workspace=0),
        "mean": tiny("mean", label_smoothing=0.1, z_loss=0.05, ignore_index=5, spread=(0, 3, 4, 5)),
        "no-cutoffs": tiny("mean", tails=0),
    }
    bad_input = {
        "target shape": (dict(target=torch.zeros(3).long()), ValueError, "target must have the shape of input without"),
        "target dtype": (dict(target=torch.zeros(21)), TypeError, "target must be int32 or int64"),
        "integers": (dict(input=torch.zeros(21, 24).long()), TypeError, "input must be floating point"),
        "unsorted": (dict(cutoffs=[50, 30]), ValueError, "cutoffs must be increasing and between 1 and"),
        "duplicates": (dict(cutoffs=[30, 30]), ValueError, "cutoffs must be increasing and between 1 and"),
        "cutoff is 0": (dict(cutoffs=[0, 30]), ValueError, "cutoffs must be increasing and between 1 and"),
        "too few cutoffs": (dict(cutoffs=[30]), ValueError, "weights must hold 1 or 2 tensors for 1 cutoffs, not 3"),
        "weight shape": (dict(cutoffs=[31, 50]), ValueError, "weights[0] must have shape (33, 24), not (32, 24)"),
        "no projection": (dict(projections=None), ValueError, "projections[1] must be given"),
        "biases": (dict(biases=[None]), ValueError, "biases must hold 3 tensors"),
        "dtype": (dict(input=torch.zeros(21, 24).half()), TypeError, "must have the dtype of input"),
        "device": (dict(biases=[torch.zeros(32, device="meta")] + [None] * 2), ValueError, "biases[0] must be on"),
        "order": (dict(order="reversed"), ValueError, 'order must be "ascending" or "descending"'),
        "reduction": (dict(reduction="sums"), ValueError, 'reduction must be "none", "sum" or "mean"'),
        "smoothing": (dict(label_smoothing=1.5), ValueError, "label_smoothing must be between 0 and 1"),
        "cutoff type": (dict(cutoffs=[30, 50.0]), TypeError, "cutoffs[1] must be an integer, not 50.0"),
        "lone bias": (dict(cluster_bias=torch.zeros(2)), ValueError, "cluster_bias must be None without"),
        "no weight": (dict(weights=[None] * 3), TypeError, "weights[0] must be a tensor, not None"),
        "weight rank": (dict(weights=[torch.zeros(24)] * 3), ValueError, "weights[0] must have shape (32, 24), not"),
        "ignored": (dict(ignore_index=None), TypeError, "ignore_index must be an integer, not None"),
        "workspace type": (dict(workspace=1e6), TypeError, "workspace must be an integer, not 1000000.0"),
        "workspace": (dict(workspace=-1), ValueError, "workspace must be a number of bytes, 0 or more, not -1"),
    }  # fmt: skip

    @pytest.mark.parametrize("outside", [V, -1, -99])
    def test_target_outside(self, outside, backend, device):
        """An error on the CPU; on a GPU NaN for that token alone, and the error with the next call."""
        inputs = self.first_case(torch.float32, device)
        good = par_xl.adaptive_nll(**inputs, backend=backend)
        inputs["target"] = inputs["target"].clone()
        inputs["target"][7] = outside
        with pytest.raises(ValueError, match=f"target must lie between 0 and 96 or be .*, not {outside}"):
            nll = par_xl.adaptive_nll(**inputs, backend=backend)
            assert nll[7].isnan() and torch.equal(nll[:7], good[:7]) and torch.equal(nll[8:], good[8:])
            torch.cuda.synchronize()
            par_xl.adaptive_nll(**inputs, backend=backend)

    @pytest.mark.gpu
    @pytest.mark.parametrize("compiled", [False, True])
    def test_bad_target_is_found_by_the_backward(self, compiled, backend):
        inputs = make_inputs(torch_layout(21, reduction="mean"), torch.float32, "cuda")
        inputs["target"][3] = 5 * V
        call = torch.compile(self.on(backend)) if compiled else self.on(backend)
        loss = call(**inputs)
        torch.cuda.synchronize()
        with pytest.raises(ValueError, match=f"between 0 and 96 or be .*, not {5 * V}"):
            loss.backward()
            par_xl.adaptive_nll(**inputs, backend=backend)  # where a compiled backward does not look

    @pytest.mark.gpu
    def test_bad_target_of_a_replayed_graph(self, backend):
        inputs = make_inputs(torch_layout(21), torch.float32, "cuda")
        self.on(backend)(**inputs)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            nll = self.on(backend)(**inputs)
        inputs["target"][3] = -7
        graph.replay()
        torch.cuda.synchronize()
        assert nll.isnan().nonzero().flatten().tolist() == [3]
        with pytest.raises(ValueError, match="not -7"):
            self.on(backend)(**inputs)

    @pytest.mark.parametrize("ignore_index", [-100, 3, 40, 1000])
    def test_ignore_index(self, ignore_index, backend, device):
        """Anywhere, inside the vocabulary too: what is left is as if the ignored tokens were not there."""
        inputs = {**self.first_case(torch.float32, device), "ignore_index": ignore_index, "reduction": "mean"}
        inputs["target"] = torch.where(
            torch.arange(21, device=device) % 3 == 0, ignore_index, inputs["target"] % 60 + 4
        )
        kept = inputs["target"] != ignore_index
        fewer = {**inputs, "input": inputs["input"][kept], "target": inputs["target"][kept]}
        for got, wanted in zip(run(self.on(backend), inputs), run(self.on("eager"), fewer), strict=True):
            for x, y in zip(got[1:], wanted[1:], strict=True):
                torch.testing.assert_close(x, y)
        nll = par_xl.adaptive_nll(**{**inputs, "reduction": "none"}, backend=backend)
        assert (nll[~kept] == 0).all() and (nll[kept] > 0).all()
        (d_input,) = torch.autograd.grad(nll.sum(), inputs["input"])
        assert (d_input[~kept] == 0).all()

    @pytest.mark.parametrize("workspace", [None, 0])
    def test_tables_stored_by_columns(self, workspace, backend, device):
        inputs = make_inputs(torch_layout(21, bias=False, workspace=workspace), torch.float32, device)
        turned = lambda t: t.detach().t().contiguous().t().requires_grad_()  # noqa: E731
        inputs.update(input=turned(inputs["input"]), weights=[turned(w) for w in inputs["weights"]])
        got, wanted = (
            torch.autograd.grad(self.on(b)(**inputs).sum(), [inputs["input"], *inputs["weights"]])
            for b in (backend, "eager")
        )
        for x, y in zip(got, wanted, strict=True):
            torch.testing.assert_close(x, y)

    def test_empty_tails_have_zero_gradients(self, backend, device):
        """Not None, which DDP waits for in vain (fairseq refuses it for that)."""
        inputs = make_inputs(torch_layout(9, spread="head", reduction="mean"), torch.float32, device)
        par_xl.adaptive_nll(**inputs, backend=backend).backward()
        assert all(
            (t.grad == 0).all() for t in (*inputs["weights"][1:], *inputs["projections"][1:], *inputs["biases"][1:])
        )
        assert (inputs["weights"][0].grad != 0).any()

    @pytest.mark.parametrize("spread, tokens", [("ignored", 4), ("uniform", 0)])
    def test_mean_over_nothing_is_zero(self, spread, tokens, backend, device):
        inputs = make_inputs(torch_layout(tokens, spread=spread, reduction="mean"), torch.float32, device)
        loss = par_xl.adaptive_nll(**inputs, backend=backend)
        loss.backward()
        assert loss.item() == 0 and all((t.grad == 0).all() for t in leaves(inputs))

    def test_columns_ascending_and_descending(self, backend, device):
        """Turning the tails' columns round and changing the order is no change."""
        inputs = make_inputs(one_table(40), torch.float32, device)
        turned = {**inputs, "order": "ascending", "cluster_weight": inputs["cluster_weight"].flip(0),
                  "cluster_bias": inputs["cluster_bias"].flip(0)}  # fmt: skip
        a, b = (par_xl.adaptive_nll(**x, backend=backend) for x in (inputs, turned))
        torch.testing.assert_close(a, b)
        wrong = par_xl.adaptive_nll(**{**inputs, "order": "ascending"}, backend=backend)
        assert not torch.allclose(a, wrong)

    def test_half_gradients_survive(self, backend, device):
        """With the 1/N of a mean in it, dz would be lost in fp16: p/N is 1e-8 for classes that are never a target."""
        inputs = make_inputs(torch_layout(128, d=16, spread="head", reduction="mean"), torch.float16, device)
        inputs["target"] = 15 + inputs["target"] % 15
        inputs["weights"][0].data.mul_(0.01)
        inputs["biases"][0].data[:15] -= 11
        exact = promoted(inputs, torch.float64)
        gradients = [
            torch.autograd.grad(65536 * par_xl.adaptive_nll(**x, backend=b), [x["input"], x["weights"][0]])
            for x, b in ((inputs, backend), (exact, "eager"))
        ]
        (d_input, d_weight), (wanted, wanted_weight) = gradients
        largest = wanted.abs().max().item()
        torch.testing.assert_close(d_input.double(), wanted, rtol=2e-3, atol=2e-3 * largest)
        rare, wanted = d_weight[:15].double(), wanted_weight[:15]
        torch.testing.assert_close(rare, wanted, rtol=0.05, atol=0.05 * wanted.abs().max().item())

    def test_only_the_wanted_gradients(self, backend, device):
        full = self.first_case(torch.float32, device)
        gradients = dict(zip(map(id, leaves(full)), run(self.on(backend), full)[1], strict=True))
        for wanted in leaves(full):
            others = [t for t in leaves(full) if t is not wanted]
            for t in others:
                t.requires_grad_(False)
            (alone,) = run(self.on(backend), full)[1]
            torch.testing.assert_close(alone, gradients[id(wanted)])
            for t in others:
                t.requires_grad_(True)

    def test_second_backward(self, backend, device):
        """The gradients that came with the loss are given away once; retain_graph makes them again."""
        inputs = make_inputs(torch_layout(30, reduction="mean"), torch.float32, device)
        loss, variables = par_xl.adaptive_nll(**inputs, backend=backend), leaves(inputs)
        first = torch.autograd.grad(3 * loss, variables, retain_graph=True)
        kept = [g.clone() for g in first]
        for g in first:
            g.zero_()
        for again, x in zip(torch.autograd.grad(3 * loss, variables), kept, strict=True):
            torch.testing.assert_close(again, x)

    def test_shared_tables(self, backend, device):
        """A table that is an embedding too: autograd adds the gradients, and none is written in place."""
        inputs = make_inputs(one_table(25, reduction="mean"), torch.float32, device)
        table = inputs["weights"][0]
        loss = par_xl.adaptive_nll(**{**inputs, "input": F.embedding(inputs["target"], table)}, backend=backend)
        (got,) = torch.autograd.grad(loss, table)
        loss = par_xl.adaptive_nll(**{**inputs, "input": F.embedding(inputs["target"], table)}, backend="eager")
        torch.testing.assert_close(got, torch.autograd.grad(loss, table)[0])

    def test_bias_gradient_of_rare_classes(self, backend, device):
        """dz is about the same in every row: sums in one chain of fp32 would round each addition alike."""
        n = 3000
        x, y = torch.ones(n, 1, device=device), torch.arange(n, device=device) % 3
        inputs = dict(input=x, target=y, cutoffs=[], weights=[torch.zeros(40, 1, device=device)], reduction="mean")
        bias, gradients = torch.linspace(0, -3, 40, device=device), []
        for dtype, chosen in ((torch.float32, backend), (torch.float64, "eager")):
            one = promoted({**inputs, "biases": [bias.requires_grad_()]}, dtype)
            loss = par_xl.adaptive_nll(**one, workspace=0, backend=chosen)
            gradients.append(torch.autograd.grad(loss, one["biases"])[0])
        torch.testing.assert_close(gradients[0].double(), gradients[1], rtol=1e-6, atol=0)

    def test_int32_targets_and_any_shape(self, backend, device):
        inputs = self.first_case(torch.float32, device)
        wanted = par_xl.adaptive_nll(**inputs, backend=backend)
        other = {**inputs, "input": inputs["input"].view(3, 7, 24), "target": inputs["target"].view(3, 7).int()}
        assert torch.equal(par_xl.adaptive_nll(**other, backend=backend), wanted.view(3, 7))
        one = {**inputs, "input": inputs["input"][0], "target": inputs["target"][0]}
        torch.testing.assert_close(par_xl.adaptive_nll(**one, backend=backend), wanted[0])

    def test_half_input_under_autocast(self, backend, device):
        """What a layer before it leaves under AMP, against fp32 tables (torch's module raises)."""
        inputs = self.first_case(torch.float32, device)
        wanted = par_xl.adaptive_nll(**inputs, backend=backend)
        with torch.autocast(device, torch.bfloat16):
            for dtype in (torch.float32, torch.bfloat16):
                half = {**inputs, "input": inputs["input"].to(dtype)}
                nll = par_xl.adaptive_nll(**half, backend=backend)
                assert nll.dtype == torch.float32
                torch.testing.assert_close(nll, wanted, rtol=0.05, atol=0.2)

    @pytest.mark.gpu
    def test_no_synchronisation_and_cuda_graph(self, backend):
        inputs = make_inputs(torch_layout(512, reduction="mean"), torch.bfloat16, "cuda")
        assert_capturable(lambda: run(self.on(backend), inputs)[1])


@pytest.mark.skipif(torch.cuda.is_available(), reason="this runs in the interpreter, on the CPU")
def test_a_bad_target_is_reported_late(monkeypatch):
    """A GPU's course of a bad target, in the interpreter: NaN for its token, then one error, then none."""
    monkeypatch.setattr("par_xl.ops.adaptive_softmax.check_targets", lambda *_: None)
    inputs = make_inputs(torch_layout(1100), torch.float32, "cpu")
    bad_target.cache_clear()
    with torch.inference_mode():  # as in Lightning's check before a training
        good = par_xl.adaptive_nll(**inputs, backend="triton").clone()
    inputs["target"][[9, 1050]] = torch.tensor([-1, V])
    nll = par_xl.adaptive_nll(**inputs, backend="triton")
    bad = nll.isnan()
    assert bad.nonzero().flatten().tolist() == [9, 1050] and torch.equal(nll[~bad], good[~bad])
    other = make_inputs(torch_layout(5, ignore_index=3), torch.float32, "cpu")
    par_xl.adaptive_nll(**other, backend="triton")  # other targets are allowed there
    inputs["target"].clamp_(0, V - 1)
    with pytest.raises(ValueError, match=f"between 0 and 96 or be ignore_index -100, not {V}"):
        par_xl.adaptive_nll(**inputs, backend="triton")
    par_xl.adaptive_nll(**inputs, backend="triton")


@pytest.mark.parametrize("spread", ["uniform", "zipf", "tail"])
@pytest.mark.parametrize("bias", [False, True])
def test_equals_torch(spread, bias):
    """torch's module on the same weights, in fp64."""
    module = torch.nn.AdaptiveLogSoftmaxWithLoss(24, V, CUTOFFS, div_value=2.0, head_bias=bias).double()
    x, y = torch.randn(70, 24, dtype=torch.float64), targets(70, spread)
    arguments = dict(
        weights=[module.head.weight, *(t[1].weight for t in module.tail)], cutoffs=CUTOFFS,
        biases=[module.head.bias, None, None], projections=[None, *(t[0].weight for t in module.tail)],
    )  # fmt: skip
    wanted = module(x, y)
    torch.testing.assert_close(par_xl.adaptive_nll(x, y, **arguments), -wanted.output)
    loss = par_xl.adaptive_nll(x, y, **arguments, reduction="mean")
    got = torch.autograd.grad(loss, list(module.parameters()))
    expected = torch.autograd.grad(wanted.loss, list(module.parameters()), allow_unused=True)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b)


def test_without_cutoffs_it_is_cross_entropy():
    x, w, b, y = torch.randn(20, 8), torch.randn(50, 8), torch.randn(50), torch.randint(0, 50, (20,))
    y[3] = -100
    wanted = F.cross_entropy(F.linear(x, w, b), y, label_smoothing=0.1)
    got = par_xl.adaptive_nll(x, y, [w], [], biases=[b], label_smoothing=0.1, reduction="mean")
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_no_logits_in_memory(reduction, backend, device):
    """Never as much as the smallest softmax's logits of all tokens: the workspace is a fraction of them."""
    n, d, cutoffs, v = 96 if backend == "triton" and device == "cpu" else 2048, 2, [120, 240], 360
    x, y = torch.randn(n, d, device=device, requires_grad=True), torch.randint(0, v, (n,), device=device)
    weights = [torch.randn(size, d, device=device, requires_grad=True) for size in (122, 120, 120)]

    def step():
        nll = par_xl.adaptive_nll(x, y, weights, cutoffs, reduction=reduction, workspace=8192, backend=backend)
        return torch.autograd.grad(nll.sum(), [x, *weights])

    if device == "cuda":
        step()  # what cuBLAS keeps for itself
    assert peak_memory(step, x.device) < n * 120 * x.itemsize


@pytest.mark.parametrize("columns", [33, 64, 1100])
def test_logits_far_from_zero(columns, backend, device):
    """A constant on all logits changes nothing, and lanes of a block without a column have no part in it."""
    x, y = torch.ones(4, 1, device=device), torch.tensor([0, 3, 7, columns - 1], device=device)
    near = torch.randn(columns, 1, device=device)
    wanted = torch.autograd.grad(par_xl.adaptive_nll(x, y, [near.requires_grad_()], []).mean(), near)[0]
    for constant in (-200.0, 200.0):
        far = (near.detach() + constant).requires_grad_()
        for reduction in ("mean", "none"):
            loss = par_xl.adaptive_nll(x, y, [far], [], reduction=reduction, backend=backend).mean()
            torch.testing.assert_close(torch.autograd.grad(loss, far)[0], wanted, rtol=1e-3, atol=1e-5)


def test_large_logits():
    """Nothing overflows, and no digits are lost to the size of the logits."""
    x, w = torch.tensor([[1.0]]), torch.tensor([[30000.0], [30000.5], [-30000.0]])
    nll = par_xl.adaptive_nll(x, torch.tensor([0]), [w], [])
    torch.testing.assert_close(nll, torch.tensor([0.5 + torch.tensor(1 + torch.e**-0.5).log()]))
