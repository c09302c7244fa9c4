"""Architecture search: trains a SuperNet's weights and the probabilities of its blocks, and records the latter."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import lightning as L
import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor, nn

from par_xl.data import ContiguousStreams, Corpus
from par_xl.models import ModelOutput, ParConfig, ParSuperNet
from par_xl.training.architecture_history import ArchitectureHistory, StopWhenStable
from par_xl.training.architecture_pictures import CHOICES
from par_xl.training.checkpoint import from_all_ranks, of_this_rank
from par_xl.training.clip_apart import ClipApart
from par_xl.training.fit import Recipe, fit, strategy_for_unused
from par_xl.training.history import History
from par_xl.training.language_model import Batch, LanguageModel
from par_xl.training.latency import LatencyPenalty, block_seconds
from par_xl.training.schedules import TemperatureSchedule, one_of, temperature_at


@dataclass
class SearchRecipe(Recipe):
    """A recipe for a :class:`ParSuperNet`, with the model's options, fields of :class:`ParConfig`, and

    Attributes:
        temperature: "exponential", "linear" or "constant", from ``temperature_start`` to ``temperature_end`` at the
            last step; see :func:`temperature_at`.
        two_optimizers: the architecture has an optimiser of its own, as in the paper: Adam with ``architecture_lr`` and
            ``architecture_decay``. False, as in the published project: the weights' learns both, at every step.
        freeze: for so many steps only the weights learn.
        architecture_share: of the steps after that, spread evenly, those in which the architecture learns too.
        held_out: the share of the train split, its end, that only the architecture learns from, on batches of its own
            (Liu et al.: DARTS, first order); 0: it learns from the batches of the weights.
        latency_target: the share of the all-attention network's time, measured on this device, above which the
            architecture is penalised (:class:`LatencyPenalty`); 0 does not measure.
        latency_weight: of the penalty, beside the loss in nats a token.
        patience: stop after so many validations in a row with the same derived pattern, the frozen ones not counted; 0
            does not stop.

    ``freeze``, ``architecture_share`` and ``held_out`` are of the two optimisers. ``clip`` holds for the gradients of
    the weights and of the architecture apart.
    """

    config_class: ClassVar[type] = ParConfig

    temperature: TemperatureSchedule = "exponential"
    temperature_start: float = 1.0
    temperature_end: float = 0.1
    two_optimizers: bool = True
    architecture_lr: float = 1e-2
    architecture_decay: float = 5e-4
    freeze: int = 0
    architecture_share: float = 0.2
    held_out: float = 0.0
    latency_target: float = 0.0
    latency_weight: float = 1.0
    patience: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("temperature", self.temperature, TemperatureSchedule)
        temperature_at(self.temperature, self.temperature_start, self.temperature_end, 0.0)
        if not (self.architecture_lr > 0 and self.architecture_decay >= 0):
            given = f"{self.architecture_lr} and {self.architecture_decay}"
            raise ValueError(f"architecture_lr must be positive and architecture_decay not negative, not {given}")
        if not 0 < self.architecture_share <= 1:
            raise ValueError(f"architecture_share must be above 0 and at most 1, not {self.architecture_share}")
        if not 0 <= self.held_out < 1:
            raise ValueError(f"held_out must be at least 0 and below 1, not {self.held_out}")
        if self.freeze < 0 or self.patience < 0:
            raise ValueError(f"freeze and patience must not be negative, not {self.freeze} and {self.patience}")
        if self.latency_target < 0 or self.latency_weight < 0:
            given = f"{self.latency_target} and {self.latency_weight}"
            raise ValueError(f"latency_target and latency_weight must not be negative, not {given}")

    def architecture_learns(self, step: int) -> bool:
        """Whether step ``step``, counted from 0, updates the architecture."""
        if not self.two_optimizers:
            return True
        since = step - self.freeze
        return since >= 0 and int((since + 1) * self.architecture_share) > int(since * self.architecture_share)


class ArchitectureSearch(LanguageModel):
    """Trains a :class:`ParSuperNet` by a :class:`SearchRecipe`.

    The two optimisers are two parameter groups of one AdamW: Adam keeps its moments and counts its steps for each
    parameter, and one without a gradient is left alone, so that groups are optimisers of their own, behind one
    backward, one gradient scaler and one checkpoint. The learning rates of both follow the schedule.

    Logs ``temperature``, each block's probabilities and, with a target, the expected ``latency`` as a share of the
    all-attention network's, beside what :class:`LanguageModel` logs.

    Args:
        model: the SuperNet.
        recipe: see there.
        held_out: tokens ``(N,)`` for the architecture alone; None: it learns from the training batches.
    """

    model: ParSuperNet

    def __init__(self, model: ParSuperNet, recipe: SearchRecipe, held_out: Tensor | None = None):
        super().__init__(model, **recipe.optimization())
        self.recipe, self.held_out = recipe, held_out
        self.latency: LatencyPenalty | None = None
        self._block_seconds: list[float] = []
        self._held_out_memory: Any = None
        self._held_out_state: dict[str, Any] | None = None

    def parameter_groups(self) -> list[dict[str, Any]]:
        weights, architecture = list(self.model.weight_parameters()), list(self.model.architecture_parameters())
        if not self.recipe.two_optimizers:
            return [{"params": weights + architecture}]
        own = {"lr": self.recipe.architecture_lr, "weight_decay": self.recipe.architecture_decay}
        return [{"params": weights, "name": "weights"}, {"params": architecture, "name": "architecture", **own}]

    def on_train_start(self) -> None:
        super().on_train_start()
        self._last_step = max(1, self.total_steps() - 1)
        if self.recipe.two_optimizers and self.recipe.freeze > self._last_step:
            steps = self.total_steps()
            raise ValueError(f"freeze must be below the number of steps, {steps}, not {self.recipe.freeze}")
        if self.held_out is not None:
            self._start_held_out(self.held_out)
        if self.recipe.latency_target:
            self._block_seconds = self._block_seconds or self._measured()
            self.latency = LatencyPenalty(self._block_seconds, self.recipe.latency_target, self.recipe.latency_weight)

    def _measured(self) -> list[float]:
        """What the first rank measures, or finds in its table; a resumed search goes on with what it began with."""
        seconds: list[float] = []
        if self.trainer.is_global_zero:
            r, precision = self.recipe, self.trainer.precision_plugin
            with precision.forward_context():
                seconds = block_seconds(self.model, r.batch_size, r.bptt, precision=str(precision.precision))
        return self.trainer.strategy.broadcast(seconds)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        r = self.recipe
        progress = self.global_step / self._last_step
        self.model.temperature = temperature_at(r.temperature, r.temperature_start, r.temperature_end, progress)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        if self.held_out is not None and self.recipe.architecture_learns(self.global_step):
            batch = self._next_held_out()
            with _constant(self.model.weight_parameters()):
                output = self.model(*batch, self._held_out_memory)
            self._held_out_memory = output.memory
            assert output.loss is not None
            self.log("held_out_loss", output.loss)
            loss = loss + output.loss
        if self.latency is not None and self.recipe.architecture_learns(self.global_step):
            loss = loss + self.latency(self.model.probabilities())
        if (self.global_step + 1) % self.trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            self.log("temperature", self.model.temperature)
            probabilities = self.model.probabilities().detach()
            if self.latency is not None:
                self.log("latency", self.latency.share(probabilities))
            for i, row in enumerate(probabilities):
                names = (f"block{i + 1}/{choice}" for choice in CHOICES)
                self.log_dict(dict(zip(names, row, strict=True)))
        return loss

    def _call(self, tokens: Tensor, targets: Tensor, memory: Any) -> ModelOutput:
        if not self.training:
            # The chosen branches alone are computed: to torch.compile each pattern would be a graph of its own.
            with torch.compiler.set_stance("force_eager"):
                return self.model(tokens, targets, memory)
        if self.held_out is None and self.recipe.architecture_learns(self.global_step):
            return self.model(tokens, targets, memory)
        with _constant(self.model.architecture_parameters()):
            return self.model(tokens, targets, memory)

    def _start_held_out(self, tokens: Tensor) -> None:
        """From their begin, or from where the checkpoint left them."""
        streams = self.recipe.batch_size * self.trainer.world_size
        if len(tokens) <= streams:
            raise ValueError(f"held_out must leave more than {streams} tokens, one a stream, not {len(tokens)}")
        self._held_out_streams: ContiguousStreams = self.trainer.datamodule.streams(tokens)  # type: ignore[attr-defined]
        if self._held_out_state is not None:
            self._held_out_streams.load_state_dict(self._held_out_state)
        self._held_out_batches = iter(self._held_out_streams)
        self._held_out_memory = move_data_to_device(self._held_out_memory, self.device)

    def _next_held_out(self) -> Batch:
        """Windows of the held-out tokens, again from their begin, with an empty memory, when they are used up."""
        batch = next(self._held_out_batches, None)
        if batch is None:
            self._held_out_batches, self._held_out_memory = iter(self._held_out_streams), None
            batch = next(self._held_out_batches)
        return move_data_to_device(batch, self.device)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        if self._block_seconds:
            checkpoint["block_seconds"] = self._block_seconds
        if self.held_out is not None:
            checkpoint["held_out_position"] = self._held_out_streams.state_dict()
            memory = move_data_to_device(self._held_out_memory, "cpu")
            checkpoint["held_out_memory"] = from_all_ranks(memory)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self._block_seconds = checkpoint.get("block_seconds", [])
        if "held_out_position" in checkpoint:
            self._held_out_state = checkpoint["held_out_position"]
            self._held_out_memory = of_this_rank(checkpoint["held_out_memory"], self.trainer)


@contextmanager
def _constant(parameters: Iterator[nn.Parameter]) -> Iterator[None]:
    """What is computed inside gives ``parameters`` no gradient."""
    chosen = list(parameters)
    for p in chosen:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in chosen:
            p.requires_grad_(True)


# The published project's small configuration (base_model.sh), for pieces of WikiText-2
_WIKITEXT_2 = SearchRecipe(
    epochs=20,
    eval_every=1000,
    batch_size=32,
    bptt=32,
    lr=2e-3,
    schedule="cosine",
    warmup=400,
    clip=0.25,
    freeze=1000,
    model=dict(n_layer=6, n_head=4, d_model=128, d_inner=512, dropout=0.1, mem_len=16, cutoffs=(250, 2500)),
)
SEARCH_RECIPES = {
    # Small enough for a minute on a CPU
    "human-numbers": SearchRecipe(
        epochs=8,
        batch_size=16,
        bptt=64,
        lr=4e-3,
        schedule="cosine",
        warmup=20,
        clip=0.25,
        freeze=30,
        architecture_lr=5e-2,
        architecture_share=0.5,
        model=dict(n_layer=4, n_head=4, d_model=64, d_inner=128, dropout=0.1, mem_len=64),
    ),
    "wikitext-2": _WIKITEXT_2,
    # Text as bytes ("bytes:FOLDER"), of which about four are a piece
    "bytes": replace(_WIKITEXT_2, bptt=128, model={**_WIKITEXT_2.model, "mem_len": 64, "cutoffs": ()}),
    # With the published optimisation: one Adam, its rate and schedule, no clipping
    "published": replace(_WIKITEXT_2, lr=1e-4, warmup=4000, clip=0.0, freeze=0, two_optimizers=False),
}


def search_par(corpus: Corpus, recipe: SearchRecipe, out: str | Path, **options: Any) -> tuple[ParSuperNet, History]:
    """Seed, build and search; ``options`` are those of :func:`fit`.

    Leaves ``architecture.json``, ``.png`` and ``.gif``, the probabilities over the steps, in ``out`` too. With a mixed
    precision the choices, their gradients and their samples stay fp32. ``compile`` is for soft samples (not ``hard``);
    validations are not compiled.
    """
    L.seed_everything(recipe.seed, verbose=False)
    model = ParSuperNet(ParConfig(vocab_size=len(corpus.vocabulary), **{"seed": recipe.seed, **recipe.model}))
    if model.config.hard and options.get("compile"):
        raise ValueError("compile must be False with hard samples: each combination of choices is a graph of its own")
    held_out = None
    if recipe.held_out and recipe.two_optimizers:
        cut = int(len(corpus.train) * (1 - recipe.held_out))
        held_out = corpus.train[cut:]
        corpus = replace(corpus, train=corpus.train[:cut])
    module = ArchitectureSearch(model, recipe, held_out)
    callbacks: list[L.Callback] = [
        ClipApart(recipe.clip, ParSuperNet.architecture_parameters),
        ArchitectureHistory(Path(out)),
        *([StopWhenStable(recipe.patience, recipe.freeze)] if recipe.patience else []),
    ]
    options = {"strategy": strategy_for_unused(options.get("devices", "auto")), **options}
    history = fit(model, corpus, replace(recipe, clip=0.0), out, module=module, callbacks=callbacks, **options)
    return model, history
