"""Swapping the modules of a model that the user already has for their fused twins."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from par_xl.nn.adaptive_softmax import AdaptiveLogSoftmaxWithLoss
from par_xl.nn.attention_mask import read_mask, read_once
from par_xl.nn.plain_linear import is_plain
from par_xl.nn.rel_attention import RelPartialLearnableMultiHeadAttn, Window
from par_xl.nn.speech_acceleration import speech_twin


def accelerate(module: nn.Module) -> dict[str, nn.Module]:
    """Swap, in place, every submodule that this library knows for its fused twin, which shares its parameters.

    Known are, by class name and parts: ``RelPartialLearnableMultiHeadAttn`` of kimiyoung/transformer-xl, of NVIDIA's
    Transformer-XL and of Hugging Face's ``transfo_xl``; ``RelPositionMultiHeadedAttention`` of ESPnet and
    ``RelPositionMultiHeadAttention`` of NeMo (:func:`par_xl.nn.speech_acceleration.speech_twin`); and
    ``torch.nn.AdaptiveLogSoftmaxWithLoss``. A twin is called as the original is. The parameters, their names and their
    order stay, so that optimizers and checkpoints go on; so does the training mode. Adapters around an attention's
    projections go on too; an adaptive softmax with adapters or hooks on its layers is left as it is. Forward hooks of a
    swapped module are lost, but for the speech layers'. An attention twin has no attention matrix to look at, and the
    host looks at each mask once for all layers that share it: Transformer-XL's twins refuse a mask that no window
    expresses, a speech layer's twin then runs the layer's own code.

        swapped = par_xl.accelerate(model)      # {"layers.0.dec_attn": ..., ...}; empty: nothing was known

    Returns:
        The twins by their qualified names.

    Raises:
        TypeError: ``module`` itself is one of those: there is no parent in which to swap it.
    """
    if _twin(module) is not None:
        raise TypeError(f"module must contain what is to be swapped, not be it, a {type(module).__name__}")
    twins: dict[int, nn.Module] = {}
    swapped = {}
    for name, child in list(module.named_modules(remove_duplicate=False)):
        twin = twins.get(id(child)) or _twin(child)
        if twin is not None:
            parent, _, attribute = name.rpartition(".")
            setattr(module.get_submodule(parent), attribute, twin)
            twins[id(child)] = swapped[name] = twin
    return swapped


def _twin(module: nn.Module) -> nn.Module | None:
    """The twin of a module that is known and is not one already."""
    for make in TWINS:
        twin = make(module)
        if twin is not None:
            twin.training = module.training  # its children are the module's own
            return twin
    return None


class _TimeFirst(RelPartialLearnableMultiHeadAttn):
    """The fused layer for tensors ``(T, B, d)``, causal by the mask that upstream passes."""

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        return x.unflatten(-1, (-1, self.n_head, self.d_head)).permute(2, 1, 3, 0, 4).unbind(0)

    def merge(self, heads: Tensor) -> Tensor:
        return heads.permute(2, 0, 1, 3).flatten(2)

    def run(self, w, r, r_w_bias, r_r_bias, attn_mask, mems):
        mems = mems if mems is not None and mems.numel() else None
        return super().forward(w, r.flatten(0, -2), r_w_bias, r_r_bias, mems, window=_window(attn_mask))


class KimiyoungTwin(_TimeFirst):
    """The call of kimiyoung's and NVIDIA's layer, whose biases belong to the model."""

    def forward(self, w, r, r_w_bias, r_r_bias, attn_mask=None, mems=None):  # type: ignore[override]
        return self.run(w, r, r_w_bias, r_r_bias, attn_mask, mems)


class HuggingFaceTwin(_TimeFirst):
    """The call of Hugging Face's layer."""

    def forward(self, w, r, attn_mask=None, mems=None, head_mask=None, output_attentions=False):  # type: ignore[override]
        if head_mask is not None or output_attentions:
            raise ValueError(
                "head_mask and output_attentions must not be given: a fused kernel has no attention matrix"
            )
        return [self.run(w, r, None, None, attn_mask, mems)]


def _rel_partial_learnable(module: nn.Module) -> nn.Module | None:
    parts = "qkv_net", "r_net", "o_net", "layer_norm", "drop", "dropatt"
    named = type(module).__name__ == RelPartialLearnableMultiHeadAttn.__name__
    if not named or isinstance(module, RelPartialLearnableMultiHeadAttn) or not all(hasattr(module, p) for p in parts):
        return None
    theirs: Any = module
    with_biases = "r_w_bias" in inspect.signature(module.forward).parameters
    with torch.device("meta"):
        twin = (KimiyoungTwin if with_biases else HuggingFaceTwin)(
            theirs.n_head,
            theirs.d_model,
            theirs.d_head,
            theirs.drop.p,
            theirs.dropatt.p,
            pre_lnorm=theirs.pre_lnorm,
            untie_r=not with_biases,
        )
    shared = {name: part for name, part in module.named_children() if name in twin._modules}
    for name, part in [*shared.items(), *module.named_parameters(recurse=False)]:
        delattr(twin, name)  # so that the order becomes theirs
        setattr(twin, name, part)
    return twin


def _adaptive_log_softmax(module: nn.Module) -> nn.Module | None:
    if type(module) is not nn.AdaptiveLogSoftmaxWithLoss:
        return None
    tails: Any = module.tail
    layers = [module.head, *(layer for tail in tails for layer in tail)]
    known = all(is_plain(x) and not x._forward_hooks and not x._forward_pre_hooks for x in layers)
    if not known or any(len(tail) != 2 for tail in tails):
        return None  # an adapter, say: the fused module reads weights and calls no layer
    sizes = module.in_features, module.n_classes, module.cutoffs[:-1], module.div_value, module.head_bias
    with torch.device("meta"):
        twin = AdaptiveLogSoftmaxWithLoss(*sizes)
    twin.head, twin.tail = module.head, module.tail
    return twin


TWINS: list[Callable[[nn.Module], nn.Module | None]] = [_rel_partial_learnable, _adaptive_log_softmax, speech_twin]


def _window(attn_mask: Tensor | None) -> Window:
    """The window that ``attn_mask (Q, K)`` or ``(Q, K, 1)``, nonzero where a key is hidden, is.

    The host has to look at the mask, once for all layers that share it (upstream looks in every layer).
    """
    if attn_mask is None:
        raise ValueError("attn_mask must be given: the layer is causal")
    return read_once(attn_mask, _read_window)


def _read_window(attn_mask: Tensor) -> Window:
    seen = read_mask(attn_mask.reshape(1, *attn_mask.shape[:2]) == 0, len(attn_mask))
    if seen is None or seen.window[1] != 0 or seen.key_lengths is not None or seen.rows is not None:
        raise ValueError("attn_mask must hide the future, and the keys beyond one distance if any, and nothing else")
    return seen.window
