"""Any advantage with any surrogate, selection, regularizers, budget and sampler: two iterations of each."""

from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import polopt
from polopt.errors import ConfigError
from polopt.miniature import SumModActor, SumModTask
from polopt.registry import make_part, parts

OPTIONS = {
    "length_envelope": "length_envelope:min_start=1,peak_start=2,peak_end=5,max_end=8",
    "conditioned": "conditioned:easy=1,hard=0",
    "overlong": "overlong:max_length=5,cache=2",
    "vas": "vas:scoring_rollouts=2",
    "accuracy_filter": "accuracy_filter:max_rounds=2",
    "bnpo": "bnpo:r_min=-1,r_max=1",
}
"""Parts with required options, or whose defaults take long here."""


def specs(slot: str, transforms: bool | None = None) -> list[str]:
    """Every registered part of a slot; of the advantage slot the estimators or the transforms."""
    found = parts(slot)
    if transforms is not None:
        found = {
            name: part
            for name, part in found.items()
            if issubclass(part, polopt.parts.AdvantageTransform) is transforms
        }
    return [OPTIONS.get(name, name) for name in found]


ESTIMATOR_OF = {"blended": "copo", "bounded_ratio": "gbpo", "value": "gae", "bpo": "gae", "median": "gae"}
"""Losses that need the signals of one estimator."""


def with_providers(slots: dict[str, Any]) -> dict[str, Any]:
    """The combination with the parts that provide what others need, where one place allows it."""
    for name in [*slots["regularizers"], slots["surrogate"]]:
        if name in ESTIMATOR_OF:
            slots["advantage"][0] = ESTIMATOR_OF[name]
    if "bundle" not in slots["shaping"] and (
        slots["advantage"][0] == "risk_po" or slots["surrogate"] == "bundle_clip"
    ):
        slots["shaping"].append("bundle")
    return slots


COMBINATIONS = st.fixed_dictionaries(
    {
        "sampler": st.sampled_from(["default", *specs("sampler")]),
        "budget": st.sampled_from(["default", *specs("budget")]),
        "shaping": st.lists(st.sampled_from(specs("shaping")), max_size=2, unique=True),
        "advantage": st.tuples(
            st.sampled_from(specs("advantage", False)),
            st.lists(st.sampled_from(specs("advantage", True)), max_size=2, unique=True),
        ).map(lambda pair: [pair[0], *pair[1]]),
        "selection": st.sampled_from(["default", *specs("selection")]),
        "surrogate": st.sampled_from(specs("surrogate")),
        "regularizers": st.lists(st.sampled_from(specs("regularizers")), max_size=2, unique=True),
        "optimizer": st.sampled_from(["default", *specs("optimizer")]),
    }
).map(with_providers)


@given(slots=COMBINATIONS, minibatches=st.integers(1, 3), replay=st.integers(1, 2))
@settings(max_examples=300, suppress_health_check=list(HealthCheck), deadline=None)
def test_any_combination_trains_or_says_what_it_needs(
    slots: dict[str, Any], minibatches: int, replay: int
) -> None:
    task = SumModTask(train_size=6, second_reward=True)
    actor = SumModActor(task, width=8)
    sizes = polopt.TrainerConfig(
        iterations=2, prompts=4, rollouts=4, lr=0.01, minibatches=minibatches, replay=replay
    )
    try:
        trainer = polopt.Trainer(actor, task, polopt.recipe("grpo", **slots), sizes)
    except ConfigError as refusal:
        documented = "needs" in str(refusal) and "\n" not in str(refusal)
        if not documented:
            raise
        return
    before = [p.detach().clone() for p in actor.module.parameters()]
    steps = [trainer.iterate()[0] for _ in range(2)]
    assert all(p.isfinite().all() for p in actor.module.parameters())
    assert all(
        b.isfinite().all() for b in trainer.method.buffers() if b.is_floating_point() and b.numel() > 2
    )
    assert all(step["updates/skipped"] == 0 for step in steps)
    if (
        any(step.get("grad_norm", 0.0) > 1e-9 and step["lr"] > 0 for step in steps)
        and slots["optimizer"] == "default"
    ):
        moved = zip(before, actor.module.parameters(), strict=True)
        assert any(not torch.equal(old, new) for old, new in moved)


def test_every_part_can_be_made_for_the_combinations() -> None:
    for slot in polopt.parts.SLOTS:
        for spec in specs(slot):
            assert make_part(slot, spec).slot == slot
