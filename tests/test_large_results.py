"""Memory for large results: used again when no tensor holds it, and only then."""

import pytest
import torch

import par_xl
from par_xl.ops import large_results
from par_xl.ops.large_results import to_be_filled


@pytest.fixture(autouse=True)
def empty_pool(monkeypatch):
    monkeypatch.setattr(large_results, "LARGE", 4096)
    monkeypatch.setattr(large_results, "KEPT", 3 * 4096)
    monkeypatch.setattr(large_results, "_free", [])


def new(n=1024, dtype=torch.float32):
    return to_be_filled(torch.empty(n // 8, 8, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_same_shape_dtype_and_strides(dtype):
    like = torch.empty(4, 5, 512, dtype=dtype)
    x = to_be_filled(like)
    assert (x.shape, x.dtype, x.stride(), x.data_ptr() % 64) == (like.shape, dtype, like.stride(), 0)
    assert x.data_ptr() != like.data_ptr()
    x.fill_(1), x.requires_grad_()


def test_memory_is_used_again():
    first = new()
    address = first.data_ptr()
    second = new()
    assert second.data_ptr() != address
    del first
    assert new().data_ptr() == address
    assert new(2048).data_ptr() != address  # another size


def test_views_and_saved_tensors_hold_it():
    x = new().fill_(2)
    address, view = x.data_ptr(), x[3]
    del x
    assert new().data_ptr() != address
    weight = torch.ones(8, requires_grad=True)
    loss = (view * weight).sum()
    del view
    assert new().data_ptr() != address
    loss.backward()
    assert weight.grad.tolist() == [2] * 8
    held = new(), new()
    assert address in [x.data_ptr() for x in held]


def test_no_more_than_a_limit_is_kept():
    held = [new() for _ in range(5)]
    addresses = [x.data_ptr() for x in held]
    while held:
        held.pop(0)
    assert [len(block) for block in large_results._free] == [4096] * 3
    assert {new().data_ptr() for _ in range(3)} <= set(addresses)


def test_small_results_are_left_alone():
    x = torch.empty(100)
    assert to_be_filled(x) is x


def test_gradients_of_ops_come_from_there():
    """And are added to, not replaced, as any."""
    memory = torch.randn(1, 64, 32, requires_grad=True)
    for mode in ("mean", "max"):
        wanted = torch.autograd.grad(par_xl.compress(memory, 4, mode, backend="eager").sum(), memory)[0]
        memory.grad = None
        for _ in range(3):
            par_xl.compress(memory, 4, mode, backend="native").sum().backward()
        torch.testing.assert_close(memory.grad, 3 * wanted)
    assert large_results._free
