"""Weights of other code bases give the same loss for each token, and the same memories, segment after segment."""

import json
from pathlib import Path

import pytest
import torch
from kimiyoung import Reference
from safetensors import safe_open

from par_xl.models import ParSuperNet, ParTransformerXL, TransformerXL

FIXTURES = Path(__file__).parent / "fixtures"
V, D, HEADS, WIDTH, INNER, LAYERS = 30, 12, 2, 5, 14, 2
B, T = 2, 4
CUTOFFS = [8, 16]
SIZES = {"n_layer": LAYERS, "n_head": HEADS, "d_head": WIDTH, "d_model": D, "d_inner": INNER, "d_embed": -1}


def kimiyoung_state(config, tied, tied_projections, seed=0):
    """Random weights under kimiyoung's names."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(shape, generator=generator) * 0.4

    kind, div, d_embed = config.get("attn_type", 0), config.get("div_val", 1), max(config["d_embed"], 0) or D
    ends = [0, *config.get("cutoffs", []), V]
    sizes = [V] if div == 1 else [b - a for a, b in zip(ends, ends[1:], strict=False)]
    state = {"pos_emb.inv_freq": randn(D // 2)}
    projected = div > 1 or d_embed != D
    for i, size in enumerate(sizes):
        state[f"word_emb.emb_layers.{i}.weight"] = randn(size, d_embed // div**i)
        if projected:
            state[f"word_emb.emb_projs.{i}"] = randn(D, d_embed // div**i)
        same = state[f"word_emb.emb_layers.{i}.weight"]
        state[f"crit.out_layers.{i}.weight"] = same if tied else randn(*same.shape)
        state[f"crit.out_layers.{i}.bias"] = randn(size)
    for i in range(len(ends) - 1 if projected else 0):
        same = state[f"word_emb.emb_projs.{i if div > 1 else 0}"]
        state[f"crit.out_projs.{i}"] = same if tied_projections[i] else randn(*same.shape)
    if len(ends) > 2:
        state["crit.cluster_weight"], state["crit.cluster_bias"] = randn(len(ends) - 2, d_embed), randn(len(ends) - 2)
    for i in range(LAYERS):
        attention, feed_forward = f"layers.{i}.dec_attn", f"layers.{i}.pos_ff"
        if kind in (0, 1):
            state[f"{attention}.qkv_net.weight"] = randn(3 * HEADS * WIDTH, D)
        else:
            state[f"{attention}.q_net.weight"] = randn(HEADS * WIDTH, D)
            state[f"{attention}.kv_net.weight"] = randn(2 * HEADS * WIDTH, D)
        if kind == 0:
            state[f"{attention}.r_net.weight"] = randn(HEADS * WIDTH, D)
        state[f"{attention}.o_net.weight"] = randn(D, HEADS * WIDTH)
        state[f"{feed_forward}.CoreNet.0.weight"], state[f"{feed_forward}.CoreNet.0.bias"] = (
            randn(INNER, D),
            randn(INNER),
        )
        state[f"{feed_forward}.CoreNet.3.weight"], state[f"{feed_forward}.CoreNet.3.bias"] = randn(D, INNER), randn(D)
        for part in (attention, feed_forward):
            state[f"{part}.layer_norm.weight"], state[f"{part}.layer_norm.bias"] = 1 + randn(D), randn(D)
    if kind == 0:
        state["r_w_bias"], state["r_r_bias"] = randn(HEADS, WIDTH), randn(HEADS, WIDTH)
    elif kind == 1:
        state["r_emb"], state["r_bias"] = randn(LAYERS, 9, HEADS, WIDTH), randn(LAYERS, 9, HEADS)
        state["r_w_bias"] = randn(LAYERS, HEADS, WIDTH)
    elif kind == 3:  # D // HEADS wide heads: upstream's table has the width of the model
        state["r_emb"] = randn(LAYERS, 9, HEADS, D // HEADS)
    return state


def segments(n=3, seed=1):
    text = torch.randint(V, (B, n * T + 1), generator=torch.Generator().manual_seed(seed))
    return [(text[:, i : i + T], text[:, i + 1 : i + T + 1]) for i in range(0, n * T, T)]


def assert_same_losses(model, expected, expected_memory=None):
    memory, losses = None, []
    with torch.no_grad():
        for tokens, targets in segments():
            output = model.eval()(tokens, targets, memory)
            memory = output.memory
            losses.append(output.nll)
    torch.testing.assert_close(torch.cat(losses, 1).double(), expected, atol=2e-5, rtol=2e-5)
    if expected_memory is not None:
        torch.testing.assert_close(memory.double(), expected_memory, atol=2e-5, rtol=2e-5)


VARIANTS = {  # kimiyoung's options, whether the tables are tied, and which projections
    "plain": ({"mem_len": T}, True, []),
    "untied": ({"mem_len": 6, "pre_lnorm": True}, False, []),
    "wt103-base": ({"mem_len": T, "cutoffs": CUTOFFS, "clamp_len": 3}, True, []),
    "wt103-large": ({"mem_len": 6, "cutoffs": CUTOFFS, "div_val": 2, "same_length": True}, True, [False, True, True]),
    "lm1b": ({"mem_len": T, "cutoffs": CUTOFFS, "div_val": 2, "pre_lnorm": True}, True, [False] * 3),
    "one table, projected": ({"mem_len": T, "cutoffs": CUTOFFS, "d_embed": 6}, True, [False, True, True]),
    "shaw": ({"mem_len": T, "attn_type": 1, "clamp_len": 5}, True, []),
    "shaw, beyond the table": ({"mem_len": 8, "attn_type": 1}, True, []),
    "absolute": ({"mem_len": T, "attn_type": 2}, True, []),
    "al-rfou": ({"mem_len": 8, "attn_type": 3, "pre_lnorm": True}, True, []),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_kimiyoungs_weights_give_its_losses_and_memories(name):
    options, tied, tied_projections = VARIANTS[name]
    config = {**SIZES, **options}
    state = kimiyoung_state(config, tied, tied_projections)
    model = TransformerXL.from_kimiyoung({f"module.{key}": x for key, x in state.items()}, config)
    reach = options["mem_len"] - 1 if options.get("same_length") else None
    assert_same_losses(model, *Reference(state, config, reach).nll(segments(), options["mem_len"]))
    assert model.config.tie_weight is tied and list(model.config.tie_projs) == tied_projections


def test_kimiyoungs_cutoffs_follow_from_tables_or_data_set():
    options, tied, tied_projections = VARIANTS["wt103-large"]
    state = kimiyoung_state({**SIZES, **options}, tied, tied_projections)
    without = {**SIZES, **options, "cutoffs": None}
    assert TransformerXL.from_kimiyoung(state, without).config.cutoffs == tuple(CUTOFFS)
    one_table = kimiyoung_state({**SIZES, "cutoffs": CUTOFFS}, True, [])
    with pytest.raises(ValueError, match="cutoffs"):
        TransformerXL.from_kimiyoung(one_table, SIZES)
    with pytest.raises(ValueError, match="20000, 40000, 200000"):  # too many for these 30 words: the table of wt103
        TransformerXL.from_kimiyoung(one_table, {**SIZES, "dataset": "wt103"})
    with pytest.raises(ValueError, match="sample_softmax"):
        TransformerXL.from_kimiyoung(state, {**without, "sample_softmax": 100})


@pytest.mark.parametrize("tied_projections", [[False, True, True], [True, True, True]])
@pytest.mark.parametrize("tied", [True, False])
def test_nvidias_weights_give_its_losses(tied, tied_projections):
    """What is tied is not in NVIDIA's state dict, and its same_length reaches one step farther."""
    config = {**SIZES, "mem_len": 6, "cutoffs": CUTOFFS, "div_val": 2, "same_length": True}
    state = kimiyoung_state(config, tied, tied_projections)
    theirs = {}
    for name, x in state.items():
        _, part, i, *rest = [*name.split("."), "", "", ""]
        if name.startswith("crit.out_layers") and not (tied and rest[0] == "weight"):
            theirs[f"crit.out_layers_{'weights' if rest[0] == 'weight' else 'biases'}.{i}"] = x
        elif name.startswith("word_emb.emb_projs"):
            theirs[name] = theirs[f"crit.shared_out_projs.{i}"] = x
        elif not name.startswith("crit.out_") or (part == "out_projs" and not tied_projections[int(i)]):
            theirs[name] = x
    model = TransformerXL.from_nvidia(theirs, config)
    assert model.config.same_length == "inclusive" and model.config.tie_weight is tied
    assert_same_losses(model, *Reference(state, config, reach=6).nll(segments(), 6))


def test_nvidias_table_of_al_rfou_has_the_models_width():
    config = {**SIZES, "mem_len": T, "attn_type": 3}
    state = kimiyoung_state(config, True, [])
    expected = Reference(state, config).nll(segments(), T)
    state["r_emb"] = state["r_emb"].flatten(2)
    assert_same_losses(TransformerXL.from_nvidia(state, config), *expected)


@pytest.mark.parametrize("name", ["published", "prenorm"])
def test_hugging_faces_weights_give_its_log_probabilities_and_memories(name):
    """Recorded by fixtures/make_transfo_xl.py with transformers 4.35.2, three segments."""
    with safe_open(FIXTURES / f"transfo_xl_{name}.safetensors", "pt") as file:
        config = json.loads(file.metadata()["config"])
        recorded = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # not a dict
    state = {key.removeprefix("model."): x for key, x in recorded.items() if key.startswith("model.")}
    model = TransformerXL.from_huggingface(state, config).eval()
    memory = None
    for i, tokens in enumerate(recorded["tokens"].split(6, 1)):
        targets = tokens.flip(1)
        with torch.no_grad():
            output = model(tokens, targets, memory)
            log_prob = model.log_prob(output.hidden)
        memory, expected = output.memory, recorded[f"log_prob.{i}"]
        torch.testing.assert_close(log_prob, expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(output.nll, -expected.gather(2, targets[..., None])[..., 0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(memory, recorded[f"memory.{i}"], atol=1e-5, rtol=1e-5)


def test_a_weight_that_is_missing_is_named():
    state = kimiyoung_state(SIZES, True, [])
    state.pop("layers.1.dec_attn.r_net.weight")
    with pytest.raises(RuntimeError, match=r"layers\.1\.dec_attn\.r_net\.weight"):
        TransformerXL.from_kimiyoung(state, SIZES)


@pytest.mark.parametrize("model", [ParTransformerXL, ParSuperNet])
def test_networks_of_single_blocks_load_no_transformer_xl(model):
    with pytest.raises(ValueError, match=f"a TransformerXL's, not a {model.__name__}'s"):
        model.from_kimiyoung(kimiyoung_state(SIZES, True, []), SIZES)


def test_our_state_dict_is_kimiyoungs():
    config = {**SIZES, "mem_len": T, "cutoffs": CUTOFFS, "div_val": 2}
    state = kimiyoung_state(config, True, [False, True, True])
    ours = TransformerXL.from_kimiyoung(state, config).state_dict()
    assert set(ours) == set(state) - {"pos_emb.inv_freq"}
    assert all(torch.equal(x, state[name]) for name, x in ours.items())
