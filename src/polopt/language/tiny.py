"""Small language models from scratch, for experiments and tests of seconds: no download, no saved weights."""

import re
import string
from collections.abc import Iterable
from itertools import islice
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from polopt.errors import ConfigError
from polopt.language.graders import require
from polopt.language.prompts import Message, encode_prompt

SPECIAL = ("<pad>", "<bos>", "<eos>")
HEAD_WIDTH = 32
IGNORED = -100


def build_tiny(spec: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Any, Any]:
    """A Llama of random weights and a tokenizer of single bytes or characters.

    Args:
        spec: `tiny:LAYERSxWIDTH` or `tiny:LAYERSxWIDTH:TOKENS`. WIDTH is a multiple of 32, the width of a head, or a
            smaller even number. TOKENS is `byte` (any text; the default) or `char` (printable ASCII).
        dtype: of the weights.
        seed: of the weights.

    Returns:
        A `LlamaForCausalLM` in evaluation mode and a `PreTrainedTokenizerFast`.

    Raises:
        ConfigError: another spec.
        MissingExtraError: transformers is not installed.

    Example:
        >>> model, tokenizer = build_tiny("tiny:2x64:char")
        >>> tokenizer.decode(tokenizer("12+30=")["input_ids"])
        '12+30='
    """
    found = re.fullmatch(r"tiny:(\d+)x(\d+)(?::(byte|char))?", spec)
    layers, width = (int(found[1]), int(found[2])) if found else (0, 0)
    heads = max(1, width // HEAD_WIDTH)
    if not layers or not width or width % (2 * heads) or (width > HEAD_WIDTH and width % HEAD_WIDTH):
        raise ConfigError(
            f"model = {spec!r}: must be 'tiny:LAYERSxWIDTH', 'tiny:LAYERSxWIDTH:byte' or 'tiny:LAYERSxWIDTH:char', "
            f"WIDTH a multiple of {HEAD_WIDTH} or a smaller even number"
        )
    require("transformers", f"model = {spec!r}")
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = build_tokenizer(found[3] or "byte" if found else "byte")
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=width * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=2048,
        initializer_range=0.75 * width**-0.5,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: Any = LlamaForCausalLM(config)
    return model.to(dtype).eval(), tokenizer


def build_tokenizer(tokens: str) -> Any:
    """A tokenizer without merges: a token is a byte (`byte`) or a printable ASCII character (`char`).

    Characters that `char` does not know are dropped.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    if tokens == "byte":
        letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    else:
        letters = sorted(set(string.printable) - set("\r\x0b\x0c"))
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    if tokens == "byte":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.decoder = decoders.ByteLevel()
    else:
        tokenizer.normalizer = normalizers.Replace(Regex(r"[^\t\n\x20-\x7e]"), "")
        tokenizer.decoder = decoders.Fuse()
    pad, bos, eos = SPECIAL
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=pad,
        bos_token=bos,
        eos_token=eos,
        clean_up_tokenization_spaces=False,
    )


def warm_up(
    model: nn.Module,
    tokenizer: Any,
    examples: Iterable[tuple[str | list[Message], str]],
    steps: int,
    batch_size: int,
    lr: float,
    generator: torch.Generator,
) -> float:
    """Supervised training on completions, so that a model from scratch has something to be rewarded for.

    Minimises the cross entropy of completion and end-of-sequence token given the prompt, with AdamW whose learning rate
    rises over the first tenth of the steps and falls linearly after it.

    Args:
        model: trained in place.
        tokenizer: its tokenizer.
        examples: prompts and completions; as many as the steps need are taken, fewer are gone through several times.
        steps: updates.
        batch_size: examples per update.
        lr: highest learning rate.
        generator: of the order of the examples.

    Returns:
        Mean loss of the last tenth of the steps, in nats per token.

    Raises:
        ConfigError: there are no examples.
    """
    pairs = [
        (encode_prompt(tokenizer, prompt), [*_completion(tokenizer, completion), tokenizer.eos_token_id])
        for prompt, completion in islice(examples, steps * batch_size)
    ]
    if not pairs:
        raise ConfigError("warm_up: there are no examples")
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), fused=True)
    rising = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / rising, (steps - step) / max(1, steps - rising))
    )
    order = torch.cat(
        [torch.randperm(len(pairs), generator=generator) for _ in range(-(-steps * batch_size // len(pairs)))]
    )
    losses = []
    for chosen in order[: steps * batch_size].split(batch_size):
        tokens, labels = _supervised([pairs[i] for i in chosen.tolist()])
        logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
        loss = nn.functional.cross_entropy(
            logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED
        )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.detach())
    optimizer.zero_grad(set_to_none=True)
    return float(torch.stack(losses[-max(1, steps // 10) :]).mean())


def _completion(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _supervised(pairs: list[tuple[list[int], list[int]]]) -> tuple[Int[Tensor, "B L"], Int[Tensor, "B L"]]:
    """Right-padded tokens, and labels that ignore prompts and padding."""
    width = max(len(prompt) + len(completion) for prompt, completion in pairs)
    tokens = torch.zeros(len(pairs), width, dtype=torch.int64)
    labels = torch.full_like(tokens, IGNORED)
    for row, (prompt, completion) in enumerate(pairs):
        end = len(prompt) + len(completion)
        tokens[row, :end] = torch.tensor(prompt + completion)
        labels[row, len(prompt) : end] = torch.tensor(completion)
    return tokens, labels
