"""Every registered op has the whole set of checks, on every backend that it has kernels for."""

import importlib
from pathlib import Path

import pytest

from par_xl.ops import registry
from par_xl.testing import OpChecks

CHECKS = [name for name in vars(OpChecks) if name.startswith("test_")]


def checked_classes():
    for path in sorted(Path(__file__).parent.glob("test_*.py")):
        module = importlib.import_module(path.stem)
        yield from (
            c
            for c in vars(module).values()
            if isinstance(c, type) and issubclass(c, OpChecks) and c.__module__ == path.stem
        )


@pytest.mark.parametrize("op", sorted(registry.OPS))
def test_has_every_check(op):
    classes = [c for c in checked_classes() if op in c.ops]
    assert classes, f"no test class covers {op}"
    for checks in classes:
        for name in CHECKS:
            assert callable(getattr(checks, name)), f"{checks.__name__} switches {name} off"
        assert checks.cases and checks.gradcheck_cases and checks.bad_input


@pytest.mark.parametrize("op", sorted(registry.OPS))
def test_has_both_kernel_backends(op):
    assert set(registry.OPS[op].implementations) == {"native", "triton"}
