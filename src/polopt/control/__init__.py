"""Gymnasium environments: policies over actions, collectors, tasks; `load_policy` and `Policy` for use outside."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from polopt.control.policy import Policy, load_policy

__all__ = ["Policy", "load_policy"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'polopt.control' has no attribute {name!r}")
    from polopt.control import policy  # torch, which reading a configuration does without

    return getattr(policy, name)
