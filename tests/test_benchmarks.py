"""The benchmarks still run and their candidates agree: each one's function at sizes that take no time, uncompiled."""

import importlib
from pathlib import Path

import pytest
import torch

from par_xl.models import CompressiveConfig, ParConfig

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="benchmarks/gpu_check.sh runs them at their sizes")

ATTENTION = dict(shape=(1, 2, 8, 8, 16), dtype=torch.float32, backend="native")
LAYERS = dict(n_layer=2, n_head=2, d_model=16, d_head=8, d_inner=32)
SUPERNET = ParConfig.named("wikitext-2-small", **LAYERS, vocab_size=200, cutoffs=(20, 100), mem_len=8)
SMALL = dict(shape=(2, 8, 16), dtype=torch.float32)
CALLS = [  # file, function, arguments; constants of the file that take other values
    ("ar_tar", "test_forward", dict(**SMALL, ours="native"), {}),
    ("ar_tar", "test_forward_backward", dict(**SMALL, ours="native"), {}),
    ("rel_attention", "test_forward", ATTENTION, {}),
    ("rel_attention", "test_forward_backward", ATTENTION, {}),
    ("rel_attention", "test_long_memory", dict(backend="native"), dict(LONG=(1, 2, 8, 24, 16))),
    ("rel_attention", "test_clamped", dict(backend="native", backward=True), dict(LONG=(1, 2, 8, 24, 16), CLAMP=9)),
    ("rel_attention", "test_received", dict(backend="native"), dict(CASES=[((1, 2, 8, 8, 16), torch.float32)])),
    ("adaptive_softmax", "test_forward_backward", dict(n=64, d=16, classes=200, cutoffs=(20, 100)), {}),
    *(("compression", "test_pooling", dict(mode=m, ours="native"), dict(STEPS=8, WIDTH=16)) for m in ("mean", "max")),
    ("compression", "test_conv", dict(ours="native"), dict(STEPS=8, WIDTH=16)),
    ("compression", "test_update", dict(ours="native"), dict(WIDTH=16)),
    *(("dropout", "test_forward_backward", dict(**SMALL, relu=relu), {}) for relu in (False, True)),
    ("mix", "test_forward", dict(**SMALL, ours="native"), {}),
    ("mix", "test_forward_backward", dict(**SMALL, ours="native"), {}),
    (
        "models",
        "test_transformer_xl_training_step",
        dict(case="small"),
        dict(CASES={"small": (LAYERS, 2, 8)}, WORDS=dict(vocab_size=200, cutoffs=(20, 100))),
    ),
    ("models", "test_supernet_training_step", dict(case="small"), dict(SUPERNETS={"small": (SUPERNET, 2, 8)})),
    (
        "models",
        "test_compressive_training_step",
        dict(case="small"),
        dict(COMPRESSIVE={"small": (CompressiveConfig(**LAYERS, vocab_size=200, mem_len=8, compressed_len=8), 2)}),
    ),
    ("models", "test_par_training_step", dict(case="small"), dict(PATTERNS={"small": (8, 1)})),
]


@pytest.mark.parametrize(
    ("file", "function", "arguments", "constants"),
    CALLS,
    ids=[f"{file}-{function}-{i}" for i, (file, function, *_) in enumerate(CALLS)],
)
def test_candidates_agree(monkeypatch, file, function, arguments, constants):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    compare = importlib.import_module("timing").compare
    module = importlib.import_module(f"bench_{file}")
    for name, value in constants.items():
        monkeypatch.setattr(module, name, value)
    raced = []

    def race(candidates, inputs, ours, *, tolerance, floors=None, **_):
        for rival in {**candidates, **(floors or {})}.values():
            rival(*inputs[0])
        if tolerance is not None:
            compare(candidates, inputs[0], tolerance)
        assert ours in candidates
        raced.append(len(candidates))

    torch.manual_seed(0)
    getattr(module, function)(race, "cpu", **arguments)
    assert raced and raced[0] >= 2
