"""Registered ops (``torch.library``, namespace ``par_xl``) and the choice of backend.

A backend is ``eager`` (the reference in plain PyTorch), ``native`` (the compiled extension: C++ on the CPU, CUDA on the
GPU), ``triton`` (``par_xl.kernels``), or ``auto`` (the first of :data:`AUTO` that supports the call).
"""

import importlib.util
import os
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import cache, wraps
from typing import Any

import torch  # before the extension, whose libgomp.so.1 is then the one that torch has loaded
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

try:
    from par_xl import _C

    _missing_extension = ""
except ImportError as error:  # the package works without its extension, on the other backends
    _C = None  # type: ignore[assignment]
    _missing_extension = f"the extension par_xl._C cannot be imported ({error})"

BACKENDS = ("eager", "native", "triton")
# The order of preference by device; revised when a benchmark says so.
AUTO = {"cpu": ("native", "eager"), "cuda": ("triton", "native", "eager")}
# The dtype codes of csrc/ops.h.
DTYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2, torch.float64: 3}

LIBRARY = torch.library.Library("par_xl", "DEF")
OPS: dict[str, "Op"] = {}


class Op:
    """One registered op: its schema, its fake, and one implementation for each backend that has kernels.

    The schema's last argument must be ``str backend``, and an implementation takes all the others.

        op = Op("square(Tensor x, str backend) -> Tensor", fake=lambda x, backend: torch.empty_like(x))

        @op.implement("native")
        def _(x): ...
    """

    def __init__(self, schema: str, fake: Callable):
        self.name = schema.split("(")[0]
        self.implementations: dict[str, Callable] = {}
        self.lacks: dict[str, Callable[[str, torch.dtype], str]] = {}
        self.by_name: dict[str, tuple[str, ...]] = {}
        LIBRARY.define(schema, tags=[torch.Tag.pt2_compliant_tag])
        LIBRARY.impl(self.name, self._run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"par_xl::{self.name}", fake, lib=LIBRARY)
        self.overload = getattr(torch.ops.par_xl, self.name).default
        OPS[self.name] = self

    def implement(
        self,
        backend: str,
        lacks: Callable[[str, torch.dtype], str] = lambda device, dtype: "",
        by_name: tuple[str, ...] = (),
    ) -> Callable:
        """``lacks`` says what the implementation has no kernels for ("" if it has them): a device type and a dtype.

        On the device types ``by_name`` it runs only where it is asked for by name: "auto" passes it over.
        """

        def register(function: Callable) -> Callable:
            self.implementations[backend] = function
            self.lacks[backend] = lacks
            self.by_name[backend] = by_name
            return function

        return register

    def _run(self, *args: Any) -> Any:
        *inputs, backend = args
        device = next(x for x in inputs if isinstance(x, Tensor)).device
        other = device.type == "cuda" and device.index != torch.cuda.current_device()
        with torch.cuda.device(device) if other else nullcontext():
            return self.implementations[backend](*inputs)

    def __call__(self, *args: Any) -> Any:
        return self.overload(*args)


def rows(x: Tensor | None) -> tuple[int, int, int]:
    """csrc/ops.h's Rows of a ``(batch, time, width)`` tensor; null for None and for a tensor without elements."""
    return (0, 0, 0) if x is None or x.numel() == 0 else (x.data_ptr(), x.stride(0), x.stride(1))


def acc_dtype(x: Tensor | torch.dtype) -> torch.dtype:
    """The dtype of the arithmetic on x, whatever the storage: fp32, or fp64 for fp64."""
    return torch.float64 if (x.dtype if isinstance(x, Tensor) else x) == torch.float64 else torch.float32


def has_values(x: Tensor) -> bool:
    """Whether ``x`` holds numbers: tensors on the meta device and torch's FakeTensors have shapes alone."""
    return x.device.type != "meta" and not isinstance(x, FakeTensor)


def host_can_look(x: Tensor) -> bool:
    """Whether the numbers can be checked at no cost: on the CPU, in code that is not being traced."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling() and has_values(x)


def under_autocast(x: Tensor, *others: Any) -> tuple[Any, ...]:
    """What torch.autocast makes of tensors (or None) in a matrix product: in its own dtype all floats but fp64."""
    device = x.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return x, *others
    dtype = torch.get_autocast_dtype(device)
    stays = lambda t: t is None or not t.is_floating_point() or t.dtype == torch.float64  # noqa: E731
    return tuple(t if stays(t) else t.to(dtype) for t in (x, *others))


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """For arithmetic on tensors like ``x`` in the dtypes that they have."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


def no_cuda(op: str) -> Callable[[str, torch.dtype], str]:
    """What ``native`` lacks in an op that has C++ kernels alone; for :meth:`Op.implement`."""
    return lambda device, dtype: f"{op} has no CUDA kernels" if device == "cuda" else ""


class _NoSecondDerivative(torch.autograd.Function):
    """Passes a gradient on, and raises when it is itself differentiated."""

    @staticmethod
    def forward(ctx, gradient, *inputs):
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError('par_xl\'s fused ops have no second derivative; ask for one with backend="eager"')


def first_derivative_only(backward: Callable) -> Callable:
    """Wrap the ``backward`` of a fused op, so that a second derivative raises instead of leaving out a term.

    torch's ``once_differentiable`` does not suffice: it lets ``create_graph=True`` return gradients that look constant.
    """

    @wraps(backward)
    def wrapper(ctx, *grads):
        with torch.no_grad():
            gradients = backward(ctx, *grads)
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return gradients
        inputs = [x for x in (*grads, *ctx.saved_tensors) if x is not None and x.requires_grad]
        return tuple(g if g is None else _NoSecondDerivative.apply(g, *inputs) for g in gradients)

    return wrapper


def distinct(tensors: Iterable[Tensor | None]) -> list[Tensor | None]:
    """The same, where a tensor that comes again is a view: compiled, an autograd.Function must be given none twice."""
    found: list[Tensor | None] = []
    for x in tensors:
        again = torch.compiler.is_compiling() and x is not None and any(x is y for y in found)
        found.append(x.view_as(x) if again and x is not None else x)
    return found


_selected = "auto"


class use_backend:
    """Choose the backend of every op that is not told one: ``use_backend("eager")``, plain or as a context manager.

    The choice holds for the whole process; a backward runs on the backend of its forward.

    Raises:
        ValueError: ``name`` is not "auto", "eager", "native" or "triton".
    """

    def __init__(self, name: str):
        global _selected
        check_name(name)
        self._name, self._before, _selected = name, _selected, name

    def __enter__(self) -> "use_backend":
        global _selected
        _selected = self._name  # again, where one object serves two blocks
        return self

    def __exit__(self, *_: object) -> None:
        global _selected
        _selected = self._before


def check_name(name: str) -> None:
    if name not in ("auto", *BACKENDS):
        raise ValueError(f'backend must be "auto", "eager", "native" or "triton", not {name!r}')


@cache
def _why_not(backend: str, device: str) -> str:
    """Why a backend cannot run on a device type ("" if it can)."""
    if device not in AUTO:
        return "" if backend == "eager" else f"there are no kernels for {device}"
    if device == "cuda" and not torch.cuda.is_available():
        return "torch sees no GPU"
    if backend == "native":
        if _C is None:
            return _missing_extension
        return "" if device == "cpu" or _C.has_cuda else f"CUDA kernels {_C.cuda_info}"
    if backend == "triton":
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed"
        if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
            return "Triton runs on the CPU only in its interpreter (TRITON_INTERPRET=1)"
    return ""


def _why_not_op(op: Op, backend: str, device: str, dtype: torch.dtype) -> str:
    """Why a backend cannot run an op on tensors of a device type and dtype ("" if it can)."""
    if backend == "eager":
        return ""  # wherever there are tensors; FakeTensors need no GPU to be on one
    if backend not in op.implementations:
        return _why_not(backend, device) or f"{op.name} has no {backend} kernels"
    if dtype not in DTYPES:
        return _why_not(backend, device) or f"there are no kernels for {dtype}"
    return _why_not(backend, device) or op.lacks[backend](device, dtype)


def _choose(op: str, requested: str, device: str, dtype: torch.dtype) -> str:
    check_name(requested)
    if requested == "auto":
        candidates = (b for b in AUTO.get(device, ("eager",)) if device not in OPS[op].by_name.get(b, ()))
        return next(b for b in candidates if not _why_not_op(OPS[op], b, device, dtype))
    reason = _why_not_op(OPS[op], requested, device, dtype)
    if reason:
        raise ValueError(f'backend="{requested}" cannot run on {device}: {reason}')
    return requested


# torch.compile takes the choice as a constant of the graph. torch.compiler.assume_constant_result sets this too, but
# imports torch._dynamo, and with it triton, into every program that imports par_xl.
_choose._dynamo_marked_constant = True  # type: ignore[attr-defined]


def choose(op: Op, backend: str | None, x: Tensor) -> str:
    """The backend that runs ``op`` on tensors like ``x``: the one asked for by name, or the best that there is.

    Raises:
        ValueError: the name is unknown, or the backend that was asked for cannot run this call, and why.
    """
    return _choose(op.name, backend or _selected, x.device.type, x.dtype)


def backends() -> dict[str, dict[str, str]]:
    """Which backends are there, or why not: ``{"native": {"cpu": "available", "cuda": "torch sees no GPU"}, ...}``."""
    return {name: {device: _why_not(name, device) or "available" for device in AUTO} for name in BACKENDS}


def build_info() -> dict[str, str]:
    """What the extension was built with: the instruction set chosen for this processor, and the CUDA architectures."""
    if _C is None:
        return {"extension": _missing_extension}
    return {"extension": "built", "cpu": _C.isa(), "cuda": _C.cuda_info}
