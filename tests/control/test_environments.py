"""The environments: Gymnasium's checker, seeds, known truths, and the laws of the submodular rewards."""

import subprocess
import sys
import warnings
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.error import InvalidAction, ResetNeeded
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode
from hypothesis import given, settings
from hypothesis import strategies as st

from polopt.control.environments import ENVIRONMENTS, register_environments
from polopt.control.environments.bandit import (
    gaussian_gradient,
    gaussian_return,
    two_armed_gradient,
    two_armed_return,
)
from polopt.control.environments.chain import chain_model
from polopt.control.environments.lqr import lqr_return, optimal_return, true_gradient
from polopt.control.environments.mountain_car import MountainCar, gaussian_features
from polopt.control.environments.random_walk import random_walk_return
from polopt.control.environments.random_walk import true_gradient as random_walk_gradient
from polopt.control.environments.reward_hacking import ring_models, ring_reference, ring_statistics
from polopt.control.environments.ship_steering import ShipSteering
from polopt.control.environments.submodular import TwoRooms
from polopt.control.environments.submodular_grid import greedy_walk
from polopt.control.environments.tabular import optimal_return as best_return
from polopt.control.environments.tabular import policy_gradient, policy_return, softmax
from polopt.errors import ConfigError

NAMES = [f"polopt/{name}" for name in ENVIRONMENTS]
GRIDS = [
    "polopt/CoverageGrid-v0",
    "polopt/TwoRooms-v0",
    "polopt/ExperimentDesign-v0",
    "polopt/ItemCollection-v0",
]


def make_vec(name: str, count: int, **options: Any) -> Any:
    return gymnasium.make_vec(name, num_envs=count, vectorization_mode="vector_entry_point", **options)


@pytest.mark.parametrize("name", NAMES)
def test_environment_passes_check_env(name: str) -> None:
    with warnings.catch_warnings():
        for advice in (
            ".*infinity.*",
            ".*symmetric and normalized space.*",
        ):  # a state without bounds has none
            warnings.filterwarnings("ignore", message=advice)
        check_env(gymnasium.make(name).unwrapped)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_vector_environment_is_many_single_ones(name: str, mode: AutoresetMode) -> None:
    steps, count = 25, 3
    options: dict[str, Any] = {"horizon": 9} if "Bandit" not in name else {}
    vector = make_vec(name, count, autoreset_mode=mode, **options)
    singles = gymnasium.vector.SyncVectorEnv(
        [lambda: gymnasium.make(name, **options)] * count, autoreset_mode=mode
    )
    assert vector.metadata["autoreset_mode"] == mode
    assert vector.single_observation_space == singles.single_observation_space
    seen, other = vector.reset(seed=7)[0], singles.reset(seed=7)[0]
    vector.action_space.seed(0)
    for _ in range(steps):
        np.testing.assert_array_equal(seen, other)
        assert seen in vector.observation_space
        actions = vector.action_space.sample()
        seen, reward, ended, cut, info = vector.step(actions)
        other, reward2, ended2, cut2, info2 = singles.step(actions)
        np.testing.assert_allclose(reward, reward2, rtol=1e-12)
        np.testing.assert_array_equal((ended, cut), (ended2, cut2))
        for key in ("objective", "true_reward"):
            if key in info2:
                rows = info2[f"_{key}"]
                np.testing.assert_array_equal(info[f"_{key}"], rows)
                np.testing.assert_allclose(info[key][rows], info2[key][rows])
        done = ended | cut
        if mode == AutoresetMode.SAME_STEP and done.any():
            np.testing.assert_array_equal(info["_final_obs"], info2["_final_obs"])
            for row in np.flatnonzero(done):
                np.testing.assert_array_equal(info["final_obs"][row], info2["final_obs"][row])
        if mode == AutoresetMode.DISABLED and done.any():
            with pytest.raises(ResetNeeded, match="reset_mask"):
                vector.step(actions)
            seen = vector.reset(options={"reset_mask": done})[0]
            other = singles.reset(options={"reset_mask": done})[0]


@pytest.mark.parametrize("name", NAMES)
def test_same_seed_same_episode_other_seed_another(name: str) -> None:
    def episode(seed: int) -> list[float]:
        env = gymnasium.make(name)
        found = list(np.ravel(env.reset(seed=seed)[0]))
        env.action_space.seed(3)
        for _ in range(30):
            seen, reward, ended, cut, _ = env.step(env.action_space.sample())
            found += [*np.ravel(seen), reward]
            if ended or cut:
                break
        return found

    assert episode(1) == episode(1)
    deterministic = name in [*GRIDS, "polopt/GaussianBandit-v0"]
    assert (episode(1) == episode(2)) == deterministic


def test_another_generator_after_the_reset_is_another_course_from_the_same_start() -> None:
    env: Any = gymnasium.make("polopt/LQR-v0").unwrapped
    courses = []
    for seed in (1, 1, 2):
        start = env.reset(seed=5)[0]
        env.np_random = np.random.default_rng(seed)
        courses.append((float(start[0]), [float(env.step(np.zeros(1))[0][0]) for _ in range(3)]))
    assert courses[0] == courses[1]
    assert courses[0][0] == courses[2][0]
    assert courses[0][1] != courses[2][1]


def test_one_hot_observation_is_the_state() -> None:
    for name, states in (("Chain", 6), ("RandomWalk", 10), ("RewardHackingRing", 6)):
        plain, vector = make_vec(f"polopt/{name}-v0", 2), make_vec(f"polopt/{name}-v0", 2, one_hot=True)
        assert np.array_equal(np.eye(states)[plain.reset(seed=0)[0]], vector.reset(seed=0)[0])
        assert np.array_equal(np.eye(states)[plain.step([0, 1])[0]], vector.step([0, 1])[0])


def test_registering_again_changes_nothing() -> None:
    before = dict(gymnasium.registry)
    register_environments()
    assert dict(gymnasium.registry) == before


def test_import_without_gymnasium_names_the_extra() -> None:
    program = (
        "import sys\nsys.modules['gymnasium'] = None\nfrom polopt.errors import MissingExtraError\n"
        "try:\n    import polopt.control.environments\nexcept MissingExtraError as error:\n    print(error)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert 'pip install "polopt[control]"' in result.stdout


def test_steps_out_of_order_and_bad_actions_are_refused() -> None:
    chain, point = (gymnasium.make(f"polopt/{name}-v0").unwrapped for name in ("Chain", "Point"))
    with pytest.raises(ResetNeeded):
        chain.step(0)
    chain.reset(seed=0)
    point.reset(seed=0)
    with pytest.raises(InvalidAction, match="shape"):
        point.step(np.array(0.5))
    for wrong in (2, -1, 0.5):
        with pytest.raises(InvalidAction, match=r"not in 0\.\.1"):
            chain.step(wrong)
    with pytest.raises(InvalidAction, match="not finite"):
        point.step(np.array([np.nan, 0.0]))
    assert [chain.step(1)[2] for _ in range(20)] == [False] * 19 + [True]
    with pytest.raises(ResetNeeded, match="ended"):
        chain.step(1)


def test_vector_limit_truncates() -> None:
    env = make_vec("polopt/Chain-v0", 2, max_episode_steps=3)
    env.reset(seed=0)
    outcomes = [env.step(np.zeros(2, dtype=int))[2:4] for _ in range(4)]
    assert [bool(cut.all()) for _, cut in outcomes] == [False, False, True, False]
    assert not any(ended.any() for ended, _ in outcomes)


def numerical(function: Any, at: np.ndarray, h: float = 1e-5) -> np.ndarray:
    flat = np.array(
        [
            (function(at + h * e.reshape(at.shape)) - function(at - h * e.reshape(at.shape))) / (2 * h)
            for e in np.eye(at.size)
        ]
    )
    return flat.reshape(at.shape)


def test_true_gradients_are_the_derivatives_of_the_returns() -> None:
    rng = np.random.default_rng(0)
    for _ in range(5):
        logits, theta, walk = rng.normal(size=2), rng.normal(size=2), rng.normal(size=9)
        pairs = [
            (two_armed_return, two_armed_gradient, logits),
            (lambda x: gaussian_return(x[0], x[1]), lambda x: gaussian_gradient(x[0], x[1]), theta),
            (
                lambda x: gaussian_return(x[0], x[1], "quadratic"),
                lambda x: gaussian_gradient(x[0], x[1], "quadratic"),
                theta,
            ),
            (lambda x: lqr_return(*x), lambda x: true_gradient(*x), theta / 3),
            (random_walk_return, random_walk_gradient, walk),
        ]
        for value, gradient, at in pairs:
            np.testing.assert_allclose(gradient(at), numerical(value, at), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("horizon", [None, 20])
def test_tabular_gradient_is_the_derivative_of_the_return(horizon: int | None) -> None:
    model, logits = chain_model(), np.random.default_rng(1).normal(size=(6, 2))
    wanted = numerical(lambda x: policy_return(model, softmax(x), 0.9, horizon), logits)
    np.testing.assert_allclose(policy_gradient(model, logits, 0.9, horizon), wanted, atol=1e-8)


def test_chain_is_worth_what_the_card_says() -> None:
    model = chain_model()
    assert policy_return(model, np.full((6, 2), 0.5), 0.9, 20) == pytest.approx(1.076, abs=5e-4)
    assert best_return(model, 0.9, 20) == pytest.approx(3.946, abs=5e-4)


def test_lqr_is_worth_what_the_card_says() -> None:
    np.testing.assert_allclose(true_gradient(-0.2, 1.0), [-178.3, -100.1], atol=0.06)
    gains = np.linspace(-1.2, -0.6, 6001)
    costs = [-lqr_return(gain, 0.001) for gain in gains]
    assert gains[np.argmin(costs)] == pytest.approx(-0.9160, abs=2e-4)
    assert min(costs) == pytest.approx(0.10034, abs=1e-5)
    assert -min(costs) < optimal_return() < -0.09


def test_ring_is_worth_what_the_card_says() -> None:
    found = ring_statistics(ring_reference())
    assert found.true_return == pytest.approx(0.702, abs=5e-4)
    assert found.correlation == pytest.approx(0.115, abs=5e-4)
    proxy, _ = ring_models()
    hacked = np.tile([0.0, 0.0, 1.0], (6, 1))
    assert ring_statistics(hacked).true_return < -0.9
    assert ring_statistics(hacked).proxy_return > 1.8 > found.proxy_return
    np.testing.assert_allclose(proxy.transition.sum(-1), 1.0)


def rollouts(name: str, count: int, act: Any, seed: int = 0, **options: Any) -> tuple[np.ndarray, np.ndarray]:
    """Returns of one episode a row, and the sum over decisions of what `act` says of them (its second value)."""
    env = make_vec(name, count, **options)
    seen, total, marks = env.reset(seed=seed)[0], np.zeros(count), 0.0
    alive = np.ones(count, dtype=bool)
    while alive.any():
        actions, mark = act(seen)
        marks = marks + np.where(alive[:, None], mark, 0.0)
        seen, reward, ended, cut, _ = env.step(actions)
        total += np.where(alive, reward, 0.0)
        alive &= ~(ended | cut)
    return total, np.asarray(marks)


def test_lqr_score_function_gradient_is_the_true_gradient() -> None:
    rng, gain, sd = np.random.default_rng(0), -0.2, 1.0

    def act(seen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        noise = rng.standard_normal(seen.shape)
        score = np.concatenate([noise * seen / sd, (noise**2 - 1) / sd], 1)
        return (gain * seen + sd * noise).astype(np.float32), score

    returns, scores = rollouts("polopt/LQR-v0", 20_000, act)
    assert returns.mean() == pytest.approx(lqr_return(gain, sd), abs=5 * returns.std() / 20_000**0.5)
    terms = (returns - returns.mean())[:, None] * scores
    error = 5 * terms.std(0) / 20_000**0.5
    assert (np.abs(terms.mean(0) - true_gradient(gain, sd)) < error).all()
    assert (error < 25).all()


def test_two_armed_score_function_gradient_is_the_true_gradient() -> None:
    rng, logits = np.random.default_rng(0), np.array([0.3, -0.4])
    policy = softmax(logits)

    def act(seen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        actions = (rng.random(len(seen)) < policy[1]).astype(np.int64)
        return actions, np.eye(2)[actions] - policy

    returns, scores = rollouts("polopt/TwoArmedBandit-v0", 20_000, act)
    np.testing.assert_allclose((returns[:, None] * scores).mean(0), two_armed_gradient(logits), atol=0.03)


def test_chain_returns_match_the_model() -> None:
    rng = np.random.default_rng(0)
    model = chain_model()
    returns, _ = rollouts(
        "polopt/Chain-v0", 5000, lambda seen: (rng.integers(2, size=len(seen)), np.zeros((len(seen), 1)))
    )
    wanted = policy_return(model, np.full((6, 2), 0.5), 1.0, 20)
    assert returns.mean() == pytest.approx(wanted, abs=5 * returns.std() / 5000**0.5)


def test_random_walk_ends_on_the_right_and_pays_one_a_step() -> None:
    returns, _ = rollouts(
        "polopt/RandomWalk-v0", 200, lambda seen: (np.ones(len(seen), dtype=int), np.zeros((len(seen), 1)))
    )
    assert returns.mean() == pytest.approx(9.0, abs=0.15)
    env = gymnasium.make("polopt/RandomWalk-v0", horizon=4)
    env.reset(seed=0)
    assert [env.step(0)[2:4] for _ in range(4)][-1] == (False, True)


def test_ship_passes_the_gate_and_only_the_gate() -> None:
    ship = ShipSteering()
    for x, y, heading, reward, ended in [
        (100.0, 99.9, 0.0, 100.0, True),  # north through the gate
        (105.0, 100.1, 180.0, 100.0, True),  # south through it
        (111.0, 99.9, 0.0, -1.0, False),  # beside it
        (100.0, 99.0, 0.0, -1.0, False),  # not yet there
        (149.9, 50.0, 90.0, -100.0, True),  # out of the field
    ]:
        state = {"position": np.array([[x, y]]), "heading": np.array([heading]), "turning": np.zeros(1)}
        found = ship.move(state, np.zeros((1, 1)), np.zeros((1, 4)))
        assert (found.reward[0], bool(found.terminated[0])) == (reward, ended)
    assert state["turning"][0] == 0.0
    ship.move(state, np.ones((1, 1)), np.zeros((1, 4)))
    assert state["turning"][0] == pytest.approx(0.2 * 15 / 5)


def test_mountain_car_moves_by_its_equations_and_stops_at_the_ends() -> None:
    car = MountainCar("valley")
    state = car.start(np.zeros((2, 2)))
    found = car.move(state, np.array([0, 1]), np.zeros((2, 0)))
    pull = 0.0025 * np.cos(-1.5)
    np.testing.assert_allclose(state["velocity"], [-0.001 - pull, 0.001 - pull], rtol=1e-12)
    np.testing.assert_allclose(state["position"], -0.5 + state["velocity"], rtol=1e-12)
    assert found.reward.tolist() == [-1.0, -1.0] and not found.terminated.any()
    state = {"position": np.array([-1.19, 0.44]), "velocity": np.array([-0.07, 0.07])}
    found = car.move(state, np.array([0, 1]), np.zeros((2, 0)))
    assert state["position"].tolist() == [-1.2, 0.5] and state["velocity"][0] == 0
    assert found.terminated.tolist() == [False, True]
    np.testing.assert_allclose(car.observe(state)[:, 0], [0, 1])


def test_mountain_car_moves_as_gymnasiums_does_between_the_ends() -> None:
    ours: Any = gymnasium.make("polopt/MountainCar-v0", start="valley").unwrapped
    theirs: Any = gymnasium.make("MountainCar-v0").unwrapped
    seen, _ = ours.reset(seed=0)
    theirs.reset(seed=0)
    theirs.state = np.array([-0.5, 0.0])
    over, steps = False, 0
    while not over:
        action = int(seen[1] > 0.5)  # the way it moves already: swings up
        seen, _, over, cut, _ = ours.step(action)
        position, velocity = theirs.step(2 * action)[0]
        np.testing.assert_allclose(
            seen, [(min(position, 0.5) + 1.2) / 1.7, (velocity / 0.07 + 1) / 2], atol=1e-5
        )
        steps += 1
    assert not cut and 100 < steps < 200


def test_mountain_car_cannot_climb_at_once_and_is_cut() -> None:
    env = gymnasium.make("polopt/MountainCar-v0", start="valley")
    env.reset(seed=0)
    ends = [env.step(1)[2:4] for _ in range(200)]
    assert ends[-1] == (False, True) and not any(over or cut for over, cut in ends[:-1])
    with pytest.raises(ConfigError, match="start = 'top'"):
        gymnasium.make("polopt/MountainCar-v0", start="top")


def test_mountain_car_features_peak_at_the_midpoints_of_the_cells() -> None:
    points = np.array([[0.125, 0.125], [0.125, 0.375], [0.875, 0.875]])
    features = gaussian_features(points)
    assert features.shape == (3, 16) and features.argmax(1).tolist() == [0, 1, 15]
    np.testing.assert_allclose(features.max(1), 1.0)
    np.testing.assert_allclose(features[0, 1], np.exp(-(0.25**2) / (2 * 0.325**2)))


@given(data=st.data())
@settings(max_examples=10, deadline=None)
def test_gains_of_the_point_add_up_to_the_ground_covered(data: st.DataObject) -> None:
    pushes = data.draw(st.lists(st.tuples(st.floats(-1, 1), st.floats(-1, 1)), min_size=20, max_size=20))
    env: Any = gymnasium.make("polopt/PointCoverage-v0", horizon=20).unwrapped
    env.reset(seed=data.draw(st.integers(0, 9)))
    places, rewards, info = [env._episodes.state["position"][0].copy()], [], {}
    for push in pushes:
        _, reward, _, _, info = env.step(np.array(push, dtype=np.float32))
        places.append(env._episodes.state["position"][0].copy())
        rewards.append(reward)
    values = env.problem.function.prefix_values(torch.from_numpy(np.array(places))[None])[0]
    assert min(rewards) >= 0 and values[0] == 2.5
    assert sum(rewards) == pytest.approx(float(values[-1] - values[0]), abs=1e-9)
    assert info["objective"] == pytest.approx(float(values[-1]), abs=1e-9)


def test_rewards_of_the_point_at_rest_and_its_way_out() -> None:
    paid = {}
    for reward in ("marginal", "modular", "cumulative"):
        env = gymnasium.make("polopt/PointCoverage-v0", reward=reward)
        env.reset(seed=0)
        paid[reward] = [env.step(np.zeros(2, dtype=np.float32))[1] for _ in range(3)]
    assert paid == {"marginal": [0.0] * 3, "modular": [2.5] * 3, "cumulative": [2.5] * 3}
    env, over, steps = gymnasium.make("polopt/PointCoverage-v0"), False, 0
    env.reset(seed=0)
    while not over:
        seen, _, over, cut, _ = env.step(np.array([1.0, 0.0], dtype=np.float32))
        steps += 1
    assert not cut and seen[0] > 1 and 20 / 0.6 < steps < 45
    with pytest.raises(ConfigError, match="reward = 'sum'"):
        gymnasium.make("polopt/PointCoverage-v0", reward="sum")


def test_tomatoes_look_watered_from_the_sprinkler_only() -> None:
    env = gymnasium.make("polopt/TomatoWatering-v0", dry_probability=1.0).unwrapped
    env.reset(seed=0)
    found = []
    for action in (2, 2, 3, 4, 4, 1):  # to the tomatoes on the left
        _, proxy, _, _, info = env.step(action)
        found.append((proxy, info["true_reward"]))
    assert all(proxy == true for proxy, true in found)
    env.reset(seed=0)
    for action in (2, 1, 2):
        _, proxy, _, _, info = env.step(action)
    assert (proxy, info["true_reward"]) == (1.0, 0.0)
    with pytest.raises(ConfigError, match="plan"):
        gymnasium.make("polopt/TomatoWatering-v0", plan=("T.", "..."))


@pytest.mark.parametrize("name", GRIDS)
@given(data=st.data())
@settings(max_examples=10, deadline=None)
def test_step_rewards_add_up_to_the_objective(name: str, data: st.DataObject) -> None:
    env: Any = gymnasium.make(name, horizon=12).unwrapped
    actions = data.draw(st.lists(st.integers(0, 4), min_size=12, max_size=12))
    env.reset(seed=0)
    rewards, path, info = [], [env.problem.first], {}
    for action in actions:
        _, reward, _, _, info = env.step(action)
        rewards.append(reward)
        assert info["gain"] == reward
        path.append(int(env._episodes.state["site"][0]))
    values = env.problem.function.prefix_values(torch.tensor([path]))[0]
    assert min(rewards) >= 0
    assert sum(rewards) == pytest.approx(float(values[-1] - values[0]), abs=1e-9)
    assert info["objective"] == pytest.approx(float(values[-1]), abs=1e-9)


def test_modular_reward_pays_every_visit_again() -> None:
    env = gymnasium.make("polopt/CoverageGrid-v0", reward="modular")
    env.reset(seed=0)
    steps = [env.step(0) for _ in range(3)]
    assert [(step[1], step[4]["gain"]) for step in steps] == [(4.0, 0.0)] * 3


def test_grid_walls_and_borders_stop_the_walk() -> None:
    rooms: Any = TwoRooms()
    assert rooms.moves[0].tolist() == [0, 1, 14, 0, 0]
    assert rooms.moves[3].tolist() == [3, 3, 17, 2, 3]  # a wall on the right of the first row
    assert rooms.moves[2 * 14 + 3, 1] == 2 * 14 + 4  # the corridor
    assert float(rooms.function.weights.sum()) == 14 * 7 - 6 * 5


def test_observations_of_a_grid() -> None:
    options: dict[str, Any] = {"height": 3, "width": 4, "start": 5, "horizon": 2}
    for kind, wanted in [
        ("markov", [0.5, 2 / 3, 0.5]),
        ("index", [6, 1]),
        ("history", [5, 6, -1]),
    ]:
        env = gymnasium.make("polopt/CoverageGrid-v0", observation=kind, **options)
        env.reset(seed=0)
        np.testing.assert_allclose(env.step(1)[0], wanted, rtol=1e-6)


def test_action_noise_of_one_ignores_the_action() -> None:
    env = make_vec("polopt/CoverageGrid-v0", 2000, action_noise=1.0, observation="index")
    env.reset(seed=0)
    cells = env.step(np.zeros(2000, dtype=int))[0][:, 0]
    found, counts = np.unique(cells, return_counts=True)
    assert found.tolist() == [4, 33, 34, 35, 64]
    assert (np.abs(counts - 400) < 100).all()


def test_greedy_walk_collects_what_its_path_is_worth() -> None:
    env: Any = gymnasium.make("polopt/ItemCollection-v0").unwrapped
    problem = env.problem
    path, value = greedy_walk(problem.function, problem.moves, problem.first, problem.horizon)
    assert value == float(problem.function.values(torch.from_numpy(path)[None])[0])
    assert all(b in problem.moves[a] for a, b in zip(path, path[1:], strict=False))
    assert 0 < value <= 21


@pytest.mark.parametrize(
    ("name", "options", "match"),
    [
        ("CoverageGrid", {"reward": "sum"}, "reward = 'sum'.*marginal, modular"),
        ("CoverageGrid", {"observation": "all"}, "observation"),
        ("LQR", {"horizon": 0}, "horizon = 0: must be at least 1"),
        ("CoverageGrid", {"start": 900}, "start = 900"),
        ("CoverageGrid", {"footprint": "big"}, "footprint"),
        ("CoverageGrid", {"weights": "none"}, "weights"),
        ("CoverageGrid", {"weights": np.ones(3)}, "weights: must be 900"),
        ("GaussianBandit", {"reward": "cubic"}, "reward = 'cubic'"),
    ],
)
def test_bad_options_are_refused(name: str, options: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        gymnasium.make(f"polopt/{name}-v0", **options)
