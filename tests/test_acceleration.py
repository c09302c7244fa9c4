"""accelerate(): upstream's own modules, called as upstream calls them, against their fused twins."""

import copy
import math

import pytest
import torch
from test_rel_modules import D_MODEL, HEADS, WIDTH, B, M, T, by_distance, causal, random_
from torch import nn

import par_xl
from par_xl.nn import RelPartialLearnableMultiHeadAttn


class Upstream(nn.Module):
    """The parts and the call of kimiyoung's and of Hugging Face's layer; time first."""

    def __init__(self, own_biases=False):
        super().__init__()
        self.n_head, self.d_model, self.d_head, self.pre_lnorm = HEADS, D_MODEL, WIDTH, False
        self.qkv_net = nn.Linear(D_MODEL, 3 * HEADS * WIDTH, bias=False)
        self.drop, self.dropatt = nn.Dropout(0.0), nn.Dropout(0.0)
        self.o_net = nn.Linear(HEADS * WIDTH, D_MODEL, bias=False)
        self.layer_norm = nn.LayerNorm(D_MODEL)
        self.r_net = nn.Linear(D_MODEL, HEADS * WIDTH, bias=False)
        if own_biases:
            self.r_r_bias, self.r_w_bias = (nn.Parameter(torch.zeros(HEADS, WIDTH)) for _ in range(2))

    def compute(self, w, r, u, v, attn_mask, mems):
        n, both = len(w), w if mems is None else torch.cat((mems, w))
        q, k, x = (y.unflatten(-1, (HEADS, WIDTH)) for y in self.qkv_net(both).chunk(3, -1))
        rows = self.r_net(r).view(-1, HEADS, WIDTH)
        by_row = torch.einsum("ibnd,jnd->bnij", q[-n:] + v, rows)
        scores = torch.einsum("ibnd,jbnd->bnij", q[-n:] + u, k) + by_distance(by_row, len(k))
        hidden = attn_mask.reshape(attn_mask.shape[:2]).bool()
        weights = (scores / math.sqrt(WIDTH)).masked_fill(hidden, -torch.inf).softmax(-1)
        return self.layer_norm(w + self.o_net(torch.einsum("bnij,jbnd->ibnd", weights, x).flatten(2)))


class Kimiyoung(Upstream):
    def forward(self, w, r, r_w_bias, r_r_bias, attn_mask=None, mems=None):
        return self.compute(w, r, r_w_bias, r_r_bias, attn_mask, mems)


class HuggingFace(Upstream):
    def __init__(self):
        super().__init__(own_biases=True)

    def forward(self, w, r, attn_mask=None, mems=None, head_mask=None, output_attentions=False):
        return [self.compute(w, r, self.r_w_bias, self.r_r_bias, attn_mask, mems)]


Kimiyoung.__name__ = HuggingFace.__name__ = "RelPartialLearnableMultiHeadAttn"


def model_of(kind):
    return random_(nn.ModuleDict({"layers": nn.ModuleList([kind(), kind()]), "out": nn.Linear(D_MODEL, 3)}))


def mask(left=None):
    return (~causal(left)).byte()[:, :, None]  # upstream's dtype and shape


@pytest.mark.parametrize("left", [None, 2])
@pytest.mark.parametrize("kind", [Kimiyoung, HuggingFace], ids=["kimiyoung", "huggingface"])
def test_accelerate_keeps_results_gradients_and_parameters(kind, left):
    model = model_of(kind).double()
    fused = copy.deepcopy(model)
    parameters = dict(fused.named_parameters())
    swapped = par_xl.accelerate(fused)
    assert list(swapped) == ["layers.0", "layers.1"]
    assert all(fused.get_submodule(name) is twin for name, twin in swapped.items())
    assert all(isinstance(twin, RelPartialLearnableMultiHeadAttn) for twin in swapped.values())
    after = dict(fused.named_parameters())
    assert list(after) == list(parameters) and all(after[name] is x for name, x in parameters.items())
    assert list(fused.state_dict()) == list(model.state_dict())
    assert par_xl.accelerate(fused) == {}

    shapes = (T, B, D_MODEL), (M, B, D_MODEL), (M + T, 1, D_MODEL), (HEADS, WIDTH), (HEADS, WIDTH)
    w, mems, r, *biases = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    biases = () if kind is HuggingFace else biases

    def run(model):
        out = w
        for layer in model["layers"]:
            out = layer(out, r, *biases, attn_mask=mask(left), mems=mems)
            out = out[0] if kind is HuggingFace else out
        gradients = torch.autograd.grad(out.square().sum(), list(model["layers"].parameters()))
        return out, gradients

    torch.testing.assert_close(run(fused), run(model))


def test_accelerate_takes_the_empty_memory_of_a_first_step():
    model = model_of(Kimiyoung)
    w, r, bias = torch.randn(T, B, D_MODEL), torch.randn(T, 1, D_MODEL), torch.randn(HEADS, WIDTH)
    future = torch.ones(T, T).triu(1).bool()
    expected = model["layers"][0](w, r, bias, bias, future)
    par_xl.accelerate(model)
    torch.testing.assert_close(model["layers"][0](w, r, bias, bias, future, torch.empty(0)), expected)


def test_accelerate_refuses_what_a_kernel_cannot_do():
    kimiyoung, hugging_face = (model_of(kind) for kind in (Kimiyoung, HuggingFace))
    par_xl.accelerate(kimiyoung), par_xl.accelerate(hugging_face)
    layer, bias = kimiyoung["layers"][0], torch.randn(HEADS, WIDTH)
    w, r = torch.randn(T, B, D_MODEL), torch.randn(T, 1, D_MODEL)
    with pytest.raises(ValueError, match="attn_mask must be given"):
        layer(w, r, bias, bias)
    hole = torch.ones(T, T).triu(1)
    layer(w, r, bias, bias, hole)
    hole[3, 1] = 1  # in place: the mask that was looked at has changed
    last_key = torch.ones(T, T).triu(1)
    last_key[:, -1] = 1
    for refused in (hole, last_key, torch.zeros(T, T), torch.ones(T, T).triu(2)):
        with pytest.raises(ValueError, match="nothing else"):
            layer(w, r, bias, bias, refused)
    with pytest.raises(ValueError, match="output_attentions"):
        hugging_face["layers"][0](w, r, hole, output_attentions=True)
    with pytest.raises(TypeError, match="contain"):
        par_xl.accelerate(Kimiyoung())


class Adapter(nn.Module):
    """A low-rank addition to a layer; its ``weight`` and ``bias`` are still the layer's, as in peft."""

    def __init__(self, base):
        super().__init__()
        self.base, self.a = base, nn.Linear(base.in_features, base.out_features, bias=False)
        self.weight, self.bias = base.weight, base.bias

    def forward(self, x):
        return self.base(x) + self.a(x)


def weight_norm(layer):
    return torch.nn.utils.weight_norm(layer)


def hooked(layer):
    layer.register_forward_hook(lambda layer, x, out: 2 * out)
    return layer


@pytest.mark.parametrize("wrap", [Adapter, weight_norm, hooked, torch.nn.utils.parametrizations.weight_norm])
def test_what_is_around_a_projection_reaches_the_memory_too(wrap):
    layer = random_(Kimiyoung())
    layer.qkv_net = wrap(nn.Linear(D_MODEL, 3 * HEADS * WIDTH))
    layer.double()
    fused = copy.deepcopy(nn.Sequential(layer)) if wrap is not weight_norm else nn.Sequential(layer)
    shapes = (T, B, D_MODEL), (M + T, 1, D_MODEL), (HEADS, WIDTH), (HEADS, WIDTH)
    inputs = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    mems = torch.randn(M, B, D_MODEL, dtype=torch.float64)
    wanted = layer(*inputs, attn_mask=mask(), mems=mems)
    assert list(par_xl.accelerate(fused)) == ["0"]
    torch.testing.assert_close(fused[0](*inputs, attn_mask=mask(), mems=mems), wanted)


@pytest.mark.parametrize("wrap", [Adapter, weight_norm, hooked])
@pytest.mark.parametrize("where", ["head", "tail.0.0", "tail.1.1"])
def test_an_adaptive_softmax_with_more_than_weights_is_left_as_it_is(wrap, where):
    """The fused module calls no layer; where something is put around one later, it says so."""
    theirs = nn.Sequential(nn.AdaptiveLogSoftmaxWithLoss(D_MODEL, 30, [6, 15], 2.0))
    ours = copy.deepcopy(theirs)
    par_xl.accelerate(ours)
    for model in (theirs, ours):
        parent, _, name = f"0.{where}".rpartition(".")
        setattr(model.get_submodule(parent), name, wrap(model.get_submodule(f"0.{where}")))
    assert par_xl.accelerate(theirs) == {}
    if wrap is not hooked:  # a hook that only looks is no harm
        with pytest.raises(TypeError, match=r"(head|tail\[\d\]\[\d\]) must be an nn.Linear whose weight no hook makes"):
            ours[0](torch.randn(4, D_MODEL), torch.arange(4))


def test_a_parametrized_adaptive_softmax_goes_on():
    theirs = nn.Sequential(nn.AdaptiveLogSoftmaxWithLoss(D_MODEL, 30, [6, 15], 2.0)).double()
    torch.nn.utils.parametrizations.weight_norm(theirs[0].head)
    ours = copy.deepcopy(theirs)
    assert list(par_xl.accelerate(ours)) == ["0"]
    x, target = torch.randn(20, D_MODEL, dtype=torch.float64), torch.randint(30, (20,))
    grads = [torch.autograd.grad(m[0](x, target).loss, list(m.parameters())) for m in (ours, theirs)]
    torch.testing.assert_close(*grads)


def test_accelerate_swaps_a_shared_module_once_and_keeps_modes():
    shared = Kimiyoung().eval()
    model = nn.ModuleList([shared, shared, nn.Linear(2, 2)])
    swapped = par_xl.accelerate(model)
    assert list(swapped) == ["0", "1"] and model[0] is model[1] and not model[0].training and model[2].training
    assert par_xl.accelerate(nn.Sequential(nn.Linear(2, 2))) == {}


def test_accelerate_swaps_torchs_adaptive_softmax():
    theirs = nn.Sequential(nn.AdaptiveLogSoftmaxWithLoss(D_MODEL, 30, [6, 15], 2.0, head_bias=True)).double()
    ours = copy.deepcopy(theirs)
    parameters = dict(ours.named_parameters())
    swapped = par_xl.accelerate(ours)
    assert list(swapped) == ["0"] and type(swapped["0"]) is par_xl.nn.AdaptiveLogSoftmaxWithLoss
    after = dict(ours.named_parameters())
    assert list(after) == list(parameters) and all(after[name] is x for name, x in parameters.items())
    x, target = torch.randn(20, D_MODEL, dtype=torch.float64), torch.randint(30, (20,))
    results = [module[0](x, target) for module in (ours, theirs)]
    torch.testing.assert_close(results[0].output, results[1].output)
    grads = [torch.autograd.grad(r.loss, list(m.parameters())) for r, m in zip(results, (ours, theirs), strict=True)]
    torch.testing.assert_close(*grads)
    assert par_xl.accelerate(ours) == {}
