"""The choice of backend."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses import FakeTensorMode

import par_xl
from par_xl.ops import registry
from par_xl.ops.ar_tar import FORWARD

CPU = torch.zeros(1, 2, 3)


def test_auto_takes_the_native_kernels():
    assert registry.choose(FORWARD, None, CPU) == "native"


def test_auto_without_kernels_is_eager():
    assert registry.choose(FORWARD, None, CPU.to("meta")) == "eager"
    assert registry.choose(FORWARD, None, CPU.to(torch.complex64)) == "eager"
    with FakeTensorMode():
        on_a_gpu = torch.empty(1, 2, 3, device="cuda")  # which need not be there
    assert registry.choose(FORWARD, None, on_a_gpu) == ("triton" if torch.cuda.is_available() else "eager")


def test_use_backend_as_context_manager_and_plain_call():
    with par_xl.use_backend("eager"):
        assert registry.choose(FORWARD, None, CPU) == "eager"
        with par_xl.use_backend("native"):
            assert registry.choose(FORWARD, None, CPU) == "native"
        assert registry.choose(FORWARD, None, CPU) == "eager"
        assert registry.choose(FORWARD, "native", CPU) == "native"
    assert registry.choose(FORWARD, None, CPU) == "native"
    again = par_xl.use_backend("eager")
    assert registry.choose(FORWARD, None, CPU) == "eager"
    par_xl.use_backend("auto")
    for _ in range(2):
        with again:
            assert registry.choose(FORWARD, None, CPU) == "eager"


def test_use_backend_after_an_exception():
    with pytest.raises(KeyError), par_xl.use_backend("eager"):
        raise KeyError
    assert registry.choose(FORWARD, None, CPU) == "native"


def test_unknown_name():
    for ask in (par_xl.use_backend, lambda name: par_xl.ar_tar_loss(CPU, backend=name)):
        with pytest.raises(ValueError, match="'fast'"):
            ask("fast")


def test_a_named_backend_never_falls_back(monkeypatch):
    with pytest.raises(ValueError, match=r'backend="native" cannot run on meta: there are no kernels for meta'):
        par_xl.ar_tar_loss(CPU.to("meta"), backend="native")
    with pytest.raises(ValueError, match="no kernels for torch.float8_e5m2"):
        par_xl.ar_tar_loss(CPU.to(torch.float8_e5m2), backend="native")
    monkeypatch.setattr(registry, "_C", None)
    monkeypatch.setattr(registry, "_missing_extension", "it was not built")
    registry._why_not.cache_clear()
    try:
        with pytest.raises(ValueError, match='backend="native" cannot run on cpu: it was not built'):
            par_xl.ar_tar_loss(CPU, backend="native")
        assert registry.choose(FORWARD, None, CPU) == "eager"
    finally:
        registry._why_not.cache_clear()


def test_the_backward_runs_on_the_backend_of_its_forward(monkeypatch):
    x = torch.randn(1, 3, 4, requires_grad=True)
    with par_xl.use_backend("native"):
        loss = par_xl.ar_tar_loss(x)
    with par_xl.use_backend("eager"):
        loss.backward()
    assert x.grad is not None


def test_backends_say_what_is_missing():
    there = par_xl.backends()
    assert set(there) == {"eager", "native", "triton"}
    assert there["native"]["cpu"] == "available"
    if not torch.cuda.is_available():
        assert there["triton"]["cuda"] == "torch sees no GPU"


def test_import_is_light():
    """``import par_xl`` loads neither triton nor the training stack, and works where they are absent."""
    script = (
        "import sys\n"
        "blocked = ['triton', 'lightning', 'typer', 'rich', 'matplotlib', 'tensorboard', 'sentencepiece']\n"
        "import torch\n"
        "before = set(sys.modules)\n"
        "import par_xl\n"
        "loaded = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        "assert not loaded & set(blocked), loaded & set(blocked)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_the_readmes_python_runs():
    """In a process that has imported nothing else."""
    blocks = re.findall(r"```python\n(.*?)```", (Path(__file__).parents[1] / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 2
    script = "import torch; loss = 0; output = raw = torch.randn(2, 3, 4)\n" + "del par_xl\n".join(blocks)
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)


def test_import_without_triton():
    script = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, par_xl\n"
        "par_xl.ar_tar_loss(torch.ones(1, 2, 3)).item()\n"
        "import par_xl.ops.registry as r\n"
        "assert 'not installed' in r._why_not('triton', 'cpu'), r._why_not('triton', 'cpu')\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_kernels_are_imported_once():
    """From the repository's root ``import kernels`` must not load the Triton kernels under a second name."""
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", "import kernels"], cwd=root, capture_output=True, text=True)
    assert done.returncode and "import that" in done.stderr
