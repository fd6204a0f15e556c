"""What an iteration would take, from sizes alone: no weights are loaded.

Parameters are counted exactly, on a model without storage. Times are operations over the rate at which this machine
multiplies matrices just now, of which a share is reached (`_REACHED`, measured on models of 100 million parameters).
"""

import re
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from polopt.config import RunConfig
from polopt.errors import ConfigError

if TYPE_CHECKING:
    from polopt.language.tasks import LanguageTask
    from polopt.method import Method

_REACHED = {torch.float64: 0.5, torch.float32: 0.5, torch.bfloat16: 0.35}
"""Share of the rate of large matrix products that sampling and training reach."""
_LIBRARIES = 0.6
"""GB of the interpreter and the libraries."""
_PROBE_SECONDS = 0.1
_PROBE_SIZE = 1024
_SMOLLM2: dict[str, Any] = {
    "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True,
}  # fmt: skip
"""Sizes of the packaged SmolLM2-135M."""


@dataclass(frozen=True)
class Estimate:
    """Memory and time of an iteration."""

    parameters: int
    trained: int
    """Of the parameters, those that are trained."""
    memory: dict[str, float]
    """GB by what holds it."""
    seconds: dict[str, float]
    """Seconds of an iteration by stage."""
    assumptions: list[str]

    def lines(self) -> list[str]:
        """The estimate in words."""
        return [
            f"{self.parameters / 1e6:.1f} million parameters, {self.trained / 1e6:.1f} million trained",
            f"memory: about {_amount(sum(self.memory.values()))} GB ({_parts(self.memory, 'GB')})",
            f"time: at most about {_amount(sum(self.seconds.values()))} s per iteration ({_parts(self.seconds, 's')})",
            *self.assumptions,
        ]


def estimate_language(config: RunConfig, task: "LanguageTask", method: "Method") -> Estimate:
    """The estimate of a language run.

    Raises:
        ConfigError: there is no such model.
    """
    from polopt.language.actor import LARGE_MODEL
    from polopt.language.evaluation import HEAD_TOKENS

    c, t = config.language, config.trainer
    model = _model_without_storage(c.model)
    shape = model.config.get_text_config()
    parameters = sum(p.numel() for p in model.parameters())
    trained = _lora_parameters(model, c.lora_rank) if c.lora_rank else parameters
    weights = getattr(torch, c.dtype)
    auto = torch.bfloat16 if parameters > LARGE_MODEL and weights == torch.float32 else weights
    choices = {"auto": auto, "same": weights, "bfloat16": torch.bfloat16}
    compute, sampling = choices[c.compute_dtype], choices[c.sampler_dtype]

    prompt = _prompt_tokens(config, task)
    rows = t.prompts * t.rollouts
    completions, tokens = rows * c.max_new_tokens, t.prompts * prompt + rows * c.max_new_tokens
    of_one_layer = 9 * shape.hidden_size + 6 * shape.intermediate_size  # computed again in the backward pass
    inputs = shape.num_hidden_layers * shape.hidden_size
    kv = 2 * shape.num_key_value_heads * (shape.hidden_size // shape.num_attention_heads)
    decoded = min(rows, c.sampler_rows) * c.max_new_tokens + t.prompts * prompt
    reference = any(name.startswith("ref_") for name in method.requires) and not c.lora_rank
    memory = {
        "weights": parameters * weights.itemsize,
        "gradients": trained * weights.itemsize,
        "optimizer": 2 * trained * weights.itemsize,
        "sampler's copy": parameters * sampling.itemsize if sampling != weights else 0,
        "reference": parameters * weights.itemsize if reference else 0,
        "cache": decoded * shape.num_hidden_layers * kv * sampling.itemsize,
        "activations": c.micro_batch_tokens * (inputs * weights.itemsize + of_one_layer * compute.itemsize),
        "logits": min(c.micro_batch_tokens, HEAD_TOKENS) * shape.vocab_size * compute.itemsize,
        "libraries": _LIBRARIES * 1e9,
    }
    rates = {dtype: matmul_rate(dtype) for dtype in {compute, sampling}}
    extra_passes = sum(any(n.startswith(f"{policy}_") for n in method.requires) for policy in ("old", "ref"))
    seconds = {
        "generation": 2 * parameters * tokens / (rates[sampling] * _REACHED[sampling]),
        "update": (6 * t.epochs + 2 * extra_passes)
        * parameters
        * tokens
        / (rates[compute] * _REACHED[compute]),
    }
    measured = " and ".join(
        f"{rate / 1e9:.0f} GFLOP/s in {_name(dtype)}, {100 * _REACHED[dtype]:.0f} % of it assumed to be reached"
        for dtype, rate in rates.items()
    )
    assumptions = [
        f"assumed: {rows} completions of all {c.max_new_tokens} tokens ({completions} tokens), prompts of {prompt}, "
        "none skipped; rewards and scores take no time",
        f"measured just now: {measured}",
    ]
    if asked := method.sampler.to_score(task.train_size, lambda _: torch.Generator()):
        scored = len(asked[0]) * asked[1]
        assumptions.append(
            f"not counted: {scored} completions that sampler {method.sampler.name} scores before the first iteration, "
            f"{_amount(seconds['generation'] * scored / rows)} s"
        )
    return Estimate(parameters, trained, {k: v / 1e9 for k, v in memory.items()}, seconds, assumptions)


def estimate_by_trial(config: RunConfig, task: Any, actor: Any) -> Estimate:
    """The estimate of a run that is quick: an iteration's rollout and one pass over it, done once."""
    from polopt.domain import Plan

    t = config.trainer
    parameters = sum(p.numel() for p in actor.module.parameters())
    started = time.perf_counter()
    plan = Plan(torch.arange(t.prompts), torch.full((t.prompts,), t.rollouts))
    batch = actor.rollout(task, plan, torch.Generator()).batch
    collected = time.perf_counter()
    actor.evaluate(batch, frozenset({"logp"})).logp.sum().backward()
    seconds = {"rollout": collected - started, "update": t.epochs * (time.perf_counter() - collected)}
    assumptions = [
        f"measured just now, with new weights: {int(batch.mask.sum())} decisions; minibatches cost more than one pass"
    ]
    return Estimate(parameters, parameters, {"libraries": _LIBRARIES}, seconds, assumptions)


def matmul_rate(dtype: torch.dtype) -> float:
    """Operations per second of large matrix products on this machine, probed for a tenth of a second."""
    a = torch.ones(_PROBE_SIZE, _PROBE_SIZE, dtype=dtype)
    torch.mm(a, a)
    count, started = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - started) < _PROBE_SECONDS or not count:
        torch.mm(a, a)
        count += 1
    return 2 * _PROBE_SIZE**3 * count / elapsed


def _model_without_storage(spec: str) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

    from polopt.language.model import SMOLLM2
    from polopt.language.tiny import build_tiny

    with torch.device("meta"):
        if spec.startswith("tiny:"):
            return build_tiny(spec)[0]
        if spec == SMOLLM2:
            return AutoModelForCausalLM.from_config(LlamaConfig(**_SMOLLM2))
        try:
            return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(spec, trust_remote_code=False))
        except (OSError, ValueError) as error:
            reason = str(error).strip().split("\n")[0]
            raise ConfigError(
                f"language.model = {spec!r}: no configuration of such a model, {reason}"
            ) from None


def _lora_parameters(model: nn.Module, rank: int) -> int:
    layers = [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and "head" not in name
    ]
    return rank * sum(layer.in_features + layer.out_features for layer in layers)


def _prompt_tokens(config: RunConfig, task: "LanguageTask") -> int:
    """Mean tokens of a few prompts, at a byte per token from scratch and else by pieces: words, digits, signs."""
    texts = [_text(task.train(i).prompt) for i in range(min(8, task.train_size))]
    tiny = config.language.model.startswith("tiny:")
    counts = [
        len(text.encode()) if tiny else len(re.findall(r"[^\W\d]{1,8}|\d| (?=\d)|[^\w ]", text))
        for text in texts
    ]
    return max(1, round(sum(counts) / len(counts)))


def _text(prompt: str | list[dict[str, Any]]) -> str:
    return prompt if isinstance(prompt, str) else "\n".join(str(message["content"]) for message in prompt)


def _parts(amounts: dict[str, float], unit: str) -> str:
    return ", ".join(
        f"{name} {_amount(amount)} {unit}" for name, amount in amounts.items() if amount >= 0.005
    )


def _amount(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.2g}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
