"""Configuration of a language run."""

from typing import Literal, Self

from pydantic import Field, model_validator

from polopt.settings import Settings

Precision = Literal["float32", "bfloat16"]


class LanguageConfig(Settings):
    """Which model, how it samples, how it is evaluated."""

    model: str = "smollm2"
    """Path, hub id, `smollm2` (the packaged weights) or `tiny:LAYERSxWIDTH` (from scratch)."""
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """Precision of the trained weights."""
    compute_dtype: Literal["auto", "same", "bfloat16"] = "auto"
    """Precision of the forward and backward passes: that of the weights, or bfloat16 by autocast. "auto" is bfloat16 for
    float32 weights of more than ten million parameters."""
    sampler_dtype: Literal["auto", "same", "bfloat16"] = "auto"
    """Precision of the sampler, by the same rule; another than the weights' is corrected for (`sampler_cap`)."""
    lora_rank: int = Field(0, ge=0)
    """Rank of the LoRA adapters that are trained instead of all weights; 0: all weights."""
    lora_alpha: float = Field(16.0, gt=0)
    """Scale of the LoRA adapters."""
    temperature: float = Field(1.0, gt=0)
    """Temperature of the policy: the trained policy is softmax(logits / temperature)."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Sample from the smallest set of tokens with this probability."""
    top_k: int = Field(0, ge=0)
    """Sample from this many of the likeliest tokens; 0: all."""
    max_new_tokens: int = Field(32, ge=1)
    """Longest completion in tokens."""
    score_temperature: float = Field(0.0, ge=0)
    """Temperature of held-out scores; 0: greedy."""
    micro_batch_tokens: int = Field(2048, ge=1)
    """Tokens evaluated at once with gradient; bounds memory, never changes the result."""
    stored: bool = False
    """Train on completions that are stored with the prompts (columns `completions` and `scores` of the task's data)
    instead of sampling; only by losses that are right for completions of any origin."""
    sampler_rows: int = Field(256, ge=1)
    """Completions decoded at once."""
    warm_up: int = Field(0, ge=0)
    """Supervised steps on the task's answers before a `tiny:` model is trained."""
    warm_up_lr: float = Field(3e-3, gt=0)
    """Learning rate of the supervised steps."""
    chat_template: bool = True
    """Render chat prompts with the tokenizer's template; False joins their contents."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.warm_up and not self.model.startswith("tiny:"):
            raise ValueError(
                f"warm_up = {self.warm_up}: only for a model from scratch (model = 'tiny:LAYERSxWIDTH')"
            )
        if (
            self.dtype != "float32"
            and "bfloat16" in (self.compute_dtype, self.sampler_dtype)
            and self.dtype != "bfloat16"
        ):
            raise ValueError(
                f"dtype = {self.dtype!r}: bfloat16 compute or sampling needs float32 or bfloat16 weights"
            )
        return self
