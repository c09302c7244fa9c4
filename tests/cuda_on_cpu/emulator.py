"""The CUDA kernels of csrc/cuda, compiled for the CPU with the headers of this folder, in the place of the GPU's.

What must be changed in a source to make it plain C++ are its launches and the declarations of dynamic shared memory.
"""

import ctypes
import fcntl
import importlib.util
import os
import re
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import ninja
import pybind11
import torch

from par_xl.ops import registry

CXX = os.environ.get("CXX", "g++")
HERE, CSRC = Path(__file__).parent, Path(__file__).parents[2] / "csrc"
FLAGS = "-std=c++17 -fPIC -w -U_FORTIFY_SOURCE"  # a checked longjmp does not leave a stack
# Uninitialised variables hold 0xfe bytes; a misaligned vector and an index outside a fixed array are errors.
KERNEL_FLAGS = "-O1 -x c++ -include cuda_runtime.h -ftrivial-auto-var-init=pattern -fsanitize=alignment,bounds"
# pybind11 shares types between extensions of one ABI, and par_xl._C has the same ones. No C++ kernel is linked.
BINDINGS_FLAGS = (
    "-O0 -DPAR_XL_X86=0 -DPAR_XL_CUDA=1 '-DPAR_XL_CUDA_INFO=\"emulated\"' '-DPYBIND11_BUILD_ABI=\"emulated\"'"
)


def translated(source: str) -> str:
    source = re.sub(r"<<<(.*?)>>>\(", r" ->* emulator::Launch(\1)(", source, flags=re.DOTALL)
    return re.sub(
        r"extern __shared__ (?:__align__\(\d+\) )?([\w ]+) (\w+)\[\]", r"\1* \2 = (\1*)emulator::shared", source
    )


def copy_sources(folder: Path) -> list[Path]:
    """Only what has changed is written, so that only that is compiled again. A header of this folder takes the place
    of one in csrc/cuda."""
    patterns = (CSRC, "*.h"), (CSRC, "bindings.cpp"), (CSRC, "cuda/*"), (HERE, "*.h"), (HERE, "*.c*")
    sources = [path for where, pattern in patterns for path in where.glob(pattern)]
    copies = {folder / source.name: translated(source.read_text()) for source in sources}
    for copy, text in copies.items():
        if not copy.exists() or copy.read_text() != text:
            copy.write_text(text)
    return list(copies)


def build(folder: Path) -> Path:
    """The extension, compiled in ``folder`` by the first process that comes."""
    target = folder / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        copies = copy_sources(folder)
        kernels = [p for p in copies if p.suffix in (".cu", ".cpp") and p.name != "bindings.cpp"]
        with open(folder / "build.ninja", "w") as file:
            n = ninja.ninja_syntax.Writer(file, width=4096)
            include = f"-I{folder} -I{sysconfig.get_path('include')} -I{pybind11.get_include()}"
            command = f"{CXX} {FLAGS}"
            n.rule("cxx", f"{command} {include} $flags -MMD -MF $out.d -c $in -o $out", depfile="$out.d", deps="gcc")
            n.rule("link", f"{command} -shared $in -Wl,-z,lazy,-rpath,{folder} -o $out")
            for source in [*kernels, folder / "bindings.cpp"]:
                flags = KERNEL_FLAGS if source in kernels else BINDINGS_FLAGS
                n.build(f"{source.stem}.o", "cxx", str(source), variables={"flags": flags})
            # A library of their own: the emulator looks upon its thread_local variables as shared memory.
            n.build("libkernels.so", "link", [f"{source.stem}.o" for source in kernels])
            n.build(str(target), "link", ["bindings.o", "libkernels.so"])
        done = subprocess.run([Path(ninja.BIN_DIR) / "ninja", "-C", folder], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stdout)
    return target


class Emulator:
    """``_C`` has the emulated kernels, and of the extension's other functions none."""

    def __init__(self, folder: Path):
        path = build(folder)
        flags = sys.getdlopenflags()
        sys.setdlopenflags(os.RTLD_LAZY)  # the C++ kernels are missing
        try:
            spec = importlib.util.spec_from_file_location("_C", path)
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        finally:
            sys.setdlopenflags(flags)
        self._C = SimpleNamespace(**{k: v for k, v in vars(module).items() if not k.endswith("_cpu")})
        self.library = ctypes.CDLL(folder / "libkernels.so")
        self.seed = self.library.emulator_seed

    @contextmanager
    def active(self) -> Iterator[None]:
        """Inside, the ops, and nothing else, find that their tensors are on a GPU, and call the emulated kernels."""
        modules = [m for name, m in sys.modules.items() if name.startswith("par_xl.ops.") and hasattr(m, "_C")]
        is_cuda = property(lambda _: sys._getframe(1).f_globals["__name__"].startswith("par_xl.ops."))
        stream = SimpleNamespace(cuda_stream=0)
        with ExitStack() as stack:
            for module in modules:
                stack.enter_context(mock.patch.object(module, "_C", self._C))
            stack.enter_context(mock.patch.object(torch.Tensor, "is_cuda", is_cuda))
            stack.enter_context(mock.patch("torch.cuda.current_stream", lambda: stream))
            yield

    @contextmanager
    def runs(self, *ops: str) -> Iterator[None]:
        """Inside, ``native`` of these ops is the emulator, on CPU tensors."""

        def emulated(implementation):
            def run(*args):
                with self.active():
                    return implementation(*args)

            return run

        with ExitStack() as stack:
            for name in ops:
                implementations = registry.OPS[name].implementations
                stack.enter_context(mock.patch.dict(implementations, native=emulated(implementations["native"])))
            yield
