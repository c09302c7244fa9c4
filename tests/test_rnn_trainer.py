"""RNNTrainer, for Lightning and for fastai, against awd-lstm-lm's training step written out by hand."""

import importlib
import sys
from types import SimpleNamespace

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from training_helpers import IGNORED, assert_same_parameters, loader, trainer

from par_xl.models import AWDLSTM, AWDLSTMConfig
from par_xl.training import LanguageModel, RNNTrainer

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings(*IGNORED)]
B, D, V = 3, 4, 7


class TupleModel(nn.Module):
    """A model of fastai's kind: (logits, raw outputs by layer, dropped outputs by layer), state behind reset()."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.first, self.last = nn.Embedding(V, D), nn.Linear(D, D), nn.Linear(D, V)
        self.mask = (torch.arange(D) % 2) * 2.0  # a fixed dropout mask
        self.resets = 0

    def reset(self):
        self.resets += 1

    def forward(self, tokens):
        raws = [self.embedding(tokens), torch.tanh(self.first(self.embedding(tokens)))]
        outputs = [raw * self.mask for raw in raws]
        return self.last(outputs[-1]), raws, outputs


class TupleModule(L.LightningModule):
    def __init__(self, lr=0.5):
        super().__init__()
        self.model, self.lr, self.seen, self.losses = TupleModel(), lr, [], []

    def training_step(self, batch, _):
        prediction = self.model(batch[0])
        self.seen.append(type(prediction))
        loss = F.cross_entropy(prediction.flatten(0, 1), batch[1].flatten())
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, _):
        self.seen.append(type(self.model(batch[0])))

    def on_train_batch_end(self, outputs, batch, _):
        self.losses.append(outputs["loss"].item())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.lr)


def batch(steps, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(V, (B, steps), generator=generator), torch.randint(V, (B, steps), generator=generator)


def sgd_by_hand(model, batches, bptt, alpha, beta, lr=0.5, accumulate=1):
    """awd-lstm-lm's training step, batch first."""
    losses = []
    for i, (tokens, targets) in enumerate(batches):
        prediction, raws, outputs = model(tokens)
        loss = F.cross_entropy(prediction.flatten(0, 1), targets.flatten())
        losses.append(loss.item())
        loss = loss + alpha * outputs[-1].pow(2).mean()
        if tokens.shape[1] > 1:
            loss = loss + beta * (raws[-1][:, 1:] - raws[-1][:, :-1]).pow(2).mean()
        (loss / accumulate).backward()
        if (i + 1) % accumulate == 0:
            with torch.no_grad():
                for p in model.parameters():
                    if p.grad is not None:
                        p -= lr * tokens.shape[1] / bptt * p.grad
                        p.grad = None
    return losses


class TestRNNTrainer:
    @pytest.mark.parametrize(("alpha", "beta"), [(2.0, 1.0), (0.7, 0.0), (0.0, 3.0), (0.0, 0.0)])
    def test_is_awd_lstms_training_step(self, alpha, beta):
        """AR on the dropped and TAR on the raw output of the last layer along time, and the rate scaled by T/bptt."""
        batches = [batch(6, 0), batch(10, 1), batch(3, 2)]
        module, by_hand = TupleModule(), TupleModel()
        trainer(RNNTrainer(bptt=8, alpha=alpha, beta=beta)).fit(module, loader(batches))
        losses = sgd_by_hand(by_hand, batches, 8, alpha, beta)
        assert_same_parameters(module.model, by_hand)
        # what is reported is the cross-entropy alone
        assert module.losses == pytest.approx(losses, rel=1e-6)

    def test_a_window_of_one_step(self):
        module, by_hand = TupleModule(), TupleModel()
        trainer(RNNTrainer(bptt=2, alpha=2, beta=1)).fit(module, loader([batch(1)]))
        sgd_by_hand(by_hand, [batch(1)], 2, 2, 1)
        assert_same_parameters(module.model, by_hand)
        assert all(p.isfinite().all() for p in module.parameters())

    def test_gradient_accumulation(self):
        batches = [batch(5, seed) for seed in range(4)]
        module, by_hand = TupleModule(), TupleModel()
        trainer(RNNTrainer(bptt=5), accumulate_grad_batches=2).fit(module, loader(batches))
        sgd_by_hand(by_hand, batches, 5, 2.0, 1.0, accumulate=2)
        assert_same_parameters(module.model, by_hand)

    def test_the_penalty_is_multiplied_by_the_fp16_scaler(self):
        module, callback = TupleModule(), RNNTrainer(bptt=5)
        module.log = lambda *_: None
        scaler = SimpleNamespace(scale=lambda x: 1024 * x)
        fake = SimpleNamespace(accumulate_grad_batches=1, precision_plugin=SimpleNamespace(scaler=scaler))
        callback.setup(fake, module, "fit")
        prediction = module.model(batch(5)[0])
        loss = 1024 * F.cross_entropy(prediction.flatten(0, 1), batch(5)[1].flatten())
        callback.on_before_backward(fake, module, loss)
        loss.backward()
        by_hand = TupleModel()
        sgd_by_hand(by_hand, [batch(5)], 5, 2.0, 1.0, lr=1.0)
        with torch.no_grad():
            for p in module.model.parameters():
                p -= p.grad / 1024
        assert_same_parameters(module.model, by_hand)

    def test_only_the_true_output_reaches_the_steps(self):
        module = TupleModule()
        trainer(RNNTrainer(5), num_sanity_val_steps=1).fit(module, loader([batch(5)]), loader([batch(5)]))
        assert module.seen == [torch.Tensor] * 3
        assert isinstance(module.model(batch(5)[0]), tuple)  # the hook is gone after the run

    def test_resets_at_each_epoch_and_validation(self):
        module = TupleModule()
        trainer(RNNTrainer(5), max_epochs=3, val_check_interval=2).fit(
            module, loader([batch(5)] * 4), loader([batch(5)])
        )
        assert module.model.resets == 3 + 3 * 2

    def test_the_rate_is_restored_before_a_scheduler_sees_it(self):
        class Scheduled(TupleModule):
            rates = []

            def configure_optimizers(self):
                optimizer = super().configure_optimizers()
                scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
                return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

            def on_train_batch_start(self, *_):
                self.rates.append(self.optimizers().param_groups[0]["lr"])

        module = Scheduled()
        trainer(RNNTrainer(bptt=10)).fit(module, loader([batch(5), batch(20), batch(10)]))
        assert module.rates == [0.5, 0.25, 0.125]

    def test_with_awd_lstm_and_its_output_object(self):
        torch.manual_seed(0)
        model = AWDLSTM(AWDLSTMConfig(V, 6, 8, n_layers=2, weight_drop=0.0))
        by_hand = AWDLSTM(AWDLSTMConfig(V, 6, 8, n_layers=2, weight_drop=0.0))
        by_hand.load_state_dict(model.state_dict())

        class Seed(L.Callback):
            def on_train_batch_start(self, *_):
                torch.manual_seed(1)

        trainer(RNNTrainer(bptt=5), Seed()).fit(LanguageModel(model, optimizer="sgd", lr=0.5), loader([batch(5)]))
        torch.manual_seed(1)
        output = by_hand(*batch(5))
        raw, dropped = output.raw_outputs[-1], output.outputs[-1]
        assert not torch.equal(raw, dropped)
        (output.loss + 2 * dropped.pow(2).mean() + raw.diff(dim=1).pow(2).mean()).backward()
        torch.optim.SGD(by_hand.parameters(), 0.5).step()
        assert_same_parameters(model, by_hand)

    def test_with_a_compiled_model(self):
        """The hook is then inside what is compiled."""
        options = dict(n_layers=2, dropout=0.0, dropout_hidden=0.0, dropout_input=0.0)
        config = AWDLSTMConfig(V, 6, 8, **options, dropout_embedding=0.0, weight_drop=0.0)
        plain, compiled = AWDLSTM(config), AWDLSTM(config)
        compiled.load_state_dict(plain.state_dict())
        compiled.compile(backend="aot_eager")
        for model in (plain, compiled):
            module = LanguageModel(model, optimizer="sgd", lr=0.5)
            trainer(RNNTrainer(bptt=5, alpha=3.0, beta=2.0)).fit(module, loader([batch(5, seed) for seed in range(3)]))
        assert_same_parameters(plain, compiled)

    def test_a_step_that_does_not_call_the_model_is_an_error(self):
        module = TupleModule()
        module.training_step = lambda batch: module.model.last(torch.ones(D)).sum()
        with pytest.raises(RuntimeError, match="model was not called"):
            trainer(RNNTrainer(5)).fit(module, loader([batch(5)]))


@pytest.fixture
def fastai(monkeypatch):
    """par_xl.training.fastai on the real fastai, or else on the one class that it imports."""
    try:
        import fastai.callback.core  # noqa: F401
    except ImportError:
        for name in ("fastai", "fastai.callback", "fastai.callback.core"):
            monkeypatch.setitem(sys.modules, name, SimpleNamespace(Callback=object, __path__=[]))
    monkeypatch.delitem(sys.modules, "par_xl.training.fastai", raising=False)
    yield importlib.import_module("par_xl.training.fastai")
    sys.modules.pop("par_xl.training.fastai", None)


def test_fastai_callback_is_awd_lstms_training_step(fastai):
    """Driven through the events of fastai's Learner._do_one_batch in their order."""
    batches = [batch(6, 0), batch(10, 1), batch(1, 2)]
    model, by_hand = TupleModel(), TupleModel()
    callback = fastai.RNNTrainer(bptt=8)
    learn = callback.learn = SimpleNamespace(model=model, opt=SimpleNamespace(hypers=[{"lr": 0.5}]), training=True)
    callback.before_train()
    losses = []
    for tokens, targets in batches:
        learn.xb, learn.pred = (tokens,), model(tokens)
        callback.after_pred()
        learn.loss_grad = F.cross_entropy(learn.pred.flatten(0, 1), targets.flatten())
        losses.append(learn.loss_grad.item())
        callback.after_loss()
        learn.loss_grad.backward()
        callback.before_step()
        with torch.no_grad():
            for p in model.parameters():
                p -= learn.opt.hypers[0]["lr"] * p.grad
                p.grad = None
        callback.after_step()
        assert learn.opt.hypers[0]["lr"] == 0.5
    assert losses == pytest.approx(sgd_by_hand(by_hand, batches, 8, 2.0, 1.0))
    assert_same_parameters(model, by_hand)
    learn.training = False
    callback.before_validate()
    learn.pred, before = model(batches[0][0]), torch.tensor(1.0)
    callback.after_pred()
    learn.loss_grad = before
    callback.after_loss()
    assert learn.loss_grad is before and model.resets == 2


def test_fastai_missing_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "fastai", None)
    monkeypatch.delitem(sys.modules, "par_xl.training.fastai", raising=False)
    with pytest.raises(ImportError, match=r"par_xl\[fastai\]"):
        importlib.import_module("par_xl.training.fastai")
