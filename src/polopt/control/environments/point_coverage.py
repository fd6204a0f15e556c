r"""A point mass that is to cover ground: the Ant's task of SubPO (Prajapat et al., arXiv 2307.13372) without the ant.

.. math::
    v' = v + 0.2\,(3a - v), \quad x' = x + 0.2\,v', \quad a \in [-1, 1]^2

The field [-20, 20]^2 has 100 x 100 cells. At x the cells [i, i + 5) x [j, j + 5) are covered, with i = floor((x_1 + 20) /
0.4) and j likewise; F is a tenth of the number of cells covered so far. Leaving the field ends the episode. The cells of the
start count as covered, so the gains of an episode add up to F(path) - F(start). `info["objective"]` is F(path so far),
`info["gain"]` what the last place added to it.

RECONSTRUCTED: the dynamics and the start (within 0.1 of the middle, at rest) are ours; cells and rewards are the authors'.

    polopt/PointCoverage-v0
        reward     "marginal": the gain; "modular": F of the place alone, at every visit; "cumulative": F of the path so far,
                   the authors' modular variant of the Ant, which counts every cell again at every step
        horizon    decisions of an episode

Observation: position / 20, velocity / 3 and time / horizon.
"""

from typing import Literal

import numpy as np
import torch
from gymnasium import spaces
from jaxtyping import Float

from polopt.control.environments.problem import Outcome, Problem, ProblemEnv, ProblemVectorEnv, State
from polopt.errors import ConfigError
from polopt.functional.submodular import GridMaskCoverage

FIELD = 20.0
STEP, SPEED, START = 0.2, 3.0, 0.1
REWARDS = ("marginal", "modular", "cumulative")


class PointCoverage(Problem):
    """A point mass paid for the ground it covers.

    Args:
        reward: "marginal", "modular" or "cumulative".
        horizon: decisions of an episode.

    Raises:
        ConfigError: another reward.
    """

    def __init__(
        self, reward: Literal["marginal", "modular", "cumulative"] = "marginal", horizon: int = 100
    ) -> None:
        if reward not in REWARDS:
            raise ConfigError(f"reward = {reward!r}: is not one of {', '.join(REWARDS)}")
        self.reward, self.horizon = reward, horizon
        self.function = GridMaskCoverage(FIELD)
        self.action_space = spaces.Box(-1.0, 1.0, (2,), np.float32)
        bound = np.array([1.1, 1.1, 1, 1, 1], dtype=np.float32)  # one step may lead out of the field
        self.observation_space = spaces.Box(-bound, bound)

    def start_noise(self, generator: np.random.Generator) -> Float[np.ndarray, " 2"]:
        return generator.uniform(-START, START, 2)

    def start(self, noise: Float[np.ndarray, "N 2"]) -> State:
        memory = self.function.memory(len(noise))
        value = self.function.add(memory, torch.from_numpy(noise)).numpy()
        still = np.zeros_like(noise)
        return {
            "position": noise.copy(), "velocity": still, "covered": memory["covered"].numpy(), "value": value
        }  # fmt: skip

    def observe(self, state: State) -> Float[np.ndarray, "N 5"]:
        time = state["time"].clip(max=self.horizon) / self.horizon
        parts = [state["position"] / FIELD, state["velocity"] / SPEED, time[:, None]]
        observed = np.concatenate(parts, 1).astype(np.float32)
        return observed.clip(self.observation_space.low, self.observation_space.high)  # type: ignore[attr-defined]

    def move(self, state: State, actions: np.ndarray, noise: np.ndarray) -> Outcome:
        velocity = state["velocity"] + STEP * (SPEED * actions - state["velocity"])
        state["velocity"], state["position"] = velocity, state["position"] + STEP * velocity
        place = torch.from_numpy(state["position"])
        gain = self.function.add({"covered": torch.from_numpy(state["covered"])}, place).numpy()
        state["value"] = state["value"] + gain
        paid = {"marginal": gain, "cumulative": state["value"].copy()}.get(self.reward)
        if paid is None:
            paid = self.function.add(self.function.memory(len(place)), place).numpy()
        left = np.asarray((np.abs(state["position"]) > FIELD).any(-1))
        return Outcome(paid, left, {"objective": state["value"].copy(), "gain": gain})


class PointCoverageEnv(ProblemEnv):
    """`polopt/PointCoverage-v0`."""

    problem_class = PointCoverage


class PointCoverageVectorEnv(ProblemVectorEnv):
    """Episodes of `polopt/PointCoverage-v0`."""

    problem_class = PointCoverage
