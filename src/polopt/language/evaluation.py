"""How a causal language model sees completions: log-probabilities and more of every token, with gradient.

Every distinct prompt is computed once for all its completions, no padding is computed (`packing`), and the logits of a
few tokens at a time are held (`head`).

The policy is softmax(logits / temperature). Log-probabilities, entropies, kept logits and features are those of the
scaled logits; `tempered_logp` is at a temperature of its own.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from tensordict import TensorDict
from torch import Tensor, nn

from polopt.batch import Batch, Evaluation
from polopt.engine.memory import return_free_memory
from polopt.engine.sharding import full
from polopt.errors import ConfigError
from polopt.language.embedding import direct_embeddings
from polopt.language.head import HeadOptions, HeadOutput, evaluate_head
from polopt.language.linear import lean_linears
from polopt.language.packed_attention import ATTENTION, packed_attention
from polopt.language.packing import Packing, pack
from polopt.language.recomputed_layers import recomputed_layers
from polopt.language.rms_norm import fused_norms

HEAD_TOKENS = 1024
"""Tokens whose logits are held at once."""


def evaluate_completions(
    model: Any,
    batch: Batch,
    requires: frozenset[str],
    *,
    temperature: float = 1.0,
    head_chunk_tokens: int = HEAD_TOKENS,
    tempered: float | None = None,
    kept: int | None = None,
    value_head: nn.Module | None = None,
) -> Evaluation:
    """The model's view of a batch's completions, in one pass; of memory, see `micro_batches`.

    Rows of one group share their prompt. Products are bfloat16 inside `torch.autocast`; softmax and results are at least
    float32.

    Args:
        model: a causal language model of transformers, or peft's around one, without gradient checkpointing.
        batch: with the payload `prompt` [N, L], `prompt_length` [N] and `tokens` [N, T]; entries beyond a prompt's
            length or after the last true entry of a row's mask never matter.
        requires: names of the fields of the evaluation.
        temperature: of the policy.
        head_chunk_tokens: tokens whose logits are held at once; further ones are computed again in the backward pass.
        tempered: temperature of `tempered_logp`.
        kept: how many of the largest logits are `kept_logits`.
        value_head: from hidden states [M, H] to values [M], for `value`.

    Returns:
        Fields [N, T, ...], 0 outside the mask: `logp` and what `requires` names.

    Raises:
        ConfigError: an option that a required field needs is missing, or the model cannot be evaluated this way.
        ValueError: a prompt is empty.
    """
    if not batch.mask.numel():
        return Evaluation(**dict.fromkeys(requires | {"logp"}, torch.zeros(batch.mask.shape)))
    if "tempered_logp" in requires and tempered is None:
        raise ConfigError(
            "tempered_logp: needs its temperature, the option 'temperature' of the part that requires it"
        )
    if requires & {"kept_logits", "kept_rows"} and not kept:
        raise ConfigError("kept_logits: needs their number, the option 'kept' of the part that requires them")
    decoder, head = decoder_and_head(model)
    factor, softcap = _logit_transform(model)
    options = HeadOptions(
        scale=factor / temperature,
        softcap=softcap,
        chunk=head_chunk_tokens,
        entropy="entropy" in requires,
        score_sqnorm="score_sqnorm" in requires,
        tempered=factor / tempered if tempered and "tempered_logp" in requires else None,
        kept=kept if kept and requires & {"kept_logits", "kept_rows"} else 0,
    )
    packing = pack(batch)
    computed = partial(_computed, decoder)
    with direct_embeddings(decoder), computed(decoder), recomputed_layers(decoder, computed):
        states = decoder(
            input_ids=packing.tokens[None],
            position_ids=packing.positions[None],
            use_cache=False,
            packing=packing,
        ).last_hidden_state
    hidden = states[0].index_select(0, packing.states)
    return_free_memory()
    output = evaluate_head(hidden, full(head.weight), full(head.bias), packing.state, packing.action, options)
    found = _of_decisions(output, hidden, packing, options.scale)
    if "value" in requires:
        if value_head is None:
            raise ConfigError("value: needs a critic, and the actor has none")
        found["value"] = _values(value_head, hidden)[packing.state]
    return Evaluation(**{name: _placed(found[name], packing, batch) for name in requires | {"logp"}})


def decoder_and_head(model: Any) -> tuple[nn.Module, nn.Linear]:
    """The transformer below the last layer, and that layer.

    Raises:
        ConfigError: the last layer is not a plain linear layer, or the model has gradient checkpointing switched on.
    """
    whole = model.get_base_model() if hasattr(model, "get_base_model") else model
    head = whole.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise ConfigError(f"model {type(whole).__name__}: its last layer must be linear and without adapter")
    if any(getattr(module, "gradient_checkpointing", False) for module in whole.modules()):
        raise ConfigError("gradient checkpointing: switch it off; language.micro_batch_tokens bounds memory")
    return whole.get_decoder(), head


def _logit_transform(model: Any) -> tuple[float, float | None]:
    """What a model does to its logits: a factor, and a bound `c tanh(logits / c)`."""
    config = model.config.get_text_config()
    factor = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1.0)
    return factor, getattr(config, "final_logit_softcapping", None)


@contextmanager
def _computed(decoder: Any, part: nn.Module) -> Iterator[None]:
    """Inside it a decoder attends by `packed_attention`, and one of its parts is computed with little memory."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, packed_attention)
    before = decoder.config._attn_implementation
    decoder.config._attn_implementation = ATTENTION
    try:
        with fused_norms(part), lean_linears(part):
            yield
    finally:
        decoder.config._attn_implementation = before


def _of_decisions(
    output: HeadOutput, hidden: Float[Tensor, "M H"], packing: Packing, scale: float
) -> dict[str, Float[Tensor, "D ..."]]:
    """The fields of the evaluation that were computed, for each decision."""
    of_state = {
        "entropy": output.entropy,
        "score_sqnorm": output.square,
        "features": hidden.detach() * scale,
        "kept_logits": output.kept_logits,
        "kept_rows": output.kept_rows,
    }
    found = {name: value[packing.state] for name, value in of_state.items() if value is not None}
    found |= {"logp": output.logp}
    if output.square is not None:
        found["score_sqnorm"] += 1 - 2 * output.logp.detach().exp()
    if output.tempered_logp is not None:
        found["tempered_logp"] = output.tempered_logp
    return found


def _values(value_head: nn.Module, hidden: Float[Tensor, "M H"]) -> Float[Tensor, " M"]:
    """Values in the precision of the critic's weights."""
    dtype = next(value_head.parameters()).dtype
    with torch.autocast(hidden.device.type, enabled=False):
        return value_head(hidden.to(dtype))


def _placed(values: Tensor, packing: Packing, batch: Batch) -> Tensor:
    """Values of decisions [D, ...] where the batch has the decisions, [N, T, ...]."""
    empty = values.new_zeros(*batch.mask.shape, *values.shape[1:])
    return empty.index_put((packing.row, packing.column), values)


def check_model(model: Any) -> None:
    """Raise ConfigError if a model's evaluation is not that of its own forward pass over whole rows."""
    size = model.config.get_text_config().vocab_size
    prompts = torch.tensor([[5, 7, 11], [5, 7, 11], [13, 17, 19]]) % size
    tokens = torch.tensor([[23, 29, 31, 37], [41, 43, 47, 53], [59, 61, 67, 71]]) % size
    batch = Batch(
        mask=torch.ones(tokens.shape, dtype=torch.bool),
        old_logp=torch.zeros(tokens.shape),
        rewards=torch.zeros(len(tokens), 1),
        group=torch.tensor([0, 0, 1]),
        prompt_id=torch.tensor([0, 0, 1]),
        payload=TensorDict(
            {"prompt": prompts, "prompt_length": torch.tensor([3, 3, 2]), "tokens": tokens}, [3]
        ),
        batch_size=[3],
    )
    with torch.no_grad():
        logp = evaluate_completions(model, batch, frozenset({"logp"})).logp
        for row, length in enumerate(batch.payload["prompt_length"].tolist()):
            whole = torch.cat([prompts[row, :length], tokens[row]])
            logits = model(input_ids=whole[None], use_cache=False).logits[0, length - 1 : -1].to(logp.dtype)
            expected = logits.log_softmax(-1).gather(-1, tokens[row, :, None])[:, 0]
            tolerance = 0.01 * float(expected.abs().max()) if logits.dtype.itemsize >= 4 else 0.3
            if not torch.allclose(logp[row], expected, atol=tolerance, rtol=0):
                raise ConfigError(
                    f"model {type(model).__name__}: cannot be trained here; its tokens depend on each other otherwise "
                    "than by causal attention, or its logits are not those of a linear layer"
                )


def micro_batches(
    lengths: Int[Tensor, " N"],
    prompt_lengths: Int[Tensor, " N"],
    groups: Int[Tensor, " N"],
    token_budget: int,
) -> list[Int[Tensor, " n"]]:
    """The rows in pieces whose tokens, prompts once per group and piece, stay within a budget.

    Groups of like lengths come together, as attention alone pads. The last group of a piece is split where the piece has
    room for its prompt and for as many tokens of its completions.

    Args:
        lengths: tokens of the completions.
        prompt_lengths: tokens of the prompts, the same in a group.
        groups: which prompt a row has.
        token_budget: most tokens of a piece.

    Returns:
        Row numbers; every row is in one piece. A piece exceeds the budget only if it is one row that does.
    """
    length, prompt, group = lengths.tolist(), prompt_lengths.tolist(), groups.tolist()
    members: dict[int, list[int]] = {}
    for row in sorted(range(len(length)), key=length.__getitem__):
        members.setdefault(group[row], []).append(row)
    pieces: list[list[int]] = []
    room = 0
    for rows in sorted(members.values(), key=lambda rows: prompt[rows[-1]] + length[rows[-1]]):
        of_prompt = prompt[rows[0]]
        worth = min(sum(length[row] for row in rows), max(of_prompt, length[rows[0]]))
        opened = bool(pieces) and of_prompt + worth <= room
        room -= of_prompt if opened else 0
        for row in rows:
            if not opened or length[row] > room:
                pieces.append([])
                room, opened = token_budget - of_prompt, True
            pieces[-1].append(row)
            room -= length[row]
    return [torch.tensor(piece) for piece in pieces]
