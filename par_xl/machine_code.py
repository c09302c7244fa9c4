"""The machine code of the kernels, inspected on a machine without a GPU: registers, spills, instructions.

Triton kernels are compiled ahead of time with the arguments that their launchers pass; CUDA kernels are read out of
the extension. Both by the tools that Triton carries.
"""

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any
from unittest import mock

from par_xl.ops import registry


@dataclass
class Compiled:
    """A Triton kernel as launched, compiled for one architecture."""

    kernel: str
    capability: int
    registers: int
    stack: int  # bytes; more than 0 means spills
    shared: int  # bytes
    sass: str


def compile_launches(launches: str, capabilities: tuple[int, ...] = (80, 90, 100)) -> list[Compiled]:
    """Compile every Triton kernel that ``module:function`` launches, with the arguments it launches it with.

    ``function()`` calls launchers of ``par_xl.kernels`` on CPU tensors. It runs in a process of its own, where the
    interpreter is off and a driver without a GPU compiles each launch instead of running it.
    """
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "par_xl.machine_code", launches, *map(str, capabilities)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return [Compiled(**one) for one in json.loads(done.stdout.splitlines()[-1])]


def _compile_in_this_process(launches: str, capabilities: list[int]) -> list[Compiled]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    module, function = launches.split(":")
    launch = getattr(importlib.import_module(module), function)
    found: list[Compiled] = []
    original = JITFunction.run
    for capability in capabilities:
        driver = mock.Mock()
        driver.get_current_device.return_value = capability  # kernels are cached by device
        driver.get_current_target.return_value = GPUTarget("cuda", capability, 32)
        triton.runtime.driver.set_active(driver)

        def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
            kernel = original(self, *args, grid=grid, warmup=True, **kwargs)
            found.append(Compiled(self.fn.__name__, capability, *inspect_cubin(kernel.asm["cubin"])))  # noqa: B023
            return kernel

        with mock.patch.object(JITFunction, "run", compile_only):
            launch()
    return found


def inspect_cubin(cubin: bytes) -> tuple[int, int, int, str]:
    """Registers, stack bytes, shared bytes and machine code of a cubin with one kernel, by Triton's own cuobjdump."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, sass = (cuobjdump(option, file.name) for option in ("--dump-resource-usage", "--dump-sass"))
    return *resources(usage), sass


def resources(usage: str) -> tuple[int, int, int]:
    number = {name: int(value) for name, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
    return number["REG"], number["STACK"] + number["LOCAL"], number["SHARED"]


def has_cuda_kernels() -> bool:
    return registry._C is not None and registry._C.has_cuda


def cuda_kernels(name: str = "") -> list[Compiled]:
    """The extension's CUDA kernels with ``name`` in their mangled names, for each architecture; [] if it has none."""
    if not has_cuda_kernels():
        return []
    found = []
    for capability in map(int, re.findall(r"sm_(\d+)", registry._C.cuda_info)):
        usage, sass = _extension_code(capability)
        for part in usage:
            kernel = part.split(":", 1)[0].strip()
            if name in kernel:
                found.append(Compiled(kernel, capability, *resources(part), sass[kernel]))
    return found


@cache
def _extension_code(capability: int) -> tuple[list[str], dict[str, str]]:
    """The resources of each kernel, and the machine code by kernel: seconds for all of them."""
    arch = ("-arch", f"sm_{capability}", registry._C.__file__)
    code = re.split(r"\n\s*Function : ", cuobjdump("--dump-sass", *arch))[1:]
    usage = re.split(r"\n\s*Function ", cuobjdump("--dump-resource-usage", *arch))[1:]
    return usage, {part.split("\n", 1)[0].strip(): part for part in code}


def cuobjdump(*arguments: str) -> str:
    """The output of the cuobjdump that Triton carries."""
    import triton

    program = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
    return subprocess.run([program, *arguments], check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    print(json.dumps([asdict(one) for one in _compile_in_this_process(sys.argv[1], [int(x) for x in sys.argv[2:]])]))
