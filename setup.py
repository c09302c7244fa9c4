"""Builds par_xl._C (pybind11, torch-free) with ninja: C++ always, CUDA where nvcc is found.

PAR_XL_SKIP_CUDA=1           leaves the CUDA kernels out
PAR_XL_CUDA_ARCHS="80 90"    compiles for these architectures (default: 80 90 100); PTX of the last one is added
CXX, CXXFLAGS, CUDA_HOME     choose the compilers, add to the C++ compiler's options
"""

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).parent.resolve()
# An installed package named `kernels` (Hugging Face's) registers setuptools hooks that must find it, not our folder.
sys.path[:] = [p for p in sys.path if Path(p or os.getcwd()).resolve() != ROOT]

from setuptools import Extension, find_packages, setup  # noqa: E402
from setuptools.command.build_ext import build_ext  # noqa: E402

CXX_FLAGS = (
    "-O3 -std=c++17 -fPIC -fvisibility=hidden -fopenmp -fno-math-errno -fno-trapping-math -ffp-contract=fast -Wall"
)
# One object per source and instruction set; csrc/bindings.cpp chooses between them at run time.
AVX512 = "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c -mprefer-vector-width=512"
X86_SETS = {
    "base": ("*", ""),
    "avx2": ("*", "-mavx2 -mfma -mf16c"),
    "avx512": ("*", AVX512),
    "amx": ("adaptive_softmax", f"{AVX512} -mavx512bf16 -mamx-tile -mamx-bf16"),
}


def find_nvcc():
    """The path of nvcc, or the reason why the CUDA kernels are not built."""
    if os.environ.get("PAR_XL_SKIP_CUDA", "0") not in ("", "0"):
        return None, "PAR_XL_SKIP_CUDA is set"
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    found = [shutil.which("nvcc", path=f"{home}/bin") for home in [*homes, "/usr/local/cuda"]]
    nvcc = next(filter(None, [*found[: len(homes)], shutil.which("nvcc"), found[-1]]), None)
    return (nvcc, None) if nvcc else (None, "nvcc was not found")


def cuda_archs(nvcc):
    """The requested architectures that this nvcc knows, and those that it does not."""
    wanted = os.environ.get("PAR_XL_CUDA_ARCHS", "80 90 100").replace(",", " ").replace("sm_", "").split()
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True).stdout.split()
    found = [arch for arch in wanted if f"compute_{arch}" in known]
    return found, [arch for arch in wanted if arch not in found]


def cuda_root(nvcc):
    """The toolkit's folder as nvcc itself reports it (nvcc may be a wrapper script)."""
    dry = subprocess.run([nvcc, "--dryrun", "-x", "cu", "-c", os.devnull], capture_output=True, text=True).stderr
    top = next((line.split("TOP=", 1)[1] for line in dry.splitlines() if "TOP=" in line), Path(nvcc).parent.parent)
    return Path(top).resolve()


def instruction_sets(cxx):
    """The sets of this processor's family, without AMX where the compiler does not know it (g++ 10, clang 11)."""
    if platform.machine().lower() not in ("x86_64", "amd64") or not sysconfig.get_platform().endswith("x86_64"):
        return {"base": X86_SETS["base"]}
    with_amx = [*shlex.split(cxx), *X86_SETS["amx"][1].split(), "-fsyntax-only", "-x", "c++", os.devnull]
    knows_amx = subprocess.run(with_amx, stderr=subprocess.DEVNULL).returncode == 0
    return {isa: copy for isa, copy in X86_SETS.items() if isa != "amx" or knows_amx}


class NinjaBuild(build_ext):
    """Writes one build.ninja for the extension and runs it."""

    def build_extension(self, ext):
        import ninja
        import pybind11

        # Not build_temp: pip makes a new one for each editable build, and ninja would start from nothing.
        out = ROOT / "build" / f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        out.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        nvcc, why_not = find_nvcc()
        archs, unknown = cuda_archs(nvcc) if nvcc else ([], [])
        if nvcc and not archs:
            nvcc, why_not = None, "nvcc knows none of the requested architectures"
        cuda = " ".join(f"sm_{a}" for a in archs) + f" and PTX {archs[-1]}" if nvcc else f"not built: {why_not}"
        if nvcc and unknown:
            cuda += f" (nvcc does not know {', '.join(f'sm_{a}' for a in unknown)})"

        cxx = os.environ.get("CXX", "g++")
        sets = instruction_sets(cxx)
        built = {"X86": "avx2" in sets, "AMX": "amx" in sets, "CUDA": bool(nvcc)}
        defines = " ".join(f"-DPAR_XL_{name}={int(x)}" for name, x in built.items())
        defines += f" '-DPAR_XL_CUDA_INFO=\"{cuda}\"'"
        include = f"-I{sysconfig.get_path('include')} -I{pybind11.get_include()} -I{ROOT / 'csrc'}"
        link, objects = "-shared -fopenmp", []

        with open(out / "build.ninja", "w") as file:
            n = ninja.ninja_syntax.Writer(file, width=4096)
            n.rule(
                "cxx",
                f"$cxx {CXX_FLAGS} {defines} {include} $flags $cxxflags -MMD -MF $out.d -c $in -o $out",
                depfile="$out.d",
                deps="gcc",
            )
            n.rule("link", "$cxx $in $flags -o $out")
            n.variable("cxx", cxx)
            n.variable("cxxflags", os.environ.get("CXXFLAGS", ""))

            def compile(source, rule, name, flags=""):
                objects.append(str(out / f"{name}.o"))
                n.build(objects[-1], rule, str(source), variables={"flags": flags})

            compile(ROOT / "csrc/bindings.cpp", "cxx", "bindings")
            for isa, (sources, flags) in sets.items():
                for source in sorted((ROOT / "csrc/cpu").glob(f"{sources}.cpp")):
                    compile(source, "cxx", f"{source.stem}.{isa}", f"-DPAR_XL_ISA={isa} {flags}")
            if nvcc:
                root = cuda_root(nvcc)
                codes = " ".join(f"-gencode arch=compute_{a},code=sm_{a}" for a in archs)
                codes += f" -gencode arch=compute_{archs[-1]},code=compute_{archs[-1]}"
                flags = f"-O3 -std=c++17 -Xcompiler -fPIC,-fvisibility=hidden -I{ROOT / 'csrc'} {codes} --threads 0"
                n.rule("nvcc", f"{nvcc} {flags} -MD -MF $out.d -c $in -o $out", depfile="$out.d", deps="gcc")
                for source in sorted((ROOT / "csrc/cuda").glob("*.cu")):
                    compile(source, "nvcc", f"{source.stem}.cuda")
                library = next(
                    p
                    for p in (root / "lib64", root / "lib", root / "targets/x86_64-linux/lib")
                    if (p / "libcudart_static.a").exists()
                )
                link += f" -L{library} -lcudart_static -ldl -lrt -lpthread"
            n.build(str(target), "link", objects, variables={"flags": link})
            n.default(str(target))

        jobs = os.environ.get("MAX_JOBS")
        subprocess.check_call([os.path.join(ninja.BIN_DIR, "ninja"), "-C", str(out), *(["-j", jobs] if jobs else [])])
        print(f"par_xl: built C++ for {', '.join(sets)}; CUDA: {cuda}", flush=True)


KERNELS = ["par_xl.kernels"] + [f"par_xl.kernels.{p}" for p in find_packages(str(ROOT / "kernels"))]

setup(
    packages=find_packages(str(ROOT), include=["par_xl", "par_xl.*"]) + KERNELS,
    package_dir={"par_xl.kernels": "kernels"},
    package_data={"par_xl": ["py.typed", "_C.pyi"]},
    ext_modules=[Extension("par_xl._C", sources=[])],
    cmdclass={"build_ext": NinjaBuild},
)
