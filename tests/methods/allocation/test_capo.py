"""Identities of the CAPO card (arXiv 2510.00819)."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from polopt.batch import Evaluation
from polopt.methods.allocation.capo import (
    AdamConstants,
    CurvatureFilter,
    Moments,
    Shifts,
    accepted,
    adam_direction,
    predicted_shifts,
    score,
    updated_moments,
)
from polopt.methods.classics.ppo import PPOClip
from polopt.testing import random_batch

TOKENS, KEPT, WIDTH, ROWS = 12, 5, 4, 9
LR = 0.3


def tokens(seed: int = 0) -> dict[str, Tensor]:
    """Features, kept logits and rows, actions (the last two not among the kept rows) and advantages."""
    draws = torch.Generator().manual_seed(seed)
    rows = torch.stack([torch.randperm(ROWS, generator=draws)[:KEPT] for _ in range(TOKENS)])
    action = rows[torch.arange(TOKENS), torch.randint(KEPT, (TOKENS,), generator=draws)]
    action[-2:] = ROWS
    return {
        "features": torch.randn(TOKENS, WIDTH, generator=draws, dtype=torch.float64),
        "logits": torch.randn(TOKENS, KEPT, generator=draws, dtype=torch.float64),
        "rows": rows,
        "action": action,
        "advantages": torch.randn(TOKENS, generator=draws, dtype=torch.float64),
    }


def adam_state(seed: int = 1) -> Moments:
    """Moments of six rows of ten."""
    draws = torch.Generator().manual_seed(seed)
    place = torch.full((ROWS + 1,), -1)
    place[:6] = torch.arange(6)
    first = torch.randn(6, WIDTH, generator=draws, dtype=torch.float64)
    return Moments(place, first, first.square() + 0.1, 3)


def test_sgd_shifts_have_closed_forms() -> None:
    given = tokens()
    found = predicted_shifts(**given, lr=LR)
    v, pi = score(given["logits"], given["rows"], given["action"])
    a, v2, h2 = given["advantages"], v.square().sum(-1), given["features"].square().sum(-1)
    vfv = (pi * v.square()).sum(-1) - (pi * v).sum(-1).square()
    assert_close(found.policy, LR**2 / 2 * a**2 * v2**2 * h2**2)
    assert_close(found.objective, LR * a**2 * v2 * h2 + LR**2 / 2 * a**3 * h2**2 * (v2**2 - vfv))


def test_zero_advantage_shifts_nothing_with_sgd_and_is_accepted() -> None:
    given = tokens() | {"advantages": torch.zeros(TOKENS, dtype=torch.float64)}
    found = predicted_shifts(**given, lr=LR)
    assert not found.policy.any() and not found.objective.any()
    for symmetric in (True, False):
        assert accepted(found, 1e-9, 1e-9, symmetric).all()


def test_zero_advantage_still_shifts_the_policy_with_adam_but_not_the_objective() -> None:
    given = tokens() | {"advantages": torch.zeros(TOKENS, dtype=torch.float64)}
    found = predicted_shifts(**given, lr=LR, moments=adam_state())
    assert (found.policy > 0).all() and not found.objective.any()


def test_while_no_row_has_moments_the_step_is_the_gradient_whatever_the_counter() -> None:
    state = adam_state()
    none = Moments(torch.full_like(state.place, -1), state.first[:0], state.second[:0], 3)
    found, sgd = (predicted_shifts(**tokens(), lr=LR, moments=moments) for moments in (none, None))
    assert torch.equal(found.policy, sgd.policy) and torch.equal(found.objective, sgd.objective)


@pytest.mark.parametrize("moments", [None, adam_state()], ids=["sgd", "adam"])
def test_policy_shift_is_not_negative(moments: Moments | None) -> None:
    assert (predicted_shifts(**tokens(), lr=LR, moments=moments).policy >= 0).all()


@pytest.mark.parametrize("moments", [None, adam_state()], ids=["sgd", "adam"])
def test_small_rates_infinite_thresholds_and_thresholds_of_zero_accept_everything(
    moments: Moments | None,
) -> None:
    assert accepted(predicted_shifts(**tokens(), lr=1e-9, moments=moments), 1e-6, 1e-6).all()
    large = predicted_shifts(**tokens(), lr=100.0, moments=moments)
    assert not accepted(large, 1e-6, 1e-6).any()
    assert accepted(large, 0.0, 0.0).all() and accepted(large, float("inf"), float("inf")).all()


@pytest.mark.parametrize("moments", [None, adam_state()], ids=["sgd", "adam"])
def test_adding_a_constant_to_the_kept_logits_changes_nothing(moments: Moments | None) -> None:
    given = tokens()
    moved = given | {
        "logits": given["logits"] + torch.linspace(-50, 50, TOKENS, dtype=torch.float64)[:, None]
    }
    assert_close(
        predicted_shifts(**given, lr=LR, moments=moments), predicted_shifts(**moved, lr=LR, moments=moments)
    )


def test_score_sums_to_zero_if_the_action_is_kept_and_to_minus_one_otherwise() -> None:
    given = tokens()
    v, _ = score(given["logits"], given["rows"], given["action"])
    assert_close(v.sum(-1), torch.tensor([0.0] * (TOKENS - 2) + [-1.0] * 2, dtype=torch.float64))


def test_rejections_grow_when_a_threshold_shrinks() -> None:
    shifts = predicted_shifts(**tokens(), lr=LR)
    thresholds = torch.logspace(3, -3, 13).tolist()
    for rules in ([(t, 1.0) for t in thresholds], [(1.0, t) for t in thresholds]):
        kept = torch.stack([accepted(shifts, *rule) for rule in rules])
        assert not (kept[1:] & ~kept[:-1]).any() and kept.sum(-1).unique().numel() > 2


def test_asymmetric_rule_accepts_no_predicted_loss() -> None:
    shifts = Shifts(torch.tensor([-0.5, 0.0, 0.5, 1.0]), torch.zeros(4))
    assert accepted(shifts, 1.0, 0.0, symmetric=True).tolist() == [True, True, True, False]
    assert accepted(shifts, 1.0, 0.0, symmetric=False).tolist() == [False, True, True, False]


@pytest.mark.parametrize("moments", [None, adam_state()], ids=["sgd", "adam"])
def test_objective_shift_is_the_second_order_taylor_polynomial_of_the_ratio(moments: Moments | None) -> None:
    given = {name: value[:-2] for name, value in tokens().items()}
    v, _ = score(given["logits"], given["rows"], given["action"])
    gradient = (given["advantages"][:, None] * v)[..., None] * given["features"][:, None]
    adam = AdamConstants()
    delta = gradient if moments is None else adam_direction(gradient, given["rows"], moments, adam)
    u = (delta * given["features"][:, None]).sum(-1)
    chosen = (given["rows"] == given["action"][:, None]).double()

    def improvement(lr: float) -> Tensor:
        moved = (given["logits"] + lr * u).log_softmax(-1) - given["logits"].log_softmax(-1)
        return given["advantages"] * ((moved * chosen).sum(-1).exp() - 1)

    errors = [
        (improvement(lr) - predicted_shifts(**given, lr=lr, moments=moments).objective).abs()
        for lr in (4e-3, 2e-3)
    ]
    assert (errors[1] < 1e-4).all()
    assert_close((errors[1] / errors[0]).median(), torch.tensor(1 / 8, dtype=torch.float64), rtol=0.1, atol=0)


def test_half_the_squared_step_in_the_fisher_metric_is_the_kl_of_the_step() -> None:
    draws = torch.Generator().manual_seed(2)
    z, u = torch.randn(2, 7, generator=draws, dtype=torch.float64)
    pi = z.softmax(-1)
    fisher = (pi * u.square()).sum() - (pi * u).sum().square()

    def kl(lr: float) -> Tensor:
        return (pi * (z.log_softmax(-1) - (z + lr * u).log_softmax(-1))).sum()

    errors = [abs(float(kl(lr) - lr**2 / 2 * fisher)) for lr in (2e-2, 1e-2)]
    assert errors[1] / errors[0] == pytest.approx(1 / 8, rel=0.1)


def test_mean_squared_score_along_a_step_is_the_fisher_metric() -> None:
    draws = torch.Generator().manual_seed(3)
    z, u = torch.randn(2, 7, generator=draws, dtype=torch.float64)
    v, pi = score(z.expand(7, -1), torch.arange(7).expand(7, -1), torch.arange(7))
    fisher = (pi[0] * u.square()).sum() - (pi[0] * u).sum().square()
    assert_close((pi[0] * (v @ u).square()).sum(), fisher)


def part_and_batch(**options: Any) -> tuple[CurvatureFilter, Any]:
    part = CurvatureFilter(kept=5, **options)
    batch = random_batch(part.requires, options={"kept": 5})
    draws = torch.Generator().manual_seed(4)
    batch.advantages = torch.randn(len(batch), 1, generator=draws, dtype=torch.float64) * batch.mask
    part.learning_rate = LR
    return part, batch


def no_draw(name: str) -> torch.Generator:
    raise AssertionError(f"{name}: nothing is random here")


def test_rejecting_every_token_gives_no_loss_and_no_gradient() -> None:
    part, batch = part_and_batch(tau_policy=1e-300, tau_objective=0.0)
    batch.weights = part(batch, no_draw)
    assert not batch.weights.any()
    surrogate = PPOClip(aggregation="sequence_mean", denominator="selected_decisions")
    batch.loss_weight = surrogate.loss_weights(batch)
    logp = batch.old_logp.clone().requires_grad_()
    loss = surrogate(Evaluation(logp), batch)
    assert loss == 0 and not torch.autograd.grad(loss, logp)[0].any()


def test_no_thresholds_give_the_base_method() -> None:
    part, batch = part_and_batch(tau_policy=0.0, tau_objective=0.0)
    batch.weights = part(batch, no_draw)
    surrogate, base = (
        PPOClip(aggregation="sequence_mean", denominator=d) for d in ("selected_decisions", "all")
    )
    assert torch.equal(batch.weights, batch.mask.double())
    assert_close(surrogate.loss_weights(batch), base.loss_weights(batch))


def test_chunks_never_change_the_result() -> None:
    whole, batch = part_and_batch(tau_policy=1.0, tau_objective=2.0)
    pieces, _ = part_and_batch(tau_policy=1.0, tau_objective=2.0, chunk=1)
    for part in (whole, pieces):
        for _ in range(2):
            batch.weights = part(batch, no_draw)
            part.observe(batch)
    assert torch.equal(whole(batch, no_draw), pieces(batch, no_draw))
    assert 0 < int(whole(batch, no_draw).sum()) < int(batch.mask.sum())


def test_state_takes_one_adam_step_on_the_rows_that_occur() -> None:
    given, state = tokens(), adam_state()
    state = state._replace(place=torch.cat([state.place, torch.full((3,), -1)]))
    new = updated_moments(**given, moments=state)
    occurring = given["rows"].unique()
    v, _ = score(given["logits"], given["rows"], given["action"])
    gradient = (given["advantages"][:, None] * v)[..., None] * given["features"][:, None]
    assert new.steps == 4
    for row in range(ROWS):
        before = state.first[state.place[row]] if state.place[row] >= 0 else torch.zeros(WIDTH).double()
        if row in occurring:
            mean = gradient[given["rows"] == row].mean(0)
            assert_close(new.first[new.place[row]], 0.9 * before + 0.1 * mean)
        elif new.place[row] >= 0:
            assert torch.equal(new.first[new.place[row]], before)
