"""The processes that share a run. One process is the case of one rank.

All ranks hold the same batch and share its evaluation: each takes micro-batches of its own, and what they find is
summed. Only small tensors travel ([N, T] evaluations, rollouts) and the gradients; nothing is pickled. Parameters are
whole on every rank ("none") or sharded with torch's FSDP2 ("fsdp2"). `torchrun` and `accelerate launch` start a run of
several; gloo connects CPUs, which the tests exercise, and NCCL connects GPUs, which they do not.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Literal, Self, cast, get_args

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from tensordict import TensorDict
from torch import Tensor, nn

from polopt.batch import Batch, concatenate
from polopt.engine.launch import check_launch, connect
from polopt.engine.sharding import Evaluated, full, full_state, gathered, load_full_state, shard_module
from polopt.errors import ConfigError, PoloptError
from polopt.functional.blocks import block_of

Sharding = Literal["none", "fsdp2"]
BUCKET = 2**23
"""Gradient entries that are summed over the ranks at once."""

SHORT = 2**20
"""Entries up to which a sum of squares in float32 is exact to four digits."""


@dataclass(frozen=True)
class Piece:
    """A micro-batch of this rank."""

    rows: Int[Tensor, " n"]
    counts: bool
    """False for work that only keeps the ranks in step: its results are thrown away."""


class Ranks:
    """Data-parallel processes.

    Args:
        rank: number of this process.
        world: number of processes.
        sharding: where the parameters live.
    """

    def __init__(self, rank: int = 0, world: int = 1, sharding: Sharding = "none") -> None:
        self.rank, self.world, self.sharding = rank, world, sharding
        self._root: Evaluated | None = None

    @classmethod
    def start(cls, sharding: Sharding = "none", expected: int | None = None) -> Self:
        """Join the processes that `torchrun` or `accelerate launch` started, if it was them.

        Args:
            sharding: "none" or "fsdp2".
            expected: number of processes the run must have; None takes what there is.

        Raises:
            ConfigError: there are more or fewer processes, or none to shard over.
        """
        if sharding not in get_args(Sharding):
            raise ConfigError(f"sharding = {sharding!r}: allowed: {', '.join(get_args(Sharding))}")
        joined = dist.is_available() and dist.is_initialized()
        world = dist.get_world_size() if joined else int(os.environ.get("WORLD_SIZE", "1"))
        check_launch(world, expected, sharding)
        if world > 1 and not joined:
            connect(world)
        return cls(dist.get_rank() if world > 1 else 0, world, sharding)

    @property
    def is_main(self) -> bool:
        """Whether this process speaks and writes for the run."""
        return self.rank == 0

    def describe(self) -> str:
        """How many processes there really are, and where the parameters really live."""
        if self.world == 1:
            return "1 process"
        sharded = self._root is not None
        where = f"parameters sharded over them by {self.sharding}" if sharded else "each with all parameters"
        return f"{self.world} processes ({dist.get_backend()}), {where}"

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world > 1:
            dist.barrier()

    def close(self) -> None:
        """Leave the processes: after it the ranks no longer work together."""
        if self.world > 1 and dist.is_initialized():
            dist.destroy_process_group()

    def share(self, micro_batches: list[Int[Tensor, " n"]], lengths: Int[Tensor, " N"]) -> list[Piece]:
        """This rank's micro-batches: as many on every rank, and in each pass of about the same size.

        Large micro-batches are halved until their number divides by that of the ranks. Where there are too few rows for
        that, a rank without work takes one that does not count.

        Args:
            micro_batches: rows of each, the same list on every rank; not empty.
            lengths: work of each row, in decisions.
        """
        if self.world == 1:
            return [Piece(rows, True) for rows in micro_batches]
        pieces = _split(micro_batches, lengths, self.world)
        pieces.sort(key=lambda rows: -int(lengths[rows].sum()))
        idle = Piece(pieces[-1][:1], False)
        dealt = [Piece(rows, True) for rows in pieces] + [idle] * (-len(pieces) % self.world)
        passes = range(0, len(dealt), self.world)
        seats = [
            self.rank if number % 2 == 0 else self.world - 1 - self.rank for number in range(len(passes))
        ]
        return [dealt[first + seat] for first, seat in zip(passes, seats, strict=True)]

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over the ranks, entry by entry; of bool: whether any is True."""
        if self.world == 1:
            return tensor
        dtype = torch.int32 if tensor.dtype == torch.bool else tensor.dtype
        total = tensor.detach().to(dtype, copy=True, memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total.to(tensor.dtype)

    def gather(self, batch: Batch) -> Batch:
        """All ranks' trajectories in the order of the ranks, on every rank.

        Decisions and payload are padded with zeros to the longest; groups are renumbered so that none merge.

        Raises:
            PoloptError: the ranks' batches do not have the same fields and types.
        """
        if self.world == 1:
            return batch
        own = batch.to_tensordict().flatten_keys("/")
        names = sorted(cast(Iterable[str], own.keys()))
        self._check_fields([f"{name} {own[name].dtype} {own[name].dim()}" for name in names])
        sizes = torch.stack(
            self._from_all(torch.tensor([size for name in names for size in own[name].shape]))
        )
        received: list[dict[str, Tensor]] = [{} for _ in range(self.world)]
        for name, shapes in zip(names, sizes.split([own[name].dim() for name in names], 1), strict=True):
            padded = own[name].new_zeros(shapes.amax(0).tolist())
            padded[tuple(slice(size) for size in own[name].shape)] = own[name]
            for fields, rows, tensor in zip(
                received, shapes[:, 0].tolist(), self._from_all(padded), strict=True
            ):
                fields[name] = tensor[:rows]
        tables = [
            TensorDict(cast(Any, fields), [len(fields["mask"])]).unflatten_keys("/") for fields in received
        ]
        return concatenate([Batch.from_tensordict(table) for table in tables])

    @contextmanager
    def sum_gradients(self, module: nn.Module) -> Iterator[None]:
        """Whatever gradient the ranks accumulate inside is summed over them, and added to what was there before.

        A parameter that got a gradient on some ranks only counts as 0 on the others; one without any stays without.
        Sharded parameters are summed in their own backward passes.
        """
        if self.world == 1 or self._root is not None:
            yield
            return
        parameters = [p for p in module.parameters() if p.requires_grad]
        before = [p.grad for p in parameters]
        for parameter in parameters:
            parameter.grad = None
        yield
        found = self.sum(torch.tensor([p.grad is not None for p in parameters], dtype=torch.bool)).tolist()
        for bucket in _buckets([p for p, any_rank in zip(parameters, found, strict=True) if any_rank]):
            self._sum_bucket(bucket)
        for parameter, earlier in zip(parameters, before, strict=True):
            if earlier is not None:
                parameter.grad = earlier if parameter.grad is None else parameter.grad + earlier

    def clip_gradients(self, parameters: Iterable[nn.Parameter], max_norm: float) -> Float[Tensor, ""]:
        """Scale the gradients down to `max_norm`; returns the norm that they had, over all ranks and shards."""
        if self._root is not None:
            return full(nn.utils.clip_grad_norm_(parameters, max_norm))
        gradients = [p.grad for p in parameters if p.grad is not None]
        if not gradients:
            return torch.zeros(())
        block = block_of(gradients)
        if block is not None and block.numel() <= SHORT:
            gradients, norm = [block], torch.linalg.vector_norm(block)
        else:
            norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        coefficient = max_norm / (float(norm) + 1e-6)
        if coefficient < 1:
            torch._foreach_mul_(gradients, coefficient)
        return norm

    def broadcast_parameters(self, module: nn.Module) -> None:
        """Give every rank the main rank's parameters and buffers."""
        if self.world == 1:
            return
        with torch.no_grad():
            for tensor in [*module.parameters(), *module.buffers()]:
                sent = tensor.detach().contiguous()
                dist.broadcast(sent, 0)
                tensor.copy_(sent)

    def shard(self, module: nn.Module) -> None:
        """Begin with the same parameters everywhere, and shard them if the run does.

        Sharded are the layers (entries of the outermost `ModuleList`s) one by one, and what is left of the module
        together. A layer's output must be part of what is differentiated, even if a cache carries the rest: its weights
        are freed once its output's gradient is done.
        """
        self.broadcast_parameters(module)
        if self.sharding == "none" or self.world == 1:
            return
        self._root = shard_module(module, self.world)

    def forward(self, evaluate: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """`evaluate()`, with the parameters it needs on this rank. Sharded, every rank must call it as often."""
        return evaluate() if self._root is None else self._root(evaluate)

    def full_parameters(self) -> AbstractContextManager[None]:
        """Inside, every rank holds all parameters and needs no other rank: for rollouts, which differ in length."""
        return nullcontext() if self._root is None else gathered(self._root)

    def full_state(
        self, module: nn.Module, optimizer: torch.optim.Optimizer
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """State of module and optimizer as one process alone would have it, by parameter names.

        Returns:
            Both on the main rank, empty dictionaries on the others, which must call it too.
        """
        return full_state(module, optimizer, keep=self.is_main)

    def load_full_state(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        model: dict[str, Tensor],
        state: dict[str, Any],
    ) -> None:
        """Take over what `full_state` gave the main rank; every rank passes the whole of it."""
        load_full_state(module, optimizer, model, state)

    def _from_all(self, tensor: Tensor) -> list[Tensor]:
        """The tensor of each rank, all of the same shape."""
        received = [torch.empty_like(tensor) for _ in range(self.world)]
        dist.all_gather(received, tensor.contiguous())
        return received

    def _check_fields(self, fields: list[str]) -> None:
        digest = int.from_bytes(blake2b(", ".join(fields).encode(), digest_size=7).digest(), "big")
        if len({int(other) for other in self._from_all(torch.tensor(digest))}) > 1:
            raise PoloptError(
                f"rank {self.rank}: rollouts differ from another rank's, they have {', '.join(fields)}"
            )

    def _sum_bucket(self, parameters: list[nn.Parameter]) -> None:
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        precise = torch.promote_types(grads[0].dtype, torch.float32)
        total = self.sum(torch.cat([grad.flatten() for grad in grads]).to(precise))
        for parameter, part in zip(parameters, total.split([p.numel() for p in parameters]), strict=True):
            parameter.grad = part.view_as(parameter).to(parameter.dtype)


def _split(micro_batches: list[Tensor], lengths: Tensor, world: int) -> list[Tensor]:
    pieces = list(micro_batches)
    while len(pieces) % world:
        work = [int(lengths[rows].sum()) if len(rows) > 1 else -1 for rows in pieces]
        largest = max(range(len(pieces)), key=work.__getitem__)
        if work[largest] < 0:
            break
        pieces[largest : largest + 1] = pieces[largest].tensor_split(2)
    return pieces


def _buckets(parameters: list[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    bucket: list[nn.Parameter] = []
    for parameter in parameters:
        same = not bucket or (bucket[0].dtype, bucket[0].device) == (parameter.dtype, parameter.device)
        if bucket and (not same or sum(p.numel() for p in bucket) + parameter.numel() > BUCKET):
            yield bucket
            bucket = []
        bucket.append(parameter)
    if bucket:
        yield bucket
