"""What the tests of par_xl.training share."""

import signal

import lightning as L
import torch

from par_xl.data import Corpus, load_corpus
from par_xl.models import AWDLSTM, AWDLSTMConfig

IGNORED = ("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")  # Lightning's, on its own code


def trainer(*callbacks, **options):
    quiet = dict(enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, logger=False)
    defaults = dict(accelerator="cpu", devices=1, max_epochs=1, num_sanity_val_steps=0)
    return L.Trainer(callbacks=list(callbacks), **{**quiet, **defaults, **options})


def loader(batches):
    return torch.utils.data.DataLoader(batches, batch_size=None)


def assert_same_parameters(one, other, **tolerance):
    for (name, p), q in zip(one.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


def small_corpus():
    """Some of human-numbers."""
    whole = load_corpus("human-numbers")
    return Corpus(whole.vocabulary, whole.train[:1501], whole.valid[:301])


def small_awd_lstm(corpus):
    torch.manual_seed(0)
    return AWDLSTM(AWDLSTMConfig(len(corpus.vocabulary), 8, 8, n_layers=2))


class InterruptAt(L.Callback):
    """A Ctrl-C in the middle of a step."""

    def __init__(self, step):
        self.step = step

    def on_before_backward(self, trainer, *_):
        if trainer.global_step == self.step:
            signal.raise_signal(signal.SIGINT)  # to this thread: os.kill may wake another one, later
