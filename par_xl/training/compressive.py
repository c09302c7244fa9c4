"""Recipes for the Compressive Transformer, and a run by one of them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, cast

import lightning as L
import torch
from torch import Tensor

from par_xl.data import Corpus
from par_xl.models import CompressiveConfig, CompressiveTransformer, ModelOutput
from par_xl.nn.compressive_memory import MemoryState
from par_xl.training.clip_apart import ClipApart
from par_xl.training.fit import Recipe, fit, strategy_for_unused
from par_xl.training.history import History
from par_xl.training.language_model import LanguageModel
from par_xl.training.transformer_xl import TRANSFORMER_XL_RECIPES


@dataclass
class CompressiveRecipe(Recipe):
    """A recipe with the model's options, fields of :class:`CompressiveConfig`.

    ``clip`` holds for the gradients of the task and of the compressors apart: a common norm would couple the losses.
    """

    config_class: ClassVar[type] = CompressiveConfig


def _from_transformer_xl(name: str, **model: Any) -> CompressiveRecipe:
    """Transformer-XL's recipe with the paper's clipping and more or other options of the model."""
    base = TRANSFORMER_XL_RECIPES[name]
    return CompressiveRecipe(**{**vars(base), "clip": 0.1, "model": {**base.model, **model}})


_WORDS = _from_transformer_xl("wikitext-2", compressed_len=128, rate=4)
_BYTES = dict(cutoffs=(), div_val=1, tie_projs=(), mem_len=192, compressed_len=288, rate=3)
COMPRESSIVE_RECIPES = {
    "human-numbers": _from_transformer_xl("human-numbers", compressed_len=32, rate=4),
    "wikitext-2": _WORDS,
    # Text as bytes ("bytes:FOLDER"), with the paper's rate for enwik8
    "bytes": replace(_WORDS, epochs=1, bptt=192, model={**_WORDS.model, **_BYTES}),
}


def train_compressive(
    corpus: Corpus, recipe: CompressiveRecipe, out: str | Path, **options: Any
) -> tuple[CompressiveTransformer, History]:
    """Seed, build and train; ``options`` are those of :func:`fit`. Leaves ``compression.png`` in ``out`` too.

    With ``compression_loss="bptt"`` a step reads two segments of ``recipe.bptt`` and half as many streams, as in the
    paper (section 5.2): the second one's loss trains the compressors. Validations are not compiled.
    """
    L.seed_everything(recipe.seed, verbose=False)
    sizes = {"vocab_size": len(corpus.vocabulary), "segment_len": recipe.bptt}
    model = CompressiveTransformer(CompressiveConfig(**{**sizes, **recipe.model}))
    if model.config.compression_loss == "bptt":
        recipe = replace(recipe, bptt=2 * recipe.bptt, batch_size=max(1, recipe.batch_size // 2))
    module = CompressiveTraining(model, **recipe.optimization())
    statistics = CompressionStatistics(Path(out) / "compression.png")
    callbacks = [ClipApart(recipe.clip, CompressiveTransformer.compression_parameters), statistics]
    options = {"strategy": strategy_for_unused(options.get("devices", "auto")), **options}
    return model, fit(model, corpus, replace(recipe, clip=0.0), out, module=module, callbacks=callbacks, **options)


class CompressiveTraining(LanguageModel):
    """Shows what :class:`CompressionStatistics` reads. A hook would be compiled with the model, and again at each step.

    Validations are not compiled: to torch.compile each way in which the memory grows would be a second graph.

    Attributes:
        step_read: of the last step the tokens ``(B, T)`` and the memory after them.
        compression_losses: of that step, as in :class:`CompressiveOutput`.
    """

    step_read: tuple[Tensor, Any] | None = None
    compression_losses: Tensor | None = None

    def _call(self, tokens: Tensor, targets: Tensor, memory: Any) -> ModelOutput:
        if not self.training:
            with torch.compiler.set_stance("force_eager"):
                return self.model(tokens, targets, memory)
        output = self.model(tokens, targets, memory)
        self.step_read, self.compression_losses = (tokens, output.memory), output.compression_losses
        return output


@torch.no_grad()
def attention_shares(model: CompressiveTransformer, tokens: Tensor, memory: Any) -> list[list[float]]:
    """Of each layer with a memory, the shares of its attention that compressed, memory and segment receive."""
    states = [MemoryState(*state) for state in memory]
    _, _, _, received = model.attend(tokens, states, received=True)
    shares = []
    for state, by_key in zip(states, received, strict=True):
        parts = by_key.mean(0).tensor_split([state.compressed, state.rows.shape[1]])  # type: ignore[union-attr]
        shares.append([float(part.sum()) / tokens.shape[1] for part in parts])
    return shares


class CompressionStatistics(L.Callback):
    """What the paper plots: each layer's compression loss during training, and the shares of attention at its end."""

    def __init__(self, path: Path):
        self.path = path
        self.losses: list[tuple[int, list[float]]] = []

    def state_dict(self) -> dict[str, Any]:
        return {"losses": self.losses}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.losses = state_dict["losses"]

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        losses: Any = pl_module.compression_losses
        if losses is not None and trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            self.losses.append((trainer.global_step, losses.tolist()))

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        model, read = cast(CompressiveTransformer, pl_module.model), pl_module.step_read
        if not trainer.is_global_zero or read is None:
            return
        tokens, memory = cast(tuple[Tensor, Any], read)
        training = model.training
        shares = attention_shares(model.eval(), tokens[:, : model.config.segment_len or None], memory)
        model.train(training)
        plot_compression(model.memory_layers, self.losses, shares, self.path)


def plot_compression(
    layers: Sequence[int], losses: list[tuple[int, list[float]]], shares: list[list[float]], path: Path
) -> None:
    """Compression losses by step and layer, and stacked shares of attention by layer, into one PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for i, layer in enumerate(layers):
        left.plot([step for step, _ in losses], [by_layer[i] for _, by_layer in losses], label=f"layer {layer}")
    left.legend(fontsize="small")
    left.set(xlabel="step", ylabel="compression loss")
    base = [0.0] * len(shares)
    for part, name in enumerate(("compressed", "memory", "segment")):
        heights = [share[part] for share in shares]
        right.bar(list(map(str, layers)), heights, bottom=base, label=name)
        base = [b + h for b, h in zip(base, heights, strict=True)]
    right.set(xlabel="layer", ylabel="share of attention received", ylim=(0, 1))
    right.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3)  # above the bars, which fill the axes
    figure.savefig(path, dpi=120)
