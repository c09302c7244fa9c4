"""The machine code of adaptive softmax's kernels, Triton and CUDA, compiled without a GPU."""

import pytest
import torch

from par_xl.machine_code import compile_launches, cuda_kernels, has_cuda_kernels


def launches():
    """What the machine-code test compiles: the head's row kernel, and both ways of a softmax, with every flag."""
    from par_xl.kernels import adaptive_softmax

    from par_xl.ops.adaptive_tables import Options, Tables, softmaxes

    n, d, ends = 256, 512, (20000, 60000)
    for dtype, one, width, workspace in (
        (torch.bfloat16, False, 256, 1 << 28), (torch.bfloat16, True, d, 0), (torch.float32, False, 32, 1 << 28),
    ):  # fmt: skip
        made = []
        for kind in (dtype, torch.float32):  # parameters and gradients
            make = lambda *shape, kind=kind: torch.empty(*shape, dtype=kind)  # noqa: E731
            weights = [make(20000 if one else 20001, d), make(40000, width)]
            biases = [make(len(w)) for w in weights] if one else [None, None]
            separate = (make(1, d), make(1)) if one else (None, None)
            tables = Tables(weights, biases, [None, None if one else make(width, d)], *separate)
            made.append(softmaxes(tables, ends, one))
        vectors = (torch.empty(n) for _ in range(2))
        x, target, dx = torch.empty(n, d, dtype=dtype), torch.zeros(n).long(), torch.empty(n, d)
        grad, nll = vectors
        bad, options = torch.zeros(1).long(), Options(ends, one, -100, 0.1, 1e-3, workspace)
        adaptive_softmax.run(grad, x, target, *made, nll, dx, bad, options)


def test_triton_machine_code():
    """No spills; tensor cores where there are products of bf16, and 16-byte loads."""
    compiled = compile_launches("test_adaptive_softmax_machine_code:launches")
    products = {"log_sum", "hidden_gradient", "weight_gradient", "project", "projection_gradient"}
    others = {"_sort", "_rows_in_place", "merge_losses", "add_splits"}
    assert {(one.kernel, one.capability) for one in compiled} == {
        (kernel, capability) for kernel in products | others for capability in (80, 90, 100)
    }
    tensor_cores = ("HMMA", "HGMMA", "UTCHMMA", "UTCMMA", "TCGEN05")
    for one in compiled:
        assert one.stack == 0, (one.kernel, one.capability, one.registers, one.stack)
    for kernel in products:
        for capability in (80, 90, 100):
            found = [x.sass for x in compiled if (x.kernel, x.capability) == (kernel, capability)]
            assert any(name in sass for sass in found for name in tensor_cores), (kernel, capability)


@pytest.mark.skipif(not has_cuda_kernels(), reason="the extension was built without CUDA kernels")
def test_cuda_machine_code():
    """No spills; logits and gradients move 16 bytes at a time, between global and shared memory too."""
    rows, sorts = cuda_kernels("differentiate_row"), [*cuda_kernels("count_tails"), *cuda_kernels("place_tokens")]
    capabilities = len({one.capability for one in rows})
    assert len(rows) == capabilities * 4 * 2 and len(sorts) == capabilities * 2
    for one in (*rows, *sorts):
        assert one.stack == 0, (one.kernel, one.capability)
    for one in rows:
        assert "LDG.E.128" in one.sass and "STG.E.128" in one.sass, (one.kernel, one.capability)
        if "Lb1E" in one.kernel:
            assert "LDS.128" in one.sass and "STS.128" in one.sass, (one.kernel, one.capability)
