"""How the laws compare, and how they change data."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from polopt.batch import Batch, Evaluation
from polopt.parts import Part
from polopt.testing.data import outside

Tensors = dict[str, Tensor]


def expect(holds: bool, message: str) -> None:
    """Raise AssertionError with the message unless it holds."""
    if not holds:
        raise AssertionError(message)


def finite(tensors: Tensors, mask: Tensor | None = None, where: str = "") -> None:
    """All floating tensors are finite; those of the mask's shape inside it."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point():
            inside = tensor[mask] if mask is not None and tensor.shape[:2] == mask.shape else tensor
            expect(bool(inside.isfinite().all()), f"{where} {name} is not finite".strip())


def state_of(module: nn.Module) -> Tensors:
    """A copy of the whole state; what is not a tensor as the bytes of its JSON.

    Raises:
        AssertionError: something in it is neither.
    """
    taken: Tensors = {}
    for name, value in module.state_dict().items():
        if isinstance(value, Tensor):
            taken[name] = value.detach().clone()
            continue
        try:
            taken[name] = torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)
        except TypeError:
            raise AssertionError(f"{name} is a {type(value).__name__}: neither tensor nor JSON") from None
    return taken


def finite_state(module: nn.Module, before: Tensors, where: str = "") -> None:
    """Nothing in the state has become NaN or infinite."""
    for name, tensor in state_of(module).items():
        start = before.get(name)
        unset = start is not None and start.shape == tensor.shape and not bool(start.isfinite().all())
        expect(unset or bool(tensor.isfinite().all()), f"{where} the state {name} is not finite")


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what is expected; absolute below 1e-12."""
    difference = float((found.double() - expected.double()).norm())
    return difference / max(float(expected.double().norm()), 1e-12) if difference else 0.0


def close(name: str, found: Tensor, expected: Tensor, tolerance: float) -> None:
    """Equal up to `tolerance` times the norm of what is expected."""
    expect(found.shape == expected.shape, f"{name}: shape {tuple(found.shape)}, not {tuple(expected.shape)}")
    scale = float(expected.double().norm()) + 1e-9
    difference = float((found.double() - expected.double()).norm())
    expect(difference <= tolerance * max(scale, 1.0), f"{name}: off by {difference:.2g}, of {scale:.2g}")


def same(found: Tensors, expected: Tensors, where: str = "") -> None:
    """The same names and equal to the bit, NaN equal to NaN."""
    expect(
        found.keys() == expected.keys(), f"{where} {sorted(found.keys() ^ expected.keys())} is in one alone"
    )
    for name in differ(found, expected):
        raise AssertionError(f"{where} {name} is not the same".strip())


def differ(found: Tensors, expected: Tensors) -> list[str]:
    """Names of the tensors that are not equal to the bit."""
    return [
        name
        for name in expected.keys() | found.keys()
        if name not in found or name not in expected or not _equal(found[name], expected[name])
    ]


def _equal(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return bool(((a == b) | ((a != a) & (b != b))).all())


def leaves(batch: Batch) -> Tensors:
    """All tensors of a batch by name."""
    return batch.to_tensors()


def snapshot(*values: Any) -> Tensors:
    """Copies of all tensors of batches, evaluations and plain tensors."""
    taken: Tensors = {}
    for place, value in enumerate(values):
        found: Tensors = {}
        if isinstance(value, Batch):
            found = leaves(value)
        elif isinstance(value, Evaluation):
            found = value.tensors()
        elif isinstance(value, Tensor):
            found = {"tensor": value}
        taken |= {f"{place} {name}": tensor.detach().clone() for name, tensor in found.items()}
    return taken


def watch(part: Part, problems: list[str]) -> tuple[RemovableHandle, RemovableHandle]:
    """Note in `problems` when a call of the part changes what it was given."""
    before: list[Tensors] = []

    def enter(module: nn.Module, args: tuple[Any, ...]) -> None:
        before.append(snapshot(*args))

    def leave(module: nn.Module, args: tuple[Any, ...], result: Any) -> None:
        changed = differ(snapshot(*args), before.pop())
        if changed:
            names = ", ".join(sorted(name.split(" ", 1)[1] for name in changed))
            problems.append(f"{part.slot} {part.name} changes {names}")

    return part.register_forward_pre_hook(enter), part.register_forward_hook(leave)


def widen(batch: Batch, columns: int) -> Batch:
    """The batch with further columns outside its mask, full of garbage."""
    rows, steps = batch.mask.shape

    def wider(tensor: Tensor) -> Tensor:
        if tensor.shape[:2] != (rows, steps) or tensor.dim() < 2:
            return tensor
        filling = torch.nan if tensor.is_floating_point() else 0
        new = torch.full((rows, columns, *tensor.shape[2:]), filling).to(tensor.dtype)
        return torch.cat([tensor, new], 1)

    return batch.apply(wider)


def fill_outside(batch: Batch, filling: float) -> Batch:
    """The batch with `filling` (-1 in integers) wherever the mask is False."""
    mask = batch.mask
    filled = batch.apply(
        lambda t: outside(t, mask, filling) if t.shape[:2] == mask.shape and t.dtype != torch.bool else t
    )
    filled.rewards = batch.rewards
    return filled


def cast_tensor(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A floating tensor in another precision."""
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def cast(batch: Batch, dtype: torch.dtype) -> Batch:
    """The batch's floating tensors in another precision, but for its rewards and payload, which have their own."""
    fields = {"rewards", "payload"}
    changed = batch.clone(recurse=False)
    for name, value in batch.items():
        if name not in fields and value is not None:
            setattr(
                changed,
                name,
                value.apply(lambda t: cast_tensor(t, dtype))
                if not isinstance(value, Tensor)
                else cast_tensor(value, dtype),
            )
    return changed


def flat_gradient(module: nn.Module) -> Tensor:
    """The gradients of all parameters, one after the other."""
    return torch.cat(
        [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in module.parameters()]
    )


class Frozen:
    """Holds what a function detaches at its first value, so that finite differences see it as the constant it is."""

    def __init__(self) -> None:
        self.constants: list[Tensor] = []

    @contextmanager
    def record(self) -> Iterator[None]:
        """Remember every result of `detach`."""
        with _Detach(self.constants, iter(())):
            yield

    @contextmanager
    def replay(self) -> Iterator[None]:
        """Return the remembered results in their order."""
        with _Detach(None, iter(self.constants)):
            yield


class _Detach(TorchFunctionMode):
    def __init__(self, record: list[Tensor] | None, replay: Iterator[Tensor]) -> None:
        super().__init__()
        self.record, self.replayed = record, replay

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not Tensor.detach:
            return func(*args, **(kwargs or {}))
        if self.record is None:
            return next(self.replayed)
        result = func(*args, **(kwargs or {}))
        self.record.append(result.clone())
        return result
