"""Parts and recipes by name.

    @register("bnpo")
    class BNPO(Advantage): ...

    @register_recipe("bnpo")
    def bnpo() -> Method: ...

A part is written as its name with options, `"ppo:clip_high=0.28,dual_clip=3"`, in flags, TOML files and Python alike.
"""

import importlib
import importlib.metadata
import pkgutil
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, TypeVar

from polopt.errors import ConfigError
from polopt.method import Method
from polopt.parts import MANY, SLOTS, Part
from polopt.settings import nearest, parse_options

WITH_DEFAULT = ("sampler", "budget", "selection", "optimizer")
"""Slots whose base class is a part of its own, called "default"."""
P = TypeVar("P", bound=type[Part])
Recipe = Callable[[], Method]

_parts: dict[str, dict[str, type[Part]]] = {slot: {} for slot in SLOTS}
_recipes: dict[str, dict[str | None, Recipe]] = {}


def register(name: str) -> Callable[[P], P]:
    """Class decorator: the part is known under `name` in its slot.

    Raises:
        ConfigError: another part has that name there.
    """

    def decorate(part: P) -> P:
        known = _parts[part.slot].setdefault(name, part)
        if known is not part and known.__qualname__ != part.__qualname__:
            raise ConfigError(f"{part.slot} {name!r}: already registered by {known.__module__}")
        part.name = name
        _parts[part.slot][name] = part
        return part

    return decorate


def register_recipe(name: str, domain: str | None = None) -> Callable[[Recipe], Recipe]:
    """Function decorator: calling the function makes the method known under `name`; on `domain` alone, if one is named.

    A recipe may have a form for all domains, and forms of its own for some.
    """

    def decorate(recipe: Recipe) -> Recipe:
        _recipes.setdefault(name, {})[domain] = recipe
        return recipe

    return decorate


@cache
def load_all() -> None:
    """Import every method of the library, and every module that an installed package offers as `polopt.methods`."""
    import polopt.methods

    for module in pkgutil.walk_packages(polopt.methods.__path__, "polopt.methods."):
        importlib.import_module(module.name)
    for entry_point in importlib.metadata.entry_points(group="polopt.methods"):
        entry_point.load()


def parts(slot: str) -> dict[str, type[Part]]:
    """All parts of a slot by name."""
    load_all()
    return dict(sorted(_parts[slot].items()))


def recipes() -> dict[str, Recipe]:
    """All recipes by name, in their form for all domains if there is one."""
    load_all()
    return {name: forms.get(None, next(iter(forms.values()))) for name, forms in sorted(_recipes.items())}


def recipe_domains(name: str) -> frozenset[str] | None:
    """The domains that a recipe is for; None: all."""
    load_all()
    return None if None in _recipes[name] else frozenset(map(str, _recipes[name]))


def recipe(name: str, domain: str | None = None, **slots: Any) -> Method:
    """A published method, with other parts in some slots.

    Args:
        name: name of the recipe.
        domain: of the actor, for methods that have a form of their own there.
        **slots: for a slot a part, its name with options ("etr:alpha=0.3"), or several of these where a slot takes
            several.

    Raises:
        ConfigError: unknown name, slot or option, or a combination that cannot work.

    Example:
        >>> recipe("grpo", surrogate="gspo").surrogate.name
        'gspo'
    """
    known = recipes()
    if name not in known:
        raise ConfigError(f"method = {name!r}: unknown; {nearest(name, list(known))}")
    domains = recipe_domains(name)
    if domain and domains and domain not in domains:
        raise ConfigError(
            f"method = {name!r}: works on {', '.join(sorted(domains))}, not on {domain}; use --domain {min(domains)}"
        )
    method = _recipes[name].get(domain, known[name])()
    method.name = name
    if unknown := sorted(set(slots) - set(SLOTS)):
        raise ConfigError(f"slot {unknown[0]!r}: unknown; {nearest(unknown[0], list(SLOTS))}")
    filled = {slot: make_parts(slot, filling) for slot, filling in slots.items()}
    if not filled:
        return method
    return method.with_parts(**{slot: made if slot in MANY else made[0] for slot, made in filled.items()})


def make_parts(slot: str, filling: Part | str | Sequence[Part | str]) -> list[Part]:
    """The parts that a slot's filling names.

    Raises:
        ConfigError: several parts where one belongs, or a part that cannot be made.
    """
    fillings = [filling] if isinstance(filling, str | Part) else list(filling)
    if slot not in MANY and len(fillings) != 1:
        raise ConfigError(f"{slot}: takes one part, not {len(fillings)}")
    return [f if isinstance(f, Part) else make_part(slot, f) for f in fillings]


def make_part(slot: str, spec: str) -> Part:
    """One part from its name and options, "name:key=value,key=value".

    Raises:
        ConfigError: unknown name, unknown option, or a value out of range.
    """
    name, _, text = spec.partition(":")
    if name == "default" and slot in WITH_DEFAULT:
        return SLOTS[slot](**parse_options(spec, text))
    known = parts(slot)
    if name not in known:
        raise ConfigError(f"{slot} = {name!r}: unknown; {nearest(name, list(known))}")
    return known[name](**parse_options(spec, text))
