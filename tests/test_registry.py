"""Parts and recipes by name: found, made with options, refused in one line that names the remedy."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import polopt
from polopt import registry
from polopt.errors import ConfigError
from polopt.method import Method
from polopt.methods.classics.grpo import GroupStandardized
from polopt.methods.classics.kl import KLPenalty
from polopt.methods.classics.ppo import PPOClip
from polopt.parts import SLOTS, Optimizer, Sampler, Shaping
from polopt.registry import make_part, make_parts, recipe, register, register_recipe
from polopt.settings import Settings, nearest

CLASSICS = {"reinforce", "rloo", "ppo", "grpo", "dr_grpo", "dapo", "gspo", "cispo"}


def test_classics_are_recipes() -> None:
    assert set(registry.recipes()) >= CLASSICS
    assert list(registry.recipes()) == sorted(registry.recipes())


@pytest.mark.parametrize("name", registry.recipes())
def test_recipes_make_new_methods_with_their_name(name: str) -> None:
    first, second = recipe(name), recipe(name)
    assert isinstance(first, Method)
    assert first.name == name
    assert not {id(part) for part in first.parts} & {id(part) for part in second.parts}
    assert registry.recipes()[name].__doc__


@pytest.mark.parametrize(("slot", "name"), [(slot, name) for slot in SLOTS for name in registry.parts(slot)])
def test_parts_know_their_slot_name_and_options(slot: str, name: str) -> None:
    part = registry.parts(slot)[name]
    assert (part.slot, part.name) == (slot, name)
    assert part.__doc__
    assert issubclass(part.Config, Settings)
    for field, info in part.Config.model_fields.items():
        assert info.description, f"{slot} {name}.{field} has no sentence"


def test_slots_are_filled_by_name_with_options_or_by_part() -> None:
    made = recipe("grpo", surrogate="gspo:clip_low=0.1", regularizers=["kl:coef=0.5,estimator=k2", "entropy"])
    assert (made.surrogate.name, made.surrogate.config.clip_low) == ("gspo", 0.1)
    assert [(p.name, p.config.coef) for p in made.slot("regularizers")] == [("kl", 0.5), ("entropy", 0.01)]
    part = PPOClip(clip_high=0.3)
    assert recipe("grpo", surrogate=part).surrogate is part
    assert recipe("grpo", shaping="kl").slot("shaping")[0].name == "kl"
    assert recipe("ppo", advantage="grpo", regularizers=[]).requires == frozenset()


@pytest.mark.parametrize(
    ("spec", "options"),
    [
        ("ppo", {"clip_low": 0.2, "dual_clip": None}),
        ("ppo:clip_low=0.1", {"clip_low": 0.1}),
        ("ppo:clip_low=0.1, dual_clip=3", {"clip_low": 0.1, "dual_clip": 3.0}),
        ("ppo:aggregation=sequence_mean", {"aggregation": "sequence_mean"}),
        ('ppo:aggregation="constant",constant=64', {"aggregation": "constant", "constant": 64.0}),
    ],
)
def test_options_are_read_as_toml_values_or_words(spec: str, options: dict[str, Any]) -> None:
    config = make_part("surrogate", spec).config
    assert {name: getattr(config, name) for name in options} == options


def test_default_names_the_classic_filling() -> None:
    assert type(make_part("sampler", "default")) is Sampler
    assert make_part("optimizer", "default:weight_decay=0.1").config.weight_decay == 0.1
    assert type(make_part("optimizer", "default")) is Optimizer


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: recipe("grppo"), "method = 'grppo': unknown; did you mean 'grpo'? allowed: "),
        (
            lambda: recipe("grpo", surogate="ppo"),
            "slot 'surogate': unknown; did you mean 'surrogate'? allowed: ",
        ),
        (
            lambda: recipe("grpo", surrogate="ppoo"),
            "surrogate = 'ppoo': unknown; did you mean 'ppo'? allowed: ",
        ),
        (
            lambda: make_part("surrogate", "ppo:clip_lo=0.1"),
            "surrogate ppo.clip_lo: unknown key; did you mean 'clip_low'?",
        ),
        (
            lambda: make_part("surrogate", "ppo:0.1"),
            "'ppo:0.1': '0.1' is not key=value; write name:key=value,key=value",
        ),
        (lambda: make_part("surrogate", "ppo:clip_low=much"), "surrogate ppo.clip_low = 'much': "),
        (lambda: make_part("surrogate", "ppo:clip_low=nan"), "surrogate ppo.clip_low = nan: "),
        (lambda: make_part("surrogate", ""), "surrogate = '': unknown; allowed: "),
        (lambda: make_parts("surrogate", ["ppo", "gspo"]), "surrogate: takes one part, not 2"),
        (lambda: make_parts("surrogate", []), "surrogate: takes one part, not 0"),
        (lambda: recipe("grpo", advantage=[]), "advantage: the slot is empty; name an estimator"),
    ],
)
def test_mistakes_are_one_line_with_the_remedy(call: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        call()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_names_are_taken_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_parts", {slot: dict(known) for slot, known in registry._parts.items()})

    class Other(PPOClip):
        pass

    with pytest.raises(ConfigError, match="surrogate 'ppo': already registered by polopt"):
        register("ppo")(Other)
    assert registry.parts("surrogate")["ppo"] is PPOClip


def test_a_method_of_ones_own_is_found_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_parts", {slot: dict(known) for slot, known in registry._parts.items()})
    monkeypatch.setattr(registry, "_recipes", dict(registry._recipes))

    @register("mine")
    class Mine(Shaping):
        pass

    @register_recipe("mine")
    def mine() -> Method:
        return Method(advantage=GroupStandardized(), surrogate=PPOClip(), shaping=[Mine()])

    assert type(make_part("shaping", "mine")) is Mine
    assert recipe("mine", regularizers="kl").slot("shaping")[0].name == "mine"


def test_parts_are_found_by_class_name_under_their_slot() -> None:
    assert polopt.advantages.GroupStandardized is GroupStandardized
    assert "PPOClip" in dir(polopt.surrogates)
    assert polopt.regularizers.KLPenalty is KLPenalty
    with pytest.raises(AttributeError, match=r"no surrogate part 'PPO'; there are .*PPOClip"):
        getattr(polopt.surrogates, "PPO")  # noqa: B009
    with pytest.raises(AttributeError, match="module 'polopt' has no attribute 'surrogats'"):
        getattr(polopt, "surrogats")  # noqa: B009


def test_the_nearest_word_is_proposed_only_if_it_is_near() -> None:
    assert nearest("clp", ["clip", "other"]) == "did you mean 'clip'? allowed: clip, other"
    assert nearest("zzz", ["clip"]) == "allowed: clip"
    assert nearest("zzz", []) == "allowed: none"


def test_methods_of_installed_packages_are_loaded(tmp_path: Path) -> None:
    (tmp_path / "their_method.py").write_text(
        "import polopt\nfrom polopt.methods.classics.grpo import grpo\npolopt.register_recipe('theirs')(grpo)\n"
    )
    info = tmp_path / "theirs-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[polopt.methods]\ntheirs = their_method\n")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import polopt; print(polopt.recipe('theirs').name)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "theirs", done.stderr


def test_a_slot_without_classic_filling_has_no_default() -> None:
    with pytest.raises(ConfigError, match="surrogate = 'default': unknown"):
        recipe("grpo", surrogate="default")
