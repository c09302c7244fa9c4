"""What ``make demo`` shows: the error of every op on every backend, and one search on two backends."""

import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

import par_xl
from par_xl.data import load_corpus
from par_xl.models import ParSuperNet
from par_xl.testing import Case, largest_error, make_inputs, peak_memory, promoted, run
from par_xl.training.history import plot_losses
from par_xl.training.search import SEARCH_RECIPES, search_par

BACKENDS = ("eager", "auto")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


Randn = Callable[..., torch.Tensor]


def _ar_tar(randn: Randn) -> dict[str, Any]:
    return {"output": randn(16, 70, 400), "raw_output": randn(16, 70, 400)}


def _rel_attention(randn: Randn) -> dict[str, Any]:
    q, k, v, k_memory, v_memory = (randn(2, 4, 64, 32) for _ in range(5))
    return {"q": q, "k": k, "v": v, "r": randn(4, 128, 32), "memory": (k_memory, v_memory)}


def _adaptive_nll(randn: Randn) -> dict[str, Any]:
    target = torch.arange(256) * 31 % 1000
    weights = [randn(102, 64), randn(400, 16), randn(500, 4)]
    projections = [None, randn(16, 64), randn(4, 64)]
    return dict(input=randn(256, 64), target=target, weights=weights, cutoffs=[100, 500], projections=projections)


def _compress(randn: Randn) -> dict[str, Any]:
    return {"memory": randn(4, 128, 256), "rate": 4, "mode": "mean"}


def _update_memory(randn: Randn) -> dict[str, Any]:
    lengths = {"compressed": 32, "compressed_length": 32, "memory_length": 64, "rate": 4}
    return {"state": randn(4, 96, 256), "hidden": randn(4, 64, 256), **lengths}


def _mix(randn: Randn) -> dict[str, Any]:
    x, attended, dense = (randn(4, 64, 256) for _ in range(3))
    norms = {name: randn(256) for name in ("gamma_0", "beta_0", "gamma_1", "beta_1")}
    return {"x": x, "attended": attended, "dense": dense, "weights": randn(3), **norms}


def _dropout(randn: Randn) -> dict[str, Any]:
    return {"x": randn(256, 500), "p": 0.1, "relu": True, "seed": torch.tensor([1])}


# Public function and an input for every op, by the name of its registered ops.
OPS: dict[str, tuple[Callable, Case]] = {
    "ar_tar": (par_xl.ar_tar_loss, _ar_tar),
    "rel_attention": (par_xl.rel_attention, _rel_attention),
    "adaptive_nll": (par_xl.adaptive_nll, _adaptive_nll),
    "compress": (par_xl.compress, _compress),
    "memory_update": (par_xl.update_memory, _update_memory),
    "mix": (par_xl.mix, _mix),
    "dropout": (par_xl.dropout, _dropout),
}


def check_ops() -> Table:
    """Largest error of each op's outputs and gradients against eager PyTorch in fp64, in units of the budget.

    Raises:
        AssertionError: an error is over its budget: twice that of eager PyTorch in fp32, plus an eps of the tensor.
    """
    table = Table("op", "backend", "output error", "gradient error", "eager's", "budget", title="fp32 against fp64")
    for name, (function, case) in OPS.items():
        inputs = make_inputs(case, torch.float32, DEVICE)
        exact = run(lambda f=function, **kw: f(**kw, backend="eager"), promoted(inputs, torch.float64))
        eager: list[float] = []
        for backend, states in par_xl.backends().items():
            if states[DEVICE] != "available":
                continue
            results = run(lambda f=function, b=backend, **kw: f(**kw, backend=b), inputs)
            errors = [_relative_error(*pair) for pair in zip(results, exact, strict=True)]
            eager = eager or errors
            budget = 2 * max(eager) + torch.finfo(torch.float32).eps
            assert max(errors) <= budget, f"{name} on {backend}: error {max(errors):.2e}, allowed {budget:.2e}"
            row = [*errors, max(eager), budget]
            table.add_row(name, backend, *(f"{value:.1e}" for value in row))
    return table


def _relative_error(got: list[torch.Tensor], exact: list[torch.Tensor]) -> float:
    """The largest error as a part of the tensor's largest element."""
    return max(largest_error(x, y) / y.abs().max().item() for x, y in zip(got, exact, strict=True))


def race(out: Path, epochs: int) -> Table:
    """Search one small SuperNet from one seed on ``eager`` and on ``auto``, and draw both loss curves into ``out``."""
    corpus = load_corpus("human-numbers")
    recipe = SEARCH_RECIPES["human-numbers"]
    # Without dropout: eager drops by torch's own masks, and the curves could not lie on top of each other.
    recipe = replace(recipe, epochs=epochs, model={**recipe.model, "dropout": 0.0})
    histories, columns = {}, {}
    for backend in BACKENDS:
        model, histories[backend] = search_par(corpus, recipe, out / backend, backend=backend, devices=1)
        columns[backend] = {
            "training loss": histories[backend].train[-1][1],
            "validation loss": histories[backend].valid[-1]["val_loss"],
            "validation accuracy": histories[backend].valid[-1]["val_accuracy"],
        }
    plot_losses(histories, out / "losses.png")
    for backend, costs in measure(model.to(DEVICE).train(), recipe.batch_size, recipe.bptt).items():
        columns[backend] |= costs
    title = f"Search of a PAR Transformer-XL on human-numbers, {epochs} epochs: {model.derive()}"
    table = Table("", *BACKENDS, "ratio", title=title)
    for name, first in columns[BACKENDS[0]].items():
        second = columns[BACKENDS[1]][name]
        values = (f"{value:,}" if isinstance(value, int) else f"{value:.4g}" for value in (first, second))
        table.add_row(name, *values, f"{second / first:.3f}")
    return table


def measure(model: ParSuperNet, batch_size: int, bptt: int, rounds: int = 30) -> dict[str, dict[str, float]]:
    """What a training step costs on each backend.

    Medians of steps in which the backends take turns: two trainings, one after the other, differ by more than this
    whenever something else runs on the machine.
    """
    tokens = torch.randint(model.config.vocab_size, (batch_size, bptt), device=DEVICE)
    memory = model(tokens).memory

    def step(backend: str) -> None:
        with par_xl.use_backend(backend):
            model(tokens, tokens, memory).loss.backward()
            model.zero_grad()

    seconds: dict[str, list[float]] = {backend: [] for backend in BACKENDS}
    for _ in range(rounds):
        for backend, samples in seconds.items():
            start = time.perf_counter()
            step(backend)
            if DEVICE == "cuda":
                torch.cuda.synchronize()
            samples.append(time.perf_counter() - start)
    with _silent_profiler():
        megabytes = {b: peak_memory(lambda b=b: step(b), torch.device(DEVICE)) / 2**20 for b in BACKENDS}  # type: ignore[misc]
    return {
        backend: {
            "tokens per second": round(tokens.numel() / statistics.median(samples)),
            "peak MB of a step": megabytes[backend],
        }
        for backend, samples in seconds.items()
    }


@contextmanager
def _silent_profiler() -> Iterator[None]:
    """Drop what torch's profiler, which measures memory on the CPU, writes to the process's stderr."""
    saved, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(null)
