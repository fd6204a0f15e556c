"""polopt: policy optimization, every method under one contract.

    method = polopt.recipe("grpo", advantage=polopt.advantages.GroupStandardized(), surrogate="gspo")
    polopt.Trainer(actor, task, method, polopt.TrainerConfig(iterations=200)).run()

Read `batch.py`, `parts.py`, `method.py` and `trainer.py` first. Names are imported when they are used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from polopt.batch import Batch, Evaluation
    from polopt.method import Method
    from polopt.parts import Part
    from polopt.registry import make_part, recipe, recipes, register, register_recipe
    from polopt.trainer import Trainer, TrainerConfig

__version__ = "0.1.0"

_WHERE = {
    "Batch": "batch", "Evaluation": "batch", "Method": "method", "Part": "parts", "recipe": "registry",
    "recipes": "registry", "register": "registry", "register_recipe": "registry", "make_part": "registry",
    "Trainer": "trainer", "TrainerConfig": "trainer",
}  # fmt: skip
_NAMESPACES = {
    "samplers": "sampler", "budgets": "budget", "shapings": "shaping", "advantages": "advantage",
    "selections": "selection", "surrogates": "surrogate", "regularizers": "regularizers", "optimizers": "optimizer",
}  # fmt: skip

__all__ = [
    "Batch", "Evaluation", "Method", "Part", "Trainer", "TrainerConfig", "make_part", "recipe", "recipes", "register",
    "register_recipe",
]  # fmt: skip


class _Namespace:
    """The registered part classes of one slot, by class name: `polopt.advantages.GAE`."""

    def __init__(self, slot: str) -> None:
        self._slot = slot

    def __dir__(self) -> list[str]:
        return [part.__name__ for part in self._parts()]

    def __getattr__(self, name: str) -> Any:
        for part in self._parts():
            if part.__name__ == name:
                return part
        raise AttributeError(f"no {self._slot} part {name!r}; there are {', '.join(dir(self))}")

    def _parts(self) -> list[type]:
        from polopt.registry import parts

        return list(parts(self._slot).values())


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(importlib.import_module(f"polopt.{_WHERE[name]}"), name)
    if name in _NAMESPACES:
        return _Namespace(_NAMESPACES[name])
    raise AttributeError(f"module 'polopt' has no attribute {name!r}")
