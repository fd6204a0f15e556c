"""Identities of the P3O (arXiv 2310.00212) and CoPG (arXiv 2406.19185) cards."""

import pytest
import torch
from torch.testing import assert_close

from polopt.batch import Batch, Evaluation
from polopt.engine.gradient import backward
from polopt.functional.groups import Groups
from polopt.functional.masked import masked_sum
from polopt.methods.preference.copg import ContrastivePairs, contrastive_advantage, pair_objective
from polopt.methods.preference.p3o import PairwiseProximal, joint_clip_loss, separate_clip_loss
from polopt.methods.preference.pairs import pairs_in_groups
from polopt.miniature import SumModActor, SumModTask

DRAWS = torch.Generator().manual_seed(0)


def batch(rows: int = 9, length: int = 4) -> Batch:
    mask = torch.arange(length)[None] < torch.tensor([4, 2, 3, 4, 1, 4, 3, 2, 4])[:rows, None]
    made = Batch(
        mask=mask,
        old_logp=-torch.rand(rows, length, generator=DRAWS, dtype=torch.float64),
        rewards=torch.randn(rows, 1, generator=DRAWS, dtype=torch.float64),
        group=torch.tensor([0, 1, 0, 1, 0, 2, 1, 1, 3])[:rows],
        prompt_id=torch.arange(rows),
        batch_size=[rows],
    )
    made.ref_logp = made.old_logp - 0.1
    made.weights = mask.double()
    made.loss_weight = mask.double()
    return made


def gradient(surrogate: PairwiseProximal | ContrastivePairs, data: Batch, logp: torch.Tensor) -> torch.Tensor:
    logp = logp.clone().requires_grad_()
    return torch.autograd.grad(surrogate(Evaluation(logp).where(data.mask), data), logp)[0]


def moved(data: Batch, scale: float) -> torch.Tensor:
    noise = torch.randn(data.mask.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return data.old_logp + scale * noise


def test_pairs_are_all_unordered_pairs_of_groups_with_their_averages() -> None:
    group = batch().group
    i, j, weight, members = pairs_in_groups(group, torch.ones(9, dtype=torch.bool))
    assert {frozenset(p) for p in zip(i.tolist(), j.tolist(), strict=True)} == {
        frozenset((a, b)) for a in range(9) for b in range(a) if group[a] == group[b]
    }
    assert_close(weight.sum(), torch.ones((), dtype=torch.float64))
    assert_close(weight, 1 / (members * (members - 1) / 2 * 2).double())


@pytest.mark.parametrize("variant", ["v1", "v2"])
def test_p3o_is_invariant_to_a_shift_of_a_prompts_rewards(variant: str) -> None:
    data, shifted = batch(), batch()
    shifted.rewards = data.rewards + (10.0 * data.group)[:, None]
    shifted.old_logp, logp = data.old_logp, moved(data, 0.1)
    surrogate = PairwiseProximal(variant=variant)
    assert_close(gradient(surrogate, shifted, logp), gradient(surrogate, data, logp), atol=1e-12, rtol=0.0)


def test_p3o_on_policy_is_rloo() -> None:
    data = batch()
    groups, outcome = Groups.of(data.group), data.outcome()
    plural = groups.broadcast(groups.size) > 1
    rloo = (outcome - groups.leave_one_out_mean(outcome)) * plural / groups.broadcast(groups.size) / 2
    expected = -rloo[:, None] * data.mask
    for variant in ("v1", "v2"):
        assert_close(gradient(PairwiseProximal(variant=variant), data, data.old_logp), expected)


def test_p3o_variants_agree_off_policy_without_clipping() -> None:
    data = batch()
    logp = moved(data, 0.01)
    v1, v2 = (gradient(PairwiseProximal(variant=v, clip=0.9), data, logp) for v in ("v1", "v2"))
    assert_close(v1, v2)


def test_p3o_v2_gradients_of_a_pair_cancel() -> None:
    data = batch()[[0, 2]]
    found = gradient(PairwiseProximal(), data, moved(data, 0.05))
    per_token = masked_sum(found, data.mask) / data.lengths
    assert_close(per_token.sum(), torch.zeros((), dtype=torch.float64), atol=1e-12, rtol=0.0)


def test_copg_without_kl_is_twice_p3o_on_policy() -> None:
    data = batch()
    assert_close(
        gradient(ContrastivePairs(beta=0.0), data, data.old_logp),
        2 * gradient(PairwiseProximal(), data, data.old_logp),
    )


def test_copg_with_quarter_rewards_is_ipo() -> None:
    beta, gap = 0.3, torch.linspace(-3, 3, 13, dtype=torch.float64)
    ipo = beta / 2 * (gap - 1 / (2 * beta)).square() - 1 / (8 * beta)
    assert_close(-pair_objective(torch.full_like(gap, 0.5), gap, beta), ipo)


def test_copg_gradient_is_the_leave_one_out_baseline_of_the_regularised_reward() -> None:
    data, beta = batch(), 0.2
    logp = moved(data, 0.3)
    rho = masked_sum(logp - data.ref_logp, data.mask)
    advantage = contrastive_advantage(data.outcome(), rho, data.group, beta)
    groups = Groups.of(data.group)
    plural = int((groups.size > 1).sum())
    expected = -2 / groups.broadcast(groups.size) * advantage / plural
    assert_close(gradient(ContrastivePairs(beta=beta), data, logp), expected[:, None] * data.mask)
    assert_close(groups.sum(advantage), torch.zeros(4, dtype=torch.float64), atol=1e-12, rtol=0.0)


def test_copg_is_stationary_at_the_kl_regularised_optimum() -> None:
    data, beta = batch()[[0, 2, 4]], 0.5
    logp = data.ref_logp.clone()
    logp[:, 0] += data.outcome() / beta
    assert gradient(ContrastivePairs(beta=beta), data, logp).abs().max() < 1e-12


def test_copg_squared_form_has_the_same_direction_scaled_by_beta_k() -> None:
    data, beta = batch()[[1, 3, 6, 7]], 0.2
    logp = moved(data, 0.3)
    plain, squared = (
        gradient(ContrastivePairs(beta=beta, form=f), data, logp) for f in ("contrastive", "squared")
    )
    assert_close(squared, beta * 4 * plain)


def test_pair_losses_without_a_pair_have_zero_gradient() -> None:
    data = batch()[[0, 1]]
    for surrogate in (PairwiseProximal(), ContrastivePairs()):
        assert not gradient(surrogate, data, data.old_logp).any()


@pytest.mark.parametrize("rows", [1, 3, 5])
def test_pair_losses_are_exact_under_micro_batches(rows: int) -> None:
    task = SumModTask()
    from polopt.domain import Plan

    found = []
    for size in (10_000, rows):
        actor = SumModActor(task, rows=size)
        data = actor.rollout(
            task, Plan(torch.arange(3), torch.tensor([4, 3, 5])), torch.Generator().manual_seed(1)
        ).batch
        data.rewards = torch.arange(12.0, dtype=torch.float64)[:, None] % 5
        data.weights = data.loss_weight = data.mask.double()
        data.old_logp = data.old_logp - 0.05
        backward(actor, data, PairwiseProximal(), frozenset({"logp"}), separable=False)
        found.append([p.grad.clone() for p in actor.module.parameters() if p.grad is not None])
    assert_close(found[1], found[0], atol=1e-10, rtol=0.0)


@pytest.mark.parametrize(
    "surrogate", [PairwiseProximal(variant="v1"), PairwiseProximal(), ContrastivePairs(beta=0)]
)
def test_a_response_without_decisions_takes_part_in_pairs_with_its_reward(
    surrogate: PairwiseProximal | ContrastivePairs,
) -> None:
    data = batch(2, 3)
    data.group = torch.zeros(2, dtype=torch.int64)
    data.mask = torch.tensor([[True, True, False], [False, False, False]])
    data.rewards = torch.tensor([[3.0], [1.0]], dtype=torch.float64)
    data.weights = data.loss_weight = data.mask.double()
    share = 1.0 if isinstance(surrogate, PairwiseProximal) else 2.0  # CoPG on policy is twice P3O
    assert_close(gradient(surrogate, data, data.old_logp), -share * data.mask.double())


REWARD = torch.tensor([1.0, -0.5, 2.0, 0.3], dtype=torch.float64)
OLD, REF = torch.randn(2, 4, generator=torch.Generator().manual_seed(7), dtype=torch.float64).log_softmax(-1)
ACTIONS = torch.arange(4)


def bandit() -> torch.Tensor:
    """Logits of a policy over four actions."""
    draws = torch.Generator().manual_seed(8)
    return torch.randn(4, generator=draws, dtype=torch.float64).requires_grad_()


def over_pairs(probs: torch.Tensor, of_pair: torch.Tensor) -> torch.Tensor:
    """The expectation of a quantity of two actions [4 * 4] that are drawn independently."""
    return (torch.outer(probs, probs).flatten().detach() * of_pair).sum()


@pytest.mark.parametrize("variant", ["v1", "v2"])
def test_p3o_without_clipping_has_the_policy_gradient_in_expectation_on_and_off_policy(variant: str) -> None:
    logits = bandit()
    logp = logits.log_softmax(-1)
    first, second = torch.cartesian_prod(ACTIONS, ACTIONS).unbind(1)
    gap = REWARD[first] - REWARD[second]
    (expected,) = torch.autograd.grad(-(logp.exp() * REWARD).sum(), logits, retain_graph=True)
    for old in (OLD, logp.detach()):
        x = logp - old
        one, two = x[first], x[second]
        each = separate_clip_loss(one.exp(), two.exp(), gap, 1e9) if variant == "v1" \
            else joint_clip_loss(one, two, gap, 1e9)  # fmt: skip
        (found,) = torch.autograd.grad(over_pairs(old.exp(), each), logits, retain_graph=True)
        assert_close(found, expected)


@pytest.mark.parametrize(
    "surrogate", [PairwiseProximal(variant="v1"), PairwiseProximal(), ContrastivePairs()]
)
def test_swapping_the_responses_of_a_pair_changes_nothing(
    surrogate: PairwiseProximal | ContrastivePairs,
) -> None:
    data, order = batch()[[0, 2]], torch.tensor([1, 0])
    logp = moved(data, 0.3)
    assert_close(gradient(surrogate, data[order], logp[order])[order], gradient(surrogate, data, logp))


def test_copg_has_twice_the_policy_gradient_in_expectation() -> None:
    logits, beta = bandit(), 0.3
    rho = logits.log_softmax(-1) - REF
    first, second = torch.cartesian_prod(ACTIONS, ACTIONS).unbind(1)
    each = pair_objective(REWARD[first] - REWARD[second], rho[first] - rho[second], beta)
    (found,) = torch.autograd.grad(over_pairs(logits.softmax(-1), each), logits, retain_graph=True)
    (expected,) = torch.autograd.grad((logits.softmax(-1) * (REWARD - beta * rho)).sum(), logits)
    assert_close(found, 2 * expected)


def test_copg_without_its_baseline_would_not_rest_at_the_optimum_off_policy() -> None:
    beta = 0.3
    logits = (REF + REWARD / beta).requires_grad_()
    logp = logits.log_softmax(-1)
    log_z = (REF + REWARD / beta).logsumexp(-1)
    regularized = (REWARD - beta * (logp - REF)).detach()
    (score,) = torch.autograd.grad((OLD.exp() * logp).sum(), logits, retain_graph=True)
    (unbaselined,) = torch.autograd.grad((OLD.exp() * regularized * logp).sum(), logits)
    assert_close(unbaselined, beta * log_z * score)
    assert unbaselined.abs().max() > 0.1


def test_copg_loss_is_a_convex_parabola_with_its_floor_at_the_gap_that_the_rewards_ask_for() -> None:
    beta, reward_gap, rho_gap = 0.3, torch.tensor(0.7).double(), torch.linspace(-5, 9, 50).double()
    loss = -pair_objective(reward_gap.expand(50), rho_gap, beta)
    assert_close(loss, beta / 2 * (rho_gap - reward_gap / beta).square() - reward_gap**2 / (2 * beta))


def test_copg_is_invariant_to_a_shift_of_a_prompts_rewards() -> None:
    data = batch()
    logp, found = moved(data, 0.3), []
    for shift in (0.0, 10.0):
        moved_rewards = data.clone()
        moved_rewards.rewards = data.rewards + (shift * data.group)[:, None]
        found.append(gradient(ContrastivePairs(), moved_rewards, logp))
    assert_close(found[0], found[1], atol=1e-12, rtol=0.0)
