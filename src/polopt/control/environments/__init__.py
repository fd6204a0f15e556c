"""Small problems with known truths, as Gymnasium environments under the namespace `polopt/`.

    import gymnasium, polopt.control.environments
    env = gymnasium.make("polopt/LQR-v0")
    envs = gymnasium.make_vec("polopt/LQR-v0", num_envs=64)      # natively batched

The import registers them by the names of their classes, so that it costs no more than Gymnasium itself. What is known of a
problem (optimal returns, true gradients, transition matrices) is in pure functions of the module next to it.
"""

from polopt.errors import MissingExtraError

ENVIRONMENTS = {
    "TwoArmedBandit-v0": "bandit:TwoArmedBandit",
    "GaussianBandit-v0": "bandit:GaussianBandit",
    "LQR-v0": "lqr:LQR",
    "RandomWalk-v0": "random_walk:RandomWalk",
    "Chain-v0": "chain:Chain",
    "Point-v0": "point:Point",
    "ShipSteering-v0": "ship_steering:ShipSteering",
    "MountainCar-v0": "mountain_car:MountainCar",
    "PointCoverage-v0": "point_coverage:PointCoverage",
    "CoverageGrid-v0": "submodular:CoverageGrid",
    "TwoRooms-v0": "submodular:TwoRooms",
    "ExperimentDesign-v0": "submodular:ExperimentDesign",
    "ItemCollection-v0": "submodular:ItemCollectionGrid",
    "RewardHackingRing-v0": "reward_hacking:RewardHackingRing",
    "TomatoWatering-v0": "reward_hacking:TomatoWatering",
}
"""Names in the namespace `polopt/`, with module and problem class."""


def register_environments() -> None:
    """Register the environments with Gymnasium; those that are registered already stay as they are.

    Raises:
        MissingExtraError: Gymnasium is not installed.
    """
    try:
        import gymnasium
    except ImportError as error:
        raise MissingExtraError('environments need gymnasium: pip install "polopt[control]"') from error
    for name, entry in ENVIRONMENTS.items():
        if f"polopt/{name}" in gymnasium.registry:
            continue
        gymnasium.register(
            f"polopt/{name}",
            entry_point=f"{__name__}.{entry}Env",
            vector_entry_point=f"{__name__}.{entry}VectorEnv",
        )


register_environments()
