"""The gradient of a minibatch as one compiled graph, for small networks, where calling operations takes longer than they do.

`torch.compile` guards all that the loss reads of actor, parts and batch in Python. Sizes are inputs of the graph, and so is most
arithmetic on numbers of the parts; whatever else changes has another graph made.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException

from polopt.batch import Batch, Evaluation
from polopt.engine.gradient import Backward, Evaluator, Objective, Rows, constant_elsewhere
from polopt.errors import ConfigError, PoloptError


class CompiledGradient:
    """What `gradient.backward` does for losses that are sums over trajectories, with the same results up to rounding.

    Args:
        actor: evaluates the policy. While they are compiled, its `evaluate` and the objective branch on no tensor's value.
        objective: the scalar to descend.
        requires: fields of the evaluation that it reads.

    Raises:
        ConfigError: nothing can be compiled here.
    """

    def __init__(self, actor: Evaluator, objective: Objective, requires: frozenset[str]) -> None:
        check_compiler()
        self.actor, self.objective, self.requires = actor, objective, requires
        self.parameters = [p for p in actor.module.parameters() if p.requires_grad]
        self._graph = _compiled(self._differentiate)

    @torch.enable_grad()
    def backward(self, batch: Batch, rows: Rows, options: dict[str, Any]) -> Backward:
        """Add the gradient of some rows' loss to the parameters' `.grad`.

        Args:
            batch: the minibatch, with `loss_weight`.
            rows: trajectories to evaluate, at least one.
            options: for `actor.evaluate`.

        Raises:
            PoloptError: the loss cannot be compiled, or needs too many graphs.
        """
        losses: list[Tensor] = []
        fields: list[dict[str, Tensor]] = []
        evaluated = batch if len(rows) == len(batch) else batch[rows]
        for piece in self.actor.micro_batches(evaluated):
            part = evaluated if len(piece) == len(evaluated) else evaluated[piece]
            gradients, loss, outputs = self._run(part, options)
            for parameter, found in zip(self.parameters, gradients, strict=True):
                if found is not None:
                    parameter.grad = found if parameter.grad is None else parameter.grad + found
            losses.append(loss)
            fields.append(outputs)
        if len(losses) == 1:
            return Backward(losses[0], Evaluation(**fields[0]), rows)
        joined = {name: torch.cat([found[name] for found in fields]) for name in fields[0]}
        return Backward(torch.stack(losses).sum(), Evaluation(**joined), rows)

    def _run(self, batch: Batch, options: dict[str, Any]) -> Any:
        try:
            return self._graph(batch, options)
        except TorchDynamoException as error:
            raise PoloptError(
                f"trainer.compile = true: this loss cannot be compiled ({_reason(error)}); set it to false"
            ) from error

    def _differentiate(
        self, batch: Batch, options: dict[str, Any]
    ) -> tuple[list[Tensor | None], Float[Tensor, ""], dict[str, Tensor]]:
        """The gradient of each parameter, laid out as it is, the loss in float64, and the evaluation's fields."""
        outputs = self.actor.evaluate(batch, self.requires, **options).tensors()
        loss = self.objective(constant_elsewhere(outputs), batch)
        found: Any = [None] * len(self.parameters)
        if loss.requires_grad:
            found = torch.autograd.grad(loss, self.parameters, allow_unused=True)
        gradients = [None if gradient is None else gradient.contiguous() for gradient in found]
        return gradients, loss.detach().double(), {name: t.detach() for name, t in outputs.items()}


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function as one graph, of sizes that may change, made for this run apart.

    The few kernels need no worker processes, and sizes no checks beside the guards. Globals are not guarded,
    which saves time: functions and constants of modules stay what they are.
    """
    options: Any = {
        "compile_threads": 1,
        "size_asserts": False,
        "alignment_asserts": False,
        "guard_filter_fn": torch.compiler.skip_guard_on_globals_unsafe,
    }
    make: Any = torch.compile
    return make(function, fullgraph=True, dynamic=True, isolate_recompiles=True, options=options)


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
