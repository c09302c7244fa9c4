"""The first case of every op on every GPU backend, once: what gpu_check.sh runs under compute-sanitizer."""

import importlib
import sys
from pathlib import Path

import torch

from par_xl.testing import OpChecks, run

TESTS = Path(__file__).parent.parent / "tests"
sys.path.insert(0, str(TESTS))


def forward(function, inputs):
    with torch.no_grad():
        function(**inputs)


for path in sorted(TESTS.glob("test_*.py")):
    module = importlib.import_module(path.stem)
    for checks in vars(module).values():
        if isinstance(checks, type) and issubclass(checks, OpChecks) and checks.__module__ == path.stem:
            for backend in ("native", "triton"):
                for step in (run, forward):  # the forward alone where there is no backward
                    try:
                        step(checks().on(backend), checks().first_case(torch.float16, "cuda"))
                    except ValueError as lacking:
                        print(checks.__name__, backend, step.__name__, lacking)
                        continue
                    torch.cuda.synchronize()
                    print(checks.__name__, backend, step.__name__)
                    break
