"""par_xl.training.search: what the search finds, that it resumes to the bit, and what it leaves behind."""

import json

import lightning as L
import pytest
import torch
from training_helpers import IGNORED, InterruptAt, assert_same_parameters, small_corpus

from par_xl.training import SEARCH_RECIPES, override, search_par
from par_xl.training import search as search_module

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings(*IGNORED)]

SMALL = dict(
    n_layer=2, n_head=2, d_model=8, d_inner=8, mem_len=8, batch_size=4, bptt=12, epochs=3, warmup=0, freeze=5,
    eval_every=10,
)  # fmt: skip
VARIANTS = {
    "two optimizers": {},
    "held out": dict(held_out=0.1, architecture_share=1.0),
    "hard": dict(hard=True),
    "one optimizer": dict(two_optimizers=False, max_steps=55),
}


@pytest.fixture(scope="module")
def corpus():
    return small_corpus()


def small(**options):
    return override(SEARCH_RECIPES["human-numbers"], {**SMALL, **options})


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_resumed_search_gives_the_numbers_of_an_uninterrupted_one(corpus, tmp_path, monkeypatch, variant):
    """Weights, probabilities at every step and losses, to the bit: before, at and after a validation."""
    recipe = small(**VARIANTS[variant])
    expected, history = search_par(corpus, recipe, tmp_path / "whole", devices=1)
    snapshots = json.loads((tmp_path / "whole" / "architecture.json").read_text())
    assert len({str(p) for p in snapshots["probabilities"]}) > 10
    fit = search_module.fit
    for step in (3, 19, 33):  # the 20th step has a validation; an epoch has 32 steps, held out 29
        out = tmp_path / str(step)

        def interrupted(*arguments, callbacks, step=step, **options):
            return fit(*arguments, callbacks=[*callbacks, InterruptAt(step)], **options)

        monkeypatch.setattr(search_module, "fit", interrupted)
        with pytest.raises(SystemExit):
            search_par(corpus, recipe, out, devices=1)
        monkeypatch.setattr(search_module, "fit", fit)
        torch.rand(17), L.seed_everything(99, verbose=False)
        model, resumed = search_par(corpus, recipe, out, devices=1, resume=out / "interrupted.ckpt")
        assert resumed.train == history.train and resumed.valid == history.valid, step
        assert json.loads((out / "architecture.json").read_text()) == snapshots
        assert_same_parameters(model, expected, rtol=0, atol=0)
