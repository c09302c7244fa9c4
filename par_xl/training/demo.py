"""What ``make demo`` shows: the error of every op on every backend, and one training on two backends."""

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

import par_xl
from par_xl.data import load_corpus
from par_xl.testing import Case, largest_error, make_inputs, peak_memory, promoted, run
from par_xl.training.awd_lstm import RECIPES, train_awd_lstm
from par_xl.training.history import plot_losses

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def _ar_tar(randn: Callable[..., torch.Tensor]) -> dict[str, Any]:
    return {"output": randn(16, 70, 400), "raw_output": randn(16, 70, 400)}


# Public function and an input for every op, by the op's stem.
OPS: dict[str, tuple[Callable, Case]] = {"ar_tar": (par_xl.ar_tar_loss, _ar_tar)}


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
    """Train one small AWD-LSTM from one seed on ``eager`` and on ``auto``, and draw both loss curves into ``out``."""
    corpus = load_corpus("human-numbers")
    recipe = replace(RECIPES["human-numbers"], epochs=epochs)
    shape = recipe.batch_size, recipe.bptt, recipe.model["d_model"]
    histories, columns = {}, {}
    for backend in ("eager", "auto"):
        _, history = train_awd_lstm(corpus, recipe, out / backend, backend=backend, devices=1)
        histories[backend] = history
        milliseconds, megabytes = _ar_tar_cost(shape, backend)
        columns[backend] = {
            "training loss": history.train[-1][1],
            "validation loss": history.valid[-1]["val_loss"],
            "validation accuracy": history.valid[-1]["val_accuracy"],
            "tokens per second": round(history.tokens / history.seconds),
            "AR/TAR, ms a step": milliseconds,
            "AR/TAR, peak MB": megabytes,
        }
    plot_losses(histories, out / "losses.png")
    table = Table("", "eager", "auto", "auto / eager", title=f"AWD-LSTM with AR/TAR on human-numbers, {epochs} epochs")
    for name, eager in columns["eager"].items():
        auto = columns["auto"][name]
        values = (f"{value:,}" if isinstance(value, int) else f"{value:.4g}" for value in (eager, auto))
        table.add_row(name, *values, f"{auto / eager:.3f}")
    return table


def _ar_tar_cost(shape: tuple[int, int, int], backend: str) -> tuple[float, float]:
    """Median milliseconds of AR/TAR forward and backward at ``shape``, and the megabytes it takes at its peak."""
    output, raw = (torch.randn(shape, device=DEVICE, requires_grad=True) for _ in range(2))

    def step() -> Any:
        return torch.autograd.grad(par_xl.ar_tar_loss(output, raw, backend=backend), (output, raw))

    samples = []
    for _ in range(200):
        start = time.perf_counter()
        step()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        samples.append(time.perf_counter() - start)
    return statistics.median(samples) * 1e3, peak_memory(step, torch.device(DEVICE)) / 2**20
