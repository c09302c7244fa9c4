"""Transformer-XL checkpoints of other code bases: their names and conventions to ours. State dicts only, no pickles."""

import re
from collections.abc import Mapping
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from par_xl.models.transformer_xl_config import SameLength, TransformerXLConfig

State = dict[str, Tensor]

# Options that mean the same here and in every upstream.
_SAME = (
    "n_layer", "n_head", "d_model", "d_head", "d_inner", "dropout", "dropatt", "attn_type", "pre_lnorm", "untie_r",
    "mem_len", "ext_len", "div_val", "layer_norm_epsilon",
)  # fmt: skip
# Those of kimiyoung's train.py, where the cutoffs follow from the data set.
_KIMIYOUNG_CUTOFFS = {"wt103": (20000, 40000, 200000), "lm1b": (60000, 100000, 640000)}
_NVIDIA_CUTOFFS = {"wt103": (19997, 39997, 199997), "lm1b": (59997, 99997, 639997)}


def from_kimiyoung(state_dict: Mapping[str, Tensor], config: Mapping[str, Any]) -> tuple[TransformerXLConfig, State]:
    return _converted(_cleaned(state_dict), config, "exclusive", _KIMIYOUNG_CUTOFFS)


def from_nvidia(state_dict: Mapping[str, Tensor], config: Mapping[str, Any]) -> tuple[TransformerXLConfig, State]:
    names = {r"^crit\.out_layers_weights\.(\d+)$": r"crit.out_layers.\1.weight",
             r"^crit\.out_layers_biases\.(\d+)$": r"crit.out_layers.\1.bias"}  # fmt: skip
    return _converted(_cleaned(state_dict, names), config, "inclusive", _NVIDIA_CUTOFFS)


def from_huggingface(state_dict: Mapping[str, Tensor], config: Mapping[str, Any]) -> tuple[TransformerXLConfig, State]:
    state = _cleaned(state_dict, {r"^transformer\.": ""})
    if "r_w_bias" in state:  # shared biases are also listed under every layer
        state = {name: x for name, x in state.items() if not re.fullmatch(r"layers\..*\.r_[wr]_bias", name)}
    # In Hugging Face's head the first tail has the first column, here and in the other code the last.
    state = {name: x.flip(0) if name.startswith("crit.cluster_") else x for name, x in state.items()}
    return _converted(state, config, "exclusive", {}, memory_start="zeros")


def _cleaned(state_dict: Mapping[str, Tensor], names: Mapping[str, str] | None = None) -> State:
    """Other names, without what (Distributed)DataParallel adds and without what is computed or listed twice."""
    state = {}
    for name, x in state_dict.items():
        name = name.removeprefix("module.")
        for pattern, replacement in (names or {}).items():
            name = re.sub(pattern, replacement, name)
        if not re.match(r"pos_emb\.|crit\.shared_out_projs\.", name):
            state[name] = x
    return state


def _converted(
    state: State,
    config: Mapping[str, Any],
    same_length: SameLength,
    cutoffs_by_dataset: Mapping[str, tuple[int, ...]],
    **fixed: Any,
) -> tuple[TransformerXLConfig, State]:
    if config.get("sample_softmax", -1) > 0:
        raise ValueError("config['sample_softmax'] must not be positive: a sampled softmax has another output layer")
    sizes = [len(state[name]) for name in _numbered(state, "word_emb.emb_layers.{}.weight")]
    if "r_emb" in state:
        fixed["max_klen"] = state["r_emb"].shape[1]
        if config.get("attn_type") == 3:  # kimiyoung splits the width into heads
            state["r_emb"] = state["r_emb"].flatten(2)
    our_config = TransformerXLConfig(
        vocab_size=sum(sizes),
        d_embed=max(0, config.get("d_embed") or 0),
        clamp_len=max(0, config.get("clamp_len", -1)),
        same_length=same_length if config.get("same_length") else "off",
        cutoffs=_cutoffs(state, sizes, config, cutoffs_by_dataset),
        tie_weight=_share(state, "word_emb.emb_layers.{}.weight", "crit.out_layers.{}.weight", len(sizes)),
        **{name: config[name] for name in _SAME if name in config},
        **fixed,
    )
    our_config.tie_projs = _tied_projections(state, our_config)
    return our_config, state


def _numbered(state: State, name: str) -> list[str]:
    """Those of ``name.format(0)``, ``name.format(1)``, ... that are there."""
    names = (name.format(i) for i in range(len(state)))
    return [name for name in names if name in state]


def _cutoffs(
    state: State, sizes: list[int], config: Mapping[str, Any], by_dataset: Mapping[str, tuple[int, ...]]
) -> tuple[int, ...]:
    if "crit.cluster_weight" not in state:
        return ()
    if config.get("cutoffs"):
        return tuple(config["cutoffs"])
    if len(sizes) > 1:
        return tuple(accumulate(sizes[:-1]))
    if config.get("dataset") in by_dataset:
        return by_dataset[config["dataset"]]
    raise ValueError("config['cutoffs'] is missing: one table for all clusters does not show where they begin")


def _share(state: State, ours: str, theirs: str, count: int) -> bool:
    """Whether the output's tables are the embedding's: equal, or left out because they are."""
    pairs = [(state[ours.format(i)], theirs.format(i)) for i in range(count)]
    tied = all(name not in state or torch.equal(state[name], x) for x, name in pairs)
    for x, name in pairs:
        state.setdefault(name, x)
    return tied


def _tied_projections(state: State, config: TransformerXLConfig) -> tuple[bool, ...]:
    if "word_emb.emb_projs.0" not in state:
        return ()
    one = config.div_val == 1
    return tuple(
        _share(state, f"word_emb.emb_projs.{0 if one else i}", f"crit.out_projs.{i}", 1)
        for i in range(len(config.cutoffs) + 1)
    )
