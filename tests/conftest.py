"""Parameters and skips shared by the tests. Without a GPU the Triton kernels run in their interpreter."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before any kernel is imported

import pytest

from par_xl.ops import registry

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def pytest_generate_tests(metafunc):
    """Turn the tables of an OpChecks class into parameters."""
    names = metafunc.fixturenames
    for argument, table in (("case", "cases"), ("gradcheck_case", "gradcheck_cases"), ("bad", "bad_input")):
        if argument in names and hasattr(metafunc.cls, table):
            cases = getattr(metafunc.cls, table)
            metafunc.parametrize(argument, list(cases.values()), ids=list(cases))
    if "dtype" in names and hasattr(metafunc.cls, "dtypes"):
        metafunc.parametrize("dtype", metafunc.cls.dtypes, ids=lambda dtype: str(dtype).removeprefix("torch."))
    if "backend" in names:
        metafunc.parametrize("backend", getattr(metafunc.cls, "backends", ["native", "triton"]))
    if "device" in names:
        metafunc.parametrize("device", getattr(metafunc.cls, "devices", DEVICES))


def pytest_collection_modifyitems(items):
    """Skip what this machine cannot run, and say why."""
    for item in items:
        parameters = getattr(getattr(item, "callspec", None), "params", {})
        device = parameters.get("device", "cuda" if item.get_closest_marker("gpu") else "cpu")
        backend = parameters.get("backend", parameters.get("chosen", "eager"))  # chosen: on the CPU
        dtype = parameters.get("dtype", torch.float64 if "gradcheck" in item.name else torch.float32)
        lacks = [registry.OPS[name].lacks.get(backend) for name in getattr(item.cls, "ops", ())]
        reasons = [registry._why_not(backend, device), *(lack(device, dtype) for lack in lacks if lack)]
        reason = next(filter(None, reasons), "")
        if reason:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def _fresh():
    torch.manual_seed(0)
    yield
    torch.compiler.reset()
    registry.use_backend("auto")


@pytest.fixture(scope="module")
def one_thread():
    """For models so small that threads only wait for each other, long on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
