"""RelaxedOneHot against the analytic distribution, at the ends of the temperature, in every dtype."""

import math

import pytest
import torch
from torch.distributions import RelaxedOneHotCategorical

from par_xl.nn import RelaxedOneHot, relaxed_one_hot

LOGITS = [0.3, -1.2, 1.0]
N = 40000


def make(*batch_shape, pi=LOGITS, dtype=torch.float32, **options):
    module = RelaxedOneHot(3, batch_shape, **options).to(dtype)
    with torch.no_grad():
        module.pi.copy_(torch.tensor(pi).expand_as(module.pi))
    return module


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("temperature", [0.1, 0.7, 3.0])
def test_samples_have_the_analytic_distribution(temperature):
    """The largest entry is choice k with probability softmax(pi)[k], and the logarithm of a ratio of two entries, times
    the temperature, is logistic around the difference of their logits (Kolmogorov-Smirnov)."""
    samples = make(N)(temperature, seeded()).detach().double()
    torch.testing.assert_close(samples.sum(-1), torch.ones(N, dtype=torch.float64))
    expected = torch.tensor(LOGITS).double().softmax(-1)
    counts = samples.argmax(-1).bincount(minlength=3)
    chi2 = ((counts - N * expected) ** 2 / (N * expected)).sum()
    assert chi2 < 13.8  # 0.1 % of correct samplers fail
    density = RelaxedOneHotCategorical(torch.tensor(temperature).double(), logits=torch.tensor(LOGITS).double())
    if temperature >= 0.7:  # below, fp32 rounds entries to 0
        for i, j in ((0, 1), (1, 2), (2, 0)):
            z = temperature * (samples[:, i] / samples[:, j]).log() - (LOGITS[i] - LOGITS[j])
            steps = torch.arange(1, N + 1) / N
            assert (z.sort().values.sigmoid() - steps).abs().max() < 1.95 / math.sqrt(N)
        torch.manual_seed(1)
        ours, theirs = density.log_prob(samples), density.log_prob(density.sample((N,)))
        error = ((ours.var() + theirs.var()) / N).sqrt()
        assert (ours.mean() - theirs.mean()).abs() < 4 * error


def test_gradient_is_of_the_sample_with_its_noise_held():
    module = make(4, dtype=torch.float64)

    def sample(pi):
        return torch.func.functional_call(module, {"pi": pi}, (0.8, seeded(3)))

    assert torch.autograd.gradcheck(sample, module.pi)


def test_straight_through_is_one_hot_with_the_relaxed_gradient():
    module, relaxed = make(50, straight_through=True), make(50)
    one_hot, soft = module(0.8, seeded()), relaxed(0.8, seeded())
    assert torch.equal(one_hot, torch.nn.functional.one_hot(soft.argmax(-1), 3).float())
    (one_hot.sin() * torch.arange(3)).sum().backward()
    (expected,) = torch.autograd.grad(soft, relaxed.pi, one_hot.detach().cos() * torch.arange(3))
    assert torch.equal(module.pi.grad, expected) and expected.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_parameters_and_autocast_draw_in_fp32(dtype):
    half = make(1000, dtype=dtype)
    wide = make(1000, pi=half.pi[0].float().tolist())
    expected = wide(0.5, seeded())
    with torch.autocast("cpu", dtype):
        for module in (half, wide):
            assert module(0.5, seeded()).dtype == module.probabilities().dtype == torch.float32
            assert torch.equal(module(0.5, seeded()), expected)
    half(0.5, seeded()).square().sum().backward()
    assert half.pi.grad.dtype == dtype and torch.isfinite(half.pi.grad).all()


@pytest.mark.parametrize("temperature", [2e-38, 1e-30, 1e-3, 1e30, math.inf])
@pytest.mark.parametrize("noise", [None, 1e-45, 3e38])
def test_ends_are_finite(temperature, noise, monkeypatch):
    if noise is not None:
        monkeypatch.setattr(
            relaxed_one_hot, "_exponential", lambda like, _: torch.tensor([1.0, noise, 2.0]).expand(like.shape)
        )
    for pi in (LOGITS, [1e4, -1e4, 0.0]):
        module = make(200, pi=pi)
        sample = module(temperature)
        torch.testing.assert_close(sample.sum(-1), torch.ones(200))
        sample.square().sum().backward()
        assert torch.isfinite(module.pi.grad).all()
        if temperature == math.inf:
            torch.testing.assert_close(sample, torch.full((200, 3), 1 / 3))
        elif temperature < 1e-20:
            assert torch.equal(sample.amax(-1), torch.ones(200))


def test_evaluation_is_deterministic():
    module, generator = make(2).eval(), seeded()
    state = generator.get_state(), torch.get_rng_state()
    assert torch.equal(module(5.0, generator), torch.tensor([[0.0, 0.0, 1.0]] * 2))
    assert torch.equal(generator.get_state(), state[0]) and torch.equal(torch.get_rng_state(), state[1])
    assert torch.equal(RelaxedOneHot(4).eval()(1.0), torch.tensor([1.0, 0, 0, 0]))
    torch.testing.assert_close(RelaxedOneHot(4).probabilities(), torch.full((4,), 0.25))


def test_only_the_generator_decides():
    module = make()
    torch.manual_seed(0)
    first = module(1.0, seeded(5))
    torch.manual_seed(1)
    assert torch.equal(module(1.0, seeded(5)), first) and not torch.equal(module(1.0, seeded(6)), first)
    torch.manual_seed(1)
    free = module(1.0)
    torch.manual_seed(1)
    assert torch.equal(module(1.0), free) and torch.equal(module(1.0, seeded(1)), free)


@pytest.mark.parametrize("temperature", [0, -1.0, math.nan, 1e-46, torch.tensor(0.0)])
def test_bad_temperature(temperature):
    for module in (make(), make().eval()):
        with pytest.raises(ValueError, match="temperature must be positive"):
            module(temperature)


def test_bad_number_of_choices():
    with pytest.raises(ValueError, match="n_choices"):
        RelaxedOneHot(0)
