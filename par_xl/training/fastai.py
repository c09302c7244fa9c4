"""The RNN training rules of awd-lstm-lm for a fastai (2.x) ``Learner``. Needs the extra ``par_xl[fastai]``."""

from typing import Any

try:
    from fastai.callback.core import Callback
except ImportError as error:
    raise ImportError("par_xl.training.fastai needs fastai 2: pip install 'par_xl[fastai]'") from error

from par_xl.ops import ar_tar_loss
from par_xl.training.rnn_trainer import last_layer


class RNNTrainer(Callback):
    """What :class:`par_xl.training.RNNTrainer` is for Lightning, in place of ``rnn_cbs(alpha, beta)``::

        Learner(dls, model, cbs=RNNTrainer(bptt=72, alpha=2, beta=1))

    The model returns ``(output, raw_outputs, outputs)``, each of the last two a tensor ``(B, T, d)`` or a sequence by
    layer, and has ``reset()``. Like fastai's own callbacks it adds to ``loss_grad`` alone, so that the loss shown stays
    the cross-entropy. Unlike them it looks at the number of time steps, not of sequences, for T = 1.

    Args:
        bptt: the window length for which the learning rate is meant; an input is ``(B, T)``.
        alpha: weight of AR.
        beta: weight of TAR.
    """

    def __init__(self, bptt: int, alpha: float = 2.0, beta: float = 1.0):
        self.bptt, self.alpha, self.beta = bptt, alpha, beta
        self._rates: list[Any] = []

    def before_train(self) -> None:
        self.learn.model.reset()

    def before_validate(self) -> None:
        self.learn.model.reset()

    def after_pred(self) -> None:
        self.learn.pred, raw, dropped = self.learn.pred
        self._raw, self._dropped = last_layer(raw), last_layer(dropped)

    def after_loss(self) -> None:
        if self.learn.training and (self.alpha or self.beta):
            penalty = ar_tar_loss(self._dropped, self._raw, self.alpha, self.beta)
            self.learn.loss_grad = self.learn.loss_grad + penalty
        del self._raw, self._dropped

    def before_step(self) -> None:
        self._rates = [hyper["lr"] for hyper in self.learn.opt.hypers]
        for hyper in self.learn.opt.hypers:
            hyper["lr"] = hyper["lr"] * self.learn.xb[0].shape[1] / self.bptt

    def after_step(self) -> None:
        for hyper, rate in zip(self.learn.opt.hypers, self._rates, strict=True):
            hyper["lr"] = rate
