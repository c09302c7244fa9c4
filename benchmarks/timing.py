"""Timing of rival implementations side by side, and the ceilings of the machine they are held against."""

import statistics
import time
from collections.abc import Callable
from functools import cache

import torch
from torch.utils._pytree import tree_flatten

from par_xl.testing import peak_memory

Tensors = tuple[torch.Tensor, ...]


def cpu_seconds(candidates: dict[str, Callable], inputs: list[Tensors], seconds: float) -> dict[str, float]:
    """Median seconds of a call, of at least five that take ``seconds`` together; the candidates take turns, so that a
    slow spell of the machine meets them all.

    A call that is not timed goes before each: what others leave in the caches, dirty lines above all, would slow it.
    """
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    waiting, turn = dict(candidates), 0
    while waiting:
        one = inputs[turn % len(inputs)]
        for name, function in waiting.items():
            function(*one)
            start = time.perf_counter()
            function(*one)
            samples[name].append(time.perf_counter() - start)
        waiting = {name: f for name, f in waiting.items() if turn < 4 or sum(samples[name]) < seconds}
        turn += 1
    return {name: statistics.median(values) for name, values in samples.items()}


def gpu_seconds(candidates: dict[str, Callable], inputs: list[Tensors], seconds: float) -> dict[str, float]:
    """Median seconds of a call from CUDA-graph replays, a replay being one pass over all input sets."""
    graphs = {}
    for name, function in candidates.items():
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            for _ in range(3):
                function(*inputs[0])
        torch.cuda.synchronize()
        graphs[name] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graphs[name]):
            for one in inputs:
                function(*one)
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    end, turn = time.perf_counter() + seconds * len(candidates), 0
    while turn < 5 or time.perf_counter() < end:
        for name, graph in graphs.items():
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            stop.record()
            stop.synchronize()
            samples[name].append(start.elapsed_time(stop) / 1e3 / len(inputs))
        turn += 1
    return {name: statistics.median(values) for name, values in samples.items()}


def compare(candidates: dict[str, Callable], inputs: Tensors, tolerance: float) -> None:
    """Every candidate agrees with the first before anything is timed."""
    wanted = None
    for name, function in candidates.items():
        got = [x.detach().double() for x in tree_flatten(function(*inputs))[0]]
        wanted = wanted or got
        for x, y in zip(got, wanted, strict=True):
            size = y.abs().max().item()
            torch.testing.assert_close(
                x, y, rtol=0, atol=tolerance * size, msg=lambda text, name=name: f"{name}: {text}"
            )


def peak_megabytes(candidates: dict[str, Callable], inputs: Tensors) -> dict[str, float]:
    """Memory beyond the inputs at the worst moment of a call, results included."""
    return {
        name: peak_memory(lambda f=function: f(*inputs), inputs[0].device) / 2**20
        for name, function in candidates.items()
    }


@cache
def ceilings(device: str) -> dict[str, float]:
    """What this machine reaches: bytes a second read and copied, FLOPs a second of a matrix product."""
    clock = gpu_seconds if device == "cuda" else cpu_seconds
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    megabytes, n = (1024, 8192) if device == "cuda" else (128, 2048)
    x = torch.ones(megabytes * 2**18, device=device)
    y = torch.empty_like(x)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    read = clock({"": lambda x: x.sum()}, [(x,)], 0.3)[""]
    copy = clock({"": lambda x: y.copy_(x)}, [(x,)], 0.3)[""]
    product = clock({"": torch.mm}, [(a, b)], 0.5)[""]
    return {"read": x.nbytes / read, "copy": 2 * x.nbytes / copy, "matmul": 2 * n**3 / product}
