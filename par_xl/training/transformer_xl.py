"""Recipes for Transformer-XL, and a run by one of them."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import lightning as L

from par_xl.data import Corpus
from par_xl.models import TransformerXL, TransformerXLConfig
from par_xl.training.fit import Recipe, fit
from par_xl.training.history import History


@dataclass
class TransformerXLRecipe(Recipe):
    """A recipe with the model's options, fields of :class:`TransformerXLConfig`; ``bptt`` is upstream's ``tgt_len``."""

    config_class: ClassVar[type] = TransformerXLConfig


# The size of the benchmark: 6 layers, d 256, 8 heads, 128 + 128
_WIKITEXT_2 = TransformerXLRecipe(
    epochs=10,
    batch_size=8,
    bptt=128,
    lr=5e-4,
    schedule="one-cycle",
    clip=0.25,
    model=dict(
        n_layer=6,
        n_head=8,
        d_model=256,
        d_head=32,
        d_inner=1024,
        dropout=0.2,
        dropatt=0.1,
        mem_len=128,
        cutoffs=(2000, 10000),
        div_val=2,
        tie_projs=(False, True, True),
    ),
)
_BYTES = dict(cutoffs=(), div_val=1, tie_projs=(), mem_len=480)
TRANSFORMER_XL_RECIPES = {
    # Small enough for seconds on a CPU
    "human-numbers": TransformerXLRecipe(
        epochs=4,
        batch_size=16,
        bptt=32,
        lr=2e-3,
        schedule="one-cycle",
        clip=0.25,
        model=dict(n_layer=2, n_head=4, d_model=64, d_head=16, d_inner=128, dropout=0.1, mem_len=32),
    ),
    "wikitext-2": _WIKITEXT_2,
    # Text as bytes ("bytes:FOLDER")
    "bytes": replace(_WIKITEXT_2, epochs=1, bptt=192, model={**_WIKITEXT_2.model, **_BYTES}),
}


def train_transformer_xl(
    corpus: Corpus, recipe: TransformerXLRecipe, out: str | Path, **options: Any
) -> tuple[TransformerXL, History]:
    """Seed, build and train; ``options`` are those of :func:`fit`."""
    L.seed_everything(recipe.seed, verbose=False)
    model = TransformerXL(TransformerXLConfig(vocab_size=len(corpus.vocabulary), **recipe.model))
    return model, fit(model, corpus, recipe, out, **options)
