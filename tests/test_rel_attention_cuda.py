"""rel_attention's CUDA kernel, a forward for fp16 and bf16: on a GPU, without one in tests/cuda_on_cpu, and its machine
code."""

from types import SimpleNamespace

import pytest
import torch
from test_rel_attention import TestRelAttention as OfTheOp
from test_rel_attention import attention, lengths

import par_xl
from par_xl.machine_code import cuda_kernels, has_cuda_kernels
from par_xl.ops import registry
from par_xl.ops.rel_attention import FORWARD, choose_kernels, dropout_keep, masked_scores
from par_xl.ops.rel_attention_inputs import UNLIMITED
from par_xl.testing import assert_capturable, largest_error, make_inputs, promoted, restrided


class ForwardChecks:
    """For devices that run the kernel; on a GPU there is no backward, and nothing here needs one."""

    ops = ("rel_attention_forward",)
    dtypes = (torch.float16, torch.bfloat16)
    backends = ("native",)
    devices = (pytest.param("cuda", marks=pytest.mark.gpu),)
    cases = {
        **OfTheOp.cases,
        "around-the-ring": attention(1, 2, 130, 130, 270, 64),
        "around-the-ring-of-short-tiles": attention(1, 1, 100, 100, 130, 128),
        "long-window": attention(1, 1, 150, 150, 100, 96, window=(70, 0)),
        "two-sided-window": attention(1, 1, 140, 140, 90, 48, causal=False, window=(75, 66)),
        "width-104": attention(1, 1, 70, 70, 40, 104, key_lengths=lengths(50)),
        "a-warp's-last-key-alone-in-a-tile": attention(2, 4, 64, 64, 1, 64),
        "width-7": attention(2, 1, 70, 70, 33, 7),
    }

    def forward(self, inputs, backend):
        torch.manual_seed(5)
        with torch.no_grad():
            return par_xl.rel_attention(**inputs, backend=backend)

    def test_output_error(self, case, dtype, backend, device):
        """Against fp64, at most twice the error of eager PyTorch in the same dtype, plus an eps; the largest errors of
        eight draws of the inputs where one draw's is over it."""
        for seeds in (range(1), range(8)):
            errors, peers, size = [0.0], [0.0], 0.0
            for seed in seeds:
                inputs = make_inputs(case, dtype, device, seed)
                got, eager = (self.forward(inputs, b) for b in (backend, "eager"))
                exact = self.forward(promoted(inputs, torch.float64), "eager")
                assert got.dtype == dtype and got.shape == exact.shape and torch.isfinite(got).all()
                errors.append(largest_error(got, exact))
                peers.append(largest_error(eager, exact))
                size = max(size, exact.abs().max().item() if exact.numel() else 0.0)
            if max(errors) <= 2 * max(peers) + torch.finfo(dtype).eps * size:
                return
        raise AssertionError(f"error {max(errors):.3g}, that of eager {max(peers):.3g}")

    @pytest.mark.parametrize(
        "name", ["memory", "same-length", "lengths", "bidirectional", "past-alone", "more-queries", "around-the-ring"]
    )
    def test_lse(self, name, dtype, backend, device):
        inputs = make_inputs(self.cases[name], dtype, device)
        left, right = (UNLIMITED if x is None else x for x in inputs.get("window") or (None, None))
        limits = left, 0 if inputs.get("causal", True) else right, UNLIMITED
        q, k, v, r, *biases = (inputs[x].detach() for x in ("q", "k", "v", "r", "content_bias", "position_bias"))
        memory, key_lengths = inputs.get("memory", (None, None)), inputs.get("key_lengths")
        memory = [x if x is None else x.detach() for x in memory]
        _, lse = FORWARD(q, k, v, r, *biases, *memory, key_lengths, None, *limits, 0.25, 0.0, backend)
        n_memory = 0 if memory[0] is None else memory[0].shape[2]
        k = k if memory[0] is None else torch.cat((memory[0], k), 2)
        wide = (x.double() for x in (q, k, r, *biases))
        wanted = masked_scores(*wide, key_lengths, n_memory, *limits, 0.25).logsumexp(3)
        assert lse.dtype == torch.float32
        # The queries' sums with the biases are rounded to dtype: an error of eps of every product in a score.
        torch.testing.assert_close(lse.double(), wanted, rtol=0, atol=16 * torch.finfo(dtype).eps)

    def check_lengths(self, values, dtype, backend, device):
        """NaN for a sequence whose length is not possible, and for no other."""
        inputs = make_inputs(self.cases["memory"], dtype, device)
        inputs["key_lengths"] = torch.tensor(values, device=device)
        bad = (inputs["key_lengths"] < 0) | (inputs["key_lengths"] > 65)
        nan = self.forward(inputs, backend).isnan()
        assert torch.equal(nan.all(3).all(2).all(1), bad) and torch.equal(nan.any(3).any(2).any(1), bad)

    @pytest.mark.parametrize("width", [16, 41])
    def test_padding_and_unused_positions_do_not_leak(self, width, dtype, backend, device):
        case = attention(2, 2, 30, 30, 40, width, spare=9, window=(20, 0), key_lengths=lengths(30, 11))
        clean = make_inputs(case, dtype, device)
        dirty = {name: x.detach().clone() if isinstance(x, torch.Tensor) else x for name, x in clean.items()}
        dirty["memory"] = tuple(x.detach().clone() for x in clean["memory"])
        for x in (dirty["k"], dirty["v"]):
            x[1, :, 11:] = torch.nan
        for x in dirty["memory"]:
            x[:, :, : 40 - 20] = torch.nan  # query 0 sees 20 steps back
        dirty["r"][:, 70:] = torch.nan
        dirty["r"][:, : 70 - 1 - 20] = torch.nan
        assert torch.equal(self.forward(dirty, backend), self.forward(clean, backend))

    def test_queries_that_see_no_key_may_hold_anything(self, dtype, backend, device):
        clean = make_inputs(attention(2, 1, 70, 9, None, 16), dtype, device)
        dirty = {name: x.detach().clone() for name, x in clean.items()}
        dirty["q"][:, :, :61] = torch.nan
        got = self.forward(dirty, backend)
        assert torch.equal(got, self.forward(clean, backend)) and got[:, :, :61].count_nonzero() == 0

    @pytest.mark.parametrize("name", ["around-the-ring", "width-104", "width-41"])
    def test_strides(self, name, dtype, backend, device):
        """Element by element where rows are not 16-byte aligned; [len, batch, head, width] as it lies; parts of wider
        rows; copies."""
        inputs = make_inputs(self.cases[name], dtype, device)
        wanted = self.forward(inputs, backend)
        tensors = ("q", "k", "v", "r", "memory")

        def shifted(x):
            return torch.empty(x.numel() + 1, dtype=dtype, device=device)[1:].view(x.shape).copy_(x)

        def length_first(x):
            return x.transpose(0, -2).contiguous().transpose(0, -2)

        def wider(x):
            return torch.full((*x.shape[:-1], 112), torch.nan, dtype=dtype, device=device)[..., : x.shape[-1]].copy_(x)

        for change in (shifted, length_first, wider, restrided):
            on_each = lambda x, change=change: tuple(map(change, x)) if isinstance(x, tuple) else change(x)  # noqa: E731
            changed = {n: on_each(x) if n in tensors else x for n, x in inputs.items()}
            assert torch.equal(self.forward(changed, backend), wanted)

    def test_dropout_drops_what_the_reference_drops(self, dtype, backend, device):
        """Each value is a unit vector, so that the output shows the weights."""
        inputs = make_inputs(attention(2, 3, 65, 65, 63, 128, dropout_p=0.3), dtype, device)
        unit = torch.eye(128, dtype=dtype, device=device).expand(2, 3, -1, -1)
        inputs |= dict(v=unit[:, :, 63:], memory=(inputs["memory"][0], unit[:, :, :63]), scale=0.01)
        weights = self.forward(inputs, backend)
        whole = self.forward({**inputs, "dropout_p": 0.0}, backend)
        torch.manual_seed(5)
        seed = torch.randint(2**63 - 1, (1,), device=device)
        keep = dropout_keep(seed, torch.arange(weights.numel(), device=device).view(weights.shape), 0.3)
        assert torch.equal(weights != 0, keep & (whole != 0))
        torch.testing.assert_close(weights, torch.where(keep, whole / 0.7, 0), rtol=4e-2, atol=0)

    def test_random_numbers_past_32_bits(self, dtype, backend, device):
        """The offset of the last weights of 70 x 2^26 does not fit into 32 bits; no key takes any memory here."""
        q = torch.ones(1, 1, 70, 8, dtype=dtype, device=device)
        k = q[:, :, :1].expand(-1, -1, 2**26, -1)
        inputs = dict(q=q, k=k, v=k, r=k[0], window=(0, 0), dropout_p=0.5)
        out = self.forward(inputs, backend)
        torch.manual_seed(5)
        seed = torch.randint(2**63 - 1, (1,), device=device)
        offset = torch.arange(70, device=device) * (2**26 + 1) + 2**26 - 70
        assert offset[-1] > 2**32
        assert torch.equal(out[0, 0], (dropout_keep(seed, offset, 0.5) * 2.0)[:, None].expand(-1, 8).to(dtype))

    def test_bits_repeat_and_every_element_is_written(self, case, dtype, backend, device):
        inputs = make_inputs(case, dtype, device)
        first = self.forward(inputs, backend)
        poison = torch.full_like(first, torch.nan)  # what the allocator may hand out next
        del poison
        assert torch.equal(self.forward(inputs, backend), first)


class TestOnGPU(ForwardChecks):
    @pytest.mark.parametrize("values", [[1, 66], [-1, 3]])
    def test_lengths_outside_the_segment(self, values, dtype, backend, device):
        self.check_lengths(values, dtype, backend, device)

    def test_a_gradient_is_refused_at_the_call(self, dtype, backend, device):
        inputs = make_inputs(self.cases["memory"], dtype, device)
        with pytest.raises(ValueError, match="rel_attention has no CUDA backward"):
            par_xl.rel_attention(**inputs, backend=backend)

    def test_no_synchronisation_and_cuda_graph(self, dtype, backend, device):
        inputs = make_inputs(attention(2, 4, 130, 130, 70, 64, key_lengths=lengths(130, 40)), dtype, device)
        assert_capturable(lambda: [self.forward(inputs, backend)])


class TestWhatIsMissing:
    """Without a GPU, with tensors that are nothing but a description."""

    @pytest.fixture(autouse=True)
    def _every_backend(self, monkeypatch):
        monkeypatch.setattr(registry, "_why_not", lambda backend, device: "")

    def on_gpu(self, dtype=torch.bfloat16, width=64, requires_grad=False):
        return SimpleNamespace(
            device=torch.device("cuda"), is_cuda=True, dtype=dtype, shape=(1, 1, 1, width), requires_grad=requires_grad
        )

    def test_a_gradient(self):
        leaf = self.on_gpu(requires_grad=True)
        for given in ((leaf, None), (self.on_gpu(), None, leaf)):
            with pytest.raises(ValueError, match='rel_attention has no CUDA backward, but "triton" has'):
                choose_kernels("native", *given)
            assert choose_kernels("triton", *given) == choose_kernels("auto", *given) == "triton"
            with torch.no_grad():
                assert choose_kernels("native", *given) == "native"

    def test_a_dtype(self):
        for dtype in (torch.float32, torch.float64):
            with pytest.raises(ValueError, match=f"kernel takes fp16 and bf16, not {dtype}"):
                choose_kernels("native", self.on_gpu(dtype))

    def test_a_width(self):
        assert choose_kernels("native", self.on_gpu(width=128)) == "native"
        with pytest.raises(ValueError, match="takes widths up to 128 on cuda, not 136"):
            choose_kernels("native", self.on_gpu(width=136))

    def test_auto_passes_it_over(self, monkeypatch):
        monkeypatch.setattr(registry, "_why_not", lambda backend, device: "missing" if backend == "triton" else "")
        assert choose_kernels(None, self.on_gpu()) == "eager"


def test_the_backward_of_the_function_is_refused():
    grad = SimpleNamespace(is_cuda=True, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="no CUDA backward"):
        registry.OPS["rel_attention_backward"].implementations["native"](grad)


@pytest.mark.skipif(not has_cuda_kernels(), reason="the extension was built without CUDA kernels")
def test_machine_code():
    """No spills; products on the tensor cores, of operands out of shared memory; rows get there 16 bytes at a time."""
    kernels = cuda_kernels("attend")
    assert len(kernels) == 2 * 6 * len({one.capability for one in kernels})  # types, widths
    for one in kernels:
        assert one.stack == 0, (one.kernel, one.capability, one.registers, one.stack)
        for instruction in ("HMMA.16816.F32", "LDSM.16.M88.4", "LDSM.16.MT88.4", "LDGSTS.E.BYPASS.128"):
            assert instruction in one.sass, (one.kernel, one.capability, instruction)
