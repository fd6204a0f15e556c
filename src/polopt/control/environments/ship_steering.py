r"""Ship steering (Miller, Sutton & Werbos, 1990), as in Bayesian actor-critic (Ghavamzadeh et al., JMLR 17(66), 2016).

A ship of constant speed V = 3 with a sluggish rudder is to pass a gate in a field of 150 x 150:

.. math::
    x' = x + \Delta V \sin\phi, \quad y' = y + \Delta V \cos\phi, \quad \phi' = \phi + \Delta \omega, \quad
    \omega' = \omega + \Delta (\rho - \omega) / 5

with :math:`\Delta = 0.2` and a rudder :math:`\rho` of at most 15 degrees; the action is :math:`\rho / 15`. Angles are in
degrees, turning rates in degrees per unit of time.

RECONSTRUCTED: the gate (length 20 around (100, 100), to be passed in any direction), the rewards (-1 a decision, 100 for
the gate, -100 for leaving the field) and the 500 decisions are ours; the published ones were not at hand.

    polopt/ShipSteering-v0    gate_length, horizon: decisions after which an episode is cut

Observation: x / 150, y / 150, sin(heading), cos(heading), turning rate / 15.
"""

import numpy as np
from gymnasium import spaces
from jaxtyping import Float

from polopt.control.environments.problem import Outcome, Problem, ProblemEnv, ProblemVectorEnv, State

FIELD, SPEED, STEP, LAG, RUDDER = 150.0, 3.0, 0.2, 5.0, 15.0
GATE = (100.0, 100.0)


class ShipSteering(Problem):
    """A ship, a field and a gate.

    Args:
        gate_length: length of the gate, which lies along x around (100, 100).
        horizon: decisions after which an episode is cut.
    """

    ends_at_horizon = False

    def __init__(self, gate_length: float = 20.0, horizon: int = 500) -> None:
        self.gate_length, self.horizon = gate_length, horizon
        self.action_space = spaces.Box(-1.0, 1.0, (1,), np.float32)
        # one step may lead out of the field
        low, high = np.array([-0.01, -0.01, -1, -1, -1]), np.array([1.01, 1.01, 1, 1, 1])
        self.observation_space = spaces.Box(low.astype(np.float32), high.astype(np.float32))

    def start_noise(self, generator: np.random.Generator) -> Float[np.ndarray, " 4"]:
        return generator.uniform(-1, 1, 4)

    def start(self, noise: Float[np.ndarray, "N 4"]) -> State:
        return {
            "position": FIELD * (noise[:, :2] + 1) / 2,
            "heading": 180 * noise[:, 2],
            "turning": RUDDER * noise[:, 3],
        }

    def observe(self, state: State) -> np.ndarray:
        heading = np.deg2rad(state["heading"])[:, None]
        parts = [
            state["position"] / FIELD,
            np.sin(heading),
            np.cos(heading),
            state["turning"][:, None] / RUDDER,
        ]
        observed = np.concatenate(parts, 1).astype(np.float32)
        return observed.clip(self.observation_space.low, self.observation_space.high)  # type: ignore[attr-defined]

    def move(self, state: State, actions: np.ndarray, noise: np.ndarray) -> Outcome:
        here, heading = state["position"], np.deg2rad(state["heading"])
        there = here + STEP * SPEED * np.stack([np.sin(heading), np.cos(heading)], 1)
        state["heading"] = state["heading"] + STEP * state["turning"]
        state["turning"] = state["turning"] + STEP * (RUDDER * actions[:, 0] - state["turning"]) / LAG
        state["position"] = there
        passed = self._passes(here, there)
        left = ((there < 0) | (there > FIELD)).any(-1)
        return Outcome(np.where(passed, 100.0, np.where(left, -100.0, -1.0)), passed | left)

    def _passes(self, here: Float[np.ndarray, "N 2"], there: Float[np.ndarray, "N 2"]) -> np.ndarray:
        before, after = here[:, 1] - GATE[1], there[:, 1] - GATE[1]
        crosses = (before < 0) != (after < 0)
        share = np.where(crosses, before / np.where(crosses, before - after, 1.0), 0.0)
        at = here[:, 0] + share * (there[:, 0] - here[:, 0])
        return crosses & (np.abs(at - GATE[0]) <= self.gate_length / 2)


class ShipSteeringEnv(ProblemEnv):
    """`polopt/ShipSteering-v0`."""

    problem_class = ShipSteering


class ShipSteeringVectorEnv(ProblemVectorEnv):
    """Episodes of `polopt/ShipSteering-v0`."""

    problem_class = ShipSteering
