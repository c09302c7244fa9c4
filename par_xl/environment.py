"""What this process runs on: versions and device, for ``par-xl info`` and for the records of results."""

import importlib.metadata
import platform
import re
from pathlib import Path

import torch

import par_xl

_OPTIONAL = ("triton", "numpy", "lightning", "safetensors", "fastai")


def versions() -> dict[str, str]:
    """Versions of par_xl, Python, torch and the optional packages ("not installed" where they are missing)."""
    found = {"par_xl": par_xl.__version__, "python": platform.python_version(), "torch": torch.__version__}
    for package in _OPTIONAL:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def device_name() -> str:
    """The GPU that torch sees, or else the processor and torch's number of threads."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    name = model[1] if model else platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads"
