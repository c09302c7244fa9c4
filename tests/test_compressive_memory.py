"""The compressive memory: contents, sharing, state dict, and what is differentiable."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from safetensors.torch import load_model, save_model
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from par_xl.nn import CompressiveMemory, Compressor

MODES = {"mean": {}, "max": {}, "conv": {}, "dilated_conv": {"dilation": (1, 2)}, "most_used": {}}


def new_memory(mode="mean", width=6, rate=2, memory=8, compressed=4, batch=3, start="empty", **options):
    result = CompressiveMemory(Compressor(width, rate, mode, **MODES[mode]), memory, compressed, **options)
    result.reset(batch, start)
    return result


class ListMemory:
    """The slow model: two lists of steps, straight from the paper's algorithm."""

    def __init__(self, memory, start):
        self.owner = memory
        zero, usage = torch.zeros(3, 6), torch.zeros(3)
        self.compressed = [zero] * memory.compressed_length if start == "zero" else []
        self.memory = [(zero, usage)] * memory.memory_length if start == "zero" else []

    def update(self, hidden, usage):
        steps = self.memory + [(h, torch.zeros(3)) for h in hidden.unbind(1)]
        steps = [(h, u + new) for (h, u), new in zip(steps, usage.unbind(1), strict=True)]
        leaving = max(0, len(steps) - self.owner.memory_length)
        rate = self.owner.compressor.rate
        old, self.memory = steps[leaving % rate : leaving], steps[leaving:]
        if old:
            rows, received = (torch.stack(x, 1) for x in zip(*old, strict=True))
            most_used = self.owner.compressor.mode == "most_used"
            self.compressed += self.owner.compressor(rows, received if most_used else None).detach().unbind(1)
        self.compressed = self.compressed[max(0, len(self.compressed) - self.owner.compressed_length) :]

    def rows(self):
        return torch.stack([*self.compressed, *(h for h, _ in self.memory)], 1)


@pytest.mark.parametrize("start", ["empty", "zero"])
@pytest.mark.parametrize("mode", MODES)
def test_contents_equal_a_list_based_model(mode, start):
    """Over many segments of uneven length: the last of an epoch is short, and one is longer than the memory."""
    memory = new_memory(mode, start=start)
    slow = ListMemory(memory, start)
    for steps in [4, 4, 2, 4, 4, 3, 4, 1, 11, 4, 4]:
        hidden = torch.randn(3, steps, 6)
        usage = torch.rand(3, memory.rows.shape[1] - memory.compressed + steps)
        memory.update(hidden, usage if mode == "most_used" else None)
        slow.update(hidden, usage)
        assert memory.compressed == len(slow.compressed)
        torch.testing.assert_close(memory.rows, slow.rows())


def test_fifo_order():
    """Compressed from the front of the memory, to the end of the compressed part, dropped from its front."""
    memory = new_memory(width=1, rate=2, memory=4, compressed=2, batch=1)
    for first in range(0, 12, 2):
        memory.update(torch.tensor([first, first + 1.0]).view(1, 2, 1))
    assert memory.rows.flatten().tolist() == [4.5, 6.5, 8, 9, 10, 11]


def test_a_segment_that_fills_no_group_drops_its_oldest_steps():
    """lucidrains pads by ``len % rate`` zeros and then loses the newest steps."""
    memory = new_memory(width=1, rate=4, memory=8, compressed=4, batch=1, start="zero")
    memory.update(torch.arange(1.0, 9).view(1, 8, 1))
    evicted = memory.update(torch.full((1, 5, 1), 9.0))
    assert evicted.rows.flatten().tolist() == [2, 3, 4, 5]  # of 1 to 5, which leave
    assert memory.rows.flatten().tolist() == [0, 0, 0, 3.5, 6, 7, 8, 9, 9, 9, 9, 9]


@pytest.mark.parametrize(("memory", "compressed"), [(0, 4), (8, 0), (0, 0)])
def test_parts_of_length_zero(memory, compressed):
    """``x[:, -0:]`` is everything."""
    result = new_memory(memory=memory, compressed=compressed)
    for _ in range(5):
        result.update(torch.randn(3, 4, 6))
    assert result.rows.shape == (3, memory + compressed, 6)
    assert result.compressed == compressed


def test_zero_and_empty_start():
    assert new_memory(start="empty").rows.shape == (3, 0, 6)
    zero = new_memory(start="zero")
    assert zero.rows.shape == (3, 12, 6) and zero.compressed == 4 and not zero.rows.any()


@pytest.mark.parametrize("kept", [0, 1, 3])
def test_what_autograd_saved_is_not_overwritten(kept, monkeypatch):
    """Gradients of the last segments are those of segments whose memory was copied, however late backward comes."""
    monkeypatch.setattr("par_xl.ops.large_results.LARGE", 1)
    monkeypatch.setattr("par_xl.ops.large_results._free", [])
    weight = nn.Parameter(torch.randn(6, 6))
    memory, reference = new_memory(), new_memory()
    pending = []
    for _ in range(12):
        hidden = torch.randn(3, 4, 6)
        loss, wanted = (F.linear(rows, weight).square().sum() for rows in (memory.rows, reference.rows.clone()))
        pending.append((loss, wanted))
        memory.update(hidden), reference.update(hidden)
        while len(pending) > kept:
            got, want = (torch.autograd.grad(x, weight)[0] for x in pending.pop(0))
            assert torch.equal(got, want)


def test_memory_is_reused_when_nobody_reads_it(monkeypatch):
    monkeypatch.setattr("par_xl.ops.large_results.LARGE", 1)
    monkeypatch.setattr("par_xl.ops.large_results._free", [])
    memory = new_memory(start="zero")
    addresses = []
    for _ in range(6):
        memory.update(torch.randn(3, 4, 6))
        addresses.append(memory.rows.data_ptr())
    assert addresses[2:] == addresses[:-2] and addresses[0] != addresses[1]
    held = [memory.rows, memory.rows[:, 2:]]
    contents = [x.clone() for x in held]
    for _ in range(3):
        memory.update(torch.randn(3, 4, 6))
    assert all(torch.equal(x, y) for x, y in zip(held, contents, strict=True))


def test_the_memory_is_detached():
    hidden = torch.randn(3, 10, 6, requires_grad=True)
    memory = new_memory("conv")
    memory.update(hidden)
    assert not memory.rows.requires_grad
    memory.rows.requires_grad_()
    memory.update(hidden)
    assert not memory.rows.requires_grad


def test_dtype_is_kept():
    memory = new_memory().bfloat16()
    memory.reset(3)
    memory.update(torch.randn(3, 10, 6).bfloat16())
    assert memory.rows.dtype == torch.bfloat16 and memory.compressed == 1


@pytest.mark.parametrize("mode", ["conv", "most_used"])
def test_state_dict_round_trip(mode):
    def usage(memory):
        return torch.ones(3, memory.rows.shape[1] - memory.compressed + 4) if mode == "most_used" else None

    memory, other = new_memory(mode), new_memory(mode, batch=1)
    for _ in range(3):
        memory.update(torch.randn(3, 4, 6), usage(memory))
    other.load_state_dict(copy.deepcopy(memory.state_dict()))
    twin = copy.deepcopy(memory)
    hidden = torch.randn(3, 4, 6)
    for one in (memory, other, twin):
        one.update(hidden, usage(one))
        assert one.compressed == memory.compressed and torch.equal(one.rows, memory.rows)


def test_state_dict_holds_tensors_alone(tmp_path):
    """safetensors takes nothing else, and none that is strided or shared."""
    model, other = nn.Sequential(new_memory("most_used")), nn.Sequential(new_memory("most_used", batch=1))
    for _ in range(3):
        (memory,) = model
        memory.update(torch.randn(3, 4, 6), torch.rand(3, memory.rows.shape[1] - memory.compressed + 4))
    save_model(model, tmp_path / "memory.safetensors")
    load_model(other, tmp_path / "memory.safetensors")
    for name in ("rows", "usage"):
        assert torch.equal(getattr(other[0], name), getattr(memory, name))
    assert other[0].compressed == memory.compressed == 2
    state = model.state_dict()
    memory.rows.zero_()
    assert state["0.rows"].any()
    with pytest.raises(RuntimeError, match='Missing key.*"0.usage"'):
        other.load_state_dict({key: value for key, value in state.items() if key != "0.usage"})
    with pytest.raises(RuntimeError, match='Unexpected key.*"0.row"'):
        other.load_state_dict({**state, "0.row": state["0.rows"]})


def test_usage_stays_as_exact_as_it_is():
    """Half precision would lose the attention of one segment beside that of many."""
    memory, other = (new_memory("most_used").bfloat16() for _ in range(2))
    memory.reset(3)
    for _ in range(3):
        memory.update(torch.randn(3, 4, 6), torch.rand(3, memory.rows.shape[1] - memory.compressed + 4))
    other.load_state_dict(memory.state_dict())
    for one in (other, memory, memory.half()):
        assert one.usage.dtype == torch.float32 and torch.equal(one.usage, other.usage)
    assert memory.rows.dtype == torch.float16 and other.rows.dtype == torch.bfloat16
    assert nn.Sequential(memory).to("meta")[0].rows.is_meta and memory.usage.is_meta


def test_copy_of_a_memory_with_a_graph():
    memory = new_memory("conv", bptt=True)
    for _ in range(4):
        memory.update(torch.randn(3, 4, 6))
    twin = copy.deepcopy(memory)
    assert memory.rows.requires_grad and not twin.rows.requires_grad and torch.equal(twin.rows, memory.rows)


def _update_on_two(rank, path):
    dist.init_process_group("gloo", init_method=f"file://{path}/store", rank=rank, world_size=2)
    memory, reference = new_memory("most_used"), new_memory("most_used")
    parallel = DistributedDataParallel(Reader(memory))
    torch.manual_seed(rank)
    for _ in range(4):
        hidden, usage = torch.randn(3, 4, 6), torch.rand(3, memory.rows.shape[1] - memory.compressed + 4)
        parallel(hidden, usage).backward()
        reference.update(hidden, usage)
        for name in ("rows", "usage", "compressed"):
            torch.testing.assert_close(getattr(memory, name), getattr(reference, name), rtol=0, atol=0)
    (path / f"rank-{rank}-done").touch()
    dist.destroy_process_group()


class Reader(nn.Linear):
    """Something that trains beside a memory."""

    def __init__(self, memory):
        super().__init__(6, 6)
        self.memory = memory

    def forward(self, hidden, usage):
        read = super().forward(torch.cat([self.memory.rows, hidden], 1))
        self.memory.update(hidden, usage)
        return read.square().mean()


def test_two_processes_keep_a_memory_each(tmp_path):
    """DistributedDataParallel gives every rank the first one's buffers, at every forward."""
    mp.spawn(_update_on_two, (tmp_path,), nprocs=2)
    assert len(list(tmp_path.glob("rank-*-done"))) == 2


def test_compiled_update():
    """Whole-graph, on static shapes once the parts are full."""
    memory, reference = new_memory(start="zero"), new_memory(start="zero")
    update = torch.compile(lambda x: memory.update(x).rows, fullgraph=True)
    for _ in range(3):
        hidden = torch.randn(3, 4, 6)
        torch.testing.assert_close(update(hidden), reference.update(hidden).rows)
        torch.testing.assert_close(memory.rows, reference.rows)


def test_bad_input():
    with pytest.raises(ValueError, match="lengths must not be negative, not -1 and 2"):
        CompressiveMemory(Compressor(4, 2), -1, 2)
    with pytest.raises(ValueError, match='start must be "empty" or "zero", not "full"|not \'full\''):
        new_memory(start="full")
    with pytest.raises(ValueError, match=r"usage must have shape \(3, 4\), not None"):
        new_memory("most_used").update(torch.randn(3, 4, 6))
    with pytest.raises(ValueError, match="usage must be given with mode most_used alone"):
        new_memory().update(torch.randn(3, 4, 6), torch.ones(3, 4))
    with pytest.raises(ValueError, match="hidden must have the batch and width of state"):
        new_memory().update(torch.randn(2, 4, 6))
    with pytest.raises(ValueError, match=r"reset\(batch_size\) must be called before the first update"):
        CompressiveMemory(Compressor(6, 2), 8, 4).update(torch.randn(3, 4, 6))
    with pytest.raises(ValueError, match="hidden must have the batch and width of state"):
        new_memory("conv", start="zero").update(torch.randn(3, 10, 5))  # some of it is compressed at once


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(rate=2, mode="avg"), "mode must be one of mean, max, most_used, conv, dilated_conv, not 'avg'"),
        (dict(rate=0), "rate must be a positive integer, not 0"),
        (dict(rate=2, mode="dilated_conv"), "dilation must be given with mode dilated_conv$"),
        (dict(rate=2, mode="mean", dilation=(1,)), "dilation must be given with mode dilated_conv and no other, not"),
    ],
)
def test_bad_compressor(options, message):
    with pytest.raises(ValueError, match=message):
        Compressor(8, **options)
