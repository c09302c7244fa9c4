"""What every model returns: the loss is the mean over the targets that have one."""

import pytest
import torch

from par_xl.models import (
    AWDLSTM,
    AWDLSTMConfig,
    CompressiveConfig,
    CompressiveTransformer,
    ParConfig,
    ParSuperNet,
    ParTransformerXL,
    TransformerXL,
    TransformerXLConfig,
)

LAYERS = dict(vocab_size=40, n_layer=2, n_head=2, d_model=12, d_head=6, d_inner=16, mem_len=4, cutoffs=(10, 20))
MODELS = {
    "awd-lstm": lambda: AWDLSTM(AWDLSTMConfig(vocab_size=40, d_model=10, d_hidden=14)),
    "awd-lstm, split": lambda: AWDLSTM(AWDLSTMConfig(vocab_size=40, d_model=10, d_hidden=14, cutoffs=(10, 20))),
    "transformer-xl": lambda: TransformerXL(TransformerXLConfig(**LAYERS)),
    "compressive": lambda: CompressiveTransformer(CompressiveConfig(**LAYERS, compressed_len=4)),
    "supernet": lambda: ParSuperNet(ParConfig(**LAYERS)),
    "par": lambda: ParTransformerXL("sf", **{k: v for k, v in LAYERS.items() if k != "n_layer"}),
}


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_ignored_targets_have_no_part_in_the_mean(make):
    torch.manual_seed(0)
    model = make().eval()
    tokens, targets = torch.randint(40, (2, 3, 6))
    targets[1, :4] = -100
    output = model(tokens, targets)
    assert (output.nll[1, :4] == 0).all()
    torch.testing.assert_close(output.loss, output.nll[targets != -100].mean())
    nothing = model(tokens, torch.full_like(targets, -100)).loss
    assert nothing == 0
    assert all(
        g is None or (g == 0).all() for g in torch.autograd.grad(nothing, list(model.parameters()), allow_unused=True)
    )
