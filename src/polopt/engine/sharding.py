"""Parameters sharded over the ranks with torch's FSDP2, and their state as one process alone would have it.

FSDP2 gathers the parameters of a unit before its forward pass, and sums and shards its gradients after its backward
pass. The units are the layers, found as the entries of the outermost `ModuleList`s, and what is left of the module.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class Evaluated(nn.Module):
    """The root of a sharded module: its forward pass is whatever is evaluated with the module's parameters."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, evaluate: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """`evaluate()`, copied: FSDP2 warns of views."""
        return {name: tensor.clone() for name, tensor in evaluate().items()}


def shard_module(module: nn.Module, world: int) -> Evaluated:
    """Shard the module's parameters over `world` ranks, in place.

    Returns:
        The root, through whose forward pass the module is to be evaluated. Gradients of its backward passes are sums
        over the ranks, taken in float32 at least.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    parameter = next(module.parameters())
    options: dict[str, Any] = {
        "mesh": init_device_mesh(parameter.device.type, (world,)),
        "mp_policy": MixedPrecisionPolicy(reduce_dtype=torch.promote_types(parameter.dtype, torch.float32)),
        "reshard_after_forward": True,
    }
    for layer in layers(module):
        fully_shard(layer, **options)
    root = Evaluated(module)
    fully_shard(root, **options)
    for part in root.modules():
        if isinstance(part, FSDPModule):
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)
    root(dict)  # the first module to run is the root for good
    return root


def layers(module: nn.Module) -> Iterator[nn.Module]:
    """Entries of the outermost `ModuleList`s: the layers of any transformer, the blocks of a U-Net."""
    for child in module.children():
        if isinstance(module, nn.ModuleList) and not isinstance(child, nn.ModuleList | nn.ModuleDict):
            yield child
        else:
            yield from layers(child)


@contextmanager
def gathered(root: Evaluated) -> Iterator[None]:
    """Inside, every rank holds all parameters, and its forward passes need no other rank."""
    from torch.distributed.fsdp import FSDPModule

    parts = [part for part in root.modules() if isinstance(part, FSDPModule)]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.reshard()
            part.set_reshard_after_forward(True, recurse=False)


def full(tensor: Any) -> Any:
    """The whole of a tensor that may be sharded; anything else as it is."""
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def full_state(
    module: nn.Module, optimizer: torch.optim.Optimizer, keep: bool = True
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """State of module and optimizer, parameters whole and called by their names. Every rank must take part.

    Args:
        module: has all the optimizer's parameters.
        optimizer: any.
        keep: whether this rank wants it; otherwise both are empty.
    """
    names = _names(module, optimizer)
    packed = optimizer.state_dict()
    model = _whole(module.state_dict(), keep)
    moments = {names[number]: _whole(values, keep) for number, values in packed["state"].items()}
    groups = [group | {"params": [names[i] for i in group["params"]]} for group in packed["param_groups"]]
    return (model, packed | {"state": moments, "param_groups": groups}) if keep else ({}, {})


def load_full_state(
    module: nn.Module, optimizer: torch.optim.Optimizer, model: dict[str, Tensor], state: dict[str, Any]
) -> None:
    """Take over what `full_state` gave; every rank passes the whole of it and keeps its shards."""
    own = module.state_dict()
    module.load_state_dict({name: _sharded_like(t, own.get(name)) for name, t in model.items()})
    number = {name: i for i, name in enumerate(_names(module, optimizer))}
    parameters = dict(module.named_parameters())
    moments = {
        number[name]: {key: _sharded_like(value, parameters[name]) for key, value in values.items()}
        for name, values in state["state"].items()
    }
    groups = [
        group | {"params": [number[name] for name in group["params"]]} for group in state["param_groups"]
    ]
    optimizer.load_state_dict(state | {"state": moments, "param_groups": groups})


def _names(module: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    name_of = {id(parameter): name for name, parameter in module.named_parameters()}
    return [name_of[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]


def _whole(state: dict[str, Any], keep: bool) -> dict[str, Any]:
    found = ((name, full(value)) for name, value in state.items())
    return {name: value for name, value in found if keep}


def _sharded_like(value: Any, reference: Tensor | None) -> Any:
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(reference, DTensor) or not isinstance(value, Tensor) or value.shape != reference.shape:
        return value
    return distribute_tensor(value, reference.device_mesh, reference.placements, src_data_rank=None)
