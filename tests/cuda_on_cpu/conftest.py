"""The emulator, and which checks of an op run on it."""

import subprocess

import pytest
from emulator import CXX, Emulator

# What is not about the kernels, or about those of C++: the other tests see to it.
ELSEWHERE = (
    "test_opcheck", "test_compile", "test_compile_dynamic", "test_compile_in_a_cold_process", "test_autocast",
    "test_bad_input", "test_second_derivative_is_an_error", "test_number_of_threads_does_not_change_the_bits",
    "test_no_synchronisation_and_cuda_graph", "test_without_values",
)  # fmt: skip


def pytest_pycollect_makeitem(name):
    return [] if name in ELSEWHERE else None


@pytest.fixture(scope="session")
def emulator(request):
    """Compiled once for all processes, and again only where a source has changed."""
    version = subprocess.run([CXX, "-dumpversion"], check=True, capture_output=True, text=True).stdout
    if int(version.split(".")[0]) < 12:
        pytest.skip(f"{CXX} {version.strip()} is too old for the emulator: _Float16 came with g++ 12")
    return Emulator(request.config.cache.mkdir("cuda_on_cpu"))
