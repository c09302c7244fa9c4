"""Every way in: isolated and offline builds, editable installs, sdist and wheel, beside Hugging Face's `kernels`."""

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CHECK = (
    "import torch, par_xl, par_xl.kernels; from par_xl import _C;"
    "assert par_xl.ar_tar_loss(torch.ones(1, 2, 3), backend='native') == 2;"
    "print(par_xl.__file__, _C.cuda_info)"
)


def run(*command, cwd=None, **environment):
    """Builds without CUDA and without optimisation, which would be most of the time."""
    mine = {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PAR_XL_SKIP_CUDA": "1", "CXXFLAGS": "-O0"}
    environment = {**os.environ, **mine, **environment}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run([*map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of the sources as a checkout has them: no extension, no build folder."""
    target = tmp_path_factory.mktemp("source") / "par_xl"
    ignored = shutil.ignore_patterns(
        "*.so", "build", "dist", "*.egg-info", ".venv", ".git", "__pycache__", ".*_cache", "runs"
    )
    shutil.copytree(ROOT, target, ignore=ignored)
    return target


@pytest.fixture
def python(tmp_path):
    """A new environment that sees this one's packages (torch is large), but not its par_xl."""
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv/bin/python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    if (site / "setuptools").exists():  # Python before 3.12 brings one that is older than the build needs
        run(python, "-m", "pip", "uninstall", "-q", "-y", "setuptools")
    (site / "outer.pth").write_text(sysconfig.get_path("purelib") + "\n")  # its own .pth files are not read
    return python


def test_isolated_install(source, python, tmp_path):
    run(python, "-m", "pip", "install", "-q", "--no-deps", source)
    printed = run(python, "-c", CHECK, cwd=tmp_path)
    assert "site-packages" in printed and "PAR_XL_SKIP_CUDA is set" in printed


def test_sdist_then_wheel(source, python, tmp_path):
    build = "import sys, setuptools.build_meta as b; print(getattr(b, 'build_' + sys.argv[1])(sys.argv[2]))"
    run(sys.executable, "-c", build, "sdist", tmp_path, cwd=source)
    archive = next(tmp_path.glob("*.tar.gz"))
    shutil.unpack_archive(archive, tmp_path / "unpacked")
    unpacked = next((tmp_path / "unpacked").iterdir())
    run(sys.executable, "-c", build, "wheel", tmp_path, cwd=unpacked)
    wheel = next(tmp_path.glob("*.whl"))
    names = zipfile.ZipFile(wheel).namelist()
    assert "par_xl/kernels/ar_tar.py" in names and "par_xl/py.typed" in names
    assert not any(name.startswith(("kernels/", "tests/", "benchmarks/")) for name in names)
    run(python, "-m", "pip", "install", "-q", "--no-deps", "--no-index", wheel)
    run(python, "-c", CHECK, cwd=tmp_path)


def test_editable_offline_install_beside_hugging_face_kernels(source, python, tmp_path):
    """Its setuptools hook imports `kernels`, which must not be our folder; and our package must not shadow it."""
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    (site / "kernels").mkdir()
    (site / "kernels/__init__.py").write_text("HUGGING_FACE = True\n")
    (site / "kernels/locking.py").write_text("def write_egg_lockfile(cmd, basename, filename): pass\n")
    metadata = site / "kernels-0.1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.1\n")
    (metadata / "entry_points.txt").write_text(
        "[egg_info.writers]\nkernels.lock = kernels.locking:write_egg_lockfile\n"
    )
    run(python, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--no-build-isolation", "-e", source)
    run(python, "setup.py", "--version", cwd=source)
    printed = run(python, "-c", CHECK + "; import kernels; assert kernels.HUGGING_FACE", cwd=tmp_path)
    assert str(source) in printed


def test_without_nvcc(source):
    """No nvcc on the machine: not an error, and the build's last line says so."""
    script = (
        "import shutil, sys; shutil.which = lambda *_, **__: None; sys.argv = ['setup.py', '--version']\n"
        "sys.path.insert(0, '.'); import setup; print(setup.find_nvcc())"
    )
    printed = run(sys.executable, "-c", script, cwd=source, PAR_XL_SKIP_CUDA="")
    assert "(None, 'nvcc was not found')" in printed


@pytest.mark.skipif(platform.machine() != "x86_64", reason="one instruction set on this processor")
def test_compiler_without_amx(source, tmp_path):
    """An older compiler builds what it knows."""
    older = tmp_path / "older g++"
    older.write_text('#!/bin/sh\ncase "$*" in *-mamx*) exit 1;; esac\n')
    older.chmod(0o755)
    script = (
        "import shlex, sys; sys.argv = ['setup.py', '--version']; sys.path.insert(0, '.'); import setup\n"
        f"print([list(setup.instruction_sets(cxx)) for cxx in ('true', shlex.quote({str(older)!r}))])"
    )
    printed = run(sys.executable, "-c", script, cwd=source)
    assert "[['base', 'avx2', 'avx512', 'amx'], ['base', 'avx2', 'avx512']]" in printed


@pytest.mark.skipif(platform.machine() != "x86_64", reason="one instruction set on this processor")
@pytest.mark.parametrize("isa", ["base", "avx2"])
def test_every_instruction_set_computes_the_same(isa):
    """The copies for older processors, run on this one."""
    script = (
        "import torch, par_xl\n"
        f"assert par_xl.build_info()['cpu'] == '{isa}', par_xl.build_info()\n"
        "for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):\n"
        "    x, raw = (torch.randn(3, 17, 65).to(dtype).requires_grad_() for _ in range(2))\n"
        "    losses = [par_xl.ar_tar_loss(x, raw, backend=b) for b in ('eager', 'native')]\n"
        "    a, b = (torch.autograd.grad(loss, (x, raw)) for loss in losses)\n"
        "    torch.testing.assert_close(a, b)\n"
    )
    run(sys.executable, "-c", script, PAR_XL_ISA=isa)
