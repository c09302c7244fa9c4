"""Trained models from the folder of their run, and their losses on a corpus."""

import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model, save_model
from torch import nn

from par_xl.data import ContiguousStreams, Corpus, Vocabulary, load_vocabulary
from par_xl.models import (
    AWDLSTM,
    AWDLSTMConfig,
    CompressiveConfig,
    CompressiveTransformer,
    ParConfig,
    ParSuperNet,
    ParTransformerXL,
    TransformerXL,
    TransformerXLConfig,
)

ARCHITECTURES: dict[str, tuple[type[nn.Module], type]] = {
    "awd-lstm": (AWDLSTM, AWDLSTMConfig),
    "compressive": (CompressiveTransformer, CompressiveConfig),
    "par": (ParTransformerXL, ParConfig),
    "par-supernet": (ParSuperNet, ParConfig),
    "transformer-xl": (TransformerXL, TransformerXLConfig),
}


def load_run(folder: str | Path, weights: str = "") -> tuple[Any, Vocabulary]:
    """The model of a finished run, in evaluation mode, and its vocabulary. Reads JSON and safetensors, no pickle.

    Args:
        folder: the run's, with ``result.json`` (par-xl train), ``vocabulary.txt`` and the weights.
        weights: "best" or "last"; default: "last" of a search, whose pattern and result are of the last step (the best
            validation may have been of another architecture), and otherwise "best".

    Raises:
        FileNotFoundError: a file is missing.
    """
    folder = Path(folder)
    _check(folder, "result.json", "vocabulary.txt")
    record = json.loads((folder / "result.json").read_text())
    weights = weights or ("last" if record["architecture"] == "par-supernet" else "best")
    _check(folder, f"{weights}.safetensors")
    model_class, config_class = ARCHITECTURES[record["architecture"]]
    model = model_class(config_class(**record["model"]))
    load_model(model, folder / f"{weights}.safetensors")
    return model.eval(), load_vocabulary(folder)


def _check(folder: Path, *names: str) -> None:
    for name in names:
        if not (folder / name).exists():
            raise FileNotFoundError(f"{folder} is not the folder of a finished run: it has no {name}")


def save_run(model: nn.Module, vocabulary: Vocabulary, folder: str | Path) -> None:
    """Write all that :func:`load_run` reads but ``result.json``."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary.save(folder)
    save_model(model, str(folder / "best.safetensors"))


@torch.no_grad()
def evaluate(model: nn.Module, corpus: Corpus, split: str, batch_size: int, bptt: int) -> dict[str, float]:
    """The mean loss over a split, read as ``batch_size`` streams in windows of ``bptt`` with memory.

    Returns:
        ``loss`` in nats a token, ``perplexity``, ``word_perplexity``, ``bits_per_token``, ``tokens`` and
        ``tokens_per_second``.
    """
    device = next(model.parameters()).device
    tokens = corpus.split(split)
    memory, losses, start = None, [], time.perf_counter()
    for inputs, targets in ContiguousStreams(tokens, batch_size, bptt):
        output = model(inputs.to(device), targets.to(device), memory)
        memory = output.memory
        losses.append(output.nll.double().sum())
    count = (len(tokens) - 1) // batch_size * batch_size
    loss = float(torch.stack(losses).sum()) / count
    return {
        "loss": loss,
        "perplexity": math.exp(loss),
        "word_perplexity": math.exp(loss * corpus.tokens_per_word(split)),
        "bits_per_token": loss / math.log(2),
        "tokens": count,
        "tokens_per_second": round(count / (time.perf_counter() - start)),
    }
