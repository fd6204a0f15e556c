"""A copy of a model for inference: another precision, and weights laid out for the CPU's matrix products."""

import copy

import torch
from jaxtyping import Float
from torch import Tensor, nn

from polopt.engine.sharding import full

PACKED_WIDTH = 64
"""Linear layers narrower than this are left as they are."""


class PackedLinear(nn.Module):
    """A linear layer whose weight is stored in blocks, as oneDNN's matrix products want it, instead of by rows.

    Ten to twenty percent faster than `nn.Linear` for many rows, and up to twice as fast for few.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.bias = linear.bias
        shape_only = torch.empty_like(linear.weight, device="meta")
        self.weight = nn.Parameter(shape_only, requires_grad=False)
        """Only tells the shape and dtype."""
        self._packed: Tensor | None = None

    def pack(self, weight: Float[Tensor, "out in"]) -> None:
        """Take over a weight."""
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.to(self.weight.dtype))

    def unpack(self) -> None:
        """Give the weight up."""
        self._packed = None

    def forward(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        """`x @ weight.T + bias`."""
        return torch.ops.mkldnn._linear_pointwise(x, self._packed, self.bias, "none", [], "")


class Replica:
    """A copy of `source` in `dtype`, in evaluation mode, that follows it by `refresh`.

    Buffers keep their precision: those of rotary embeddings need it. Adapters (LoRA) are copied as they are, since
    merging them into weights of low precision would round them away.

    Args:
        source: any module that `copy.deepcopy` can copy; if its parameters are to be sharded, not sharded yet.
        dtype: of the copy's floating point parameters.
    """

    def __init__(self, source: nn.Module, dtype: torch.dtype) -> None:
        self._source = source
        empty = {
            id(p): nn.Parameter(
                torch.empty(p.shape, dtype=dtype if p.is_floating_point() else p.dtype, device=p.device),
                requires_grad=False,
            )
            for p in source.parameters()
        }
        self.model = _pack_linears(copy.deepcopy(source, dict(empty))).eval()
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Take over the source's weights. Every rank must take part where they are sharded."""
        weights = dict(self._source.named_parameters(remove_duplicate=False))
        packed = {name: m for name, m in self.model.named_modules() if isinstance(m, PackedLinear)}
        for name, module in packed.items():
            module.pack(full(weights[f"{name}.weight"]))
        for name, parameter in self.model.named_parameters():
            if not parameter.is_meta:
                parameter.data = full(weights[name]).to(parameter.dtype, copy=True)

    def release(self) -> None:
        """Free the weights; the copy is of no use until the next `refresh`."""
        for module in self.model.modules():
            if isinstance(module, PackedLinear):
                module.unpack()
        for parameter in self.model.parameters():
            if not parameter.is_meta:
                parameter.data = parameter.data.new_empty(0)


def _pack_linears(module: nn.Module) -> nn.Module:
    """The module with its large enough linear layers packed, in place."""
    for name, child in module.named_children():
        if type(child) is nn.Linear and min(child.weight.shape) >= PACKED_WIDTH and _can_pack(child.weight):
            setattr(module, name, PackedLinear(child))
        else:
            _pack_linears(child)
    return module


def _can_pack(weight: Tensor) -> bool:
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    return weight.dtype == torch.float32 or (
        weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )
