"""Checks that every op passes on every backend. (:mod:`par_xl.machine_code` compiles kernels without a GPU.)

A test file subclasses :class:`OpChecks`, names the registered ops that it covers and lists its cases.
``tests/conftest.py`` turns the class's ``cases``, ``gradcheck_cases``, ``dtypes`` and ``bad_input`` into parameters.
"""

import copy
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from itertools import accumulate
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_flatten, tree_map_only

from par_xl.ops import large_results, registry

Inputs = dict[str, Any]
# A case makes the keyword arguments of a call; randn(*shape) gives a leaf of the dtype and device under test.
Case = Callable[[Callable[..., Tensor]], Inputs]


def make_inputs(case: Case, dtype: torch.dtype, device: str, seed: int = 0) -> Inputs:
    """The case's arguments: normal variates rounded to ``dtype``, the same for every dtype and device."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
        return x.to(device, dtype).requires_grad_()

    inputs = case(randn)
    return tree_map_only(Tensor, lambda x: x if x.is_floating_point() else x.to(device), inputs)


def leaves(inputs: Inputs) -> list[Tensor]:
    """The differentiable tensors among the arguments, each once."""
    found = [x for x in tree_flatten(inputs)[0] if isinstance(x, Tensor) and x.requires_grad]
    return list({id(x): x for x in found}.values())


def promoted(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    """A copy in another dtype that keeps which arguments are one and the same tensor."""
    made: dict[int, Tensor] = {}

    def convert(x: Tensor) -> Tensor:
        if x.is_floating_point():
            made.setdefault(id(x), x.detach().to(dtype, copy=True).requires_grad_(x.requires_grad))
        return made.get(id(x), x)

    return tree_map_only(Tensor, convert, inputs)


def run(function: Callable, inputs: Inputs) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs, and the gradients of a fixed weighted sum of them."""
    outputs = [x for x in tree_flatten(function(**inputs))[0] if isinstance(x, Tensor) and x.requires_grad]
    weights = [torch.linspace(-1, 1.5, x.numel(), device=x.device, dtype=x.dtype).view(x.shape) for x in outputs]
    total = torch.stack([(x * w).sum().double() for x, w in zip(outputs, weights, strict=True)]).sum()
    gradients = torch.autograd.grad(total, leaves(inputs))
    return [x.detach() for x in outputs], list(gradients)


def largest_error(x: Tensor, exact: Tensor) -> float:
    return (x.double() - exact.double()).abs().max().item() if x.numel() else 0.0


@contextmanager
def replaced_allocations(replace: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """``torch.empty`` and its relatives return ``replace`` of their result."""

    def wrapped(allocate: Callable) -> Callable:
        return lambda *args, **kwargs: replace(allocate(*args, **kwargs))

    targets = [(torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (Tensor, "new_empty")]
    with ExitStack() as stack:
        for owner, name in targets:
            stack.enter_context(mock.patch.object(owner, name, wrapped(getattr(owner, name))))
        yield


def nan_allocations() -> AbstractContextManager[None]:
    """New memory holds NaN, as a result that was never written then does."""
    return replaced_allocations(lambda x: x.fill_(torch.nan) if x.is_floating_point() else x)


@contextmanager
def recorded_ops() -> Iterator[dict[str, tuple]]:
    """The arguments of the registered ops that run inside, by name."""
    calls: dict[str, tuple] = {}
    original = registry.Op.__call__

    def record(op: registry.Op, *args: Any) -> Any:
        calls[op.name] = args
        return original(op, *args)

    with mock.patch.object(registry.Op, "__call__", record):
        yield calls


def restrided(x: Tensor) -> Tensor:
    """The same values in other strides: dimensions stored in reverse order, every second element of the last."""
    wide = torch.full((*reversed(x.shape[:-1]), 2 * x.shape[-1]), torch.nan, dtype=x.dtype, device=x.device)
    order = [*reversed(range(x.dim() - 1)), x.dim() - 1]
    view = wide.permute(order)[..., ::2]
    view.copy_(x.detach())
    return view.requires_grad_(x.requires_grad)


def peak_memory(function: Callable[[], Any], device: torch.device) -> int:
    """Bytes that torch has allocated beyond those before the call, at the worst moment; results included."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    # Kept memory is not torch's: without it every result is counted.
    with (
        mock.patch.object(large_results, "LARGE", sys.maxsize),
        torch.profiler.profile(activities=activities, profile_memory=True) as profile,
    ):
        held = function()
    events = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = [bytes for _, bytes in sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")]
    del held
    return max(accumulate(changes), default=0)


def assert_capturable(step: Callable[[], list[Tensor]]) -> None:
    """On a GPU, ``step`` does not wait for the device, and its CUDA graph replays to the same bits."""
    expected = step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    assert all(torch.equal(x, y) for x, y in zip(captured, expected, strict=True))


class OpChecks:
    """What an op must pass; see ``tests/test_ar_tar.py`` for a complete use.

    Attributes:
        ops: names of the registered ops that these checks cover.
        call: the public function (a staticmethod) with a ``backend`` argument.
        cases, gradcheck_cases: name -> case; the second ones are tiny.
        dtypes: the dtypes that the kernels take.
        bad_input: name -> (arguments that replace those of the first case, exception, part of its message).
    """

    ops: tuple[str, ...]
    call: Callable
    cases: dict[str, Case]
    gradcheck_cases: dict[str, Case]
    bad_input: dict[str, tuple[Inputs, type[Exception], str]]
    dtypes = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

    def first_case(self, dtype: torch.dtype, device: str) -> Inputs:
        return make_inputs(next(iter(self.cases.values())), dtype, device)

    def on(self, backend: str) -> Callable:
        return lambda **inputs: type(self).call(**inputs, backend=backend)

    def test_gradcheck(self, gradcheck_case: Case, backend: str, device: str) -> None:
        inputs = make_inputs(gradcheck_case, torch.float64, device)
        variables = leaves(inputs)

        def function(*values: Tensor) -> Any:
            replaced = {id(old): new for old, new in zip(variables, values, strict=True)}
            return self.on(backend)(**tree_map_only(Tensor, lambda x: replaced.get(id(x), x), inputs))

        # The interpreter takes its time: there along random directions, but element by element where these are few.
        fast = backend == "triton" and sum(x.numel() for x in variables) > 24
        assert torch.autograd.gradcheck(function, variables, nondet_tol=0.0, fast_mode=fast)

    def test_error_budget(self, case: Case, dtype: torch.dtype, backend: str, device: str) -> None:
        """Against fp64, at most twice the error of eager PyTorch in the same dtype, plus an eps.

        An error is a random number, and in a tensor of a few rows eager's may be small by luck: what is over budget
        with one draw of the inputs is judged by the largest errors of eight.
        """
        draws = [self._errors(case, dtype, backend, device, seed=0)]
        if any(error > allowed for error, allowed in draws[0]):
            draws += [self._errors(case, dtype, backend, device, seed) for seed in range(1, 8)]
        for tensor in zip(*draws, strict=True):
            error, allowed = map(max, zip(*tensor, strict=True))
            assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"

    def _errors(
        self, case: Case, dtype: torch.dtype, backend: str, device: str, seed: int
    ) -> list[tuple[float, float]]:
        """Of each output and gradient, the largest error and the budget.

        fp64 has no wider reference to measure eager's error with: there, 1e-13 of the tensor's size.
        """
        inputs = make_inputs(case, dtype, device, seed)
        actual, eager = run(self.on(backend), inputs), run(self.on("eager"), inputs)
        exact = run(self.on("eager"), promoted(inputs, torch.float64))
        found = []
        for groups in zip(actual, eager, exact, strict=True):
            for x, peer, reference in zip(*groups, strict=True):
                assert x.dtype == peer.dtype and x.shape == reference.shape and torch.isfinite(x).all()
                size = reference.abs().max().item() if x.numel() else 0.0
                own = 1e-13 * size if dtype == torch.float64 else largest_error(peer, reference)
                found.append((largest_error(x, reference), 2 * own + torch.finfo(x.dtype).eps * size))
        return found

    def test_opcheck(self, backend: str, device: str) -> None:
        with recorded_ops() as calls:
            run(self.on(backend), self.first_case(torch.float32, device))
        assert set(calls) >= set(self.ops)
        for name in self.ops:
            arguments = tree_map_only(Tensor, lambda x: x.detach(), calls[name])
            torch.library.opcheck(registry.OPS[name].overload, arguments)

    def test_compile(self, backend: str, device: str) -> None:
        function = torch.compile(self.on(backend), fullgraph=True, dynamic=False)
        self._compare(function, self.on(backend), self.first_case(torch.float32, device))

    def test_compile_dynamic(self, backend: str, device: str) -> None:
        function = torch.compile(self.on(backend), fullgraph=True, dynamic=True)
        for case in list(self.cases.values())[:2]:
            self._compare(function, self.on(backend), make_inputs(case, torch.float32, device))

    def test_compile_in_a_cold_process(self, backend: str, device: str) -> None:
        """The first call of a process is a traced one: nothing may hang on an earlier eager call."""
        script = (
            "import sys, importlib, torch\n"
            "checks = getattr(importlib.import_module(sys.argv[1]), sys.argv[2])()\n"
            "inputs = checks.first_case(torch.float32, sys.argv[4])\n"
            "from par_xl.testing import run\n"
            "run(torch.compile(checks.on(sys.argv[3]), fullgraph=True, backend='aot_eager'), inputs)\n"
        )
        folder = os.path.dirname(os.path.abspath(sys.modules[type(self).__module__].__file__ or ""))
        arguments = [type(self).__module__.split(".")[-1], type(self).__name__, backend, device]
        environment = {**os.environ, "PYTHONPATH": folder}
        done = subprocess.run(
            [sys.executable, "-c", script, *arguments], env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr

    def test_bits_repeat(self, backend: str, device: str) -> None:
        for dtype in (torch.float32, torch.float16):
            inputs = self.first_case(dtype, device)
            first = run(self.on(backend), inputs)
            for _ in range(2):
                self._equal(run(self.on(backend), inputs), first)

    def test_every_element_is_written(self, case: Case, backend: str, device: str) -> None:
        inputs = make_inputs(case, torch.float32, device)
        clean = run(self.on(backend), inputs)
        with nan_allocations():
            self._equal(run(self.on(backend), inputs), clean)

    def test_strides(self, backend: str, device: str) -> None:
        inputs = self.first_case(torch.float32, device)
        made: dict[int, Tensor] = {}
        other = tree_map_only(
            Tensor, lambda x: made.setdefault(id(x), restrided(x)) if x.is_floating_point() else x, copy.copy(inputs)
        )
        self._compare(self.on(backend), self.on(backend), other, inputs)

    def test_gradient_of_a_sum(self, backend: str, device: str) -> None:
        """autograd expands it from one number, with strides of 0."""
        inputs = self.first_case(torch.float32, device)
        got, wanted = (
            torch.autograd.grad(tree_flatten(self.on(b)(**inputs))[0][0].sum(), leaves(inputs), materialize_grads=True)
            for b in (backend, "eager")
        )
        for x, y in zip(got, wanted, strict=True):
            torch.testing.assert_close(x, y)

    def test_without_values(self, case: Case, backend: str, device: str) -> None:
        """FakeTensors and tensors on the meta device give results and gradients of the right shapes and dtypes."""
        inputs = make_inputs(case, torch.float32, device)
        made: dict[int, Tensor] = {}

        def on_meta(x: Tensor) -> Tensor:
            return made.setdefault(id(x), x.detach().to("meta").requires_grad_(x.requires_grad))

        with FakeTensorMode() as mode:
            fake = run(self.on(backend), tree_map_only(Tensor, mode.from_tensor, inputs))
        meta = run(self.on("auto"), tree_map_only(Tensor, on_meta, inputs))
        described = [
            [[(x.shape, x.dtype) for x in group] for group in groups]
            for groups in (run(self.on("eager"), inputs), fake, meta)
        ]
        assert described[1:] == [described[0]] * 2

    def test_autocast(self, backend: str, device: str) -> None:
        inputs = self.first_case(torch.float32, device)
        with torch.autocast(device, torch.bfloat16):
            actual = run(self.on(backend), inputs)
        for got, wanted in zip(actual, run(self.on(backend), inputs), strict=True):
            for x, y in zip(got, wanted, strict=True):
                torch.testing.assert_close(x.float(), y, rtol=0.05, atol=0.05 * y.abs().max().item())

    def test_bad_input(self, bad: tuple[Inputs, type[Exception], str], backend: str, device: str) -> None:
        replaced, error, message = bad
        inputs = self.first_case(torch.float32, device)
        try:
            self.on(backend)(**{**inputs, **replaced})
        except error as raised:
            assert message in str(raised), f"{message!r} is not in {str(raised)!r}"
        else:
            raise AssertionError(f"no {error.__name__} was raised")

    def test_second_derivative_is_an_error(self, backend: str, device: str) -> None:
        inputs = self.first_case(torch.float32, device)
        output = tree_flatten(self.on(backend)(**inputs))[0][0]
        first = torch.autograd.grad(output.sum(), leaves(inputs), create_graph=True)
        try:
            sum(x.sum() for x in first).backward()  # type: ignore[union-attr]
        except RuntimeError as raised:
            assert "no second derivative" in str(raised)
        else:
            raise AssertionError("a second derivative was computed")

    def _compare(self, actual: Callable, wanted: Callable, inputs: Inputs, others: Inputs | None = None) -> None:
        for got, want in zip(run(actual, inputs), run(wanted, others or inputs), strict=True):
            for x, y in zip(got, want, strict=True):
                torch.testing.assert_close(x, y)

    def _equal(self, actual: tuple, wanted: tuple) -> None:
        for got, want in zip(actual, wanted, strict=True):
            for x, y in zip(got, want, strict=True):
                assert torch.equal(x, y), "the bits differ"
