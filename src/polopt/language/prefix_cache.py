"""Keys and values of completions that share their prompts: a prompt is stored once for all rows that continue it.

The tokens of a forward pass are one packed sequence [1, S]: first all tokens of the prompts, then one token of each row,
which attends to its prompt in one matrix product with the other rows of that prompt, and to its own earlier tokens.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from polopt.language.attention import Rule, causal_attention, softcapped

SUFFIX_BLOCK = 16
"""Tokens of a row that there is memory for at first. Matrix products run over all of it: a slice would be copied."""


@dataclass
class Layer:
    """What one layer has stored. Prompts are padded on the right to the longest."""

    prefix_keys: Float[Tensor, "P h L d"]
    prefix_values: Float[Tensor, "P h L e"]
    keys: Float[Tensor, "R h T d"] | None = None
    values: Float[Tensor, "R h T e"] | None = None

    def append(
        self, key: Float[Tensor, "R h d"], value: Float[Tensor, "R h e"], step: int
    ) -> tuple[Float[Tensor, "Rh T d"], Float[Tensor, "Rh T e"]]:
        """Store the rows' keys and values number `step`; all memory of these rows, zeros where nothing is stored."""
        if self.keys is None or self.values is None:
            self.keys, self.values = (_extended(x.unsqueeze(2)[:, :, :0], SUFFIX_BLOCK) for x in (key, value))
        elif step == self.keys.shape[2]:
            more = SUFFIX_BLOCK * (1 + step // (4 * SUFFIX_BLOCK))
            self.keys, self.values = (_extended(x[: len(key)], more) for x in (self.keys, self.values))
        self.keys[: len(key), :, step] = key
        self.values[: len(key), :, step] = value
        return self.keys[: len(key)].flatten(0, 1), self.values[: len(key)].flatten(0, 1)

    def move(self, source: Int[Tensor, " m"], target: Int[Tensor, " m"], steps: int) -> None:
        """Overwrite the rows `target` with the rows `source`."""
        for stored in (self.keys, self.values):
            if stored is not None:
                stored[target, :, :steps] = stored[source, :, :steps]


class PrefixCache:
    """The attention of the rows that continue some prompts.

    Its `attend` is to be the attention of the model. First `read_prompts` and a forward pass, for all prompts at once or
    some after the other; then `begin_rows`; then one forward pass and `advance` for each token of the rows.

    Args:
        lengths: tokens of each prompt, all positive.
        device: where the model is.
    """

    def __init__(self, lengths: list[int], device: torch.device) -> None:
        self.lengths = torch.tensor(lengths, device=device)
        self.longest = max(lengths)
        self.layers: dict[int, Layer] = {}
        self.steps = 0
        self._reading: slice | None = None
        self._biases: dict[int | None, Tensor] = {}

    def read_prompts(self, prompts: slice) -> tuple[Int[Tensor, " S"], Int[Tensor, " p"]]:
        """Expect all tokens of these prompts, one prompt after the other, in the next forward pass.

        Returns:
            The position of each token in its prompt, and where in the sequence each prompt has its last token.
        """
        lengths = self.lengths[prompts]
        columns = torch.arange(int(lengths.max()), device=lengths.device)
        self._reading, self._present = prompts, columns < lengths.unsqueeze(1)
        return columns.expand_as(self._present)[self._present], lengths.cumsum(0) - 1

    def begin_rows(self, owner: Int[Tensor, " R"]) -> None:
        """All prompts are read; expect one token of each row from now on, row i continuing prompt `owner[i]`.

        The rows of a prompt are padded to those of the prompt with the most, so a prompt with more than the average is
        stored more than once, its rows divided among the copies: then padding at most doubles the work.
        """
        count = len(self.lengths)
        size = -(-len(owner) // count)
        copies = -(-torch.bincount(owner, minlength=count) // size)
        self._owner = (copies.cumsum(0) - copies)[owner] + _rank(owner, count) // size
        if bool((copies != 1).any()):
            self._select(torch.arange(count, device=owner.device).repeat_interleave(copies))
        self._reading = None
        self._arrange()

    def advance(self) -> None:
        """The forward pass over one token of each row is over."""
        self.steps += 1
        self._biases.clear()

    def keep_rows(self, kept: Bool[Tensor, " R"]) -> Int[Tensor, " r"]:
        """Drop the other rows.

        Returns:
            The former number of each row that is left: rows from the end fill the gaps, the others stay.
        """
        rows = torch.arange(len(kept), device=kept.device)
        left = int(kept.sum())
        gaps, movers = rows[:left][~kept[:left]], rows[left:][kept[left:]]
        order = rows[:left].index_copy(0, gaps, movers)
        for layer in self.layers.values():
            layer.move(movers, gaps, self.steps)
        self._owner = self._owner[order]
        alive = torch.bincount(self._owner, minlength=len(self.lengths)) > 0
        if 2 * int(alive.sum()) <= len(alive):
            self._owner = (alive.cumsum(0) - 1)[self._owner]
            self._select(alive.nonzero().squeeze(1))
        self._arrange()
        return order

    def attend(
        self,
        layer: int,
        query: Float[Tensor, "H S d"],
        key: Float[Tensor, "h S d"],
        value: Float[Tensor, "h S e"],
        rule: Rule,
    ) -> Float[Tensor, "S H e"]:
        """Store the keys and values of one layer, and attend to all that each token may see."""
        if self._reading is not None:
            return self._attend_prompts(layer, self._reading, query, key, value, rule)
        return self._attend_rows(self.layers[layer], query, key, value, rule)

    def _attend_prompts(
        self, number: int, prompts: slice, query: Tensor, key: Tensor, value: Tensor, rule: Rule
    ) -> Float[Tensor, "S H e"]:
        present = self._present
        place = (present.flatten().cumsum(0) - 1).clamp(min=0)
        query, key, value = (
            x.index_select(1, place).unflatten(1, present.shape).transpose(0, 1) for x in (query, key, value)
        )
        if number not in self.layers:
            shape = (len(self.lengths), key.shape[1], self.longest)
            self.layers[number] = Layer(
                key.new_zeros(*shape, key.shape[3]), value.new_zeros(*shape, value.shape[3])
            )
        self.layers[number].prefix_keys[prompts, :, : key.shape[2]] = key
        self.layers[number].prefix_values[prompts, :, : key.shape[2]] = value
        return causal_attention(query, key, value, rule).transpose(1, 2)[present]

    def _attend_rows(
        self, layer: Layer, query: Tensor, key: Tensor, value: Tensor, rule: Rule
    ) -> Float[Tensor, "R H e"]:
        rows, heads, groups = query.shape[1], key.shape[0], query.shape[0] // key.shape[0]
        keys, values = layer.append(key.transpose(0, 1), value.transpose(0, 1), self.steps)
        query = query.transpose(0, 1).reshape(rows * heads, groups, -1)
        seats, places = self._seats[heads], self._places[heads]

        def prefix_product(
            x: Float[Tensor, "Rh g z"], stored: Float[Tensor, "Ph x y"]
        ) -> Float[Tensor, "Rh g y"]:
            seated = x.index_select(0, seats).view(len(stored), -1, x.shape[-1])
            product = torch.bmm(seated[..., : stored.shape[1]], stored)
            return product.view(len(seats), groups, -1).index_select(0, places)

        prefix = prefix_product(query, layer.prefix_keys.flatten(0, 1).transpose(1, 2))
        suffix = torch.bmm(query, keys.transpose(1, 2))
        scores, scaling = softcapped(torch.cat([prefix, suffix], -1).view(rows, heads * groups, -1), rule)
        scores = torch.add(self._bias(rule.window, keys.shape[1]), scores, alpha=scaling)
        weights = scores.softmax(-1).to(values.dtype).view(rows * heads, groups, -1)
        output = prefix_product(weights, layer.prefix_values.flatten(0, 1))
        output += torch.bmm(weights[..., self.longest :], values)
        return output.view(rows, heads * groups, -1)

    def _select(self, prompts: Int[Tensor, " p"]) -> None:
        self.lengths = self.lengths[prompts]
        for layer in self.layers.values():
            layer.prefix_keys, layer.prefix_values = layer.prefix_keys[prompts], layer.prefix_values[prompts]

    def _arrange(self) -> None:
        """Where each row sits among the rows of its prompt, for each number of heads there is."""
        rows, prompts = len(self._owner), len(self.lengths)
        rank = _rank(self._owner, prompts)
        size = int(rank.max()) + 1
        self._places, self._seats, self._biases = {}, {}, {}
        for heads in {layer.prefix_keys.shape[1] for layer in self.layers.values()}:
            head = torch.arange(heads, device=rank.device)
            places = ((self._owner.unsqueeze(1) * heads + head) * size + rank.unsqueeze(1)).flatten()
            seats = torch.zeros(prompts * heads * size, dtype=torch.int64, device=rank.device)
            seats[places] = torch.arange(rows * heads, device=rank.device)
            self._places[heads], self._seats[heads] = places, seats

    def _bias(self, window: int | None, size: int) -> Float[Tensor, "R 1 LT"]:
        """0 for keys that a row may see; -inf for padding, unused memory and what lies before the window."""
        if window not in self._biases:
            lengths = self.lengths[self._owner].unsqueeze(1)
            columns = torch.arange(self.longest, device=lengths.device).expand(len(lengths), -1)
            steps = torch.arange(size, device=lengths.device).expand(len(lengths), -1)
            hidden = torch.cat([columns >= lengths, steps > self.steps], 1)
            if window is not None:
                hidden |= torch.cat([columns, steps + lengths], 1) <= lengths + self.steps - window
            self._biases[window] = torch.where(hidden, -torch.inf, 0.0).unsqueeze(1)
        return self._biases[window]


def _extended(stored: Float[Tensor, "R h T d"], more: int) -> Float[Tensor, "R h S d"]:
    return nn.functional.pad(stored, (0, 0, 0, more))


def _rank(owner: Int[Tensor, " R"], prompts: int) -> Int[Tensor, " R"]:
    """How many earlier rows have the same owner."""
    order = owner.argsort(stable=True)
    counts = torch.bincount(owner, minlength=prompts)
    first = (counts.cumsum(0) - counts)[owner[order]]
    rank = torch.arange(len(owner), device=owner.device) - first
    return torch.empty_like(owner).index_copy_(0, order, rank)
