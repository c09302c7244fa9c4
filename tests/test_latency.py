"""The latency term of a search: its formula, its table, and what it does to a search."""

import json

import pytest
import torch
from training_helpers import IGNORED, InterruptAt, small_corpus

from par_xl.models import ParConfig, ParSuperNet
from par_xl.training import SEARCH_RECIPES, LatencyPenalty, block_seconds, latency, measure_blocks, override, search_par
from par_xl.training import search as search_module

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings(*IGNORED)]

SECONDS = [0.4, 0.1, 0.0]
SMALL = dict(
    n_layer=2, n_head=2, d_model=8, d_inner=8, mem_len=8, batch_size=4, bptt=12, epochs=1, warmup=0, freeze=0,
    architecture_share=1.0,
)  # fmt: skip


def network(**options):
    config = dict(vocab_size=9, n_layer=2, n_head=4, d_model=64, d_inner=32, mem_len=64)
    return ParSuperNet(ParConfig(**{**config, **options}))


def test_penalty_is_of_what_is_above_the_target():
    half = torch.tensor([[0.5, 0.2, 0.3], [0.25, 0.5, 0.25]])
    share = (0.5 * 0.4 + 0.2 * 0.1 + 0.25 * 0.4 + 0.5 * 0.1) / (2 * 0.4)
    for target, weight in ((0.2, 1.0), (0.2, 3.0), (share + 0.01, 1.0)):
        probabilities = half.clone().requires_grad_()
        term = LatencyPenalty(SECONDS, target, weight)
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(term.share(probabilities), torch.tensor(share))
        penalty = term(probabilities)
        torch.testing.assert_close(penalty, torch.tensor(weight * max(0, share / target - 1)))
        penalty.backward()
        slope = weight / target / (2 * 0.4) if share > target else 0.0
        torch.testing.assert_close(probabilities.grad, slope * torch.tensor([SECONDS] * 2))
    everything = torch.tensor([[1.0, 0, 0]] * 3)
    assert LatencyPenalty(SECONDS, 1.0)(everything) == 0 and LatencyPenalty(SECONDS, 1.0).share(everything) == 1


@pytest.mark.parametrize(
    ("arguments", "name"), [((SECONDS, 0.0), "target"), (([0.0, 1, 0], 0.5), "seconds"), (([1.0], 0.5), "seconds")]
)
def test_bad_terms(arguments, name):
    with pytest.raises(ValueError, match=name):
        LatencyPenalty(*arguments)
    for options in ({"latency_target": -1}, {"latency_weight": -1}):
        with pytest.raises(ValueError, match="latency_target and latency_weight"):
            override(SEARCH_RECIPES["human-numbers"], options)


def test_measuring_leaves_everything_as_it_was():
    model, random = network(), torch.get_rng_state()
    generator, weights = model.generator.get_state(), model.state_dict()["choice.pi"].clone()
    attention, dense, identity = measure_blocks(model, 4, 64, rounds=5)
    assert attention > dense > 0 and identity == 0  # 128 keys for 64 queries, against a dense of width 32
    assert model.training and torch.equal(torch.get_rng_state(), random)
    assert torch.equal(model.generator.get_state(), generator) and torch.equal(model.choice.pi, weights)


def test_table_is_measured_once_for_each_configuration(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(latency, "measure_blocks", lambda *arguments: calls.append(arguments) or SECONDS)
    monkeypatch.setenv("PAR_XL_CACHE", str(tmp_path))
    for _ in range(2):
        assert block_seconds(network(), 4, 12) == SECONDS
    assert len(calls) == 1
    for other, batch_size, precision in (
        (network(mem_len=3), 4, "32-true"),
        (network(clamp_len=3), 4, "32-true"),
        (network(), 5, "32-true"),
        (network(), 4, "bf16-mixed"),
    ):
        block_seconds(other, batch_size, 12, precision=precision)
    assert len(calls) == 5
    assert len(json.loads((tmp_path / "latency.json").read_text())) == 5
    assert [p.name for p in tmp_path.iterdir()] == ["latency.json"]


def test_a_search_meets_its_target(tmp_path, monkeypatch):
    """Attention four times as slow as dense: a target leaves less of it, and a resumed search does not measure."""
    monkeypatch.setattr(search_module, "block_seconds", lambda *_, **__: SECONDS)
    corpus, shares = small_corpus(), {}
    for target in (0.0, 0.25):
        options = {**SMALL, "latency_target": target, "latency_weight": 4.0}
        recipe = override(SEARCH_RECIPES["human-numbers"], options)
        model, history = search_par(corpus, recipe, tmp_path / str(target), devices=1)
        shares[target] = LatencyPenalty(SECONDS, 1.0).share(model.probabilities()).item()
    assert shares[0.25] < 0.3 < 0.4 < shares[0.0]

    fit = search_module.fit
    monkeypatch.setattr(
        search_module, "fit", lambda *a, callbacks, **o: fit(*a, callbacks=[*callbacks, InterruptAt(10)], **o)
    )
    with pytest.raises(SystemExit):
        search_par(corpus, recipe, tmp_path / "resumed", devices=1)
    monkeypatch.setattr(search_module, "fit", fit)
    monkeypatch.setattr(search_module, "block_seconds", lambda *_, **__: [1.0, 1.0, 1.0])
    _, resumed = search_par(
        corpus, recipe, tmp_path / "resumed", devices=1, resume=tmp_path / "resumed/interrupted.ckpt"
    )
    assert resumed.train == history.train
