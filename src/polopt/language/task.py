"""A language task: questions in one prompt style, and the verifier that scores completions of them."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, Self

from polopt.domain import Task
from polopt.language.examples import Example, Examples, Message
from polopt.language.verifiers import Scores, Verifier

Style = Literal["few_shot", "chat", "plain"]
SYSTEM_PROMPT = "Solve the problem. End with the final answer between <answer> and </answer>."
"""Default system message of the style "chat"."""


class LanguageTask(Task):
    r"""Prompts in one style, and their scores.

    Args:
        name: the spec.
        examples: bare questions, split.
        verifier: scores completions. The task owns it: `close` ends its processes.
        style: "few_shot": demonstrations, then the question, as plain text "Q: ...\nA:"; "chat": a system and a user
            message, or the example's own messages; "plain": the question as it is.
        system_prompt: system message of the style "chat"; none if empty, or if the messages begin with one.
        info: further facts for the run's record, JSON.
    """

    def __init__(
        self,
        name: str,
        examples: Examples,
        verifier: Verifier,
        *,
        style: Style,
        system_prompt: str = SYSTEM_PROMPT,
        info: dict[str, Any] | None = None,
    ) -> None:
        self.name, self.style = name, style
        self.system_prompt = system_prompt if style == "chat" else ""
        self.train_size, self.heldout_size = examples.train_size, examples.heldout_size
        self.reward_names = verifier.names
        self.stop = stop_strings(style, examples.shots)
        self.examples, self._verifier = examples, verifier
        self.info: dict[str, Any] = {
            "task": name, "style": style, "system_prompt": self.system_prompt, "stop": list(self.stop),
            "rewards": list(self.reward_names), "train_size": self.train_size, "heldout_size": self.heldout_size,
            **(info or {}),
        }  # fmt: skip

    def train(self, prompt_id: int) -> Example:
        """Training example `prompt_id`, always the same.

        Raises:
            IndexError: not in [0, train_size).
        """
        return self._prompted(self.examples.train(prompt_id))

    def heldout(self, index: int) -> Example:
        """Held-out example `index`, always the same; its question is in no training example.

        Raises:
            IndexError: not in [0, heldout_size).
        """
        return self._prompted(self.examples.heldout(index))

    def score(self, completions: Sequence[str], examples: Sequence[Example]) -> Scores:
        """Score N completions, each of the example beside it. What follows a stop string does not count.

        Raises:
            ValueError: the numbers differ.
        """
        return self._verifier.score([self._stopped(completion) for completion in completions], examples)

    def close(self) -> None:
        """End the verifier's worker processes."""
        self._verifier.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _prompted(self, example: Example) -> Example:
        return replace(example, prompt=self._render(example.prompt))

    def _render(self, question: str | list[Message]) -> str | list[Message]:
        if isinstance(question, str) and self.style == "few_shot":
            demonstrations = [f"Q: {shot.prompt}\nA: {shot.answer}\n" for shot in self.examples.shots]
            return "".join([*demonstrations, f"Q: {question}\nA:"])
        if self.style == "plain":
            return question
        messages = [{"role": "user", "content": question}] if isinstance(question, str) else question
        if self.system_prompt and messages[0]["role"] != "system":
            return [{"role": "system", "content": self.system_prompt}, *messages]
        return messages

    def _stopped(self, completion: str) -> str:
        for stop in self.stop:
            completion = completion.partition(stop)[0]
        return completion


def stop_strings(style: Style, shots: Sequence[Example]) -> tuple[str, ...]:
    """What ends a completion: in the few-shot style the end of the line, or the next question if answers have lines."""
    if style != "few_shot":
        return ()
    return ("\nQ:",) if any("\n" in shot.answer for shot in shots) else ("\n",)
