"""Training a Compressive Transformer: the command's run, and two losses with a norm each."""

import json
import math
import os
import subprocess
import sys
from functools import partialmethod
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from training_helpers import IGNORED, InterruptAt, assert_same_parameters, small_corpus

from par_xl.cli import main
from par_xl.data import load_corpus
from par_xl.models import CompressiveConfig, CompressiveTransformer
from par_xl.training import COMPRESSIVE_RECIPES, ClipApart, fit, override, train_compressive
from par_xl.training.compressive import attention_shares

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings(*IGNORED)]


def small(**options):
    sizes = dict(n_layer=1, d_model=8, d_inner=8, n_head=2, d_head=4, mem_len=12, compressed_len=6, rate=2)
    steps = dict(batch_size=4, bptt=12, warmup=0, schedule="constant")
    return override(COMPRESSIVE_RECIPES["human-numbers"], {**sizes, **steps, **options})


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


def test_two_ranks_by_the_command(tmp_path, monkeypatch, capsys):
    """Positions of compressed steps have no gradient until something is compressed, which plain DDP refuses."""
    sizes = ("n_layer=1", "d_model=8", "d_inner=8", "n_head=2", "d_head=4", "mem_len=16", "compressed_len=8")
    options = (*sizes, "batch_size=4", "bptt=16", "warmup=0", "max_steps=6", "compressed_positions=own")
    words = [word for option in options for word in ("--set", option)]
    command = [sys.executable, "-m", "par_xl.cli", "train", "compressive", "--data", "human-numbers", "--devices", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--out", tmp_path, *words], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((tmp_path / "result.json").read_text())
    assert record["model"]["compressed_positions"] == "own" and record["result"]["step"] == 6
    assert (tmp_path / "compression.png").exists()
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    (rows, compressed, _), (other, _, _) = (memory[0] for memory in checkpoint["memory"])
    assert rows.shape == (4, 24, 8) and compressed == 8 and not torch.equal(rows, other)

    longer = ("--data", "human-numbers", "--split", "valid", "--set", "mem_len=32", "--set", "compressed_len=16")
    for arguments in (("eval", tmp_path, *longer), ("generate", tmp_path, "--prompt", "two hundred", "--tokens", 40)):
        monkeypatch.setattr(sys, "argv", ["par-xl", *map(str, arguments)])
        with pytest.raises(SystemExit, match="0"):
            main()
    assert len(capsys.readouterr().out.split("two hundred", 1)[1].split()) == 40
    described = json.loads((tmp_path / "eval-valid.json").read_text())
    assert described["model"]["compressed_len"] == 16 and 1 < described["result"]["perplexity"] < 40


def test_resuming_gives_the_numbers_of_an_uninterrupted_run(tmp_path, monkeypatch):
    """From the end of an epoch and from the middle of one, where the memory and what it has received go on."""
    corpus, recipe = small_corpus(), small(epochs=3, compression="most_used", dropout=0.2)
    model, history = train_compressive(corpus, recipe, tmp_path / "whole", devices=1)
    end = int(history.valid[0]["step"])

    def interrupted(*arguments, callbacks, **options):
        return fit(*arguments, callbacks=[*callbacks, InterruptAt(end + 9)], **options)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr("par_xl.training.compressive.fit", interrupted)
        train_compressive(corpus, recipe, tmp_path, devices=1)
    for name in ("last", "interrupted"):
        other, resumed = train_compressive(corpus, recipe, tmp_path, devices=1, resume=tmp_path / f"{name}.ckpt")
        assert resumed.train == history.train and resumed.valid == history.valid
        assert_same_parameters(other, model, rtol=0, atol=0)


def test_compiled_training_makes_its_graphs_in_the_first_epoch(tmp_path, monkeypatch):
    """One call of one graph a step, with gradients; what is recorded at steps and validations makes none."""
    compiled, calls = [], []  # the step each graph was made in; of every call whether it had gradients

    def backend(graph, _):
        compiled.append(len(calls))

        def run(*inputs):
            calls.append(torch.is_grad_enabled())
            return graph.forward(*inputs)

        return run

    monkeypatch.setattr(CompressiveTransformer, "compile", partialmethod(nn.Module.compile, backend=backend))
    recipe = small(epochs=2)
    plain, history = train_compressive(small_corpus(), recipe, tmp_path / "plain", devices=1)
    model, again = train_compressive(small_corpus(), recipe, tmp_path / "compiled", devices=1, compile=True)
    assert all(calls) and len(calls) == history.valid[-1]["step"]
    assert max(compiled) < history.valid[0]["step"]
    losses = [[loss for _, loss in run.train] for run in (again, history)]
    torch.testing.assert_close(*map(torch.tensor, losses))
    assert_same_parameters(model, plain)


def test_gradients_are_clipped_apart():
    model = CompressiveTransformer(CompressiveConfig(vocab_size=17, n_layer=2, n_head=2, d_model=8, d_inner=16))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    module = SimpleNamespace(model=model, parameters=model.parameters)
    ClipApart(0.1, CompressiveTransformer.compression_parameters).on_before_optimizer_step(None, module, None)
    compressors = set(model.compression_parameters())
    for group in (compressors, set(model.parameters()) - compressors):
        assert nn.utils.get_total_norm([p.grad for p in group]).item() == pytest.approx(0.1, rel=1e-3)
