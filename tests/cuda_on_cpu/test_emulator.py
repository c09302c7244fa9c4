"""The emulator itself: it finds the mistakes that it is for, and its instructions do what NVIDIA documents."""

import ctypes

import pytest
import torch


@pytest.fixture
def check(emulator):
    """check(name, ...) runs a kernel of checks.cu on tensors and numbers; what went wrong is a RuntimeError."""

    def call(name, *arguments):
        function = getattr(emulator.library, f"check_{name}")
        function.restype = ctypes.c_char_p
        message = function(*(ctypes.c_void_p(a.data_ptr()) if isinstance(a, torch.Tensor) else a for a in arguments))
        if message:
            raise RuntimeError(message.decode())

    emulator.seed(0)
    return call


@pytest.mark.parametrize("barrier", [True, False])
def test_a_missing_barrier_changes_the_result(check, barrier):
    for _ in range(4):
        x = torch.arange(256, dtype=torch.int32)
        check("reverse", x, barrier)
        assert torch.equal(x, torch.arange(255, -1, -1, dtype=torch.int32)) == barrier


def test_every_block_runs_once(check):
    n = torch.zeros((), dtype=torch.int32)
    check("count_blocks", n)
    assert n.item() == 2 * 3 * 4


MISTAKES = {
    "exit early": "threads wait for others that have ended or wait elsewhere, at checks.cu:",
    "two barriers": "checks.cu:.* meets checks.cu:",
    "half a warp": "threads wait for others that have ended or wait elsewhere, at checks.cu:",
    "two shuffles": "checks.cu:.* meets checks.cu:",
    "misaligned": "checks.cu:.*: a null or misaligned address",
    "outside an array": "checks.cu:.*: an index outside its array",
    "outside the dynamic shared memory": "past the end of the dynamic shared memory",
    "more shared memory than was asked for": "not launched",
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_errors(check, mistake):
    with pytest.raises(RuntimeError, match=MISTAKES[mistake]):
        check("mistake", list(MISTAKES).index(mistake), torch.zeros(8))
    check("mistake", -1, torch.zeros(8))  # and the next launch is a clean one


def test_collectives(check):
    out = torch.empty(9, 64, dtype=torch.int32)
    check("collectives", out)
    t = torch.arange(64)
    lane, first = t % 32, t // 32 * 32
    ballot = [sum((w * 32 + i) % 3 == 0 and 1 << i for i in range(32)) for w in range(2)]
    wanted = [
        first + 5,
        t // 8 * 8 + 3,
        torch.where(lane < 2, t, t - 2),
        torch.where(t % 16 + 3 < 16, t + 3, t),
        t ^ 9,
        torch.tensor(ballot).int()[t // 32],
        t >= 32,
        torch.full_like(t, 13),
        torch.full_like(t, 1),
    ]
    for got, want in zip(out, wanted, strict=True):
        assert got.tolist() == want.int().tolist()


def test_half_precision_rounds_as_torch_does(check):
    bits = torch.randint(-(2**31), 2**31, (1 << 14,), dtype=torch.int64).int()
    ties = (torch.arange(1 << 14, dtype=torch.int32) << 17 | 1 << 12) + torch.randint(-1, 2, (1 << 14,)).int()
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 65504.0, 65519.9, 65520.0, 2.0**-24, 2.0**-25])
    x = torch.cat([bits.view(torch.float32), ties.view(torch.float32), special])
    x = torch.cat([x, torch.zeros(-len(x) % 256)])
    half, bf16, back = torch.empty_like(x).half(), torch.empty_like(x).bfloat16(), torch.empty(2, len(x))
    check("convert", x, half, bf16, back, len(x) // 256)
    for got, want in ((half, x.half()), (bf16, x.bfloat16()), (back[0], x.half()), (back[1], x.bfloat16())):
        torch.testing.assert_close(got.float(), want.float(), rtol=0, atol=0, equal_nan=True)


# The PTX ISA's "Matrix fragments for mma.m16n8k16 with floating point type": the row and column of element i of a lane.
def place_of_a(lane, i):
    return lane // 4 + (0 if i < 2 or 4 <= i < 6 else 8), lane % 4 * 2 + i % 2 + (0 if i < 4 else 8)


def place_of_b(lane, i):
    return lane % 4 * 2 + i % 2 + (0 if i < 2 else 8), lane // 4


def place_of_c(lane, i):
    return lane // 4 + (0 if i < 2 else 8), lane % 4 * 2 + i % 2


def fragments(x, place, n):
    """(32, n): what each lane holds of a matrix."""
    return torch.stack([torch.stack([x[place(lane, i)] for i in range(n)]) for lane in range(32)])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_mma(check, dtype):
    a, b, c = torch.randn(16, 16).to(dtype), torch.randn(16, 8).to(dtype), torch.randn(16, 8)
    registers = fragments(c, place_of_c, 4)
    check("multiply", fragments(a, place_of_a, 8), fragments(b, place_of_b, 4), registers, dtype == torch.bfloat16)
    torch.testing.assert_close(registers, fragments(c + a.float() @ b.float(), place_of_c, 4))


def test_ldmatrix(check):
    """Lane l holds, of each matrix, elements 2 (l % 4) and the next of row l / 4; transposed, of column l / 4."""
    x = torch.arange(4 * 8 * 8, dtype=torch.int16).view(4, 8, 8)
    plain, transposed = torch.empty(2, 32, 4, 2, dtype=torch.int16).unbind()
    check("load_matrices", x, plain, transposed)
    for lane in range(32):
        row, column = lane // 4, lane % 4 * 2
        assert torch.equal(plain[lane], x[:, row, column : column + 2])
        assert torch.equal(transposed[lane], x[:, column : column + 2, row])


@pytest.mark.parametrize("groups_left", [0, 1, 2])
def test_copies_arrive_with_the_wait(check, groups_left):
    x = torch.arange(1, 9, dtype=torch.int32).view(2, 4)
    got = torch.zeros(3, 4, dtype=torch.int32)
    check("copy", x, got, groups_left)
    wanted = torch.full((3, 4), -1, dtype=torch.int32)
    if groups_left < 2:
        wanted[0] = x[0]
    if groups_left < 1:
        wanted[1:] = torch.stack([x[1], torch.zeros(4)])
    assert torch.equal(got, wanted)
