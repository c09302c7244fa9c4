"""Schedules of the learning rate and of the temperature, as functions of the step."""

import math
from typing import Any, Literal, get_args

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR

RateSchedule = Literal["constant", "one-cycle", "cosine"]
TemperatureSchedule = Literal["constant", "linear", "exponential"]


def one_of(name: str, value: str, choices: Any) -> str:
    """``value``, checked against a ``Literal``.

    Raises:
        ValueError: it is none of the choices.
    """
    if value not in get_args(choices):
        raise ValueError(f"{name} must be one of {', '.join(get_args(choices))}, not {value!r}")
    return value


def rate_schedule(optimizer: Optimizer, schedule: RateSchedule, total: int, warmup: int = 0) -> LRScheduler:
    """A scheduler to be stepped after each of ``total`` optimiser steps; every group's ``lr`` is its peak.

    Args:
        schedule: "constant"; "one-cycle" with the first quarter rising (fastai's ``fit_one_cycle``); "cosine" from the
            peak to 0.
        warmup: steps of a linear rise before "constant" and "cosine".

    Raises:
        ValueError: ``warmup`` is not within ``[0, total)``, or there is one with "one-cycle".
    """
    if not 0 <= warmup < total:
        raise ValueError(f"warmup must be at least 0 and below the number of steps, {total}, not {warmup}")
    if schedule == "one-cycle":
        if warmup:
            raise ValueError("warmup must be 0 with a one-cycle schedule, which has its own")
        peaks = [group["lr"] for group in optimizer.param_groups]
        momentum = "betas" in optimizer.param_groups[0]
        return OneCycleLR(optimizer, peaks, total_steps=total, pct_start=0.25, cycle_momentum=momentum)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        if schedule == "constant":
            return 1.0
        return (1 + math.cos(math.pi * min(1.0, (step - warmup) / (total - warmup)))) / 2

    return LambdaLR(optimizer, factor)


def temperature_at(schedule: TemperatureSchedule, start: float, end: float, progress: float) -> float:
    """The temperature after the share ``progress`` (0 to 1) of a search.

    "exponential": ``start * (end / start) ** progress``; "linear": ``start + (end - start) * progress``; both are
    ``end`` at 1. "constant": ``start``.

    Raises:
        ValueError: ``start`` or ``end`` is not positive.
    """
    if not (start > 0 and end > 0):
        raise ValueError(f"temperatures must be positive, not {start} and {end}")
    if schedule == "constant":
        return start
    return start + (end - start) * progress if schedule == "linear" else start * (end / start) ** progress
