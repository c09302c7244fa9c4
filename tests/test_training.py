"""par_xl.training: what the LightningModule measures and carries, weight averaging, files, recipes."""

import lightning as L
import pytest
import safetensors.torch
import torch
from torch import nn
from training_helpers import IGNORED, loader, small_awd_lstm, small_corpus, trainer

from par_xl.training import (
    NTASGD,
    RECIPES,
    TRANSFORMER_XL_RECIPES,
    History,
    LanguageModel,
    LanguageModelData,
    SafetensorsCheckpointIO,
    override,
    plot_losses,
)

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings(*IGNORED)]


@pytest.fixture(scope="module")
def corpus():
    return small_corpus()


class TestLanguageModel:
    def test_metrics_are_over_all_tokens(self, corpus):
        """The mean over tokens, not over windows: the last window of the split is shorter."""
        model = small_awd_lstm(corpus)
        run = trainer()
        data = LanguageModelData(corpus, batch_size=4, bptt=20)
        (metrics,) = run.validate(LanguageModel(model), data, verbose=False)
        tokens = corpus.valid[:300].view(4, 75).long()
        targets = corpus.valid[1:301].view(4, 75).long()
        output = model.eval()(tokens, targets)
        assert metrics["val_loss"] == pytest.approx(output.loss.item(), rel=1e-5)
        assert metrics["val_perplexity"] == pytest.approx(output.loss.exp().item(), rel=1e-5)
        assert metrics["val_accuracy"] == pytest.approx((model.predict(output.hidden) == targets).float().mean().item())

    def test_memory_is_carried_through_an_epoch_and_empty_at_the_next(self, corpus):
        class Spy(L.Callback):
            memories = []

            def on_train_batch_start(self, trainer, module, *_):
                self.memories.append(module._memory.get(True))

            def on_train_batch_end(self, trainer, module, *_):
                self.after = module._memory[True]

            def on_validation_end(self, trainer, module):
                assert module._memory[True] is self.after  # training's own memory outlives a validation

        spy = Spy()
        run = trainer(spy, max_epochs=2, val_check_interval=5)
        run.fit(LanguageModel(small_awd_lstm(corpus)), LanguageModelData(corpus, batch_size=5, bptt=30))
        assert [memory is None for memory in spy.memories] == ([True] + [False] * 9) * 2
        assert spy.memories[1][0][0].shape == (1, 5, 8)

    def test_one_cycle_has_exactly_the_steps_of_random_windows(self, corpus):
        module = LanguageModel(small_awd_lstm(corpus), lr=0.1, schedule="one-cycle")
        data = LanguageModelData(corpus, batch_size=4, bptt=12, random_length=True)

        class LastRate(L.Callback):
            def on_train_batch_start(self, trainer, *_):
                self.rate = trainer.optimizers[0].param_groups[0]["lr"]

        run = trainer(last := LastRate(), max_epochs=3, reload_dataloaders_every_n_epochs=1)
        run.fit(module, data)
        assert run.global_step == data.total_steps(3)
        assert len({data.streams(corpus.train, True).windows(epoch) for epoch in range(9)}) > 1
        assert last.rate == pytest.approx(0.1 / 25 / 1e4)

    def test_unknown_names_are_errors(self, corpus):
        with pytest.raises(ValueError, match="adamw.*'adam'"):
            LanguageModel(small_awd_lstm(corpus), optimizer="adam")
        with pytest.raises(ValueError, match="one-cycle, cosine, not 'step'"):
            LanguageModel(small_awd_lstm(corpus), schedule="step")
        with pytest.raises(ValueError, match="no test split"):
            LanguageModelData(corpus, 4, 5).test_dataloader()


def test_safetensors_are_removed_with_their_checkpoint(tmp_path):
    io = SafetensorsCheckpointIO()
    io.save_checkpoint({"state_dict": {"model.w": torch.ones(2), "other": torch.ones(1)}}, tmp_path / "a.ckpt")
    assert set(safetensors.torch.load_file(tmp_path / "a.safetensors")) == {"w"}
    io.remove_checkpoint(tmp_path / "a.ckpt")
    assert not list(tmp_path.iterdir())


class Scripted(L.LightningModule):
    """One weight, a constant gradient of -1 and given validation losses."""

    def __init__(self, losses):
        super().__init__()
        self.w, self.script, self.evaluated = nn.Parameter(torch.zeros(())), list(losses), []

    def training_step(self, *_):
        return -self.w

    def validation_step(self, *_):
        self.evaluated.append(self.w.item())
        self.log("val_loss", self.script[self.current_epoch])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 1.0)


class TestNTASGD:
    def run(self, losses, nonmono):
        module = Scripted(losses)
        train, valid = loader([torch.zeros(1)] * 2), loader([torch.zeros(1)])
        trainer(NTASGD(nonmono), max_epochs=len(losses)).fit(module, train, valid)
        return module

    def test_averages_from_the_trigger_on(self):
        """w is the step number: 4 is worse than 3 two before, so steps 9 .. 12 are averaged."""
        module = self.run([3.0, 2.0, 2.5, 4.0, 9.0, 9.0], nonmono=2)
        assert module.evaluated == [2, 4, 6, 8, (9 + 10) / 2, (9 + 10 + 11 + 12) / 4]
        assert module.w.item() == (9 + 10 + 11 + 12) / 4

    def test_does_nothing_while_the_loss_falls(self):
        module = self.run([3.0, 2.0, 2.5, 2.9], nonmono=2)
        assert module.evaluated == [2, 4, 6, 8] and module.w.item() == 8

    def test_the_best_before_the_last_few_counts(self):
        """After four validations only the first counts for nonmono = 3 (awd-lstm-lm: len > nonmono)."""
        assert self.run([3.0, 1.0, 1.0, 2.9, 2.0, 2.0, 2.0], nonmono=3).evaluated[-1] == (13 + 14) / 2
        assert self.run([3.0, 1.0, 1.0, 2.9, 2.0, 0.9, 0.9], nonmono=3).evaluated[-1] == 14

    def test_is_torchs_asgd(self):
        """The average of torch.optim.ASGD(t0=0, lambd=0), which leaves out its first step."""
        p = nn.Parameter(torch.tensor(7.0))
        asgd = torch.optim.ASGD([p], lr=1.0, t0=0, lambd=0, alpha=0)
        for _ in range(5):
            p.grad = torch.tensor(-1.0)
            asgd.step()
        module = self.run([3.0, 2.0, 2.5, 4.0, 9.0, 9.0], nonmono=2)
        assert asgd.state[p]["ax"].item() == module.w.item()


def test_plot_of_several_runs(tmp_path):
    histories = {}
    for name in ("a", "b"):
        histories[name] = History()
        histories[name].train, histories[name].valid = [(10, 3.0), (20, 2.0)], [{"step": 20, "val_loss": 2.5}]
    plot_losses(histories, tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_override():
    recipe = override(RECIPES["wikitext-2"], {"lr": "1e-2", "random_length": "false", "d_model": "32", "epochs": 2})
    assert (recipe.lr, recipe.random_length, recipe.epochs) == (0.01, False, 2)
    assert recipe.model == {"dropout_hidden": 0.2, "d_model": 32}
    assert RECIPES["wikitext-2"].lr == 30.0 and "d_model" not in RECIPES["wikitext-2"].model
    for bad, message in (({"depth": "3"}, "no option 'depth'"), ({"lr": "fast"}, "lr must be of type float")):
        with pytest.raises(ValueError, match=message):
            override(recipe, bad)
    with pytest.raises(ValueError, match="no option 'vocab_size'"):
        override(recipe, {"vocab_size": "3"})
    lists = [override(recipe, {"cutoffs": given}).model["cutoffs"] for given in ("", "9", "9,20", (9, 20))]
    assert lists == [(), (9,), (9, 20), (9, 20)]
    for bad in ("9,,20", "9,true", 9):
        with pytest.raises(ValueError, match=f"cutoffs must be int values with commas between them, not {bad!r}"):
            override(recipe, {"cutoffs": bad})


def test_override_reads_the_elements_of_a_tuple_as_its_field_says():
    recipe = TRANSFORMER_XL_RECIPES["wikitext-2"]
    read = [override(recipe, {"tie_projs": given}).model["tie_projs"] for given in ("true", "False,1", "", (True, 0))]
    assert read == [(True,), (False, True), (), (True, False)] and all(type(x) is bool for tied in read for x in tied)
    for bad in ("maybe", "true,2", "true,"):
        with pytest.raises(ValueError, match=f"tie_projs must be bool values with commas between them, not {bad!r}"):
            override(recipe, {"tie_projs": bad})
