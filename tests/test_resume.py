"""A run that was stopped and resumed gives the numbers of one that was not, to the bit."""

import signal
import warnings
from dataclasses import replace

import lightning as L
import pytest
import safetensors.torch
import torch
from training_helpers import IGNORED, InterruptAt, assert_same_parameters, small_awd_lstm, small_corpus

from par_xl.models import AWDLSTM, AWDLSTMConfig
from par_xl.training import RECIPES, RNNTrainer, fit, override, train_awd_lstm

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings(*IGNORED)]


@pytest.fixture(scope="module")
def corpus():
    return small_corpus()


RUN = dict(epochs=3, batch_size=4, bptt=12, random_length=True, d_model=8, d_hidden=8, dropout=0.5)
EXACT = {
    "one-cycle": override(RECIPES["human-numbers"], RUN),
    "nt-asgd": override(RECIPES["wikitext-2"], {**RUN, "epochs": 4, "lr": 60, "nonmono": 1}),
}


@pytest.fixture(scope="module", params=EXACT)
def uninterrupted(request, corpus, tmp_path_factory):
    recipe = EXACT[request.param]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, history = train_awd_lstm(corpus, recipe, tmp_path_factory.mktemp("whole"), devices=1)
    return recipe, model, history


@pytest.mark.parametrize("where", ["start", "middle", "last step of an epoch", "first step of an epoch", "late"])
def test_a_resumed_run_gives_the_numbers_of_an_uninterrupted_one(uninterrupted, corpus, tmp_path, where):
    """Weights, losses, accuracies and counts, to the bit, wherever Ctrl-C came."""
    recipe, expected, history = uninterrupted
    ends = [int(v["step"]) for v in history.valid]
    step = {
        "start": 0,
        "middle": ends[0] // 2,
        "last step of an epoch": ends[0] - 1,
        "first step of an epoch": ends[1],
        "late": ends[-1] - 3,
    }[where]
    handler = signal.getsignal(signal.SIGINT)

    def run(callbacks=(), **options):
        L.seed_everything(recipe.seed, verbose=False)
        model = AWDLSTM(AWDLSTMConfig(len(corpus.vocabulary), **recipe.model))
        callbacks = [RNNTrainer(recipe.bptt, recipe.alpha, recipe.beta), *callbacks]
        return model, fit(model, corpus, recipe, tmp_path, callbacks=callbacks, devices=1, **options)

    with pytest.raises(SystemExit):
        run([InterruptAt(step)])
    assert signal.getsignal(signal.SIGINT) is handler
    torch.rand(17), L.seed_everything(99, verbose=False)  # nothing of this process may matter
    model, resumed = run(resume=tmp_path / "interrupted.ckpt")
    assert resumed.train == history.train and resumed.valid == history.valid and resumed.tokens == history.tokens
    assert_same_parameters(model, expected, rtol=0, atol=0)


def test_resuming_from_the_end_of_an_epoch(uninterrupted, corpus, tmp_path):
    recipe, expected, history = uninterrupted
    with pytest.raises(SystemExit):
        L.seed_everything(recipe.seed, verbose=False)
        model = AWDLSTM(AWDLSTMConfig(len(corpus.vocabulary), **recipe.model))
        callbacks = [RNNTrainer(recipe.bptt), InterruptAt(int(history.valid[1]["step"]) + 3)]
        fit(model, corpus, recipe, tmp_path, callbacks=callbacks, devices=1)
    model, resumed = train_awd_lstm(corpus, recipe, tmp_path, devices=1, resume=tmp_path / "last.ckpt")
    assert resumed.train == history.train and resumed.valid == history.valid
    assert_same_parameters(model, expected, rtol=0, atol=0)


@pytest.fixture
def default_interrupt():
    """Ctrl-C as in a program: pytest-xdist's workers ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("default_interrupt")
def test_a_second_interrupt_stops_at_once(corpus, tmp_path):
    class Twice(L.Callback):
        def on_before_backward(self, *_):
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(SystemExit):
        model = small_awd_lstm(corpus)
        fit(model, corpus, EXACT["one-cycle"], tmp_path, callbacks=[RNNTrainer(12), Twice()], devices=1)
    assert not (tmp_path / "interrupted.ckpt").exists()


def test_files_of_a_run(uninterrupted, corpus, tmp_path):
    recipe, _, _ = uninterrupted
    model, history = train_awd_lstm(corpus, replace(recipe, epochs=1), tmp_path, devices=1)
    assert (tmp_path / "losses.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "vocabulary.txt").read_text().split() == corpus.vocabulary.words
    assert list((tmp_path / "tensorboard").glob("events.out.tfevents.*"))
    for name in ("best", "last"):
        assert (tmp_path / f"{name}.ckpt").exists()
        loaded = AWDLSTM(model.config)
        safetensors.torch.load_model(loaded, tmp_path / f"{name}.safetensors")
        assert_same_parameters(loaded, model, rtol=0, atol=0)
        assert loaded.decoder.weight is loaded.encoder.weight
    assert len(history.valid) == 1 and history.tokens == 4 * (1500 // 4)
    assert set(history.valid[0]) == {"step", "val_loss", "val_perplexity", "val_word_perplexity", "val_accuracy"}


def test_best_and_last_differ_where_the_loss_rises(corpus, tmp_path):
    class Spoil(L.Callback):
        def on_train_epoch_start(self, trainer, module):
            if trainer.current_epoch == 1:  # from here on no step mends it
                kept.extend(p.detach().clone() for p in module.model.parameters())
                module.model.decoder.weight.data *= 1000

    kept, model = [], small_awd_lstm(corpus)
    history = fit(model, corpus, EXACT["one-cycle"], tmp_path, callbacks=[RNNTrainer(12), Spoil()], devices=1)
    losses = [v["val_loss"] for v in history.valid]
    assert min(losses) == losses[0]
    for name, expected in (("best", kept), ("last", model.parameters())):
        loaded = AWDLSTM(model.config)
        safetensors.torch.load_model(loaded, tmp_path / f"{name}.safetensors")
        assert all(map(torch.equal, loaded.parameters(), expected))
