"""The adaptive softmax modules against torch's and the published Transformer-XL and awd-lstm code, and cutoffs."""

import itertools
import os
import time

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import nn

from par_xl import adaptive_nll
from par_xl.models import AWDLSTMConfig, TransformerXLConfig
from par_xl.nn import AdaptiveLogSoftmaxWithLoss, ProjectedAdaptiveLogSoftmax, SplitSoftmax, adaptive_cutoffs
from par_xl.testing import recorded_ops


def pair(**options):
    theirs = nn.AdaptiveLogSoftmaxWithLoss(16, 60, [10, 25], div_value=2.0, head_bias=True)
    ours = AdaptiveLogSoftmaxWithLoss(16, 60, [10, 25], div_value=2.0, head_bias=True, **options)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def test_is_a_drop_in_for_torch():
    theirs, ours = pair()
    assert list(ours.state_dict()) == list(theirs.state_dict()) and isinstance(ours, nn.AdaptiveLogSoftmaxWithLoss)
    x, y = 3 * torch.randn(40, 16), torch.randint(0, 60, (40,))
    for a, b in zip(ours(x, y), theirs(x, y), strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(ours(x[0], y[0]).output, theirs(x[0], y[0]).output)
    torch.testing.assert_close(ours.log_prob(x), theirs.log_prob(x))
    torch.testing.assert_close(ours.log_prob(x[0]), theirs.log_prob(x[:1])[0])
    assert torch.equal(ours.predict(x), theirs.predict(x))
    torch.testing.assert_close(ours.log_prob(x).exp().sum(1), torch.ones(40))


def test_output_is_differentiable_beside_the_loss():
    theirs, ours = pair()
    x, y = torch.randn(40, 16), torch.randint(0, 60, (40,))
    gradients = []
    for module in (theirs, ours):
        output, loss = module(x, y)
        gradients.append(torch.autograd.grad(output.square().sum() + 3 * loss, list(module.parameters())))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_fullgraph():
    """torch's module does not compile as one graph (pytorch#194765)."""
    _, ours = pair()
    x, y = torch.randn(40, 16), torch.randint(0, 60, (40,))
    compiled = torch.compile(lambda: ours(x, y), fullgraph=True)
    torch.testing.assert_close(compiled(), ours(x, y))
    gradients = (torch.autograd.grad(f().loss, list(ours.parameters())) for f in (compiled, lambda: ours(x, y)))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_options_and_tail_bias():
    options = dict(tail_bias=True, ignore_index=3, reduction="sum", label_smoothing=0.1, z_loss=0.01)
    module = AdaptiveLogSoftmaxWithLoss(16, 60, [10, 25], div_value=2.0, order="descending", **options)
    assert module.tail[0][1].bias.shape == (15,)
    x, y = torch.randn(5, 16), torch.tensor([3, 0, 12, 59, 3])
    output, loss = module(x, y)
    torch.testing.assert_close(-output.sum(), loss)
    assert (output[y == 3] == 0).all()
    eager = AdaptiveLogSoftmaxWithLoss(16, 60, [10, 25], div_value=2.0, order="descending", backend="eager", **options)
    eager.load_state_dict(module.state_dict())
    torch.testing.assert_close(eager(x, y).loss, loss)
    torch.testing.assert_close(module.log_prob(x).exp().sum(1), torch.ones(5))


@pytest.mark.parametrize("k", [1, 4, 11, 30, 60])
@pytest.mark.parametrize("scale", [0.1, 5.0])
def test_topk_is_exact(k, scale):
    """However peaked: also with more classes wanted than the shortlist holds."""
    _, module = pair()
    x = scale * torch.randn(6, 5, 16)
    values, classes = module.topk(x, k)
    wanted = module.log_prob(x)
    torch.testing.assert_close(values, wanted.topk(k).values)
    torch.testing.assert_close(wanted.gather(2, classes), values)


@pytest.mark.parametrize("masked", [[10], [10, 11], [0, 1, 2, 10]])
def test_topk_with_masked_classes(masked):
    """Classes without probability are classes too, each of them once."""
    module = AdaptiveLogSoftmaxWithLoss(16, 60, [10, 25], div_value=2.0, head_bias=True, tail_bias=True)
    with torch.no_grad():
        module.head.bias[masked] = -torch.inf
        module.tail[1][1].bias[:20] = -torch.inf
    x = torch.randn(7, 16)
    for k in (5, 11, 40, 60):
        values, classes = module.topk(x, k)
        assert (classes.sort().values.diff() > 0).all()
        wanted = module.log_prob(x)
        torch.testing.assert_close(values, wanted.topk(k).values)
        torch.testing.assert_close(wanted.gather(1, classes), values)


def test_topk_prunes(monkeypatch):
    """A row enters a tail only where the tail's column beats its k-th best class."""
    from par_xl.nn import adaptive_softmax

    _, module = pair()
    module.head.weight.data[10:] = 0
    module.head.bias.data[10:] = -30
    rows = []
    original = adaptive_softmax._log_softmax
    monkeypatch.setattr(adaptive_softmax, "_log_softmax", lambda x, s: rows.append(len(x)) or original(x, s))
    module.topk(torch.randn(40, 16), 3)
    assert rows[0] == 40 and sum(rows) == 40  # the head alone
    with pytest.raises(ValueError, match="k must lie between 1 and 60, not 61"):
        module.topk(torch.randn(2, 16), 61)


@pytest.mark.parametrize(
    "module", [AdaptiveLogSoftmaxWithLoss, lambda d, v, c, q: ProjectedAdaptiveLogSoftmax(v, d, d, c, q)]
)
def test_no_feature_left(module):
    """torch builds a tail of width 0, which gives every class of it the same probability."""
    with pytest.raises(ValueError, match="leaves tail 2 of 2 no feature: 8 / 4"):
        module(8, 60, [10, 20], 4)
    with pytest.raises(ValueError, match="div_val(ue)? must be positive, not 0"):
        module(8, 60, [10, 20], 0)


@pytest.mark.parametrize("cutoffs", [[20, 10], [60], [-3], [10, 10]])
def test_cutoffs_must_ascend(cutoffs):
    for new in (
        lambda: AdaptiveLogSoftmaxWithLoss(16, 60, cutoffs),
        lambda: ProjectedAdaptiveLogSoftmax(60, 16, 16, cutoffs),
        lambda: AWDLSTMConfig(60, cutoffs=cutoffs),
    ):
        with pytest.raises(ValueError, match="cutoffs must ascend between 0 and the 60 words"):
            new()
    with pytest.raises(ValueError, match="splits must ascend between 0 and the 60 words"):
        SplitSoftmax(16, 60, cutoffs)


@pytest.mark.parametrize("kind", [tuple, np.array, torch.tensor])
def test_cutoffs_of_any_kind(kind):
    cutoffs = kind([10, 25])
    for module in (
        AdaptiveLogSoftmaxWithLoss(16, 60, cutoffs),
        ProjectedAdaptiveLogSoftmax(60, 16, 16, cutoffs),
        SplitSoftmax(16, 60, cutoffs),
    ):
        assert module.cutoffs == [10, 25, 60] and {type(c) for c in module.cutoffs} == {int}
    assert TransformerXLConfig(60, cutoffs=cutoffs).cutoffs == AWDLSTMConfig(60, cutoffs=cutoffs).cutoffs == (10, 25)
    x, y, weights = torch.randn(5, 16), torch.arange(5), [torch.randn(n, 16) for n in (12, 15, 35)]
    assert torch.equal(adaptive_nll(x, y, weights, cutoffs), adaptive_nll(x, y, weights, [10, 25]))


PARAMETER = nn.Parameter(torch.zeros(16, 16))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(reduction="avg"), ValueError, 'reduction must be "none", "sum" or "mean", not \'avg\''),
        (dict(label_smoothing=3), ValueError, "label_smoothing must be between 0 and 1, not 3"),
        (dict(backend="natve"), ValueError, 'backend must be "auto", "eager", "native" or "triton", not \'natve\''),
        (dict(ignore_index=None), TypeError, "ignore_index must be an integer, not None"),
        (dict(projections=[None, PARAMETER]), ValueError, "projections must be None with div_val 1 and d_proj"),
        (dict(div_val=2, projections=[None]), ValueError, "projections must hold 2 parameters or None, not 1"),
        (dict(weights=[None, None]), ValueError, "weights must hold 1 parameters or None, not 2"),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        ProjectedAdaptiveLogSoftmax(60, 16, 16, [10], **options)


def upstream(hidden, target, cutoffs, cluster_weight, cluster_bias, weights, biases, projections):
    """Transformer-XL's proj_adaptive_softmax.py in its own words, by token: column -i of the head is tail i."""
    project = lambda x, p: x if p is None else x @ p  # noqa: E731
    head = F.linear(
        project(hidden, projections[0]), torch.cat([weights[0], cluster_weight]), torch.cat([biases[0], cluster_bias])
    ).log_softmax(1)
    nll = torch.empty(len(target))
    ends = [0, *cutoffs]
    for t, y in enumerate(target.tolist()):
        i = sum(y >= c for c in cutoffs[:-1])
        if i == 0:
            nll[t] = -head[t, y]
        else:
            tail = F.linear(project(hidden[t], projections[i]), weights[i], biases[i]).log_softmax(0)
            nll[t] = -head[t, -i] - tail[y - ends[i]]
    return nll


@pytest.mark.parametrize("div_val, d_proj", [(1, 16), (1, 12), (2, 16)])
def test_equals_transformer_xl(div_val, d_proj):
    module = ProjectedAdaptiveLogSoftmax(60, 16, d_proj, [10, 25, 40], div_val)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    state = module.state_dict()
    single = div_val == 1
    names = {"cluster_weight", "cluster_bias"} | {
        f"out_layers.{i}.{kind}" for i in range(1 if single else 4) for kind in ("weight", "bias")
    }
    assert set(state) == names | (set() if single and d_proj == 16 else {f"out_projs.{i}" for i in range(4)})
    weights = [layer.weight for layer in module.out_layers]
    biases = [layer.bias for layer in module.out_layers]
    if single:
        weights, biases = weights[0].split([10, 15, 15, 20]), biases[0].split([10, 15, 15, 20])
    x, y = torch.randn(3, 8, d_proj), torch.randint(0, 60, (3, 8))
    tables = (module.cluster_weight, module.cluster_bias, weights, biases, list(module.out_projs))
    wanted = upstream(x.flatten(0, 1), y.flatten(), [10, 25, 40, 60], *tables)
    torch.testing.assert_close(module(x, y).flatten(), wanted, rtol=1e-4, atol=1e-4)
    picked = module.log_prob(x).gather(2, y[..., None]).flatten()
    torch.testing.assert_close(picked, -wanted, rtol=1e-4, atol=1e-4)


def test_loads_nvidia_and_hugging_face():
    kimiyoung = ProjectedAdaptiveLogSoftmax(60, 16, 16, [10, 25], 2)
    nn.init.normal_(kimiyoung.cluster_weight)
    state = kimiyoung.state_dict()
    kinds = {"weight": "weights", "bias": "biases"}
    nvidia = {k: v for k, v in state.items() if not k.startswith("out_layers")}
    for i in range(3):
        nvidia |= {f"out_layers_{name}.{i}": state[f"out_layers.{i}.{kind}"] for kind, name in kinds.items()}
    assert "out_layers_weights.2" in nvidia and "out_layers_biases.0" in nvidia
    other = ProjectedAdaptiveLogSoftmax(60, 16, 16, [10, 25], 2)
    other.load_state_dict(nvidia)
    x, y = torch.randn(30, 16), torch.randint(0, 60, (30,))
    assert torch.equal(other(x, y), kimiyoung(x, y))
    turned = {k: v.flip(0) if k.startswith("cluster") else v for k, v in state.items()}
    hugging_face = ProjectedAdaptiveLogSoftmax(60, 16, 16, [10, 25], 2, order="ascending")
    hugging_face.load_state_dict(turned)
    torch.testing.assert_close(hugging_face(x, y), kimiyoung(x, y))


def test_shares_the_embedding():
    tables = [nn.Parameter(torch.randn(n, w)) for n, w in ((10, 16), (15, 8), (35, 4))]
    projections = [None, *(nn.Parameter(torch.randn(16, w)) for w in (8, 4))]
    module = ProjectedAdaptiveLogSoftmax(60, 16, 16, [10, 25], 2, weights=tables, projections=projections)
    assert all(layer.weight is table for layer, table in zip(module.out_layers, tables, strict=True))
    assert module.out_projs[1] is projections[1] and module.out_projs[0] is not None
    module(torch.randn(9, 16), torch.arange(9)).sum().backward()
    assert (tables[0].grad != 0).any() and (tables[2].grad == 0).all()
    with pytest.raises(ValueError, match=r"a shared parameter must have shape \(10, 16\), not \(15, 8\)"):
        ProjectedAdaptiveLogSoftmax(60, 16, 16, [10, 25], 2, weights=tables[1:2] + tables[1:])


@pytest.mark.parametrize("splits", [[], [10, 25, 40]])
def test_equals_salesforce(splits):
    """awd-lstm's SplitCrossEntropyLoss: one table, the tails' vectors beside it, the last column the first tail."""
    module = SplitSoftmax(16, 60, splits)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    x, y = torch.randn(50, 16), torch.randint(0, 60, (50,))
    if splits:
        sizes = [10, 15, 15, 20]
        columns = module.tail_vectors, module.tail_bias
        wanted = upstream(
            x, y, [*splits, 60], *columns, module.weight.split(sizes), module.bias.split(sizes), [None] * 4
        )
    else:
        wanted = F.cross_entropy(F.linear(x, module.weight, module.bias), y, reduction="none")
    torch.testing.assert_close(module(x, y), wanted, rtol=1e-4, atol=1e-5)
    all_classes = torch.stack([-module(x, torch.full((50,), c)) for c in range(60)], 1)
    torch.testing.assert_close(module.log_prob(x), all_classes, rtol=1e-4, atol=1e-5)
    assert torch.equal(module.predict(x), all_classes.argmax(1))


def _train_one_step(rank, folder):
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    torch.manual_seed(0)
    module = nn.parallel.DistributedDataParallel(AdaptiveLogSoftmaxWithLoss(16, 60, [10, 25], 2.0))
    x, y = torch.randn(2, 20, 16), torch.stack([torch.arange(20) % 10, torch.arange(20) * 3])
    for _ in range(2):
        module(x[rank], y[rank]).loss.backward()
    torch.save([p.grad for p in module.parameters()], f"{folder}/{rank}")
    dist.destroy_process_group()


def test_two_processes_with_an_empty_tail_on_one(tmp_path):
    """torch's module leaves gradients None, and DDP then raises or waits."""
    mp.spawn(_train_one_step, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / str(rank)) for rank in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    torch.manual_seed(0)
    module = AdaptiveLogSoftmaxWithLoss(16, 60, [10, 25], 2.0)
    x, y = torch.randn(2, 20, 16), torch.stack([torch.arange(20) % 10, torch.arange(20) * 3])
    (module(x.flatten(0, 1), y.flatten()).loss * 2).backward()
    for a, p in zip(first, module.parameters(), strict=True):
        torch.testing.assert_close(a, p.grad)


def cost(cutoffs, counts, tokens, div_value, flat):
    mass, ends = np.concatenate([[0], np.cumsum(counts) / np.sum(counts)]), [*cutoffs, len(counts)]
    total = max(flat, (cutoffs[0] + len(cutoffs)) * tokens)
    for i, (begin, end) in enumerate(itertools.pairwise(ends)):
        total += max(flat, (end - begin) * (mass[end] - mass[begin]) * tokens / div_value ** (i + 1))
    return total


@pytest.mark.parametrize("seed", range(40))
def test_cutoffs_are_optimal(seed):
    """Against all the cutoffs that there are."""
    generator = np.random.default_rng(seed)
    n = int(generator.integers(4, 18))
    k = int(generator.integers(1, min(4, n)))
    counts = np.sort(generator.integers(0, 50, n))[::-1] + seed % 2
    options = dict(
        tokens=int(generator.integers(1, 50)), div_value=[1, 2, 4][seed % 3], flat=[0, 20, 200][seed // 3 % 3]
    )
    best = min(cost(c, counts, **options) for c in itertools.combinations(range(1, n), k))
    assert cost(adaptive_cutoffs(counts, k, **options), counts, **options) == pytest.approx(best, rel=1e-12)


def test_of_equally_good_cutoffs_the_later_ones():
    assert adaptive_cutoffs([1] * 10, 3, tokens=1) == [7, 8, 9]


def test_cutoffs_of_a_large_vocabulary():
    counts = torch.tensor(1e8) / torch.arange(1, 300_001)
    begin = time.perf_counter()
    cutoffs = adaptive_cutoffs(counts, 3)
    assert time.perf_counter() - begin < 10  # measured: 0.4 s on an idle machine
    AdaptiveLogSoftmaxWithLoss(64, 300_000, cutoffs)
    for counts, k, message in (
        ([1, 2], 1, "falling order"),
        ([0, 0], 1, "positive"),
        ([2, 1], 2, "n_clusters must lie"),
        ([np.inf, 1], 1, "finite"),
        ([np.nan, 1], 1, "finite"),
    ):
        with pytest.raises(ValueError, match=message):
            adaptive_cutoffs(counts, k)
    for name, value in (("tokens", -5), ("div_value", 0)):
        with pytest.raises(ValueError, match=f"{name} must be positive, not {value}"):
            adaptive_cutoffs([2, 1], 1, **{name: value})


def test_there_is_no_backward_where_nothing_needs_a_gradient():
    _, ours = pair()
    x, y = torch.randn(40, 16), torch.randint(0, 60, (40,))
    for needed in (True, False):
        with recorded_ops() as calls:
            ours.requires_grad_(needed)(x, y)
        assert set(calls) == {f"adaptive_nll_{'backward' if needed else 'forward'}"}


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("chosen", ["eager", "native", "triton"])
def test_masked_classes(chosen, reduction):
    """Logits of -inf, one and whole tiles of them: torch's log-softmax leaves these classes out."""
    module = AdaptiveLogSoftmaxWithLoss(
        16, 300, [70, 150], div_value=2.0, head_bias=True, tail_bias=True, reduction=reduction, backend=chosen
    ).double()  # fmt: skip
    with torch.no_grad():
        for layer, masked in ((module.head, slice(0, 66)), (module.tail[1][1], slice(0, 65)), (module.tail[0][1], 3)):
            layer.bias[masked] = -torch.inf
    x, target = (
        torch.randn(12, 16, dtype=torch.float64),
        torch.tensor([66, 69, 70, 72, 149, 215, 216, 230, 299, 67, 71, 299]),
    )
    wanted = module.log_prob(x).gather(1, target[:, None])[:, 0]
    got = module(x, target)
    torch.testing.assert_close(got.output, wanted)
    parameters = list(module.parameters())
    of_loss = torch.autograd.grad(got.loss.mean(), parameters)
    torch.testing.assert_close(of_loss, torch.autograd.grad(-wanted.mean(), parameters))
