"""Sampling completions from a Hugging Face causal language model.

Every prompt is read once; its keys and values are shared by all its completions, and completions that are finished leave
the batch. The random numbers come from outside, one for each row and token, so what a row samples does not depend on the
rows it is sampled with.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from polopt.errors import ConfigError
from polopt.language.drawing import Draw, draw_tokens
from polopt.language.prefix_cache import PrefixCache
from polopt.language.replica import Replica
from polopt.language.stopping import StopCondition

PREFILL_TOKENS = 4096
"""Prompt tokens in one forward pass, or a single longer prompt; bounds memory."""


@dataclass(frozen=True)
class SamplingConfig:
    """How completions are drawn.

    Raises:
        ConfigError: a value is out of range.
    """

    max_new_tokens: int
    """Longest completion, in tokens."""
    temperature: float = 1.0
    """What logits are divided by; 0 takes the likeliest token."""
    top_p: float = 1.0
    """Share of the probability that is kept, in (0, 1]."""
    top_k: int = 0
    """Number of tokens that are kept; 0: all."""
    stop: tuple[str, ...] = ()
    """Strings that end a completion; the token that completes one is its last."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens = {self.max_new_tokens}: must be at least 1")
        if not 0 <= self.temperature < float("inf"):
            raise ConfigError(f"temperature = {self.temperature}: must be finite and at least 0 (0 is greedy)")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p = {self.top_p}: must be in (0, 1]; 1 keeps all tokens")
        if self.top_k < 0:
            raise ConfigError(f"top_k = {self.top_k}: must be at least 0; 0 keeps all tokens")
        if isinstance(self.stop, str) or "" in self.stop:
            raise ConfigError(f"stop = {self.stop!r}: must be a tuple of strings that are not empty")

    @property
    def truncates(self) -> bool:
        """Whether tokens are drawn from a truncation of the policy."""
        return self.temperature > 0 and (self.top_k > 0 or self.top_p < 1)


@dataclass(frozen=True)
class Completions:
    """Sampled completions, T = `max_new_tokens`: those of prompt 0 first, then those of prompt 1, ... Zeros outside `mask`."""

    tokens: Int[Tensor, "N T"]
    """Drawn tokens, with the one that ended the completion."""
    mask: Bool[Tensor, "N T"]
    """True on drawn tokens."""
    logp: Float[Tensor, "N T"]
    """Log-probability under softmax(logits / temperature), whole vocabulary, in nats; at temperature 0 it is 0."""
    sampler_logp: Float[Tensor, "N T"]
    """Log-probability under the distribution that was drawn from; the same tensor as `logp` without truncation."""
    entropy: Float[Tensor, "N T"]
    """Entropy of softmax(logits / temperature), whole vocabulary, in nats."""
    finished: Bool[Tensor, " N"]
    """Ended by an end-of-sequence token or a stop string, not by the limit."""


class CompletionSampler:
    """Samples completions of prompts.

    Args:
        model: a causal language model of transformers, or a PEFT model around one.
        tokenizer: its tokenizer: names the end-of-sequence token and decodes for stop strings.
        dtype: None samples with the model itself. A dtype samples with a copy of the model in it, which `refresh` brings
            up to date and which is faster on CPUs even in the model's own dtype; then the model may be sharded later.
        max_rows: completions sampled at once; bounds memory.

    Raises:
        ConfigError: the model cannot share prompts.
    """

    def __init__(
        self, model: nn.Module, tokenizer: Any, dtype: torch.dtype | None = None, max_rows: int = 256
    ) -> None:
        if max_rows < 1:
            raise ConfigError(f"max_rows = {max_rows}: must be at least 1")
        _check_supported(model)
        self._replica = None if dtype is None else Replica(model, dtype)
        self.model = model if self._replica is None else self._replica.model
        self.tokenizer, self.max_rows = tokenizer, max_rows

    def refresh(self) -> None:
        """Sample with the model's present weights from now on."""
        if self._replica is not None:
            self._replica.refresh()

    @torch.no_grad()
    def sample(
        self,
        prompts: list[list[int]],
        counts: list[int],
        config: SamplingConfig,
        uniforms: Float[Tensor, "N T"],
    ) -> Completions:
        """Sample `counts[i]` completions of `prompts[i]`.

        Args:
            prompts: tokens of each prompt.
            counts: completions of each prompt, 0 or more.
            config: how to draw; T is its `max_new_tokens`.
            uniforms: numbers in [0, 1], one for each row and token; they alone decide what is drawn.

        Raises:
            ConfigError: shapes do not agree, a prompt is empty, or prompt and completion are longer than the model can take.
            PoloptError: the model's logits are not finite.
        """
        self._check(prompts, counts, config, uniforms)
        device = next(p for p in self.model.parameters() if not p.is_meta).device
        out = _Record(len(uniforms), config, device)
        stop = StopCondition(self.model, self.tokenizer, config.stop)
        distinct = sorted({tuple(p) for p, count in zip(prompts, counts, strict=True) if count}, key=len)
        number = {prompt: i for i, prompt in enumerate(distinct)}
        owner = torch.tensor([number[tuple(p)] for p, count in zip(prompts, counts, strict=True) for _ in range(count)])
        with _evaluating(self.model):
            for rows in owner.argsort(stable=True).split(self.max_rows) if len(owner) else ():
                chunk, local = owner[rows].unique(return_inverse=True)
                ...
        return out.completions()
