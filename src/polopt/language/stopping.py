"""When a completion is over: end-of-sequence tokens and stop strings."""

from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn


class StopCondition:
    """Tells which rows have just been completed.

    Args:
        model: its generation configuration names end-of-sequence tokens.
        tokenizer: names one more, and turns tokens into text.
        stop: a completion ends with the token that completes one of these strings.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, stop: tuple[str, ...]) -> None:
        self._tokenizer, self._stop = tokenizer, stop
        self._last = {string[-1] for string in stop}
        self._span = max((len(string.encode()) for string in stop), default=0) + 1
        self._may_complete: dict[int, bool] = {}
        named = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
        ids = set(named if isinstance(named, list) else [named]) | {tokenizer.eos_token_id}
        self._eos = torch.tensor(sorted(i for i in ids if i is not None), dtype=torch.int64)

    def __call__(self, tokens: Int[Tensor, "R t"]) -> Bool[Tensor, " R"]:
        """Whether the last token of each row completes it, when no token before it did."""
        last = tokens[:, -1]
        over = torch.isin(last, self._eos.to(last.device))
        if self._stop:
            rows = [row for row, token in enumerate(last.tolist()) if self._candidate(token)]
            ends = self._tokenizer.batch_decode(tokens[rows, -self._span :].tolist()) if rows else []
            over[
                [row for row, text in zip(rows, ends, strict=True) if any(s in text for s in self._stop)]
            ] = True
        return over

    def _candidate(self, token: int) -> bool:
        """Whether the token could complete a stop string: has the last letter of one, or a part of a letter."""
        if token not in self._may_complete:
            text = self._tokenizer.decode([token])
            self._may_complete[token] = "\ufffd" in text or any(letter in text for letter in self._last)
        return self._may_complete[token]
