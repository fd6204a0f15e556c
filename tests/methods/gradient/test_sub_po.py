"""Identities of the SubPO card (arXiv 2307.13372)."""

import itertools
import math
from collections.abc import Callable
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from polopt.batch import Batch, Evaluation
from polopt.functional.submodular import (
    GridMaskCoverage,
    InformationGain,
    ItemCollection,
    SetFunction,
    WeightedCoverage,
    bimodal_weights,
    grid_footprint,
    grid_points,
    marginal_gains,
    membership,
    squared_exponential,
)
from polopt.methods.classics.reinforce import ScoreFunction
from polopt.methods.gradient.sub_po import (
    FadingEntropy,
    GainsToGo,
    gains_to_go,
    prefix_weights,
    step_means,
)
from polopt.registry import recipe
from polopt.testing import check_method

SITES = 12
REPRODUCTION = Path(__file__).parents[3] / "reproductions" / "subpo" / "run.py"


def functions() -> dict[str, SetFunction]:
    """Every shipped set function on the cells of a 3 x 4 grid; the mask sees positions."""
    locations = membership([[1, 2, 3], [4, 5, 2], [6], [7, 8, 9, 10, 11]], SITES)
    return {
        "coverage": WeightedCoverage(grid_footprint(3, 4), bimodal_weights(3, 4)),
        "large": WeightedCoverage(grid_footprint(3, 4, "large")),
        "items": ItemCollection(locations, torch.tensor([2, 1, 1, 3])),
        "information": InformationGain(squared_exponential(grid_points(3, 4), 0.3), 0.1),
        "mask": GridMaskCoverage(half_width=1.0, cells=10, block=4, unit=2.0),
    }


NAMES = list(functions())
paths = st.lists(st.integers(0, SITES - 1), min_size=1, max_size=9)


def sites_of(name: str, path: list[int] | Tensor) -> Tensor:
    """One path [1, L]; positions on the grid for the mask."""
    cells = torch.as_tensor(path)[None]
    if name != "mask":
        return cells
    return torch.stack([cells // 4, cells % 4], -1).double() / 2 - 1


def batch_of(gains: Tensor, mask: Tensor | None = None) -> Batch:
    rows = len(gains)
    return Batch(
        mask=torch.ones(gains.shape, dtype=torch.bool) if mask is None else mask,
        old_logp=torch.zeros(gains.shape, dtype=torch.float64),
        rewards=torch.zeros(rows, 1, dtype=torch.float64),
        group=torch.zeros(rows, dtype=torch.int64),
        prompt_id=torch.zeros(rows, dtype=torch.int64),
        step_rewards=gains,
        batch_size=[rows],
    )


@pytest.mark.parametrize("name", NAMES)
@given(path=paths)
@settings(max_examples=25, deadline=None)
def test_i1_gains_add_up_to_the_value_and_are_not_negative(name: str, path: list[int]) -> None:
    function = functions()[name]
    prefix = function.prefix_values(sites_of(name, path))
    gains = marginal_gains(prefix)
    assert_close(gains.sum(-1), prefix[:, -1] - prefix[:, 0])
    assert (gains >= -1e-12).all()
    again = [function.add(memory := function.memory(1), sites_of(name, path)[:, 0])]
    again += [function.add(memory, site[None]) for site in sites_of(name, path)[0, 1:]]
    assert_close(torch.stack(again, 1).cumsum(1), prefix)


@pytest.mark.parametrize("name", NAMES)
@given(path=paths, seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_i1_the_order_of_the_visits_does_not_matter(name: str, path: list[int], seed: int) -> None:
    order = torch.randperm(len(path), generator=torch.Generator().manual_seed(seed))
    function = functions()[name]
    assert_close(
        function.values(sites_of(name, path)), function.values(sites_of(name, torch.tensor(path)[order]))
    )


@pytest.mark.parametrize("name", NAMES)
@given(small=paths, more=paths, site=st.integers(0, SITES - 1))
@settings(max_examples=40, deadline=None)
def test_i4_gains_diminish(name: str, small: list[int], more: list[int], site: int) -> None:
    function = functions()[name]
    gains = [
        float(marginal_gains(function.prefix_values(sites_of(name, [*path, site])))[0, -1])
        for path in (small, small + more)
    ]
    assert gains[0] >= gains[1] - 1e-10


@pytest.mark.parametrize("name", NAMES)
@given(path=paths)
@settings(max_examples=25, deadline=None)
def test_i1_i4_a_repeated_site_adds_nothing(name: str, path: list[int]) -> None:
    prefix = functions()[name].prefix_values(sites_of(name, [*path, path[0]]))
    assert float(marginal_gains(prefix)[0, -1]) == 0.0


@pytest.mark.parametrize("name", [n for n in NAMES if n != "mask"])
def test_no_site_adds_nothing(name: str) -> None:
    function = functions()[name]
    with_holes = function.prefix_values(torch.tensor([[-1, 3, -1, 7]]))[0]
    assert with_holes[0] == 0.0 and with_holes[1] == with_holes[2]
    assert_close(with_holes[-1], function.values(torch.tensor([[3, 7]]))[0])


def test_i7_information_of_one_site_and_bound_of_items() -> None:
    covariance = torch.diag(torch.tensor([1.0, 2.5, 0.3]))
    found = InformationGain(covariance, 0.7).single_values(torch.arange(3))
    assert_close(found, 0.5 * torch.log1p(covariance.diagonal().double() / 0.7))
    function = functions()["items"]
    everything = float(function.values(torch.arange(SITES)[None])[0])
    assert everything == sum(min(d, n) for d, n in [(2, 3), (1, 3), (1, 1), (3, 5)])


def test_information_is_the_log_determinant() -> None:
    covariance = squared_exponential(grid_points(3, 4), 0.3)
    path = torch.tensor([[0, 5, 11, 2]])
    inner = covariance[path[0][:, None], path[0]] / 0.1 + torch.eye(4, dtype=torch.float64)
    assert_close(InformationGain(covariance, 0.1).values(path)[0], inner.logdet() / 2)


def test_mask_coverage_counts_new_cells_in_units() -> None:
    function = GridMaskCoverage()
    # blocks of 5 x 5 cells of side 0.4 whose first cells are the same, one apart, and cut by the border
    found = function.prefix_values(
        torch.tensor([[[0.1, 0.1], [0.39, 0.2], [0.41, 0.1], [19.9, 19.9], [25.0, 0.0]]])
    )
    assert_close(found[0], torch.tensor([2.5, 2.5, 3.0, 3.1, 3.1], dtype=torch.float64))


def test_footprints_of_the_official_grid() -> None:
    small, large = grid_footprint(5, 5), grid_footprint(5, 5, "large")
    assert small[6].nonzero()[:, 0].tolist() == [6, 7, 11, 12]
    assert small[4].nonzero()[:, 0].tolist() == [4, 9]
    assert small[24].nonzero()[:, 0].tolist() == [24]
    assert large[6].nonzero()[:, 0].tolist() == [6, 7, 8, 11, 12, 13, 16, 17, 18]


@given(data=st.data())
@settings(max_examples=20, deadline=None)
def test_i2_undiscounted_gains_to_go_are_what_is_still_to_come(data: st.DataObject) -> None:
    path = data.draw(st.lists(st.integers(0, SITES - 1), min_size=2, max_size=9))
    prefix = functions()["coverage"].prefix_values(torch.tensor([path]))
    gains = marginal_gains(prefix)
    assert_close(gains_to_go(gains, gains > -1), prefix[:, -1:] - prefix[:, :-1])


def test_i3_modular_gains_are_ordinary_rewards_and_subpo_is_reinforce() -> None:
    weights = torch.tensor([0.3, 1.0, 2.0, 0.7], dtype=torch.float64)
    # every visit of a cell is a cell of its own: the ground set has the time in it
    timed = WeightedCoverage(torch.eye(5 * 4, dtype=torch.bool), weights.repeat(5))
    visits = torch.tensor([[0, 1, 1, 3, 2], [2, 2, 2, 0, 1]])
    gains = marginal_gains(timed.prefix_values(visits + 4 * torch.arange(5)))
    assert_close(gains, weights[visits[:, 1:]])
    returns = weights[visits[:, 1:]].flip(1).cumsum(1).flip(1)
    assert_close(GainsToGo(baseline="none")(batch_of(gains)), returns)


HORIZON, CELLS = 3, 3
MOVES = torch.tensor([[0, 1], [0, 2], [2, 1]])
EPISODES = list(itertools.product((0, 1), repeat=HORIZON))


def enumerated(estimate: Callable[[Batch], Tensor], history: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Expected estimate and the gradient of J over all trajectories of a process of 3 states, and the variance."""
    function = WeightedCoverage(membership([[0, 1], [1, 2], [2, 3]], 4), torch.tensor([0.2, 1.0, 0.5, 2.0]))
    contexts = CELLS * HORIZON if not history else 2 ** (HORIZON + 1)
    theta = torch.randn(contexts, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    theta.requires_grad_()
    path, logps = [[0] for _ in EPISODES], []
    for row, actions in enumerate(EPISODES):
        seen, terms = 1, []
        for step, action in enumerate(actions):
            context = seen if history else path[row][-1] * HORIZON + step
            terms.append(theta[context].log_softmax(-1)[action])
            path[row].append(int(MOVES[path[row][-1], action]))
            seen = 2 * seen + action
        logps.append(torch.stack(terms))
    logp = torch.stack(logps)
    prefix = function.prefix_values(torch.tensor(path))
    probability = logp.sum(-1).exp()
    (wanted,) = torch.autograd.grad((probability * prefix[:, -1]).sum(), theta, retain_graph=True)
    weights = estimate(batch_of(marginal_gains(prefix)))
    expected, second = torch.zeros_like(theta), torch.zeros(())
    for row in range(len(EPISODES)):
        (one,) = torch.autograd.grad((weights[row] * logp[row]).sum(), theta, retain_graph=True)
        expected = expected + probability[row].detach() * one
        second = second + probability[row].detach() * one.square().sum()
    return expected.detach(), wanted, (second - expected.square().sum()).detach()


@pytest.mark.parametrize("history", [False, True])
def test_i5_expected_estimate_is_the_gradient_of_the_objective(history: bool) -> None:
    expected, wanted, _ = enumerated(GainsToGo(baseline="none"), history)
    assert_close(expected, wanted, rtol=0.0, atol=1e-10)


@pytest.mark.parametrize("history", [False, True])
def test_i2_weighting_every_step_by_the_whole_value_agrees_at_larger_variance(history: bool) -> None:
    def whole(batch: Batch) -> Tensor:
        return (2.0 + batch.step_rewards.sum(-1, keepdim=True)).expand_as(batch.step_rewards)

    expected, wanted, variance = enumerated(whole, history)
    assert_close(expected, wanted, rtol=0.0, atol=1e-10)
    assert variance > enumerated(GainsToGo(baseline="none"), history)[2]


@pytest.mark.parametrize("history", [False, True])
def test_i6_prefix_values_agree_with_greedy_gains_at_larger_variance(history: bool) -> None:
    prefix = enumerated(GainsToGo(credit="prefix_value", baseline="none"), history)
    shifted = enumerated(GainsToGo(credit="prefix_value", baseline="none", start_value=0.7), history)
    greedy = enumerated(GainsToGo(discount=0.0, baseline="none"), history)
    assert_close(shifted[0], greedy[0], rtol=0.0, atol=1e-10)
    assert_close(prefix[0], greedy[0], rtol=0.0, atol=1e-10)
    assert prefix[2] > greedy[2]
    assert not torch.allclose(greedy[0], greedy[1], atol=1e-3)


def test_discount_zero_is_the_gain_itself() -> None:
    gains = torch.rand(4, 5, dtype=torch.float64)
    assert_close(gains_to_go(gains, gains >= 0, 0.0), gains)


def test_ragged_trajectories_ignore_what_is_masked() -> None:
    gains = torch.tensor([[1.0, 2.0, 4.0], [8.0, math.nan, math.inf]], dtype=torch.float64)
    mask = torch.tensor([[True, True, True], [True, False, False]])
    assert gains_to_go(gains, mask, 0.5).tolist() == [[3.0, 4.0, 4.0], [8.0, 0.0, 0.0]]
    assert prefix_weights(gains, mask).tolist() == [[1.0, 3.0, 7.0], [8.0, 0.0, 0.0]]
    assert prefix_weights(gains, mask, 0.5).tolist() == [[1.5, 3.5, 7.5], [8.5, 0.0, 0.0]]
    found = GainsToGo(discount=0.5)(batch_of(gains, mask))
    assert found.tolist() == [[-2.5, 0.0, 0.0], [2.5, 0.0, 0.0]]


def test_a_masked_step_takes_its_time() -> None:
    gains, mask = torch.tensor([[1.0, 5.0, 4.0]]), torch.tensor([[True, False, True]])
    assert gains_to_go(gains, mask, 0.5).tolist() == [[2.0, 0.0, 4.0]]


def test_one_trajectory_has_no_advantage_over_its_own_mean() -> None:
    gains = torch.tensor([[0.1, 0.7, 0.3]], dtype=torch.float64)
    assert GainsToGo()(batch_of(gains)).tolist() == [[0.0, 0.0, 0.0]]
    assert GainsToGo()(batch_of(gains.repeat(7, 1))).abs().max() == 0.0
    assert step_means(gains.repeat(3, 1), torch.zeros(3, 3, dtype=torch.bool)).tolist() == [0.0, 0.0, 0.0]


def test_scale_divides_and_rewards_of_trajectories_count_at_the_end() -> None:
    batch = batch_of(torch.ones(1, 3, dtype=torch.float64))
    batch.rewards[:] = 6.0
    assert GainsToGo(scale=2.0, baseline="none")(batch).tolist() == [[4.5, 4.0, 3.5]]


def test_loss_is_summed_over_decisions_and_averaged_over_trajectories() -> None:
    method = recipe("subpo")
    assert isinstance(method.surrogate, ScoreFunction)
    batch = batch_of(torch.rand(4, 3, dtype=torch.float64))
    batch.weights, batch.advantages = torch.ones(4, 3), torch.rand(4, 3, dtype=torch.float64)
    batch.loss_weight = method.surrogate.loss_weights(batch)
    logp = -torch.rand(4, 3, dtype=torch.float64)
    loss = method.objective(Evaluation(logp), batch)
    assert_close(loss, -(batch.advantages * logp).sum() / 4)


def test_entropy_bonus_fades_with_the_iterations() -> None:
    part, batch = FadingEntropy(coef=0.5), batch_of(torch.zeros(2, 3, dtype=torch.float64))
    batch.loss_weight = torch.full((2, 3), 0.5, dtype=torch.float64)
    evaluation = Evaluation(torch.zeros(2, 3), entropy=torch.ones(2, 3, dtype=torch.float64))
    found = []
    for _ in range(3):
        found.append(float(part(evaluation, batch)))
        part.observe(batch)
    assert found == pytest.approx([-1.5, -0.75, -0.5])


@pytest.mark.parametrize("what", ["subpo", GainsToGo, FadingEntropy])
def test_the_battery_passes(what: object) -> None:
    check_method(what if isinstance(what, str) else what())  # type: ignore[operator]


def test_subpo_covers_thrice_what_modular_rewards_do(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gymnasium")
    spec = spec_from_file_location("subpo_reproduction", REPRODUCTION)
    assert spec is not None and spec.loader is not None
    run = module_from_spec(spec)
    spec.loader.exec_module(run)
    monkeypatch.setitem(run.EPOCHS, "coverage", 40)
    for seed in range(3):
        assert run.train("coverage", "SubPO", seed) > 3 * run.train("coverage", "ModPO", seed)
