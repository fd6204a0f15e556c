"""Completions of prompts: how they are drawn, and what is known of each token."""

from dataclasses import dataclass
from typing import Self

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from polopt.errors import ConfigError
from polopt.language.drawing import Draw


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
            raise ConfigError(
                f"temperature = {self.temperature}: must be finite and at least 0 (0 is greedy)"
            )
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
    """N completions of at most T tokens: first those of prompt 0, then those of prompt 1, ... Zeros outside `mask`."""

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

    @classmethod
    def blank(cls, rows: int, config: SamplingConfig, dtype: torch.dtype, device: torch.device) -> Self:
        """Completions of which nothing is drawn yet, T being `max_new_tokens`."""

        def zeros(kind: torch.dtype) -> Tensor:
            return torch.zeros(rows, config.max_new_tokens, dtype=kind, device=device)

        logp = zeros(dtype)
        return cls(
            tokens=zeros(torch.int64),
            mask=zeros(torch.bool),
            logp=logp,
            sampler_logp=zeros(dtype) if config.truncates else logp,
            entropy=zeros(dtype),
            finished=torch.zeros(rows, dtype=torch.bool, device=device),
        )

    def write(self, rows: Int[Tensor, " R"], step: int, draw: Draw) -> None:
        """Fill in token number `step` of some rows."""
        self.mask[rows, step] = True
        self.tokens[rows, step] = draw.tokens
        self.logp[rows, step] = draw.logp
        self.entropy[rows, step] = draw.entropy
        if self.sampler_logp is not self.logp:
            self.sampler_logp[rows, step] = draw.sampler_logp
