"""Training a Compressive Transformer: the command's run, and two losses with a norm each."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from par_xl.data import load_corpus
from par_xl.models import CompressiveConfig, CompressiveTransformer
from par_xl.training import COMPRESSIVE_RECIPES, ClipApart, override, train_compressive
from par_xl.training.compressive import attention_shares


@pytest.mark.parametrize("loss", ["attention", "bptt"])
def test_training_run(loss, tmp_path):
    """The command's run: a finished model that has learned, its compressors too, and its picture."""
    text = "".join(f"{i} * {i} = {i * i}\n" for i in range(200))
    for split in ("train", "valid"):
        (tmp_path / f"{split}.txt").write_text(text)
    corpus = load_corpus(f"bytes:{tmp_path}")
    assert bytes(corpus.train.tolist()).decode() == text
    options = {"epochs": "1", "batch_size": "4", "compressed_len": "16", "compression_loss": loss}
    recipe = override(COMPRESSIVE_RECIPES["human-numbers"], {**options, "compression": "conv"})
    model, history = train_compressive(corpus, recipe, tmp_path, devices=1)
    assert history.valid[-1]["val_loss"] < math.log(256)
    assert (tmp_path / "compression.png").stat().st_size > 10_000
    torch.manual_seed(recipe.seed)
    before = CompressiveTransformer(model.config).compressors[0].weights[0]
    assert not torch.equal(model.compressors[0].weights[0], before)
    tokens = torch.randint(256, (2, 96))
    for share in attention_shares(model.eval(), tokens[:, :32], model(tokens).memory):
        assert sum(share) == pytest.approx(1) and min(share) > 0


def test_gradients_are_clipped_apart():
    model = CompressiveTransformer(CompressiveConfig(vocab_size=17, n_layer=2, n_head=2, d_model=8, d_inner=16))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    module = SimpleNamespace(model=model, parameters=model.parameters)
    ClipApart(0.1, CompressiveTransformer.compression_parameters).on_before_optimizer_step(None, module, None)
    compressors = set(model.compression_parameters())
    for group in (compressors, set(model.parameters()) - compressors):
        assert nn.utils.get_total_norm([p.grad for p in group]).item() == pytest.approx(0.1, rel=1e-3)
