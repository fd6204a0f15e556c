"""Every method passes the battery, and every fault that the battery is for is found by the check that is for it."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import polopt
from polopt import registry
from polopt.batch import Batch, Evaluation
from polopt.errors import ConfigError
from polopt.functional.groups import Groups
from polopt.functional.masked import masked_sum
from polopt.functional.ratio import log_ratio
from polopt.method import Method
from polopt.methods.classics.grpo import GroupStandardized
from polopt.methods.classics.ppo import PPOClip
from polopt.parts import SLOTS, Advantage, Budget, Draw, Part, Selection, Shaping
from polopt.testing import check_method

WITH_OPTIONS: dict[str, dict[str, Any]] = {
    "conditioned": {"easy": 0, "hard": 1},
    "length_envelope": {"min_start": 1, "peak_start": 2, "peak_end": 3, "max_end": 6},
}


def parts_of_no_recipe() -> list[type[Part]]:
    used = {type(part) for make in registry.recipes().values() for part in make().parts}
    return [part for slot in SLOTS for part in registry.parts(slot).values() if part not in used]


@pytest.mark.parametrize("name", registry.recipes())
def test_every_recipe_passes(name: str) -> None:
    check_method(name)


@pytest.mark.parametrize("part", parts_of_no_recipe(), ids=lambda part: f"{part.slot}-{part.name}")
def test_every_other_part_passes(part: type[Part]) -> None:
    check_method(part(**WITH_OPTIONS.get(part.name, {})), columns=2)


class Surrogates:
    """Faulty losses."""

    class InPlace(PPOClip):
        def decision_loss(self, evaluation: Evaluation, batch: Batch) -> Tensor:
            batch.advantages.mul_(1.01)
            return super().decision_loss(evaluation, batch)

    class Assigns(PPOClip):
        def decision_loss(self, evaluation: Evaluation, batch: Batch) -> Tensor:
            batch.advantages = 2 * batch.advantages
            return super().decision_loss(evaluation, batch)

    class MultipliesByMask(PPOClip):
        requires = frozenset({"old_features"})

        def decision_loss(self, evaluation: Evaluation, batch: Batch) -> Tensor:
            scale = (batch.signal("old_features") * batch.mask[..., None]).sum((-1, -2))
            return super().decision_loss(evaluation, batch) * scale[:, None].cos()

    class Leaks(PPOClip):
        def decision_loss(self, evaluation: Evaluation, batch: Batch) -> Tensor:
            ratio = log_ratio(evaluation.logp, batch.old_logp, batch.mask).exp()
            return super().decision_loss(evaluation, batch) / (1 + ratio[batch.mask].mean())

    class LeaksBeyondGroup(Leaks):
        coupling = "group"

    class AveragesPadding(PPOClip):
        def forward(self, evaluation: Evaluation, batch: Batch) -> Tensor:
            return (batch.mask * self.decision_loss(evaluation, batch)).mean()

    class IgnoresWeights(PPOClip):
        def forward(self, evaluation: Evaluation, batch: Batch) -> Tensor:
            return (batch.mask * self.decision_loss(evaluation, batch)).sum()

    class Unbounded(PPOClip):
        def decision_loss(self, evaluation: Evaluation, batch: Batch) -> Tensor:
            return -batch.advantages * (evaluation.logp - batch.old_logp).exp()

    class WrongGradient(PPOClip):
        class Doubled(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, x: Tensor) -> Tensor:
                return x.exp()

            @staticmethod
            def backward(ctx: Any, *grads: Tensor) -> Tensor:
                return 2 * grads[0]

        def decision_loss(self, evaluation: Evaluation, batch: Batch) -> Tensor:
            ratio = self.Doubled.apply(log_ratio(evaluation.logp, batch.old_logp, batch.mask))
            assert isinstance(ratio, Tensor)
            return -batch.advantages * ratio

    class LosesDigits(PPOClip):
        def decision_loss(self, evaluation: Evaluation, batch: Batch) -> Tensor:
            difference = (evaluation.logp + 1000.0) - (batch.old_logp + 1000.0)
            return -batch.advantages * difference.exp()

    class NeverSilent(PPOClip):
        def decision_loss(self, evaluation: Evaluation, batch: Batch) -> Tensor:
            return super().decision_loss(evaluation, batch) + evaluation.logp.square()

    class Undeclared(PPOClip):
        def decision_loss(self, evaluation: Evaluation, batch: Batch) -> Tensor:
            return super().decision_loss(evaluation, batch) + batch.ref_logp

    class WrongShape(PPOClip):
        def forward(self, evaluation: Evaluation, batch: Batch) -> Tensor:
            return super().forward(evaluation, batch).expand(2)

    class ClippedIsNoMask(PPOClip):
        def clipped(self, evaluation: Evaluation, batch: Batch) -> Tensor:
            return super().clipped(evaluation, batch).any(-1)

    class CountsWhileLosing(PPOClip):
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            self.register_buffer("calls", torch.zeros(()))

        def decision_loss(self, evaluation: Evaluation, batch: Batch) -> Tensor:
            self.calls += 1
            return super().decision_loss(evaluation, batch)

    class Learns(PPOClip):
        def decision_loss(self, evaluation: Evaluation, batch: Batch) -> Tensor:
            return 0.0 * evaluation.logp


class Advantages:
    """Faulty advantages."""

    class Hidden(GroupStandardized):
        seen = 0

        def forward(self, batch: Batch) -> Tensor:
            return super().forward(batch) / (1 + self.seen)

        def observe(self, batch: Batch) -> None:
            self.seen += 1

    class Poisoned(GroupStandardized):
        mean: Tensor

        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            self.register_buffer("mean", torch.zeros((), dtype=torch.float64))

        def observe(self, batch: Batch) -> None:
            self.mean.copy_(batch.outcome().mean())

    class DividesByZero(Advantage):
        def forward(self, batch: Batch) -> Tensor:
            groups, outcome = Groups.of(batch.group), batch.outcome()
            return (groups.centre(outcome) / groups.broadcast(groups.std(outcome)))[:, None]

    class CancelsDigits(Advantage):
        def forward(self, batch: Batch) -> Tensor:
            groups, outcome = Groups.of(batch.group), batch.outcome()
            mean = groups.sum(outcome) / groups.size
            variance = groups.sum(outcome.square()) / groups.size - mean.square()
            return (
                (outcome - groups.broadcast(mean)) / (groups.broadcast(variance.clamp(min=0).sqrt()) + 1e-6)
            )[:, None]

    class NearlyZero(Advantage):
        def forward(self, batch: Batch) -> Tensor:
            groups, outcome = Groups.of(batch.group), batch.outcome()
            deviation = outcome - groups.broadcast(groups.sum(outcome / 3) / groups.size * 3)
            return (deviation / (groups.broadcast(groups.std(outcome)) + 1e-6))[:, None]

    class CountsRows(Advantage):
        def forward(self, batch: Batch) -> Tensor:
            place = torch.arange(len(batch)) - len(batch) / 2
            return (Groups.of(batch.group).centre(batch.outcome()) * place)[:, None]

    class GlobalRandom(Advantage):
        def forward(self, batch: Batch) -> Tensor:
            return torch.randn(len(batch), 1)

    class ReadsUnderTheMask(Advantage):
        requires = frozenset({"turn"})

        def forward(self, batch: Batch) -> Tensor:
            return (batch.outcome() * batch.turn.double().mean(-1))[:, None]


class Rest:
    """Faults in other slots."""

    class Overspends(Budget):
        def forward(self, prompt_ids: Tensor, total: int, draw: Draw) -> Tensor:
            return super().forward(prompt_ids, total, draw) + 1

    class Negative(Selection):
        def forward(self, batch: Batch, draw: Draw) -> Tensor:
            return -torch.ones(len(batch), 1)

    class ScalesInPlace(Shaping):
        def forward(self, batch: Batch, draw: Draw) -> Batch:
            batch.rewards *= 2
            return batch

    class NotTensors(Budget):
        def get_extra_state(self) -> Any:
            return object()

        def set_extra_state(self, state: Any) -> None:
            """Nothing to set."""

    class HasGradient(Shaping):
        provides = frozenset({"scaled"})

        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))

        @torch.enable_grad()
        def forward(self, batch: Batch, draw: Draw) -> Batch:
            batch = batch.clone(recurse=False)
            batch.set_signal("scaled", self.scale * batch.rewards)
            return batch

    class Silent(Shaping):
        provides = frozenset({"promised"})

        def forward(self, batch: Batch, draw: Draw) -> Batch:
            return batch


FAULTS: list[tuple[type[Part], str]] = [
    (Surrogates.InPlace, "inputs_are_not_modified"),
    (Surrogates.Assigns, "inputs_are_not_modified"),
    (Surrogates.MultipliesByMask, "garbage_outside_the_mask_does_not_matter"),
    (Surrogates.Leaks, "micro_batches_do_not_matter"),
    (Surrogates.Leaks, "coupling_is_what_is_declared"),
    (Surrogates.LeaksBeyondGroup, "coupling_is_what_is_declared"),
    (Surrogates.AveragesPadding, "padding_does_not_matter"),
    (Surrogates.IgnoresWeights, "unselected_trajectories_are_silent"),
    (Surrogates.Unbounded, "extreme_ratios_stay_finite"),
    (Surrogates.WrongGradient, "gradient_is_the_derivative"),
    (Surrogates.LosesDigits, "precision_does_not_matter"),
    (Surrogates.NeverSilent, "unselected_trajectories_are_silent"),
    (Surrogates.Undeclared, "results_are_finite"),
    (Surrogates.WrongShape, "results_are_finite"),
    (Surrogates.ClippedIsNoMask, "results_are_finite"),
    (Surrogates.CountsWhileLosing, "state_changes_where_it_may"),
    (Surrogates.Learns, "results_are_finite"),
    (Advantages.Hidden, "state_is_in_the_state_dict"),
    (Advantages.Poisoned, "missing_rewards_are_defined"),
    (Rest.HasGradient, "data_are_constant"),
    (Advantages.DividesByZero, "odd_groups_are_defined"),
    (Advantages.CancelsDigits, "group_statistics_are_exact"),
    (Advantages.NearlyZero, "group_statistics_are_exact"),
    (Advantages.CountsRows, "order_does_not_matter"),
    (Advantages.GlobalRandom, "same_draws_same_result"),
    (Advantages.ReadsUnderTheMask, "garbage_outside_the_mask_does_not_matter"),
    (Rest.Overspends, "prompts_and_budget_add_up"),
    (Rest.Negative, "results_are_finite"),
    (Rest.ScalesInPlace, "inputs_are_not_modified"),
    (Rest.NotTensors, "state_is_in_the_state_dict"),
    (Rest.Silent, "declared_signals_are_provided"),
]


@pytest.mark.parametrize(("fault", "check"), FAULTS, ids=lambda value: getattr(value, "__name__", value))
def test_fault_is_found_by_its_check(fault: type[Part], check: str) -> None:
    report = check_method(fault(), only=[check], raise_on_failure=False)
    assert check in [failure.name for failure in report.failures], str(report)


def test_sound_parts_of_the_same_making_pass() -> None:
    check_method(Method(advantage=GroupStandardized(), surrogate=PPOClip(clip_high=0.28), name="sound"))


def test_gradients_through_the_advantages_are_found() -> None:
    class Attached(Method):
        def objective(self, evaluation: Evaluation, batch: Batch) -> Tensor:
            return self.surrogate(evaluation.where(batch.mask), batch)

    method = Attached(advantage=GroupStandardized(), surrogate=PPOClip())
    report = check_method(method, only=["data_are_constant"], raise_on_failure=False)
    assert "a gradient reaches advantages" in str(report)


def test_failures_are_raised_with_one_line_each() -> None:
    with pytest.raises(
        AssertionError, match=r"custom: \d+ of \d+ checks passed\n  results_are_finite: .* zero"
    ) as caught:
        check_method(Method(advantage=GroupStandardized(), surrogate=Surrogates.Learns()))
    assert len(str(caught.value).splitlines()) == 2


def test_refusing_unusual_data_is_no_failure_but_refusing_everything_is() -> None:
    class RefusesAll(GroupStandardized):
        def forward(self, batch: Batch) -> Tensor:
            raise ConfigError("advantage x: not today")

    refused = {result.name: result for result in check_method("bnpo").results if result.message}
    assert refused["extreme_rewards_stay_finite"].message.startswith("refused: bnpo: rewards lie outside")
    report = check_method(Method(advantage=RefusesAll(), surrogate=PPOClip()), raise_on_failure=False)
    assert "results_are_finite" in [failure.name for failure in report.failures]


def test_unknown_recipe_is_named() -> None:
    with pytest.raises(ConfigError, match="did you mean 'grpo'"):
        check_method("grppo")


def test_checking_leaves_the_method_as_it_was() -> None:
    method = polopt.recipe("reinforce", advantage="reinforce:baseline=moving_average")
    before = {name: value.clone() for name, value in method.state_dict().items()}
    check_method(method)
    assert all(torch.equal(method.state_dict()[name], value) for name, value in before.items())


def test_masked_sum_of_features_is_the_sound_form_of_the_mask_fault() -> None:
    class Sound(PPOClip):
        requires = frozenset({"old_features"})

        def decision_loss(self, evaluation: Evaluation, batch: Batch) -> Tensor:
            scale = masked_sum(batch.signal("old_features").sum(-1), batch.mask)
            return super().decision_loss(evaluation, batch) * scale[:, None].cos()

    check_method(Sound())
