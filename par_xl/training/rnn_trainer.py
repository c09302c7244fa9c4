"""The RNN training rules of awd-lstm-lm as a Lightning callback; ``par_xl.training.fastai`` has the same for fastai."""

import dataclasses
from typing import Any

import lightning as L
from torch import Tensor, nn
from torch.optim import Optimizer

from par_xl.ops import ar_tar_loss


def last_layer(outputs: Any) -> Tensor:
    """AR and TAR are on the last layer alone."""
    return outputs[-1] if isinstance(outputs, (list, tuple)) else outputs


class RNNTrainer(L.Callback):
    """Everything beside the cross-entropy that training AWD-LSTM takes.

    - Resets the hidden state at the begin of every training epoch and of every validation: ``reset()`` of the
      LightningModule, or else of its ``model``.
    - Keeps the raw and the dropped outputs that ``pl_module.model`` returns and hands on the true output alone. The
      model returns ``(output, raw_outputs, outputs)``, as in fastai, or an object with the attributes ``raw_outputs``
      and ``outputs``, as :class:`par_xl.models.AWDLSTM` does; each is a tensor ``(B, T, d)`` or a sequence by layer.
    - Adds ``alpha * mean(dropped^2) + beta * mean((raw[:, 1:] - raw[:, :-1])^2)`` of the last layer
      (:func:`par_xl.ar_tar_loss`) to the loss before the backward, in training only, and logs it as ``ar_tar``. The
      loss that ``training_step`` logged stays the cross-entropy.
    - Scales the learning rate of each optimiser step by ``T / bptt``: a token then counts the same in a short window,
      whose mean loss weighs it more. T is the batch's real length (awd-lstm-lm takes the drawn one even for an epoch's
      last window, which the data cuts short). Schedulers see the rate unscaled.

    Args:
        bptt: the window length for which the learning rate is meant; batches are ``(tokens (B, T), ...)``.
        alpha: weight of AR.
        beta: weight of TAR.

    Source: awd-lstm-lm main.py; fastai's RNNTrainer (1.x), RNNCallback and RNNRegularizer (2.x).
    """

    def __init__(self, bptt: int, alpha: float = 2.0, beta: float = 1.0):
        self.bptt, self.alpha, self.beta = bptt, alpha, beta
        self._raw: Tensor | None = None
        self._dropped: Tensor | None = None
        self._scale = 1.0
        self._rates: list[Any] = []
        self._handles: list[Any] = []

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        model: Any = getattr(pl_module, "model", pl_module)
        self._handles.append(model.register_forward_hook(self._keep_outputs))

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for optimizer in trainer.optimizers:
            self._handles.append(optimizer.register_step_pre_hook(self._scale_rates))
            self._handles.append(optimizer.register_step_post_hook(self._restore_rates))

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        while self._handles:
            self._handles.pop().remove()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self.teardown(trainer, pl_module, "fit")

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        _reset(pl_module)

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        _reset(pl_module)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._scale = batch[0].shape[1] / self.bptt

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        raw, dropped = self._raw, self._dropped
        self._raw = self._dropped = None
        if not (self.alpha or self.beta):
            return
        if raw is None or dropped is None:
            raise RuntimeError("RNNTrainer: pl_module.model was not called in this training step")
        penalty = ar_tar_loss(dropped, raw, self.alpha, self.beta)
        pl_module.log("ar_tar", penalty.detach())
        # The loss is by now divided for gradient accumulation and multiplied by the fp16 scaler. In place, because the
        # hook cannot return another one; what is kept for the logs is a clone.
        penalty = penalty / trainer.accumulate_grad_batches
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        loss.add_(penalty if scaler is None else scaler.scale(penalty))

    def _keep_outputs(self, model: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            true_output, raw, dropped = output
        else:
            raw, dropped = output.raw_outputs, output.outputs
            true_output = dataclasses.replace(output, raw_outputs=(), outputs=())
        if model.training:
            self._raw, self._dropped = last_layer(raw), last_layer(dropped)
        return true_output

    def _scale_rates(self, optimizer: Optimizer, *_: Any) -> None:
        self._rates = [group["lr"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] * self._scale

    def _restore_rates(self, optimizer: Optimizer, *_: Any) -> None:
        for group, rate in zip(optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate


def _reset(pl_module: L.LightningModule) -> None:
    (pl_module if hasattr(pl_module, "reset") else pl_module.model).reset()  # type: ignore[operator, union-attr]
