"""The gradient of a minibatch as one compiled graph, for small networks, where calling operations takes longer than they do.

`torch.compile` guards the numbers and tensors that the loss reads of actor, parts and batch in Python. Minibatches of the usual
size have a graph of their own; otherwise sizes are inputs of the graph, and so is most arithmetic on numbers of the parts.
Whatever else changes has another graph made.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException

from polopt.batch import Batch, Evaluation
from polopt.engine.gradient import Backward, Evaluator, Objective, Rows, constant_elsewhere
from polopt.errors import ConfigError, PoloptError
from polopt.functional.blocks import block_of, side_by_side

_OF_CODE = {
    "NOT_PRESENT_IN_GENERIC_DICT", "EMPTY_NN_MODULE_HOOKS_DICT", "CLOSURE_MATCH", "CLASS_MATCH", "HASATTR", "DUPLICATE_INPUT",
}  # fmt: skip
"""Guards against other code."""
Found = tuple[Float[Tensor, ""], dict[str, Tensor], list[int]]
"""The loss in float64, the evaluation's fields, and the numbers of the parameters that the loss reaches."""


class CompiledGradient:
    """What `gradient.backward` does for losses that are sums over trajectories, with the same results up to rounding.

    Args:
        actor: evaluates the policy. While they are compiled, its `evaluate` and the objective branch on no tensor's value.
        objective: the scalar to descend.
        requires: fields of the evaluation that it reads.
        usual_rows: rows of most minibatches, if that is known: they have a graph of this very size.

    Raises:
        ConfigError: nothing can be compiled here.
    """

    def __init__(
        self, actor: Evaluator, objective: Objective, requires: frozenset[str], usual_rows: int | None = None
    ) -> None:
        check_compiler()
        self.actor, self.objective, self.requires, self.usual_rows = actor, objective, requires, usual_rows
        self.parameters = [p for p in actor.module.parameters() if p.requires_grad]
        self.gradients = side_by_side(self.parameters)
        self.block = cast(Tensor, block_of(self.gradients))
        self._graph = _compiled(self._differentiate)

    def backward(self, batch: Batch, rows: Rows, options: dict[str, Any]) -> Backward:
        """The gradient of some rows' loss in the parameters' `.grad`, where none is before. Gradients must be on.

        Args:
            batch: the minibatch, with `loss_weight`.
            rows: trajectories to evaluate, at least one.
            options: for `actor.evaluate`.

        Raises:
            PoloptError: the loss cannot be compiled, or needs too many graphs.
        """
        evaluated = batch if len(rows) == len(batch) else batch[rows]
        pieces = self.actor.micro_batches(evaluated)
        if len(pieces) == 1:
            loss, fields, reached = self._run(evaluated, options)
        else:
            loss, fields, reached = self._sum(evaluated, pieces, options)
        for number in reached:
            self.parameters[number].grad = self.gradients[number]
        return Backward(loss, Evaluation(**fields), rows)

    def _sum(self, batch: Batch, pieces: list[Rows], options: dict[str, Any]) -> Found:
        """What `_run` gives, of micro-batches."""
        total = torch.zeros_like(self.block)
        found: list[Found] = []
        for piece in pieces:
            found.append(self._run(batch[piece], options))
            total += self.block
        self.block.copy_(total)
        losses, fields, (reached, *_) = zip(*found, strict=True)
        joined = {name: torch.cat([of[name] for of in fields]) for name in fields[0]}
        return torch.stack(losses).sum(), joined, reached

    def _run(self, batch: Batch, options: dict[str, Any]) -> Found:
        try:
            return self._graph(batch, options)
        except TorchDynamoException as error:
            raise PoloptError(
                f"trainer.compile = true: this loss cannot be compiled ({_reason(error)}); set it to false"
            ) from error

    def _differentiate(self, batch: Batch, options: dict[str, Any]) -> Found:
        """Leaves the gradients in `block`."""
        if batch.mask.shape[0] == self.usual_rows:
            pass  # asking is enough to make this size a constant of its graph, whatever sizes came before
        outputs = self.actor.evaluate(batch, self.requires, **options).tensors()
        loss = self.objective(constant_elsewhere(outputs), batch)
        found: Any = [None] * len(self.parameters)
        if loss.requires_grad:
            found = torch.autograd.grad(loss, self.parameters, allow_unused=True)
        reached = [number for number, gradient in enumerate(found) if gradient is not None]
        pairs = zip(self.parameters, found, strict=True)
        block = [(torch.zeros_like(p) if gradient is None else gradient).flatten() for p, gradient in pairs]
        self.block.copy_(torch.cat(block))
        return loss.detach().double(), {name: t.detach() for name, t in outputs.items()}, reached


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function as one graph, of sizes that may change, made for this run apart.

    The few kernels need no worker processes, and sizes no checks beside the guards.
    """
    options: Any = {
        "compile_threads": 1,
        "size_asserts": False,
        "alignment_asserts": False,
        "cpp_wrapper": True,
        "guard_filter_fn": _guards_data,
    }
    make: Any = torch.compile
    return make(function, fullgraph=True, dynamic=True, isolate_recompiles=True, options=options)


def _guards_data(guards: Any) -> list[bool]:
    """Which guards to check: not those of code, which take long. Functions, methods, hooks and constants of modules stay."""
    return [
        not guard.is_global and guard.guard_type not in _OF_CODE and "type(" not in guard.name
        for guard in guards
    ]


def check_compiler() -> None:
    """Compile something small, and let `torch.autograd.grad` be compiled.

    Raises:
        ConfigError: that fails, as it does without a C++ compiler.
    """
    settings: Any = torch._dynamo.config
    try:
        settings.trace_autograd_ops = True
        _compiled(torch.neg)(torch.ones(1))
    except Exception as error:
        raise ConfigError(
            f"trainer.compile = true: torch {torch.__version__} cannot compile here ({_reason(error)}); it needs torch 2.13 "
            "and a C++ compiler; set it to false"
        ) from error


def _reason(error: Exception) -> str:
    """The first paragraph of what torch says, on one line."""
    return " ".join(str(error).strip().partition("\n\n")[0].split()) or type(error).__name__
