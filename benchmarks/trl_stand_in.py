"""Stands for TRL's trainer, whose mathematics lies inside its methods: for the benchmark and for the oracle tests."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


class Nothing:
    """Stands for whatever the trainer logs to: false, empty, and every call of it gives itself."""

    def __getattr__(self, name: str) -> "Nothing":
        return self

    def __call__(self, *args: Any, **options: Any) -> "Nothing":
        return self

    def __getitem__(self, key: Any) -> "Nothing":
        return self

    def __iter__(self) -> Iterator[Any]:
        return iter(())

    def __bool__(self) -> bool:
        return False


class OneProcess:
    """An accelerator without others."""

    device, num_processes, process_index, is_main_process, sync_gradients = (
        torch.device("cpu"),
        1,
        0,
        True,
        True,
    )

    def gather(self, tensor: Tensor) -> Tensor:
        return tensor

    gather_for_metrics = gather

    def reduce(self, tensor: Tensor, reduction: str) -> Tensor:
        return tensor


class StandIn(Nothing):
    """A trainer with some attributes."""

    def __init__(self, **attributes: Any) -> None:
        self.accelerator = OneProcess()
        self.__dict__.update(attributes)
