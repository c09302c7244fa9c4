"""The latency term of a search: what the blocks' choices cost on this device, and a penalty for costing too much."""

import json
import math
import os
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from par_xl.data.corpus import default_cache_dir
from par_xl.environment import device_name, versions
from par_xl.models import ParSuperNet
from par_xl.models.par import CHOICES
from par_xl.ops import registry


class LatencyPenalty:
    """A penalty for an expected latency above a target, which is a share of the all-attention network's.

    With the probabilities ``P (n, 3)`` of n blocks and the seconds ``t`` of attention, dense and identity::

        share = sum over blocks b and choices i of P[b, i] t[i]  /  (n t[attention])
        penalty = weight * max(0, share / target - 1)

    It is 0, and so is its gradient, at the target and below.

    Args:
        seconds: t; see :func:`block_seconds`.
        target: positive; from 1 on there is no penalty unless something is slower than attention.
        weight: of the penalty, beside the loss in nats a token.

    Raises:
        ValueError: ``seconds`` has not three entries, that of attention is not positive, or ``target`` is not.

    Source: PLANER (Latifi, Muralidharan, Garland: Efficient Sparsely Activated Transformers, arXiv 2208.14580): the
    latency of each option from a table, by its probability, and counted above the target only.
    """

    def __init__(self, seconds: list[float], target: float, weight: float = 1.0):
        if len(seconds) != len(CHOICES) or not seconds[0] > 0:
            raise ValueError(f"seconds must be three, attention's positive, not {seconds}")
        if not target > 0:
            raise ValueError(f"target must be a positive share of the all-attention network's time, not {target}")
        self.seconds, self.target, self.weight = seconds, target, weight

    def share(self, probabilities: Tensor) -> Tensor:
        """The expected latency as a share of the all-attention network's, 0-d."""
        relative = probabilities.new_tensor([t / self.seconds[0] for t in self.seconds])
        return (probabilities * relative).sum(-1).mean()  # not a matrix product, which autocast would round

    def __call__(self, probabilities: Tensor) -> Tensor:
        """The penalty, 0-d."""
        return self.weight * (self.share(probabilities) / self.target - 1).clamp(min=0)


@torch.no_grad()
def measure_blocks(model: ParSuperNet, batch_size: int, bptt: int, rounds: int = 30) -> list[float]:
    """Seconds of a block's forward in evaluation: attention with a full memory, dense, identity (nothing, so 0).

    Medians of ``rounds`` in which the choices take turns, after three that are not counted, on the model's device and
    in the autocast that surrounds the call. No random numbers are drawn.
    """
    c, like = model.config, next(model.parameters())
    training, block = model.training, model.layers[0]
    shapes = [(batch_size, steps, c.d_model) for steps in (bptt, c.mem_len)]
    x, mems = (torch.linspace(-1, 1, math.prod(s), dtype=like.dtype, device=like.device).view(s) for s in shapes)
    model.eval()
    _, relative = model.positions(c.mem_len + bptt, x.dtype)[0]
    options = {"mems": mems if c.mem_len else None, **model.attention_options()}

    def seconds(choice: int) -> float:
        _wait(like.device)
        start = time.perf_counter()
        block(x, *relative, weights=like.new_zeros(3), choice=choice, **options)
        _wait(like.device)
        return time.perf_counter() - start

    samples = [[seconds(choice) for choice in (0, 1)] for _ in range(rounds + 3)][3:]
    model.train(training)
    return [*(statistics.median(column) for column in zip(*samples, strict=True)), 0.0]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def block_seconds(
    model: ParSuperNet, batch_size: int, bptt: int, *, precision: str = "32-true", table: Path | None = None
) -> list[float]:
    """:func:`measure_blocks`, looked up in ``table``, a JSON file, and measured only if it does not hold it yet.

    An entry is of a device, its threads, the versions of par_xl and torch, the backend, the precision and everything
    that a block's time depends on. Delete the file to measure again.

    Args:
        precision: the trainer's, for the key.
        table: default: ``latency.json`` in the folder of the cached corpora (:func:`par_xl.data.load_corpus`).
    """
    table = table or default_cache_dir() / "latency.json"
    c, like = model.config, next(model.parameters())
    found = versions()
    names = ("d_model", "n_head", "d_head", "d_inner", "mem_len", "clamp_len", "same_length", "pre_lnorm")
    sizes = {name: getattr(c, name) for name in names}
    where = {"device": device_name(), "type": like.device.type, "torch": found["torch"], "par_xl": found["par_xl"]}
    how = {"backend": registry._selected, "precision": precision, "dtype": str(like.dtype)}
    key = json.dumps({**where, **how, "batch_size": batch_size, "bptt": bptt, **sizes})
    entries: dict[str, Any] = json.loads(table.read_text()) if table.exists() else {}
    if key not in entries:
        entries[key] = measure_blocks(model, batch_size, bptt)
        table.parent.mkdir(parents=True, exist_ok=True)
        part = table.with_suffix(f".{os.getpid()}")  # a reader never sees half a file
        part.write_text(json.dumps(entries, indent=1) + "\n")
        part.replace(table)
    return entries[key]
