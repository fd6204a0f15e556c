"""Sampling completions from a Hugging Face causal language model.

Every prompt is read once and shared by all its completions; completions that are finished leave the batch. The random
numbers come from outside, one for each row and token, so what a row samples does not depend on the rows it is sampled
with.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from polopt.errors import ConfigError
from polopt.language.attention import replaced_attention
from polopt.language.completions import Completions, SamplingConfig
from polopt.language.drawing import draw_tokens
from polopt.language.prefix_cache import PrefixCache
from polopt.language.replica import Replica
from polopt.language.stopping import StopCondition

PREFILL_TOKENS = 4096
"""Prompt tokens in one forward pass, or a single longer prompt; bounds memory."""


class CompletionSampler:
    """Samples completions of prompts.

    Args:
        model: a causal language model of transformers, or a PEFT model around one.
        tokenizer: its tokenizer: names the end-of-sequence token and decodes for stop strings.
        dtype: None samples with the model itself. A dtype samples with a copy of the model in that dtype, which
            `refresh` brings up to date, and which is faster on CPUs even in the model's own dtype. Only then may the
            model be sharded over ranks afterwards.
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

    def release(self) -> None:
        """Free what sampling alone needs; `refresh` before the next sampling."""
        if self._replica is not None:
            self._replica.release()

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
            ConfigError: shapes do not agree, a prompt is empty, or the model has too few positions.
            PoloptError: the model's logits are not finite.
        """
        _check_call(self.model, prompts, counts, config, uniforms)
        weight = next(p for p in self.model.parameters() if not p.is_meta)
        out = Completions.blank(
            len(uniforms), config, torch.promote_types(weight.dtype, torch.float32), weight.device
        )
        stop = StopCondition(self.model, self.tokenizer, config.stop)
        wanted = [(tuple(prompt), count) for prompt, count in zip(prompts, counts, strict=True) if count]
        distinct = sorted({prompt for prompt, _ in wanted}, key=lambda prompt: (len(prompt), prompt))
        number = {prompt: i for i, prompt in enumerate(distinct)}
        owner = torch.tensor(
            [number[prompt] for prompt, count in wanted for _ in range(count)], dtype=torch.int64
        )
        with _evaluating(self.model):
            for rows in owner.argsort(stable=True).split(self.max_rows) if len(owner) else ():
                used, local = owner[rows].unique(return_inverse=True)
                chunk = [distinct[i] for i in used.tolist()]
                place = weight.device
                self._sample_rows(
                    chunk, local.to(place), rows.to(place), uniforms.to(place), config, stop, out
                )
        return out

    def _sample_rows(
        self,
        prompts: list[tuple[int, ...]],
        owner: Int[Tensor, " R"],
        rows: Int[Tensor, " R"],
        uniforms: Float[Tensor, "N T"],
        config: SamplingConfig,
        stop: StopCondition,
        out: Completions,
    ) -> None:
        """Sample the rows `rows` of the output, row i of them continuing `prompts[owner[i]]`."""
        cache = PrefixCache([len(prompt) for prompt in prompts], owner.device)
        with replaced_attention(self.model, cache.attend):
            logits = self._read_prompts(cache, prompts)[owner]
            positions = cache.lengths[owner]
            cache.begin_rows(owner)
            for step in range(config.max_new_tokens):
                draw = draw_tokens(
                    logits,
                    uniforms[rows, step],
                    temperature=config.temperature,
                    top_k=config.top_k,
                    top_p=config.top_p,
                )
                out.write(rows, step, draw)
                over = stop(out.tokens[rows, : step + 1])
                out.finished[rows[over]] = True
                if step + 1 == config.max_new_tokens or bool(over.all()):
                    return
                tokens = draw.tokens
                if bool(over.any()):
                    order = cache.keep_rows(~over)
                    rows, positions, tokens = rows[order], positions[order], tokens[order]
                logits = self._logits(tokens, positions)
                cache.advance()
                positions = positions + 1

    def _read_prompts(self, cache: PrefixCache, prompts: list[tuple[int, ...]]) -> Float[Tensor, "P V"]:
        """Fill the cache; the logits after each prompt."""
        logits, first = [], 0
        while first < len(prompts):
            last, total = first + 1, len(prompts[first])
            while last < len(prompts) and total + len(prompts[last]) <= PREFILL_TOKENS:
                total += len(prompts[last])
                last += 1
            positions, ends = cache.read_prompts(slice(first, last))
            tokens = torch.tensor(
                [t for prompt in prompts[first:last] for t in prompt], device=positions.device
            )
            logits.append(self._logits(tokens, positions, ends))
            first = last
        layers = _config(self.model).num_hidden_layers
        if len(cache.layers) != layers:
            raise ConfigError(
                f"model: {len(cache.layers)} of {layers} layers of {type(self.model).__name__} attend through the "
                "attention interface of transformers; the sampler needs all"
            )
        return torch.cat(logits)

    def _logits(
        self, tokens: Int[Tensor, " S"], positions: Int[Tensor, " S"], keep: Int[Tensor, " s"] | int = 0
    ) -> Float[Tensor, "s V"]:
        """Logits after the tokens of a packed sequence, or after those of them at `keep`."""
        inputs = {"input_ids": tokens.unsqueeze(0), "position_ids": positions.unsqueeze(0)}
        return self.model(**inputs, use_cache=False, logits_to_keep=keep).logits[0]


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, the model is in evaluation mode."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _config(model: Any) -> Any:
    return model.config.get_text_config()


def _check_supported(model: Any) -> None:
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    name = f"model: {type(base).__name__}"
    if not getattr(base, "_supports_attention_backend", False) or getattr(base, "_is_stateful", False):
        raise ConfigError(
            f"{name} does not attend through the attention interface of transformers, which the sampler needs"
        )
    missing = {"position_ids", "logits_to_keep"} - set(inspect.signature(base.forward).parameters)
    if missing:
        raise ConfigError(f"{name}.forward has no argument {sorted(missing)[0]!r}, which the sampler needs")
    kinds = set(getattr(_config(base), "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if kinds:
        raise ConfigError(
            f"{name} has layers of type {sorted(kinds)[0]!r}, whose state the sampler cannot share"
        )


def _check_call(
    model: nn.Module, prompts: list[list[int]], counts: list[int], config: SamplingConfig, uniforms: Tensor
) -> None:
    if len(counts) != len(prompts) or any(count < 0 for count in counts):
        raise ConfigError(f"counts: {len(counts)} for {len(prompts)} prompts; needs one for each, 0 or more")
    expected = (sum(counts), config.max_new_tokens)
    if tuple(uniforms.shape) != expected:
        raise ConfigError(
            f"uniforms: shape {tuple(uniforms.shape)}; needs (sum of counts, max_new_tokens) = {expected}"
        )
    longest = max((len(prompt) for prompt in prompts), default=0) + config.max_new_tokens
    limit = getattr(_config(model), "max_position_embeddings", None) or longest
    if longest > limit:
        raise ConfigError(
            f"max_new_tokens = {config.max_new_tokens}: with the longest prompt {longest} tokens, but the model has "
            f"{limit} positions; shorten the prompts or the completions"
        )
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise ConfigError(f"prompts[{i}] is empty: the model needs at least one token to continue")
