"""The gradient of a minibatch as one compiled graph, for small networks, where calling operations takes longer than they do.

`torch.compile` guards every number that a part holds: one that changes becomes an input of the graph, anything else that
changes has the graph made anew.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from polopt.batch import Batch, Evaluation
from polopt.engine.gradient import Backward, Evaluator, Objective, Rows, constant_elsewhere
from polopt.errors import ConfigError, PoloptError

OPTIONS: Any = {"compile_threads": 1}
"""No worker processes for the few kernels."""


class CompiledGradient:
    """What `gradient.backward` does for losses that are sums over trajectories, with the same results up to rounding.

    Args:
        actor: evaluates the policy; its `evaluate` and the objective branch on no tensor's value while they are compiled.
        objective: the scalar to descend.
        requires: fields of the evaluation that it reads.

    Raises:
        ConfigError: nothing can be compiled here.
    """

    def __init__(self, actor: Evaluator, objective: Objective, requires: frozenset[str]) -> None:
        check_compiler()
        self.actor = actor
        self.parameters = {name: p for name, p in actor.module.named_parameters() if p.requires_grad}
        minibatch = _Minibatch(actor, objective, requires)

        def differentiate(parameters: dict[str, Tensor], batch: Batch, options: dict[str, Any]) -> Any:
            def loss(parameters: dict[str, Tensor]) -> Any:
                prefixed = {f"module.{name}": parameter for name, parameter in parameters.items()}
                return torch.func.functional_call(minibatch, prefixed, (batch, options))

            gradients, found = torch.func.grad(loss, has_aux=True)(parameters)
            return {name: gradient.contiguous() for name, gradient in gradients.items()}, *found

        self._graph = torch.compile(differentiate, fullgraph=True, options=OPTIONS)

    def backward(self, batch: Batch, rows: Rows, options: dict[str, Any]) -> Backward:
        """Add the gradient of some rows' loss to the parameters' `.grad`.

        Raises:
            PoloptError: the loss cannot be compiled, or not once and for all.
        """
        losses: list[Tensor] = []
        fields: list[dict[str, Tensor]] = []
        evaluated = batch.take(rows)
        for piece in self.actor.micro_batches(evaluated):
            gradients, loss, outputs = self._differentiate(evaluated.take(piece), options)
            for name, parameter in self.parameters.items():
                found = gradients[name]
                parameter.grad = found if parameter.grad is None else parameter.grad + found
            losses.append(loss)
            fields.append(outputs)
        if len(losses) == 1:
            return Backward(losses[0], Evaluation(**fields[0]), rows)
        joined = {name: torch.cat([found[name] for found in fields]) for name in fields[0]}
        return Backward(torch.stack(losses).sum(), Evaluation(**joined), rows)

    @torch.no_grad()
    def _differentiate(
        self, batch: Batch, options: dict[str, Any]
    ) -> tuple[dict[str, Tensor], Float[Tensor, ""], dict[str, Tensor]]:
        """Gradients by parameter, loss in float64, and the evaluation's fields."""
        try:
            return self._graph(self.parameters, batch, options)
        except torch._dynamo.exc.TorchDynamoException as error:
            raise PoloptError(
                f"trainer.compile = true: this loss cannot be compiled ({_reason(error)}); leave it off"
            ) from error


class _Minibatch(nn.Module):
    """The loss as a function of the parameters of `module`."""

    def __init__(self, actor: Evaluator, objective: Objective, requires: frozenset[str]) -> None:
        super().__init__()
        self.actor, self.objective, self.requires = actor, objective, requires
        self.module = actor.module

    def forward(
        self, batch: Batch, options: dict[str, Any]
    ) -> tuple[Tensor, tuple[Tensor, dict[str, Tensor]]]:
        """The loss, and without gradient the same in float64 and the evaluation's fields."""
        outputs = self.actor.evaluate(batch, self.requires, **options).tensors()
        loss = self.objective(constant_elsewhere(outputs), batch)
        return loss, (loss.detach().double(), {name: tensor.detach() for name, tensor in outputs.items()})


def check_compiler() -> None:
    """Compile something small.

    Raises:
        ConfigError: that fails, as it does without a C++ compiler.
    """
    small: Callable[[Tensor], Tensor] = torch.compile(torch.neg, fullgraph=True, options=OPTIONS)
    try:
        small(torch.ones(1))
    except Exception as error:
        raise ConfigError(
            f"trainer.compile = true: torch cannot compile here ({_reason(error)}); install a C++ compiler, or "
            "leave it off"
        ) from error


def _reason(error: Exception) -> str:
    """The first paragraph of what torch says, on one line."""
    return " ".join(str(error).strip().partition("\n\n")[0].split()) or type(error).__name__
