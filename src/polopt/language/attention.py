"""Giving a Hugging Face model another attention function for a while.

Models that attend through transformers' `AttentionInterface` look the function up by a name in their configuration, so no
model code is touched.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from polopt.errors import ConfigError

NAME = "polopt_shared_prefix"


class Rule(NamedTuple):
    """How a layer attends: scores are `softcap(scaling q k)` for keys less than `window` tokens back."""

    scaling: float
    window: int | None
    softcap: float | None


Attend = Callable[[int, Tensor, Tensor, Tensor, Rule], Tensor]
"""Number of the layer, queries [H, S, d], keys [h, S, d], values [h, S, e] of one packed sequence -> outputs [S, H, e]."""

_active: ContextVar[Attend] = ContextVar("_active")


@contextmanager
def replaced_attention(model: nn.Module, attend: Attend) -> Iterator[None]:
    """Inside, `attend` is the attention of the model, which gets one packed sequence and no mask."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, _attention)
    found: list[Any] = [module.config for module in model.modules() if hasattr(module, "config")]
    configs = list({id(c): c for c in found if hasattr(c, "_attn_implementation_internal")}.values())
    before = [config._attn_implementation_internal for config in configs]
    token = _active.set(attend)
    try:
        for config in configs:
            config._attn_implementation_internal = NAME
        yield
    finally:
        for config, implementation in zip(configs, before, strict=True):
            config._attn_implementation_internal = implementation
        _active.reset(token)


def causal_attention(
    query: Float[Tensor, "p H L d"],
    key: Float[Tensor, "p h L d"],
    value: Float[Tensor, "p h L e"],
    rule: Rule,
) -> Float[Tensor, "p H L e"]:
    """Attention inside each sequence."""
    length, groups = query.shape[2], query.shape[1] // key.shape[1]
    if rule.softcap is None and (rule.window is None or length <= rule.window):
        return nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=rule.scaling, enable_gqa=groups > 1
        )
    columns = torch.arange(length, device=query.device)
    back = columns.unsqueeze(1) - columns
    seen = (back >= 0) & (back < (rule.window or length))
    scores = torch.matmul(query.unflatten(1, (-1, groups)), key.unsqueeze(2).transpose(-1, -2))
    scores, scaling = softcapped(scores, rule)
    weights = (scores * scaling).masked_fill(~seen, -torch.inf).softmax(-1)
    return torch.matmul(weights, value.unsqueeze(2)).flatten(1, 2)


def softcapped(scores: Float[Tensor, "..."], rule: Rule) -> tuple[Float[Tensor, "..."], float]:
    """Scores, and what is left to scale them by."""
    if rule.softcap is None:
        return scores, rule.scaling
    return rule.softcap * torch.tanh(scores * (rule.scaling / rule.softcap)), 1.0


def _attention(
    module: Any,
    query: Float[Tensor, "1 H S d"],
    key: Float[Tensor, "1 h S d"],
    value: Float[Tensor, "1 h S e"],
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **options: Any,
) -> tuple[Float[Tensor, "1 S H e"], None]:
    """The signature that transformers calls."""
    given = [name for name in ("position_bias", "s_aux") if options.get(name) is not None]
    if given or options.get("is_causal", getattr(module, "is_causal", True)) is False:
        what = f"the attention option {given[0]!r}" if given else "attention that is not causal"
        raise ConfigError(
            f"model: {type(module).__name__} has {what}, which the sampler cannot share prompts with"
        )
    kinds = getattr(module.config, "layer_types", None)
    if sliding_window is None and kinds and kinds[module.layer_idx] == "sliding_attention":
        raise ConfigError(
            f"model: {type(module).__name__} has a sliding window that it does not tell to its attention"
        )
    rule = Rule(query.shape[-1] ** -0.5 if scaling is None else scaling, sliding_window, softcap)
    return _active.get()(module.layer_idx, query[0], key[0], value[0], rule).unsqueeze(0), None
