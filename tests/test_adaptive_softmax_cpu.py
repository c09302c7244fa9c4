"""adaptive_nll in C++, where its cuts fall: rounds of rows, tiles and parts of classes, logits kept or made again."""

import os
import subprocess
import sys

import pytest
import torch

import par_xl
from par_xl.testing import largest_error, peak_memory, promoted, run

with_amx = pytest.mark.skipif(par_xl.build_info().get("cpu") != "amx", reason="not on AMX")

# Tokens, width, classes and workspace: wide enough that exp(z - m) is kept (unless the workspace is 0), or narrow; one
# round or several, the last one shorter; fewer tiles than parts, or parts of several tiles; sizes beside whole vectors.
# AMX takes the first three in fp32, and all that are not the narrowest in half precision.
SHAPES = {
    "kept": (150, 136, 1500, 1 << 20),
    "made again": (150, 136, 1500, 0),
    "wide rounds": (401, 145, 331, 150 * 333 * 4),
    "narrow": (150, 40, 1500, 1 << 20),
    "rounds": (500, 72, 300, 80 * 302 * 8),
    "narrow rounds": (1300, 8, 130, 0),
    "no whole vector": (67, 1, 61, 1 << 20),
    "few rows": (3, 80, 2001, 1 << 20),
}


def inputs_of(n, d, classes, workspace, dtype, **options):
    """A head whose columns of the two tails stand apart, in one table with their classes, and biases."""
    generator = torch.Generator().manual_seed(0)
    randn = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()  # noqa: E731
    cutoffs = [classes // 2, classes * 3 // 4]
    return dict(
        input=randn(n, d), target=torch.randint(0, classes, (n,), generator=generator), weights=[randn(classes, d)],
        biases=[randn(classes)], cutoffs=cutoffs, projections=[None] * 3, cluster_weight=randn(2, d),
        cluster_bias=randn(2), workspace=workspace, label_smoothing=0.1, z_loss=1e-3, reduction="mean", **options,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_equals_eager(shape, dtype):
    """fp64 to rounding; narrower dtypes within twice eager's own error, as in the shared budget."""
    inputs = inputs_of(*shape, dtype)
    got, peer, exact = (
        run(lambda b=b, **x: par_xl.adaptive_nll(**x, backend=b), x)
        for b, x in (("native", inputs), ("eager", inputs), ("eager", promoted(inputs, torch.float64)))
    )
    for x, y, reference in zip(*(a[0] + a[1] for a in (got, peer, exact)), strict=True):
        size = reference.abs().max().item()
        own = 1e-13 * size if dtype == torch.float64 else largest_error(y, reference)
        assert largest_error(x, reference) <= 2 * own + torch.finfo(x.dtype).eps * size


@pytest.mark.parametrize("isa", ["base", "avx2", "avx512"])
def test_older_processors(isa):
    """The copies for older instruction sets, whose tiles have other sizes."""
    script = (
        "import torch, par_xl, test_adaptive_softmax_cpu as t\n"
        "for dtype in (torch.float64, torch.float32):\n"
        "    for shape in t.SHAPES.values():\n"
        "        t.test_equals_eager(shape, dtype)\n"
        "print(par_xl.build_info()['cpu'])\n"
    )
    environment = {**os.environ, "PAR_XL_ISA": isa, "PYTHONPATH": os.path.dirname(__file__)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in ("base", "avx2", "avx512")[: ("base", "avx2", "avx512").index(isa) + 1]


@with_amx
def test_matmul_precision():
    """An fp32 number is one, two or three parts of bf16, as torch's setting for CPUs asks for, not that for GPUs."""
    settings = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    before, (gpu, cpu), errors = [x.fp32_precision for x in settings], settings, []
    inputs = inputs_of(200, 136, 1500, 1 << 20, torch.float32)
    exact = run(lambda **x: par_xl.adaptive_nll(**x, backend="eager"), promoted(inputs, torch.float64))
    try:
        gpu.fp32_precision = "tf32"
        for cpu.fp32_precision in ("bf16", "tf32", "ieee"):
            got = run(lambda **x: par_xl.adaptive_nll(**x, backend="native"), inputs)
            pairs = zip(got[0] + got[1], exact[0] + exact[1], strict=True)
            errors.append([largest_error(x, y) / y.abs().max().item() for x, y in pairs])
    finally:
        gpu.fp32_precision, cpu.fp32_precision = before
    for one, two, three in zip(*errors, strict=True):
        assert one < 2**-5 and two < min(one / 8, 2**-12) and three < min(two, 2**-18)


@pytest.mark.parametrize("bits", [0x7FC0, 0x7FFF, -1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan(bits, dtype):
    """Every NaN in a row of the input is one in its loss, and in no other."""
    x = torch.randn(130, 128).to(dtype)
    bits_of_x = x.view(torch.int16)
    bits_of_x[5, -1] = bits  # the upper half of an fp32 number
    bits_of_x[5, -2] = -1
    nll = par_xl.adaptive_nll(x, torch.arange(130), [torch.randn(300, 128).to(dtype)], [], backend="native")
    assert nll.isnan().nonzero().tolist() == [[5]]


@with_amx
def test_tile_registers_are_left_as_found(tmp_path):
    """Configured as they were by whoever used them before, or not at all."""
    (tmp_path / "test.cpp").write_text("""
        #include "cpu/amx.h"
        #include <sys/syscall.h>
        #include <unistd.h>
        int main() {
            if (syscall(SYS_arch_prctl, 0x1023, 18)) return 1;
            alignas(64) unsigned char wanted[64] = {1}, got[64] = {};
            for (int i = 0; i < 8; ++i) wanted[16 + 2 * i] = 32, wanted[48 + i] = 4;
            { par_xl::amx::AmxTiles ours; }
            asm volatile("sttilecfg %0" : "=m"(got));
            if (got[0] != 0) return 2;
            asm volatile("ldtilecfg %0" : : "m"(wanted));
            { par_xl::amx::AmxTiles ours; }
            asm volatile("sttilecfg %0" : "=m"(got));
            return memcmp(got, wanted, 64) ? 3 : 0;
        }""")
    csrc = os.path.join(os.path.dirname(os.path.dirname(__file__)), "csrc")
    flags = ["-std=c++17", "-fopenmp", "-march=sapphirerapids", "-DPAR_XL_ISA=amx", "-DPAR_XL_X86=1", f"-I{csrc}"]
    subprocess.run([os.environ.get("CXX", "g++"), *flags, "test.cpp", "-o", "test"], cwd=tmp_path, check=True)
    assert subprocess.run([tmp_path / "test"]).returncode == 0


@with_amx
def test_beside_torchs_own_tiles():
    """torch's products on AMX, before, between and after ours."""
    x, inputs = torch.randn(200, 200).bfloat16(), inputs_of(150, 136, 1500, 1 << 20, torch.bfloat16)
    wanted = x @ x
    for _ in range(3):
        run(lambda **x: par_xl.adaptive_nll(**x, backend="native"), inputs)
        assert torch.equal(x @ x, wanted)


def test_threads():
    """One and two threads give the same bits; more cut the classes finer, and agree to rounding."""
    inputs, before, results = inputs_of(300, 136, 3000, 1 << 22, torch.float32), torch.get_num_threads(), []
    for n in (1, 2, 2, 5):
        torch.set_num_threads(n)
        outputs, gradients = run(lambda **x: par_xl.adaptive_nll(**x, backend="native"), inputs)
        results.append(outputs + gradients)
    torch.set_num_threads(before)
    one, two, again, five = results
    assert all(torch.equal(x, y) and torch.equal(y, z) for x, y, z in zip(one, two, again, strict=True))
    for x, y in zip(one, five, strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("workspace", [0, 1 << 20])
def test_masked_classes(workspace):
    """Tiles and parts whose logits are all -inf, before and behind a row's target."""
    inputs = inputs_of(150, 136, 1500, workspace, torch.float64)
    inputs["label_smoothing"], inputs["target"] = 0.0, 400 + inputs["target"] % 300
    inputs["biases"][0].data[:400] = inputs["biases"][0].data[700:750] = inputs["biases"][0].data[1130:] = -torch.inf
    got, wanted = (run(lambda b=b, **x: par_xl.adaptive_nll(**x, backend=b), inputs) for b in ("native", "eager"))
    for x, y in zip(got[0] + got[1], wanted[0] + wanted[1], strict=True):
        torch.testing.assert_close(x, y)


def test_padded_rows_of_a_table():
    """A table that is a part of a wider one is read where it is."""
    inputs = inputs_of(90, 80, 1500, 1 << 20, torch.float32)
    wide = torch.randn(1500, 100)
    wide[:, :80] = inputs["weights"][0].detach()
    other = {**inputs, "weights": [wide.requires_grad_()[:, :80]]}
    wanted, got = (
        torch.autograd.grad(par_xl.adaptive_nll(**x, backend="native"), [x["input"], x["weights"][0]])
        for x in (inputs, other)
    )
    assert all(torch.equal(x, y) for x, y in zip(got, wanted, strict=True))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(("width", "dtype"), [(72, torch.float32), (136, torch.float32), (72, torch.bfloat16)])
def test_strict_memory(reduction, width, dtype):
    """With a workspace of 0, nothing beyond the gradients but what 512 rows need: nothing of 16 MB of logits."""
    x, weight = (torch.randn(n, width).to(dtype).requires_grad_() for n in (1024, 4000))
    target, peaks = torch.arange(1024), []
    for workspace in (0, 1 << 30):

        def step(workspace=workspace):
            nll = par_xl.adaptive_nll(
                x, target, [weight], [], workspace=workspace, reduction=reduction, backend="native"
            )
            return torch.autograd.grad(nll.sum(), [x, weight])

        step()
        peaks.append(peak_memory(step, x.device) - x.nbytes - weight.nbytes)
    assert peaks[0] < 6 << 20 < peaks[1]
