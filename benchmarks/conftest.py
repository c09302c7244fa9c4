"""The ``race`` fixture: correctness, then interleaved times, memory and ceilings, written to a small JSON file.

pytest benchmarks/bench_ar_tar.py --results benchmarks/results      # par-xl bench does this for every file
"""

import datetime
import json
import re
from pathlib import Path

import pytest
import torch
from timing import ceilings, compare, cpu_seconds, gpu_seconds, peak_megabytes
from torch.utils._pytree import tree_flatten

from par_xl.environment import device_name, versions

GPU = torch.cuda.is_available()


def pytest_addoption(parser):
    parser.addoption("--results", type=Path, help="folder of the result files, one for each benchmark file")
    parser.addoption("--seconds", type=float, default=1.0, help="time for each candidate of each case")


def machine():
    return {"device": device_name(), "date": datetime.date.today().isoformat(), **versions()}


@pytest.fixture(scope="session")
def device():
    return "cuda" if GPU else "cpu"


@pytest.fixture
def race(request, benchmark, device):
    """``race(candidates, inputs, ours=..., nbytes=..., flops=...)``: times the candidates against each other.

    ``candidates`` maps names to functions of one input tuple; the first is the baseline and the truth. ``inputs`` is a
    list of such tuples, used in turn. ``nbytes`` and ``flops`` are the least that one call must move and compute.
    ``floors`` are timed with the candidates but do less than they must, so their results are not compared. Without a
    ``tolerance`` nothing is: the caller has compared them where they agree, without dropout for instance.
    """

    def run(
        candidates, inputs, ours, *, tolerance, floors=None, nbytes=0, read_only=False, flops=0, memory=False, target=""
    ):
        if tolerance is not None:
            compare(candidates, inputs[0], tolerance)
        candidates = {**candidates, **(floors or {})}
        clock = gpu_seconds if device == "cuda" else cpu_seconds
        seconds = clock(candidates, inputs, request.config.getoption("seconds"))
        baseline = next(iter(candidates))
        ceiling = ceilings(device)
        result = {
            "ms": {name: round(value * 1e3, 4) for name, value in seconds.items()},
            "times faster than": {
                name: round(value / seconds[ours], 2) for name, value in seconds.items() if name != ours
            },
        }
        if nbytes:
            rate = ceiling["read" if read_only else "copy"]
            result["GB/s"] = round(nbytes / seconds[ours] / 1e9, 1)
            result["share of the bandwidth"] = round(nbytes / seconds[ours] / rate, 3)
        if flops:
            result["GFLOP/s"] = round(flops / seconds[ours] / 1e9, 1)
            result["share of the matrix rate"] = round(flops / seconds[ours] / ceiling["matmul"], 3)
        if memory:
            result["peak MB"] = {k: round(v, 2) for k, v in peak_megabytes(candidates, inputs[0]).items()}
            result["results MB"] = round(
                sum(x.nbytes for x in tree_flatten(candidates[ours](*inputs[0]))[0]) / 2**20, 2
            )
        if target:
            result["target"] = target
        result["ours"], result["baseline"] = ours, baseline
        benchmark.extra_info.update(result)
        benchmark.pedantic(candidates[ours], inputs[0], rounds=3, warmup_rounds=1)
        print(f"\n{request.node.name}: {json.dumps(result)}")
        save(request.config, request.path.stem, request.node.name, result)

    return run


def save(config, benchmark, case, result):
    """Write the results so far: a run that is cut off keeps them."""
    if not hasattr(config, "_races"):
        config._races = {}
    cases = config._races.setdefault(benchmark, {})
    cases[case] = result
    if folder := config.getoption("results"):
        device = re.sub(r"\W+", "-", device_name().split(",")[0]).strip("-").lower()
        path = folder / device / f"{benchmark.removeprefix('bench_')}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        ceiling = {key: round(value / 1e9, 1) for key, value in ceilings("cuda" if GPU else "cpu").items()}
        path.write_text(json.dumps({"machine": machine(), "ceilings, G/s": ceiling, "cases": cases}, indent=1) + "\n")
