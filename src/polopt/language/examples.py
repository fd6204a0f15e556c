"""Examples, and the two places they come from: a generator of questions, or a list of rows.

Both split the same way: no held-out question ever occurs among the training questions, and the questions worked as
demonstrations occur in neither.
"""

import hashlib
import json
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, Protocol

from polopt.errors import ConfigError

Message = dict[str, Any]
"""A chat message: `{"role": ..., "content": ...}`."""
_DRAWS_PER_QUESTION = 16
_MAX_REDRAWS = 1000


@dataclass(frozen=True)
class Example:
    """A prompt, and what is known about its answer."""

    prompt_id: int
    """The same for the same prompt in all iterations; held-out prompts have ids of their own."""
    prompt: str | list[Message]
    """Plain text, or chat messages for the model's template."""
    answer: str
    """Reference answer; empty if there is none."""
    metadata: dict[str, Any] = field(default_factory=dict)
    """Whatever else reward functions may want."""
    task: int = 0
    """Which task of a mixture it belongs to, from 0."""


class Examples(Protocol):
    """Training, held-out and demonstration examples with bare questions as prompts."""

    train_size: int
    heldout_size: int
    shots: tuple[Example, ...]

    def train(self, prompt_id: int) -> Example:
        """Training example `prompt_id`, in [0, train_size)."""
        ...

    def heldout(self, index: int) -> Example:
        """Held-out example `index`, in [0, heldout_size)."""
        ...


class GeneratedExamples:
    """Questions from a function of an index.

    The held-out questions are drawn first, then the demonstrations, then the training questions from other indices; a
    training draw that repeats one of the former is replaced by the next one that does not.

    Args:
        where: what the generator is called in messages.
        generate: the example of an index in `range(indices_needed(...))`, always the same.
        key: what makes two examples the same question.
        train_size: number of training prompts.
        heldout_size: number of held-out prompts, all different.
        shots: number of demonstrations, all different.

    Raises:
        ConfigError: there are not enough different questions.
    """

    def __init__(
        self,
        where: str,
        generate: Callable[[int], Example],
        key: Callable[[Example], Hashable],
        *,
        train_size: int,
        heldout_size: int,
        shots: int,
    ) -> None:
        self.train_size, self.heldout_size = train_size, heldout_size
        self._where, self._generate, self._key = where, generate, key
        self._searched = _searched(heldout_size, shots)
        picked = dict(islice(self._different(), heldout_size + shots))
        if len(picked) < heldout_size + shots:
            raise ConfigError(
                f"{where}: found {len(picked)} different questions in {self._searched} draws, too few for "
                f"heldout_size = {heldout_size} and {shots} shots; lower heldout_size or vary the questions more"
            )
        self._taken = frozenset(picked)
        examples = list(picked.values())
        self._heldout, self.shots = examples[:heldout_size], tuple(examples[heldout_size:])
        self.train(0)

    def train(self, prompt_id: int) -> Example:
        """Training example `prompt_id`.

        Raises:
            IndexError: not in [0, train_size).
            ConfigError: (almost) all questions are held out.
        """
        if not 0 <= prompt_id < self.train_size:
            raise IndexError(f"{self._where}: no training prompt {prompt_id} of {self.train_size}")
        for redraw in range(_MAX_REDRAWS):
            example = self._generate(self._searched + prompt_id + redraw)
            if self._key(example) not in self._taken:
                return replace(example, prompt_id=prompt_id)
        raise ConfigError(
            f"{self._where}: no question is left to train on; lower heldout_size = {self.heldout_size}"
        )

    def heldout(self, index: int) -> Example:
        """Held-out example `index`; its prompt id is `train_size + index`."""
        return replace(self._heldout[index], prompt_id=self.train_size + index)

    def _different(self) -> Iterator[tuple[Hashable, Example]]:
        seen: set[Hashable] = set()
        for example in map(self._generate, range(self._searched)):
            if (key := self._key(example)) not in seen:
                seen.add(key)
                yield key, example


def indices_needed(train_size: int, heldout_size: int, shots: int) -> int:
    """How many indices `GeneratedExamples` may ask its generator for."""
    return _searched(heldout_size, shots) + train_size + _MAX_REDRAWS


def _searched(heldout_size: int, shots: int) -> int:
    """How many indices are searched for held-out questions and demonstrations."""
    return _DRAWS_PER_QUESTION * (heldout_size + shots + _DRAWS_PER_QUESTION)


class ListedExamples:
    """Examples from a list, split by question: rows with the same prompt stay on the same side.

    Args:
        where: what the list is called in messages.
        rows: all examples, or the training ones if `heldout` is given. Training rows with a held-out prompt are left
            out and counted in `removed`.
        heldout: the held-out examples, if they are a list of their own.
        heldout_fraction: otherwise the share of different prompts that are held out: those with the smallest hash of
            seed and prompt.
        shots: number of demonstrations, taken from the training prompts.
        seed: of the split.

    Raises:
        ConfigError: nothing is left to train on, or nothing to hold out.
    """

    def __init__(
        self,
        where: str,
        rows: Sequence[Example],
        heldout: Sequence[Example] | None,
        *,
        heldout_fraction: float,
        shots: int,
        seed: int,
    ) -> None:
        different = sorted({question_text(row) for row in rows}, key=lambda text: _digest(f"{seed}/{text}"))
        if heldout is None:
            taken = set(different[: max(1, round(heldout_fraction * len(different)))])
            first = {question_text(row): row for row in reversed(rows)}
            self._heldout = [first[text] for text in different if text in taken]
        else:
            taken = {question_text(row) for row in heldout}
            self._heldout = list(heldout)
        free = [text for text in different if text not in taken]
        demonstrated = free[:shots]
        self.shots = tuple(next(row for row in rows if question_text(row) == text) for text in demonstrated)
        self._train = [
            row for row in rows if (text := question_text(row)) not in taken and text not in demonstrated
        ]
        self.removed = sum(question_text(row) in taken for row in rows) if heldout is not None else 0
        self.train_size, self.heldout_size = len(self._train), len(self._heldout)
        if not self._train or not self._heldout or len(self.shots) < shots:
            raise ConfigError(
                f"{where}: {len(different)} different prompts give {self.train_size} to train on, {self.heldout_size} "
                f"held out and {len(self.shots)} of {shots} shots; add rows or lower the held-out share"
            )

    def train(self, prompt_id: int) -> Example:
        """Training example `prompt_id`, in [0, train_size)."""
        if not 0 <= prompt_id < self.train_size:
            raise IndexError(f"no training prompt {prompt_id} of {self.train_size}")
        return replace(self._train[prompt_id], prompt_id=prompt_id)

    def heldout(self, index: int) -> Example:
        """Held-out example `index`; its prompt id is `train_size + index`."""
        return replace(self._heldout[index], prompt_id=self.train_size + index)


def question_text(example: Example) -> str:
    """The example's prompt as text: equal texts are the same question."""
    return example.prompt if isinstance(example.prompt, str) else json.dumps(example.prompt, sort_keys=True)


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=16).digest()
