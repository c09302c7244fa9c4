"""Recipes for the PAR Transformer-XL with a given pattern, and a run by one of them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import lightning as L

from par_xl.data import Corpus
from par_xl.models import ParConfig, ParTransformerXL
from par_xl.training.fit import Recipe, fit
from par_xl.training.history import History
from par_xl.training.search import SEARCH_RECIPES


@dataclass
class ParRecipe(Recipe):
    """A recipe with the model's options, fields of :class:`ParConfig`, the ``pattern`` among them."""

    config_class: ClassVar[type] = ParConfig


def _retrained(name: str) -> ParRecipe:
    """The sizes and the optimiser of the search of that name, and the paper's pattern."""
    r = SEARCH_RECIPES[name]
    model = {**r.model, "pattern": "par"}
    return ParRecipe(
        r.epochs, r.batch_size, r.bptt, eval_every=r.eval_every, clip=r.clip, model=model, **r.optimization()
    )


PAR_RECIPES = {name: _retrained(name) for name in ("human-numbers", "wikitext-2", "bytes")}


def train_par(corpus: Corpus, recipe: ParRecipe, out: str | Path, **options: Any) -> tuple[ParTransformerXL, History]:
    """Seed, build and train; ``options`` are those of :func:`fit`."""
    L.seed_everything(recipe.seed, verbose=False)
    model = ParTransformerXL(ParConfig(vocab_size=len(corpus.vocabulary), **recipe.model))
    return model, fit(model, corpus, recipe, out, **options)
